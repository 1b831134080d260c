"""What is trained, token by token, as a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ma_sft.labels.preview import heading, pieces, preview_text
from ma_sft.pages.report import environment
from ma_sft.utils import console


def preview_html(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, title: str = "What is trained"
) -> str:
    """The rows as one page that needs nothing else: no script, no network; the ids show under the pointer."""
    shown = [
        {"heading": heading(row, number), "pieces": pieces(row["input_ids"], row["labels"], tokenizer)}
        for number, row in enumerate(rows)
    ]
    return str(environment().get_template("preview.html.jinja").render(title=title, rows=shown))


def show_rows(
    dataset: Dataset | Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 3,
    html: str | Path | None = None,
    borders: bool = False,
) -> None:
    """Print the first `n` rows with what is trained in them, or write them as an HTML page."""
    rows = [dataset[row] for row in range(min(n, len(dataset)))]
    if html is not None:
        Path(html).write_text(preview_html(rows, tokenizer), encoding="utf-8")
    else:
        console().print(preview_text(rows, tokenizer, borders=borders))
