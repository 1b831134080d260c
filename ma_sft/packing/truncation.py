"""What is left of rows that are longer than `max_length`: a policy is one function in `POLICIES`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
# The number of a row -> where each of its runs of labels begins and ends (the token after the last)
Runs = Callable[[int], list[tuple[int, int]]]


class Spans(NamedTuple):
    """Stretches of rows: `length` tokens of row `row` from token `start` on; int64 arrays of shape (spans,)."""

    row: Ints
    start: Ints
    length: Ints

    def take(self, which: NDArray[Any] | slice) -> "Spans":
        return Spans(*(column[which] for column in self))


def whole_rows(rows: Ints, lengths: Ints) -> Spans:
    """All of these rows."""
    return Spans(rows, np.zeros_like(rows), lengths[rows])


def truncate(lengths: Ints, runs: Runs, max_length: int, policy: str) -> Spans:
    """What truncation leaves of each row, by one of `POLICIES`.

    `lengths` are the tokens of each row, `runs` says where a row's runs of labels begin and end ("keep_answer" asks it
    of rows that are too long). The spans are in the order of the rows, none is empty or longer than `max_length`; a row
    may have none, or several.
    """
    kept = POLICIES[policy](lengths, runs, max_length)
    return kept if kept.length.all() else kept.take(np.flatnonzero(kept.length))


def _cut(lengths: Ints, runs: Runs, max_length: int) -> Spans:
    """The beginning of each row."""
    return whole_rows(np.arange(len(lengths)), np.minimum(lengths, max_length))


def _keep_end(lengths: Ints, runs: Runs, max_length: int) -> Spans:
    """The end of each row."""
    kept = np.minimum(lengths, max_length)
    return Spans(np.arange(len(lengths)), lengths - kept, kept)


def _keep_answer(lengths: Ints, runs: Runs, max_length: int) -> Spans:
    """The last answer with as many of the turns before it as there is room for; rows without room for it go."""
    kept = _cut(lengths, runs, max_length)
    for row in np.flatnonzero(lengths > max_length).tolist():
        *earlier, (begin, end) = runs(row) or [(1, 0)]
        first = max(end - max_length, 0)
        if begin <= first > 0:
            kept.length[row] = 0
            continue
        # The end of an earlier answer is the start of a turn; without one, the turn before the answer is cut.
        start = min((end for _, end in earlier if end >= first), default=first) if first else 0
        kept.start[row], kept.length[row] = start, min(first + max_length, lengths[row]) - start
    return kept


def _split(lengths: Ints, runs: Runs, max_length: int) -> Spans:
    """All of each row, a long one as several documents."""
    count = -(-lengths // max_length)
    rows = np.repeat(np.arange(len(lengths)), count)
    start = (np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)) * max_length
    return Spans(rows, start, np.minimum(lengths[rows] - start, max_length))


def _drop(lengths: Ints, runs: Runs, max_length: int) -> Spans:
    """The rows that are not too long."""
    return whole_rows(np.flatnonzero(lengths <= max_length), lengths)


POLICIES: dict[str, Callable[[Ints, Runs, int], Spans]] = {
    "cut": _cut,
    "split": _split,
    "drop": _drop,
    "keep_answer": _keep_answer,
    "keep_end": _keep_end,
}
