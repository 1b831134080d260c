"""Which conversations stay: filters that count what they remove and keep examples.

Row filters look at one conversation and run in one pass, over all cores or on a stream; filters of duplicates look at
all rows (`ma_sft.data.duplicates`).
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
from datasets import Dataset, Features, IterableDataset, Value

from ma_sft.data.duplicates import WORD, chains, conversations, exact_key, hash_of, hashes, near_duplicates, new_columns
from ma_sft.data.functions import code_of, load_function
from ma_sft.data.stages import EXAMPLES, Report, Stage
from ma_sft.data.turns import Message
from ma_sft.errors import RecipeError, one_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
    """For `datasets.map(batched=True)`: of each row the filter that removes it and what to tell, or two empty texts."""

    def __init__(self, filters: Filters, grams: "NDArray[Any] | None" = None) -> None:
        self.filters, self.grams = filters, grams
        self.code = code_of(filters.function)  # when it changes, `datasets` must not find what it gave before

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[str]]:
        rows = list(conversations(batch))
        tokens = self._tokens(rows) if self.filters.min_tokens or self.filters.max_tokens else [0] * len(rows)
        filters = [(name, ROW_FILTERS[name], getattr(self.filters, name)) for name in self.filters.by_row]
        found: dict[str, list[str]] = {"removed_by": [], "error": []}
        for origin, messages, count in zip(batch["origin"], rows, tokens, strict=True):
            row = SeenRow(messages, count, self.filters, self.grams)
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
    rows: Any, filters: Filters, report: Report, *, name: str, grams: "NDArray[Any] | None", num_proc: int | None
) -> Any:
    """The rows that stay, in their order; each pass is a stage of the report. A stream is filtered while it is read.

    Raises:
        RecipeError: a filter that needs to see all rows of a stream.
    """
    check = RowFilters(filters, grams)
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
