"""A recipe's rows before any training: their labels proven, or shown token by token."""

from collections.abc import Sequence
from pathlib import Path

from ma_sft.config import Recipe
from ma_sft.labels.check import CheckReport
from ma_sft.labels.templates import load_tokenizer
from ma_sft.labels.tokenize import label
from ma_sft.pages.preview import show_rows
from ma_sft.training.checkpoints import with_date
from ma_sft.training.prepare import as_trained, check_as_trained
from ma_sft.training.rehearsal import rehearse
from ma_sft.utils import progress


def check(recipe: Recipe, args: Sequence[str] = (), *, every_row: bool = False) -> CheckReport:
    """Rehearse a recipe's run on a tiny twin of its model, and prove the labels of its rows.

    Args:
        recipe: data and settings.
        args: flags that win over the recipe.
        every_row: verify every row, not a sample with every shape.

    Raises:
        MaSftError: anything wrong with settings, rows or the rehearsed run; wrong labels are in the report.
    """
    settings = recipe.resolve(args)
    tokenizer, added_tokens = load_tokenizer(settings)
    settings = with_date(settings, tokenizer)
    progress(rehearse(settings, tokenizer, added_tokens))
    return check_as_trained(settings, tokenizer, label(settings, tokenizer), every_row=every_row)


def preview(
    recipe: Recipe,
    args: Sequence[str] = (),
    *,
    n: int = 3,
    html: str | Path | None = None,
    borders: bool = False,
) -> None:
    """Print which tokens of a recipe's first `n` rows are trained, or write them as an HTML page.

    Args:
        recipe: data and settings.
        args: flags that win over the recipe.
        borders: show the borders of tokens.

    Raises:
        MaSftError: anything wrong with settings or rows.
    """
    settings = recipe.resolve(args)
    tokenizer, _ = load_tokenizer(settings)
    settings = with_date(settings, tokenizer)
    show_rows(as_trained(settings, label(settings, tokenizer), n), tokenizer, n=n, html=html, borders=borders)
