"""Placeholder words in the place of a conversation's values: which of them does a chat template write?

A short text that stands elsewhere by accident proves nothing; a word that exists nowhere does. And the forms in which a
serving stack gives messages to a template: the one in which nothing is lost is the template's own.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Message = dict[str, Any]
Form = Callable[[Message], Message]
Lost = tuple[Any, str, bool]  # key of `Placeholders.values`, in what way it is lost, whether that is only worth a word
TAG = re.compile(r"(<[^<>\s][^<>]{0,40}>)")
SPEAKER = "the name of a speaker"
_LEFT_OUT = object()


class Refused(Exception):
    """The template raised; the message is its own."""


def walk(value: Any, function: Callable[[str], Any]) -> Any:
    """The value with each text in it converted."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {key: walk(item, function) for key, item in value.items()}
    return [walk(item, function) for item in value] if isinstance(value, list | tuple) else value


def arguments_of(function: Message) -> dict[str, Any]:
    """The arguments of a call as an object, whichever way the row has them."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return {}
    return arguments if isinstance(arguments, dict) else {}


def _form(convert: Callable[[Message], Any], empty: str | None = "", *, parts: bool = False) -> Form:
    def form(message: Message) -> Message:
        message = {key: value for key, value in message.items() if value is not None and key != "train"}
        if message.get("tool_calls"):
            called = [(call, dict(call.get("function") or call)) for call in message["tool_calls"]]
            calls = [{"type": "function", **c, "function": {**f, "arguments": convert(f)}} for c, f in called]
            message |= {"content": message.get("content") or empty, "tool_calls": calls}
        if parts:
            message["content"] = [{"type": "text", "text": message.get("content") or ""}]
        return message

    return form


def _as_text(function: Message) -> str:
    return json.dumps(arguments_of(function), ensure_ascii=False)


FORMS = (_form(arguments_of), _form(_as_text, None), _form(_as_text), _form(arguments_of, parts=True))


def shape(value: Any) -> Any:
    """What decides which parts of a conversation a template writes: all but the words themselves."""
    if isinstance(value, str):
        return [part if n % 2 else bool(part.strip()) for n, part in enumerate(TAG.split(value))] if value else ""
    if isinstance(value, dict):
        return [(key, item if key == "role" else shape(item)) for key, item in value.items() if item is not None]
    return [shape(item) for item in value] if isinstance(value, list | tuple) else (type(value).__name__, bool(value))


class Placeholders:
    """A conversation whose texts are words that stand nowhere else.

    `values` names each value: key -> (message, or -1 for the tools; what it stands for). The key of a text is its word.
    Numbers, true, false, null and empty lists cannot be words: these are the `others`, of which number `blank` is an
    empty text or, where it is null or an empty list, left out.
    """

    def __init__(self, messages: list[Message], tools: list[Any] | None, blank: int | None = None) -> None:
        self.values: dict[Any, tuple[int, str]] = {}
        self.others: list[Any] = []
        self._blank, self._calls = blank, list[tuple[str, str]]()
        self.messages = [self._message(i, m) for i, m in enumerate(messages)]
        self.tools = [self._tool(tool) for tool in tools] if tools else tools

    def _word(self, i: int, what: str) -> str:
        self.values[word := f"Qux{'t' if i < 0 else i}w{len(self.values)}z"] = i, what
        return word

    def _message(self, i: int, message: Message) -> Message:
        new = {key: value for key, value in message.items() if value is not None}
        if isinstance(new.get("content"), str):
            new["content"] = self._text(i, new["content"])
        if new.get("reasoning_content"):
            new["reasoning_content"] = self._word(i, "the reasoning")
        if new.get("tool_calls"):
            new["tool_calls"] = [self._call(i, call) for call in new["tool_calls"]]
        if message["role"] != "tool" and new.get("name"):
            new["name"] = self._word(i, SPEAKER)
        elif called := [call for call in self._calls if call[0] == new.get("name")]:
            self._calls.remove(called[0])
            new["name"] = called[0][1]
        return new

    def _text(self, i: int, text: str) -> str:
        """Words for what stands between tags: a template may look for those."""
        parts = TAG.split(text)
        inside = "<think>" if parts[1:2] == ["</think>"] else ""  # as models write whose prompt opens the reasoning
        for n, part in enumerate(parts):
            if n % 2:
                inside = part
            elif part.strip():
                what = "the reasoning in the text" if inside == "<think>" else f"the text {part.strip()[:40]!r}"
                parts[n] = self._word(i, what)
        return "".join(parts)

    def _call(self, i: int, call: Message) -> Message:
        function = dict(call.get("function") or call)
        name = str(function.get("name"))
        function["name"] = word = self._word(i, f"the call {name!r}")
        self._calls.append((name, word))
        arguments = arguments_of(function)
        words = self._value(i, (word, name), "", arguments) if arguments else {}
        # One more, so that a call without arguments shows too how they are written
        function["arguments"] = {**words, "qux": self._word(i, f"the arguments of {name!r}")}
        return {**call, "function": function}

    def _value(self, i: int, call: tuple[str, str], path: str, value: Any) -> Any:
        if value and isinstance(value, dict | list):
            named = value.items() if isinstance(value, dict) else enumerate(value)
            inner = {key: f"{path}.{key}".lstrip(".") if isinstance(value, dict) else path for key, _ in named}
            made = {key: self._value(i, call, inner[key], value[key]) for key in inner}
            made = {key: item for key, item in made.items() if item is not _LEFT_OUT}
            return made if isinstance(value, dict) else [*made.values()]
        what = f"the argument {path!r} of {call[1]!r}"
        if isinstance(value, str):
            return self._word(i, what) if value else value
        key = call[0], path, type(value), bool(value)  # the same for all rows of a shape
        if key in self.values:  # a list of numbers may be long
            return value
        self.values[key] = i, what
        self.others.append(key)
        without = _LEFT_OUT if value in (None, [], {}) else ""
        return without if len(self.others) - 1 == self._blank else value

    def _tool(self, tool: Any) -> Any:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            return tool
        new = {**function, "name": self._word(-1, f"the tool {function['name']!r}")}
        return {**tool, "function": new} if "function" in tool else new


def dropped_content(
    render: Callable[..., str], messages: list[Message], tools: Any, form: Form, kwargs: dict[str, Any]
) -> tuple[list[Lost], bool]:
    """What the template writes nowhere: of a turn when it is the last, of what stands before it in its prompt.

    And whether it shows arguments as Python shows a dict: another form may be the template's own.
    """
    placeholders = Placeholders(messages, tools)
    formed, kinds, lost, as_python = [form(m) for m in placeholders.messages], dict[str, int](), list[Lost](), False

    def written(end: int, *, prompt: bool = False) -> str:
        return render(formed[:end], placeholders.tools, kwargs, prompt=prompt)

    turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    for k in turns:
        message = {key: value for key, value in messages[k].items() if value}
        kind = sorted(message), len(message.get("tool_calls") or ()), TAG.findall(str(message.get("content")))
        kinds.setdefault(repr(kind), k)
    own = {k: written(k + 1) for k in dict.fromkeys([*kinds.values(), turns[-1]])}
    whole = own[turns[-1]]
    with suppress(Refused):  # a conversation that begins with the assistant's turns has no prompt there
        whole = written(turns[-1], prompt=True) + whole
    for key, (i, what) in placeholders.values.items():
        if i > turns[-1] or key in placeholders.others:
            continue
        text = own.get(i, whole)
        if key not in text:
            # History may leave out what the turn itself is trained on
            again = i in turns and i not in own and key in written(i + 1)
            lost.append((key, " of earlier turns" if again else "", again or what == SPEAKER))
        elif key not in whole:
            lost.append((key, " of earlier turns", True))
        elif what.startswith("the argument"):
            as_python |= bool(re.search(rf"\{{'\w+': '{key}'", text))
            lost += [(key, " as a value", False)] * (f'\\"{key}' in text)  # JSON inside a JSON string is none
    for n, key in enumerate(placeholders.others):  # to write one is to write it unlike an empty text, or nothing
        i, _ = placeholders.values[key]
        blank = [form(m) for m in Placeholders(messages, tools, n).messages[: i + 1]]
        try:
            if i < turns[-1] + 1 and render(blank, placeholders.tools, kwargs, prompt=False) == written(i + 1):
                lost.append((key, "", False))
        except Refused:  # it reads the value
            continue
    return lost, as_python
