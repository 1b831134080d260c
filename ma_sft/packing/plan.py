"""Which piece of which row goes into which pack: arithmetic on lengths alone.

A strategy is one function in `STRATEGIES`, what happens to a row that is too long is one in `OVERFLOWS`.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_sft.errors import RecipeError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Where each piece lies: `length` tokens of row `row` from token `start` on; int64 arrays of shape (pieces,)."""

    row: Ints
    start: Ints
    length: Ints

    def take(self, which: NDArray[Any] | slice) -> "Pieces":
        return Pieces(self.row[which], self.start[which], self.length[which])

    @classmethod
    def join(cls, parts: "Sequence[Pieces]") -> "Pieces":
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("row", "start", "length")))


@dataclass(frozen=True)
class Plan:
    """What each pack holds.

    Attributes:
        documents: what is kept of the rows, before packing.
        pieces: the same in the order of the packs; where documents run on over the end of a pack, in more pieces.
        bounds: int64 array of shape (packs + 1,): pack n holds the pieces from `bounds[n]` up to `bounds[n + 1]`.
        apart: whether the pieces of a pack stay documents of their own, or become one.
    """

    documents: Pieces
    pieces: Pieces
    bounds: Ints
    apart: bool


# From the lengths of all rows and the room of a pack, what is kept of each row. `answers` gives, for rows too long,
# the start and the length of the part that holds the last answer; length 0 where there is none.
Answers = Callable[[Ints], tuple[Ints, Ints]]
Overflow = Callable[[Ints, int, Answers], Pieces]


def _cut(lengths: Ints, seq_length: int, answers: Answers) -> Pieces:
    """The beginning of each row."""
    rows = np.arange(len(lengths))
    return Pieces(rows, np.zeros_like(rows), np.minimum(lengths, seq_length))


def _keep_end(lengths: Ints, seq_length: int, answers: Answers) -> Pieces:
    """The end of each row."""
    kept = np.minimum(lengths, seq_length)
    return Pieces(np.arange(len(lengths)), lengths - kept, kept)


def _keep_answer(lengths: Ints, seq_length: int, answers: Answers) -> Pieces:
    """The last answer with as many of the turns before it as there is room for; rows without room for it go."""
    kept = _cut(lengths, seq_length, answers)
    long = np.flatnonzero(lengths > seq_length)
    kept.start[long], kept.length[long] = answers(long)
    return kept


def _split(lengths: Ints, seq_length: int, answers: Answers) -> Pieces:
    """All of each row, a long one as several documents."""
    count = -(-lengths // seq_length)
    rows = np.repeat(np.arange(len(lengths)), count)
    start = (np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)) * seq_length
    return Pieces(rows, start, np.minimum(lengths[rows] - start, seq_length))


def _drop(lengths: Ints, seq_length: int, answers: Answers) -> Pieces:
    """The rows that are not too long."""
    rows = np.flatnonzero(lengths <= seq_length)
    return Pieces(rows, np.zeros_like(rows), lengths[rows])


OVERFLOWS: dict[str, Overflow] = {
    "cut": _cut,
    "split": _split,
    "drop": _drop,
    "keep_answer": _keep_answer,
    "keep_end": _keep_end,
}


def documents(lengths: Ints, seq_length: int, overflow: str, answers: Answers) -> Pieces:
    """What is kept of rows of these lengths: no piece is empty, none longer than `seq_length`."""
    kept = OVERFLOWS[overflow](lengths, seq_length, answers)
    return kept.take(np.flatnonzero(kept.length))


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
    """Stable argsort of whole numbers from 0 to 2**32; numpy sorts 16 bits at a time by radix, many times faster."""
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    if keys.max(initial=0) > 0xFFFF:
        order = order[np.argsort((keys[order] >> 16).astype(np.uint16), kind="stable")]
    return order


# From the documents, the room of a pack and a seed: the pieces in the order of the packs, and how many each pack holds.
Arrange = Callable[[Pieces, int, int | None], tuple[Pieces, Ints]]


@dataclass(frozen=True)
class Strategy:
    """A way to put documents together, what it does with rows too long unless told, whether documents stay apart."""

    arrange: Arrange
    overflow: str = "cut"
    apart: bool = True


def _best_fit(documents: Pieces, seq_length: int, seed: int | None) -> tuple[Pieces, Ints]:
    rng, count = np.random.default_rng(seed), len(documents.row)
    # Equal lengths are taken in random order: neighbours in the source would otherwise always share a pack.
    order = np.arange(count) if seed is None else rng.permutation(count)
    bins = best_fit_decreasing(documents.length[order], seq_length)
    packs = int(bins.max(initial=-1)) + 1
    if seed is not None:
        bins = rng.permutation(packs)[bins]
    return documents.take(order[_argsort(bins)]), np.bincount(bins, minlength=packs)


def _wrap(documents: Pieces, seq_length: int, seed: int | None) -> tuple[Pieces, Ints]:
    """Cut the stream of documents every `seq_length` tokens."""
    ends = np.cumsum(documents.length)
    cuts = np.union1d(ends, np.arange(seq_length, documents.length.sum(), seq_length))
    begins = np.concatenate([[0], cuts])[: len(cuts)]
    source = np.searchsorted(ends, begins, side="right")
    inside = begins - (ends - documents.length)[source]
    pieces = Pieces(documents.row[source], documents.start[source] + inside, cuts - begins)
    return pieces, np.bincount(begins // seq_length)


def _one_each(documents: Pieces, seq_length: int, seed: int | None) -> tuple[Pieces, Ints]:
    return documents, np.ones(len(documents.row), dtype=np.int64)


STRATEGIES = {
    "bfd": Strategy(_best_fit),
    "bfd_split": Strategy(_best_fit, overflow="split"),
    "wrapped": Strategy(_wrap, overflow="split", apart=False),
    "none": Strategy(_one_each),
}


def arrange(kept: Pieces, seq_length: int, strategy: str, seed: int | None, groups: NDArray[Any] | None = None) -> Plan:
    """The plan that a strategy makes of `documents`; rows of different groups share no pack."""
    chosen = STRATEGIES[strategy]
    parts = [kept] if groups is None else [kept.take(groups[kept.row] == group) for group in np.unique(groups)]
    arranged = [chosen.arrange(part, seq_length, seed) for part in parts]
    per_pack = np.concatenate([[0], *(each for _, each in arranged)])
    return Plan(kept, Pieces.join([pieces for pieces, _ in arranged]), np.cumsum(per_pack), chosen.apart)


def check_settings(seq_length: int, strategy: str, overflow: str | None) -> str:
    """What happens to rows that are too long.

    Raises:
        RecipeError: a setting that is unknown, or contradicts another.
    """
    if seq_length < 1:
        raise RecipeError(f"seq_length is {seq_length}; a pack needs room for at least one token")
    if strategy not in STRATEGIES:
        raise RecipeError(f"unknown packing strategy '{strategy}'; choose one of {', '.join(STRATEGIES)}")
    if overflow is None:
        return STRATEGIES[strategy].overflow
    if overflow not in OVERFLOWS:
        raise RecipeError(f"unknown overflow '{overflow}'; choose one of {', '.join(OVERFLOWS)}")
    if strategy == "bfd_split" and overflow != "split":
        raise RecipeError(f"strategy 'bfd_split' splits long rows, overflow '{overflow}' does not; use 'bfd'")
    return overflow
