"""What a run says in the terminal: before its first step what will be trained, after its last one what came of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size

from ma_sft.errors import MaSftError
from ma_sft.utils import console, say, visible

if TYPE_CHECKING:
    from trl import SFTTrainer

    from ma_sft.config import Settings
    from ma_sft.tools.memory import Forecast
    from ma_sft.training.prepare import Prepared


def forecast_memory(settings: "Settings", data: "Prepared") -> "Forecast | None":
    """The forecast of peak memory for the longest row that there is; None where the model cannot be simulated."""
    from ma_sft.packing.pack import lengths
    from ma_sft.tools.memory import forecast

    rows: Any = data.dataset
    try:
        return forecast(settings, int(lengths(rows).max()) if hasattr(rows, "num_rows") else None)
    except MaSftError:
        raise
    except Exception as error:
        say(f"no forecast of memory: one step on fake tensors failed with {type(error).__name__}: {error}")
        return None


def show_start(
    settings: "Settings", data: "Prepared", trainer: "SFTTrainer", memory: "Forecast | None", checkpoint: str | None
) -> list[tuple[str, str]]:
    """Print what will be trained; the (what, how much) lines of it."""
    from rich.table import Table

    from ma_sft.labels.tokenize import counts_table
    from ma_sft.tools.memory import memory_table

    table = Table(title=f"{settings.run.name}: what will be trained", show_header=False)
    lines = counts_table(data.counts) + memory_table(settings, trainer.model, memory)
    for key, value in lines:
        table.add_row(key, value)
    screen = console()
    screen.print(table)
    if data.check is not None:
        screen.print(data.check)
    if data.packing is not None:
        screen.print(str(data.packing))
    if checkpoint:
        say(f"going on from {checkpoint}")
    return lines


def show_end(out: Path, answers: list[tuple[str, str, str, str]], summary: dict[str, Any]) -> None:
    """Print a few answers, then the figures and where everything is: the last twenty lines, whole on every screen."""
    from rich.table import Table

    screen = console()
    rows = evaluation_rows(summary["evaluation"]) if summary.get("evaluation") else []
    if len(rows) > 1:
        table = Table("held-out", *rows[0]["cells"])
        for row in rows:
            table.add_row(row["name"], *(" -> ".join(text or "?" for text in cell) for cell in row["cells"].values()))
        screen.print(table)
    for answer in answers[:3]:
        for what, text in zip(("message", "before", "after"), answer, strict=False):
            say(shorten(f"{what:>12}  {text}", screen.width))
    if answers:
        say(f"{len(answers):,} held-out answers in all, in {out / 'report.html'}", "")
    for title, (before, after) in rows[0]["cells"].items() if rows else ():
        name = f"held-out {title.replace('-', ' ')}" if title != "stopped by itself" else title
        say(f"{name}: {before or 'not measured'} before, {after} after")
    for what in ("adapter", "merged", "model", "report.html"):
        if (out / what).exists():
            say(f"{what:>12}  {out / what}")
    say(f"{'chat':>12}  ma-sft chat {out}")


def shorten(text: str, width: int) -> str:
    """The text as one line that a terminal of `width` columns does not break."""
    line = visible(text.replace("\n", " "))
    return line if cell_len(line) < width else f"{set_cell_size(line, width - 5)} ..."


def evaluation_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of an evaluation as text: `name` (all, then each of several sources) and `cells`, title -> (before,
    after) training, empty where not measured."""
    before, after = found["before"] or {"sources": {}}, found["after"]
    parts = {"all": (before, after)}
    if len(after["sources"]) > 1:
        parts |= {name: (before["sources"].get(name, {}), part) for name, part in after["sources"].items()}
    shown = {"loss": ".3f", "perplexity": ".2f", "token_accuracy": ".1%", "score": ".1%", "eos_rate": ".1%"}
    titles = {"token_accuracy": "token accuracy", "score": after.get("metric"), "eos_rate": "stopped by itself"}
    rows = []
    for name, sides in parts.items():
        texts = {k: tuple(format(side[k], how) if k in side else "" for side in sides) for k, how in shown.items()}
        rows.append({"name": name, "cells": {str(titles.get(k, k)): texts[k] for k in shown if k in after}})
    return rows
