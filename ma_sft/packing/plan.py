"""Which piece of which row goes into which pack: arithmetic on lengths alone. A strategy is one in `STRATEGIES`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_sft.config import ADDED_CHOICES
from ma_sft.errors import RecipeError
from ma_sft.packing.best_fit import argsort, best_fit_decreasing
from ma_sft.packing.overflow import OVERFLOWS, Answers
from ma_sft.packing.pieces import Ints, Pieces


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


def documents(lengths: Ints, seq_length: int, overflow: str, answers: Answers) -> Pieces:
    """What is kept of rows of these lengths: no piece is empty, none longer than `seq_length`."""
    kept = OVERFLOWS[overflow](lengths, seq_length, answers)
    return kept if kept.length.all() else kept.take(np.flatnonzero(kept.length))


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
    return documents.take(order[argsort(bins)]), np.bincount(bins, minlength=packs)


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


def add_strategy(name: str, strategy: Strategy) -> None:
    """Make a strategy of one's own a `packing_strategy` of recipes, too."""
    STRATEGIES[name] = strategy
    ADDED_CHOICES.setdefault("packing_strategy", []).append(name)


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
