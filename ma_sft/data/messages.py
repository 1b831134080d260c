"""What a row's values hold, and turns of every shape -> messages: roles, text parts, reasoning, calls, results,
marks not to train a turn; and the context beside the turns: system message, earlier turns, tools, template variables.

A turn names its role (`role`, `from`), or holds a question and its answer (`human`, `assistant`). Its content is a text
or a list of parts: OpenAI's, Anthropic's (`tool_use`, `tool_result`, `thinking`) or Vertex' (`functionCall`, ...).
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from typing import Any

from ma_sft.errors import FormatError

Row = dict[str, Any]
Message = dict[str, Any]
SHOWN_COLUMNS = 20
BLANK = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]*")

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bard", "claude", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"),
}

CALL_ROLES = ("function_call", "tool_call")  # an assistant turn whose text is the call, or the calls, as JSON
THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)  # what LLaMA-Factory's data have before the call

PAIR_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "Human", "user", "input", "question"), "user"),
    **dict.fromkeys(("assistant", "bot", "output", "answer", "MOSS"), "assistant"),
}

ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text", "parts")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
WEIGHT_KEYS = (
    *("weight", "loss_weight", "loss", "loss_scale", "loss_mask", "output_with_loss"),
    *("train", "training", "trainable", "train_on_turn"),
)
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
PARTIAL = ("mask", "masked", "train_detail")  # marks of parts of a turn
# What says of an answer, true or false, whether it is a good one.
GOOD = ("good", "correct", "accepted", "valid", "safe", "is_good", "is_correct", "is_accepted", "is_valid", "is_safe")
BAD = ("rejected", "deleted", "is_rejected", "is_deleted", "is_bad", "is_wrong")
MARKS = frozenset((*REASONING_KEYS, *WEIGHT_KEYS, *MEDIA, *PARTIAL, *GOOD, *BAD))
MARKS |= {"tool_calls", "function_call", "tool_call_id", "name", "tools"}
TURN_KEYS = MARKS.union(ROLE_KEYS, CONTENT_KEYS, PAIR_ROLES)

# What may come before a role; None is the start of the conversation.
BEFORE: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


# Columns of a row that hold its system message, or a text to answer from.
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "systemInstruction", "meta_instruction")
CONTEXT = ("context", "knowledge", "passage", "background", "document", "documents", "article", "paragraph")
TOOL_TURNS = frozenset(("messages", "conversations", "conversation"))


class TrackedRow(Row):
    """A row without its nulls that knows which of its columns were read (`used`)."""

    def __init__(self, row: Row) -> None:
        super().__init__({key: value for key, value in row.items() if value is not None})
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.used.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.used.add(key)
        return super().get(key, default)

    def first(self, names: Iterable[str]) -> str | None:
        """The first of these columns that is there; it counts as read only when it is."""
        return next((name for name in names if name in self), None)


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, "", or a list or object without a value in it."""
    if isinstance(value, list | tuple):
        return all(item is None for item in value)
    return value is None or (isinstance(value, str | dict) and not value)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it has spaces and characters without width alone."""
    return BLANK.fullmatch(text) is not None


def check_text(text: Any, field: str) -> str:
    """The value, if it is a text that can be trained on.

    Raises:
        FormatError: no text, or one with a NUL or a lone surrogate.
    """
    if not isinstance(text, str):
        raise FormatError(f"field {field!r}: text expected, found {show(text)}")
    if "\0" in text:
        raise FormatError(f"field {field!r} holds a NUL character; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(
            f"field {field!r} holds a lone surrogate at character {error.start}; the text is broken"
        ) from None
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


def read_json(text: str | bytes) -> Any:
    """`json.loads`; raises `FormatError` where a key stands twice in one object, `UnicodeDecodeError` without UTF-8."""
    text = text if isinstance(text, str) else text.decode()  # of bytes alone, `json` takes some lines for UTF-16
    return json.loads(text, object_pairs_hook=_once)


def parse_json(text: str, field: str) -> Any:
    """The value of a JSON text; raises `FormatError` naming the field."""
    try:
        return read_json(text)
    except FormatError as error:
        raise FormatError(f"field {field!r}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"field {field!r}: not valid JSON: {error}; found {show(text)}") from None


def from_json(value: Any, field: str, begins: str | tuple[str, ...] = "") -> Any:
    """What a text that begins so holds as JSON, None if it is blank; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(begins):
        return value
    return parse_json(value, field) if value.strip() else None


def are_objects(value: Any) -> bool:
    """Whether a value is a list of JSON objects."""
    return isinstance(value, list | tuple) and all(isinstance(item, dict) for item in value)


def need(row: Row, fields: Iterable[str], format: str) -> None:
    """Raise `FormatError` at the first of these fields that the row lacks."""
    for field in fields:
        if field not in row:
            raise FormatError(f"field {field!r} is missing or null; format {format!r} needs it")


def to_json(value: Any, field: str) -> str:
    """A value as JSON text that can be trained on; raises `FormatError` as `check_text`, and at NaN and infinities."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        raise FormatError(f"field {field!r} holds a number that JSON does not have: {show(value)}") from None
    return check_text(text, field)


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


@dataclasses.dataclass
class _Content:
    """What a turn's content holds: its text and reasoning, the tools it calls, and messages with tools' results."""

    text: str = ""
    reasoning: str = ""
    calls: list[Any] = dataclasses.field(default_factory=list)
    results: list[Message] = dataclasses.field(default_factory=list)


def conversation(value: Any, field: str, role: str = "user") -> list[Message]:
    """A text as one message of `role`; a turn, or a list of turns, as messages.

    Raises:
        FormatError: none of them.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list | tuple):
        return [{"role": role, "content": check_text(value, field)}]
    messages: list[Message] = []
    for i, turn in enumerate(list_of_turns(value, field)):
        found, last = _messages(turn, f"{field}[{i}]"), messages[-1] if messages else {}
        if last.get("role") == "assistant" and found and "tool_calls" in found[0] and _is_call(turn):
            if last.get("train") != found[0].get("train"):
                raise FormatError(f"field '{field}[{i}]': calls of one message are trained together or not at all")
            last["tool_calls"] = [*last.get("tool_calls", []), *found[0]["tool_calls"]]  # parallel calls
        else:
            messages += found
    _order_results(messages)
    return messages


def _order_results(messages: list[Message]) -> None:
    """Put results in the order of their calls: where a template writes no ids, the order is all that tells whose."""
    for at, message in enumerate(messages, 1):
        ids = [call.get("id") for call in message.get("tool_calls") or []]
        results = messages[at : at + len(ids)]
        if {*ids} == {result.get("tool_call_id") for result in results}:
            messages[at : at + len(ids)] = sorted(results, key=lambda result: ids.index(result.get("tool_call_id")))


def list_of_turns(value: Any, field: str) -> list[dict[str, Any]]:
    """The turns of a column: a list of objects; its JSON text, as in CSV; or `datasets`' older object of lists."""
    turns = from_json(value, field, begins="[")
    lists = list(turns.values()) if isinstance(turns, dict) else []
    if lists and all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*lists, strict=True)]
    if not turns or not are_objects(turns):
        raise FormatError(f"field {field!r}: a list of turns expected, found {show(turns)}")
    return list(turns)


def turns_in_text(value: Any) -> Any:
    """The turns that a text holds as JSON, as a cell of CSV does; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        turns = read_json(value)
    except (ValueError, RecursionError):
        return value
    are_turns = turns and are_objects(turns) and all(turn.keys() & {*ROLE_KEYS} and len(turn) > 1 for turn in turns)
    return turns if are_turns else value


def check_order(messages: list[Message], field: str) -> None:
    """Raise `FormatError` at a turn whose role cannot follow the one before it; see `BEFORE`."""
    before: str | None = None
    for i, message in enumerate(messages):
        role = message["role"]
        if before not in BEFORE[role]:
            where = f"after {before!r}" if before else "first"
            hint = "; merge_turns: true joins neighbours of one role" if role == before else ""
            if before in (None, "system"):
                hint = "; what is trained answers something: put that before it, or remove it"
            raise FormatError(
                f"field {field!r}: roles out of order: message {i + 1} is {role!r}, which cannot come {where}{hint}"
            )
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


def unknown_keys(turns: list[Any]) -> dict[str, Any]:
    """The keys of turns that nothing reads, each with its first value that says something."""
    found: dict[str, Any] = {}
    for turn in turns:
        if not isinstance(turn, dict) or turn.keys() <= TURN_KEYS or turn.keys().isdisjoint((*ROLE_KEYS, *PAIR_ROLES)):
            continue
        for key in turn.keys() - TURN_KEYS:
            if not is_empty(turn[key]):
                found.setdefault(key, turn[key])
    return found


def _messages(turn: dict[str, Any], where: str) -> list[Message]:
    """The message of a turn; or question and answer, or the results of several tools and what follows them."""
    if len(turn) == 2:  # a role and a text, which nearly every turn is
        key = "content" if "content" in turn else "value"
        name, text = turn.get("role", turn.get("from")), turn.get(key)
        if isinstance(name, str) and isinstance(text, str) and name in ROLES:
            return [{"role": ROLES[name], "content": check_text(text, f"{where}.{key}")}]
    if not ("role" in turn or "from" in turn) and {PAIR_ROLES.get(key) for key in turn} >= {"user", "assistant"}:
        return _pair(turn, where)
    marked = not turn.keys().isdisjoint(MARKS)
    role_key = "role" if "role" in turn or "from" not in turn else "from"
    content_key = _one_of(turn, CONTENT_KEYS, where) or ("value" if role_key == "from" else "content")
    named, content, at = turn.get(role_key), turn.get(content_key), f"{where}.{content_key}"
    if role_key == "role" and ROLES.get(str(turn.get("from", named)).lower()) != ROLES.get(str(named).lower()):
        raise FormatError(f"field '{where}': role {show(named)} and from {show(turn['from'])} contradict each other")
    calls, calls_at = _calls(turn, where) if marked else ([], at)
    name = named.strip().lower() if isinstance(named, str) else ""
    role, thought = ROLES.get(name), ""
    if name in CALL_ROLES:
        if isinstance(content, str) and (thinking := THINKING.match(content)):
            thought, content = thinking[1].strip(), content[thinking.end() :]
        role, calls, calls_at, content = "assistant", _parse_calls(content, at), at, ""
    if role is None:
        raise FormatError(f"field '{where}.{role_key}': one of {sorted(ROLES)} expected, found {show(named)}")
    parts = _content(content, role, at, nothing=bool(calls) or role == "tool")
    parts.reasoning = thought or parts.reasoning
    message: Message = {"role": role, "content": parts.text}
    if calls := [*calls, *parts.calls]:
        if role != "assistant":
            raise FormatError(f"field '{calls_at}': only an assistant calls tools, not {named!r}")
        message["tool_calls"] = [_call(call, f"{calls_at}[{i}]") for i, call in enumerate(calls)]
    if parts.reasoning:
        message["reasoning_content"] = parts.reasoning
    if marked:
        _add_marks(message, turn, where)
    if role == "system" and not parts.text and turn.get("tools"):
        return []  # GLM's data: a system turn that only holds the row's tools
    return [*parts.results, *([] if parts.results and not parts.text else [message])]


def _one_of(turn: dict[str, Any], keys: tuple[str, ...], where: str) -> str | None:
    """Which of the keys holds a value; the first that is there if none does."""
    there = [key for key in keys if key in turn]
    full = [key for key in there if not is_empty(turn[key])] or there[:1]
    if any(turn[key] != turn[full[0]] for key in full[1:]):
        raise FormatError(f"field '{where}': {' and '.join(full)} hold different texts; one of them expected")
    return full[0] if full else None


def _refuse_media(turn: dict[str, Any], where: str) -> None:
    for key in MEDIA:
        if key in turn and not is_empty(turn[key]):
            raise FormatError(f"field '{where}.{key}': only text can be trained on, found {show(turn[key])}")


def _add_marks(message: Message, turn: dict[str, Any], where: str) -> None:
    """What a turn says beside its role, content and calls."""
    _refuse_media(turn, where)
    if reasoning := _reasoning(turn, where):
        message["reasoning_content"] = reasoning
    for key in ("tool_call_id", "name"):
        if turn.get(key):
            message[key] = check_text(turn[key], f"{where}.{key}")
    if not is_trained(turn, where) and message["role"] == "assistant":
        message["train"] = False


def _pair(turn: dict[str, Any], where: str) -> list[Message]:
    texts = {key: turn[key] for key in PAIR_ROLES if key in turn and not (key == "system" and not turn[key])}
    messages: list[Message] = []
    for key, text in texts.items():
        messages.append({"role": PAIR_ROLES[key], "content": check_text(text, f"{where}.{key}")})
    if len({m["role"] for m in messages}) < len(messages):
        raise FormatError(f"field '{where}': one question and one answer expected, found {list(texts)}")
    if not is_trained(turn, where):
        messages[-1]["train"] = False
    return messages


def is_trained(turn: dict[str, Any], where: str) -> bool:
    """Whether the turn's own marks let it be trained."""
    if turn.keys().isdisjoint((*PARTIAL, *WEIGHT_KEYS, *GOOD, *BAD)):
        return True
    for key in PARTIAL:
        if turn.get(key):
            raise FormatError(f"field '{where}.{key}' cannot be followed; mark a turn as a whole with train: false")
    marks = {key: turn[key] for key in (*WEIGHT_KEYS, *GOOD, *BAD) if not is_empty(turn.get(key))}
    for key, value in marks.items():
        if value not in (0, 1):
            raise FormatError(f"field '{where}.{key}': a turn is trained (1) or not (0); found {show(value)}")
    trained = {bool(value) != (key in BAD) for key, value in marks.items()}
    if len(trained) > 1:
        raise FormatError(f"field '{where}': {' and '.join(marks)} contradict each other")
    return all(trained)


def _reasoning(turn: dict[str, Any], where: str) -> str:
    texts = {check_text(turn[key], f"{where}.{key}") for key in REASONING_KEYS if turn.get(key)}
    if len(texts) > 1:
        raise FormatError(f"field '{where}': two different texts of reasoning in {' and '.join(REASONING_KEYS)}")
    return texts.pop() if texts else ""


def _content(content: Any, role: str, where: str, nothing: bool) -> _Content:
    """The parts of a content, which may be None where `nothing` is no loss."""
    if content is None and nothing:
        return _Content()
    if role == "tool" and not isinstance(content, str) and not _are_parts(content):
        return _Content(to_json(content, where))  # a result as the tool gave it
    if not isinstance(content, list | tuple):
        return _Content(check_text(content, where))
    found = _Content()
    for i, part in enumerate(content):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, dict) or not _add_part(found, part, f"{where}[{i}]"):
            raise FormatError(f"field '{where}': only text parts can be trained on, found {show(content)}")
    return found


def _are_parts(content: Any) -> bool:
    known = ("text", "functionResponse", "function_response")
    return isinstance(content, list | tuple) and all(
        isinstance(part, dict) and (any(key in part for key in known) or part.get("type") in ("text", "tool_result"))
        for part in content
    )


def _add_part(found: _Content, part: dict[str, Any], where: str) -> bool:
    """Add a part to what was found; False if it is none of those that can be trained on."""
    if not part.keys().isdisjoint(MARKS):
        _refuse_media(part, where)
        if not is_trained(part, where):
            raise FormatError(f"field '{where}' must not be trained; mark its turn as a whole with train: false")
    kind = part.get("type")
    text = next((part[key] for key in ("text", "value", kind) if key in part), None)
    call = part if kind == "tool_use" else part.get("functionCall") or part.get("function_call")
    result = part if kind == "tool_result" else part.get("functionResponse") or part.get("function_response")
    if kind in ("thinking", "reasoning") or (text is not None and part.get("thought") is True):
        found.reasoning += check_text(text, where)
    elif kind in (None, "text", "input_text", "output_text") and isinstance(text, str):
        found.text += check_text(text, where)
    elif isinstance(call, dict):
        found.calls.append(call)
    elif isinstance(result, dict):
        found.results.append(_result(result, where))
    else:
        return False
    return True


def _result(result: dict[str, Any], where: str) -> Message:
    content = result.get("content", result.get("response"))
    message = {"role": "tool", "content": _content(content, "tool", where, nothing=True).text}
    if call := result.get("tool_use_id", result.get("id")):
        message["tool_call_id"] = check_text(call, f"{where}.tool_use_id")
    if result.get("name"):
        message["name"] = check_text(result["name"], f"{where}.name")
    return message


def _is_call(turn: dict[str, Any]) -> bool:
    role = next((turn[key] for key in ROLE_KEYS if key in turn), None)
    return isinstance(role, str) and role.strip().lower() in CALL_ROLES


def _parse_calls(content: Any, where: str) -> list[Any]:
    calls = parse_json(check_text(content, where), where) if not isinstance(content, dict | list) else content
    return calls if isinstance(calls, list) else [calls]


def _calls(turn: dict[str, Any], where: str) -> tuple[list[Any], str]:
    """A turn's calls under `tool_calls` or, of old, `function_call`; and the field's name."""
    calls, one = from_json(turn.get("tool_calls"), f"{where}.tool_calls", begins="["), turn.get("function_call")
    if calls and one:
        raise FormatError(f"field '{where}': tool_calls and function_call; one of them expected")
    if one:
        return [one], f"{where}.function_call"
    if calls and not isinstance(calls, list | tuple):
        raise FormatError(f"field '{where}.tool_calls': a list of calls expected, found {show(calls)}")
    return list(calls or []), f"{where}.tool_calls"


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call in OpenAI's form; Arrow cannot hold arguments of different shapes in a column, so they are text."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FormatError(f"field '{where}': a call with 'name' and 'arguments' expected, found {show(call)}")
    arguments = next((function[key] for key in ("arguments", "parameters", "input", "args") if key in function), None)
    for _ in range(2):  # some data holds the text of a text
        arguments = from_json(arguments, f"{where}.arguments")
    if not isinstance(arguments := {} if is_empty(arguments) else arguments, dict):
        raise FormatError(f"field '{where}.arguments': a JSON object expected, found {show(arguments)}")
    name = check_text(function["name"], f"{where}.name")
    identity = {"id": check_text(call["id"], f"{where}.id")} if call.get("id") else {}
    text = to_json(arguments, f"{where}.arguments")
    return {**identity, "type": "function", "function": {"name": name, "arguments": text}}


def with_context(row: TrackedRow, messages: list[Message]) -> list[Message]:
    """The messages of a row with its columns of context: system message, `history`, a text to answer from.

    Raises:
        FormatError: a context that has no place in these messages.
    """
    messages = _with_text(row, messages)
    start = 1 if messages and messages[0]["role"] == "system" else 0
    messages = [*messages[:start], *_history(row), *messages[start:]]
    systems = [message for key in SYSTEM if key in row for message in _system(row[key], key)]
    for message in systems if start else systems[1:]:
        if message != (messages if start else systems)[0]:
            raise FormatError("two different system messages in one row; leave one out (ignore: [column])")
    return messages if start else [*systems[:1], *messages]


def _system(value: Any, field: str) -> list[Message]:
    if is_empty(value):
        return []
    if isinstance(value, str):
        return conversation(value, field, "system")
    parts = value.get("parts", value.get("content")) if isinstance(value, dict) else value  # Vertex
    return conversation({"role": "system", "content": parts}, field)


def _history(row: TrackedRow) -> list[Message]:
    history = from_json(row.get("history"), "history", begins="[")
    if is_empty(history):
        return []
    if are_objects(history):
        return conversation(history, "history")
    if not isinstance(history, list | tuple) or any(not isinstance(p, list | tuple) or len(p) != 2 for p in history):
        raise FormatError(f"field 'history': a list of [question, answer] pairs expected, found {show(history)}")
    return [
        {"role": role, "content": check_text(text, f"history[{i}]")}
        for i, pair in enumerate(history)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _with_text(row: TrackedRow, messages: list[Message]) -> list[Message]:
    """The question with the text that it asks about before it, where the row has one that was not read yet."""
    for field in filter(row.__contains__, CONTEXT):
        if field in row.used or is_empty(row.get(field)):
            continue
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if len(asked) != 1:
            raise FormatError(
                f"field {field!r}: a text to answer from has no place in a conversation of {len(asked)} questions; "
                f"write it into a message, or leave it out (ignore: [{field}])"
            )
        text = row[field]
        texts = text if isinstance(text, list | tuple) else [text]
        text = "\n\n".join(check_text(part, field) for part in texts)
        question = messages[asked[0]]
        messages = [{**m, "content": f"{text}\n\n{m['content']}"} if m is question else m for m in messages]
    return messages


def to_tools(row: Row) -> str | None:
    """The row's tools as JSON text: a list of JSON schemas, from `tools`, `functions` or its system turn; or None.

    Raises:
        FormatError: not a list of objects, or two different lists.
    """
    request = dict.get(row, "input")  # OpenAI's preferences; looking here is not yet reading the column
    given = {"tools": row.get("tools"), "functions": row.get("functions")}
    given["input.tools"] = request.get("tools") if isinstance(request, dict) else None
    for column in row.keys() & TOOL_TURNS:
        turns = dict.get(row, column)
        for i, turn in enumerate(turns if isinstance(turns, list | tuple) else ()):
            if isinstance(turn, dict) and turn.get("tools"):
                given[f"{column}[{i}].tools"] = turn["tools"]
    lists = [_schemas(value, field) for field, value in given.items() if not is_empty(value)]
    lists = [found for found in lists if found]
    if any(found != lists[0] for found in lists):
        raise FormatError(f"two different lists of tools, in {' and '.join(k for k, v in given.items() if v)}")
    return to_json(lists[0], "tools") if lists else None


def _schemas(tools: Any, field: str) -> list[dict[str, Any]]:
    tools = from_json(tools, field)
    if not tools:
        return []
    if not are_objects(tools):
        raise FormatError(f"field {field!r}: a list of JSON schemas expected, found {show(tools)}")
    return [schema for tool in tools for schema in _schema(tool, field)]


def _schema(tool: dict[str, Any], field: str) -> list[dict[str, Any]]:
    """OpenAI's form of a schema in OpenAI's older, Anthropic's or Vertex' form; another one as it is."""
    declared = tool.get("functionDeclarations", tool.get("function_declarations"))
    if declared is not None:
        return _schemas(declared, "functions")
    if "input_schema" in tool:
        names = {"name": "name", "description": "description", "input_schema": "parameters"}
        tool = {ours: tool[theirs] for theirs, ours in names.items() if theirs in tool}
    elif field != "functions":
        return [tool]
    return [{"type": "function", "function": tool}]


def to_template_kwargs(row: Row) -> str | None:
    """The row's variables for the chat template, `chat_template_kwargs`, as JSON text; None where it has none.

    Raises:
        FormatError: not an object.
    """
    value = from_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if not value:
        return None
    if not isinstance(value, dict):
        raise FormatError(f"field 'chat_template_kwargs': an object expected, found {show(value)}")
    return to_json(value, "chat_template_kwargs")
