"""Best-fit decreasing on the histogram of lengths: a million documents in a fraction of a second."""

from bisect import bisect_left, insort
from collections import deque

import numpy as np

from ma_sft.packing.truncation import Ints


def best_fit_decreasing(lengths: Ints, capacity: int) -> Ints:
    """The bin of each item when the longest go first, each into the bin with the least space that holds it.

    Works on the histogram of lengths (Krell et al. 2021, arXiv:2107.02027), with the same result as item by item: bins
    with the same space are alike, so a run of n bins takes k items of one length each in one step. `lengths` is int64
    of shape (items,), each from 1 to `capacity`; so is the result, bin numbers from 0 without gaps.
    """
    histogram = np.bincount(lengths, minlength=1)
    runs: dict[int, deque[tuple[int, int]]] = {}  # space -> runs of bins (first bin, number of bins)
    spaces: list[int] = []  # the keys of `runs` in rising order
    steps: list[tuple[int, int, int]] = []  # (first bin, number of bins, items in each)
    bins = 0

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
            steps.append((first, count, each))
            left -= count * each
            if rest := space - each * length:
                if rest not in runs:
                    runs[rest] = deque()
                    insort(spaces, rest)
                runs[rest].append((first, count))

    starts, counts, sizes = np.array(steps, dtype=np.int64).reshape(-1, 3).T
    items = counts * sizes
    nth = np.arange(items.sum()) - np.repeat(np.cumsum(items) - items, items)
    result = np.empty(len(lengths), dtype=np.int64)
    result[np.argsort(-lengths, kind="stable")] = np.repeat(starts, items) + nth // np.repeat(sizes, items)
    return result
