"""Raw rows -> OpenAI-style messages, for every common format.

A format is known by its columns: `FORMATS` lists them with the function that makes messages of them. What a row says in
further columns is used (`ma_sft.data.messages`), known to be harmless, refused, or named as unused.
"""

import re
import string
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from ma_sft.data.functions import load_function
from ma_sft.data.messages import (
    BAD,
    MARKS,
    PAIR_ROLES,
    ROLE_KEYS,
    ROLES,
    TURN_KEYS,
    WEIGHTS,
    BadAnswer,
    Message,
    Row,
    TrackedRow,
    are_objects,
    check_order,
    check_text,
    conversation,
    expected,
    from_json,
    is_blank,
    is_empty,
    list_of_turns,
    merge_turns,
    show,
    show_columns,
    text_of,
    to_template_kwargs,
    to_tools,
    truth,
    with_context,
)
from ma_sft.data.preference import ALIASES, PKU, SIDES, Preference, completion, prompt_turns, spread
from ma_sft.errors import FormatError

TURNS = ("messages", "sharegpt", "contents", "moss")  # formats whose column holds the whole conversation
QUESTIONS = ("question", "Question", "question_stem", "query", "ctx")  # of choices
CHOICES = ("choices", "options", "endings")
ANSWERS = ("answerKey", "answer_idx", "answer_index", "answer", "Answer", "correct", "correct_option")
ROW_MARKS = MARKS | {"kto_tag", "label"}  # KTO's among them
STRANGERS = frozenset(("label", "labels", "target", "code", "role", "parent_id"))  # of these, a text is only a part

# Columns that change what a row says: where no format reads them, the row is refused.
CHANGING = re.compile(
    r"((image|img|picture|audio|video)s?|pixel_values)([_-]?(path|url|file|byte|list)s?)?|"
    r"choices|options|endings|distractors?_?\d*|(option|choice|ending|op|sol)[ _]?[a-e1-9]|[a-e]|"
    r".*(thinking|thoughts?)(_.*)?|reasoning_content|speakers",
    re.IGNORECASE,
)

# Columns that say something about a row, and nothing that a conversation would lose.
HARMLESS = re.compile(
    r"(.*[_-])?(id|idx|index|uuid|hash|url|score|count|tokens|length|path|name|version|date|time|timestamp|ip|model|"
    r"rating|type|category|source|identifier|fingerprint|moderation|sha\d+)|Unnamed: 0|"
    r"|(data_?)?set|split|subset|config|origin|raw|lang|langdetect|language|locale|country|state|header|license|licence|"
    r"copyright|author|creator|generator|categories|kind|task|topics?|domain|subject|tags?|difficulty|level|quality|"
    r"created|updated|(created|updated)_at|meta|metadata|rejected.*|neg_resp|turn|num_turns|group|title|toxic|toxicity|"
    r"redacted|key|keywords|rank|reward|stars|(score|rating)_.*|upvotes|used_in.*|synthetic|_.*",
    re.IGNORECASE,
)

# Chinese headers of tables
CHINESE = {
    **dict.fromkeys("问题 提问 题目 问".split(), "question"),
    **dict.fromkeys("答案 回答 答".split(), "answer"),
    **dict.fromkeys(("指令", "任务"), "instruction"),
    **dict.fromkeys(("回复", "响应"), "response"),
    **dict.fromkeys(("提示", "提示词"), "prompt"),
    **{"输入": "input", "输出": "output", "上下文": "context", "系统提示": "system", "文本": "text"},
    **{"对话": "conversations", "选项": "options"},
}
MOSS_MARKS = re.compile(r"^\s*<\|[^|]*\|>:\s*|<eo[a-z]>\s*$")


@dataclass(frozen=True)
class Format:
    """Which columns a row must have, how it becomes messages, and whether these can hold more than text (`rich`).

    `columns` are parted by spaces, other names of a column by `|`; `also` are further columns that are the format's.
    """

    columns: str
    convert: Callable[[TrackedRow], list[Message]]
    rich: bool = False
    also: str = ""

    @cached_property
    def needs(self) -> list[list[str]]:
        return [names.split("|") for names in self.columns.split()]

    def found(self, columns: set[str]) -> set[str]:
        """Of these columns, those that are the format's."""
        return {*re.split(r"[| ]", self.columns), *self.also.split()} & columns

    def missing(self, columns: set[str]) -> list[str]:
        return sorted(names[0] for names in self.needs if columns.isdisjoint(names))


def _turns(columns: str) -> Format:
    """A conversation in turns, under one of the names of the first column."""
    names = columns.split()[0].split("|")

    def convert(row: TrackedRow) -> list[Message]:
        field = row.first(names) or names[0]
        return with_context(row, conversation(list_of_turns(row[field], field), field), whole=True)

    return Format(columns, convert, rich=True)


def _pair(columns: str, extra: str = "", *, rich: bool = False, also: str = "") -> Format:
    """A question and its answer, as texts or, where the format is rich, as turns; between them its reasoning, if any.

    `extra` are columns that go on with the question.
    """
    questions, *thoughts, answers = (names.split("|") for names in columns.split())

    def convert(row: TrackedRow) -> list[Message]:
        field, to = (row.first(names) or names[0] for names in (questions, answers))
        asked = row[field]
        prompt = prompt_turns(asked, field) if rich else [{"role": "user", "content": check_text(asked, field)}]
        if further := [text_of(row, name) for name in extra.split() if name in row and name != field]:
            prompt[-1]["content"] = "\n\n".join(filter(None, (prompt[-1]["content"], *further)))
        said = _single(row[to])
        answer = completion(prompt, said, to, asked) if rich else []
        answer = answer or [{"role": "assistant", "content": check_text(said, to)}]
        for name in filter(None, map(row.first, thoughts)):
            if thought := text_of(row, name):
                answer[-1]["reasoning_content"] = thought
        return with_context(row, prompt + answer)

    return Format(columns, convert, rich, f"{extra} {also}")


def _single(value: Any) -> Any:
    """The one text in a list of answers, or in SQuAD's object of them; any other value as it is."""
    texts = value.get("text") if isinstance(value, dict) else value
    if isinstance(texts, list | tuple) and len(texts) == 1 and isinstance(texts[0], str):
        return texts[0]
    return value


def _steps(row: TrackedRow) -> list[Message]:
    """MA-RLHF's and TRL's steps of a solution: one answer, each step of which is trained."""
    prompt = prompt_turns(row["prompt"], "prompt")
    steps, labels = (from_json(row.get(name), name, begins="[") for name in ("completions", "labels"))
    if not steps or not isinstance(steps, list | tuple):
        raise expected("a list of steps", "completions", steps)
    texts = [check_text(step, f"completions[{i}]") for i, step in enumerate(steps)]
    if not is_empty(labels):
        if not isinstance(labels, list | tuple) or len(labels) != len(steps):
            raise expected(f"one for each of {len(steps)} completions", "labels", labels)
        if wrong := [i for i, label in enumerate(labels) if truth(label) is not True]:
            raise BadAnswer(f"field 'labels[{wrong[0]}]': {show(labels[wrong[0]])} marks a wrong step")
    separator = check_text(row.get("step_separator", "\n"), "step_separator")
    return with_context(row, [*prompt, {"role": "assistant", "content": separator.join(texts)}])


def _better_side(name: str) -> Callable[[TrackedRow], list[Message]]:
    return lambda row: (sides := SIDES[name](row))["prompt"] + sides["chosen"]


def _multiple_choice(row: TrackedRow) -> list[Message]:
    labels, texts = _choices(row)
    fields = [field for field in ANSWERS if field in row] or ["label"]
    found = {field: _answer(row[field], field, labels, texts) for field in fields}
    if len({*found.values()}) > 1:
        both, values = " and ".join(map(repr, found)), ", ".join(repr(row[field]) for field in found)
        raise FormatError(f"fields {both} mean different choices: {values}")
    at = next(iter(found.values()))
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    question = text_of(row, row.first(QUESTIONS) or "question")
    user = {"role": "user", "content": f"{question}\n{options}"}
    return with_context(row, [user, {"role": "assistant", "content": f"{labels[at]}. {texts[at]}"}])


def _choices(row: TrackedRow) -> tuple[list[str], list[str]]:
    """Labels and texts: of a list, of objects or lists with both, of an object of texts, or of columns A, B, ..."""
    letters, field = string.ascii_uppercase, row.first(CHOICES) or "choices"
    choices: Any = row[field] if field in row else {letter: row[letter] for letter in letters if letter in row}
    choices = from_json(choices, field, begins=("[", "{"))
    labels, texts = None, choices
    if isinstance(choices, dict) and "text" in choices:
        labels, texts = choices.get("label"), choices["text"]
    elif isinstance(choices, dict):
        labels, texts = list(choices), list(choices.values())
    elif choices and are_objects(choices):
        labels, texts = ([choice.get(name) for choice in choices] for name in ("label", "text"))
    elif isinstance(choices, list | tuple):
        labels = list(letters[: len(choices)])
    if not isinstance(texts, list | tuple) or not isinstance(labels, list | tuple) or not 0 < len(texts) == len(labels):
        raise expected("equally many texts and labels", field, choices)
    texts = [check_text(text, f"{field}[{i}]") for i, text in enumerate(texts)]
    labels = [check_text(str(label) if type(label) is int else label, f"{field}.label") for label in labels]
    marks = [re.match(rf"\(?{re.escape(label)}[).:]\s*", text) for label, text in zip(labels, texts, strict=True)]
    if all(marks):  # AQuA's options begin with their letters
        texts = [text[mark.end() :] for mark, text in zip(marks, texts, strict=True) if mark]
    return labels, texts


def _answer(value: Any, field: str, labels: list[str], texts: list[str]) -> int:
    """Which choice an answer means: by its label, its text, or its position from 0."""
    key = str(value)
    found = {i for i, label in enumerate(labels) if label == key}
    found = found or {i for i, text in enumerate(texts) if text == value}
    if field != "answerKey" and key.isdecimal() and int(key) < len(labels) and (not found or key not in labels):
        found = found | {int(key)}  # MMLU-like: the answer is a position
    if len(found) != 1:
        raise expected(f"one of {labels}", field, value)
    return found.pop()


def _moss(row: TrackedRow) -> list[Message]:
    """MOSS' `{"turn_1": {"Human": "<|Human|>: ...<eoh>", "MOSS": "<|MOSS|>: ...<eom>", ...}, ...}`; or turns."""
    if not isinstance(row["chat"], dict):
        return _turns("chat").convert(row)
    turns = []
    # A tool that sorts keys writes turn_10 before turn_2.
    for name, parts in sorted(row["chat"].items(), key=lambda turn: int("0" + re.sub(r"\D", "", turn[0]))):
        found = {key: text for key, text in parts.items() if text is not None} if isinstance(parts, dict) else {}
        texts = {key: MOSS_MARKS.sub("", check_text(found[key], f"chat.{name}.{key}")).strip() for key in found}
        turn = {key: text for key, text in texts.items() if key in ("Human", "MOSS") or text not in ("", "None")}
        if not turn or turn.keys() - {"Human", "MOSS"}:
            raise expected("Human and MOSS (MOSS' tools cannot be trained)", f"chat.{name}", parts)
        turns.append(turn)
    return with_context(row, conversation(turns, "chat"), whole=True)


def _calls(row: TrackedRow) -> list[Message]:
    call = {"role": "tool_call", "content": row["answers"]}
    return with_context(row, [{"role": "user", "content": text_of(row, "query")}, *conversation(call, "answers")])


ASKED = "question|problem|prompt|instruction|query|input|messages"
THOUGHTS = "reasoning_content|reasoning|thinking|complex_cot"
FORMATS = {
    "messages": _turns("messages"),
    "sharegpt": _turns("conversations|conversation|dialogue|dialog"),
    "contents": _turns("contents"),
    "moss": Format("chat", _moss, rich=True),
    "alpaca": _pair("instruction output", "input", also="prompt answer"),
    "alpaca-zh": _pair("instruction_zh output_zh", "input_zh"),
    "dolly": _pair("instruction response|completion|answer|generation", "input context", also="prompt"),
    "reasoning": _pair(f"{ASKED} {THOUGHTS} answer|response|output|solution|completion|content", "input", rich=True),
    "multiple-choice": Format("question|question_stem choices answerKey", _multiple_choice),
    "mmlu": Format("question choices answer", _multiple_choice),
    "options": Format(
        "question|query|ctx options|endings answer|answer_idx|answer_index|answerKey|correct|correct_option|label",
        _multiple_choice,
    ),
    "ceval": Format("question|Question A B answer|Answer|answerKey", _multiple_choice),
    "prompt-completion": _pair("prompt completion", rich=True),
    "steps": Format("prompt completions", _steps, rich=True, also="labels step_separator"),
    "preference": Format(" ".join(map("|".join, ALIASES.values())), _better_side("preference"), rich=True),
    "hh-rlhf": _turns("chosen|chosen_messages rejected|rejected_messages"),
    "pku-saferlhf": Format(" ".join(("prompt", *PKU)), _better_side("pku-saferlhf")),
    "calls": Format("query tools answers", _calls, rich=True),
    "question-answer": _pair("question|problem|sql_prompt answer|answers|sql"),
    "question-response": _pair("question response|output"),
    "query-response": _pair("query response|answer|output"),
    "prompt-response": _pair("prompt|user|human response|output|answer|target|assistant|bot"),
    "problem-solution": _pair("problem|question solution|generated_solution", also="answer"),
    "input-output": _pair(
        "input|inputs_pretokenized|inputs output|target|targets_pretokenized|targets|response", rich=True
    ),
    "document-summary": _pair("document|article|dialogue summary|highlights"),
    "text": Format("text", lambda row: [{"role": "assistant", "content": text_of(row, "text")}]),
}
COLUMNS = frozenset(name for known in FORMATS.values() for names in known.needs for name in names)


@lru_cache
def known_names(columns: frozenset[str], format: str | None = None) -> dict[str, str]:
    """`{name in the data: name that a format wants}` for headers in another case (`Question`) or in Chinese.

    It is empty where the names are a format's already, or would be none's.
    """
    names = {name: re.sub(r"\W+", "_", CHINESE.get(name.strip(), name.strip().lower())) for name in columns}
    formats = [known for name, known in FORMATS.items() if format in (None, name)]
    fits = [any(not known.missing(found) for known in formats) for found in ({*columns}, {*names.values()})]
    if fits != [False, True] or len({*names.values()}) < len(names):
        return {}
    return {theirs: ours for theirs, ours in names.items() if theirs != ours}


def detect_format(row: Row, among: Collection[str] = FORMATS) -> str:
    """Name of the one format in `FORMATS` whose columns are all there, if need be under their `known_names`.

    Of two that fit, one that needs all columns of the other and more wins (`mmlu` over `question-answer`). `text` is
    only for rows that have no column of another format, and none that makes the text a part of something.

    Args:
        row: column -> value; of several formats that fit, the values tell which ones work.
        among: names of `FORMATS`; those of preferences alone, where both answers are wanted.

    Raises:
        FormatError: none fits, or several do; the message lists the columns and the formats that come nearest.
    """
    given = row if among is FORMATS else spread(TrackedRow(row))
    names = known_names(frozenset(given))
    values = {names.get(name, name): value for name, value in given.items()}
    columns = {*values}
    fits = {name: FORMATS[name].found(columns) for name in among if not FORMATS[name].missing(columns)}
    fits = {name: own for name, own in fits.items() if _may_hold({key: values[key] for key in own}, name)} or fits
    fits = {name: own for name, own in fits.items() if not any(own < other for other in fits.values())}
    if columns & (COLUMNS | STRANGERS) != {"text"}:
        fits.pop("text", None)
    if not fits.keys().isdisjoint(TURNS):  # texts beside turns say the same once more, or a part of it
        fits = {name: own for name, own in fits.items() if name in (*TURNS, *SIDES)}
    if len(fits) == 1:
        return next(iter(fits))
    if fits:
        raise FormatError(
            f"ambiguous format: columns {show_columns(columns)} fit {' and '.join(fits)}; "
            "say which: format (dataset_format in a recipe)"
        )
    raise FormatError(f"unknown format: columns {show_columns(given)}; {_nearest({*given}, among)}")


def _may_hold(values: Row, name: str) -> bool:
    """Whether a format can hold such values: turns where it needs turns, no flag where it needs a reasoning."""
    if name in TURNS:
        return any(isinstance(v, list | tuple | dict) or str(v).lstrip()[:1] in ("[", "U") for v in values.values())
    return name != "reasoning" or values.get("reasoning") not in ("on", "off", True, False)


def _nearest(columns: set[str], among: Collection[str]) -> str:
    """What to do about columns that no format has."""
    near = [(FORMATS[name].missing(columns), name) for name in among if name != "text"]
    near = sorted((each for each in near if len(each[0]) < len(FORMATS[each[1]].needs)), key=lambda each: len(each[0]))
    best = [f"{name} (misses {', '.join(missing)})" for missing, name in near[:3]]
    advice = f"nearest: {'; '.join(best)}" if best else "known are a question and its answer, messages, text"
    if "text" in columns:
        advice = f"a text beside {show_columns(columns - {'text'})} is trained only where asked: format: text; {advice}"
    return (
        f"{advice}; map columns to these names (datasets: [{{path: ..., columns: {{theirs: ours}}}}]), or pass format "
        "(dataset_format in a recipe), the name of one or a function of yours (file.py:function)"
    )


def to_messages(row: Row, format: str | Callable[[Row], Any] | None = None) -> list[Message]:
    """One raw row as messages: `[{"role": "system" | "user" | "assistant" | "tool", "content": str, ...}, ...]`.

    A message has `tool_calls` (OpenAI's, arguments as JSON text), `tool_call_id`, `name` and `reasoning_content` where
    the row has them, under these or other names, and `"train": False` where the row says that it must not be trained.

    Args:
        row: column -> value.
        format: a name in `FORMATS`, or a function of the user's, itself or as `module:function` or `file.py:function`;
            None to go by the columns that are not null.

    Raises:
        FormatError: a row of no known format, a wrong field, roles out of order, no response to train on, a column that
            would change what the row means; as `BadAnswer` where the row says that its answer is a bad one.
    """
    messages: list[Message] = read_row(row, format)["messages"]
    return messages


def to_preference(row: Row, format: str | Callable[[Row], Any] | None = None) -> Preference | None:
    """One raw row as `{"prompt": messages, "chosen": messages, "rejected": messages}`.

    `prompt` ends with the user's (or a tool's) turn; `chosen` and `rejected` are the two answers.

    Args:
        row: column -> value; null columns count as missing.
        format: `preference`, `hh-rlhf`, `pku-saferlhf` or a function of the user's that returns the three columns,
            itself or as `module:function` or `file.py:function`; None to go by the columns.

    Returns:
        None where neither answer should be learned: PKU-SafeRLHF's rows with two unsafe responses, rows that are marked
        as bad ones. There, a safe response beats an unsafe one, and `better_response_id` decides between two safe ones
        (arXiv 2406.15513).

    Raises:
        FormatError: an unknown format, a missing or wrong field, an empty answer, or two equal answers.
    """
    try:
        found = read_row(row, format, preference=True)
    except BadAnswer:
        return None
    return {side: found[side] for side in ALIASES}


def read_row(
    row: Row, format: str | Callable[[Row], Any] | None = None, *, merge: bool = False, preference: bool = False
) -> Row:
    """A converted row: `messages`, or those of `prompt`, `chosen` and `rejected`; `tools` and `chat_template_kwargs` as
    JSON text or None; and `unused`, what to say of columns that nothing read. `merge` joins neighbours of one role.

    Errors as `to_messages`; `BadAnswer` also of a preference without a better side.
    """
    tracked, formats = TrackedRow(row), SIDES if preference else FORMATS
    name = format or detect_format(tracked, formats)
    ordered = ""  # the fields whose roles have an order: not those of a text, nor of a function
    if known := isinstance(name, str) and name in formats:
        if names := known_names(frozenset(tracked), name):
            tracked = TrackedRow({names.get(column, column): value for column, value in tracked.items()})
        if missing := [] if preference else FORMATS[name].missing({*tracked}):
            raise FormatError(f"field {missing[0]!r} is missing or null; format {name!r} needs it")
        sides = SIDES[name](tracked) if preference else {"messages": FORMATS[name].convert(tracked)}
        if not preference and name != "text":
            ordered = ", ".join(sorted(names[0] for names in FORMATS[name].needs))
        refuse_changing(tracked, name, ROW_MARKS if ordered else ROW_MARKS - {"label"})
    else:
        given = load_function(name)(row)
        if preference and not given:
            raise BadAnswer("neither answer is a good one")
        made = f"{getattr(name, '__name__', name)} gave messages"
        sides = SIDES["preference"](TrackedRow(given)) if preference else {"messages": conversation(given, made)}
    if merge:
        sides = {side: merge_turns(turns) for side, turns in sides.items()}
    prompt, *answers = sides.values() if preference else ([], sides["messages"])
    for said in answers:
        if preference or ordered:
            check_order(prompt + said, ", ".join(sides) if preference else ordered)
        _check_answers(said)
    if answers[0] == answers[-1] and preference:
        raise FormatError("fields 'chosen' and 'rejected': the two answers are the same, so neither is better")
    tools, variables = to_tools(tracked), to_template_kwargs(tracked)
    unused = unused_of(tracked, prompt + answers[0]) if known else {}
    return {**sides, "tools": tools, "chat_template_kwargs": variables, "unused": unused}


def _check_answers(messages: list[Message]) -> None:
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise FormatError(f"no response to train on: roles are {[m['role'] for m in messages]}")
    if all(m.get("train") is False for m in answers):
        raise FormatError("every answer is marked not to be trained, so there is nothing to train on")
    if all(map(is_blank, answers)):
        raise FormatError("the response is empty, so there is nothing to train on")


@lru_cache(maxsize=10_000)
def _matches(pattern: re.Pattern[str], column: str) -> bool:
    return pattern.fullmatch(column) is not None


def refuse_changing(row: TrackedRow, format: str, marks: frozenset[str]) -> None:
    """Raise `FormatError` at a column that nothing read and that would change what the row says.

    It is a `BadAnswer` where the column says that the row's answer is a bad one, or must not be trained.
    """
    for field, value in row.items():
        if field not in row.used and _matches(CHANGING, field) and not is_empty(value):
            raise FormatError(
                f"field {field!r}: only text can be trained on, and format {format!r} has no place for {show(value)}; "
                f"if the row says the same without it, leave it out (ignore: [{field}])"
            )
    for field in sorted((row.keys() & marks) - row.used):
        value = dict.get(row, field)
        good = truth(value)
        unclear = good is None and field in WEIGHTS and not is_empty(value)
        if unclear or (field == "label" and str(value).strip().lower() in ("0", "1", "0.0", "1.0", "yes", "no")):
            what = f"found {show(value)}; if it says whether to train the row, write true or false"
            raise FormatError(f"field {field!r}: {what}, if not, leave it out (ignore: [{field}])")
        if good is (field in BAD):
            raise BadAnswer(f"field {field!r}: {show(value)} marks a bad answer")
        if good is not None:
            row.used.add(field)


def unused_of(row: TrackedRow, messages: list[Message]) -> dict[str, str]:
    """What to say of columns, and keys of turns, that nothing read and that may mean something, and of other roles."""
    found: dict[str, Any] = {}
    speaks = {*ROLE_KEYS, *PAIR_ROLES}
    said = [messages, *(message["content"] for message in messages)]  # what stands there once more is not lost
    for column, value in row.items():
        if column not in row.used:
            if not is_empty(value) and not _matches(HARMLESS, column) and value not in said:
                found[column] = value
        elif isinstance(value, list | tuple) and column not in ("tools", "functions"):
            odd = [t for t in value if isinstance(t, dict) and t.keys() - TURN_KEYS and not speaks.isdisjoint(t)]
            pairs = [(k, v) for turn in reversed(odd) for k, v in turn.items() if k not in TURN_KEYS]
            keys = {k: v for k, v in pairs if not is_empty(v)}  # of each the first value that says something
            # ChatGLM names the tool that a turn calls in a text of metadata.
            calls = {"metadata"} if isinstance(keys.get("metadata"), str) else set()
            found |= {f"{column}[].{k}": v for k, v in keys.items() if k in calls or not _matches(HARMLESS, k)}
    told = {column: f"is not used ({show(value)})" for column, value in found.items()}
    turns = dict.get(row, "messages")
    roles = {str(turn.get("role")) for turn in turns if isinstance(turn, dict)} if isinstance(turns, list) else set()
    other = {role for role in roles if ROLES.get(role.lower(), role) != role}
    return told | {f"role {role}": f"is read as {ROLES[role.lower()]}" for role in other}


def to_messages_batch(
    batch: dict[str, list[Any]], indices: list[int] | None = None, *, format: str | None = None
) -> dict[str, list[Any]]:
    """`to_messages` for `datasets.map`: columns of raw rows become `messages` and `tools`, of `message_features`.

    Raises:
        FormatError: as `to_messages`, naming the row (from 1) if there are `indices`.
    """
    columns: dict[str, list[Any]] = {"messages": [], "tools": []}
    for at, values in enumerate(zip(*batch.values(), strict=True)):
        try:
            row = read_row(dict(zip(batch, values, strict=True)), format)
        except FormatError as error:
            raise FormatError(f"row {indices[at] + 1}: {error}" if indices else str(error)) from None
        columns["messages"].append(row["messages"])
        columns["tools"].append(row["tools"])
    return columns


def message_features(*columns: str, rich: bool = True) -> Any:
    """`datasets.Features` of the lists of messages in `columns` (by default `messages`) and of `tools`.

    `rich=False` is for formats whose messages hold text alone.
    """
    from datasets import Features, List, Value

    text = Value("string")
    message: dict[str, Any] = {"role": text, "content": text}
    if rich:
        call = {"id": text, "type": text, "function": {"name": text, "arguments": text}}
        message |= {"reasoning_content": text, "tool_calls": List(call), "tool_call_id": text, "name": text}
        message |= {"train": Value("bool")}
    return Features({**{column: List(message) for column in columns or ("messages",)}, "tools": text})
