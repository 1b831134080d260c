"""`ma-sft data build` and `data show`: a mixture as a folder that `load_from_disk`, recipes and TRL read."""

import json
from bisect import bisect
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk
from huggingface_hub import DatasetCard, DatasetCardData
from rich.table import Table

from ma_sft.config import refuse_code
from ma_sft.data.duplicates import conversations
from ma_sft.data.mixture import load_mixture, read_mixture
from ma_sft.data.parallel import processes
from ma_sft.data.stages import Report
from ma_sft.errors import RecipeError
from ma_sft.utils import atomic_dir, console, must_be_new
from ma_sft.version import __version__

REPORT = "report.json"


def build(config: Path, out: Path, *, allow_code: bool = False, **overrides: Any) -> Report:
    """Make the mixture that a YAML file describes and save it in `out`, which is there whole or not at all.

    `out` then holds the data set (`save_to_disk`; splits `train` and `test` if rows were held out), `README.md`, its
    card with sources, counts and licences, and `report.json`, the table of stages and filters with examples.

    Raises:
        MaSftError: as `load_mixture`; `out` exists; or a Python file is named and `allow_code` is false.
    """
    must_be_new(out, "pass another folder with -o, or delete it")
    settings = read_mixture(config) | overrides
    if not allow_code:
        refuse_code(settings, config)
    if settings.get("streaming"):
        raise RecipeError(f"{config}: streaming: a stream cannot be saved; leave it out, memory stays constant anyway")
    mixture = load_mixture(**settings)
    assert isinstance(mixture.train, Dataset)
    rows = DatasetDict({"train": mixture.train, "test": mixture.test}) if mixture.test is not None else mixture.train
    rows = rows.remove_columns("raw")  # who reads the folder takes its rows for the raw ones
    with atomic_dir(out) as folder:
        rows.save_to_disk(str(folder), num_proc=processes(settings.get("num_proc"), len(mixture.train)))
        report = {"ma_sft": __version__, "settings": settings, **mixture.report.to_dict()}
        (folder / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=2, default=str), encoding="utf-8")
        _card(mixture.report, settings, mixture.train, mixture.test).save(folder / "README.md")
    return mixture.report


def show(folder: Path, count: int = 3) -> None:
    """Print what `build` wrote: the table of stages, the sources, and the first rows.

    Raises:
        RecipeError: not such a folder.
    """
    if not (folder / REPORT).is_file():
        raise RecipeError(f"{folder} holds no {REPORT}; give a folder that `ma-sft data build` made")
    screen = console()
    report = Report.from_dict(json.loads((folder / REPORT).read_text(encoding="utf-8")))
    screen.print(report, _sources(report))
    saved = load_from_disk(str(folder))
    for name, rows in saved.items() if isinstance(saved, DatasetDict) else [("train", saved)]:
        screen.print(f"{name}: {len(rows):,} rows, columns {', '.join(rows.column_names)}", style="bold")
        for row in rows.select(range(min(count, len(rows)) if name == "train" else 0)):
            screen.print(row["origin"], style="dim")
            for side in ("messages", "prompt", "chosen", "rejected"):
                for message in row.get(side) or []:
                    text = message["content"] or json.dumps(message.get("tool_calls"), ensure_ascii=False)
                    mark = "" if side in ("messages", "prompt") else f"{side} "
                    screen.print(f"  {mark}{message['role']}: {text}")


def _sources(report: Report) -> Table:
    table = Table("source", "format", "licence")
    for title in ("weight", "available", "used"):
        table.add_column(title, justify="right")
    for s in report.sources:
        weight = f"{s['weight']:g}" if "weight" in s else ""
        table.add_row(s["path"], s["format"], s.get("license", ""), weight, f"{s['available']:,}", f"{s['used']:,}")
    return table


def _card(report: Report, settings: dict[str, Any], train: Dataset, test: Dataset | None) -> DatasetCard:
    """The hub's dataset card; its licence is the sources' if they share one, `other` if not, none if none says."""
    licences = {source.get("license") for source in report.sources}
    licence = licences.pop() if len(licences) == 1 else "other"
    (first,) = conversations(train[:1])
    first = [{key: value for key, value in message.items() if value is not None} for message in first]
    lines = [
        f"| `{s['path']}` | {s['format']} | {s.get('license') or 'not stated'} | {s['available']:,} | {s['used']:,} |"
        for s in report.sources
    ]
    stages = [f"| {s.name} | {s.rows_in:,} | {_removed(s.removed)} | {s.rows_out:,} |" for s in report.stages]
    parts = [
        "# " + str(settings.get("kind", "conversation")).capitalize() + " data",
        f"Built by ma_sft {__version__} with seed {settings.get('seed', 0)}: {len(train):,} rows to train on"
        + (f", {len(test):,} held out." if test is not None else "."),
        "## Sources",
        "\n".join(["| source | format | licence | available | used |", "| --- | --- | --- | --- | --- |", *lines]),
        "## Rows",
        "\n".join(["| stage | rows in | removed | rows out |", "| --- | --- | --- | --- |", *stages]),
        f"Examples of what each filter removed are in `{REPORT}`.",
        "## First row",
        "```json\n" + json.dumps(first, ensure_ascii=False, indent=2) + "\n```",
    ]
    data = DatasetCardData(license=licence, size_categories=[_size(len(train))], task_categories=["text-generation"])
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _removed(removed: dict[str, int]) -> str:
    return ", ".join(f"{why}: {count:,}" for why, count in removed.items()) or "0"


def _size(rows: int) -> str:
    """The hub's size category."""
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "n>10M")
    return names[bisect([1_000, 10_000, 100_000, 1_000_000, 10_000_000], rows)]
