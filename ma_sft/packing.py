"""Documents of any length -> rows of nearly `seq_length` tokens, with labels and document borders kept.

`pack` works on a whole data set of `input_ids` and `labels`. Best-fit decreasing over the whole set wastes
next to nothing, and since lengths are small whole numbers it can be done on their histogram: all documents
of one length go into all packs with one amount of space in a single step, as in Krell et al. 2021
(arXiv:2107.02027). What is left is moving tokens, a megabyte at a time, from the source's Arrow buffers into
the packs' Arrow file.

`ConstantLengthDataset` is the class that TRL 0.x had: a stream of rows of exactly `seq_length` tokens.
"""

import logging
import os
import tempfile
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.fingerprint import update_fingerprint
from numpy.typing import NDArray

from ma_sft.errors import FormatError, LabelError, RecipeError

logger = logging.getLogger(__name__)

Strategy = Literal["bfd", "bfd_split", "wrapped", "none"]
Overflow = Literal["cut", "split", "drop"]
Ints = NDArray[np.int64]

IGNORED = -100
STRATEGIES = ("bfd", "bfd_split", "wrapped", "none")
OVERFLOWS = ("cut", "split", "drop")
COLUMNS = ("input_ids", "labels")
# Small enough for the processor's cache, so that a token crosses main memory once on its way to the file.
TOKENS_PER_BATCH = 1 << 18


@dataclass(frozen=True)
class PackingReport:
    """What packing did to a data set; `str(report)` is the text that a run prints.

    Attributes:
        strategy: how documents were put together.
        overflow: what happened to documents longer than `seq_length`.
        seq_length: room of one pack, in tokens.
        rows: documents that came in.
        rows_empty: documents without a token, left out.
        rows_cut: documents that lost their end.
        rows_split: documents that lie in more than one piece.
        rows_dropped: documents left out because they were too long.
        rows_unlabelled: cut documents that have no label left: they train nothing.
        rows_unfinished: documents cut inside a trained turn, whose end token is gone: they do not teach to
            stop.
        cut_tokens: tokens removed by cutting and dropping.
        labels_lost: labels among them, and the first label of each later piece of a split document, which has
            nothing before it to be predicted from.
        documents: documents and pieces in the packs.
        packs: rows that came out.
        tokens: tokens in the packs.
        batch_size: documents per batch that `padded_tokens` assumes.
        padded_tokens: tokens that the same documents fill when padded to the longest of their batch.
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
    batch_size: int
    padded_tokens: int

    @property
    def density(self) -> float:
        """Share of the packs' room that holds tokens, 0 to 1."""
        return self.tokens / (self.packs * self.seq_length) if self.packs else 0.0

    @property
    def padding_saved(self) -> int:
        """Padding tokens that unpacked batches would have carried."""
        return self.padded_tokens - self.tokens

    @property
    def speed_up(self) -> float:
        """Tokens that a padded epoch computes over those of a packed one; attention is left out."""
        return self.padded_tokens / self.tokens if self.tokens else 1.0

    def steps(self, batch_size: int, epochs: float = 1.0) -> int:
        """Optimiser steps for `epochs`, where `batch_size` packs of all devices together make one step."""
        return int(np.ceil(np.ceil(self.packs / batch_size) * epochs))

    @property
    def warnings(self) -> list[str]:
        """One line for each thing that a user should look at before training."""
        found = []
        if self.rows_unlabelled:
            found.append(f"{self.rows_unlabelled:,} cut rows have no label left and train nothing")
        if self.rows_unfinished:
            found.append(f"{self.rows_unfinished:,} rows are cut inside an answer and lost its end token")
        if self.rows_dropped:
            found.append(f"{self.rows_dropped:,} rows longer than {self.seq_length:,} tokens were dropped")
        if self.strategy == "wrapped" and self.documents > self.packs:
            found.append("'wrapped' packs cross document borders: documents in one pack see each other")
        return found

    def __str__(self) -> str:
        lines = [
            f"packing        {self.strategy}, {self.seq_length:,} tokens, too long: {self.overflow}",
            f"rows in        {self.rows:,} ({self.rows_empty:,} empty, {self.rows_cut:,} cut, "
            f"{self.rows_split:,} split, {self.rows_dropped:,} dropped)",
            f"packs out      {self.packs:,} of {self.documents:,} documents",
            f"density        {self.density:.2%}",
            f"tokens         {self.tokens:,} ({self.cut_tokens:,} cut, {self.labels_lost:,} labels lost)",
            f"padding saved  {self.padding_saved:,} tokens at {self.batch_size} rows a batch",
            f"steps          {self.steps(self.batch_size):,} an epoch instead of "
            f"{-(-self.documents // self.batch_size):,}",
            f"speed-up       {self.speed_up:.2f}x by tokens computed",
        ]
        return "\n".join(lines + [f"warning        {line}" for line in self.warnings])


@dataclass(frozen=True)
class _Pieces:
    """Where each piece of a document lies: `length` tokens of row `row` from token `start` on; all int64."""

    row: Ints
    start: Ints
    length: Ints

    def take(self, order: Ints) -> "_Pieces":
        return _Pieces(self.row[order], self.start[order], self.length[order])


def best_fit_decreasing(lengths: Ints, capacity: int) -> Ints:
    """The bin of each item when the longest go first, each into the bin with the least space that holds it.

    Works on the histogram of lengths (Krell et al. 2021, arXiv:2107.02027). Bins with the same space are
    alike, so the items of one length fill them in runs: a run of n bins takes k items each in one step. The
    result is the same as that of placing item by item.

    Args:
        lengths: int array of shape (items,), each from 1 to `capacity`.
        capacity: room of one bin.

    Returns:
        int64 array of shape (items,): bin numbers from 0, without gaps.
    """
    histogram = np.bincount(lengths, minlength=1)
    runs: dict[int, deque[tuple[int, int]]] = {}  # space -> runs of bins (first bin, number of bins)
    spaces: list[int] = []  # the keys of `runs` in rising order
    steps: list[tuple[int, int, int]] = []  # (first bin, number of bins, items in each)
    bins = 0

    def fill(first: int, count: int, space: int, each: int, length: int) -> None:
        steps.append((first, count, each))
        if rest := space - each * length:
            if rest not in runs:
                runs[rest] = deque()
                insort(spaces, rest)
            runs[rest].append((first, count))

    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            position = bisect_left(spaces, length)
            if position == len(spaces):
                space, each = capacity, min(capacity // length, left)
                first, count, bins = bins, left // each, bins + left // each
            else:
                space = spaces[position]
                first, available = runs[space].popleft()
                each = min(space // length, left)
                count = min(available, left // each)
                if count < available:
                    runs[space].appendleft((first + count, available - count))
                elif not runs[space]:
                    del runs[space], spaces[position]
            fill(first, count, space, each, length)
            left -= count * each

    starts, counts, sizes = np.array(steps, dtype=np.int64).reshape(-1, 3).T
    items = counts * sizes
    nth = np.arange(items.sum()) - np.repeat(np.cumsum(items) - items, items)
    result = np.empty(len(lengths), dtype=np.int64)
    result[_argsort(capacity - lengths)] = np.repeat(starts, items) + nth // np.repeat(sizes, items)
    return result


def _argsort(keys: Ints) -> Ints:
    """Stable argsort of whole numbers >= 0; numpy sorts 16-bit keys by radix, many times faster."""
    small = keys.astype(np.uint16) if keys.max(initial=0) < 1 << 16 else keys
    return np.argsort(small, kind="stable")


def _documents(lengths: Ints, seq_length: int, overflow: str) -> _Pieces:
    """The pieces of all rows that are not empty, none longer than `seq_length`."""
    rows = np.flatnonzero(lengths > 0 if overflow != "drop" else (lengths > 0) & (lengths <= seq_length))
    if overflow == "split":
        pieces = -(-lengths[rows] // seq_length)
        nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        rows, starts = np.repeat(rows, pieces), nth * seq_length
    else:
        starts = np.zeros(len(rows), dtype=np.int64)
    return _Pieces(rows, starts, np.minimum(lengths[rows] - starts, seq_length))


def _wrap(pieces: _Pieces, seq_length: int) -> tuple[_Pieces, Ints]:
    """Cut the stream of pieces every `seq_length` tokens; the second array holds the pieces of each pack."""
    ends = np.cumsum(pieces.length)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends, np.arange(seq_length, total, seq_length))
    begins = np.concatenate([[0], cuts[:-1]]) if len(cuts) else cuts
    source = np.searchsorted(ends, begins, side="right")
    inside = begins - (ends - pieces.length)[source]
    wrapped = _Pieces(pieces.row[source], pieces.start[source] + inside, cuts - begins)
    return wrapped, np.bincount(begins // seq_length)


def _plan(
    lengths: Ints, seq_length: int, strategy: str, overflow: str, seed: int | None
) -> tuple[_Pieces, Ints, _Pieces]:
    """The pieces in the order of the packs, how many each pack holds, and the documents before packing."""
    documents = _documents(lengths, seq_length, overflow)
    if strategy == "none":
        return documents, np.ones(len(documents.row), dtype=np.int64), documents
    if strategy == "wrapped":
        return *_wrap(documents, seq_length), documents
    rng = np.random.default_rng(seed)
    # Equal lengths are taken in random order: neighbours in the source would otherwise always share a pack.
    order = np.arange(len(documents.row)) if seed is None else rng.permutation(len(documents.row))
    bins = best_fit_decreasing(documents.length[order], seq_length)
    count = int(bins.max(initial=-1)) + 1
    if seed is not None and count:
        bins = rng.permutation(count)[bins]
    return documents.take(order[_argsort(bins)]), np.bincount(bins, minlength=count), documents


class _Column:
    """A list column as its chunks' value buffers, and each row's place in them; nothing is copied."""

    def __init__(self, column: pa.ChunkedArray, name: str) -> None:
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise FormatError(f"column '{name}' is {column.type}; packing needs a list of integers in each row")
        if not pa.types.is_integer(column.type.value_type):
            raise FormatError(f"column '{name}' is {column.type}; packing needs integers: tokenise the rows first")
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise FormatError(f"row {row}: '{name}' is null; remove the row or give it tokens")
        self.type = pa.list_(column.type.value_type)
        self.dtype = np.dtype(column.type.value_type.to_pandas_dtype())
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.values: list[NDArray[Any]] = [chunk.values.to_numpy() for chunk in chunks]
        offsets = [chunk.offsets.to_numpy().astype(np.int64) for chunk in chunks]
        none = [np.zeros(0, dtype=np.int64)]
        self.start: Ints = np.concatenate([each[:-1] for each in offsets] or none)
        self.length: Ints = np.concatenate([np.diff(each) for each in offsets] or none)
        self.chunk: Ints = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks] or none[0])
        self.views = [values.data.cast("B") for values in self.values]

    def gather(self, pieces: _Pieces) -> pa.Array:
        """The tokens of the pieces, one after another: `bytes.join` copies each piece with one memcpy."""
        begin = (self.start[pieces.row] + pieces.start) * self.dtype.itemsize
        end = begin + pieces.length * self.dtype.itemsize
        chunk, views = self.chunk[pieces.row].tolist(), self.views
        joined = b"".join([views[c][b:e] for c, b, e in zip(chunk, begin.tolist(), end.tolist(), strict=True)])
        count = int(pieces.length.sum())
        return pa.Array.from_buffers(self.type.value_type, count, [None, pa.py_buffer(joined)])

    def counts(self, pieces: _Pieces) -> Ints:
        """How many tokens of each piece are labels."""
        labels = self.gather(pieces).to_numpy() != IGNORED
        before = np.concatenate([[0], np.cumsum(labels)])
        ends = np.cumsum(pieces.length)
        return cast(Ints, before[ends] - before[ends - pieces.length])

    def at(self, row: Ints, token: Ints) -> Ints:
        """The value of one token of each row."""
        one = np.ones(len(row), dtype=np.int64)
        return cast(Ints, self.gather(_Pieces(row, token, one)).to_numpy().astype(np.int64))


class _Source:
    """The token columns of a table, and which of its rows make up the data set."""

    def __init__(self, table: pa.Table, rows: Ints | None = None) -> None:
        if "input_ids" not in table.column_names:
            raise FormatError(f"no column 'input_ids' among {table.column_names}; tokenise the rows before packing")
        masks = [name for name in ("assistant_masks", "completion_mask") if name in table.column_names]
        if masks and "labels" not in table.column_names:
            raise LabelError(f"column '{masks[0]}' but no 'labels'; make labels from the mask before packing")
        self.ids = _Column(table.column("input_ids"), "input_ids")
        # As in TRL: without labels every token is trained.
        self.labels = _Column(table.column("labels"), "labels") if "labels" in table.column_names else self.ids
        if len(wrong := np.flatnonzero(self.ids.length != self.labels.length)):
            row = int(wrong[0])
            raise LabelError(
                f"row {row}: {self.ids.length[row]} input_ids but {self.labels.length[row]} labels; "
                "each token needs one label"
            )
        self.rows = np.arange(len(self.ids.length)) if rows is None else rows
        self.lengths = self.ids.length[self.rows]
        self.schema = pa.schema(
            {"input_ids": self.ids.type, "labels": self.labels.type, "seq_lengths": pa.list_(pa.int32())}
        )

    @classmethod
    def of(cls, dataset: datasets.Dataset) -> "_Source":
        # A shuffled or filtered data set is a table and a list of its rows; `flatten_indices` would copy
        # it all.
        indices = dataset._indices
        return cls(dataset.data.table, None if indices is None else indices.column(0).to_numpy().astype(np.int64))

    def batches(self, pieces: _Pieces, per_pack: Ints, borders: bool) -> Iterator[pa.RecordBatch]:
        """Packs as record batches of about TOKENS_PER_BATCH tokens, as one document each without borders."""
        last = np.cumsum(per_pack)
        ends = np.concatenate([[0], np.cumsum(pieces.length)])[last]
        pack = 0
        while pack < len(per_pack):
            done = ends[pack - 1] if pack else 0
            until = max(pack + 1, int(np.searchsorted(ends, done + TOKENS_PER_BATCH, side="right")))
            window = slice(last[pack - 1] if pack else 0, last[until - 1])
            part = _Pieces(self.rows[pieces.row[window]], pieces.start[window], pieces.length[window])
            offsets = pa.array(np.concatenate([[0], ends[pack:until] - done]), pa.int32())
            if borders:
                inner = np.concatenate([[0], np.cumsum(per_pack[pack:until])])
                seq_lengths = part.length
            else:
                inner = np.arange(until - pack + 1)
                seq_lengths = np.diff(offsets.to_numpy())
            columns = [
                pa.ListArray.from_arrays(offsets, self.ids.gather(part)),
                pa.ListArray.from_arrays(offsets, self.labels.gather(part)),
                pa.ListArray.from_arrays(pa.array(inner, pa.int32()), pa.array(seq_lengths, pa.int32())),
            ]
            yield pa.record_batch(columns, schema=self.schema)
            pack = until

    def report(
        self,
        plan: tuple[_Pieces, Ints, _Pieces],
        seq_length: int,
        strategy: str,
        overflow: str,
        batch_size: int,
        end_token_ids: Collection[int] | None,
    ) -> PackingReport:
        pieces, per_pack, documents = plan
        long = np.flatnonzero(self.lengths > seq_length)
        lost = unlabelled = unfinished = 0
        if overflow != "split" and len(long):
            rows, lengths = self.rows[long], self.lengths[long]
            room = np.full(len(long), 0 if overflow == "drop" else seq_length)
            lost = int(self.labels.counts(_Pieces(rows, room, lengths - room)).sum())
            if overflow == "cut":
                kept = self.labels.counts(_Pieces(rows, np.zeros_like(room), room))
                unlabelled = int((kept == 0).sum())
                last = self.labels.at(rows, room - 1)
                inside = (last != IGNORED) & (self.labels.at(rows, room) != IGNORED)
                if end_token_ids is not None:
                    inside = (last != IGNORED) & ~np.isin(last, list(end_token_ids))
                unfinished = int(inside.sum())
        starts = np.zeros(len(pieces.row), dtype=bool)
        starts[(np.cumsum(per_pack) - per_pack) if strategy == "wrapped" else slice(None)] = True
        later = np.flatnonzero(starts & (pieces.start > 0))
        lost += int((self.labels.at(self.rows[pieces.row[later]], pieces.start[later]) != IGNORED).sum())
        tokens = int(pieces.length.sum())
        lengths = np.random.default_rng(0).permutation(documents.length)
        lengths = np.pad(lengths, (0, -len(lengths) % batch_size)).reshape(-1, batch_size)
        filled = (lengths > 0).sum(axis=1) * lengths.max(axis=1, initial=0)
        return PackingReport(
            strategy=strategy,
            overflow=overflow,
            seq_length=seq_length,
            rows=len(self.lengths),
            rows_empty=int((self.lengths == 0).sum()),
            rows_cut=len(long) if overflow == "cut" else 0,
            rows_split=len(np.unique(pieces.row[pieces.start > 0])),
            rows_dropped=len(long) if overflow == "drop" else 0,
            rows_unlabelled=unlabelled,
            rows_unfinished=unfinished,
            cut_tokens=int(self.lengths.sum()) - tokens,
            labels_lost=lost,
            documents=len(documents.row),
            packs=len(per_pack),
            tokens=tokens,
            batch_size=batch_size,
            padded_tokens=int(filled.sum()),
        )


def _check_settings(seq_length: int, strategy: str, overflow: str | None) -> str:
    if seq_length < 1:
        raise RecipeError(f"seq_length is {seq_length}; a pack needs room for at least one token")
    if strategy not in STRATEGIES:
        raise RecipeError(f"unknown packing strategy '{strategy}'; choose one of {', '.join(STRATEGIES)}")
    if overflow is None:
        return "split" if strategy in ("bfd_split", "wrapped") else "cut"
    if overflow not in OVERFLOWS:
        raise RecipeError(f"unknown overflow '{overflow}'; choose one of {', '.join(OVERFLOWS)}")
    if strategy == "bfd_split" and overflow != "split":
        raise RecipeError(f"strategy 'bfd_split' splits long rows, overflow '{overflow}' does not; use 'bfd'")
    return overflow


def pack(
    dataset: datasets.Dataset | datasets.IterableDataset,
    seq_length: int,
    strategy: Strategy = "bfd",
    *,
    overflow: Overflow | None = None,
    seed: int | None = 42,
    end_token_ids: Collection[int] | None = None,
    buffer_size: int = 10_000,
    keep_in_memory: bool | None = None,
    cache_file_name: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Put tokenised documents together in rows of at most `seq_length` tokens.

    The result goes to `SFTTrainer` with `packing=False, padding_free=True, max_length=None`: its collator
    turns `seq_lengths` into position ids that restart at each document, and every attention backend keeps
    documents apart by them. Other columns than those below do not survive packing.

    Args:
        dataset: rows with `input_ids` and `labels`, lists of whole numbers of the same length. Without
            `labels` every token is trained. A streaming data set is packed buffer by buffer.
        seq_length: room of one pack, in tokens.
        strategy: "bfd" is best-fit decreasing over the whole data set; "bfd_split" the same with long
            documents split; "wrapped" joins all documents and cuts every `seq_length` tokens, so that
            documents in one pack see each other and are cut in two; "none" keeps one document in each row.
        overflow: a document longer than `seq_length` is "cut", "split" into several, or dropped with "drop".
            The default is "split" for "bfd_split" and "wrapped", else "cut".
        seed: decides which documents of one length meet, and the order of the packs; None keeps the source's
            order.
        end_token_ids: tokens that end an answer; with them the report tells an answer cut short from one
            that ends right at the cut.
        buffer_size: rows that a streaming data set packs at a time.
        keep_in_memory: hold the packs in memory instead of an Arrow file; by default as the data set itself
            is.
        cache_file_name: the Arrow file to write; by default in the data set's cache, under its fingerprint.

    Returns:
        A data set with `input_ids` and `labels` (dtypes of the source) and `seq_lengths` (int32), the
        lengths of the documents in each pack. `pack_with_report` gives the counts too.

    Raises:
        RecipeError: settings that are unknown or contradict each other.
        FormatError: rows that are not tokenised.
        LabelError: a row whose labels do not fit its tokens.
    """
    if isinstance(dataset, datasets.IterableDataset):
        overflow_ = _check_settings(seq_length, strategy, overflow)
        return _pack_stream(dataset, seq_length, strategy, overflow_, seed, end_token_ids, buffer_size)
    return pack_with_report(
        dataset,
        seq_length,
        strategy,
        overflow=overflow,
        seed=seed,
        end_token_ids=end_token_ids,
        keep_in_memory=keep_in_memory,
        cache_file_name=cache_file_name,
    )[0]


def pack_with_report(
    dataset: datasets.Dataset,
    seq_length: int,
    strategy: Strategy = "bfd",
    *,
    overflow: Overflow | None = None,
    seed: int | None = 42,
    end_token_ids: Collection[int] | None = None,
    batch_size: int = 8,
    keep_in_memory: bool | None = None,
    cache_file_name: str | None = None,
) -> tuple[datasets.Dataset, PackingReport]:
    """`pack` for a data set that is not a stream, and what it did.

    Args:
        batch_size: rows per batch that the report's padding, steps and speed-up assume.

    The other arguments, the result and the errors are those of `pack`.
    """
    overflow_ = _check_settings(seq_length, strategy, overflow)
    source = _Source.of(dataset)
    plan = _plan(source.lengths, seq_length, strategy, overflow_, seed)
    report = source.report(plan, seq_length, strategy, overflow_, batch_size, end_token_ids)
    batches = source.batches(plan[0], plan[1], borders=strategy != "wrapped")
    settings = {"seq_length": seq_length, "strategy": strategy, "overflow": overflow_, "seed": seed}
    fingerprint = update_fingerprint(dataset._fingerprint, "ma_sft.pack", settings)
    in_memory = keep_in_memory if keep_in_memory is not None else not (dataset.cache_files or cache_file_name)
    if in_memory:
        # Without a fingerprint, `datasets` would hash every token in memory.
        return datasets.Dataset(_to_memory(batches, source.schema, report.tokens), fingerprint=fingerprint), report
    path = Path(cache_file_name or dataset._get_cache_file_path(fingerprint))
    if not (path.exists() and cache_file_name is None and datasets.is_caching_enabled()):
        with _atomic_file(path) as scratch, pa.OSFile(str(scratch), "wb") as sink:
            _write(batches, source.schema, sink)
    return datasets.Dataset.from_file(str(path)), report


def _write(batches: Iterable[pa.RecordBatch], schema: pa.Schema, sink: pa.NativeFile) -> None:
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _to_memory(batches: Iterable[pa.RecordBatch], schema: pa.Schema, tokens: int) -> pa.Table:
    """The batches as one table, with all tokens of a column in one block: a large block gets huge pages."""
    blocks = [np.empty(tokens, dtype=schema.field(name).type.value_type.to_pandas_dtype()) for name in COLUMNS]
    parts, done = [], 0
    for batch in batches:
        columns = batch.columns
        count = len(columns[0].values)
        for number, block in enumerate(blocks):
            block[done : done + count] = columns[number].values.to_numpy()
            values = pa.array(block[done : done + count])
            columns[number] = pa.ListArray.from_arrays(columns[number].offsets, values)
        parts.append(pa.record_batch(columns, schema=schema))
        done += count
    return pa.Table.from_batches(parts, schema=schema)


@contextmanager
def _atomic_file(target: Path) -> Iterator[Path]:
    """Yield a scratch file that becomes `target` when the block ends well: processes may race."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def _pack_stream(
    dataset: datasets.IterableDataset,
    seq_length: int,
    strategy: Strategy,
    overflow: str,
    seed: int | None,
    end_token_ids: Collection[int] | None,
    buffer_size: int,
) -> datasets.IterableDataset:
    def pack_buffer(table: pa.Table) -> pa.Table:
        source = _Source(table)
        plan = _plan(source.lengths, seq_length, strategy, overflow, seed)
        report = source.report(plan, seq_length, strategy, overflow, 1, end_token_ids)
        if report.rows_cut or report.rows_dropped:
            logger.warning(
                "packing %d rows: %d cut (%d without a label, %d unfinished), %d dropped, %d empty",
                report.rows,
                report.rows_cut,
                report.rows_unlabelled,
                report.rows_unfinished,
                report.rows_dropped,
                report.rows_empty,
            )
        batches = source.batches(plan[0], plan[1], borders=strategy != "wrapped")
        return pa.Table.from_batches(list(batches), schema=source.schema)

    names = dataset.column_names or list(next(iter(dataset)))
    packed = dataset.with_format("arrow").map(
        pack_buffer,
        batched=True,
        batch_size=buffer_size,
        remove_columns=[n for n in names if n not in COLUMNS],
    )
    return packed.with_format(None)


class ConstantLengthDataset(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """A stream of rows of exactly `seq_length` tokens: the class of TRL 0.x, with its constructor.

    Each item has `input_ids` and `labels`, int64 tensors of shape (seq_length,). Documents are joined and
    cut every `seq_length` tokens, so documents in one row see each other; `pack` keeps them apart.

    What differs from TRL 0.x:
        - Rows that carry `input_ids` (and `labels`) are used as they are; the concat token gets no label
          there, and is not added twice.
        - No token is lost: what a buffer leaves over goes to the next one, and the last row is filled up
          with tokens that carry no label.
        - Each data loader worker reads its own share of the rows. accelerate's loaders share rows between
          ranks by themselves; with a plain loader take `shard(world_size, rank)` on each rank.
        - The order depends on `seed` and `set_epoch` alone, and `state_dict` takes it up in the middle.
        - `len` is the number of rows of `seq_length` tokens (TRL gave the number of documents).

    Args:
        tokenizer: tokenizer of the texts; its end token joins documents.
        dataset: rows, as a data set or any iterable that can be iterated again.
        dataset_text_field: the text's column, when there is no `formatting_func` and rows are not tokenised.
        formatting_func: row -> text. Special tokens in the text are parsed, as the text is a rendered
            template.
        infinite: start again at the end instead of stopping.
        seq_length: tokens in each row.
        num_of_sequences: rows in the buffer.
        chars_per_token: characters per token, to fill the buffer with text of the right length.
        eos_token_id: joins documents if the tokenizer has no end token.
        shuffle: shuffle the rows of a buffer.
        append_concat_token: put the end token after each document.
        add_special_tokens: let the tokenizer add its special tokens to each text.
        seed: seed of `shuffle`.

    Raises:
        FormatError: a row that has neither tokens nor the text field, or an infinite stream without a token.
        LabelError: a row whose labels do not fit its tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        dataset: Any,
        dataset_text_field: str | None = None,
        formatting_func: Callable[[Any], str] | None = None,
        infinite: bool = False,
        seq_length: int = 1024,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        eos_token_id: int = 0,
        shuffle: bool = True,
        append_concat_token: bool = True,
        add_special_tokens: bool = True,
        seed: int = 42,
    ) -> None:
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.dataset_text_field = dataset_text_field
        self.formatting_func = formatting_func
        self.infinite = infinite
        self.seq_length = seq_length
        self.chars_per_token = chars_per_token
        self.max_buffer_size = seq_length * chars_per_token * num_of_sequences
        self.shuffle = shuffle
        self.append_concat_token = append_concat_token
        self.add_special_tokens = add_special_tokens
        self.seed = seed
        # `is None` and not falsy: 0 is a token id.
        self.concat_token_id = eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.epoch = 0
        self._shard = (0, 1)
        self._state: dict[str, Any] = {}
        self._resume: dict[str, Any] | None = None
        self._length: int | None = None

    def shard(self, num_shards: int, index: int) -> "ConstantLengthDataset":
        """The same stream over every `num_shards`-th row, from row `index` on; for one rank of several."""
        other = object.__new__(ConstantLengthDataset)
        other.__dict__.update(self.__dict__, _length=None, _state={}, _resume=None)
        other._shard = (self._shard[0] + index * self._shard[1], num_shards * self._shard[1])
        return other

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the latest iteration stands; plain numbers and lists."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on behind the item after which `state` was taken."""
        self._resume = dict(state) or None

    def __len__(self) -> int:
        if self.infinite or not hasattr(self.dataset, "__len__"):
            raise TypeError("an infinite or streaming ConstantLengthDataset has no length; set max_steps")
        if self._length is None:
            tokens, rows = 0, self._rows(0, self._shard)
            while True:
                ids, _, count = self._read_buffer(rows)
                if not count:
                    break
                tokens += len(ids)
            self._length = -(-tokens // self.seq_length)
        return self._length

    def _rows(self, start: int, shard: tuple[int, int]) -> Iterator[Any]:
        """Rows of one shard, from its `start`-th on."""
        index, count = shard
        first = index + start * count
        if isinstance(self.dataset, datasets.Dataset):
            chosen = range(first, len(self.dataset), count)
            return iter(self.dataset.select(chosen)) if chosen else iter(())
        return islice(iter(self.dataset), first, None, count)

    def _read_buffer(self, rows: Iterator[Any]) -> tuple[list[int], list[int], int]:
        """Tokens and labels of the next buffer of rows, and how many rows it took."""
        texts: list[str] = []
        documents: list[tuple[list[int], list[int]] | None] = []
        size = 0.0
        while size < self.max_buffer_size and (row := next(rows, None)) is not None:
            if self.formatting_func is None and "input_ids" in row:
                ids = list(row["input_ids"])
                labels = list(row.get("labels", ids))
                if len(ids) != len(labels):
                    raise LabelError(f"a row has {len(ids)} input_ids but {len(labels)} labels; each needs one label")
                if self.append_concat_token and ids and ids[-1] != self.concat_token_id:
                    labels.append(IGNORED if "labels" in row else self.concat_token_id)
                    ids.append(self.concat_token_id)
                documents.append((ids, labels))
                size += len(ids) * self.chars_per_token
                continue
            if self.formatting_func is None and self.dataset_text_field not in row:
                raise FormatError(
                    f"a row with the fields {list(row)} has no '{self.dataset_text_field}'; "
                    "set dataset_text_field or formatting_func"
                )
            text = self.formatting_func(row) if self.formatting_func else row[self.dataset_text_field]
            texts.append(text)
            documents.append(None)
            size += max(len(text), 1)
        tokens: Iterator[list[int]] = iter(())
        if texts:
            settings = {"add_special_tokens": self.add_special_tokens, "truncation": False}
            tokens = iter(self.tokenizer(texts, **settings)["input_ids"])
        all_ids: list[int] = []
        all_labels: list[int] = []
        for document in documents:
            if document is None:
                ids = next(tokens) + [self.concat_token_id] * self.append_concat_token
                document = ids, ids
            all_ids += document[0]
            all_labels += document[1]
        return all_ids, all_labels, len(documents)

    def _worker_shard(self) -> tuple[int, int]:
        worker = torch.utils.data.get_worker_info()
        # A streaming data set of `datasets` shares its files between the workers by itself.
        if worker is None or isinstance(self.dataset, datasets.IterableDataset):
            return self._shard
        return self._shard[0] + worker.id * self._shard[1], self._shard[1] * worker.num_workers

    def to_iterable_dataset(self) -> datasets.IterableDataset:
        """This stream as a data set of `datasets`, which TRL 1.x's `SFTTrainer` asks for.

        Give it to the trainer with `dataset_kwargs={"skip_prepare_dataset": True}`.
        """
        # `datasets` and accelerate share its items between workers and ranks, so it must yield all of them.
        return datasets.IterableDataset.from_generator(self._iterate, gen_kwargs={"shard": self._shard})

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self._iterate(self._worker_shard())

    def _iterate(self, shard: tuple[int, int]) -> Iterator[dict[str, torch.Tensor]]:
        fresh: dict[str, Any] = {
            "epoch": self.epoch,
            "row": 0,
            "ids": [],
            "labels": [],
            "yielded": 0,
            "shard": list(shard),
        }
        state, self._resume = self._resume or fresh, None
        if state["shard"] != list(shard):
            raise RecipeError(
                f"the saved state is of shard {state['shard']}, this is {list(shard)}; "
                "resume with as many workers and ranks"
            )
        rows = self._rows(state["row"], shard)
        while True:
            ids, labels, count = self._read_buffer(rows)
            if not count and self.infinite:
                if not state["row"]:
                    raise FormatError("an infinite ConstantLengthDataset over no rows; give it data")
                state = {**state, "epoch": state["epoch"] + 1, "row": 0, "yielded": 0}
                rows = self._rows(0, shard)
                continue
            ids, labels = state["ids"] + ids, state["labels"] + labels
            if not count and ids:
                fill = -len(ids) % self.seq_length
                ids, labels = ids + [self.concat_token_id] * fill, labels + [IGNORED] * fill
            full = len(ids) // self.seq_length
            order = np.arange(full)
            if self.shuffle:
                order = np.random.default_rng((self.seed, state["epoch"], shard[0], state["row"])).permutation(full)
            for number in order[state["yielded"] :].tolist():
                window = slice(number * self.seq_length, (number + 1) * self.seq_length)
                state = {**state, "yielded": state["yielded"] + 1}
                self._state = state
                yield {"input_ids": torch.tensor(ids[window]), "labels": torch.tensor(labels[window])}
            if not count:
                return
            rest = slice(full * self.seq_length, None)
            state = {
                **state,
                "row": state["row"] + count,
                "ids": ids[rest],
                "labels": labels[rest],
                "yielded": 0,
            }
