"""`check_dataset`: facts about the labels of all rows, and the verifier on a sample in which every shape stands.

The facts need `input_ids` and `labels` alone, so they serve every way in which labels are made.
"""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ma_sft.data.load import Inherited, processes, without_nulls
from ma_sft.errors import LabelError, TemplateError
from ma_sft.labels.encoder import parsed
from ma_sft.labels.templates import control_tokens
from ma_sft.labels.verify import IGNORE_INDEX, Verifier
from ma_sft.utils import Readable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ma_sft.labels.collator import TemplateReport

EACH_SHAPE = 5  # conversations of every shape that are verified, or all if there are fewer
BY_SHAPE = 1_000  # at most so many for their shape's sake
AT_RANDOM = 919  # beside them: so few miss a fault in 0.5 % of the rows with 0.995 ** 919, below 1 %
AT_ONCE = 100  # conversations that are verified together; for no more, other processes are not worth their start
BATCH = 10_000  # rows whose facts are found at once
LIKE_ROWS = 50  # verifying a conversation takes as long as converting and tokenising so many
TEXT_ROWS = (
    "text has no chat template to compare with; proven of it: the response template was found, labels are the tokens "
    "in their place, and each turn ends in a trained end token"
)
TEMPLATE_CODES = {
    "missing": "response template missing",
    "merged": "border inside a token",
    "ambiguous": "ambiguous templates",
}
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


@dataclass
class Finding:
    """Something that the check found: how often, in which rows first, and what it means.

    `rows` are rows of the labelled data set, `places` the lines of files that they come from, or else their numbers.
    """

    level: str
    code: str
    count: int = 0
    rows: list[int] = field(default_factory=list)
    message: str = ""
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
    `verified` says which rows were verified, `sampled` whether others were not. `histogram` maps a power of two to the
    number of rows that are at most so many tokens long and longer than half of it. `unused_columns` are those of each
    source that nothing read, and roles of other names.
    """

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    turns: int = 0
    rows_without_label: int = 0
    compared_turns: int = 0
    verified_rows: int = 0
    verified: str = ""
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
        return bool(self.verified_rows) and not self.errors and not self.not_proven

    @property
    def verdict(self) -> str:
        """What is proven and what not, in a line."""
        if self.errors:
            return "labels are wrong"
        if not self.proven:
            reasons = "; ".join(f"{why} ({n:,})" for why, n in self.not_proven.items())
            return f"nothing wrong was found; not proven: {reasons or 'no row was verified'}"
        ends = f", but turns lose their end ({self.cut_turns:,})" if self.cut_turns else ""
        return f"{'no wrong label was found' if self.sampled else 'every label is right'}{ends}: {self.verified}"

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
        right = self.proven and not self.cut_turns
        lines.append(Text(self.verdict, style="bold red" if self.errors else "green" if right else "yellow"))
        return Group(*lines)


class Kept(Protocol):
    """What truncation leaves of rows: int64 arrays; `length` tokens of `row` from `start` on, rows in rising order."""

    row: "NDArray[Any]"
    start: "NDArray[Any]"
    length: "NDArray[Any]"


def check_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    conversations: Dataset | None = None,
    verifier: Verifier | None = None,
    template_report: "TemplateReport | None" = None,
    kept: Kept | None = None,
    max_length: int | None = None,
    sample: int | None = AT_RANDOM,
    num_proc: int | None = 1,
) -> CheckReport:
    """Check every row of a labelled dataset.

    Args:
        dataset: columns `input_ids` and `labels`, uncut and unpacked; `row` (of the conversation), `shape`, `untrained`
            and `special_text`, as `ChatEncoder.tokenize_batch` gives them, and `origin` are used if there.
        conversations: `messages` of the rows, and `tools`, `chat_template_kwargs` and `origin`, if there are such
            columns. Without them nothing is verified.
        verifier: by default one that knows the tokenizer alone.
        template_report: what `DataCollatorForCompletionOnlyLM.check` found in the rows.
        kept: a `Kept`, if rows are not trained whole; what it leaves out is not counted.
        max_length: the setting that decided `kept`, for the messages.
        sample: how many conversations are verified at random, beside `EACH_SHAPE` of every shape; None for all.
        num_proc: processes that verify; None for all cores if there are many conversations.

    Raises:
        LabelError: there is no row, or one whose labels and ids differ in length.
    """
    check = _Check(dataset, tokenizer, kept)
    if conversations is not None:
        check.verify(conversations, verifier or Verifier(tokenizer), sample, num_proc)
    elif template_report is not None:
        check.add("not proven", [], [TEXT_ROWS] * len(dataset), len(dataset))
        for status, code in TEMPLATE_CODES.items():
            problems = [problem for problem in template_report.problems if problem.status == status]
            words = [f"{check.place(problem.row)}: {problem.text}" for problem in problems]
            check.add(code, [p.row for p in problems], words[:1], getattr(template_report, status))
    report, lost = check.report, check.found["nothing left after cutting"].count
    if report.trained_tokens == 0 or lost + report.rows_without_label >= report.rows:
        cut = f"max_length={max_length} cuts off every response; raise max_length"
        check.add("nothing to train", [], [cut if lost else "no row has a label"], report.rows)
    report.findings = check.listed(max_length)
    return report


class _Check:
    """The facts of all rows, and what is found in them."""

    def __init__(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, kept: Kept | None) -> None:
        self.dataset, self.report = dataset, CheckReport(rows=len(dataset))
        self.found = {code: Finding(level, code) for code, (level, _) in CODES.items()}
        self.owner = np.asarray(dataset["row"][:]) if "row" in dataset.column_names else np.arange(len(dataset))
        self.origins: Any = dataset["origin"] if "origin" in dataset.column_names else None
        if not len(dataset):
            raise LabelError("the data set is empty: there is no row to check")
        batches = self.columns("input_ids", "labels", "shape").with_format("arrow").iter(BATCH)
        forms = defaultdict[Any, int](itertools.count().__next__)
        parts = [_facts(batch, n * BATCH, tokenizer, kept, forms) for n, batch in enumerate(batches)]
        facts = self.facts = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for code, name in (("untrained turns", "untrained"), ("special-token text", "special_text")):
            table = self.columns(name).with_format("arrow")[:]
            lists = table[name] if name in table.column_names else pa.array([[]] * len(dataset))
            facts[code] = np.asarray(pc.list_value_length(lists)) > 0
            self.found[code].details.update(Counter(pc.list_flatten(lists).to_pylist()))
        facts["no labels"] = (facts["labels"] == 0) & ~facts["untrained turns"]
        _, originals, same = np.unique(facts["hash"], return_index=True, return_inverse=True)
        facts["duplicate rows"] = originals[same] != np.arange(len(dataset))
        for code in CODES.keys() & facts.keys():
            self.add(code, np.flatnonzero(facts[code])[:SHOWN].tolist(), count=int(facts[code].sum()))
        report = self.report
        report.tokens, report.trained_tokens, report.turns = (
            int(facts[n].sum()) for n in ("tokens", "trained", "turns")
        )
        report.rows_without_label = int((facts["labels"] == 0).sum())
        lengths, counts = np.unique(2 ** np.ceil(np.log2(np.maximum(facts["size"], 1))), return_counts=True)
        report.histogram = dict(zip(lengths.astype(int).tolist(), counts.tolist(), strict=True))

    def add(self, code: str, rows: list[int], details: Sequence[str] = (), count: int | None = None) -> None:
        """Note that rows have a fault; `count` is how often, if not once in each. Of errors one detail is kept."""
        finding = self.found[code]
        finding.count += len(rows) if count is None else count
        finding.rows = [*dict.fromkeys(finding.rows + rows)][:SHOWN]
        if finding.level == "warning" or not finding.details:
            finding.details = dict(Counter(finding.details) + Counter(details))

    def listed(self, max_length: int | None) -> list[Finding]:
        """What was found, in the order of `CODES`."""
        listed = [finding for finding in self.found.values() if finding.count]
        for finding in listed:
            shown = [f"{what} ({n:,})" for what, n in [*finding.details.items()][:SHOWN]]
            shown = shown if len(finding.details) > 1 else [*finding.details]
            message = CODES[finding.code][1].format(max_length=max_length)
            finding.message = ": ".join(filter(None, [message, "; ".join(shown)]))
            finding.places = [*map(self.place, finding.rows)]
        return listed

    def columns(self, *names: str) -> Dataset:
        """Those of these columns that there are."""
        return self.dataset.select_columns([name for name in names if name in self.dataset.column_names])

    def place(self, sequence: int) -> str:
        """The line of the file that a sequence comes from, or its number."""
        return (self.origins and self.origins[int(self.owner[sequence])]) or f"row {sequence}"

    def verify(self, conversations: Dataset, verifier: Verifier, sample: int | None, num_proc: int | None) -> None:
        """Verify a sample of the conversations of which truncation leaves something."""
        facts, report, total = self.facts, self.report, len(conversations)
        self.origins = conversations["origin"] if "origin" in conversations.column_names else self.origins
        bounds = np.searchsorted(self.owner, np.arange(total + 1)).tolist()
        left = self.owner[(facts["tokens"] > 0) | (facts["size"] == 0)]
        rows = np.setdiff1d(np.arange(total), np.setdiff1d(self.owner, left))
        forms = [tuple(facts["form"][begin:end]) for begin, end in pairwise(bounds)]
        numbers = {form: number for number, form in enumerate(dict.fromkeys(forms))}
        report.verified = f"all {len(rows):,} rows were verified"
        if sample is not None and sample < len(rows):
            shapes = np.array([numbers[form] for form in forms])[rows]
            chosen = draw_sample(shapes, sample)
            report.sampled = True
            report.verified = (
                f"{len(chosen):,} of {len(rows):,} rows were verified: {sample:,} at random, and of "
                f"{len(np.unique(shapes[chosen])):,} of {len(numbers):,} shapes up to {EACH_SHAPE} each; "
                "--all verifies every row"
            )
            rows = rows[chosen]
        report.verified_rows = len(rows)
        report.compared_turns = int(facts["all turns"][np.isin(self.owner, rows)].sum())
        sequences = [slice(bounds[row], bounds[row + 1]) for row in rows.tolist()]
        columns, own_prompt = self.columns("input_ids", "labels", "untrained"), _own_prompt(verifier)

        def verify_rows(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[str]]:
            own = [columns[sequences[number]] for number in numbers]
            return {"found": [json.dumps(found) for found in _verify_rows(batch, own, verifier, own_prompt)]}

        verified = conversations.select(rows).map(
            inherited := Inherited(verify_rows),  # kept by its name: workers look it up
            batched=True,
            batch_size=AT_ONCE,
            with_indices=True,
            remove_columns=conversations.column_names,
            num_proc=processes(num_proc, len(rows) * LIKE_ROWS) if len(rows) > AT_ONCE else None,
            keep_in_memory=True,  # nothing is kept or found again: what the verifier depends on need not be hashed
            load_from_cache_file=False,
            new_fingerprint="verified",
            desc="verifying",
        )
        del inherited
        for own, found in zip(sequences, verified["found"] if len(rows) else (), strict=True):
            proven, errors = json.loads(found)
            report.proven_turns += proven
            known = {code for code in CODES.keys() & facts.keys() if facts[code][own].any()}
            for code, what in errors:
                words = f"{self.place(own.start)}: {what}" if CODES[code][0] == "error" else what
                self.add(code, [own.start], [words], count=int(code not in known))
                known.add(code)


def _facts(
    batch: pa.Table, first: int, tokenizer: PreTrainedTokenizerBase, kept: Kept | None, forms: defaultdict[Any, int]
) -> "dict[str, NDArray[Any]]":
    """Of each row: what is counted, how often it has a code, and the number of its form among `forms`.

    Rows of one form have one shape, the same control tokens, and turns that begin and end with the same tokens.
    """
    columns = [batch[name].combine_chunks() for name in ("input_ids", "labels")]
    size, label_size = (np.asarray(column.value_lengths()) for column in columns)
    if len(wrong := np.flatnonzero(size != label_size)):
        raise LabelError(f"row {first + wrong[0]}: labels and input_ids differ in length")
    ids, labels = (np.asarray(column.flatten()) for column in columns)
    starts = np.concatenate([[0], np.cumsum(size)])

    def count(tokens: "NDArray[Any]") -> "NDArray[Any]":
        """How many of some tokens (a mask, or their places in rising order) each row has."""
        return np.diff(np.searchsorted(np.flatnonzero(tokens) if tokens.dtype == bool else tokens, starts))

    trained, left = labels != IGNORE_INDEX, np.full(len(ids), kept is None)
    if kept is not None:
        spans = slice(*np.searchsorted(kept.row, [first, first + len(size)]))
        at = starts[kept.row[spans] - first] + kept.start[spans]
        for begin, length in zip(at.tolist(), kept.length[spans].tolist(), strict=True):
            left[begin : begin + length] = True
    # Turns are runs of labels; one of which nothing is left is not counted
    edge = np.zeros(len(ids) + 1, bool)
    edge[starts] = True
    begins = np.flatnonzero(trained & (edge[:-1] | ~np.roll(trained, 1)))
    lasts = np.flatnonzero(trained & (edge[1:] | ~np.roll(trained, -1)))
    controls = [*control_tokens(tokenizer).values()]
    at = np.concatenate([np.flatnonzero(np.isin(ids, controls)), begins[~edge[begins]] - 1, lasts])
    width = 2 * (int(ids.max(initial=0)) + 1)
    owner = np.searchsorted(starts, at, "right") - 1
    rows, marks = np.divmod(np.unique(owner * width + 2 * ids[at] + trained[at]), width)
    bounds = np.searchsorted(rows, np.arange(len(size) + 1)).tolist()
    shapes, all_turns = batch["shape"].to_pylist() if "shape" in batch.column_names else [""] * len(size), count(begins)
    keys = zip(shapes, (all_turns > 1).tolist(), [marks[b:e].tobytes() for b, e in pairwise(bounds)], strict=True)
    learned = np.flatnonzero(trained & left)
    partly = np.searchsorted(learned, lasts, "right") > np.searchsorted(learned, begins)
    begins, lasts = begins[partly], lasts[partly]
    ends = lasts  # whitespace behind the end token is no harm
    for _ in range(3):
        tokens, which = np.unique(ids[ends], return_inverse=True)
        blank = np.array([not str(tokenizer.decode([token])).strip() for token in tokens.tolist()], dtype=bool)
        ends = np.where(blank[which], np.maximum(ends - 1, begins), ends)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id != tokenizer.eos_token_id else None
    stops = [*{*controls, tokenizer.eos_token_id} - {None, bos}]
    pairs = starts[:-1][size > 1]
    return {
        **{"size": size, "tokens": count(left), "labels": count(trained), "trained": count(learned)},
        **{"turns": count(begins), "all turns": all_turns},
        "form": np.array([forms[key] for key in keys]),
        "hash": np.array([hash(ids[begin:end].tobytes()) for begin, end in pairwise(starts.tolist())]),
        "foreign labels": count(trained & left & (labels != ids)) > 0,
        "missing end token": count(lasts[~np.isin(ids[ends], stops)]),
        "double BOS": count(pairs[(ids[pairs] == bos) & (ids[pairs + 1] == bos)]) if bos is not None else size * 0,
        "cut rows": count(left) < size,
        "cut turns": count(lasts[~left[lasts]]),
        "nothing left after cutting": (count(trained) > 0) & (count(learned) == 0),
    }


def draw_sample(shapes: "NDArray[Any]", at_random: int) -> "NDArray[Any]":
    """The rows to verify: of each shape `EACH_SHAPE`, at most `BY_SHAPE` in all, and `at_random` of all; rising."""
    order = np.random.default_rng(0).permutation(len(shapes))
    grouped = order[np.argsort(shapes[order], kind="stable")]
    _, first, counts = np.unique(shapes[grouped], return_index=True, return_counts=True)
    rank = np.arange(len(shapes)) - np.repeat(first, counts)  # in its shape
    by_rank = grouped[np.argsort(rank, kind="stable")][: min(BY_SHAPE, int((rank < EACH_SHAPE).sum()))]
    return np.union1d(by_rank, order[:at_random])


def _verify_rows(
    batch: dict[str, list[Any]], sequences: list[dict[str, list[Any]]], verifier: Verifier, own_prompt: str
) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Of each conversation, how many turns are proven, and what was found: (code, what)."""
    names = ("messages", "tools", "chat_template_kwargs")
    rows = zip(*(parsed(batch.get(name), len(sequences)) for name in names), strict=True)
    conversations = [([without_nulls(m) for m in messages], *more) for messages, *more in rows]
    results = verifier.verify_batch(
        (messages, list(zip(own["input_ids"], own["labels"], strict=True)), tools, kwargs)
        for (messages, tools, kwargs), own in zip(conversations, sequences, strict=True)
    )
    for (messages, *_), own, result in zip(conversations, sequences, results, strict=True):
        found = list(result.errors)
        if len(result.untrained) > sum(map(len, own.get("untrained", []))):
            named = ", ".join(map(str, result.untrained))
            found.append(("turns left out", f"messages {named} are not trained, and no reason is given"))
        for code, words in (
            ("said but not shown", result.losses),
            ("not proven", result.unproven),
            ("harmless", result.remarks),
            ("default system prompt", [own_prompt for m in messages[:1] if own_prompt and m["role"] == "user"]),
            ("unanswered question", [f"the {m['role']}'s" for m in messages[-1:] if m["role"] != "assistant"]),
        ):
            found += [(code, each) for each in words]
        yield len(result.proven), list(dict.fromkeys(found))


def _own_prompt(verifier: Verifier) -> str:
    """What the template writes in words before the first message of a conversation without a system message."""
    try:
        text = verifier.render([{"role": "user", "content": "Qux"}], None, verifier.template_kwargs, prompt=False)
    except TemplateError:
        return ""
    parts = verifier.control_text.split(text.partition("Qux")[0])
    parts = [" ".join(part.split()).removeprefix("system ") for part in parts]
    return next((repr(part) for part in parts if part.count(" ") > 2), "")
