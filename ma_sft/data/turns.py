"""Turns of every shape -> messages: roles, text parts, reasoning, tool calls and results, marks not to train a turn.

A turn names its role (`role`, `from`), or holds a question and its answer (`human`, `assistant`). Its content is a text
or a list of parts: OpenAI's, Anthropic's (`tool_use`, `tool_result`, `thinking`) or Vertex' (`functionCall`, ...).
"""

from dataclasses import dataclass, field
from typing import Any

from ma_sft.data.values import are_objects, check_text, from_json, is_empty, parse_json, read_json, show, to_json
from ma_sft.errors import FormatError

Message = dict[str, Any]


ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bard", "claude", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"),
}

CALL_ROLES = ("function_call", "tool_call")  # an assistant turn whose text is the call, or the calls, as JSON

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


@dataclass
class _Content:
    """What a turn's content holds: its text and reasoning, the tools it calls, and messages with tools' results."""

    text: str = ""
    reasoning: str = ""
    calls: list[Any] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)


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
    role = ROLES.get(name)
    if name in CALL_ROLES:
        role, calls, calls_at, content = "assistant", _parse_calls(content, at), at, ""
    if role is None:
        raise FormatError(f"field '{where}.{role_key}': one of {sorted(ROLES)} expected, found {show(named)}")
    parts = _content(content, role, at, nothing=bool(calls) or role == "tool")
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
