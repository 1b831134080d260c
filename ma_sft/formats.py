"""Raw rows -> OpenAI-style messages, for every common format; and the classic text form for `formatting_func`.

A format is known by its columns. Each error is a `FormatError` that names the source, the row and the field.
"""

import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ma_sft.errors import FormatError, RecipeError

Message = dict[str, Any]
Row = dict[str, Any]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bard", "claude", "chatbot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response"), "tool"),
}
KEPT_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content")


def _alpaca(row: Row, suffix: str = "") -> list[Message]:
    instruction, extra = _text(row, f"instruction{suffix}"), row.get(f"input{suffix}") or ""
    history = row.get("history") or []
    if not isinstance(history, list | tuple) or any(len(pair) != 2 for pair in history):
        raise FormatError(f"field 'history': a list of [question, answer] pairs expected, found {_show(history)}")
    turns = [text for pair in history for text in pair]
    turns += [f"{instruction}\n\n{extra}" if extra else instruction, _text(row, f"output{suffix}")]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return system + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _sharegpt(row: Row) -> list[Message]:
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    turns = _turns(row, "conversations")
    role, content = ("from", "value") if "from" in turns[0] else ("role", "content")
    return system + [_message(t, f"conversations[{i}]", role, content) for i, t in enumerate(turns)]


def _messages(row: Row) -> list[Message]:
    return [_message(t, f"messages[{i}]", "role", "content") for i, t in enumerate(_turns(row, "messages"))]


def _prompt_completion(row: Row) -> list[Message]:
    if isinstance(row["prompt"], str):
        return _pair(row, "prompt", "completion")
    parts = [(field, i, t) for field in ("prompt", "completion") for i, t in enumerate(_turns(row, field))]
    return [_message(t, f"{field}[{i}]", "role", "content") for field, i, t in parts]


def _hh_rlhf(row: Row) -> list[Message]:
    text = _text(row, "chosen")
    pieces = ("\n\n" + text.lstrip("\n")).replace("\n\nAssistant:", "\0A").replace("\n\nHuman:", "\0H").split("\0")
    if pieces[0].strip() or len(pieces) < 2:
        raise FormatError(f"field 'chosen': '\\n\\nHuman: ...\\n\\nAssistant: ...' expected, found {_show(text)}")
    return [{"role": {"H": "user", "A": "assistant"}[p[0]], "content": p[1:].strip()} for p in pieces[1:]]


def _multiple_choice(row: Row) -> list[Message]:
    choices = row["choices"]
    if isinstance(choices, dict):
        texts, labels = choices.get("text"), choices.get("label")
    else:
        texts, labels = choices, [chr(ord("A") + i) for i in range(len(choices or []))]
    if not texts or not labels or len(texts) != len(labels):
        raise FormatError(f"field 'choices': equally many texts and labels expected, found {_show(choices)}")
    key = row["answerKey"] if row.get("answerKey") is not None else row.get("answer")
    labels, key = [str(label) for label in labels], str(key)
    if key not in labels and key.isdecimal() and int(key) < len(labels) and row.get("answerKey") is None:
        key = labels[int(key)]  # MMLU-like: `answer` is a position
    if key not in labels:
        raise FormatError(f"field 'answerKey': one of {labels} expected, found {key!r}")
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    question = f"{_text(row, 'question')}\n{options}"
    answer = f"{key}. {texts[labels.index(key)]}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _pair(row: Row, question: str, answer: str) -> list[Message]:
    return [
        {"role": "user", "content": _text(row, question)},
        {"role": "assistant", "content": _text(row, answer)},
    ]


@dataclass(frozen=True)
class Format:
    """Which columns a row of this format must have, and how it becomes messages."""

    columns: frozenset[str]
    convert: Callable[[Row], list[Message]]


def _format(columns: str, convert: Callable[[Row], list[Message]]) -> Format:
    return Format(frozenset(columns.split()), convert)


# The first match wins, so the more telling columns come first.
FORMATS = {
    "messages": _format("messages", _messages),
    "sharegpt": _format("conversations", _sharegpt),
    "alpaca": _format("instruction output", _alpaca),
    "alpaca-zh": _format("instruction_zh output_zh", lambda row: _alpaca(row, "_zh")),
    "multiple-choice": _format("question choices answerKey", _multiple_choice),
    "mmlu": _format("question choices answer", _multiple_choice),
    "prompt-completion": _format("prompt completion", _prompt_completion),
    "hh-rlhf": _format("chosen rejected", _hh_rlhf),
    "question-answer": _format("question answer", lambda row: _pair(row, "question", "answer")),
    "query-response": _format("query response", lambda row: _pair(row, "query", "response")),
    "problem-solution": _format("problem solution", lambda row: _pair(row, "problem", "solution")),
}


def detect_format(columns: Iterable[str]) -> str:
    """Name of the first format in `FORMATS` whose columns are all there.

    Raises:
        FormatError: none is; the message lists the columns and the formats that come nearest.
    """
    columns = set(columns)
    for name, known in FORMATS.items():
        if known.columns <= columns:
            return name
    near = [
        f"{name} (misses {', '.join(sorted(f.columns - columns))})"
        for name, f in FORMATS.items()
        if f.columns & columns
    ]
    raise FormatError(
        f"unknown format: columns {sorted(columns)}; "
        + (f"nearest: {'; '.join(near)}" if near else f"known formats: {', '.join(FORMATS)}")
        + "; rename columns, or pass dataset_format"
    )


def to_messages(row: Row, format: str | None = None) -> list[Message]:
    """One raw row as messages: `[{"role": "system" | "user" | "assistant" | "tool", "content": str, ...}, ...]`.

    Args:
        row: column -> value.
        format: a name in `FORMATS`, or a function of the user's as `module:function` or `file.py:function`;
            None to go by the columns that are not null.

    Raises:
        FormatError: an unknown format, a missing or wrong field, no response to train on.
    """
    name = format or detect_format(key for key, value in row.items() if value is not None)
    if name in FORMATS:
        missing = sorted(FORMATS[name].columns - {key for key, value in row.items() if value is not None})
        if missing:
            raise FormatError(f"field {missing[0]!r} is missing or null; format {name!r} needs it")
        messages = FORMATS[name].convert(row)
    else:
        messages = load_function(name)(row)
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise FormatError(f"no response to train on: roles are {[m['role'] for m in messages]}")
    if not any(m["content"] or m.get("tool_calls") for m in answers):
        raise FormatError("the response is empty, so there is nothing to train on")
    return messages


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
            import runpy

            found = runpy.run_path(str(Path(module))).get(function)
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


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise FormatError(f"field {field!r}: text expected, found {_show(value)}")
    _check_text(value, field)
    return value


def _turns(row: Row, field: str) -> list[dict[str, Any]]:
    turns = row[field]
    if not isinstance(turns, list | tuple) or not turns or not all(isinstance(t, dict) for t in turns):
        raise FormatError(f"field {field!r}: a list of turns expected, found {_show(turns)}")
    return list(turns)


def _message(turn: dict[str, Any], where: str, role_key: str, content_key: str) -> Message:
    role, content = turn.get(role_key), turn.get(content_key)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise FormatError(f"field '{where}.{role_key}': one of {sorted(ROLES)} expected, found {_show(role)}")
    extra = {key: turn[key] for key in KEPT_KEYS if turn.get(key)}
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise FormatError(
                f"field '{where}.{content_key}': only text parts can be trained on, found {_show(content)}"
            )
        content = "".join(part["text"] for part in content)
    if content is None and "tool_calls" in extra:
        content = ""
    if not isinstance(content, str):
        raise FormatError(f"field '{where}.{content_key}': text expected, found {_show(content)}")
    _check_text(content, f"{where}.{content_key}")
    return {"role": ROLES[role.lower()], "content": content, **extra}


def _check_text(text: str, field: str) -> None:
    if "\0" in text:
        raise FormatError(f"field {field!r} holds a NUL character; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(
            f"field {field!r} holds a lone surrogate at character {error.start}; the text is broken"
        ) from None


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"
