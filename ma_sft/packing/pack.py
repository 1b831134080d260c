"""Labelled rows -> packs: lengths become a plan, and a data set gathers by it what a pack holds when it is read."""

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from ma_sft.data.load import fingerprint_of, pklregister, table_rows
from ma_sft.errors import FormatError, LabelError, RecipeError
from ma_sft.packing.best_fit import argsort, best_fit_decreasing
from ma_sft.packing.truncation import POLICIES, Ints, Spans, label_runs, truncate

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
        dataset: rows with `input_ids` and `labels`, lists of whole numbers of the same length. Without `labels` every
            token is trained. A streaming data set is packed buffer by buffer.
        seq_length: room of one pack, in tokens.
        strategy: "bfd" (best-fit decreasing over the whole data set), "bfd_split", "wrapped" (documents are joined,
            cut every `seq_length` tokens, and see each other), "none" (one document in each row).
        overflow: a longer document is "cut", "split", left out with "drop", cut at its beginning with "keep_end", or
            loses its oldest turns with "keep_answer". By default "bfd_split" and "wrapped" split, the others cut.
        seed: decides which documents of one length meet, and the order of the packs; None keeps the source's order.
        end_token_ids: tokens that end an answer, by which the report knows one that ends right at the cut.
        buffer_size: rows that a streaming data set packs at a time.
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
    names = [name for name in COLUMNS[:2] if name in dataset.column_names]
    tokens = tokens_of(dataset)
    overflow = check_settings(seq_length, strategy, overflow)
    kept = labelled = truncate(tokens.lengths, tokens.label_runs, seq_length, overflow)
    if drop_unlabelled:
        labels = np.bincount(kept.row, weights=tokens.trained(kept), minlength=len(tokens.lengths))
        labelled = kept.take(np.flatnonzero(labels[kept.row]))
    plan = make_plan(labelled, seq_length, strategy, seed, groups)
    report = _report(tokens, kept, plan, (strategy, overflow, seq_length), end_token_ids)
    settings = (fingerprint_of(dataset), seq_length, strategy, overflow, seed, drop_unlabelled, groups)
    name = Hasher.hash(settings)
    packs = _numbers_of_packs(np.arange(len(plan.bounds) - 1), name)
    return packs.with_transform(Packs(dataset.select_columns(names), tokens, plan, name)), report


def pack_table(
    table: pa.Table, seq_length: int, strategy: str, drop_unlabelled: bool = False, **settings: Any
) -> pa.Table:
    """A buffer of a stream's rows, as a table of packs; what is cut or left out is logged."""
    rows = datasets.Dataset(pa.table(table), fingerprint="buffer")
    packs, report = pack_with_report(rows, seq_length, strategy, drop_unlabelled=drop_unlabelled, **settings)
    if report.rows_cut or report.rows_dropped:
        logger.warning(
            "packing %d rows: %d cut (%d without a label, %d unfinished), %d dropped, %d empty",
            *(report.rows, report.rows_cut, report.rows_unlabelled),
            *(report.rows_unfinished, report.rows_dropped, report.rows_empty),
        )
    transform = replace(cast(Packs, packs_of(packs)), arrays=True)
    return pa.table(transform.read(np.arange(len(packs))), schema=transform.features.arrow_schema)


def check_settings(seq_length: int, strategy: str, overflow: str | None) -> str:
    """What happens to rows that are too long.

    Raises:
        RecipeError: a setting that is unknown, or contradicts another.
    """
    if seq_length < 1:
        raise RecipeError(f"seq_length is {seq_length}; a pack needs room for at least one token")
    for what, value, known in (("packing strategy", strategy, STRATEGIES), ("overflow", overflow or "cut", POLICIES)):
        if value not in known:
            raise RecipeError(f"unknown {what} '{value}'; choose one of {', '.join(known)}")
    if strategy == "bfd_split" and overflow not in (None, "split"):
        raise RecipeError(f"strategy 'bfd_split' splits long rows, overflow '{overflow}' does not; use 'bfd'")
    return overflow or STRATEGIES[strategy]


class Column:
    """A list column as the buffers of its chunks, and each row's place in them; nothing is copied until asked for.

    Raises:
        FormatError: the column holds anything but lists of whole numbers.
    """

    def __init__(self, column: pa.ChunkedArray, name: str, rows: Ints | slice) -> None:
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise FormatError(f"column '{name}' is {column.type}; packing needs a list of integers in each row")
        if not pa.types.is_integer(column.type.value_type):
            raise FormatError(f"column '{name}' is {column.type}; packing needs integers: tokenise the rows first")
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise FormatError(f"row {row}: '{name}' is null; remove the row or give it tokens")
        self.type = column.type.value_type
        self.dtype = np.dtype(self.type.to_pandas_dtype())
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.buffers = [chunk.values.to_numpy().data.cast("B") for chunk in chunks]
        offsets = [chunk.offsets.to_numpy().astype(np.int64) for chunk in chunks]
        none = [np.zeros(0, dtype=np.int64)]
        self.start: Ints = np.concatenate([each[:-1] for each in offsets] or none)[rows]
        self.length: Ints = np.concatenate([np.diff(each) for each in offsets] or none)[rows]
        self.chunk: Ints = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks] or none[0])[rows]

    def gather(self, spans: Spans) -> NDArray[Any]:
        """The tokens of the spans one after another: `bytes.join` copies each span with one memcpy."""
        begin = (self.start[spans.row] + spans.start) * self.dtype.itemsize
        end = begin + spans.length * self.dtype.itemsize
        places = zip(self.chunk[spans.row].tolist(), begin.tolist(), end.tolist(), strict=True)
        return np.frombuffer(bytearray().join([self.buffers[c][b:e] for c, b, e in places]), self.dtype)

    def one(self, row: Ints, token: Ints) -> Ints:
        """One token of each row, int64."""
        return cast(Ints, self.gather(Spans(row, token, np.ones_like(row))).astype(np.int64))


class Tokens:
    """The columns `input_ids` and `labels` (as in TRL the ids, where there are none) of rows of a table.

    Raises:
        FormatError: rows that are not tokenised.
        LabelError: labels that do not fit the tokens, or a mask instead of labels.
    """

    def __init__(self, table: Any, rows: Ints | slice = slice(None)) -> None:
        if "input_ids" not in table.column_names:
            raise FormatError(f"no column 'input_ids' among {table.column_names}; tokenise the rows before packing")
        masks = [name for name in ("assistant_masks", "completion_mask") if name in table.column_names]
        if masks and "labels" not in table.column_names:
            raise LabelError(f"column '{masks[0]}' but no 'labels'; make labels from the mask before packing")
        self.ids = self.labels = Column(table.column("input_ids"), "input_ids", rows)
        if "labels" in table.column_names:
            self.labels = Column(table.column("labels"), "labels", rows)
        self.lengths = self.ids.length
        if len(wrong := np.flatnonzero(self.lengths != self.labels.length)):
            row = int(wrong[0])
            raise LabelError(
                f"row {row}: {self.lengths[row]} input_ids but {self.labels.length[row]} labels; "
                "each token needs one label"
            )

    def trained(self, spans: Spans) -> Ints:
        """How many tokens of each span have a label."""
        counts = [np.zeros(0, dtype=np.int64)]
        for part in _at_a_time(spans):
            before = np.concatenate([[0], np.cumsum(self.labels.gather(part) != IGNORED)])
            ends = np.cumsum(part.length)
            counts.append(before[ends] - before[ends - part.length])
        return np.concatenate(counts)

    def label_runs(self, row: int) -> tuple[Ints, Ints]:
        """Where the runs of labels of a row begin and end."""
        whole = Spans(np.array([row]), np.array([0]), self.lengths[[row]])
        return label_runs(self.labels.gather(whole), IGNORED)


def _at_a_time(spans: Spans) -> Iterator[Spans]:
    """The spans in runs of about `TOKENS_AT_A_TIME` tokens."""
    ends = np.cumsum(spans.length)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.unique([0, *np.searchsorted(ends, np.arange(TOKENS_AT_A_TIME, total, TOKENS_AT_A_TIME)), len(ends)])
    for begin, end in pairwise(cuts.tolist()):
        yield spans.take(slice(begin, end))


def tokens_of(source: datasets.Dataset) -> Tokens:
    """The tokens of a data set's rows, where they lie."""
    rows = table_rows(source)
    return Tokens(source.data, slice(None) if rows is None else rows)


@dataclass(frozen=True)
class Plan:
    """What each pack holds.

    Attributes:
        documents: what is kept of the rows, before packing.
        pieces: the same in the order of the packs; where documents run on over the end of a pack, in more pieces.
        bounds: int64 array of shape (packs + 1,): pack n holds the pieces from `bounds[n]` up to `bounds[n + 1]`.
        apart: whether the pieces of a pack stay documents of their own, or become one.
    """

    documents: Spans
    pieces: Spans
    bounds: Ints
    apart: bool


def make_plan(
    kept: Spans, seq_length: int, strategy: str, seed: int | None, groups: NDArray[Any] | None = None
) -> Plan:
    """The packs that a strategy makes of documents; rows of different groups share no pack."""
    pieces, counts = [], [np.zeros(1, dtype=np.int64)]
    for documents in (
        [kept] if groups is None else [kept.take(groups[kept.row] == group) for group in np.unique(groups)]
    ):
        if strategy == "none":
            placed, count = documents, np.ones(len(documents.row), dtype=np.int64)
        else:
            placed, count = (_wrap if strategy == "wrapped" else _best_fit)(documents, seq_length, seed)
        pieces.append(placed)
        counts.append(count)
    joined = (np.concatenate([getattr(part, name) for part in pieces]) for name in ("row", "start", "length"))
    return Plan(kept, Spans(*joined), np.cumsum(np.concatenate(counts)), strategy != "wrapped")


def _best_fit(documents: Spans, seq_length: int, seed: int | None) -> tuple[Spans, Ints]:
    """Pieces in the order of the packs, and how many each pack holds."""
    rng, count = np.random.default_rng(seed), len(documents.row)
    # Equal lengths are taken in random order: neighbours in the source would otherwise always share a pack.
    order = np.arange(count) if seed is None else rng.permutation(count)
    bins = best_fit_decreasing(documents.length[order], seq_length)
    packs = int(bins.max(initial=-1)) + 1
    if seed is not None:
        bins = rng.permutation(packs)[bins]
    return documents.take(order[argsort(bins)]), np.bincount(bins, minlength=packs)


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

    Attributes:
        source: the rows.
        tokens: theirs.
        plan: what each pack holds. A pack without a piece is one padding token without a label.
        fingerprint: of rows and plan.
        arrays: give tokens and labels as NumPy arrays, not as lists.
        pad_token_id: the padding token.
    """

    source: datasets.Dataset
    tokens: Tokens
    plan: Plan
    fingerprint: str
    arrays: bool = False
    pad_token_id: int = 0

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        # A column without numbers was written by `map`, and stays as it is.
        numbers = {name: batch[name] for name in COLUMNS if batch.get(name) and isinstance(batch[name][0], int)}
        read = self.read(np.array(next(iter(numbers.values())))) if numbers else {}
        return {**batch, **{name: read[name] for name in numbers}}

    def read(self, packs: Ints) -> dict[str, list[Any]]:
        """What these packs hold, by column."""
        bounds = self.plan.bounds
        each = list(zip(bounds[packs].tolist(), bounds[packs + 1].tolist(), strict=True))
        pieces = self.plan.pieces.take(np.concatenate([np.arange(0), *(np.arange(*ends) for ends in each)]))
        piece = np.cumsum([0, *(end - begin for begin, end in each)])
        token = np.concatenate([[0], np.cumsum(pieces.length)])[piece]
        lengths = _parts(pieces.length, piece, 1) if self.plan.apart else np.maximum(np.diff(token), 1).reshape(-1, 1)
        found = {"input_ids": (self.tokens.ids, self.pad_token_id), "labels": (self.tokens.labels, IGNORED)}
        columns = {name: _parts(column.gather(pieces), token, pad) for name, (column, pad) in found.items()}
        how = (lambda array: array.astype(np.int64)) if self.arrays else np.ndarray.tolist  # int64: a loss needs it
        read = {name: [how(array) for array in arrays] for name, arrays in columns.items()}
        return {**read, "seq_lengths": [array.tolist() for array in lengths]}

    @property
    def features(self) -> datasets.Features:
        """Of the packs as they are read."""
        types = (self.tokens.ids.type, self.tokens.labels.type, pa.int32())
        return datasets.Features(
            {name: datasets.List(datasets.Value(str(type))) for name, type in zip(COLUMNS, types, strict=True)}
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tokens": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, tokens=tokens_of(state["source"]))

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
    """The same rows as NumPy arrays of int64, of which a collator makes tensors several times as fast as of lists.

    A stream is given back as it is.
    """
    if isinstance(dataset, datasets.IterableDataset):
        return dataset
    packs = packs_of(dataset)
    return dataset.with_transform(replace(packs, arrays=True)) if packs else dataset.with_format("numpy")


def lengths(dataset: datasets.Dataset) -> Ints:
    """The number of tokens in each pack, or in each row of a data set without packs; int64, shape (rows,)."""
    packs = packs_of(dataset)
    if packs is None:
        return tokens_of(dataset).lengths
    tokens = np.concatenate([[0], np.cumsum(packs.plan.pieces.length)])[packs.plan.bounds]
    return cast(Ints, np.diff(tokens)[dataset.with_format("numpy")["input_ids"][:]])


def fill(dataset: datasets.Dataset, count: int, pad_token_id: int) -> datasets.Dataset:
    """The packs, and `count` more of one padding token without a label."""
    packs = cast(Packs, packs_of(dataset))
    bounds = packs.plan.bounds
    plan = replace(packs.plan, bounds=np.append(bounds, bounds[-1]))
    fingerprint = Hasher.hash((packs.fingerprint, "filled"))
    empty = _numbers_of_packs(np.full(count, len(bounds) - 1), fingerprint)
    filled = datasets.concatenate_datasets([dataset.with_format(None), empty])
    return filled.with_transform(replace(packs, plan=plan, fingerprint=fingerprint, pad_token_id=pad_token_id))


def flatten(
    packed: datasets.Dataset, *, keep_in_memory: bool = False, cache_file_name: str | None = None
) -> datasets.Dataset:
    """Real packs: the tokens of `pack`'s result once more, in one Arrow file, in the order of the packs.

    Args:
        packed: the result of `pack`.
        keep_in_memory: hold them in memory; a data set in memory stays there anyway.
        cache_file_name: the file to write; by default beside the rows, where the same call finds it again.

    Returns:
        `input_ids`, `labels` (dtypes of the rows) and `seq_lengths` (int32).
    """
    packs = cast(Packs, packs_of(packed))
    name = Hasher.hash((fingerprint_of(packed), "flatten"))
    if not keep_in_memory and cache_file_name is None and (files := packs.source.cache_files):
        cache_file_name = str(Path(files[0]["filename"]).with_name(f"packs-{name}.arrow"))
    written = as_arrays(packed).map(
        dict,
        batched=True,
        features=packs.features,
        keep_in_memory=keep_in_memory,
        cache_file_name=cache_file_name,
        new_fingerprint=name,
        desc="writing packs",
    )
    return written.with_format(None)


@dataclass(frozen=True)
class PackingReport:
    """What packing did to a data set; `str(report)` is the text that a run prints.

    Attributes:
        strategy, overflow, seq_length: the settings.
        rows: documents that came in.
        rows_empty: documents without a token, left out.
        rows_cut: documents that lost their end or their beginning.
        rows_split: documents that lie in more than one piece.
        rows_dropped: documents left out because they, or their last answer, were too long.
        rows_unlabelled: cut documents that have no label left: they train nothing, and a run leaves them out.
        rows_unfinished: documents cut inside a trained turn, whose end token is gone: they do not teach to stop.
        cut_tokens: tokens removed by cutting and dropping.
        labels_lost: labels among them, and the first label of each later piece of a split document, which has
            nothing before it to be predicted from.
        documents: documents and pieces in the packs.
        packs: rows that came out.
        tokens: tokens in the packs.
    """

    strategy: str
    overflow: str
    seq_length: int
    rows: int
    rows_empty: int
    rows_cut: int
    rows_split: int
    rows_dropped: int
    rows_unlabelled: int
    rows_unfinished: int
    cut_tokens: int
    labels_lost: int
    documents: int
    packs: int
    tokens: int

    @property
    def density(self) -> float:
        """Share of the packs' room that holds tokens, 0 to 1."""
        return self.tokens / (self.packs * self.seq_length) if self.packs else 0.0

    @property
    def warnings(self) -> list[str]:
        """One line for each thing that a user should look at before training."""
        wrapped = self.documents - self.packs if self.strategy == "wrapped" else 0
        lines = {
            "{:,} cut rows have no label left and train nothing": self.rows_unlabelled,
            "{:,} rows are cut inside an answer and lost its end token": self.rows_unfinished,
            f"{{:,}} rows longer than {self.seq_length:,} tokens were dropped": self.rows_dropped,
            "'wrapped' packs cross document borders: documents in one pack see each other": max(wrapped, 0),
        }
        return [line.format(count) for line, count in lines.items() if count]

    def __str__(self) -> str:
        lines = [
            f"packing        {self.strategy}, {self.seq_length:,} tokens, too long: {self.overflow}",
            f"rows in        {self.rows:,} ({self.rows_empty:,} empty, {self.rows_cut:,} cut, "
            f"{self.rows_split:,} split, {self.rows_dropped:,} dropped)",
            f"packs out      {self.packs:,} of {self.documents:,} documents",
            f"density        {self.density:.2%}",
            f"tokens         {self.tokens:,} ({self.cut_tokens:,} cut, {self.labels_lost:,} labels lost)",
        ]
        return "\n".join(lines + [f"warning        {line}" for line in self.warnings])


def _report(
    tokens: Tokens,
    kept: Spans,
    plan: Plan,
    settings: tuple[str, str, int],
    end_token_ids: Collection[int] | None,
) -> PackingReport:
    """The report of a plan, which may be without the rows of `kept` that have no label; without `end_token_ids`, an
    answer is cut where labels stand on both sides."""
    rows, pieces = len(tokens.lengths), plan.pieces
    left = np.bincount(kept.row, weights=kept.length, minlength=rows)
    lost = np.flatnonzero(left < tokens.lengths)
    cut = kept.take(np.flatnonzero(np.isin(kept.row, lost))) if len(lost) else kept.take(slice(0))
    labels_left, ends = tokens.trained(cut), cut.start + cut.length
    early = np.flatnonzero(ends < tokens.lengths[cut.row])
    last, following = (tokens.labels.one(cut.row[early], ends[early] + where) for where in (-1, 0))
    inside = following != IGNORED if end_token_ids is None else ~np.isin(last, list(end_token_ids))
    # The first label of a later piece has nothing before it, but where the piece before it is in the same document.
    later = pieces.take(slice(None) if plan.apart else plan.bounds[:-1])
    later = later.take(np.flatnonzero(later.start))
    alone = tokens.labels.one(later.row, later.start) != IGNORED
    whole = Spans(lost, np.zeros_like(lost), tokens.lengths[lost])
    count = int(plan.documents.length.sum())
    return PackingReport(
        *settings,
        rows=rows,
        rows_empty=int((tokens.lengths == 0).sum()),
        rows_cut=len(cut.row),
        rows_split=int((np.bincount(pieces.row) > 1).sum()),
        rows_dropped=int(((left == 0) & (tokens.lengths > 0)).sum()),
        rows_unlabelled=int((labels_left == 0).sum()),
        rows_unfinished=int(((last != IGNORED) & inside).sum()),
        cut_tokens=int(tokens.lengths.sum()) - count,
        labels_lost=int(tokens.trained(whole).sum() - labels_left.sum() + alone.sum()),
        documents=len(plan.documents.row),
        packs=len(plan.bounds) - 1,
        tokens=count,
    )
