"""What the check finds: counts over all rows, and findings, as a person and a program read them."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ma_sft.data.stages import unused_lines
from ma_sft.errors import LabelError
from ma_sft.utils import Readable

SHOWN = 5  # rows of a finding, and details

# Code -> (severity, message), in the order in which they are shown; what was found in detail stands behind the message.
CODES = {
    "nothing to train": ("error", ""),
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
    "response template missing": ("error", "nothing is trained in these rows"),
    "not proven": ("warning", ""),
    "harmless": ("warning", "trained, but generation stops before it"),
    "said but not shown": ("warning", "the template leaves it out of the history"),
    "untrained turns": ("warning", "turns without a label"),
    "default system prompt": ("warning", "the template writes text of its own before the first message of these rows"),
    "unanswered question": ("warning", "no answer follows the last message, from which nothing is learned"),
    "cut rows": ("warning", "longer than max_length={max_length}; what overflow leaves out of them is not trained"),
    "cut turns": ("warning", "turns that lose their end; they do not teach to stop"),
    "nothing left after cutting": ("warning", "max_length={max_length} leaves no label; these rows are dropped"),
    "border inside a token": ("warning", "the first token of the response holds the template's end; it is masked"),
    "ambiguous templates": ("warning", "the last response template of a turn counts, and these rows may mean another"),
    "special-token text": ("warning", "text that looks like control tokens, encoded as ordinary text"),
    "duplicate rows": ("warning", "the same ids as an earlier row"),
}


# Names of how often a code was found and of what in detail, as attributes of the report and in JSON.
COUNTS = {
    **{"cut_rows": "cut rows", "cut_turns": "cut turns", "lost_rows": "nothing left after cutting"},
    **{"foreign_labels": "foreign labels", "missing_end": "missing end token", "double_bos": "double BOS"},
    **{"mismatches": "unlike inference", "template_missing": "response template missing"},
    **{"special_text_rows": "special-token text", "duplicate_rows": "duplicate rows"},
}
DETAILS = {
    **{"untrained_turns": "untrained turns", "special_text": "special-token text"},
    **{"losses": "said but not shown", "not_proven": "not proven"},
}


@dataclass(frozen=True)
class Finding:
    """Something that the check found: how often, in which rows first, and what it means.

    `rows` are rows of the labelled data set, `places` the lines of files that they come from, or else their numbers.
    """

    level: str
    code: str
    count: int
    rows: list[int]
    message: str
    places: list[str] = field(default_factory=list)
    details: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        where = ", ".join(Path(place).name for place in self.places)
        where = f" ({where}{', ...' if self.count > len(self.rows) else ''})" if where else ""
        return f"{self.code}: {self.count:,}{where}: {self.message}"


@dataclass(repr=False)
class CheckReport(Readable):
    """Counts over all rows, and findings. What trains wrong labels, nothing, or never an end is an error.

    `turns` are stretches of labels; `compared_turns` of them came before the verifier, which proved `proven_turns`.
    `judged` says which rows were verified, `sampled` whether others
    were not. `histogram` maps a power of two to the number of rows that are at most so many tokens long and longer than
    half of it. `unused_columns` are those of each source that nothing read, with an example.
    """

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    turns: int = 0
    rows_without_label: int = 0
    compared_turns: int = 0
    judged_rows: int = 0
    judged: str = ""
    sampled: bool = False
    proven_turns: int = 0
    unused_columns: dict[str, dict[str, str]] = field(default_factory=dict)
    histogram: dict[int, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        """What stands in `COUNTS` and `DETAILS`."""
        code = COUNTS.get(name) or DETAILS.get(name)
        if code is None:
            raise AttributeError(name)
        finding = next((finding for finding in self.findings if finding.code == code), None)
        if name in COUNTS:
            return finding.count if finding else 0
        return finding.details if finding else {}

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
        """What is proven and what not, in a line."""
        if self.errors:
            return "labels are wrong"
        if not self.proven:
            reasons = "; ".join(f"{why} ({n:,})" for why, n in self.not_proven.items())
            return f"nothing wrong was found; not proven: {reasons or 'no row was verified'}"
        ends = f", but turns lose their end ({self.cut_turns:,})" if self.cut_turns else ""
        return f"{'no wrong label was found' if self.sampled else 'every label is right'}{ends}: {self.judged}"

    def raise_errors(self) -> None:
        """Raise `LabelError` with all errors in one line, if there are any."""
        if self.errors:
            raise LabelError("the labels are wrong: " + "; ".join(map(str, self.errors)))

    def to_json(self) -> str:
        names = (*COUNTS, *DETAILS, "trained_share", "proven", "verdict")
        values = {**asdict(self), **{name: getattr(self, name) for name in names}, "ok": not self.errors}
        return json.dumps(values, ensure_ascii=False, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "CheckReport":
        """The report that `to_json` wrote."""
        values = {name: value for name, value in json.loads(text).items() if name in cls.__dataclass_fields__}
        values["histogram"] = {int(length): count for length, count in values["histogram"].items()}
        return cls(**{**values, "findings": [Finding(**finding) for finding in values["findings"]]})

    def __rich__(self) -> RenderableType:
        table = Table(title="what is trained", show_header=False)
        plain = {name: name.replace("_", " ") for name in ("rows", "tokens", "trained_tokens", "turns")}
        plain |= {"compared_turns": "turns verified", "proven_turns": "found right", "cut_rows": "cut rows"}
        for name, title in {**plain, "lost_rows": "rows cut to nothing"}.items():
            table.add_row(title, f"{getattr(self, name):,}")
        table.add_row("trained share", f"{self.trained_share:.1%}")
        most = max(self.histogram.values(), default=1)
        for length, n in self.histogram.items():
            table.add_row(f"<= {length:,} tokens", f"{'█' * max(1, round(30 * n / most)) if n else ''} {n:,}")
        lines: list[RenderableType] = [table]
        for finding in self.findings:
            colour = "bold red" if finding.level == "error" else "yellow"
            lines.append(Text.assemble((f"{finding.level:>7} ", colour), str(finding)))
        lines += [Text(f"warning {line}", style="yellow") for line in unused_lines(self.unused_columns)]
        right = self.proven and not self.cut_turns
        lines.append(Text(self.verdict, style="bold red" if self.errors else "green" if right else "yellow"))
        return Group(*lines)


class Findings:
    """How often each code was found, in which rows first, and what in detail."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.rows: defaultdict[str, list[int]] = defaultdict(list)
        self.details: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, code: str, rows: Sequence[int], details: Iterable[str] = (), count: int | None = None) -> None:
        """Note that rows have a fault; `count` is how often, if not once in each. Of errors one detail is kept."""
        self.counts[code] += len(rows) if count is None else count
        self.rows[code] = list(dict.fromkeys([*self.rows[code], *rows[:SHOWN]]))[:SHOWN]
        if CODES[code][0] == "warning" or not self.details[code]:
            self.details[code].update(details)

    def listed(self, max_length: int | None, place: Callable[[int], str]) -> list[Finding]:
        """The findings in the order of `CODES`; `place` says where a row comes from."""
        found = []
        for code, (level, message) in CODES.items():
            if self.counts[code]:
                rows, details = self.rows[code], dict(self.details[code])
                shown = [f"{what} ({n:,})" if len(details) > 1 else what for what, n in [*details.items()][:SHOWN]]
                words = ": ".join(filter(None, [message.format(max_length=max_length), "; ".join(shown)]))
                found.append(Finding(level, code, self.counts[code], rows, words, [*map(place, rows)], details))
        return found
