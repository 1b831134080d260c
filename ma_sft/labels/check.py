"""What is trained, token by token: `check_dataset` proves it on all rows, `preview` shows it on a few.

Both look at rows of `input_ids` and `labels` alone, so they serve every way in which labels are made. Run them on
rows before they are cut and packed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from datasets import Dataset
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ma_sft.errors import LabelError
from ma_sft.labels.encoder import IGNORE_INDEX, ChatEncoder, Message
from ma_sft.labels.response import TemplateReport, TokenBytes
from ma_sft.labels.templates import control_tokens

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
    before. `turns` are stretches of labels; `compared_turns` of them were compared with what inference would see.
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
    template_missing: int = 0
    special_text_rows: int = 0
    special_text: dict[str, int] = field(default_factory=dict)
    duplicate_rows: int = 0
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

    def raise_errors(self) -> None:
        """Raise `LabelError` with all errors in one line, if there are any."""
        if self.errors:
            raise LabelError("the labels are wrong: " + "; ".join(map(str, self.errors)))

    def to_json(self) -> str:
        return json.dumps(
            {**asdict(self), "trained_share": self.trained_share, "ok": not self.errors}, ensure_ascii=False, indent=2
        )

    def __rich__(self) -> RenderableType:
        table = Table(title="what is trained", show_header=False)
        plain = ["rows", "tokens", "trained_tokens", "turns", "compared_turns", "cut_rows", "lost_rows"]
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
        if not self.errors:
            lines.append(Text("every label is right", style="green"))
        return Group(*lines)


class _Findings:
    """Collects (count, first rows) by code while batches go by."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.rows: dict[str, list[int]] = {}

    def add(self, code: str, rows: "Sequence[int] | NDArray[Any]") -> None:
        self.counts[code] += len(rows)
        shown = self.rows.setdefault(code, [])
        for row in rows[: SHOWN_ROWS - len(shown)]:
            if int(row) not in shown:
                shown.append(int(row))

    def finding(self, level: Literal["error", "warning"], code: str, message: str) -> list[Finding]:
        if not self.counts[code]:
            return []
        return [Finding(level, code, self.counts[code], self.rows.get(code, []), message)]


def check_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    conversations: Dataset | None = None,
    encoder: ChatEncoder | None = None,
    template_report: TemplateReport | None = None,
    max_length: int | None = None,
    compare: int = 20_000,
) -> CheckReport:
    """Check every row of a labelled dataset.

    Args:
        dataset: columns `input_ids` and `labels`, uncut and unpacked; `row`, `untrained` and `special_text`, as
            `ChatEncoder.tokenize_batch` gives them, are used if there.
        conversations: `messages` (and `tools`) of the rows, to compare training with inference.
        encoder: the encoder that made the rows; needed for the comparison.
        template_report: what `DataCollatorForCompletionOnlyLM.check` found in the rows.
        max_length: where rows will be cut, in tokens.
        compare: how many rows are compared with what `tokenizer.apply_chat_template` gives for the messages before
            each turn: all of them, unless there are more; then they are evenly spread.
    """
    report = CheckReport(rows=len(dataset))
    found = _Findings()
    control = control_tokens(tokenizer)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id != tokenizer.eos_token_id else None
    token_bytes = TokenBytes(tokenizer)
    ends = np.fromiter({*control.values(), tokenizer.eos_token_id} - {None, bos}, dtype=np.int64)
    lengths: list[NDArray[Any]] = []
    seen: set[bytes] = set()
    notes = dataset.select_columns([name for name in ("untrained", "special_text") if name in dataset.column_names])
    first_row = 0
    for ids, labels, starts in _columns(dataset):
        sizes = np.diff(starts)
        lengths.append(sizes)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        trained = labels != IGNORE_INDEX
        report.tokens += len(ids)
        report.trained_tokens += int(trained.sum())
        found.add("foreign labels", first_row + np.unique(owner[trained & (labels != ids)]))

        begins, stops = _runs(trained, starts)
        report.turns += len(begins)
        rows_of_turns = owner[begins]
        labelled = np.zeros(len(sizes), dtype=bool)
        labelled[rows_of_turns] = True
        report.rows_without_label += int((~labelled).sum())
        excused = np.zeros(len(sizes), dtype=bool)
        noted = notes[first_row : first_row + len(sizes)]
        if "untrained" in noted:
            reasons = noted["untrained"]
            excused = np.array([bool(r) for r in reasons])
            for row_reasons in reasons:
                for reason in row_reasons:
                    report.untrained_turns[reason] = report.untrained_turns.get(reason, 0) + 1
            found.add("untrained turns", first_row + np.flatnonzero(excused))
        found.add("no labels", first_row + np.flatnonzero(~labelled & ~excused))

        open_end = ~np.isin(ids[stops - 1], ends)
        for at in np.flatnonzero(open_end):  # whitespace after the end token is no harm
            run = ids[begins[at] : stops[at]]
            text = [token_bytes[int(i)] for i in run[-4:]]
            while text and not text[-1].strip():
                text.pop()
                run = run[:-1]
            open_end[at] = not (len(run) and np.isin(run[-1], ends))
        found.add("missing end token", first_row + rows_of_turns[open_end])

        if bos is not None:
            firsts = starts[:-1][sizes > 1]
            double = (ids[firsts] == bos) & (ids[firsts + 1] == bos)
            found.add("double BOS", first_row + np.flatnonzero(sizes > 1)[double])
        if max_length is not None:
            offset = starts[:-1][rows_of_turns]
            cut = (stops - offset) > max_length
            found.add("cut rows", first_row + np.flatnonzero(sizes > max_length))
            found.add("cut turns", first_row + rows_of_turns[cut])
            kept = np.zeros(len(sizes), dtype=bool)
            kept[rows_of_turns[(begins - offset) < max_length]] = True
            found.add("nothing left after cutting", first_row + np.flatnonzero(labelled & ~kept))
        duplicates = []
        for row in range(len(sizes)):
            key = hashlib.blake2b(ids[starts[row] : starts[row + 1]].tobytes(), digest_size=16).digest()
            if key in seen:
                duplicates.append(first_row + row)
            seen.add(key)
        found.add("duplicate rows", duplicates)
        if "special_text" in noted:
            special = noted["special_text"]
            for tokens in special:
                for token in tokens:
                    report.special_text[token] = report.special_text.get(token, 0) + 1
            found.add("special-token text", first_row + np.flatnonzero([bool(tokens) for tokens in special]))
        first_row += len(sizes)

    report.histogram = _histogram(np.concatenate(lengths) if lengths else np.zeros(0, dtype=int))
    shown = ""
    if conversations is not None and encoder is not None and compare:
        shown = _compare(dataset, conversations, encoder, compare, report, found)
    if template_report is not None:
        for code, status, count in (
            ("response template missing", "missing", template_report.missing),
            ("border inside a token", "merged", template_report.merged),
            ("several response templates", "ambiguous", template_report.ambiguous),
        ):
            rows = [problem.row for problem in template_report.problems if problem.status == status]
            found.counts[code], found.rows[code] = count, rows[:SHOWN_ROWS]
    report.cut_rows, report.cut_turns = found.counts["cut rows"], found.counts["cut turns"]
    report.lost_rows = found.counts["nothing left after cutting"]
    report.foreign_labels, report.missing_end = found.counts["foreign labels"], found.counts["missing end token"]
    report.double_bos, report.mismatches = found.counts["double BOS"], found.counts["unlike inference"]
    report.template_missing = found.counts["response template missing"]
    report.special_text_rows = found.counts["special-token text"]
    report.duplicate_rows = found.counts["duplicate rows"]
    report.findings = _explain(report, found, shown, max_length, template_report)
    return report


def _explain(
    report: CheckReport, found: _Findings, shown: str, max_length: int | None, template_report: TemplateReport | None
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
    texts = ", ".join(repr(token) for token in list(report.special_text)[:SHOWN_ROWS])
    for level, code, message in (
        ("error", "no labels", "these rows train nothing; remove them or mend their template"),
        ("error", "foreign labels", "a label differs from the token in its place; labels must not be shifted"),
        ("error", "missing end token", "a trained turn does not end in a trained end token: the model learns no end"),
        ("error", "double BOS", "the text already had the BOS token; tokenise with add_special_tokens=False"),
        ("error", "unlike inference", f"the ids before a trained turn are not what inference sees: {shown}"),
        ("error", "response template missing", f"nothing is trained in these rows{hint}"),
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


def _compare(
    dataset: Dataset,
    conversations: Dataset,
    encoder: ChatEncoder,
    compare: int,
    report: CheckReport,
    found: _Findings,
) -> str:
    """Compare the ids before each trained turn with the template's prompts; the first difference in words."""
    tokenizer = encoder.tokenizer
    control = control_tokens(tokenizer)
    count = min(compare, len(dataset))
    shown = ""
    for row in np.linspace(0, len(dataset) - 1, count, dtype=int).tolist():
        example = dataset[row]
        conversation = conversations[example.get("row", row)]
        messages = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in conversation["messages"]]
        tools = conversation.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        ids, trained = np.array(example["input_ids"]), np.array(example["labels"]) != IGNORE_INDEX
        begins, _ = _runs(trained, np.array([0, len(ids)]))
        prompts = [
            _inference_ids(messages[:k], tools, encoder, control) if k else list(tokenizer("")["input_ids"])
            for k, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        for begin in begins.tolist():
            report.compared_turns += 1
            prefix = ids[:begin].tolist()
            if prefix in prompts:
                continue
            found.add("unlike inference", [row])
            if not shown and prompts:
                shown = f"row {row}: {_difference(prefix, prompts, tokenizer)}"
    return shown


def _inference_ids(
    messages: list[Message], tools: list[Any] | None, encoder: ChatEncoder, control: dict[str, int]
) -> list[int]:
    """transformers' own ids where the content is plain text; where it spells control tokens those would be wrong."""
    if any(token in json.dumps([messages, tools], ensure_ascii=False, default=str) for token in control):
        return encoder.encode_prompt(messages, tools)
    try:
        encoded: Any = encoder.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=True, **encoder.template_kwargs
        )
        return list(encoded["input_ids"])
    except Exception:  # templates raise what they like; some want tool calls in another form, which the encoder knows
        return encoder.encode_prompt(messages, tools)


def _difference(prefix: list[int], prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> str:
    def shared(prompt: list[int]) -> int:
        pairs = enumerate(zip(prefix, prompt, strict=False))
        return next((at for at, (a, b) in pairs if a != b), min(len(prefix), len(prompt)))

    nearest = max(prompts, key=lambda prompt: (shared(prompt), -abs(len(prompt) - len(prefix))))
    at = shared(nearest)

    def token(ids: list[int]) -> str:
        return repr(tokenizer.decode([ids[at]])) + f" ({ids[at]})" if at < len(ids) else "the turn itself"

    return (
        f"token {at}: training has {token(prefix)}, inference {token(nearest)}, "
        f"after {tokenizer.decode(prefix[max(0, at - 8) : at])!r}"
    )
