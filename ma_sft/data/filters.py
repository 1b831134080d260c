"""Which conversations stay: filters that count what they remove and keep examples.

Row filters look at one conversation and run in one pass, over all cores or on a stream; filters of duplicates look at
all rows (`ma_sft.data.duplicates`).
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
from datasets import Dataset, IterableDataset

from ma_sft.data.code import code_of
from ma_sft.data.duplicates import WORD, chains, conversations, exact_key, hash_of, hashes, near_duplicates, new_columns
from ma_sft.data.functions import load_function
from ma_sft.data.turns import Message
from ma_sft.errors import RecipeError, one_line

if TYPE_CHECKING:
    from numpy.typing import NDArray


logger = logging.getLogger(__name__)


EXAMPLES = 5  # kept of each filter

PATTERN_SECONDS = 5  # that a regular expression may take for one answer

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
            raise RecipeError(f"filters: {shown!r}: {one_line(error)}") from None

    @property
    def by_row(self) -> list[str]:
        """The filters that look at one row alone, and are on."""
        settings = {name: getattr(self, name) for name in ROW_FILTERS}
        return [name for name, set_to in settings.items() if set_to or (set_to == 0 and set_to is not False)]


ALL_ROWS = ("exact_duplicates", "near_duplicates")


@dataclass
class SeenRow:
    """What row filters look at: `answers` are (position, text) of the assistant's turns without calls."""

    messages: list[Message]
    tokens: int
    filters: Filters
    grams: "NDArray[Any] | None"

    def __post_init__(self) -> None:
        self.chars = sum(len(m["content"]) for m in self.messages)
        spoken = ((i, m) for i, m in enumerate(self.messages) if m["role"] == "assistant" and not m.get("tool_calls"))
        self.answers = [(i, m["content"]) for i, m in spoken]


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
    shortest = min((len(text) for _, text in row.answers), default=limit)
    return f"an answer of {shortest} characters" if shortest < limit else None


@row_filter
def trivial(_: bool, row: SeenRow) -> str | None:
    for i, text in row.answers:
        if not any(map(str.isalnum, text)):
            return f"the answer is {text[:20]!r}"
        if i and text.strip().casefold() == row.messages[i - 1]["content"].strip().casefold():
            return "the answer repeats the question"
    return None


@row_filter
def refusals(patterns: Any, row: SeenRow) -> str | None:
    for pattern in REFUSALS if patterns is True else patterns:
        for _, text in row.answers:
            try:
                found = regex.search(pattern, text, regex.IGNORECASE, timeout=PATTERN_SECONDS)
            except TimeoutError:
                raise RecipeError(
                    f"filter refusals: {pattern!r} needs more than {PATTERN_SECONDS} s for one answer of {len(text):,} "
                    "characters; write it so that it does not try the same text again and again"
                ) from None
            if found:
                return f"{found.group()[:60]!r}"
    return None


@row_filter
def scripts(shares: dict[str, Any], row: SeenRow) -> str | None:
    text = "\n".join(m["content"] for m in row.messages if m["role"] in ("user", "assistant"))
    letters = len(LETTER.findall(text))
    for script, share in shares.items():
        low, high = share if isinstance(share, list | tuple) else (share, 1)
        part = len(regex.findall(rf"\p{{{script}}}", text)) / letters if letters else low
        if not low <= part <= high:
            return f"{part:.0%} of the letters are {script}"
    return None


@row_filter
def function(name: str, row: SeenRow) -> str | None:
    return None if load_function(name)(row.messages) else name


@row_filter
def contamination(_: Any, row: SeenRow) -> str | None:
    assert row.grams is not None
    for gram, words in phrases(row.messages, row.filters.contamination_words):
        at = np.searchsorted(row.grams, gram)
        if at < len(row.grams) and row.grams[at] == gram:
            return f"shares {words!r}"
    return None


class RowFilters:
    """For `datasets.map(batched=True)`: why a row goes (the filter's name, the finding), or two empty texts."""

    def __init__(self, filters: Filters, grams: "NDArray[Any] | None" = None) -> None:
        self.filters, self.grams = filters, grams
        self.code = code_of(filters.function)  # when it changes, `datasets` must not find what it gave before

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
        row = SeenRow(messages, tokens, self.filters, self.grams)
        for name in self.filters.by_row:
            if finding := ROW_FILTERS[name](getattr(self.filters, name), row):
                return name, finding
        return "", ""


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
            yield hash_of(text := " ".join(words)), text
        for at in range(len(words) - length + 1):
            yield hash_of(text := " ".join(words[at : at + length])), text


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
        found = new_columns(rows, RowFilters(filters, grams), {"removed_by": "string", "why": "string"}, num_proc)
        names = found.data.column("removed_by")
        for why in filter(None, pc.unique(names).to_pylist()):
            at = np.flatnonzero(pc.equal(names, why).to_numpy())
            stage.remove(why, len(at), (_tell(rows[int(i)], found[int(i)]["why"]) for i in at[:EXAMPLES]))
        rows = _keep(rows, pc.equal(names, "").to_numpy(), stage, start)
        stages.append(stage)
    if filters.exact_duplicates:
        stage = Stage(f"{name}: exact duplicates", len(rows))
        start = time.monotonic()
        _, first, inverse = np.unique(hashes(rows, exact_key, num_proc), return_index=True, return_inverse=True)
        rows = _keep_first(rows, first[inverse], "exact_duplicates", stage, start)
        stages.append(stage)
    if filters.near_duplicates is not None:
        stage = Stage(f"{name}: near duplicates", len(rows))
        start = time.monotonic()
        groups = chains(len(rows), near_duplicates(rows, filters.near_duplicates, num_proc))
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
