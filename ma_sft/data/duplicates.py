"""Rows that are alike: equal ones, near duplicates, and the split that keeps relatives on one side.

All rows are looked at: some 150 bytes for each are in memory, never its text; MinHash signatures lie in an Arrow file.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
import xxhash
from datasets import Dataset, Features, List, Value

from ma_sft.data.turns import Message
from ma_sft.errors import RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_PERM = 128  # of a MinHash signature: its estimate of a Jaccard similarity has a standard error below 0.045
WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]|[\p{L}\p{N}]+")


def conversations(batch: dict[str, Any]) -> Iterator[list[Message]]:
    """The messages of each row in a batch; of a preference, prompt and chosen answer."""
    if "messages" in batch:
        yield from batch["messages"]
    else:
        yield from (p + c for p, c in zip(batch["prompt"], batch["chosen"], strict=True))


def near_duplicates(rows: Dataset, threshold: float, num_proc: int | None = None) -> "NDArray[Any]":
    """Pairs (int64, n x 2) of rows with an estimated Jaccard similarity of at least `threshold`.

    MinHash with locality-sensitive hashing (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, chapter 3).
    Signatures and the split into bands are datasketch's. Its index is a dict of some kilobytes for each row, so rows
    that share a band are found by sorting the hashes of one band at a time instead.
    """
    try:
        from datasketch import MinHashLSH
    except ImportError:
        raise RecipeError("near duplicates need another package: pip install 'ma-sft[data]'") from None
    index = MinHashLSH(threshold=threshold, num_perm=NUM_PERM)
    names = [f"band{i}" for i in range(index.b)]
    types = {"signature": List(Value("uint32"), length=NUM_PERM), **dict.fromkeys(names, "uint64")}
    found = new_columns(rows, partial(_signatures, bands=index.b, rows=index.r), types, num_proc).with_format("numpy")
    pairs: list[NDArray[Any]] = []
    for name in names:
        hashes = found.data.column(name).to_numpy()
        order = np.argsort(hashes, kind="stable")
        start = np.concatenate([[True], hashes[order][1:] != hashes[order][:-1]])
        leader = order[np.maximum.accumulate(np.where(start, np.arange(len(order)), 0))]
        band = np.stack([leader, order], axis=1)[leader != order]
        for at in range(0, len(band), 10_000):
            left, right = (found[side]["signature"] for side in band[at : at + 10_000].T)
            pairs.append(band[at : at + 10_000][(left == right).mean(axis=1) >= threshold])
    return np.unique(np.concatenate(pairs), axis=0) if pairs else np.zeros((0, 2), dtype=np.int64)


def _signatures(batch: dict[str, list[Any]], bands: int, rows: int) -> dict[str, Any]:
    from datasketch import MinHash

    shingles = []
    for messages in conversations(batch):
        words = [w for m in messages if m["role"] != "system" for w in WORD.findall(m["content"].lower())]
        shingles.append({" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))})
    hashes = MinHash.generator(shingles, num_perm=NUM_PERM, hashfunc=xxhash.xxh32_intdigest)
    signatures = np.stack([h.hashvalues for h in hashes])
    columns: dict[str, Any] = {"signature": signatures}
    for i in range(bands):
        band = np.ascontiguousarray(signatures[:, i * rows : (i + 1) * rows])
        columns[f"band{i}"] = np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in band], dtype=np.uint64)
    return columns


def split_held_out(
    rows: Dataset, test_size: float, *, seed: int, near: float | None = None, num_proc: int | None = None
) -> tuple["NDArray[Any]", "NDArray[Any]"]:
    """Positions of the training rows and of the held-out rows, none of which has a relative on the other side.

    Relatives are rows with the same first question (letters and digits alone, case aside), so duplicates and pieces of
    one conversation; with the same value in the column `group`; and, if `near` is given, near duplicates that similar.

    Args:
        test_size: share of the rows if below 1, else their number. Relatives go together, so it may come out smaller.

    Raises:
        RecipeError: a size that leaves nothing to hold out or to train on.
    """
    target = int(len(rows) * test_size) if test_size < 1 else int(test_size)
    links = []
    groups_by = [_question, *([lambda row: row["group"] or ""] if "group" in rows.column_names else [])]
    for key in groups_by:
        keys = hashes(rows, key, num_proc)
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        own = np.arange(len(rows))
        links.append(np.stack([np.where(keys == 0, own, first[inverse]), own], axis=1))
    if near is not None:
        links.append(near_duplicates(rows, near, num_proc))
    _, groups, sizes = np.unique(chains(len(rows), np.concatenate(links)), return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    chosen, room = np.zeros(len(sizes), dtype=bool), target
    for group in order:
        if sizes[group] <= room:
            chosen[group], room = True, room - sizes[group]
        if room == 0:
            break
    held_out = chosen[groups]
    if not held_out.any() or held_out.all():
        raise RecipeError(
            f"test_size={test_size} leaves nothing to {'train on' if held_out.any() else 'hold out'}: "
            f"the {len(rows):,} rows are {len(sizes):,} groups that stay together, the smallest of {sizes.min():,}"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def exact_key(row: dict[str, Any]) -> str:
    own = ("source", "origin", "raw", "group", "_part")
    return json.dumps({k: v for k, v in row.items() if k not in own}, sort_keys=True)


def _question(row: dict[str, Any]) -> str:
    messages = row.get("messages") or row["prompt"]
    return " ".join(WORD.findall(next((m["content"] for m in messages if m["role"] == "user"), "").lower()))


def hashes(rows: Dataset, key: Callable[[dict[str, Any]], str], num_proc: int | None) -> "NDArray[Any]":
    """A hash (uint64) of each row's key, 0 for an empty key."""

    def hash_batch(batch: dict[str, list[Any]]) -> dict[str, Any]:
        keys = (key(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True))
        return {"hash": np.array([hash_of(text) if text else 0 for text in keys], dtype=np.uint64)}

    found: NDArray[Any] = new_columns(rows, hash_batch, {"hash": "uint64"}, num_proc).data.column("hash").to_numpy()
    return found


def new_columns(rows: Dataset, function: Any, types: dict[str, Any], num_proc: int | None) -> Dataset:
    """New columns alone, computed in batches by all processes."""
    features = Features({name: Value(t) if isinstance(t, str) else t for name, t in types.items()})
    names = rows.column_names
    return rows.map(
        function, batched=True, remove_columns=names, features=features, num_proc=num_proc, desc="filtering"
    )


def chains(count: int, pairs: "NDArray[Any]") -> "NDArray[Any]":
    """Of each row, the first of the rows that a chain of pairs links it with."""
    groups = np.arange(count)
    while True:
        before = groups.copy()
        lower = np.minimum(groups[pairs[:, 0]], groups[pairs[:, 1]])
        for side in pairs.T:
            np.minimum.at(groups, side, lower)
        groups = groups[groups]
        if (groups == before).all():
            return groups


def hash_of(text: str) -> Any:
    return np.uint64(xxhash.xxh3_64_intdigest(text.encode()))
