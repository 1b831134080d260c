"""What the check finds: counts over all rows, and findings, as a person and a program read them."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ma_sft.errors import LabelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN_ROWS = 5


@dataclass(frozen=True)
class Finding:
    """Something that the check found: how often, in which rows first, and what it means."""

    level: Literal["error", "warning"]
    code: str
    count: int
    rows: list[int]
    message: str

    def __str__(self) -> str:
        where = f" (rows {', '.join(map(str, self.rows))}{', ...' if self.count > len(self.rows) else ''})"
        return f"{self.code}: {self.count:,}{where if self.rows else ''}: {self.message}"


@dataclass
class CheckReport:
    """Counts over all rows, and findings. What trains wrong labels, nothing, or never an end is an error.

    `histogram` maps a length in tokens to the number of rows that are at most that long and longer than the one
    before. `turns` are stretches of labels; `compared_turns` of them came before the judge, who found `proven_turns`
    right, `witnessed_turns` of them by generation marks too. `judged` says which rows; `losses` and `not_proven` count
    what rows say and no sequence shows, and what could not be judged and why. `unused_columns` are those of each source
    that nothing read, with an example.
    """

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    turns: int = 0
    untrained_turns: dict[str, int] = field(default_factory=dict)
    rows_without_label: int = 0
    cut_rows: int = 0
    cut_turns: int = 0
    lost_rows: int = 0
    foreign_labels: int = 0
    missing_end: int = 0
    double_bos: int = 0
    compared_turns: int = 0
    mismatches: int = 0
    judged_rows: int = 0
    judged: str = ""
    proven_turns: int = 0
    witnessed_turns: int = 0
    losses: dict[str, int] = field(default_factory=dict)
    not_proven: dict[str, int] = field(default_factory=dict)
    template_missing: int = 0
    special_text_rows: int = 0
    special_text: dict[str, int] = field(default_factory=dict)
    duplicate_rows: int = 0
    unused_columns: dict[str, dict[str, str]] = field(default_factory=dict)
    histogram: dict[int, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "warning"]

    @property
    def proven(self) -> bool:
        """Whether rows were judged, and every one of them was found right."""
        return bool(self.judged_rows) and not self.errors and not self.not_proven

    @property
    def verdict(self) -> str:
        """What is proven, in a line."""
        if self.errors:
            return "labels are wrong"
        if not self.proven:
            reasons = "; ".join(f"{why} ({n:,})" for why, n in self.not_proven.items())
            return f"nothing wrong was found; not proven: {reasons or 'no row was judged'}"
        return f"every label is right: {self.judged}"

    def raise_errors(self) -> None:
        """Raise `LabelError` with all errors in one line, if there are any."""
        if self.errors:
            raise LabelError("the labels are wrong: " + "; ".join(map(str, self.errors)))

    def to_json(self) -> str:
        return json.dumps(
            {
                **asdict(self),
                "trained_share": self.trained_share,
                "ok": not self.errors,
                "proven": self.proven,
                "verdict": self.verdict,
            },
            ensure_ascii=False,
            indent=2,
        )

    @classmethod
    def from_json(cls, text: str) -> "CheckReport":
        """The report that `to_json` wrote."""
        values = {name: value for name, value in json.loads(text).items() if name in cls.__dataclass_fields__}
        values["histogram"] = {int(length): count for length, count in values["histogram"].items()}
        return cls(**{**values, "findings": [Finding(**finding) for finding in values["findings"]]})

    def __rich__(self) -> RenderableType:
        table = Table(title="what is trained", show_header=False)
        plain = ["rows", "tokens", "trained_tokens", "turns", "compared_turns", "proven_turns", "cut_rows", "lost_rows"]
        for name in plain:
            table.add_row(name.replace("_", " "), f"{getattr(self, name):,}")
        table.add_row("trained share", f"{self.trained_share:.1%}")
        most = max(self.histogram.values(), default=1)
        for length, n in self.histogram.items():
            table.add_row(f"<= {length:,} tokens", f"{'█' * max(1, round(30 * n / most)) if n else ''} {n:,}")
        lines: list[RenderableType] = [table]
        for finding in self.findings:
            colour = "bold red" if finding.level == "error" else "yellow"
            lines.append(Text.assemble((f"{finding.level:>7} ", colour), str(finding)))
        colour = "bold red" if self.errors else "green" if self.proven else "yellow"
        lines.append(Text(self.verdict, style=colour))
        return Group(*lines)


class Findings:
    """Collects (count, first rows, first example) by code while batches go by."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.rows: dict[str, list[int]] = {}
        self.examples: dict[str, str] = {}

    def add(self, code: str, rows: "Sequence[int] | NDArray[Any]", example: str = "") -> None:
        self.counts[code] += len(rows)
        shown = self.rows.setdefault(code, [])
        if example:
            self.examples.setdefault(code, example)
        for row in rows[: SHOWN_ROWS - len(shown)]:
            if int(row) not in shown:
                shown.append(int(row))

    def finding(self, level: Literal["error", "warning"], code: str, message: str) -> list[Finding]:
        if not self.counts[code]:
            return []
        example = f": {self.examples[code]}" if code in self.examples else ""
        return [Finding(level, code, self.counts[code], self.rows.get(code, []), message + example)]


def count(counts: dict[str, int], lists: Iterable[Iterable[str]]) -> None:
    for each in lists:
        for name in each:
            counts[name] = counts.get(name, 0) + 1
