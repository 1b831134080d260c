"""Labelled rows -> packs: lengths become a plan, and a data set gathers by it what a pack holds when it is read."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from ma_sft.data.load import fingerprint_of, pklregister, table_rows
from ma_sft.errors import FormatError, LabelError, RecipeError
from ma_sft.packing.best_fit import best_fit_decreasing
from ma_sft.packing.truncation import POLICIES, Ints, Spans, truncate, whole_rows

logger = logging.getLogger(__name__)

IGNORED = -100
COLUMNS = ("input_ids", "labels", "seq_lengths")
STRATEGIES = {"bfd": "cut", "bfd_split": "split", "wrapped": "split", "none": "cut"}  # and what each does by default
TOKENS_AT_A_TIME = 1 << 18  # small enough for the processor's cache


def pack(
    dataset: datasets.Dataset | datasets.IterableDataset,
    seq_length: int,
    strategy: str = "bfd",
    *,
    overflow: str | None = None,
    seed: int | None = 42,
    end_token_ids: Collection[int] | None = None,
    buffer_size: int = 10_000,
    keep_in_memory: bool | None = None,
    cache_file_name: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Put tokenised documents together in rows of at most `seq_length` tokens.

    Give the result to `SFTTrainer` with `padding_free=True, max_length=None` and
    `dataset_kwargs={"skip_prepare_dataset": True}`: its collator turns `seq_lengths` into position ids that restart
    at each document, by which every attention backend keeps documents apart. Other columns do not survive packing.

    Args:
        dataset: rows with `input_ids` and `labels` of the same length; without `labels` every token is trained. A
            streaming data set is packed `buffer_size` rows at a time.
        seq_length: room of one pack, in tokens.
        strategy: "bfd" (best-fit decreasing over the whole data set), "bfd_split", "wrapped" (documents are joined,
            cut every `seq_length` tokens, and see each other), "none" (one document in each row).
        overflow: a longer document is "cut", "split", left out with "drop", cut at its beginning with "keep_end", or
            loses its oldest turns with "keep_answer". By default "bfd_split" and "wrapped" split, the others cut.
        seed: decides which documents of one length meet, and the order of the packs; None keeps the source's order.
        end_token_ids: tokens that end an answer, by which the report knows one that ends right at the cut.
        keep_in_memory, cache_file_name: those of `flatten`; where one is given, the packs are written.

    Returns:
        A data set of `input_ids`, `labels` and `seq_lengths`, the lengths of the documents in each pack. It holds
        numbers of packs, and gathers tokens from `dataset` when a pack is read.

    Raises:
        RecipeError: settings that are unknown or contradict each other.
        FormatError: rows that are not tokenised.
        LabelError: a row whose labels do not fit its tokens.
    """
    settings: dict[str, Any] = {"overflow": overflow, "seed": seed, "end_token_ids": end_token_ids}
    if isinstance(dataset, datasets.IterableDataset):
        check_settings(seq_length, strategy, overflow)
        buffer = partial(pack_table, seq_length=seq_length, strategy=strategy, **settings)
        names = dataset.column_names or list(next(iter(dataset)))
        extra = [name for name in names if name not in COLUMNS]
        stream = dataset.with_format("arrow")
        return stream.map(buffer, batched=True, batch_size=buffer_size, remove_columns=extra).with_format(None)
    packs, _ = pack_with_report(dataset, seq_length, strategy, **settings)
    if keep_in_memory is None and cache_file_name is None:
        return packs
    return flatten(packs, keep_in_memory=bool(keep_in_memory), cache_file_name=cache_file_name)


def pack_with_report(
    dataset: datasets.Dataset,
    seq_length: int,
    strategy: str = "bfd",
    *,
    overflow: str | None = None,
    seed: int | None = 42,
    end_token_ids: Collection[int] | None = None,
    drop_unlabelled: bool = False,
    groups: NDArray[Any] | None = None,
) -> tuple[datasets.Dataset, "PackingReport"]:
    """`pack` for a data set that is not a stream, and what it did.

    Args:
        drop_unlabelled: leave out the rows of which no label is left.
        groups: the group of each row; rows of different groups share no pack.

    The other arguments, the result and the errors are those of `pack`.
    """
    tokens = Tokens(dataset)
    overflow = check_settings(seq_length, strategy, overflow)
    kept = labelled = truncate(tokens.lengths, tokens.label_runs, seq_length, overflow)
    if drop_unlabelled:
        labels = np.bincount(kept.row, weights=tokens.trained(kept), minlength=len(tokens.lengths))
        labelled = kept.take(np.flatnonzero(labels[kept.row]))
    parts = [labelled]
    if groups is not None:
        parts = [labelled.take(groups[labelled.row] == group) for group in np.unique(groups)]
    if strategy == "none":
        placed = [(part, np.ones_like(part.row)) for part in parts]
    else:
        placed = [(_wrap if strategy == "wrapped" else _best_fit)(part, seq_length, seed) for part in parts]
    pieces = Spans(*map(np.concatenate, zip(*(spans for spans, _ in placed), strict=True)))
    bounds = _offsets(np.concatenate([count for _, count in placed]))
    plan = Plan(labelled, pieces, bounds, strategy != "wrapped")
    report = _report(tokens, kept, plan, (strategy, overflow, seq_length), end_token_ids)
    name = Hasher.hash((fingerprint_of(dataset), seq_length, strategy, overflow, seed, drop_unlabelled, groups))
    numbers = _numbers_of_packs(np.arange(report.packs), name)
    return numbers.with_transform(Packs(tokens, plan, name)), report


def pack_table(table: pa.Table, seq_length: int, strategy: str, **settings: Any) -> pa.Table:
    """A buffer of a stream's rows, as a table of packs; what is cut or left out is logged."""
    rows = datasets.Dataset(pa.table(table), fingerprint="buffer")
    packed, report = pack_with_report(rows, seq_length, strategy, **settings)
    if report.rows_cut or report.rows_dropped:
        logger.warning(
            "packing %d rows: %d cut (%d without a label, %d unfinished), %d dropped",
            *(report.rows, report.rows_cut, report.rows_unlabelled, report.rows_unfinished, report.rows_dropped),
        )
    packs = replace(cast(Packs, packs_of(packed)), arrays=True)
    return pa.table(packs.read(np.arange(len(packed))), schema=packs.features.arrow_schema)


def check_settings(seq_length: int, strategy: str, overflow: str | None) -> str:
    """What happens to rows that are too long; a setting that is unknown or contradicts another is a `RecipeError`."""
    for what, value, known in (("packing strategy", strategy, STRATEGIES), ("overflow", overflow or "cut", POLICIES)):
        if value not in known:
            raise RecipeError(f"unknown {what} '{value}'; choose one of {', '.join(known)}")
    if strategy == "bfd_split" and overflow not in (None, "split"):
        raise RecipeError(f"strategy 'bfd_split' splits long rows, overflow '{overflow}' does not; use 'bfd'")
    return overflow or STRATEGIES[strategy]


class Tokens:
    """Ids and labels (as in TRL the ids, where there are none) of a data set's rows, where they lie."""

    def __init__(self, source: datasets.Dataset) -> None:
        names = [name for name in COLUMNS[:2] if name in source.column_names]
        if "input_ids" not in names:
            raise FormatError(f"no column 'input_ids' among {source.column_names}; tokenise the rows before packing")
        masks = [name for name in ("assistant_masks", "completion_mask") if name in source.column_names]
        if masks and "labels" not in names:
            raise LabelError(f"column '{masks[0]}' but no 'labels'; make labels from the mask before packing")
        self.source = source.select_columns(names)
        columns = [_checked(source.data.column(name), name) for name in names]
        counts, labels = (pc.list_value_length(columns[at]).to_numpy().astype(np.int64) for at in (0, -1))
        if len(wrong := np.flatnonzero(counts != labels)):
            row = int(wrong[0])
            raise LabelError(f"row {row}: {counts[row]} input_ids but {labels[row]} labels; each token needs one label")
        # Both columns cut alike, where either of them lies in another piece of memory
        batches = [batch for batch in pa.table(columns, names).to_batches() if len(batch)]
        self.ids, self.labels = (
            [memoryview(batch.column(at).flatten().to_numpy()) for batch in batches] for at in (0, -1)
        )
        sizes = [len(batch) for batch in batches]
        first = _offsets(np.array([len(part) for part in self.ids], dtype=np.int64))[:-1]  # token of each batch
        start, rows = _offsets(counts)[:-1] - np.repeat(first, sizes), table_rows(source)
        rows = slice(None) if rows is None else rows
        self.lengths: Ints = counts[rows]
        self.start, self.batch = start[rows], np.repeat(np.arange(len(sizes)), sizes)[rows]

    def __reduce__(self) -> Any:  # for a loader's workers, which map the source's files anew
        return Tokens, (self.source,)

    def gather(self, column: list[memoryview], spans: Spans) -> NDArray[Any]:
        """What `ids` or `labels` have in the spans, one after another: `bytes.join` copies each with one memcpy."""
        begin = self.start[spans.row] + spans.start
        places = zip(self.batch[spans.row].tolist(), begin.tolist(), (begin + spans.length).tolist(), strict=True)
        joined = bytearray().join([column[batch][first:last] for batch, first, last in places])
        return np.frombuffer(joined, column[0].format if column else np.int64)

    def has_label(self, spans: Spans, at: Ints) -> NDArray[np.bool_]:
        """Whether the token `at` of each span has a label."""
        return np.asarray(self.gather(self.labels, Spans(spans.row, spans.start + at, np.ones_like(at))) != IGNORED)

    def trained(self, spans: Spans) -> Ints:
        """How many tokens of each span have a label; no span may be empty."""
        counts = [np.zeros(0, dtype=np.int64)]
        for some in np.array_split(np.arange(len(spans.row)), spans.length.sum() // TOKENS_AT_A_TIME + 1):
            part = spans.take(some)
            begins = np.cumsum(part.length) - part.length
            counts.append(np.add.reduceat(self.gather(self.labels, part) != IGNORED, begins, dtype=np.int64))
        return np.concatenate(counts)

    def label_runs(self, row: int) -> list[tuple[int, int]]:
        """Where each run of labels of a row begins and ends."""
        from ma_sft.labels.verify import runs  # which imports transformers

        return [*runs(self.gather(self.labels, whole_rows(np.array([row]), self.lengths)))]


def _offsets(counts: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(counts)])


def _checked(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
        raise FormatError(f"column '{name}' is {kind}; packing needs integers in each row: tokenise the rows first")
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise FormatError(f"row {row}: '{name}' is null; remove the row or give it tokens")
    return column


@dataclass(frozen=True)
class Plan:
    """What each pack holds: pack n the pieces from `bounds[n]` up to `bounds[n + 1]`."""

    documents: Spans  # what is kept of the rows, before packing
    pieces: Spans  # the same in the order of the packs; a document that runs on over the end of a pack in more pieces
    bounds: Ints  # int64, shape (packs + 1,)
    apart: bool  # whether the pieces of a pack stay documents of their own, or become one


def _best_fit(documents: Spans, seq_length: int, seed: int | None) -> tuple[Spans, Ints]:
    rng, count = np.random.default_rng(seed), len(documents.row)
    # Equal lengths are taken in random order: neighbours in the source would otherwise always share a pack.
    order = np.arange(count) if seed is None else rng.permutation(count)
    bins = best_fit_decreasing(documents.length[order], seq_length)
    packs = int(bins.max(initial=-1)) + 1
    if seed is not None:
        bins = rng.permutation(packs)[bins]
    return documents.take(order[np.argsort(bins, kind="stable")]), np.bincount(bins, minlength=packs)


def _wrap(documents: Spans, seq_length: int, seed: int | None) -> tuple[Spans, Ints]:
    """The stream of documents, cut every `seq_length` tokens."""
    ends = np.cumsum(documents.length)
    cuts = np.union1d(ends, np.arange(seq_length, documents.length.sum(), seq_length))
    begins = np.concatenate([[0], cuts])[: len(cuts)]
    source = np.searchsorted(ends, begins, side="right")
    inside = begins - (ends - documents.length)[source]
    pieces = Spans(documents.row[source], documents.start[source] + inside, cuts - begins)
    return pieces, np.bincount(begins // seq_length)


@dataclass(eq=False)
class Packs:
    """The transform of a data set whose columns hold numbers of packs: it puts what a pack holds in the number's place.

    The number after the last pack's stands for one padding token without a label.
    """

    tokens: Tokens
    plan: Plan
    fingerprint: str  # of rows and plan
    arrays: bool = False  # tokens and labels as NumPy arrays (int64), not as lists
    pad_token_id: int = 0

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        # A column without numbers was written by `map`, and stays as it is.
        numbers = {name: batch[name] for name in COLUMNS if batch.get(name) and isinstance(batch[name][0], int)}
        read = self.read(np.array(next(iter(numbers.values())))) if numbers else {}
        return {**batch, **{name: read[name] for name in numbers}}

    def read(self, packs: Ints) -> dict[str, list[Any]]:
        """What these packs hold, by column."""
        first, last = (self.plan.bounds.take(packs + at, mode="clip") for at in (0, 1))
        piece = _offsets(last - first)
        pieces = self.plan.pieces.take(np.arange(piece[-1]) + np.repeat(first - piece[:-1], last - first))
        token = _offsets(pieces.length)[piece]
        lengths = _parts(pieces.length, piece, 1) if self.plan.apart else np.maximum(np.diff(token), 1).reshape(-1, 1)
        ids = _parts(self.tokens.gather(self.tokens.ids, pieces), token, self.pad_token_id)
        labels = _parts(self.tokens.gather(self.tokens.labels, pieces), token, IGNORED)
        give = (lambda array: array.astype(np.int64)) if self.arrays else np.ndarray.tolist  # a loss takes int64
        columns = (list(map(give, ids)), list(map(give, labels)), [array.tolist() for array in lengths])
        return dict(zip(COLUMNS, columns, strict=True))

    @property
    def features(self) -> datasets.Features:
        """Of the packs as they are read."""
        source = self.tokens.source.features
        ids = source["input_ids"]
        kinds = (ids.feature, source.get("labels", ids).feature, datasets.Value("int32"))
        return datasets.Features(dict(zip(COLUMNS, map(datasets.List, kinds), strict=True)))

    def __deepcopy__(self, memo: Any) -> "Packs":
        return self  # `datasets` copies a format with each data set, and nothing here is ever changed


# For hashing alone: without it, `datasets` would hash all tokens that are in memory.
@pklregister(Packs)  # type: ignore[untyped-decorator]
def _hash(pickler: Any, packs: Packs) -> None:
    pickler.save_reduce(str, (f"{packs.fingerprint} {packs.arrays} {packs.pad_token_id}",), obj=packs)


def _parts(values: NDArray[Any], bounds: Ints, filler: int) -> list[NDArray[Any]]:
    fill = np.array([filler], dtype=values.dtype)
    return [values[begin:end] if end > begin else fill for begin, end in pairwise(bounds.tolist())]


def _numbers_of_packs(packs: Ints, fingerprint: str) -> datasets.Dataset:
    return datasets.Dataset(pa.table(dict.fromkeys(COLUMNS, pa.array(packs))), fingerprint=fingerprint)


def packs_of(dataset: datasets.Dataset) -> Packs | None:
    """What `pack` put into a data set, None for others."""
    transform = dataset.format["format_kwargs"].get("transform")
    return transform if isinstance(transform, Packs) else None


def as_arrays(dataset: Any) -> Any:
    """The same rows as int64 arrays, several times as fast to collate as lists; a stream is given back as it is."""
    if isinstance(dataset, datasets.IterableDataset):
        return dataset
    packs = packs_of(dataset)
    return dataset.with_transform(replace(packs, arrays=True)) if packs else dataset.with_format("numpy")


def lengths(dataset: datasets.Dataset) -> Ints:
    """The number of tokens in each pack, or in each row of a data set without packs; int64, shape (rows,)."""
    packs = packs_of(dataset)
    if packs is None:
        return Tokens(dataset).lengths
    tokens = np.diff(_offsets(packs.plan.pieces.length)[packs.plan.bounds])
    return np.asarray(np.append(tokens, 0)[dataset.with_format("numpy")["input_ids"][:]])


def fill(dataset: datasets.Dataset, count: int, pad_token_id: int) -> datasets.Dataset:
    """The packs, and `count` more of one padding token without a label."""
    packs = cast(Packs, packs_of(dataset))
    empty = _numbers_of_packs(np.full(count, len(packs.plan.bounds) - 1), f"{packs.fingerprint}-{count}")
    filled = datasets.concatenate_datasets([dataset.with_format(None), empty])
    return filled.with_transform(replace(packs, pad_token_id=pad_token_id))


def flatten(
    packed: datasets.Dataset, *, keep_in_memory: bool = False, cache_file_name: str | None = None
) -> datasets.Dataset:
    """Real packs: the tokens of `pack`'s result once more, in one Arrow file, in the order of the packs.

    They keep the dtypes of the rows; `seq_lengths` is int32. The file is `cache_file_name`, by default one beside the
    rows, where the same call finds it again; with `keep_in_memory`, or of rows in memory, there is none.
    """
    packs = cast(Packs, packs_of(packed))
    name = Hasher.hash((fingerprint_of(packed), "flatten"))
    if not keep_in_memory and cache_file_name is None and (files := packs.tokens.source.cache_files):
        cache_file_name = str(Path(files[0]["filename"]).with_name(f"packs-{name}.arrow"))
    how: dict[str, Any] = {"features": packs.features, "new_fingerprint": name, "desc": "writing packs"}
    how |= {"keep_in_memory": keep_in_memory, "cache_file_name": cache_file_name}
    return as_arrays(packed).map(dict, batched=True, **how).with_format(None)


@dataclass(frozen=True)
class PackingReport:
    """What packing did to a data set; `str(report)` is the text that a run prints."""

    strategy: str
    overflow: str
    seq_length: int
    rows: int  # that came in
    rows_cut: int  # lost their end or their beginning
    rows_dropped: int  # left out because they, or their last answer, were too long
    rows_unlabelled: int  # cut, and without a label now: they train nothing, and a run leaves them out
    rows_unfinished: int  # cut inside a trained turn, whose end token is gone: they do not teach to stop
    labels_lost: int  # by cutting, dropping, and as the first label of a later piece, which nothing predicts
    documents: int  # and pieces of them in the packs
    packs: int
    tokens: int  # in the packs

    @property
    def density(self) -> float:
        """Share of the packs' room that holds tokens, 0 to 1."""
        return self.tokens / (self.packs * self.seq_length) if self.packs else 0.0

    @property
    def warnings(self) -> list[str]:
        """One line for each thing that a user should look at before training."""
        shared = self.strategy == "wrapped" and self.documents > self.packs
        lines = {
            "{:,} cut rows have no label left and train nothing": self.rows_unlabelled,
            "{:,} rows are cut inside an answer and lost its end token": self.rows_unfinished,
            f"{{:,}} rows longer than {self.seq_length:,} tokens were dropped": self.rows_dropped,
            "'wrapped' packs cross document borders: documents in one pack see each other": shared,
        }
        return [line.format(count) for line, count in lines.items() if count]

    def __str__(self) -> str:
        lines = [
            f"packing        {self.strategy}, {self.seq_length:,} tokens, too long: {self.overflow}",
            f"rows in        {self.rows:,} ({self.rows_cut:,} cut, {self.rows_dropped:,} dropped)",
            f"packs out      {self.packs:,} of {self.documents:,} documents",
            f"density        {self.density:.2%}",
            f"tokens         {self.tokens:,} ({self.labels_lost:,} labels lost)",
        ]
        return "\n".join(lines + [f"warning        {line}" for line in self.warnings])


def _report(
    tokens: Tokens, kept: Spans, plan: Plan, settings: tuple[str, str, int], end_token_ids: Collection[int] | None
) -> PackingReport:
    """The report of a plan, which may be without the rows of `kept` that have no label; without `end_token_ids`, an
    answer is cut where labels stand on both sides."""
    left = np.bincount(kept.row, weights=kept.length, minlength=len(tokens.lengths))
    shortened = left < tokens.lengths
    cut = kept.take(np.flatnonzero(shortened[kept.row]))
    labels_left = tokens.trained(cut)
    early = cut.take(np.flatnonzero(cut.start + cut.length < tokens.lengths[cut.row]))
    unfinished = tokens.has_label(early, early.length - 1)
    if end_token_ids is None:
        unfinished &= tokens.has_label(early, early.length)
    else:
        last = tokens.gather(tokens.ids, Spans(early.row, early.start + early.length - 1, np.ones_like(early.row)))
        unfinished &= ~np.isin(last, list(end_token_ids))
    # The first label of a later piece has nothing before it, but where the piece before it is in the same document.
    later = plan.pieces.take(slice(None) if plan.apart else plan.bounds[:-1])
    later = later.take(np.flatnonzero(later.start))
    labels_before = tokens.trained(whole_rows(np.flatnonzero(shortened), tokens.lengths))
    alone = tokens.has_label(later, np.zeros_like(later.row))
    return PackingReport(
        *settings,
        rows=len(tokens.lengths),
        rows_cut=len(cut.row),
        rows_dropped=int(((left == 0) & shortened).sum()),
        rows_unlabelled=int((labels_left == 0).sum()),
        rows_unfinished=int(unfinished.sum()),
        labels_lost=int(labels_before.sum() - labels_left.sum() + alone.sum()),
        documents=len(plan.documents.row),
        packs=len(plan.bounds) - 1,
        tokens=int(plan.documents.length.sum()),
    )
