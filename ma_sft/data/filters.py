"""Which conversations stay: filters that count what they remove and keep examples, and the train/held-out split.

Row filters look at one conversation and run in one pass, over all cores or on a stream. Duplicates and the split look
at all rows: they hold some 150 bytes for each row in memory, never its text; MinHash signatures lie in an Arrow file.
"""

import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import regex
import xxhash
from datasets import Dataset, Features, IterableDataset, List, Value

from ma_sft.data.code import code_of
from ma_sft.data.functions import load_function
from ma_sft.data.turns import Message
from ma_sft.errors import RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray


logger = logging.getLogger(__name__)


EXAMPLES = 5  # kept of each filter

PATTERN_SECONDS = 5  # that a regular expression may take for one answer

NUM_PERM = 128  # of a MinHash signature: its estimate of a Jaccard similarity has a standard error below 0.045

WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]|[\p{L}\p{N}]+")

LETTER = regex.compile(r"\p{L}")

REFUSALS = (
    r"\bas an? (ai|artificial intelligence|large language model|language model)\b",
    r"^\W*(i['’]?m|i am|we are)?\W*(very |so |really )?(sorry|unfortunately|i apologi[sz]e)\b.{0,60}\b"
    r"(can['’]?t|cannot|can not|unable|not able|won['’]?t)\b",
    r"^\W*i (can['’]?t|cannot|can not|won['’]?t|will not|am unable to|am not able to) "
    r"(help|assist|provide|fulfil+|answer|comply|discuss|create|generate|engage|write|give|share|offer|support|do)\b",
    r"作为(一个|一名|一款)?(ai|人工智能|语言模型|大模型)",
    r"^\W*(很|非常|十分)?(抱歉|对不起|不好意思).{0,20}(不能|无法|没办法|没有办法)",
    r"^\W*我(不能|无法)(提供|回答|帮助|协助|满足|生成)",
)


@dataclass
class Stage:
    """A step of the way: `rows_in` minus all of `removed` is `rows_out`. `examples` tells some rows removed, by why."""

    name: str
    rows_in: int = 0
    rows_out: int = 0
    seconds: float = 0.0
    removed: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)  # columns that a conversion did not read, with an example

    def remove(self, why: str, count: int, examples: Iterable[str] = ()) -> None:
        if count:
            self.removed[why] = self.removed.get(why, 0) + count
            kept = self.examples.setdefault(why, [])
            kept += itertools.islice(examples, EXAMPLES - len(kept))

    def stream(self, reasons: list[str], tell: Callable[[int], str]) -> list[bool]:
        """For `IterableDataset.filter`: keep what has no reason to go; tell the first, tenth, hundredth that goes."""
        for at, why in enumerate(reasons):
            if why:
                self.remove(why, 1, [example := tell(at)])
                if str(self.removed[why]).strip("0") == "1":
                    logger.warning("%s: %d removed so far by %s: %s", self.name, self.removed[why], why, example)
        self.rows_in += len(reasons)
        self.rows_out += reasons.count("")
        return [not why for why in reasons]


def unused_columns(stages: Iterable[Stage]) -> dict[str, dict[str, str]]:
    """Of each source, the columns that nothing read and that may mean something, with an example."""
    return {stage.name.rpartition(": convert")[0]: stage.unused for stage in stages if stage.unused}


@dataclass(frozen=True)
class Filters:
    """What a conversation must be to stay; None and False leave a filter out.

    Args:
        min_chars, max_chars: characters in all messages together.
        min_tokens, max_tokens: tokens of all messages' text together, without the chat template's.
        tokenizer: whose tokens: a hub id or folder, "demo", or in a recipe the recipe's model by default.
        min_response_chars: characters of the shortest answer.
        trivial: drop rows with an answer that has no letter or digit, or only repeats the question.
        refusals: True for `REFUSALS` (English, Chinese), or regular expressions; any answer that matches drops the row.
        scripts: `{Unicode script: least share of letters}` or `{script: [least, most]}`, e.g. `{"Han": 0.3}`.
        function: the user's `messages -> bool` as `module:function` or `file.py:function`; False drops the row.
        contamination: held-out files; a row that shares `contamination_words` words in a row with one of them, or its
            whole first question, is dropped. Phrases in more than ten held-out rows are boilerplate and do not count
            (as in the GPT-3 paper, appendix C, https://arxiv.org/abs/2005.14165).
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
    trivial: bool = False
    refusals: bool | list[str] = False
    scripts: dict[str, Any] | None = None
    function: str | None = None
    contamination: str | list[Any] | None = None
    contamination_words: int = 13
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
            if key not in kinds:
                raise RecipeError(f"unknown filter {key!r}; filters are {', '.join(kinds)}")
            kind = int | float | None if kinds[key] == float | None else kinds[key]
            checked = kind in (int, bool, int | None, int | float | None)
            if checked and (not isinstance(setting, kind) or isinstance(setting, bool) != (kind is bool)):
                raise RecipeError(f"filter {key}: {getattr(kind, '__name__', kind)} expected, not {setting!r}")
        return cls(**{"tokenizer": tokenizer, **value})

    def __post_init__(self) -> None:
        if (self.min_tokens or self.max_tokens) and not self.tokenizer:
            raise RecipeError("filters min_tokens and max_tokens need to know whose tokens: set tokenizer")
        if not 0 < (self.near_duplicates or 1) <= 1:
            raise RecipeError(f"filter near_duplicates: a similarity up to 1 expected, not {self.near_duplicates!r}")
        shown: Any = None
        try:
            for shown in self.refusals if isinstance(self.refusals, list) else ():
                regex.compile(shown)
            for shown, share in (self.scripts or {}).items():
                regex.compile(rf"\p{{{shown}}}")
                low, high = share if isinstance(share, list | tuple) else (share, 1)
                if not 0 <= low <= high <= 1:
                    raise ValueError(f"shares from 0 to 1 expected, found {share!r}")
        except (regex.error, TypeError, ValueError, AttributeError) as error:
            raise RecipeError(f"filters: {shown!r}: {' '.join(str(error).split())}") from None

    @property
    def by_row(self) -> bool:
        """Whether there is a filter that looks at one row alone."""
        names = [f.name for f in fields(self) if f.name not in ("tokenizer", "contamination_words", *ALL_ROWS)]
        return any(getattr(self, name) for name in names)


ALL_ROWS = ("exact_duplicates", "near_duplicates")


def conversations(batch: dict[str, Any]) -> Iterator[list[Message]]:
    """The messages of each row in a batch; of a preference, prompt and chosen answer."""
    if "messages" in batch:
        yield from batch["messages"]
    else:
        yield from (p + c for p, c in zip(batch["prompt"], batch["chosen"], strict=True))


class RowFilters:
    """For `datasets.map(batched=True)`: why a row goes (the filter's name, the finding), or two empty texts."""

    def __init__(self, filters: Filters, grams: "NDArray[Any] | None" = None) -> None:
        self.filters, self.grams = filters, grams
        self.code = code_of(filters.function)  # when it changes, `datasets` must not find what it gave before
        refusals = REFUSALS if filters.refusals is True else filters.refusals or ()
        self.refusals = [regex.compile(pattern, regex.IGNORECASE) for pattern in refusals]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[str]]:
        rows = list(conversations(batch))
        tokens = self._tokens(rows) if self.filters.min_tokens or self.filters.max_tokens else [0] * len(rows)
        found = [self._why(messages, count) for messages, count in zip(rows, tokens, strict=True)]
        return {"removed_by": [name for name, _ in found], "why": [why for _, why in found]}

    def _tokens(self, rows: list[list[Message]]) -> list[int]:
        tokenizer = load_tokenizer(str(self.filters.tokenizer))
        texts = [m["content"] for messages in rows for m in messages]
        lengths = iter(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        return [sum(next(lengths) for _ in messages) for messages in rows]

    def _why(self, messages: list[Message], tokens: int) -> tuple[str, str]:
        f = self.filters
        chars = sum(len(m["content"]) for m in messages)
        answers = [(i, m["content"]) for i, m in enumerate(messages) if m["role"] == "assistant"]
        answers = [(i, text) for i, text in answers if not messages[i].get("tool_calls")]
        shortest = min((len(text) for _, text in answers), default=None)
        for name, value, unit in (("chars", chars, "characters"), ("tokens", tokens, "tokens")):
            low, high = getattr(f, f"min_{name}"), getattr(f, f"max_{name}")
            if low is not None and value < low:
                return f"min_{name}", f"{value} {unit}"
            if high is not None and value > high:
                return f"max_{name}", f"{value} {unit}"
        if f.min_response_chars is not None and shortest is not None and shortest < f.min_response_chars:
            return "min_response_chars", f"an answer of {shortest} characters"
        if f.trivial:
            for i, text in answers:
                if not any(map(str.isalnum, text)):
                    return "trivial", f"the answer is {text[:20]!r}"
                if i and text.strip().casefold() == messages[i - 1]["content"].strip().casefold():
                    return "trivial", "the answer repeats the question"
        for pattern in self.refusals:
            for _, text in answers:
                if match := _search(pattern, text):
                    return "refusals", f"{match.group()[:60]!r}"
        text = "\n".join(m["content"] for m in messages if m["role"] in ("user", "assistant"))
        for script, share in (f.scripts or {}).items():
            low, high = share if isinstance(share, list | tuple) else (share, 1)
            letters = len(LETTER.findall(text))
            part = len(regex.findall(rf"\p{{{script}}}", text)) / letters if letters else low
            if not low <= part <= high:
                return "scripts", f"{part:.0%} of the letters are {script}"
        if f.function and not load_function(f.function)(messages):
            return "function", f.function
        if self.grams is not None:
            for gram, words in phrases(messages, f.contamination_words):
                at = np.searchsorted(self.grams, gram)
                if at < len(self.grams) and self.grams[at] == gram:
                    return "contamination", f"shares {words!r}"
        return "", ""


def _search(pattern: "regex.Pattern[str]", text: str) -> "regex.Match[str] | None":
    try:
        return pattern.search(text, timeout=PATTERN_SECONDS)
    except TimeoutError:
        raise RecipeError(
            f"filter refusals: {pattern.pattern!r} needs more than {PATTERN_SECONDS} s for one answer of {len(text):,} "
            "characters; write it so that it does not try the same text again and again"
        ) from None


_TOKENIZERS: dict[str, Any] = {}


def load_tokenizer(name: str) -> Any:
    """The tokenizer that filters count with; kept in each process.

    Raises:
        RecipeError: there is none.
    """
    if name not in _TOKENIZERS:
        from transformers import AutoTokenizer

        from ma_sft.demo import demo_model
        from ma_sft.hub import load_pretrained

        try:
            _TOKENIZERS[name] = load_pretrained(AutoTokenizer, str(demo_model() if name == "demo" else name))
        except RecipeError as error:
            raise RecipeError(f"filters: no tokenizer {name!r}: {error}") from None
    return _TOKENIZERS[name]


def phrases(messages: list[Message], length: int) -> Iterator[tuple[np.uint64, str]]:
    """(hash, text) of each run of `length` words in a message, and of a shorter first question as a whole."""
    first = next((m for m in messages if m["role"] == "user"), None)
    for message in messages:
        words = WORD.findall(message["content"].lower()) if message["role"] != "system" else []
        if 4 <= len(words) < length and message is first:
            yield _hash(text := " ".join(words)), text
        for at in range(len(words) - length + 1):
            yield _hash(text := " ".join(words[at : at + length])), text


def held_out_phrases(rows: Iterable[list[Message]], length: int) -> "NDArray[Any]":
    """Sorted hashes (uint64) of the phrases of held-out conversations, without boilerplate."""
    counts = Counter(gram for messages in rows for gram in {int(gram) for gram, _ in phrases(messages, length)})
    return np.array(sorted(gram for gram, rows_with in counts.items() if rows_with <= 10), dtype=np.uint64)


def apply_filters(
    rows: Dataset, filters: Filters, *, name: str, grams: "NDArray[Any] | None" = None, num_proc: int | None = None
) -> tuple[Dataset, list[Stage]]:
    """The rows that stay, in their order, and a stage for each pass."""
    stages = []
    if filters.by_row:
        stage = Stage(f"{name}: row filters", len(rows))
        start = time.monotonic()
        found = _columns(rows, RowFilters(filters, grams), {"removed_by": "string", "why": "string"}, num_proc)
        names = found.data.column("removed_by")
        for why in filter(None, pc.unique(names).to_pylist()):
            at = np.flatnonzero(pc.equal(names, why).to_numpy())
            stage.remove(why, len(at), (_tell(rows[int(i)], found[int(i)]["why"]) for i in at[:EXAMPLES]))
        rows = _keep(rows, pc.equal(names, "").to_numpy(), stage, start)
        stages.append(stage)
    if filters.exact_duplicates:
        stage = Stage(f"{name}: exact duplicates", len(rows))
        start = time.monotonic()
        _, first, inverse = np.unique(_hashes(rows, _exact, num_proc), return_index=True, return_inverse=True)
        rows = _keep_first(rows, first[inverse], "exact_duplicates", stage, start)
        stages.append(stage)
    if filters.near_duplicates is not None:
        stage = Stage(f"{name}: near duplicates", len(rows))
        start = time.monotonic()
        groups = _groups(len(rows), near_duplicates(rows, filters.near_duplicates, num_proc))
        rows = _keep_first(rows, groups, "near_duplicates", stage, start)
        stages.append(stage)
    return rows, stages


def stream_filters(rows: IterableDataset, filters: Filters, stage: Stage, grams: "NDArray[Any] | None") -> Any:
    """Row filters on a stream; `stage` counts while it is read.

    Raises:
        RecipeError: a filter that needs to see all rows.
    """
    for name in ALL_ROWS:
        if getattr(filters, name):
            raise RecipeError(f"filter {name} needs to see all rows: `ma-sft data build` the mixture, then stream that")
    check = RowFilters(filters, grams)

    def keep(batch: dict[str, list[Any]]) -> list[bool]:
        found = check(batch)
        return stage.stream(
            found["removed_by"], lambda at: _tell({k: v[at] for k, v in batch.items()}, found["why"][at])
        )

    return rows.filter(keep, batched=True) if filters.by_row else rows


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
    found = _columns(rows, _Signatures(index.b, index.r), types, num_proc).with_format("numpy")
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


class _Signatures:
    def __init__(self, bands: int, rows: int) -> None:
        self.bands, self.rows = bands, rows

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        from datasketch import MinHash

        shingles = []
        for messages in conversations(batch):
            words = [w for m in messages if m["role"] != "system" for w in WORD.findall(m["content"].lower())]
            shingles.append({" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))})
        hashes = MinHash.generator(shingles, num_perm=NUM_PERM, hashfunc=xxhash.xxh32_intdigest)
        signatures = np.stack([h.hashvalues for h in hashes])
        columns: dict[str, Any] = {"signature": signatures}
        for i in range(self.bands):
            band = np.ascontiguousarray(signatures[:, i * self.rows : (i + 1) * self.rows])
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
    for key in (_question, _group) if "group" in rows.column_names else (_question,):
        hashes = _hashes(rows, key, num_proc)
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        own = np.arange(len(rows))
        links.append(np.stack([np.where(hashes == 0, own, first[inverse]), own], axis=1))
    if near is not None:
        links.append(near_duplicates(rows, near, num_proc))
    _, groups, sizes = np.unique(_groups(len(rows), np.concatenate(links)), return_inverse=True, return_counts=True)
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


def _exact(row: dict[str, Any]) -> str:
    own = ("source", "origin", "raw", "group", "_part")
    return json.dumps({k: v for k, v in row.items() if k not in own}, sort_keys=True)


def _question(row: dict[str, Any]) -> str:
    messages = row.get("messages") or row["prompt"]
    return " ".join(WORD.findall(next((m["content"] for m in messages if m["role"] == "user"), "").lower()))


def _group(row: dict[str, Any]) -> str:
    return row.get("group") or ""


def _hashes(rows: Dataset, key: Callable[[dict[str, Any]], str], num_proc: int | None) -> "NDArray[Any]":
    """A hash (uint64) of each row's key, 0 for an empty key."""

    def hash_batch(batch: dict[str, list[Any]]) -> dict[str, Any]:
        keys = (key(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True))
        return {"hash": np.array([_hash(text) if text else 0 for text in keys], dtype=np.uint64)}

    found: NDArray[Any] = _columns(rows, hash_batch, {"hash": "uint64"}, num_proc).data.column("hash").to_numpy()
    return found


def _columns(rows: Dataset, function: Any, types: dict[str, Any], num_proc: int | None) -> Dataset:
    """New columns alone, computed in batches by all processes."""
    features = Features({name: Value(t) if isinstance(t, str) else t for name, t in types.items()})
    names = rows.column_names
    return rows.map(
        function, batched=True, remove_columns=names, features=features, num_proc=num_proc, desc="filtering"
    )


def _groups(count: int, pairs: "NDArray[Any]") -> "NDArray[Any]":
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


def _keep_first(rows: Dataset, first: "NDArray[Any]", why: str, stage: Stage, start: float) -> Dataset:
    keep = first == np.arange(len(rows))
    gone = np.flatnonzero(~keep)
    examples = (_tell(rows[int(i)], f"like {rows[int(first[i])]['origin']}") for i in gone[:EXAMPLES])
    stage.remove(why, len(gone), examples)
    return _keep(rows, keep, stage, start)


def _keep(rows: Dataset, keep: "NDArray[Any]", stage: Stage, start: float) -> Dataset:
    rows = rows if keep.all() else rows.select(np.flatnonzero(keep))
    stage.rows_out, stage.seconds = len(rows), time.monotonic() - start
    return rows


def _tell(row: dict[str, Any], why: str) -> str:
    (messages,) = conversations({key: [value] for key, value in row.items()})
    text = " | ".join(" ".join(m["content"].split()) for m in messages if m["role"] != "system")
    return f"{row['origin']}: {why}: {text if len(text) < 120 else text[:120] + ' ...'}"


def _hash(text: str) -> Any:
    return np.uint64(xxhash.xxh3_64_intdigest(text.encode()))
