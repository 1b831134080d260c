"""What happened to the rows, stage by stage: how many came in, which went and why, which columns nothing read."""

import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ma_sft.data.messages import SHOWN_COLUMNS
from ma_sft.utils import Readable

if TYPE_CHECKING:
    from rich.console import RenderableType

logger = logging.getLogger(__name__)
EXAMPLES = 5  # kept of each reason
BROKEN, BAD_ANSWER = NOT_CONVERTED = ("broken rows", "bad answers")
NOT_DRAWN = ("left out by weight", "held out")


@dataclass
class Stage:
    """A step of the way: `rows_in` minus all of `removed` is `rows_out`. `examples` tells some rows removed, by why."""

    name: str
    rows_in: int = 0
    rows_out: int = 0
    seconds: float = 0.0
    removed: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)  # columns that a conversion did not read, roles of other names

    def remove(self, why: str, count: int, examples: Iterable[str] = ()) -> None:
        if count:
            self.removed[why] = self.removed.get(why, 0) + count
            kept = self.examples.setdefault(why, [])
            kept += itertools.islice(examples, EXAMPLES - len(kept))

    def keep(self, rows: dict[str, Any], *, say: bool = False) -> list[bool]:
        """Which converted rows have no reason to go; the others are counted, and unused columns noted and logged.

        Args:
            rows: columns `removed_by` (the reason, "" for none), `error` (what to tell of the row) and `unused`.
            say: log the first, tenth, hundredth row that goes: of a stream, where no table can tell it in time.
        """
        for why, error in zip(rows["removed_by"], rows["error"], strict=True):
            if why:
                self.remove(why, 1, [error])
                if say and str(self.removed[why]).strip("0") == "1":
                    logger.warning("%s: %d removed so far by %s: %s", self.name, self.removed[why], why, error)
        found = {column: what for text in rows["unused"] if text for column, what in json.loads(text).items()}
        new = {column: what for column, what in found.items() if column not in self.unused}
        self.unused |= new
        if new:
            more = f" and {len(new) - SHOWN_COLUMNS:,} more columns" if len(new) > SHOWN_COLUMNS else ""
            words = ", ".join(f"{column} {what}" for column, what in list(new.items())[:SHOWN_COLUMNS])
            logger.warning("%s: %s%s", self.name.rpartition(": convert")[0], words, more)
        self.rows_in += len(rows["removed_by"])
        self.rows_out = self.rows_in - sum(self.removed.values())
        return [not why for why in rows["removed_by"]]


@dataclass(repr=False)
class Report(Readable):
    """What happened to the rows, step by step, and how many of each source are in the end."""

    stages: list[Stage] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, rows_in: int = 0) -> Iterator[Stage]:
        """The stage that the block is, timed."""
        stage, start = Stage(name, rows_in), time.monotonic()
        yield stage
        stage.rows_out = stage.rows_in - sum(stage.removed.values())
        stage.seconds = time.monotonic() - start
        self.stages.append(stage)

    @property
    def removed(self) -> Counter[str]:
        """Rows that went, by why."""
        return sum((Counter(stage.removed) for stage in self.stages), Counter())

    @property
    def skipped(self) -> int:
        """Broken rows, and bad answers, such as preferences without a better side."""
        return sum(n for why, n in self.removed.items() if why in NOT_CONVERTED)

    @property
    def filtered(self) -> dict[str, int]:
        """Rows that each filter removed."""
        return {why: n for why, n in self.removed.items() if why not in (*NOT_CONVERTED, *NOT_DRAWN)}

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("stage")
        for title in ("rows in", "removed", "rows out", "rows/s"):
            table.add_column(title, justify="right")
        examples = []
        for stage in self.stages:
            removed, speed = sum(stage.removed.values()), stage.rows_in / max(stage.seconds, 1e-9)
            table.add_row(stage.name, *(f"{n:,}" for n in (stage.rows_in, removed, stage.rows_out)), f"{speed:,.0f}")
            for why, count in stage.removed.items():
                table.add_row(f"  {why}", "", f"{count:,}", "", "")
                examples += [Text(f"{why}: {example}") for example in stage.examples.get(why, [])[:2]]
        return Group(table, *examples)


def unused_columns(stages: Iterable[Stage]) -> dict[str, dict[str, str]]:
    """Of each source, the columns that nothing read and that may mean something, and roles of other names."""
    return {stage.name.rpartition(": convert")[0]: stage.unused for stage in stages if stage.unused}
