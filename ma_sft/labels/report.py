"""What the check finds: counts over all rows, and findings, as a person and a program read them."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ma_sft.errors import LabelError

SHOWN_ROWS = 5

# Code -> (severity, message), in the order in which they are shown; `CheckReport.enter` fills in the braces.
MESSAGES = {
    "nothing to train": ("error", "{nothing}"),
    "no labels": ("error", "these rows train nothing; remove them or mend their template"),
    "foreign labels": ("error", "a label differs from the token in its place; labels must not be shifted"),
    "missing end token": ("error", "a trained turn does not end in a trained end token: the model learns no end"),
    "double BOS": ("error", "the text already had the BOS token; tokenise with add_special_tokens=False"),
    "unlike inference": ("error", "the ids before a trained turn are not what inference sees"),
    "unlike the template": ("error", "what is trained is not what the model must write"),
    "trained past the end": ("error", "more is trained than the model must write"),
    "trained against the row": ("error", "turns are trained that must not be"),
    "trained twice": ("error", "a turn is trained more than once"),
    "turns left out": ("error", "turns are not trained, and nothing says why"),
    "lost content": ("error", "what the row says is neither trained nor shown"),
    "unknown rest": ("error", "what follows the last trained turn is not the conversation"),
    "response template missing": ("error", "nothing is trained in these rows"),
    "not proven": ("warning", "{not_proven}"),
    "harmless": ("warning", "what the model learns beside its turns and generation never shows"),
    "said but not shown": ("warning", "the template leaves it out of the history: {losses}"),
    "untrained turns": ("warning", "turns without a label: {untrained_turns}"),
    "cut rows": ("warning", "longer than max_length={max_length}; what overflow leaves out of them is not trained"),
    "cut turns": ("warning", "turns that lose their end; they do not teach to stop"),
    "nothing left after cutting": ("warning", "max_length={max_length} leaves no label; these rows are dropped"),
    "border inside a token": ("warning", "the first token of the response holds the template's end; it is masked"),
    "ambiguous templates": ("warning", "the last response template of a turn counts, and these rows may mean another"),
    "special-token text": ("warning", "text that looks like control tokens, encoded as ordinary text: {special_text}"),
    "duplicate rows": ("warning", "the same ids as an earlier row"),
}


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
    before. `turns` are stretches of labels; `compared_turns` of them came before the verifier, which proved
    `proven_turns`. `judged` says which rows; `losses` and `not_proven` count what rows say and no sequence shows, and
    what could not be verified and why. `unused_columns` are those of each source that nothing read, with an example.
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
        """Whether rows were verified, and every one of them was found right."""
        return bool(self.judged_rows) and not self.errors and not self.not_proven

    @property
    def verdict(self) -> str:
        """What is proven, in a line."""
        if self.errors:
            return "labels are wrong"
        if not self.proven:
            reasons = "; ".join(f"{why} ({n:,})" for why, n in self.not_proven.items())
            return f"nothing wrong was found; not proven: {reasons or 'no row was verified'}"
        return f"every label is right: {self.judged}"

    def raise_errors(self) -> None:
        """Raise `LabelError` with all errors in one line, if there are any."""
        if self.errors:
            raise LabelError("the labels are wrong: " + "; ".join(map(str, self.errors)))

    def to_json(self) -> str:
        derived = {name: getattr(self, name) for name in ("trained_share", "proven", "verdict")}
        return json.dumps({**asdict(self), **derived, "ok": not self.errors}, ensure_ascii=False, indent=2)

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
    """How often each code was found, in which rows first, and an example."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.rows: dict[str, list[int]] = {}
        self.examples: dict[str, str] = {}

    def add(self, code: str, rows: Sequence[int], example: str = "", count: int | None = None) -> None:
        """Note that rows have a fault; `count` is how often, if not once in each."""
        self.counts[code] += len(rows) if count is None else count
        self.rows[code] = list(dict.fromkeys([*self.rows.get(code, []), *rows[:SHOWN_ROWS]]))[:SHOWN_ROWS]
        if example:
            self.examples.setdefault(code, example)

    def listed(self, report: CheckReport, max_length: int | None) -> list[Finding]:
        """The findings in the order of `MESSAGES`, with the report's counts in their words."""
        why = "no row has a label"
        if report.lost_rows:
            why = f"max_length={max_length} cuts off every response; raise max_length"
        words = {
            "nothing": why,
            "max_length": max_length,
            "not_proven": "; ".join(report.not_proven),
            "losses": "; ".join(f"{what} ({n:,} rows)" for what, n in report.losses.items()),
            "untrained_turns": "; ".join(f"{reason} ({n:,})" for reason, n in report.untrained_turns.items()),
            "special_text": ", ".join(map(repr, list(report.special_text)[:SHOWN_ROWS])),
        }
        return [
            Finding(
                cast(Any, level),
                code,
                self.counts[code],
                self.rows[code],
                ": ".join(filter(None, [message.format(**words), self.examples.get(code)])),
            )
            for code, (level, message) in MESSAGES.items()
            if self.counts[code]
        ]


def count(counts: dict[str, int], lists: Iterable[Iterable[str]]) -> None:
    """Add how often each name stands in the lists."""
    for each in lists:
        for name in each:
            counts[name] = counts.get(name, 0) + 1
