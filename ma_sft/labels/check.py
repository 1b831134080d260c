"""`check_dataset`: facts about the labels of all rows, and the judge on a sample in which every shape stands.

The facts need `input_ids` and `labels` alone, so they serve every way in which labels are made. Run it on rows before
they are cut and packed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from datasets import Dataset
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ma_sft.data.parallel import Inherited, processes
from ma_sft.errors import LabelError
from ma_sft.labels.judge import IGNORE_INDEX, Judge, Verdict, runs
from ma_sft.labels.response import TemplateReport, TokenBytes
from ma_sft.labels.shapes import EACH_SHAPE, shapes_of, spread
from ma_sft.labels.statement import misquotes
from ma_sft.labels.templates import control_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray


SHOWN_ROWS = 5
TEXT_ROWS = (
    "text has no chat template to compare with; proven of it: the response template was found, labels are the tokens "
    "in their place, and each turn ends in a trained end token"
)
AT_A_TIME = 100  # conversations that are judged; of fewer, other processes are not worth their start
LIKE_ROWS = 50  # judging a conversation takes as long as converting and tokenising so many


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


class _Findings:
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


def check_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    conversations: Dataset | None = None,
    judge: Judge | None = None,
    template_report: TemplateReport | None = None,
    max_length: int | None = None,
    sample: int | None = 2_000,
    num_proc: int | None = 1,
) -> CheckReport:
    """Check every row of a labelled dataset.

    Args:
        dataset: columns `input_ids` and `labels`, uncut and unpacked; `row` (of the conversation), `untrained` and
            `special_text`, as `ChatEncoder.tokenize_batch` gives them, are used if there.
        conversations: `messages` of the rows, and `tools`, `chat_template_kwargs` and `raw`, the row as it lies in its
            file, if there are such columns. Without them nothing is judged.
        judge: by default one that knows the tokenizer alone.
        template_report: what `DataCollatorForCompletionOnlyLM.check` found in the rows.
        max_length: where rows will be cut, in tokens.
        sample: how many conversations are judged, evenly spread, beside 20 of every shape; None for all.
        num_proc: processes that judge; None for all cores if there are many conversations.
    """
    report = CheckReport(rows=len(dataset))
    found = _Findings()
    facts = _Facts(dataset, tokenizer, max_length, report, found)
    for batch in _columns(dataset):
        facts.add(*batch)
    report.histogram = _histogram(facts.lengths)
    if conversations is not None:
        court = _Court(dataset, conversations, judge or Judge(tokenizer), report, found, facts, num_proc)
        court.judge(sample)
    elif template_report is not None:
        report.not_proven[TEXT_ROWS] = found.counts["not proven"] = report.rows
    if template_report is not None:
        _take_over(template_report, found)
    report.cut_rows, report.cut_turns = found.counts["cut rows"], found.counts["cut turns"]
    report.lost_rows = found.counts["nothing left after cutting"]
    report.foreign_labels, report.missing_end = found.counts["foreign labels"], found.counts["missing end token"]
    report.double_bos, report.mismatches = found.counts["double BOS"], found.counts["unlike inference"]
    report.template_missing = found.counts["response template missing"]
    report.special_text_rows = found.counts["special-token text"]
    report.duplicate_rows = found.counts["duplicate rows"]
    report.findings = _explain(report, found, max_length, template_report)
    return report


class _Facts:
    """What is true of all rows, batch by batch, from ids and labels alone."""

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        report: CheckReport,
        found: _Findings,
    ) -> None:
        self.report, self.found, self.max_length = report, found, max_length
        self.bos = tokenizer.bos_token_id if tokenizer.bos_token_id != tokenizer.eos_token_id else None
        self.token_bytes = TokenBytes(tokenizer)
        self.controls = np.fromiter(control_tokens(tokenizer).values(), dtype=np.int64)
        self.ends = np.setdiff1d(np.union1d(self.controls, [tokenizer.eos_token_id or -1]), [self.bos or -1])
        self.notes = dataset.select_columns([n for n in ("untrained", "special_text") if n in dataset.column_names])
        self.lengths = np.zeros(0, dtype=np.int64)
        self.edges: dict[tuple[str, int], list[int]] = {}  # token before, at the end of, inside a turn -> first rows
        self.open_rows: set[int] = set()
        self._seen: set[bytes] = set()
        self._first = 0  # row of the batch at hand

    def add(self, ids: "NDArray[Any]", labels: "NDArray[Any]", starts: "NDArray[Any]") -> None:
        """Flat ids, flat labels and row starts (one more than rows) of the next batch."""
        sizes = np.diff(starts)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        trained = labels != IGNORE_INDEX
        self.lengths = np.concatenate([self.lengths, sizes])
        self.report.tokens += len(ids)
        self.report.trained_tokens += int(trained.sum())
        self.found.add("foreign labels", self._first + np.unique(owner[trained & (labels != ids)]))
        begins, stops = _runs(trained, starts)
        self.report.turns += len(begins)
        labelled = np.zeros(len(sizes), dtype=bool)
        labelled[owner[begins]] = True
        self._add_notes(labelled)
        self._add_ends(ids, owner, begins, stops)
        self._add_edges(ids, owner, begins, stops, trained)
        self._add_bos(ids, starts, sizes)
        if self.max_length is not None:
            self._add_cuts(starts, sizes, owner[begins], begins, stops, labelled, self.max_length)
        self._add_duplicates(ids, starts)
        self._first += len(sizes)

    def _add_notes(self, labelled: "NDArray[Any]") -> None:
        noted = self.notes[self._first : self._first + len(labelled)]
        reasons = noted.get("untrained") or [[]] * len(labelled)
        excused = np.array([bool(each) for each in reasons])
        _count(self.report.untrained_turns, reasons)
        self.report.rows_without_label += int((~labelled).sum())
        self.found.add("untrained turns", self._first + np.flatnonzero(excused))
        self.found.add("no labels", self._first + np.flatnonzero(~labelled & ~excused))
        special = noted.get("special_text") or []
        _count(self.report.special_text, special)
        self.found.add("special-token text", self._first + np.flatnonzero([bool(tokens) for tokens in special]))

    def _add_ends(
        self, ids: "NDArray[Any]", owner: "NDArray[Any]", begins: "NDArray[Any]", stops: "NDArray[Any]"
    ) -> None:
        open_end = ~np.isin(ids[stops - 1], self.ends)
        for at in np.flatnonzero(open_end):  # whitespace after the end token is no harm
            run = ids[begins[at] : stops[at]]
            text = [self.token_bytes[int(i)] for i in run[-4:]]
            while text and not text[-1].strip():
                text.pop()
                run = run[:-1]
            open_end[at] = not (len(run) and np.isin(run[-1], self.ends))
        rows = self._first + owner[begins][open_end]
        self.open_rows.update(rows.tolist())
        self.found.add("missing end token", rows)

    def _add_edges(
        self,
        ids: "NDArray[Any]",
        owner: "NDArray[Any]",
        begins: "NDArray[Any]",
        stops: "NDArray[Any]",
        trained: "NDArray[Any]",
    ) -> None:
        """Where turns begin and end, and their control tokens: what no judged turn has makes a row be judged."""
        inside = np.flatnonzero(trained & np.isin(ids, self.controls))
        inner = begins > 0
        for edge, at, rows in (
            ("before", begins[inner] - 1, owner[begins[inner]]),
            ("end", stops - 1, owner[begins]),
            ("inside", inside, owner[inside]),
        ):
            tokens, first = np.unique(ids[at], return_index=True)
            for token, where in zip(tokens.tolist(), first.tolist(), strict=True):
                known = self.edges.setdefault((edge, token), [])
                if len(known) < EACH_SHAPE:
                    known.append(self._first + int(rows[where]))

    def _add_bos(self, ids: "NDArray[Any]", starts: "NDArray[Any]", sizes: "NDArray[Any]") -> None:
        if self.bos is not None:
            firsts = starts[:-1][sizes > 1]
            double = (ids[firsts] == self.bos) & (ids[firsts + 1] == self.bos)
            self.found.add("double BOS", self._first + np.flatnonzero(sizes > 1)[double])

    def _add_cuts(
        self,
        starts: "NDArray[Any]",
        sizes: "NDArray[Any]",
        rows: "NDArray[Any]",
        begins: "NDArray[Any]",
        stops: "NDArray[Any]",
        labelled: "NDArray[Any]",
        limit: int,
    ) -> None:
        offset = starts[:-1][rows]
        kept = np.zeros(len(sizes), dtype=bool)
        kept[rows[(begins - offset) < limit]] = True
        self.found.add("cut rows", self._first + np.flatnonzero(sizes > limit))
        self.found.add("cut turns", self._first + rows[(stops - offset) > limit])
        self.found.add("nothing left after cutting", self._first + np.flatnonzero(labelled & ~kept))

    def _add_duplicates(self, ids: "NDArray[Any]", starts: "NDArray[Any]") -> None:
        duplicates = []
        for row in range(len(starts) - 1):
            key = hashlib.blake2b(ids[starts[row] : starts[row + 1]].tobytes(), digest_size=16).digest()
            if key in self._seen:
                duplicates.append(self._first + row)
            self._seen.add(key)
        self.found.add("duplicate rows", duplicates)


class _Court:
    """Brings conversations and their sequences before the judge, in several processes where there are many."""

    def __init__(
        self,
        dataset: Dataset,
        conversations: Dataset,
        judge: Judge,
        report: CheckReport,
        found: _Findings,
        facts: _Facts,
        num_proc: int | None,
    ) -> None:
        self.conversations, self.report, self.found, self.facts = conversations, report, found, facts
        self.num_proc = num_proc
        owner = np.asarray(dataset["row"]) if "row" in dataset.column_names else np.arange(len(dataset))
        columns = [name for name in ("input_ids", "labels", "untrained") if name in dataset.column_names]
        self.bench = _Bench(judge, dataset.select_columns(columns), owner)
        self.proven_edges: set[tuple[str, int]] = set()

    def judge(self, sample: int | None) -> None:
        """Judge a sample, then rows with an edge (see `_Facts._add_edges`) that no proven turn had."""
        total = len(self.conversations)
        everything = sample is None or sample >= total
        controls = list(self.bench.judge.inference.controls)
        shapes = np.zeros(0, dtype=np.uint64) if everything else shapes_of(self.conversations, controls)
        chosen = np.arange(total) if everything else spread(shapes, sample or 0)
        self._judge_all(chosen)
        odd = [row for edge, rows in self.facts.edges.items() if edge not in self.proven_edges for row in rows]
        more = np.setdiff1d(self.bench.owner[odd], chosen) if odd else np.zeros(0, dtype=np.int64)
        self._judge_all(more)
        self.report.judged_rows = len(chosen) + len(more)
        self.report.judged = f"all {total:,} rows were judged"
        if self.report.judged_rows < total:
            self.report.judged = (
                f"{self.report.judged_rows:,} of {total:,} rows were judged, evenly spread, with each of "
                f"{len(np.unique(shapes)):,} shapes at least {EACH_SHAPE} times or wholly; all rows were counted"
            )

    def _judge_all(self, rows: "NDArray[Any]") -> None:
        bench = Inherited(partial(self.bench, rows=rows))
        heard = self.conversations.select(rows).map(
            bench,
            batched=True,
            batch_size=AT_A_TIME,
            with_indices=True,
            remove_columns=self.conversations.column_names,
            num_proc=processes(self.num_proc, len(rows) * LIKE_ROWS) if len(rows) > AT_A_TIME else None,
            keep_in_memory=True,  # nothing is kept or found again: what the judge depends on need not be hashed
            load_from_cache_file=False,
            new_fingerprint="heard",
            desc="judging",
        )
        for row, text in zip(rows, heard["heard"] if len(rows) else (), strict=True):
            self._enter(int(self.bench.begins(row)), **json.loads(text))

    def _enter(self, row: int, origin: str, turns: int, edges: list[list[Any]], verdict: dict[str, Any]) -> None:
        report, said = self.report, Verdict(**verdict)
        report.compared_turns += turns
        report.proven_turns += len(said.proven)
        report.witnessed_turns += said.witnessed
        _count(report.losses, [dict.fromkeys(said.losses)])
        _count(report.not_proven, [dict.fromkeys(said.unjudged)])
        for code, what in dict(reversed(said.faults)).items():
            if code == "missing end token" and row in self.facts.open_rows:
                continue  # it was counted with the facts
            self.found.add(code, [row], f"row {row}{f' ({origin})' if origin else ''}: {what}")
        for remark in dict.fromkeys(said.remarks):
            self.found.add("harmless", [row], remark)
        if said.unjudged:
            self.found.add("not proven", [row])
        if said.losses:
            self.found.add("said but not shown", [row])
        self.proven_edges |= {(edge, token) for edge, token in edges}


class _Bench:
    """What a process needs to judge its share of the conversations; see `_Court._judge_all`.

    Args:
        sequences: columns `input_ids`, `labels` and, if there is one, `untrained`.
        owner: the conversation of each sequence, in rising order.
    """

    def __init__(self, judge: Judge, sequences: Dataset, owner: "NDArray[Any]") -> None:
        self.judge, self.sequences, self.owner = judge, sequences, owner

    def begins(self, row: int) -> "np.intp":
        """The first sequence of a conversation."""
        return np.searchsorted(self.owner, row)

    def __call__(self, batch: dict[str, list[Any]], places: list[int], rows: "NDArray[Any]") -> dict[str, list[str]]:
        spans = [range(self.begins(rows[at]), np.searchsorted(self.owner, rows[at], "right")) for at in places]
        found = self.sequences.select([at for span in spans for at in span])[:]
        labelled = iter(zip(found["input_ids"], found["labels"], strict=True))
        reasons = iter(found.get("untrained") or [[]] * sum(map(len, spans)))
        return {
            "heard": [
                self._hear(
                    {name: batch[name][at] for name in batch},
                    [next(labelled) for _ in span],
                    sum(len(next(reasons)) for _ in span),
                )
                for at, span in enumerate(spans)
            ]
        }

    def _hear(self, conversation: dict[str, Any], sequences: list[Any], excused: int) -> str:
        messages = [_without_nulls(message) for message in _read(conversation["messages"])]
        tools, kwargs = (_read(conversation.get(name)) for name in ("tools", "chat_template_kwargs"))
        verdict = self.judge.judge(messages, sequences, tools=tools, kwargs=kwargs)
        if raw := _read(conversation.get("raw")):
            wrong, unread = misquotes(raw, messages, tools)
            verdict.faults += [("unlike the row", what) for what in wrong]
            verdict.unjudged += [unread] if unread else []
        if len(verdict.untrained) > excused:
            named = ", ".join(map(str, verdict.untrained))
            verdict.faults.append(("turns left out", f"messages {named} are not trained, and no reason is given"))
        edges = set()
        for number, begin, end in verdict.proven if not verdict.faults else ():
            ids = sequences[number][0]
            edges |= {("before", ids[begin - 1]), ("end", ids[end - 1])}
            edges |= {("inside", i) for i in {*ids[begin:end]} & self.judge.inference.signs.keys()}
        turns = sum(1 for _, labels in sequences for _ in runs(labels))
        origin = conversation.get("origin") or ""
        return json.dumps({"origin": origin, "turns": turns, "edges": [*edges], "verdict": asdict(verdict)})


def _read(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _without_nulls(value: Any) -> Any:
    """Arrow gives every message every key of the column."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _count(counts: dict[str, int], lists: Iterable[Iterable[str]]) -> None:
    for each in lists:
        for name in each:
            counts[name] = counts.get(name, 0) + 1


def _take_over(template_report: TemplateReport, found: _Findings) -> None:
    for code, status, count in (
        ("response template missing", "missing", template_report.missing),
        ("border inside a token", "merged", template_report.merged),
        ("several response templates", "ambiguous", template_report.ambiguous),
    ):
        rows = [problem.row for problem in template_report.problems if problem.status == status]
        found.counts[code], found.rows[code] = count, rows[:SHOWN_ROWS]


def _explain(
    report: CheckReport, found: _Findings, max_length: int | None, template_report: TemplateReport | None
) -> list[Finding]:
    nothing = report.trained_tokens == 0 or report.lost_rows + report.rows_without_label >= report.rows
    findings = []
    if nothing:
        why = (
            f"max_length={max_length} cuts off every response; raise max_length"
            if report.lost_rows
            else "no row has a label"
        )
        findings.append(Finding("error", "nothing to train", report.rows, [], why))
    missing = next((p for p in template_report.problems if p.status == "missing"), None) if template_report else None
    hint = f"; row {missing.row}: {missing.surroundings!r}: {missing.suggestion}" if missing else ""
    reasons = "; ".join(f"{reason} ({n:,})" for reason, n in report.untrained_turns.items())
    losses = "; ".join(f"{what} ({n:,} rows)" for what, n in report.losses.items())
    texts = ", ".join(repr(token) for token in list(report.special_text)[:SHOWN_ROWS])
    for level, code, message in (
        ("error", "no labels", "these rows train nothing; remove them or mend their template"),
        ("error", "foreign labels", "a label differs from the token in its place; labels must not be shifted"),
        ("error", "missing end token", "a trained turn does not end in a trained end token: the model learns no end"),
        ("error", "double BOS", "the text already had the BOS token; tokenise with add_special_tokens=False"),
        ("error", "unlike inference", "the ids before a trained turn are not what inference sees"),
        ("error", "unlike the template", "what is trained is not what the model must write"),
        ("error", "trained past the end", "more is trained than the model must write"),
        ("error", "trained against the row", "turns are trained that must not be"),
        ("error", "trained twice", "a turn is trained more than once"),
        ("error", "turns left out", "turns are not trained, and nothing says why"),
        ("error", "lost content", "what the row says is neither trained nor shown"),
        ("error", "unlike the marks", "the template's generation marks say otherwise"),
        ("error", "unknown rest", "what follows the last trained turn is not the conversation"),
        ("error", "unlike the row", "the conversation is not what the raw row says"),
        ("error", "response template missing", f"nothing is trained in these rows{hint}"),
        ("warning", "not proven", "; ".join(report.not_proven)),
        ("warning", "harmless", "what the model learns beside its turns and generation never shows"),
        ("warning", "said but not shown", f"the template leaves it out of the history: {losses}"),
        ("warning", "untrained turns", f"turns without a label: {reasons}"),
        ("warning", "cut rows", f"longer than max_length={max_length}; what is behind it is not trained"),
        ("warning", "cut turns", "turns that lose their end; they do not teach to stop"),
        ("warning", "nothing left after cutting", "the response begins behind max_length; these rows are dropped"),
        ("warning", "border inside a token", "the first token of the response holds the template's end; it is masked"),
        ("warning", "several response templates", "the last one counts; is it quoted, or are there several turns?"),
        ("warning", "special-token text", f"text that looks like control tokens, encoded as ordinary text: {texts}"),
        ("warning", "duplicate rows", "the same ids as an earlier row"),
    ):
        findings += found.finding(level, code, message)  # type: ignore[arg-type]
    return findings


def _columns(dataset: Dataset) -> "Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]":
    """Batches of flat ids, flat labels and row starts (one more than rows), straight from Arrow's buffers.

    Raises:
        LabelError: no such columns, or labels of another length than the ids.
    """
    for name in ("input_ids", "labels"):
        if name not in dataset.column_names:
            raise LabelError(f"the dataset has no column {name!r}; it has {', '.join(dataset.column_names)}")
    first_row = 0
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=10_000):
        ids, labels = (batch[name].combine_chunks() for name in ("input_ids", "labels"))
        sizes = np.asarray(ids.value_lengths())
        wrong = np.flatnonzero(sizes != np.asarray(labels.value_lengths()))
        if len(wrong):
            raise LabelError(f"row {first_row + wrong[0]}: labels and input_ids differ in length")
        starts = np.concatenate([[0], np.cumsum(sizes)])
        yield (
            np.asarray(ids.flatten()).astype(np.int64),
            np.asarray(labels.flatten()).astype(np.int64),
            starts,
        )
        first_row += len(sizes)


def _runs(trained: "NDArray[Any]", starts: "NDArray[Any]") -> "tuple[NDArray[Any], NDArray[Any]]":
    """Begin and end positions of each stretch of labels; a new row begins a new stretch."""
    before = np.concatenate([[False], trained[:-1]])
    after = np.concatenate([trained[1:], [False]])
    inner = starts[:-1][np.diff(starts) > 0]
    before[inner] = False
    after[starts[1:][np.diff(starts) > 0] - 1] = False
    return np.flatnonzero(trained & ~before), np.flatnonzero(trained & ~after) + 1


def _histogram(lengths: "NDArray[Any]") -> dict[int, int]:
    if not len(lengths):
        return {}
    bounds = 2 ** np.arange(int(np.log2(max(lengths.min(), 1))), int(np.ceil(np.log2(max(lengths.max(), 2)))) + 1)
    counts = np.bincount(np.searchsorted(bounds, lengths), minlength=len(bounds))
    return {int(bound): int(n) for bound, n in zip(bounds, counts, strict=True)}
