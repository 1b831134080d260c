"""Pieces of rows: what packs are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    def join(cls, parts: Sequence["Pieces"]) -> "Pieces":
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("row", "start", "length")))
