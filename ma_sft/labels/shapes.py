"""The shapes of conversations, and a sample of rows in which every shape stands."""

import hashlib
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ma_sft.data.load import table_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

EACH_SHAPE = 20  # conversations of every shape that are judged


def shapes_of(conversations: Dataset, control_texts: Sequence[str]) -> "NDArray[np.uint64]":
    """A number of each conversation's shape, uint64 of shape (n_rows,).

    Shape is which roles follow each other, what each message has (calls and how many, reasoning, no text, text that
    spells a control token), tools, template variables and the source. Of long conversations only the first eight
    messages count by their place.
    """
    special = "|".join(sorted(map(re.escape, control_texts), key=len, reverse=True)) or r"\z"
    shapes = [np.zeros(0, dtype=np.uint64)]
    names = [n for n in ("messages", "tools", "chat_template_kwargs", "source") if n in conversations.column_names]
    table, rows = conversations.data, table_rows(conversations)  # shuffled rows would be joined one by one
    for start in range(0, len(table), 10_000):
        batch = table.slice(start, 10_000).select(names)
        messages = batch["messages"].combine_chunks()
        sizes = np.asarray(messages.value_lengths())
        owner, starts = np.repeat(np.arange(len(sizes)), sizes), np.cumsum(sizes) - sizes
        place = np.arange(len(owner)) - starts[owner]
        codes = _codes(messages.flatten(), special)
        before = np.where(place > 0, np.roll(codes, 1), np.uint64(0))
        pairs = np.stack([owner.astype(np.uint64), np.minimum(place, 8).astype(np.uint64), before, codes])
        late = np.unique(pairs[:, place >= 8], axis=1)  # in a long conversation each pair counts once
        pairs = np.concatenate([pairs[:, place < 8], late], axis=1)
        shape = np.zeros(len(sizes), dtype=np.uint64)
        np.add.at(shape, pairs[0].astype(np.int64), _mix(_mix(pairs[1] + _mix(pairs[2])) + pairs[3]))
        for name in names[1:]:
            shape = _mix(shape) + _field_codes(batch[name].combine_chunks(), special, name != "tools")
        shapes.append(shape)
    found = np.concatenate(shapes)
    return found if rows is None else found[rows]


def _codes(array: Any, special: str) -> "NDArray[np.uint64]":
    """A number of what each message has."""
    codes = np.zeros(len(array), dtype=np.uint64)
    for number in range(array.type.num_fields):
        name = array.type.field(number).name
        codes = _mix(codes) + _field_codes(array.field(number), special, name in ("role", "train"))
    return codes


def _field_codes(array: Any, special: str, by_value: bool) -> "NDArray[np.uint64]":
    """0 where there is nothing; else what is there: its value, its length as a list, or whether it spells a token."""
    if by_value:
        values = pc.dictionary_encode(pc.fill_null(array.cast("string"), ""))
        digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in values.dictionary.to_pylist()]
        numbers = np.array([int.from_bytes(d) for d in digests], dtype=np.uint64)
        return np.take(numbers, np.asarray(values.indices))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return np.asarray(pc.fill_null(pc.list_value_length(array), 0)).astype(np.uint64)
    if not pa.types.is_string(array.type) and not pa.types.is_large_string(array.type):
        return np.asarray(array.is_valid()).astype(np.uint64)
    text = pc.fill_null(array, "")
    filled = np.asarray(pc.utf8_length(pc.utf8_trim_whitespace(text))) > 0
    return filled.astype(np.uint64) + np.asarray(pc.match_substring_regex(text, special)).astype(np.uint64)


def spread(shapes: "NDArray[np.uint64]", size: int) -> "NDArray[np.int64]":
    """Rows to judge: `size` of them evenly spread, and as many more of every shape that it has `EACH_SHAPE` or all."""
    if size >= len(shapes):
        return np.arange(len(shapes))
    even = np.linspace(0, len(shapes) - 1, size, dtype=np.int64)
    kinds, kind = np.unique(shapes, return_inverse=True)
    missing = EACH_SHAPE - np.bincount(kind[even], minlength=len(kinds))
    others = np.setdiff1d(np.arange(len(shapes)), even)
    others = others[np.argsort(kind[others], kind="stable")]
    bounds = np.searchsorted(kind[others], np.arange(len(kinds) + 1)).tolist()
    more = [
        others[np.linspace(begin, end - 1, min(end - begin, count), dtype=np.int64)]
        for (begin, end), count in zip(pairwise(bounds), missing.tolist(), strict=True)
        if count > 0
    ]
    return np.unique(np.concatenate([even, *more]))


def _mix(codes: "NDArray[np.uint64]") -> "NDArray[np.uint64]":
    """Spread bits (splitmix64), so that sums of codes differ where the codes do."""
    codes = (codes + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    return (codes ^ (codes >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
