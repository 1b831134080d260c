"""Raw rows -> OpenAI-style messages, for every common format; and the classic text form for `formatting_func`.

A format is known by its columns. Each error is a `FormatError` that names the source, the row and the field.
"""

import importlib
import json
import runpy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ma_sft.errors import FormatError, RecipeError

Message = dict[str, Any]


Row = dict[str, Any]


ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bard", "claude", "chatbot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"),
}


CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's: an assistant turn whose text is the call as JSON


REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


# What may come before a role; None is the start of the conversation.
BEFORE: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _alpaca(row: Row, suffix: str = "") -> list[Message]:
    instruction, extra = _text(row, f"instruction{suffix}"), _text(row, f"input{suffix}", optional=True)
    history = row.get("history") or []
    if not isinstance(history, list | tuple) or any(not isinstance(p, list | tuple) or len(p) != 2 for p in history):
        raise FormatError(f"field 'history': a list of [question, answer] pairs expected, found {_show(history)}")
    turns = [_check_text(text, f"history[{i}]") for i, pair in enumerate(history) for text in pair]
    turns += [f"{instruction}\n\n{extra}" if extra else instruction, _text(row, f"output{suffix}")]
    return system_message(row) + [
        {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
    ]


def _sharegpt(row: Row) -> list[Message]:
    turns = _turns(row, "conversations")
    role, content = ("from", "value") if "from" in turns[0] else ("role", "content")
    return system_message(row) + [_message(t, f"conversations[{i}]", role, content) for i, t in enumerate(turns)]


def _messages(row: Row) -> list[Message]:
    return [_message(t, f"messages[{i}]", "role", "content") for i, t in enumerate(_turns(row, "messages"))]


def conversation(value: Any, field: str, role: str = "user") -> list[Message]:
    """A text as one message of `role`, or a list of messages checked; for prompts, completions and preferences.

    Raises:
        FormatError: neither of the two.
    """
    if isinstance(value, list | tuple):
        return [_message(t, f"{field}[{i}]", "role", "content") for i, t in enumerate(_turns({field: value}, field))]
    return [{"role": role, "content": _check_text(value, field)}]


def _prompt_completion(row: Row) -> list[Message]:
    prompt = system_message(row) + conversation(row["prompt"], "prompt")
    return prompt + conversation(row["completion"], "completion", "assistant")


def completion(prompt: list[Message], value: Any, field: str) -> list[Message]:
    """The messages that answer `prompt`: a text, or a list of messages, which may begin with the prompt itself."""
    messages = conversation(value, field, "assistant")
    for start in (prompt, [m for m in prompt if m["role"] != "system"]):
        if start and messages[: len(start)] == start:
            return messages[len(start) :]
    return messages


def _preference(row: Row) -> list[Message]:
    prompt = system_message(row) + conversation(row["prompt"], "prompt")
    return prompt + completion(prompt, row["chosen"], "chosen")


def hh_turns(text: Any, field: str) -> list[Message]:
    """The turns of an hh-rlhf text, `\\n\\nHuman: ...\\n\\nAssistant: ...`.

    Raises:
        FormatError: not such a text.
    """
    text = _check_text(text, field)
    pieces = ("\n\n" + text.lstrip("\n")).replace("\n\nAssistant:", "\0A").replace("\n\nHuman:", "\0H").split("\0")
    if pieces[0].strip() or len(pieces) < 2:
        raise FormatError(f"field {field!r}: '\\n\\nHuman: ...\\n\\nAssistant: ...' expected, found {_show(text)}")
    return [{"role": {"H": "user", "A": "assistant"}[p[0]], "content": p[1:].strip()} for p in pieces[1:]]


def _multiple_choice(row: Row) -> list[Message]:
    choices = row["choices"]
    if isinstance(choices, list | tuple) and choices and all(isinstance(choice, dict) for choice in choices):
        choices = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
    if isinstance(choices, dict):
        texts, labels = choices.get("text"), choices.get("label")
    else:
        texts, labels = choices, [chr(ord("A") + i) for i in range(26)]
        labels = labels[: len(texts)] if isinstance(texts, list | tuple) else None
    if not isinstance(texts, list | tuple) or not isinstance(labels, list | tuple) or not 0 < len(texts) == len(labels):
        raise FormatError(f"field 'choices': equally many texts and labels expected, found {_show(choices)}")
    texts = [_check_text(text, f"choices[{i}]") for i, text in enumerate(texts)]
    field = "answerKey" if row.get("answerKey") is not None else "answer"
    for value in (*labels, row[field]):
        if not isinstance(value, str | int) or isinstance(value, bool) or not str(value).strip():
            raise FormatError(f"field {field!r} and the labels: letters or numbers expected, found {_show(value)}")
    labels, key = [_check_text(str(label), "choices.label") for label in labels], str(row[field])
    if field == "answer" and key not in labels and key.isdecimal() and int(key) < len(labels):
        key = labels[int(key)]  # MMLU-like: `answer` is a position
    if labels.count(key) != 1:
        raise FormatError(f"field {field!r}: one of {labels} expected, found {_show(row[field])}")
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    question = f"{_text(row, 'question')}\n{options}"
    answer = f"{key}. {texts[labels.index(key)]}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _pair(row: Row, question: str, answer: str) -> list[Message]:
    return [
        *system_message(row),
        {"role": "user", "content": _text(row, question)},
        {"role": "assistant", "content": _text(row, answer)},
    ]


@dataclass(frozen=True)
class Format:
    """Which columns a row must have, how it becomes messages, and whether these can hold more than text (`rich`)."""

    columns: frozenset[str]
    convert: Callable[[Row], list[Message]]
    rich: bool = False


def _format(columns: str, convert: Callable[[Row], list[Message]], rich: bool = False) -> Format:
    return Format(frozenset(columns.split()), convert, rich)


FORMATS = {
    "messages": _format("messages", _messages, rich=True),
    "sharegpt": _format("conversations", _sharegpt, rich=True),
    "alpaca": _format("instruction output", _alpaca),
    "alpaca-zh": _format("instruction_zh output_zh", lambda row: _alpaca(row, "_zh")),
    "multiple-choice": _format("question choices answerKey", _multiple_choice),
    "mmlu": _format("question choices answer", _multiple_choice),
    "prompt-completion": _format("prompt completion", _prompt_completion, rich=True),
    "preference": _format("prompt chosen rejected", _preference, rich=True),
    "hh-rlhf": _format("chosen rejected", lambda row: hh_turns(row["chosen"], "chosen")),
    "question-answer": _format("question answer", lambda row: _pair(row, "question", "answer")),
    "query-response": _format("query response", lambda row: _pair(row, "query", "response")),
    "problem-solution": _format("problem solution", lambda row: _pair(row, "problem", "solution")),
    "text": _format("text", lambda row: [{"role": "assistant", "content": _text(row, "text")}]),
}


COLUMNS = frozenset().union(*(known.columns for known in FORMATS.values()))


def detect_format(columns: Iterable[str]) -> str:
    """Name of the one format in `FORMATS` whose columns are all there.

    Of two that fit, one that needs all columns of the other and more wins (`mmlu` over `question-answer`). `text` is
    only for rows that have no column of another format.

    Raises:
        FormatError: none fits, or several do; the message lists the columns and the formats that come nearest.
    """
    columns = set(columns)
    fits = [name for name, known in FORMATS.items() if known.columns <= columns]
    fits = [n for n in fits if not any(FORMATS[n].columns < FORMATS[other].columns for other in fits)]
    if "text" in fits and columns & COLUMNS != {"text"}:
        fits.remove("text")
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise FormatError(
            f"ambiguous format: columns {sorted(columns)} fit {' and '.join(fits)}; "
            "say which: format (dataset_format in a recipe)"
        )
    near = [
        f"{name} (misses {', '.join(sorted(f.columns - columns))})"
        for name, f in FORMATS.items()
        if f.columns & columns and name != "text"
    ]
    raise FormatError(
        f"unknown format: columns {sorted(columns)}; "
        + (f"nearest: {'; '.join(near)}" if near else f"known formats: {', '.join(FORMATS)}")
        + "; map columns to these names (datasets: [{path: ..., columns: {theirs: ours}}]), or pass format "
        "(dataset_format in a recipe)"
    )


def to_messages(row: Row, format: str | None = None) -> list[Message]:
    """One raw row as messages: `[{"role": "system" | "user" | "assistant" | "tool", "content": str, ...}, ...]`.

    A message has `tool_calls`, `tool_call_id`, `name` and `reasoning_content` where the row has them, under these or
    other common names. Tool calls are in OpenAI's form with their arguments as JSON text.

    Args:
        row: column -> value.
        format: a name in `FORMATS`, or a function of the user's as `module:function` or `file.py:function`;
            None to go by the columns that are not null.

    Raises:
        FormatError: an unknown or ambiguous format, a missing or wrong field, roles out of order, no response to
            train on.
    """
    name = format or detect_format(key for key, value in row.items() if value is not None)
    if name in FORMATS:
        missing = sorted(FORMATS[name].columns - {key for key, value in row.items() if value is not None})
        if missing:
            raise FormatError(f"field {missing[0]!r} is missing or null; format {name!r} needs it")
        messages = FORMATS[name].convert(row)
    else:
        messages = conversation(load_function(name)(row), f"{name} gave messages")
    if name == "text" and not messages[0]["content"].strip():
        raise FormatError("field 'text' is empty, so there is nothing to train on")
    if name in FORMATS and name != "text":
        check_order(messages, ", ".join(sorted(FORMATS[name].columns)))
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise FormatError(f"no response to train on: roles are {[m['role'] for m in messages]}")
    if not any(m["content"].strip() or m.get("tool_calls") for m in answers):
        raise FormatError("the response is empty, so there is nothing to train on")
    return messages


def to_tools(row: Row) -> str | None:
    """The row's `tools`, a list of JSON schemas or its JSON text, as JSON text; None where it has none.

    Raises:
        FormatError: not a list of objects.
    """
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise FormatError(f"field 'tools': a list of JSON schemas expected, found {_show(tools)}")
    return _check_text(json.dumps(tools, ensure_ascii=False, default=str), "tools")


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
        row = dict(zip(batch, values, strict=True))
        try:
            columns["messages"].append(to_messages(row, format))
            columns["tools"].append(to_tools(row))
        except FormatError as error:
            raise FormatError(f"row {indices[at] + 1}: {error}" if indices else str(error)) from None
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
    return Features({**{column: List(message) for column in columns or ("messages",)}, "tools": text})


def formatting_func(example: Row) -> str | list[str]:
    """MA-RLHF's text form of Alpaca rows: `###Question: {instruction} {input}\\n###Answer: {output}`.

    Args:
        example: one row (strings) or a batch (lists of strings).

    Returns:
        The text of the row, or the batch's texts.
    """
    if isinstance(example["instruction"], str):
        question = f"{example['instruction']} {example.get('input') or ''}".strip()
        return f"###Question: {question}\n###Answer: {example['output']}"
    keys = [key for key in ("instruction", "input", "output") if key in example]
    rows = (dict(zip(keys, values, strict=True)) for values in zip(*(example[key] for key in keys), strict=True))
    return [str(formatting_func(row)) for row in rows]


def load_function(name: str) -> Callable[..., Any]:
    """The function that `question-answer`, `module:function` or `file.py:function` names.

    Raises:
        RecipeError: there is none.
    """
    if name == "question-answer":
        return formatting_func
    module, _, function = name.rpartition(":")
    try:
        if module.endswith(".py"):
            found = _run_file(module, Path(module).stat().st_mtime_ns).get(function)
        else:
            found = getattr(importlib.import_module(module), function, None) if module else None
    except (ImportError, OSError) as error:
        raise RecipeError(f"cannot load the function {name!r}: {error}") from None
    if not callable(found):
        known = ", ".join(FORMATS)
        raise RecipeError(
            f"{name!r} is neither a known format ({known}) nor a function module:function or file.py:function"
        )
    return found  # type: ignore[no-any-return]


@lru_cache
def _run_file(path: str, changed: int) -> dict[str, Any]:
    return runpy.run_path(path)


def check_order(messages: list[Message], field: str) -> None:
    """Raise `FormatError` at a turn whose role cannot follow the one before it; see `BEFORE`."""
    before: str | None = None
    for i, message in enumerate(messages):
        role = message["role"]
        if before not in BEFORE[role]:
            where = f"after {before!r}" if before else "first"
            raise FormatError(
                f"field {field!r}: roles out of order: message {i + 1} is {role!r}, which cannot come {where}"
            )
        before = role


def _text(row: Row, field: str, *, optional: bool = False) -> str:
    value = row.get(field)
    return "" if optional and value is None else _check_text(value, field)


def system_message(row: Row) -> list[Message]:
    """The row's `system` column as a list of one message, or of none."""
    text = _text(row, "system", optional=True)
    return [{"role": "system", "content": text}] if text else []


def _turns(row: Row, field: str) -> list[dict[str, Any]]:
    turns = row[field]
    if not isinstance(turns, list | tuple) or not turns or not all(isinstance(t, dict) for t in turns):
        raise FormatError(f"field {field!r}: a list of turns expected, found {_show(turns)}")
    return list(turns)


def _message(turn: dict[str, Any], where: str, role_key: str, content_key: str) -> Message:
    role, content = turn.get(role_key), turn.get(content_key)
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    calls_at = f"{where}.{'tool_calls' if turn.get('tool_calls') else 'function_call'}"
    if isinstance(role, str) and role.lower() in CALL_ROLES:
        calls_at = f"{where}.{content_key}"
        calls, role, content = _json(_check_text(content, calls_at), calls_at), "assistant", ""
        calls = calls if isinstance(calls, list) else [calls]
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise FormatError(f"field '{where}.{role_key}': one of {sorted(ROLES)} expected, found {_show(role)}")
    if turn.get("weight") == 0:
        raise FormatError(f"field '{where}.weight': turns cannot be left out one by one; see train_on, or drop the row")
    message: Message = {"role": ROLES[role.lower()]}
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise FormatError(
                f"field '{where}.{content_key}': only text parts can be trained on, found {_show(content)}"
            )
        content = "".join(part["text"] for part in content)
    message["content"] = _check_text("" if content is None and calls else content, f"{where}.{content_key}")
    for key in REASONING_KEYS:
        if turn.get(key):
            message["reasoning_content"] = _check_text(turn[key], f"{where}.{key}")
            break
    if calls:
        if not isinstance(calls, list | tuple):
            raise FormatError(f"field '{calls_at}': a list of calls expected, found {_show(calls)}")
        message["tool_calls"] = [_call(call, f"{calls_at}[{i}]") for i, call in enumerate(calls)]
    for key in ("tool_call_id", "name"):
        if turn.get(key):
            message[key] = _check_text(turn[key], f"{where}.{key}")
    return message


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call in OpenAI's form; Arrow cannot hold arguments of different shapes in a column, so they are text."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FormatError(f"field '{where}': a call with 'name' and 'arguments' expected, found {_show(call)}")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = _json(arguments, f"{where}.arguments") if isinstance(arguments, str) else arguments or {}
    if not isinstance(arguments, dict):
        raise FormatError(f"field '{where}.arguments': a JSON object expected, found {_show(arguments)}")
    text = _check_text(json.dumps(arguments, ensure_ascii=False, default=str), f"{where}.arguments")
    name = _check_text(function["name"], f"{where}.name")
    identity = {"id": _check_text(call["id"], f"{where}.id")} if call.get("id") else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": text}}


def _json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"field {field!r}: not valid JSON: {error}; found {_show(text)}") from None


def _check_text(text: Any, field: str) -> str:
    if not isinstance(text, str):
        raise FormatError(f"field {field!r}: text expected, found {_show(text)}")
    if "\0" in text:
        raise FormatError(f"field {field!r} holds a NUL character; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(
            f"field {field!r} holds a lone surrogate at character {error.start}; the text is broken"
        ) from None
    return text


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = (text if len(text) <= 60 else text[:60] + "...").encode("utf-8", "backslashreplace").decode()
    return f"{type(value).__name__} {text}"
