"""Turns of every shape -> messages; and what stands beside the turns of a row: system message, earlier turns, tools,
template variables.

A turn names its role (`role`, `from`), or holds a question and its answer (`human`, `assistant`). Its content is a text
or a list of parts: OpenAI's, Anthropic's (`tool_use`, `tool_result`, `thinking`) or Vertex' (`functionCall`, ...).
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from ma_sft.errors import FormatError

Row = dict[str, Any]
Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bard", "claude", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"),
    "function response": "tool",
}
# Of a text of turns, by who speaks first: hh-rlhf's and Glaive's, whose calls stay text.
SPEAKERS = {"Human": "Human|Assistant", "USER": "USER|ASSISTANT|FUNCTION RESPONSE"}
CALL_ROLES = ("function_call", "tool_call")  # an assistant turn whose text is the call, or the calls, as JSON
PAIR_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "Human", "user", "input", "question"), "user"),
    **dict.fromkeys(("assistant", "bot", "output", "answer", "MOSS"), "assistant"),
}
# What may come before a role; None is the start of the conversation.
BEFORE: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}

ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text", "parts")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
PARTIAL = ("mask", "masked", "train_detail")  # marks of parts of a turn
# Marks of a turn or a row: whether to train it, or whether its answer is a good one. Those of BAD mean the opposite.
WEIGHTS = "weight loss_weight loss loss_scale loss_mask output_with_loss train training trainable train_on_turn".split()
GOOD = [prefix + word for prefix in ("", "is_") for word in ("good", "correct", "accepted", "valid", "safe")]
GOOD += ["problem_is_valid", "solution_is_valid"]
BAD = ("rejected", "deleted", "is_rejected", "is_deleted", "is_bad", "is_wrong")
MARKS = frozenset((*WEIGHTS, *GOOD, *BAD))
TRUTH = {**dict.fromkeys(("true", "yes", "1", "1.0"), True), **dict.fromkeys(("false", "no", "0", "0.0"), False)}
TURN_KEYS = MARKS.union(ROLE_KEYS, CONTENT_KEYS, REASONING_KEYS, CALL_KEYS, MEDIA, PARTIAL, PAIR_ROLES)
TURN_KEYS |= {"tool_call_id", "name", "tools", "channel"}

# Columns of a row that hold its system message, or a text to answer from.
SYSTEM = "system system_prompt system_message system_instruction systemInstruction meta_instruction".split()
SYSTEM += ["developer_content"]
CONTEXT = "context knowledge passage background document documents article paragraph definition sql_context".split()

BLANK = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]*")  # a text of these shows nothing
THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)  # what LLaMA-Factory's data have before the call
SHOWN_COLUMNS = 20


class BadAnswer(FormatError):
    """A row whose answer is marked as a bad one: nothing to learn from here, and no fault of the file."""


class TrackedRow(Row):
    """A row without its nulls that knows which of its columns were read (`used`)."""

    def __init__(self, row: Row) -> None:
        super().__init__({key: value for key, value in row.items() if value is not None})
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.used.add(key)
        return super().__getitem__(key)

    def __missing__(self, key: str) -> Any:
        raise FormatError(f"field {key!r} is missing or null; rows of this format need it")

    def get(self, key: str, default: Any = None) -> Any:
        self.used.add(key)
        return super().get(key, default)

    def first(self, names: Iterable[str]) -> str | None:
        """The first of these columns that is there; it counts as read only when it is."""
        return next((name for name in names if name in self), None)


def is_blank(message: Message) -> bool:
    """Whether nobody can see anything of what the message says, and it calls no tool."""
    return bool(BLANK.fullmatch(message["content"])) and not message.get("tool_calls")


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, "", or a list or object without a value in it."""
    if isinstance(value, list | tuple):
        return all(item is None for item in value)
    return value is None or (isinstance(value, str | dict) and not value)


def are_objects(value: Any) -> bool:
    """Whether a value is a list of JSON objects."""
    return isinstance(value, list | tuple) and all(isinstance(item, dict) for item in value)


def truth(value: Any) -> bool | None:
    """What a mark means: true, false, yes, no, 1 or 0, as a value or as text; None for anything else."""
    return TRUTH.get(str(value).strip().lower())


def show(value: Any) -> str:
    """A value for an error: its type and its first 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = (text if len(text) <= 60 else text[:60] + "...").encode("utf-8", "backslashreplace").decode()
    return f"{type(value).__name__} {text}"


def show_columns(columns: Iterable[str]) -> str:
    """Columns for an error, at most twenty."""
    names = sorted(columns)
    more = f" and {len(names) - SHOWN_COLUMNS:,} more" if len(names) > SHOWN_COLUMNS else ""
    return f"{names[:SHOWN_COLUMNS]}{more}"


def expected(what: str, field: str, value: Any) -> FormatError:
    """The error of a field that holds something else."""
    return FormatError(f"field {field!r}: {what} expected, found {show(value)}")


def check_text(text: Any, field: str) -> str:
    """The value, if it is a text that can be trained on; raises `FormatError` at a NUL or a lone surrogate, too."""
    if not isinstance(text, str):
        hint = "" if text is None else "; a function of yours can make one of it (format: file.py:function)"
        raise FormatError(f"{expected('text', field, text)}{hint}")
    if "\0" in text:
        raise FormatError(f"field {field!r} holds a NUL character; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"a lone surrogate at character {error.start}"
        raise FormatError(f"field {field!r} holds {where}; the text is broken") from None
    return text


def text_of(row: Row, field: str) -> str:
    """A column's text; errors as `check_text`'s."""
    return check_text(row.get(field), field)


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """An object, none of whose keys stands twice: Python would keep the last and lose the others."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise FormatError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)  # `json.loads` makes one for each text


def read_json(text: str) -> Any:
    """`json.loads`; raises `FormatError` where a key stands twice in one object."""
    return _DECODER.decode(text)


def from_json(value: Any, field: str, begins: str | tuple[str, ...] = "") -> Any:
    """What a text that begins so holds as JSON, None if it is blank; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(begins):
        return value
    try:
        return read_json(value) if value.strip() else None
    except FormatError as error:
        raise FormatError(f"field {field!r}: {error}") from None
    except (ValueError, RecursionError) as error:
        hint = (
            "; lists that Python printed are no JSON: save the rows as JSON Lines or Parquet" if "{'" in value else ""
        )
        raise FormatError(f"field {field!r}: not valid JSON: {error}; found {show(value)}{hint}") from None


def to_json(value: Any, field: str) -> str:
    """A value as JSON text that can be trained on; raises `FormatError` as `check_text`, and at NaN and infinities."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        raise FormatError(f"field {field!r} holds a number that JSON does not have: {show(value)}") from None
    return check_text(text, field)


def turns_in_text(value: Any) -> Any:
    """The turns that a text holds as JSON, as a cell of CSV does; any other value as it is."""
    try:
        turns = from_json(value, "", begins="[")
    except FormatError:
        return value
    named = turns and are_objects(turns) and all(turn.keys() & {*ROLE_KEYS} and len(turn) > 1 for turn in turns)
    return turns if named else value


def list_of_turns(value: Any, field: str) -> list[dict[str, Any]]:
    """The turns of a column: a list of objects; its JSON text, as in CSV; `datasets`' older object of lists; a list of
    texts, the user's and the assistant's in turn (LIMA's), or of pairs of them; or a text of `SPEAKERS`.
    """
    turns = from_json(value, field, begins="[")
    lists = list(turns.values()) if isinstance(turns, dict) else []
    if lists and all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*lists, strict=True)]
    elif isinstance(turns, str) and (first := spoken(turns)):
        _, *pieces = re.split(rf"\n\n({SPEAKERS[first]}):", "\n\n" + turns.lstrip("\n"))
        texts = (piece.strip().removesuffix("<|endoftext|>").strip() for piece in pieces[1::2])
        turns = [{"role": name, "content": text} for name, text in zip(pieces[::2], texts, strict=True)]
    elif isinstance(turns, list | tuple) and all(isinstance(turn, str) for turn in turns):
        turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]
    elif isinstance(turns, list | tuple) and all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
        turns = [{"human": question, "assistant": answer} for question, answer in turns]
    if not turns or not are_objects(turns):
        raise expected("a list of turns", field, turns)
    return list(turns)


def spoken(text: Any) -> str | None:
    """Who speaks first in a text of `SPEAKERS`; None if it is none."""
    return next((who for who in SPEAKERS if isinstance(text, str) and text.lstrip("\n").startswith(f"{who}:")), None)


def conversation(value: Any, field: str, role: str = "user") -> list[Message]:
    """A text as one message of `role`; a turn, or a list of turns, as messages."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list | tuple):
        return [{"role": role, "content": check_text(value, field)}]
    if not value or not are_objects(value):  # a list of texts is a conversation only where one is sure to be
        raise expected("a list of turns", field, value)
    messages: list[Message] = []
    for i, turn in enumerate(value):
        found, last = _messages(turn, f"{field}[{i}]"), messages[-1] if messages else {}
        is_call = bool(found) and "tool_calls" in found[0] and _role(turn) in CALL_ROLES
        if is_call and (last.get("role"), last.get("train")) == ("assistant", found[0].get("train")):
            last["tool_calls"] = [*last.get("tool_calls", []), *found[0]["tool_calls"]]  # parallel calls
        else:
            messages += found
    for at, message in enumerate(messages, 1):  # without ids in the template, the order tells whose a result is
        if "tool_calls" not in message:
            continue
        ids = [call.get("id") for call in message["tool_calls"]]
        results = messages[at : at + len(ids)]
        if ids and {*ids} == {result.get("tool_call_id") for result in results}:
            messages[at : at + len(ids)] = sorted(results, key=lambda result: ids.index(result.get("tool_call_id")))
    return messages


def _role(turn: dict[str, Any]) -> str:
    name = next((turn[key] for key in ROLE_KEYS if key in turn), None)
    return name.strip().lower() if isinstance(name, str) else ""


def _pick(turn: dict[str, Any], keys: tuple[str, ...], where: str) -> str | None:
    """Which of the keys holds a value; the first that is there if none does."""
    there = [key for key in keys if key in turn]
    full = [key for key in there if not is_empty(turn[key])] or there[:1]
    if any(turn[key] != turn[full[0]] for key in full[1:]):
        raise FormatError(f"field {where!r}: {' and '.join(full)} hold different texts; one of them expected")
    return full[0] if full else None


def _messages(turn: dict[str, Any], where: str) -> list[Message]:
    """The message of a turn; or question and answer, or the results of several tools and what follows them."""
    if len(turn) == 2:  # a role and a text, which nearly every turn is
        key = "content" if "content" in turn else "value"
        named, text = turn.get("role", turn.get("from")), turn.get(key)
        if isinstance(named, str) and isinstance(text, str) and named in ROLES:
            return [{"role": ROLES[named], "content": check_text(text, f"{where}.{key}")}]
    if turn.keys().isdisjoint(ROLE_KEYS) and {PAIR_ROLES.get(key) for key in turn} >= {"user", "assistant"}:
        return _pair(turn, where)
    role_key = "role" if "role" in turn or "from" not in turn else "from"
    name, named = _role(turn), turn.get(role_key)
    if role_key == "role" and ROLES.get(str(turn.get("from", named)).lower()) != ROLES.get(str(named).lower()):
        raise FormatError(f"field {where!r}: role {show(named)} and from {show(turn['from'])} contradict each other")
    content_key = _pick(turn, CONTENT_KEYS, where) or ("value" if role_key == "from" else "content")
    content, at = turn.get(content_key), f"{where}.{content_key}"
    role, thought, calls_key = ROLES.get(name), "", _pick(turn, CALL_KEYS, where) or "tool_calls"
    calls, calls_at = turn.get(calls_key), f"{where}.{calls_key}"
    if name in CALL_ROLES:
        if isinstance(content, str) and (thinking := THINKING.match(content)):
            thought, content = thinking[1].strip(), content[thinking.end() :]
        role, calls, calls_at, content = "assistant", content, at, ""
    calls = [] if is_empty(calls) else from_json(calls, calls_at)
    calls = [calls] if isinstance(calls, dict) else calls or []
    if not isinstance(calls, list | tuple):
        raise expected("a list of calls", calls_at, calls)
    if role is None:
        raise expected(f"one of {sorted(ROLES)}", f"{where}.{role_key}", named)
    if turn.get("channel") not in (None, "", "final"):
        what = "a turn of its own has no place; write it into the answer's turn, an analysis as 'thinking'"
        raise FormatError(f"field '{where}.channel': {what}, found {show(turn['channel'])}")
    message: Message = {"role": role, "content": "", "reasoning_content": thought, "tool_calls": [*calls]}
    results = _read_content(message, content, at, optional=bool(calls) or role == "tool")
    if message["tool_calls"] and role != "assistant":
        raise FormatError(f"field {calls_at!r}: only an assistant calls tools, not {named!r}")
    message["tool_calls"] = [_call(call, f"{calls_at}[{i}]") for i, call in enumerate(message["tool_calls"])]
    reasoning = _pick(turn, REASONING_KEYS, where)
    for theirs, ours in ((reasoning, "reasoning_content"), ("tool_call_id", "tool_call_id"), ("name", "name")):
        if theirs and turn.get(theirs):
            message[ours] = check_text(turn[theirs], f"{where}.{theirs}")
    message = {key: value for key, value in message.items() if value or key == "content"}
    if not _is_trained(turn, where) and role == "assistant":
        message["train"] = False
    if role == "system" and not message["content"] and turn.get("tools"):
        return []  # GLM's data: a system turn that only holds the row's tools
    return [*results, *([] if results and not message["content"] else [message])]


def _pair(turn: dict[str, Any], where: str) -> list[Message]:
    keys = [key for key in PAIR_ROLES if key in turn and (key != "system" or turn[key])]
    messages: list[Message] = [
        {"role": PAIR_ROLES[key], "content": check_text(turn[key], f"{where}.{key}")} for key in keys
    ]
    if not _is_trained(turn, where):
        messages[-1]["train"] = False
    return messages


def _is_trained(turn: dict[str, Any], where: str) -> bool:
    """Whether the marks of a turn, or of a part of it, let it be trained; media cannot be."""
    if turn.keys().isdisjoint((*PARTIAL, *MARKS, *MEDIA)):
        return True
    for key in (*MEDIA, *PARTIAL):
        if not is_empty(value := turn.get(key)) and value != 0:
            what = "only whole turns can be marked (train: false)" if key in PARTIAL else "only text can be trained on"
            raise FormatError(f"field '{where}.{key}': {what}, found {show(value)}")
    marks = {key: turn[key] for key in sorted(turn.keys() & MARKS) if not is_empty(turn[key])}
    verdicts = {None if truth(mark) is None else truth(mark) != (key in BAD) for key, mark in marks.items()}
    if None in verdicts or len(verdicts) > 1:
        raise FormatError(f"field '{where}.{', '.join(marks)}': a turn is trained (1) or not (0); found {show(marks)}")
    return verdicts != {False}


def _read_content(message: Message, content: Any, where: str, optional: bool = False) -> list[Message]:
    """Write a content into `message`; the results of tools among its parts are messages of their own."""
    if content is None and optional:
        return []
    keys, kinds = {"text", "functionResponse", "function_response"}, ("text", "tool_result")
    in_parts = are_objects(content) and all(part.keys() & keys or part.get("type") in kinds for part in content)
    if message["role"] == "tool" and not isinstance(content, str) and not in_parts:
        message["content"] = to_json(content, where)  # a result as the tool gave it
        return []
    if not isinstance(content, list | tuple):
        message["content"] = check_text(content, where)
        return []
    parts = ({"type": "text", "text": part} if isinstance(part, str) else part for part in content)
    return [result for i, part in enumerate(parts) for result in _read_part(message, part, f"{where}[{i}]")]


def _read_part(message: Message, part: Any, where: str) -> list[Message]:
    """Add a part to `message`, or give the messages that it is."""
    part = part if isinstance(part, dict) else {"type": str(part)}
    if not _is_trained(part, where):
        raise FormatError(f"field {where!r} must not be trained; mark its turn as a whole with train: false")
    kind = part.get("type")
    text = next((part[key] for key in ("text", "value", str(kind)) if key in part), None)
    call = part if kind == "tool_use" else part.get("functionCall") or part.get("function_call")
    result = part if kind == "tool_result" else part.get("functionResponse") or part.get("function_response")
    if kind in ("thinking", "reasoning") or (text is not None and part.get("thought") is True):
        message["reasoning_content"] += check_text(text, where)
    elif kind in (None, "text", "input_text", "output_text") and isinstance(text, str):
        message["content"] += check_text(text, where)
    elif isinstance(call, dict):
        message["tool_calls"] = [*message["tool_calls"], call]
    elif isinstance(result, dict):
        turn = {"role": "tool", "name": result.get("name"), "content": result.get("content", result.get("response"))}
        return _messages(turn | {"tool_call_id": result.get("tool_use_id", result.get("id"))}, where)
    else:
        raise FormatError(f"field {where!r}: only text parts can be trained on, found {show(part)}")
    return []


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call in OpenAI's form; Arrow cannot hold arguments of different shapes in a column, so they are text."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise expected("a call with 'name' and 'arguments'", where, call)
    arguments = next((function[key] for key in ("arguments", "parameters", "input", "args") if key in function), None)
    for _ in range(2):  # some data holds the text of a text
        arguments = from_json(arguments, f"{where}.arguments")
    if not isinstance(arguments := {} if is_empty(arguments) else arguments, dict):
        raise expected("a JSON object", f"{where}.arguments", arguments)
    name = check_text(function["name"], f"{where}.name")
    identity = {"id": check_text(call["id"], f"{where}.id")} if call.get("id") else {}
    text = to_json(arguments, f"{where}.arguments")
    return {**identity, "type": "function", "function": {"name": name, "arguments": text}}


def check_order(messages: list[Message], field: str) -> None:
    """Raise `FormatError` at a turn whose role cannot follow the one before it; see `BEFORE`."""
    before: str | None = None
    for i, message in enumerate(messages):
        role = message["role"]
        if before not in BEFORE[role]:
            where = f"after {before!r}" if before else "first"
            hint = "; merge_turns: true joins neighbours of one role" if role == before else ""
            if before in (None, "system") and not hint:
                hint = "; what is trained answers something: put that before it, or remove it"
            what = f"roles out of order: message {i + 1} is {role!r}, which cannot come {where}{hint}"
            raise FormatError(f"field {field!r}: {what}")
        before = role


def merge_turns(messages: list[Message]) -> list[Message]:
    """The messages with neighbours of one role joined by an empty line, where nothing of them would be lost."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else {}
        same = all(last.get(key) == message.get(key) for key in ("role", "name", "train"))
        if same and message["role"] != "tool" and "tool_calls" not in last and "reasoning_content" not in message:
            text = "\n\n".join(filter(None, (last["content"], message["content"])))
            merged[-1] = {**last, **message, "content": text}
        else:
            merged.append(message)
    return merged


def with_context(row: TrackedRow, messages: list[Message], *, whole: bool = False) -> list[Message]:
    """The messages of a row with its system message, its `history` and, unless `whole` turns may have it, its text."""
    _add_text(row, messages, whole)
    start = 1 if messages and messages[0]["role"] == "system" else 0
    history = from_json(row.get("history"), "history", begins="[")
    before = [] if is_empty(history) else conversation(list_of_turns(history, "history"), "history")
    messages = [*messages[:start], *before, *messages[start:]]
    systems = [message for key in SYSTEM if key in row for message in _system(row[key], key)]
    if any(message != (messages if start else systems)[0] for message in systems):
        raise FormatError("two different system messages in one row; leave one out (ignore: [column])")
    return messages if start else [*systems[:1], *messages]


def _system(value: Any, field: str) -> list[Message]:
    if is_empty(value):
        return []
    if not isinstance(value, str):
        parts = value.get("parts", value.get("content")) if isinstance(value, dict) else value  # Vertex
        value = {"role": "system", "content": parts}
    return conversation(value, field, "system")


def _add_text(row: TrackedRow, messages: list[Message], whole: bool) -> None:
    """Put before the question the text that it asks about, where the row has one that was not read yet."""
    for field in CONTEXT:
        if field not in row or field in row.used or is_empty(text := row[field]):
            continue
        asked = [message for message in messages if message["role"] == "user"]
        if whole or len(asked) != 1:
            what = "a text to answer from has no place in a conversation"
            raise FormatError(f"field {field!r}: {what}; write it into a message, or leave it out (ignore: [{field}])")
        texts = text if isinstance(text, list | tuple) else [text]
        asked[0]["content"] = "\n\n".join((*(check_text(part, field) for part in texts), asked[0]["content"]))


def to_tools(row: Row) -> str | None:
    """The row's tools as JSON text: a list of JSON schemas, from `tools`, `functions` or its system turn; or None."""
    request = dict.get(row, "input")  # OpenAI's preferences; looking here is not yet reading the column
    given = {"tools": row.get("tools"), "functions": row.get("functions")}
    given["input.tools"] = request.get("tools") if isinstance(request, dict) else None
    for column in row.keys() & {"messages", "conversations", "conversation"}:
        turns = dict.get(row, column)
        for i, turn in enumerate(turns if isinstance(turns, list | tuple) else ()):
            if isinstance(turn, dict) and "tools" in turn:
                given[f"{column}[{i}].tools"] = turn["tools"]
    given = {field: value for field, value in given.items() if not is_empty(value)}
    lists = {field: found for field, value in given.items() if (found := _schemas(value, field))}
    first = next(iter(lists.values()), None)
    if any(found != first for found in lists.values()):
        raise FormatError(f"two different lists of tools, in {' and '.join(lists)}")
    return to_json(first, "tools") if first else None


def _schemas(tools: Any, field: str) -> list[dict[str, Any]]:
    """Schemas in OpenAI's form, of OpenAI's older, Anthropic's or Vertex' form; those of another one as they are."""
    tools = from_json(tools, field) or []
    tools = [from_json(tool, field, begins="{") for tool in tools] if isinstance(tools, list | tuple) else tools
    if not are_objects(tools):
        raise expected("a list of JSON schemas", field, tools)
    schemas: list[dict[str, Any]] = []
    for tool in tools:
        declared = tool.get("functionDeclarations", tool.get("function_declarations"))
        if declared is not None:
            schemas += _schemas(declared, "functions")
        elif "input_schema" in tool:
            names = {"name": "name", "description": "description", "input_schema": "parameters"}
            function = {ours: tool[theirs] for theirs, ours in names.items() if theirs in tool}
            schemas.append({"type": "function", "function": function})
        else:
            schemas.append({"type": "function", "function": tool} if field == "functions" else tool)
    return schemas


def to_template_kwargs(row: Row) -> str | None:
    """The row's variables for the chat template, `chat_template_kwargs`, as JSON text; None where it has none."""
    value = from_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if value and not isinstance(value, dict):
        raise expected("an object", "chat_template_kwargs", value)
    return to_json(value, "chat_template_kwargs") if value else None
