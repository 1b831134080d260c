"""`check_dataset`: facts about the labels of all rows, and the verifier on a sample in which every shape stands.

The facts need `input_ids` and `labels` alone, so they serve every way in which labels are made.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ma_sft.data.load import Inherited, processes
from ma_sft.errors import LabelError
from ma_sft.labels.report import CheckReport, Findings, count
from ma_sft.labels.templates import control_tokens
from ma_sft.labels.verify import IGNORE_INDEX, Verifier

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ma_sft.labels.collator import TemplateReport

EACH_SHAPE = 5  # conversations of every shape that are verified, or all if there are fewer
BY_SHAPE = 1_000  # at most so many for their shape's sake
AT_RANDOM = 1_000  # beside them: a fault in 0.5 % of the rows is among so many with 99 %
AT_A_TIME = 100  # conversations that are verified; of fewer, other processes are not worth their start
LIKE_ROWS = 50  # verifying a conversation takes as long as converting and tokenising so many
TEXT_ROWS = (
    "text has no chat template to compare with; proven of it: the response template was found, labels are the tokens "
    "in their place, and each turn ends in a trained end token"
)
RESULT = Features(
    {
        "proven": Value("int64"),
        **{name: List(Value("string")) for name in ("codes", "errors", "losses", "unproven", "remarks")},
    }
)


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
            and `special_text`, as `ChatEncoder.tokenize_batch` gives them, are used if there.
        conversations: `messages` of the rows, and `tools`, `chat_template_kwargs` and `origin`, if there are such
            columns. Without them nothing is verified.
        verifier: by default one that knows the tokenizer alone.
        template_report: what `DataCollatorForCompletionOnlyLM.check` found in the rows.
        kept: a `Kept`, if rows are not trained whole; what it leaves out is not counted.
        max_length: the setting that decided `kept`, for the messages.
        sample: how many conversations are verified at random, beside `EACH_SHAPE` of every shape; None for all.
        num_proc: processes that verify; None for all cores if there are many conversations.
    """
    report, findings = CheckReport(rows=len(dataset)), Findings()
    facts = _count_facts(dataset, tokenizer, kept, report, findings)
    if conversations is not None:
        verifier = verifier or Verifier(tokenizer)
        _verify(dataset, conversations, verifier, facts, report, findings, sample, num_proc)
    elif template_report is not None:
        report.not_proven[TEXT_ROWS] = findings.counts["not proven"] = report.rows
        findings.rows["not proven"] = []
    if template_report is not None:
        for code, status in (
            ("response template missing", "missing"),
            ("border inside a token", "merged"),
            ("ambiguous templates", "ambiguous"),
        ):
            problems = [problem for problem in template_report.problems if problem.status == status]
            example = next((f"row {p.row}: {p.surroundings!r}: {p.suggestion}" for p in problems), "")
            findings.add(code, [p.row for p in problems], example, getattr(template_report, status))
    for name, code in {
        **{"cut_rows": "cut rows", "cut_turns": "cut turns", "lost_rows": "nothing left after cutting"},
        **{"foreign_labels": "foreign labels", "missing_end": "missing end token", "double_bos": "double BOS"},
        **{"mismatches": "unlike inference", "template_missing": "response template missing"},
        **{"special_text_rows": "special-token text", "duplicate_rows": "duplicate rows"},
    }.items():
        setattr(report, name, findings.counts[code])
    if report.trained_tokens == 0 or report.lost_rows + report.rows_without_label >= report.rows:
        findings.add("nothing to train", [], count=report.rows)
    report.findings = findings.listed(report, max_length)
    return report


@dataclass
class _Batch:
    """Some rows as flat arrays; `left` says of each token whether truncation leaves it."""

    starts: "NDArray[Any]"  # of each row, and the end of the last
    ids: "NDArray[Any]"
    labels: "NDArray[Any]"
    left: "NDArray[Any]"

    def __post_init__(self) -> None:
        self.owner = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def per_row(self, tokens: "NDArray[Any]") -> "NDArray[Any]":
        """How many of some tokens (a mask, or their places) each row has."""
        return np.bincount(self.owner[tokens], minlength=len(self.starts) - 1)


def _batches(dataset: Dataset, kept: Kept | None) -> Iterator[_Batch]:
    """The rows, straight from Arrow's buffers."""
    for name in ("input_ids", "labels"):
        if name not in dataset.column_names:
            raise LabelError(f"the dataset has no column {name!r}; it has {', '.join(dataset.column_names)}")
    first = 0
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=10_000):
        ids, labels = (batch[name].combine_chunks() for name in ("input_ids", "labels"))
        sizes = np.asarray(ids.value_lengths())
        wrong = np.flatnonzero(sizes != np.asarray(labels.value_lengths()))
        if len(wrong):
            raise LabelError(f"row {first + wrong[0]}: labels and input_ids differ in length")
        starts = np.concatenate([[0], np.cumsum(sizes)])
        left = np.ones(starts[-1], dtype=bool)
        if kept is not None:
            pieces = slice(*np.searchsorted(kept.row, [first, first + len(sizes)]))
            begins = starts[kept.row[pieces] - first] + kept.start[pieces]
            edges = np.bincount(begins, minlength=starts[-1] + 1)
            left = np.cumsum(edges - np.bincount(begins + kept.length[pieces], minlength=len(edges)))[:-1] > 0
        flat_ids, flat_labels = (np.asarray(column.flatten()).astype(np.int64) for column in (ids, labels))
        yield _Batch(starts, flat_ids, flat_labels, left)
        first += len(sizes)


def _count_facts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, kept: Kept | None, report: CheckReport, findings: Findings
) -> "dict[str, NDArray[Any]]":
    """Enter what ids and labels alone say of all rows; gives the facts of each row."""
    parts = [_facts(batch, tokenizer) for batch in _batches(dataset, kept)]
    facts = {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}
    if not facts:
        return facts
    report.tokens, report.trained_tokens, report.turns = (int(facts[n].sum()) for n in ("tokens", "trained", "turns"))
    noted = dataset.select_columns([n for n in ("untrained", "special_text") if n in dataset.column_names])[:]
    reasons = list(noted.get("untrained", [[]] * len(dataset)))
    special = list(noted.get("special_text", [[]] * len(dataset)))
    count(report.untrained_turns, reasons)
    count(report.special_text, special)
    facts["untrained turns"] = np.array([bool(each) for each in reasons])
    facts["special-token text"] = np.array([bool(each) for each in special])
    unlabelled = facts["labels"] == 0
    report.rows_without_label = int(unlabelled.sum())
    facts["no labels"] = unlabelled & ~facts["untrained turns"]
    _, first, same = np.unique(facts["hash"], return_index=True, return_inverse=True)
    facts["duplicate rows"] = first[same] != np.arange(len(dataset))
    for code, example in (
        *(("foreign labels", _foreign_label), ("missing end token", _last_token), ("double BOS", None)),
        *((code, None) for code in ("no labels", "cut rows", "cut turns", "nothing left after cutting")),
        *((code, None) for code in ("untrained turns", "special-token text", "duplicate rows")),
    ):
        rows = np.flatnonzero(facts[code]).tolist()
        words = f"row {rows[0]}: {example(dataset[rows[0]], tokenizer)}" if rows and example else ""
        findings.add(code, rows, words, int(facts[code].sum()))
    lengths = np.maximum(facts["sizes"], 1)
    bounds = 2 ** np.arange(int(np.log2(lengths.min())), int(np.ceil(np.log2(max(lengths.max(), 2)))) + 1)
    counts = np.bincount(np.searchsorted(bounds, facts["sizes"]), minlength=len(bounds))
    report.histogram = dict(zip(bounds.tolist(), counts.tolist(), strict=True))
    return facts


def _facts(batch: _Batch, tokenizer: PreTrainedTokenizerBase) -> "dict[str, NDArray[Any]]":
    """Of each row: how often it has what stands in `MESSAGES`, and what is counted."""
    ids, owner, starts, sizes = batch.ids, batch.owner, batch.starts, np.diff(batch.starts)
    trained = batch.labels != IGNORE_INDEX
    counted = trained & batch.left
    run = np.where(trained, owner, -1)
    begins = np.flatnonzero(trained & (run != np.concatenate([[-1], run[:-1]])))
    ends = np.flatnonzero(trained & (run != np.concatenate([run[1:], [-1]]))) + 1
    so_far = np.concatenate([[0], np.cumsum(counted)])
    partly = so_far[ends] > so_far[begins]  # turns of which something is left
    all_turns, begins, ends = batch.per_row(begins), begins[partly], ends[partly]
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id != tokenizer.eos_token_id else None
    controls = np.array([*control_tokens(tokenizer).values()], dtype=np.int64)
    stops = np.array([*({*controls.tolist(), tokenizer.eos_token_id} - {None, bos})], dtype=np.int64)
    last = ends - 1  # whitespace behind the end token is no harm
    for _ in range(3):
        tokens, which = np.unique(ids[last], return_inverse=True)
        blank = np.array([not str(tokenizer.decode([token])).strip() for token in tokens.tolist()], dtype=np.bool_)
        last = np.where(blank[which], np.maximum(last - 1, begins), last)
    pairs = starts[:-1][sizes > 1]
    labels, tokens_left, trained_left = batch.per_row(trained), batch.per_row(batch.left), batch.per_row(counted)
    # The form of a row: which control tokens it has, where its turns begin and end, whether there are several
    inner, structure = begins[begins > starts[owner[begins]]] - 1, np.flatnonzero(np.isin(ids, controls))
    form, width = np.minimum(all_turns, 2).astype(np.uint64), 4 * (int(ids.max(initial=0)) + 1)
    parts = (inner, ends - 1, structure[trained[structure]], structure[~trained[structure]])
    codes = np.concatenate([owner[at] * width + ids[at] * 4 + kind for kind, at in enumerate(parts)])
    row, code = np.divmod(np.unique(codes), width)
    np.add.at(form, row, _mix(code))
    text = np.zeros(len(sizes), dtype=np.uint64)
    np.add.at(text, owner, _mix(_mix(np.arange(len(ids)) - starts[owner]) + ids.astype(np.uint64)))
    return {
        **{"sizes": sizes, "tokens": tokens_left, "labels": labels, "trained": trained_left, "all turns": all_turns},
        **{"turns": batch.per_row(begins), "form": form, "hash": text},
        "foreign labels": batch.per_row(counted & (batch.labels != ids)) > 0,
        "missing end token": batch.per_row(ends[~np.isin(ids[last], stops)] - 1),
        "double BOS": batch.per_row(pairs[(ids[pairs] == bos) & (ids[pairs + 1] == bos)]) if bos else sizes * 0,
        "cut rows": tokens_left < sizes,
        "cut turns": batch.per_row(ends[~batch.left[ends - 1]] - 1),
        "nothing left after cutting": (labels > 0) & (trained_left == 0),
    }


def _mix(codes: "NDArray[Any]") -> "NDArray[np.uint64]":
    """Spread bits (splitmix64), so that sums of codes differ where the codes do."""
    codes = (codes.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    return (codes ^ (codes >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)


def _foreign_label(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    pairs = enumerate(zip(row["labels"], row["input_ids"], strict=True))
    at, (label, token) = next((at, pair) for at, pair in pairs if pair[0] not in (pair[1], IGNORE_INDEX))
    return f"the label of token {at} is {label}, right is {tokenizer.decode([token])!r} ({token})"


def _last_token(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    ends = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE_INDEX]
    return f"its last label is {tokenizer.decode(ends[-1:])!r} ({ends[-1]}), right is one like {tokenizer.eos_token!r}"


def draw_sample(shapes: "NDArray[Any]", at_random: int) -> "NDArray[Any]":
    """The rows to verify: of each shape `EACH_SHAPE`, at most `BY_SHAPE` in all, and `at_random` of all; rising."""
    order = np.random.default_rng(0).permutation(len(shapes))
    grouped = order[np.argsort(shapes[order], kind="stable")]
    _, first, counts = np.unique(shapes[grouped], return_index=True, return_counts=True)
    rank = np.arange(len(shapes)) - np.repeat(first, counts)  # in its shape
    by_rank = grouped[np.argsort(rank, kind="stable")][: min(BY_SHAPE, int((rank < EACH_SHAPE).sum()))]
    return np.union1d(by_rank, order[:at_random])


def _to_verify(
    dataset: Dataset, facts: "dict[str, NDArray[Any]]", owner: "NDArray[Any]", total: int, sample: int | None
) -> "tuple[NDArray[Any], int]":
    """The conversations to verify, and how many shapes there are; `owner` has the conversation of each sequence."""
    left, shapes = np.ones(total, dtype=bool), np.zeros(total, dtype=np.uint64)
    if facts:
        left[owner] = False  # a conversation of which truncation leaves nothing is not trained, and not verified
        left[owner[(facts["tokens"] > 0) | (facts["sizes"] == 0)]] = True
        form = facts["form"]
        if "shape" in dataset.column_names:
            form = form + _mix(np.unique(dataset["shape"][:], return_inverse=True)[1])
        np.add.at(shapes, owner, form)
    rows = np.flatnonzero(left)
    if sample is not None and sample < len(rows):
        rows = rows[draw_sample(shapes[rows], sample)]
    return rows, len(np.unique(shapes))


def _verify(
    dataset: Dataset,
    conversations: Dataset,
    verifier: Verifier,
    facts: "dict[str, NDArray[Any]]",
    report: CheckReport,
    findings: Findings,
    sample: int | None,
    num_proc: int | None,
) -> None:
    """Verify a sample of the conversations, and enter what was found."""
    total = len(conversations)
    owner = np.asarray(dataset["row"][:]) if "row" in dataset.column_names else np.arange(len(dataset))
    rows, shapes = _to_verify(dataset, facts, owner, total, sample)
    begins, ends = np.searchsorted(owner, rows), np.searchsorted(owner, rows, "right")
    columns = [name for name in ("input_ids", "labels", "untrained") if name in dataset.column_names]
    sequences = dataset.select_columns(columns)

    def verify_batch(batch: dict[str, list[Any]], places: list[int]) -> dict[str, list[Any]]:
        results = []
        for at, place in enumerate(places):
            conversation = {name: batch[name][at] for name in batch}
            results.append(_verify_one(conversation, sequences[begins[place] : ends[place]], verifier))
        return {name: [result[name] for result in results] for name in RESULT}

    verified = conversations.select(rows).map(
        inherited := Inherited(verify_batch),  # kept by its name: workers look it up
        batched=True,
        batch_size=AT_A_TIME,
        with_indices=True,
        remove_columns=conversations.column_names,
        num_proc=processes(num_proc, len(rows) * LIKE_ROWS) if len(rows) > AT_A_TIME else None,
        features=RESULT,
        keep_in_memory=True,  # nothing is kept or found again: what the verifier depends on need not be hashed
        load_from_cache_file=False,
        new_fingerprint="verified",
        desc="verifying",
    )
    del inherited
    report.judged_rows = len(rows)
    report.judged = f"all {total:,} rows were judged"
    if len(rows) < total:
        report.judged = (
            f"{len(rows):,} of {total:,} rows were judged, {sample or 0:,} at random, with each of "
            f"{shapes:,} shapes at least {EACH_SHAPE} times or wholly; all rows were counted"
        )
    verified_sequences = np.isin(owner, rows)
    report.compared_turns = int(facts["all turns"][verified_sequences].sum()) if facts else 0
    origins = conversations["origin"] if "origin" in conversations.column_names else None
    open_rows = {*np.flatnonzero(facts["missing end token"]).tolist()} if facts else set()
    for row, first, result in zip(rows.tolist(), begins.tolist(), verified, strict=True):
        where = f"row {first}{f' ({origins[row]})' if origins and origins[row] else ''}"
        _enter(first, where, result, report, findings, first in open_rows)


def _verify_one(conversation: dict[str, Any], sequences: dict[str, list[Any]], verifier: Verifier) -> dict[str, Any]:
    messages = [_without_nulls(message) for message in _read(conversation["messages"])]
    tools, kwargs = (_read(conversation.get(name)) for name in ("tools", "chat_template_kwargs"))
    pairs = list(zip(sequences["input_ids"], sequences["labels"], strict=True))
    result = verifier.verify(messages, pairs, tools=tools, kwargs=kwargs)
    errors = list(result.errors)
    if len(result.untrained) > sum(map(len, sequences.get("untrained", []))):
        named = ", ".join(map(str, result.untrained))
        errors.append(("turns left out", f"messages {named} are not trained, and no reason is given"))
    return {
        "proven": len(result.proven),
        **{"codes": [code for code, _ in errors], "errors": [what for _, what in errors]},
        **{"losses": result.losses, "unproven": result.unproven, "remarks": result.remarks},
    }


def _enter(
    row: int, where: str, result: dict[str, Any], report: CheckReport, findings: Findings, is_open: bool
) -> None:
    report.proven_turns += result["proven"]
    count(report.losses, [dict.fromkeys(result["losses"])])
    count(report.not_proven, [dict.fromkeys(result["unproven"])])
    for code, what in {
        code: what for code, what in zip(result["codes"][::-1], result["errors"][::-1], strict=True)
    }.items():
        if code != "missing end token" or not is_open:  # it was counted with the facts
            findings.add(code, [row], f"{where}: {what}")
    for remark in dict.fromkeys(result["remarks"]):
        findings.add("harmless", [row], remark)
    if result["unproven"]:
        findings.add("not proven", [row])
    if result["losses"]:
        findings.add("said but not shown", [row])


def _read(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _without_nulls(value: Any) -> Any:
    """Arrow gives every message every key of the column."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
