"""Raw rows -> OpenAI-style messages, for every common format.

A format is known by its columns: `FORMATS` lists them with the function that makes messages of them. What a row says in
further columns is used (`ma_sft.data.messages`), known to be harmless, refused, or named as unused.
"""

import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ma_sft.data.functions import load_function
from ma_sft.data.messages import (
    BAD,
    GOOD,
    WEIGHT_KEYS,
    Message,
    Row,
    TrackedRow,
    are_objects,
    check_order,
    check_text,
    conversation,
    from_json,
    is_blank,
    is_empty,
    list_of_turns,
    merge_turns,
    need,
    show,
    show_columns,
    text_of,
    to_template_kwargs,
    to_tools,
    turns_in_text,
    unknown_keys,
    with_context,
)
from ma_sft.data.preference import ALIASES, PKU, SIDES, completion, dialogue
from ma_sft.errors import FormatError

SHAREGPT = ("conversations", "conversation", "dialogue", "dialog")
CHOICES = ("choices", "options")
ANSWERS = ("answerKey", "answer_idx", "answer_index", "answer", "correct", "Answer")
VERDICTS = ("label", "kto_tag")  # KTO's: whether an answer is a good one
ROW_MARKS = frozenset((*WEIGHT_KEYS, *GOOD, *BAD))
WORDS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}  # as CSV's cells, too
STRANGERS = frozenset(("label", "labels", "target", "role", "parent_id"))  # of these, a text is only a part

# Columns that change what a row says: where no format reads them, the row is refused.
CHANGING = re.compile(
    r"((image|img|picture|audio|video)s?|pixel_values)([_-]?(path|url|file|byte|list)s?)?|"
    r"choices|options|endings|distractors?_?\d*|(option|choice|ending|op|sol)[ _]?[a-e1-9]|[a-e]",
    re.IGNORECASE,
)

# Columns that say something about a row, and nothing that a conversation would lose.
HARMLESS = re.compile(
    r"(.*[_-])?(id|idx|index|uuid|hash|url|score|count|tokens|length|path|name|version|date|time|timestamp)|Unnamed: 0|"
    r"|(data_?)?(source|set)|dataset|split|subset|config|origin|raw|lang|language|locale|license|licence|author|creator|"
    r"(.*[_-])?model|generator|category|categories|type|kind|task|task_type|topic|topics|domain|subject|tag|tags|"
    r"difficulty|level|quality|rating|created|updated|(created|updated)_at|meta|metadata|rejected.*|neg_resp|num_turns|"
    r"group|title|toxic|toxicity|redacted|moderation|openai_moderation|key|keywords|rank|stars|upvotes|_.*",
    re.IGNORECASE,
)

MOSS_MARKS = re.compile(r"^\s*<\|[^|]*\|>:\s*|<eo[a-z]>\s*$")


class BadAnswer(FormatError):
    """A row whose answer is marked as a bad one: nothing to learn from here, and no fault of the file."""


@dataclass(frozen=True)
class Conversation:
    """What a raw row says: messages, tools and template variables as JSON text, and columns that nothing read."""

    messages: list[Message]
    tools: str | None
    chat_template_kwargs: str | None
    unused: dict[str, str]


@dataclass(frozen=True)
class Format:
    """Which columns a row must have, how it becomes messages, and whether these can hold more than text (`rich`).

    Of `needs`, each a column and its other names, one must be there; `also` are further columns that are the format's.
    """

    needs: tuple[tuple[str, ...], ...]
    convert: Callable[[TrackedRow], list[Message]]
    rich: bool = False
    also: frozenset[str] = frozenset()

    @property
    def columns(self) -> frozenset[str]:
        return frozenset(names[0] for names in self.needs)

    def found(self, columns: set[str]) -> set[str]:
        """Of these columns, those that are the format's."""
        return {next(n for n in names if n in columns) for names in self.needs if columns.intersection(names)} | (
            columns & self.also
        )

    def missing(self, columns: set[str]) -> list[str]:
        return sorted(names[0] for names in self.needs if not columns.intersection(names))


def _format(needs: str, convert: Callable[[TrackedRow], list[Message]], rich: bool = False, also: str = "") -> Format:
    """`needs` lists columns by spaces, and other names of a column by `|`."""
    return Format(tuple(tuple(names.split("|")) for names in needs.split()), convert, rich, frozenset(also.split()))


def _turns(*columns: str) -> Callable[[TrackedRow], list[Message]]:
    def convert(row: TrackedRow) -> list[Message]:
        field = row.first(columns) or columns[0]
        return with_context(row, conversation(list_of_turns(row[field], field), field))

    return convert


class _Pair:
    """A question and its answer; `extra` are columns that go on with the question."""

    def __init__(self, question: str, *answer: str, extra: tuple[str, ...] = ()) -> None:
        self.question, self.answer, self.extra = question, answer, extra

    def __call__(self, row: TrackedRow) -> list[Message]:
        further = (text_of(row, field) for field in self.extra if field in row)
        asked = "\n\n".join((text_of(row, self.question), *filter(None, further)))
        answer = text_of(row, row.first(self.answer) or self.answer[0])
        return with_context(row, [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}])


def _prompt_completion(row: TrackedRow) -> list[Message]:
    prompt = conversation(turns_in_text(row["prompt"]), "prompt")
    return with_context(row, prompt + completion(prompt, row["completion"], "completion"))


def _steps(row: TrackedRow) -> list[Message]:
    """MA-RLHF's and TRL's steps of a solution: one answer, each step of which is trained."""
    prompt = conversation(turns_in_text(row["prompt"]), "prompt")
    steps, labels = (from_json(row.get(name), name, begins="[") for name in ("completions", "labels"))
    if not steps or not isinstance(steps, list | tuple):
        raise FormatError(f"field 'completions': a list of steps expected, found {show(steps)}")
    texts = [check_text(step, f"completions[{i}]") for i, step in enumerate(steps)]
    if not is_empty(labels):
        if not isinstance(labels, list | tuple) or len(labels) != len(steps):
            raise FormatError(
                f"field 'labels': one for each of {len(steps)} completions expected, found {show(labels)}"
            )
        if wrong := [i for i, label in enumerate(labels) if WORDS.get(str(label).strip().lower()) is not True]:
            raise BadAnswer(f"field 'labels[{wrong[0]}]': {show(labels[wrong[0]])} marks a wrong step")
    separator = check_text(row.get("step_separator", "\n"), "step_separator")
    return with_context(row, [*prompt, {"role": "assistant", "content": separator.join(texts)}])


def _chosen(row: TrackedRow) -> list[Message]:
    return with_context(row, dialogue(row, row.first(ALIASES["chosen"]) or "chosen"))


def _better_side(name: str) -> Callable[[TrackedRow], list[Message]]:
    def convert(row: TrackedRow) -> list[Message]:
        sides = SIDES[name](row)
        if sides is None:
            raise BadAnswer("neither answer is a good one")
        return sides["prompt"] + sides["chosen"]

    return convert


def _multiple_choice(row: TrackedRow) -> list[Message]:
    labels, texts = _choices(row)
    field = row.first(ANSWERS) or "answer"
    at = _answer(row[field], field, labels, texts)
    for other in filter(row.__contains__, ANSWERS):  # says the same in another way
        if _answer(row[other], other, labels, texts) != at:
            raise FormatError(f"fields {field!r} and {other!r} mean different choices: {row[field]!r}, {row[other]!r}")
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    question = text_of(row, "question" if "question" in row else "Question")
    user = {"role": "user", "content": f"{question}\n{options}"}
    return with_context(row, [user, {"role": "assistant", "content": f"{labels[at]}. {texts[at]}"}])


def _choices(row: TrackedRow) -> tuple[list[str], list[str]]:
    """Labels and texts: of a list, of objects or lists with both, of an object of texts, or of columns A, B, ..."""
    letters, field = string.ascii_uppercase, row.first(CHOICES) or "choices"
    choices: Any = {letter: row[letter] for letter in letters if letter in row} if field not in row else row[field]
    choices = from_json(choices, field, begins=("[", "{"))
    if choices and are_objects(choices):
        choices = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
    elif isinstance(choices, list | tuple):
        choices = {"text": choices, "label": list(letters[: len(choices)])}
    elif isinstance(choices, dict) and "text" not in choices:
        choices = {"text": list(choices.values()), "label": list(choices)}
    texts, labels = (choices.get(name) if isinstance(choices, dict) else None for name in ("text", "label"))
    if not isinstance(texts, list | tuple) or not isinstance(labels, list | tuple) or not 0 < len(texts) == len(labels):
        raise FormatError(f"field {field!r}: equally many texts and labels expected, found {show(choices)}")
    texts = [check_text(text, f"{field}[{i}]") for i, text in enumerate(texts)]
    labels = [check_text(_key(label, field), f"{field}.label") for label in labels]
    marks = [re.match(rf"\(?{re.escape(label)}[).:]\s*", text) for label, text in zip(labels, texts, strict=True)]
    if all(marks):  # AQuA's options begin with their letters
        texts = [text[mark.end() :] for mark, text in zip(marks, texts, strict=True) if mark]
    return labels, texts


def _key(value: Any, field: str) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool) or not str(value).strip():
        raise FormatError(f"field {field!r} and the labels: letters or numbers expected, found {show(value)}")
    return str(value)


def _answer(value: Any, field: str, labels: list[str], texts: list[str]) -> int:
    """Which choice an answer means: by its label, its text, or its position from 0."""
    key = _key(value, field)
    found = {i for i, label in enumerate(labels) if label == key}
    found = found or {i for i, text in enumerate(texts) if text == value}
    if field != "answerKey" and key.isdecimal() and int(key) < len(labels) and (not found or key not in labels):
        found = found | {int(key)}  # MMLU-like: the answer is a position
    if len(found) != 1:
        raise FormatError(f"field {field!r}: one of {labels} expected, found {show(value)}")
    return found.pop()


def _moss(row: TrackedRow) -> list[Message]:
    """MOSS' `{"turn_1": {"Human": "<|Human|>: ...<eoh>", "MOSS": "<|MOSS|>: ...<eom>", ...}, ...}`; or turns."""
    if not isinstance(row["chat"], dict):
        return with_context(row, conversation(list_of_turns(row["chat"], "chat"), "chat"))
    turns = []
    # A tool that sorts keys writes turn_10 before turn_2.
    for name, parts in sorted(row["chat"].items(), key=lambda turn: int("0" + re.sub(r"\D", "", turn[0]))):
        if not isinstance(parts, dict):
            raise FormatError(f"field 'chat.{name}': an object with Human and MOSS expected, found {show(parts)}")
        parts = {key: check_text(text, f"chat.{name}.{key}") for key, text in parts.items() if text is not None}
        texts = {key: MOSS_MARKS.sub("", text).strip() for key, text in parts.items()}
        for key in texts.keys() - {"Human", "MOSS"}:
            if texts[key] not in ("", "None"):
                raise FormatError(f"field 'chat.{name}.{key}': MOSS' tools cannot be trained, found {show(texts[key])}")
        turns.append({key: texts[key] for key in ("Human", "MOSS") if key in texts})
    return with_context(row, conversation(turns, "chat"))


def _calls(row: TrackedRow) -> list[Message]:
    call = {"role": "tool_call", "content": row["answers"]}
    return with_context(row, [{"role": "user", "content": text_of(row, "query")}, *conversation(call, "answers")])


FORMATS = {
    "messages": _format("messages", _turns("messages"), rich=True),
    "sharegpt": _format("|".join(SHAREGPT), _turns(*SHAREGPT), rich=True),
    "contents": _format("contents", _turns("contents"), rich=True),
    "moss": _format("chat", _moss, rich=True),
    "alpaca": _format("instruction output", _Pair("instruction", "output", extra=("input",)), also="input"),
    "alpaca-zh": _format("instruction_zh output_zh", _Pair("instruction_zh", "output_zh", extra=("input_zh",))),
    "dolly": _format(
        "instruction response", _Pair("instruction", "response", extra=("input", "context")), also="input"
    ),
    "multiple-choice": _format("question choices answerKey", _multiple_choice),
    "mmlu": _format("question choices answer", _multiple_choice),
    "options": _format("question options answer|answer_idx|answer_index|answerKey|correct", _multiple_choice),
    "ceval": _format("question|Question A B answer|Answer|answerKey", _multiple_choice),
    "prompt-completion": _format("prompt completion", _prompt_completion, rich=True),
    "steps": _format("prompt completions", _steps, rich=True, also="labels step_separator"),
    "preference": _format(" ".join(map("|".join, ALIASES.values())), _better_side("preference"), rich=True),
    "hh-rlhf": _format("chosen|chosen_messages rejected|rejected_messages", _chosen, rich=True),
    "pku-saferlhf": _format(" ".join(("prompt", *PKU)), _better_side("pku-saferlhf")),
    "calls": _format("query tools answers", _calls, rich=True),
    "question-answer": _format("question answer", _Pair("question", "answer")),
    "question-response": _format("question response", _Pair("question", "response")),
    "query-response": _format("query response", _Pair("query", "response")),
    "prompt-response": _format("prompt response|output|answer", _Pair("prompt", "response", "output", "answer")),
    "problem-solution": _format("problem solution", _Pair("problem", "solution")),
    "input-output": _format("input output", _Pair("input", "output")),
    "text": _format("text", lambda row: [{"role": "assistant", "content": text_of(row, "text")}]),
}

COLUMNS = frozenset(name for known in FORMATS.values() for names in known.needs for name in names)


def detect_format(row: Iterable[str]) -> str:
    """Name of the one format in `FORMATS` whose columns are all there.

    Of two that fit, one that needs all columns of the other and more wins (`mmlu` over `question-answer`). `text` is
    only for rows that have no column of another format, and none that makes the text a part of something.

    Args:
        row: the row, or the names of its columns alone; of several formats that fit, the row shows which ones work.

    Raises:
        FormatError: none fits, or several do; the message lists the columns and the formats that come nearest.
    """
    columns = set(row)
    fits = {name: known.found(columns) for name, known in FORMATS.items() if not known.missing(columns)}
    fits = {name: own for name, own in fits.items() if not any(own < other for other in fits.values())}
    if columns & (COLUMNS | STRANGERS) != {"text"}:
        fits.pop("text", None)
    names = list(fits)
    if len(names) > 1 and isinstance(row, Mapping):
        names = [name for name in names if all(_may_hold(row[column], name) for column in fits[name])] or names
    if len(names) == 1:
        return names[0]
    if names:
        raise FormatError(
            f"ambiguous format: columns {show_columns(columns)} fit {' and '.join(names)}; "
            "say which: format (dataset_format in a recipe)"
        )
    raise FormatError(f"unknown format: columns {show_columns(columns)}; {_nearest(columns)}")


def _may_hold(value: Any, name: str) -> bool:
    """Whether a column of a format can hold such a value: turns where it needs turns, else a text."""
    if name in ("messages", "sharegpt", "contents", "moss"):
        return isinstance(value, list | tuple | dict) or str(value).lstrip().startswith("[")
    return isinstance(value, str) or not isinstance(FORMATS[name].convert, _Pair)


def _nearest(columns: set[str]) -> str:
    near = {name: known.missing(columns) for name, known in FORMATS.items() if known.found(columns) and name != "text"}
    best = [f"{name} (misses {', '.join(near[name])})" for name in sorted(near, key=lambda name: len(near[name]))[:3]]
    text = f"a text beside {show_columns(columns - {'text'})} is trained only where asked: format: text; "
    return (
        (text if "text" in columns else "")
        + (f"nearest: {'; '.join(best)}" if best else f"known formats: {', '.join(FORMATS)}")
        + "; map columns to these names (datasets: [{path: ..., columns: {theirs: ours}}]), or pass format "
        "(dataset_format in a recipe)"
    )


def to_messages(row: Row, format: str | None = None) -> list[Message]:
    """One raw row as messages: `[{"role": "system" | "user" | "assistant" | "tool", "content": str, ...}, ...]`.

    A message has `tool_calls`, `tool_call_id`, `name` and `reasoning_content` where the row has them, under these or
    other common names, and `"train": False` where the row says that it must not be trained. Tool calls are in OpenAI's
    form with their arguments as JSON text.

    Args:
        row: column -> value.
        format: a name in `FORMATS`, or a function of the user's as `module:function` or `file.py:function`;
            None to go by the columns that are not null.

    Raises:
        FormatError: an unknown or ambiguous format, a missing or wrong field, roles out of order, no response to
            train on, a column that would change what the row means.
        BadAnswer: the row says that its answer is a bad one.
    """
    return read_row(row, format).messages


def read_row(row: Row, format: str | None = None, *, merge: bool = False) -> Conversation:
    """All that a raw row says; arguments and errors as `to_messages`, `merge` joins neighbours of one role."""
    tracked = TrackedRow(row)
    name = format or detect_format(tracked)
    if name not in FORMATS:
        messages, unused = conversation(load_function(name)(row), f"{name} gave messages"), {}
    else:
        messages = _known(tracked, name, merge)
    tools, variables = to_tools(tracked), to_template_kwargs(tracked)
    unused = unused_of(tracked) if name in FORMATS else {}
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise FormatError(f"no response to train on: roles are {[m['role'] for m in messages]}")
    if all(m.get("train") is False for m in answers):
        raise FormatError("every answer is marked not to be trained, so there is nothing to train on")
    if all(is_blank(m["content"]) and not m.get("tool_calls") for m in answers):
        raise FormatError("the response is empty, so there is nothing to train on")
    return Conversation(messages, tools, variables, unused)


def _known(row: TrackedRow, name: str, merge: bool) -> list[Message]:
    known = FORMATS[name]
    # A preference's prompt may be implicit.
    need(row, [column for column in known.missing(set(row)) if (name, column) != ("preference", "prompt")], name)
    messages = known.convert(row)
    refuse_changing(row, name)
    if name == "text":
        if is_blank(messages[0]["content"]):
            raise FormatError("field 'text' is empty, so there is nothing to train on")
        return messages
    _check_verdict(row)
    messages = merge_turns(messages) if merge else messages
    check_order(messages, ", ".join(sorted(known.columns)))
    return messages


@lru_cache(maxsize=10_000)
def _matches(pattern: re.Pattern[str], column: str) -> bool:
    return pattern.fullmatch(column) is not None


def refuse_changing(row: TrackedRow, format: str) -> None:
    """Raise `FormatError` at a column that nothing read and that would change what the row says.

    It is a `BadAnswer` where the column says that the row's answer is a bad one, or must not be trained.
    """
    for field, value in row.items():
        if field not in row.used and _matches(CHANGING, field) and not is_empty(value):
            raise FormatError(
                f"field {field!r}: only text can be trained on, and format {format!r} has no place for {show(value)}; "
                f"if the row says the same without it, leave it out (ignore: [{field}])"
            )
    _check_marks(row)


def _check_marks(row: TrackedRow) -> None:
    for field in sorted(row.keys() & ROW_MARKS - row.used):
        value = dict.get(row, field)
        word = WORDS.get(str(value).strip().lower())
        if word is None and field in WEIGHT_KEYS and not is_empty(value):
            raise FormatError(
                f"field {field!r}: a row is trained (1) or not (0); found {show(value)}; if it says something else, "
                f"leave it out (ignore: [{field}])"
            )
        if word is (field in BAD):
            raise BadAnswer(f"field {field!r}: {show(value)} marks a bad answer")
        if word is not None:
            row.used.add(field)


def _check_verdict(row: TrackedRow) -> None:
    for field in row.keys() & set(VERDICTS) - row.used:
        value = dict.get(row, field)
        word = value.strip().lower() if isinstance(value, str) else value
        if word is False or word == "false" or (field == "kto_tag" and word in (0, "0")):
            raise BadAnswer(f"field {field!r}: {show(value)} marks a bad answer")
        if word is True or word == "true" or field == "kto_tag":
            row.used.add(field)
        elif word in (0, 1):
            raise FormatError(
                f"field 'label': found {show(value)}; if it says whether the answer is good, write true or false, "
                "if not, leave it out (ignore: [label])"
            )


def unused_of(row: TrackedRow) -> dict[str, str]:
    """The columns, and the keys of turns, that nothing read and that may mean something; each with its value, short."""
    found = {}
    for column, value in row.items():
        if column not in row.used:
            if not is_empty(value) and not _matches(HARMLESS, column):
                found[column] = show(value)
        elif isinstance(value, list | tuple) and column not in ("tools", "functions"):
            keys = unknown_keys(list(value))
            # ChatGLM names the tool that a turn calls in a text of metadata.
            calls = {"metadata"} if isinstance(keys.get("metadata"), str) else set()
            found |= {f"{column}[].{k}": show(v) for k, v in keys.items() if k in calls or not _matches(HARMLESS, k)}
    return found


def to_messages_batch(
    batch: dict[str, list[Any]], indices: list[int] | None = None, *, format: str | None = None
) -> dict[str, list[Any]]:
    """`to_messages` for `datasets.map`: columns of raw rows become the columns `messages` and `tools`.

        rows.map(to_messages_batch, batched=True, with_indices=True, remove_columns=rows.column_names,
                 features=message_features())

    Raises:
        FormatError: as `to_messages`, naming the row (from 1) if there are `indices`.
    """
    columns: dict[str, list[Any]] = {"messages": [], "tools": []}
    for at, values in enumerate(zip(*batch.values(), strict=True)):
        try:
            found = read_row(dict(zip(batch, values, strict=True)), format)
        except FormatError as error:
            raise FormatError(f"row {indices[at] + 1}: {error}" if indices else str(error)) from None
        columns["messages"].append(found.messages)
        columns["tools"].append(found.tools)
    return columns


def message_features(*columns: str, rich: bool = True) -> Any:
    """`datasets.Features` of the lists of messages in `columns` (by default `messages`) and of `tools`.

    With them the first rows do not decide which keys the messages of later rows may have. `rich=False` is for formats
    whose messages hold text alone.
    """
    from datasets import Features, List, Value

    text = Value("string")
    message: dict[str, Any] = {"role": text, "content": text}
    if rich:
        call = {"id": text, "type": text, "function": {"name": text, "arguments": text}}
        message |= {"reasoning_content": text, "tool_calls": List(call), "tool_call_id": text, "name": text}
        message |= {"train": Value("bool")}
    return Features({**{column: List(message) for column in columns or ("messages",)}, "tools": text})
