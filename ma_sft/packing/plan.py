"""Which piece of which row goes into which pack: arithmetic on lengths alone."""

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ma_sft.errors import RecipeError

Strategy = Literal["bfd", "bfd_split", "wrapped", "none"]


Overflow = Literal["cut", "split", "drop"]


Ints = NDArray[np.int64]


STRATEGIES = ("bfd", "bfd_split", "wrapped", "none")


OVERFLOWS = ("cut", "split", "drop")


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
