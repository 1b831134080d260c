"""Which conversations stay: filters that count what they remove and keep examples; equal rows, near duplicates, and the
split that keeps relatives on one side.

Row filters look at one conversation while it is converted. What compares rows looks at all: some 150 bytes of each are
in memory, never its text; MinHash signatures lie in an Arrow file.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
import xxhash
from datasets import Dataset, Features, List, Value
from huggingface_hub.dataclasses import strict

from ma_sft.data.functions import code_of, load_function
from ma_sft.data.load import checked, table_rows
from ma_sft.data.messages import Message, Row
from ma_sft.data.stages import EXAMPLES, Report
from ma_sft.errors import RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_PERM = 128  # of a MinHash signature: its estimate of a Jaccard similarity has a standard error below 0.045
WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]|[\p{L}\p{N}]+")


@strict
@dataclass
class Filters:
    """What a conversation must be to stay; None and False leave a filter out."""

    min_chars: int | None = None  # characters in all messages together
    max_chars: int | None = None
    min_tokens: int | None = None  # tokens of all messages' text together, without the chat template's
    max_tokens: int | None = None
    tokenizer: str | None = None  # whose tokens: a hub id or folder, or "demo"; in a recipe the model's by default
    min_response_chars: int | None = None  # characters of the shortest answer
    function: Any = None  # `messages -> bool`, itself or as `file.py:function`; False drops the row
    exact_duplicates: bool = False  # keep the first of equal rows
    near_duplicates: float | int | None = None  # keep the first of rows with that similarity of 3-word phrases

    @classmethod
    def of(cls, value: Any, tokenizer: str | None = None) -> "Filters":
        """Filters from a mapping of the fields above, or its JSON text."""
        if isinstance(value, cls):
            return value
        try:
            value = json.loads(value) if isinstance(value, str) else dict(value or {})
        except (TypeError, ValueError):
            raise RecipeError(f"filters: a mapping expected, found {value!r}") from None
        return checked(cls, {"tokenizer": tokenizer, **value}, "filters")

    def __post_init__(self) -> None:
        if (self.min_tokens or self.max_tokens) and not self.tokenizer:
            raise RecipeError("filters min_tokens and max_tokens need to know whose tokens: set tokenizer")

    def code(self) -> str:
        """What caches go by, beside the settings: the code of the function, and the tokenizer's files that count."""
        counts = self.min_tokens or self.max_tokens
        files = sorted(Path(str(self.tokenizer)).glob("*.json")) if counts else []
        return "\0".join((code_of(self.function), *(f"{file} {file.stat().st_mtime_ns}" for file in files)))

    def mark(self, records: list[Row]) -> None:
        """Write into converted rows that have no `removed_by` which row filter removes them, and in `error` why."""
        wanted = {name: value for name in ROW_FILTERS if (value := getattr(self, name)) not in (None, False)}
        records = [record for record in records if not record["removed_by"]] if wanted else []
        tokens = [0] * len(records)
        if records and (self.min_tokens or self.max_tokens):
            texts = [[m["content"] for m in conversation_of(record)] for record in records]
            tokenizer = load_tokenizer(str(self.tokenizer))
            lengths = map(len, tokenizer([t for each in texts for t in each], add_special_tokens=False)["input_ids"])
            tokens = [sum(next(lengths) for _ in each) for each in texts]
        for record, count in zip(records, tokens, strict=True):
            row = SeenRow(conversation_of(record), count)
            for name, setting in wanted.items():
                if why := ROW_FILTERS[name](setting, row):
                    record |= {"removed_by": name, "error": _tell(record, why)}
                    break


class SeenRow:
    """What row filters look at: messages, their characters and tokens, and the characters of the shortest answer."""

    def __init__(self, messages: list[Message], tokens: int) -> None:
        self.messages, self.tokens = messages, tokens
        self.chars = sum(len(m["content"]) for m in messages)
        answers = [m["content"] for m in messages if m["role"] == "assistant" and not m.get("tool_calls")]
        self.answer = min(map(len, answers), default=sys.maxsize)


# A row filter is a function of its setting and a row, under the setting's name; it gives the finding, or None.
ROW_FILTERS: dict[str, Callable[[Any, SeenRow], str | None]] = {
    "min_chars": lambda limit, row: f"{row.chars} characters" if row.chars < limit else None,
    "max_chars": lambda limit, row: f"{row.chars} characters" if row.chars > limit else None,
    "min_tokens": lambda limit, row: f"{row.tokens} tokens" if row.tokens < limit else None,
    "max_tokens": lambda limit, row: f"{row.tokens} tokens" if row.tokens > limit else None,
    "min_response_chars": lambda limit, row: f"an answer of {row.answer} characters" if row.answer < limit else None,
    "function": lambda name, row: None if load_function(name)(row.messages) else str(name),
}


@cache
def load_tokenizer(name: str) -> Any:
    """The tokenizer that filters count with; kept in each process."""
    from transformers import AutoTokenizer

    from ma_sft.demo import demo_model
    from ma_sft.hub import load_pretrained

    return load_pretrained(AutoTokenizer, str(demo_model() if name == "demo" else name))


def conversation_of(row: Row) -> list[Message]:
    """The messages of a converted row; of a preference, prompt and chosen answer."""
    messages: list[Message] = row["messages"] if "messages" in row else row["prompt"] + row["chosen"]
    return messages


def _tell(row: Row, why: str) -> str:
    text = " | ".join(" ".join(m["content"].split()) for m in conversation_of(row) if m["role"] != "system")
    return f"{row['origin']}: {why}: {text if len(text) < 120 else text[:120] + ' ...'}"


def hashes_of(record: Row) -> dict[str, int]:
    """By what a converted row is compared: all that it says, and its first question, 0 if it has none."""
    whole = json.dumps({key: value for key, value in record.items() if key not in ("group", "unused")}, sort_keys=True)
    question = next((m["content"] for m in conversation_of(record) if m["role"] == "user"), "")
    return {"_row": _hash(whole), "_question": _hash(" ".join(WORD.findall(question.lower())))}


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1 if text else 0  # int64


def column(rows: Dataset, name: str) -> "NDArray[Any]":
    """A column of numbers, from the table itself: of selected rows `[:]` would make an object of each."""
    values, chosen = rows.data.column(name).to_numpy(), table_rows(rows)
    return np.asarray(values if chosen is None else values[chosen])


def drop_duplicates(rows: Dataset, filters: Filters, report: Report, name: str, num_proc: int | None) -> Dataset:
    """The first of equal rows, and of near duplicates, where the filters ask for it; each is a stage of the report."""
    for why in ("exact_duplicates", "near_duplicates"):
        if (setting := getattr(filters, why)) in (False, None):
            continue
        with report.stage(f"{name}: {why.replace('_', ' ')}", len(rows)) as stage:
            exact = why == "exact_duplicates"
            pairs = equal(column(rows, "_row")) if exact else near_duplicates(rows, setting, num_proc)
            first = chains(len(rows), pairs)
            keep = first == np.arange(len(rows))
            gone = np.flatnonzero(~keep)
            alike = zip(rows.select(gone[:EXAMPLES]), rows.select(first[gone[:EXAMPLES]])["origin"], strict=True)
            stage.remove(why, len(gone), (_tell(row, f"like {other}") for row, other in alike))
            rows = rows if keep.all() else rows.select(np.flatnonzero(keep))
    return rows


def equal(keys: "NDArray[Any]") -> "NDArray[Any]":
    """Pairs (int64, n x 2) of rows with the same key, which is not 0: the first of them and each other."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    pairs = np.stack([first[inverse], np.arange(len(keys))], axis=1)
    return np.asarray(pairs[(pairs[:, 0] != pairs[:, 1]) & (keys != 0)])


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
    types = {"signature": List(Value("uint32"), length=NUM_PERM), **dict.fromkeys(names, Value("uint64"))}
    found = rows.map(
        partial(_signatures, bands=index.b, rows=index.r),
        batched=True,
        remove_columns=rows.column_names,
        features=Features(types),
        num_proc=num_proc,
        desc="comparing",
    ).with_format("numpy")
    pairs: list[NDArray[Any]] = []
    for name in names:
        band = equal(column(found, name))
        for at in range(0, len(band), 10_000):
            left, right = (found[side]["signature"] for side in band[at : at + 10_000].T)
            pairs.append(band[at : at + 10_000][(left == right).mean(axis=1) >= threshold])
    return np.unique(np.concatenate(pairs), axis=0) if pairs else np.zeros((0, 2), dtype=np.int64)


def _signatures(batch: dict[str, list[Any]], bands: int, rows: int) -> dict[str, Any]:
    from datasketch import MinHash

    shingles = []
    for values in zip(*batch.values(), strict=True):
        messages = conversation_of(dict(zip(batch, values, strict=True)))
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
    room = int(len(rows) * test_size) if test_size < 1 else int(test_size)
    keys = [column(rows, "_question")]
    if "group" in rows.column_names:
        keys.append(np.array([_hash(group or "") for group in rows["group"]]))
    links = [equal(key) for key in keys]
    if near is not None:
        links.append(near_duplicates(rows, near, num_proc))
    _, groups, sizes = np.unique(chains(len(rows), np.concatenate(links)), return_inverse=True, return_counts=True)
    chosen = np.zeros(len(sizes), dtype=bool)
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[group] <= room:
            chosen[group], room = True, room - sizes[group]
    held_out = chosen[groups]
    if not held_out.any() or held_out.all():
        raise RecipeError(
            f"test_size={test_size} leaves nothing to {'train on' if held_out.any() else 'hold out'}: "
            f"the {len(rows):,} rows are {len(sizes):,} groups that stay together, the smallest of {sizes.min():,}"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


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
