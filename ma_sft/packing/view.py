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
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import update_fingerprint
from numpy.typing import NDArray

from ma_sft.errors import FormatError, LabelError
from ma_sft.packing.plan import Ints, Overflow, Strategy, _check_settings, _Pieces, _plan
from ma_sft.packing.report import PackingReport

logger = logging.getLogger(__name__)


IGNORED = -100


COLUMNS = ("input_ids", "labels")


# Small enough for the processor's cache, so that a token crosses main memory once on its way to the file.
TOKENS_PER_BATCH = 1 << 18


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
