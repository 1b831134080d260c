"""Which conversations stay: filters that count what they remove and keep examples; equal rows, near duplicates, and the
split that keeps relatives on one side.

Row filters look at one conversation and run in one pass, over all cores or on a stream. What compares rows looks at
all: some 150 bytes of each are in memory, never its text; MinHash signatures lie in an Arrow file.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
import xxhash
from datasets import Dataset, Features, IterableDataset, List, Value

from ma_sft.data.functions import code_of, load_function
from ma_sft.data.messages import Message
from ma_sft.data.stages import EXAMPLES, Report, Stage
from ma_sft.errors import RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_PERM = 128  # of a MinHash signature: its estimate of a Jaccard similarity has a standard error below 0.045
WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]|[\p{L}\p{N}]+")
DROPPED = ("trivial", "refusals", "scripts", "contamination", "contamination_words")  # of earlier versions


@dataclass(frozen=True)
class Filters:
    """What a conversation must be to stay; None and False leave a filter out.

    Args:
        min_chars, max_chars: characters in all messages together.
        min_tokens, max_tokens: tokens of all messages' text together, without the chat template's.
        tokenizer: whose tokens: a hub id or folder, "demo", or in a recipe the recipe's model by default.
        min_response_chars: characters of the shortest answer.
        function: the user's `messages -> bool` as `module:function` or `file.py:function`; False drops the row.
        exact_duplicates: keep the first of equal rows.
        near_duplicates: keep the first of rows whose sets of three-word phrases have at least this Jaccard similarity,
            estimated by MinHash.
    """

    min_chars: int | None = None
    max_chars: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    tokenizer: str | None = None
    min_response_chars: int | None = None
    function: str | None = None
    exact_duplicates: bool = False
    near_duplicates: float | None = None

    @classmethod
    def of(cls, value: Any, tokenizer: str | None = None) -> "Filters":
        """Filters from a mapping of the fields above, or its JSON text.

        Raises:
            RecipeError: an unknown filter or a wrong value.
        """
        if isinstance(value, cls):
            return value
        try:
            value = json.loads(value) if isinstance(value, str) else dict(value or {})
        except (TypeError, ValueError):
            raise RecipeError(f"filters: a mapping expected, found {value!r}") from None
        kinds: dict[str, Any] = {f.name: f.type for f in fields(cls)}
        for key, setting in value.items():
            if key in DROPPED:
                raise RecipeError(f"filter {key!r} is gone: write it as a function of your own; docs/formats.md has it")
            if key not in kinds:
                raise RecipeError(f"unknown filter {key!r}; filters are {', '.join(kinds)}")
            kind = int | float | None if kinds[key] == float | None else kinds[key]
            if not isinstance(setting, kind) or isinstance(setting, bool) != (kind is bool):
                raise RecipeError(f"filter {key}: {getattr(kind, '__name__', kind)} expected, not {setting!r}")
        return cls(**{"tokenizer": tokenizer, **value})

    def __post_init__(self) -> None:
        if (self.min_tokens or self.max_tokens) and not self.tokenizer:
            raise RecipeError("filters min_tokens and max_tokens need to know whose tokens: set tokenizer")
        if not 0 < (self.near_duplicates or 1) <= 1:
            raise RecipeError(f"filter near_duplicates: a similarity up to 1 expected, not {self.near_duplicates!r}")

    @property
    def by_row(self) -> list[str]:
        """The filters that look at one row alone, and are on."""
        return [name for name in ROW_FILTERS if getattr(self, name) is not None and getattr(self, name) is not False]


ALL_ROWS = ("exact_duplicates", "near_duplicates")


@dataclass
class SeenRow:
    """What row filters look at."""

    messages: list[Message]
    tokens: int

    @property
    def chars(self) -> int:
        return sum(len(m["content"]) for m in self.messages)

    @property
    def answers(self) -> list[str]:
        """The texts of the assistant's turns without calls."""
        return [m["content"] for m in self.messages if m["role"] == "assistant" and not m.get("tool_calls")]


# A row filter is a function of its setting and a row, under the setting's name; it gives the finding, or None.
ROW_FILTERS: dict[str, Callable[[Any, SeenRow], str | None]] = {}


def row_filter(find: Callable[[Any, SeenRow], str | None]) -> Callable[[Any, SeenRow], str | None]:
    """Add a filter that looks at one row alone; `Filters` has a field of its name."""
    ROW_FILTERS[find.__name__] = find
    return find


@row_filter
def min_chars(limit: int, row: SeenRow) -> str | None:
    return f"{row.chars} characters" if row.chars < limit else None


@row_filter
def max_chars(limit: int, row: SeenRow) -> str | None:
    return f"{row.chars} characters" if row.chars > limit else None


@row_filter
def min_tokens(limit: int, row: SeenRow) -> str | None:
    return f"{row.tokens} tokens" if row.tokens < limit else None


@row_filter
def max_tokens(limit: int, row: SeenRow) -> str | None:
    return f"{row.tokens} tokens" if row.tokens > limit else None


@row_filter
def min_response_chars(limit: int, row: SeenRow) -> str | None:
    shortest = min(map(len, row.answers), default=limit)
    return f"an answer of {shortest} characters" if shortest < limit else None


@row_filter
def function(name: str, row: SeenRow) -> str | None:
    return None if load_function(name)(row.messages) else name


class RowFilters:
    """For `datasets.map(batched=True)`: of each row the filter that removes it and what to tell, or two empty texts."""

    def __init__(self, filters: Filters) -> None:
        self.filters = filters
        self.code = code_of(filters.function)  # when it changes, `datasets` must not find what it gave before

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[str]]:
        rows = list(conversations(batch))
        tokens = self._tokens(rows) if self.filters.min_tokens or self.filters.max_tokens else [0] * len(rows)
        filters = [(name, ROW_FILTERS[name], getattr(self.filters, name)) for name in self.filters.by_row]
        found: dict[str, list[str]] = {"removed_by": [], "error": []}
        for origin, messages, count in zip(batch["origin"], rows, tokens, strict=True):
            row = SeenRow(messages, count)
            first = ((name, why) for name, find, setting in filters if (why := find(setting, row)))
            name, why = next(first, ("", ""))
            found["removed_by"].append(name)
            found["error"].append(_tell(origin, messages, why) if name else "")
        return found

    def _tokens(self, rows: list[list[Message]]) -> list[int]:
        tokenizer = load_tokenizer(str(self.filters.tokenizer))
        texts = [m["content"] for messages in rows for m in messages]
        lengths = iter(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        return [sum(next(lengths) for _ in messages) for messages in rows]


@cache
def load_tokenizer(name: str) -> Any:
    """The tokenizer that filters count with; kept in each process.

    Raises:
        RecipeError: there is none.
    """
    from transformers import AutoTokenizer

    from ma_sft.demo import demo_model
    from ma_sft.hub import load_pretrained

    try:
        return load_pretrained(AutoTokenizer, str(demo_model() if name == "demo" else name))
    except RecipeError as error:
        raise RecipeError(f"filters: no tokenizer {name!r}: {error}") from None


def apply_filters(rows: Any, filters: Filters, report: Report, *, name: str, num_proc: int | None) -> Any:
    """The rows that stay, in their order; each pass is a stage of the report. A stream is filtered while it is read.

    Raises:
        RecipeError: a filter that needs to see all rows of a stream.
    """
    check = RowFilters(filters)
    if isinstance(rows, IterableDataset):
        for each in ALL_ROWS:
            if getattr(filters, each):
                raise RecipeError(
                    f"filter {each} needs to see all rows: `ma-sft data build` the mixture, then stream that"
                )
        report.stages.append(stage := Stage(f"{name}: row filters"))
        if filters.by_row:
            features = Features({**rows.features, **dict.fromkeys(REASONS, Value("string"))})
            rows = sift(rows.map(check, batched=True, features=features), stage)
        return rows
    if filters.by_row:
        with report.stage(f"{name}: row filters") as stage:
            rows = sift(rows, stage, new_columns(rows, check, dict.fromkeys(REASONS, "string"), num_proc))
    if filters.exact_duplicates:
        with report.stage(f"{name}: exact duplicates", len(rows)) as stage:
            _, first, inverse = np.unique(hashes(rows, exact_key, num_proc), return_index=True, return_inverse=True)
            rows = _keep_first(rows, first[inverse], "exact_duplicates", stage)
    if filters.near_duplicates is not None:
        with report.stage(f"{name}: near duplicates", len(rows)) as stage:
            groups = chains(len(rows), near_duplicates(rows, filters.near_duplicates, num_proc))
            rows = _keep_first(rows, groups, "near_duplicates", stage)
    return rows


REASONS = ("removed_by", "error")


def sift(rows: Any, stage: Stage, reasons: Dataset | None = None) -> Any:
    """The rows that `Stage.keep` keeps by their columns of reasons, or by those of `reasons`; without these columns."""
    found = rows if reasons is None else reasons
    used = [name for name in (*REASONS, "unused") if name in found.column_names]
    if isinstance(rows, IterableDataset):
        return rows.filter(partial(stage.keep, say=True), batched=True).remove_columns(used)
    columns = {name: found.data.column(name) for name in used}
    keep = stage.keep(columns | {name: columns[name].to_pylist() for name in used if name != "error"})
    rows = rows.remove_columns(used) if reasons is None else rows
    return rows if all(keep) else rows.select(np.flatnonzero(keep))


def _keep_first(rows: Dataset, first: "NDArray[Any]", why: str, stage: Stage) -> Dataset:
    keep = first == np.arange(len(rows))
    gone = np.flatnonzero(~keep)
    shown = rows.select(gone[:EXAMPLES])
    alike = zip(shown["origin"], conversations(shown[:]), rows.select(first[gone[:EXAMPLES]])["origin"], strict=True)
    stage.remove(why, len(gone), (_tell(origin, messages, f"like {other}") for origin, messages, other in alike))
    return rows if keep.all() else rows.select(np.flatnonzero(keep))


def _tell(origin: str, messages: list[Message], why: str) -> str:
    text = " | ".join(" ".join(m["content"].split()) for m in messages if m["role"] != "system")
    return f"{origin}: {why}: {text if len(text) < 120 else text[:120] + ' ...'}"


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
    own = ("source", "origin", "group", "_part")
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
