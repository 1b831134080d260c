"""What is kept of rows that are longer than a pack: a choice is one function in `OVERFLOWS`."""

from collections.abc import Callable

import numpy as np

from ma_sft.packing.pieces import Ints, Pieces

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
