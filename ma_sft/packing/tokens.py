"""The token columns of a table, read where they lie: nothing is copied but the pieces that are asked for."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ma_sft.errors import FormatError, LabelError
from ma_sft.packing.pieces import Ints, Pieces

IGNORED = -100

TOKENS_AT_A_TIME = 1 << 18  # small enough for the processor's cache


class Column:
    """A list column as the buffers of its chunks, and each row's place in them.

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

    def gather(self, pieces: Pieces) -> NDArray[Any]:
        """The tokens of the pieces one after another: `bytes.join` copies each piece with one memcpy."""
        begin = (self.start[pieces.row] + pieces.start) * self.dtype.itemsize
        end = begin + pieces.length * self.dtype.itemsize
        places = zip(self.chunk[pieces.row].tolist(), begin.tolist(), end.tolist(), strict=True)
        return np.frombuffer(bytearray().join([self.buffers[c][b:e] for c, b, e in places]), self.dtype)

    def one(self, row: Ints, token: Ints) -> Ints:
        """One token of each row, int64."""
        return cast(Ints, self.gather(Pieces(row, token, np.ones_like(row))).astype(np.int64))


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

    def trained(self, pieces: Pieces) -> Ints:
        """How many tokens of each piece have a label."""
        counts = [np.zeros(0, dtype=np.int64)]
        for part in at_a_time(pieces):
            before = np.concatenate([[0], np.cumsum(self.labels.gather(part) != IGNORED)])
            ends = np.cumsum(part.length)
            counts.append(before[ends] - before[ends - part.length])
        return np.concatenate(counts)

    def last_answers(self, rows: Ints, seq_length: int) -> tuple[Ints, Ints]:
        """Start and length of the part of each row that ends with its last label; see `overflow.Answers`."""
        found = [
            _last_answer(self.labels.gather(Pieces(row, np.zeros_like(row), self.lengths[row])), seq_length)
            for row in rows.reshape(-1, 1)
        ]
        starts, lengths = np.array(found, dtype=np.int64).reshape(-1, 2).T
        return starts, lengths


def _last_answer(labels: NDArray[Any], seq_length: int) -> tuple[int, int]:
    edges = np.flatnonzero(np.diff(labels != IGNORED, prepend=False, append=False))
    begins, ends = edges[::2], edges[1::2]
    first = max(int(ends[-1]), seq_length) - seq_length if len(ends) else 0
    if len(ends) and begins[-1] <= first > 0:
        return 0, 0
    # The end of an earlier answer is the start of a turn; without one, the turn before the answer is cut.
    start = int(min(ends[:-1][ends[:-1] >= first], default=first)) if first else 0
    return start, min(first + seq_length - start, len(labels) - start)


def at_a_time(pieces: Pieces) -> Iterator[Pieces]:
    """The pieces in runs of about `TOKENS_AT_A_TIME` tokens."""
    ends = np.cumsum(pieces.length)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.unique([0, *np.searchsorted(ends, np.arange(TOKENS_AT_A_TIME, total, TOKENS_AT_A_TIME)), len(ends)])
    for begin, end in pairwise(cuts.tolist()):
        yield pieces.take(slice(begin, end))
