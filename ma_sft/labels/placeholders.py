"""Placeholder words in the place of a conversation's values: which of them does a chat template write?

A short text that stands elsewhere by accident proves nothing; a word that exists nowhere does. And the forms in which a
serving stack gives messages to a template: the one in which nothing is lost is the template's own.
"""

import json
import re
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
Form = Callable[[Message], Message]
Lost = tuple[int, str, bool]  # message (-1: the tools), what of it, whether the loss is only worth a word
TAG = re.compile(r"(<[^<>\s][^<>]{0,40}>)")


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


def shape(messages: list[Message], tools: Any, kwargs: dict[str, Any]) -> str:
    """What decides which parts of a conversation a template writes: all but the words themselves."""

    def of(value: Any) -> Any:
        if isinstance(value, str):
            return TAG.findall(value) if value.strip() else ""
        if isinstance(value, dict):
            return [(key, of(item)) for key, item in value.items()]
        if isinstance(value, list | tuple):
            return [of(item) for item in value]
        return type(value).__name__, bool(value)

    said = [(m["role"], of({k: v for k, v in m.items() if v is not None})) for m in messages]
    return repr((said, bool(tools), sorted(kwargs.items())))


def dropped_content(
    render: Callable[..., str],
    messages: list[Message],
    form: Form,
    tools: Any,
    kwargs: dict[str, Any],
    *,
    text: bool = False,
) -> Any:
    """What the template writes nowhere: of a turn when it is the last, of what stands before it in its prompt.

    With `text`: the template's text around the words.
    """
    words = _Words(messages, tools)
    said, made = [form(m) for m in words.messages], words.tools if tools else tools

    def written(end: int, *, prompt: bool) -> str:
        return render(said[:end], made, kwargs, prompt=prompt)

    if text:
        return written(len(said), prompt=False)
    turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    kinds: dict[str, int] = {}
    for k in turns:
        message = {key: value for key, value in messages[k].items() if value}
        kind = sorted(message), len(message.get("tool_calls") or ()), TAG.findall(str(message.get("content")))
        kinds.setdefault(repr(kind), k)
    lost: list[Lost] = []
    for k in dict.fromkeys([*kinds.values(), turns[-1]]):
        own, before = written(k + 1, prompt=False), ""
        if k:
            try:
                before = written(k, prompt=True)
            except Refused:  # a conversation that begins with the assistant's turns has no prompt there
                before = ""
        lost += [(k, what, False) for what in words.missing(k, own)]
    for i in range(-1, turns[-1]):
        known = {what for at, what, _ in lost if at == i}
        for what in words.missing(i, before + own):
            if what not in known:
                # History may leave out reasoning, and (gpt-oss) text beside a call that the turn itself is trained on
                soft = i in turns and (
                    "reasoning" in what
                    or (messages[i].get("tool_calls") and what not in words.missing(i, written(i + 1, prompt=False)))
                )
                lost.append((i, f"{what} of earlier turns" if soft else what, bool(soft)))
    return lost + _dropped_extras(words, form, lambda m: render(m, made, kwargs, prompt=False), turns[-1] + 1)


def _dropped_extras(words: "_Words", form: Form, written: Callable[[list[Message]], str], end: int) -> list[Lost]:
    """Names of speakers, and values of arguments that are no text: to write one is to write it unlike an empty text."""
    whole = written([form(m) for m in words.messages[:end]])
    lost: list[Lost] = [(i, "the name of a speaker", True) for i, word in words.names if i < end and word not in whole]
    for i, values, key, what in words.others:
        kept, values[key] = values[key], ""
        try:
            same = i < end and written([form(m) for m in words.messages[:end]]) == whole
        except Refused:  # it reads the value
            same = False
        lost += [(i, what, False)] if same else []
        values[key] = kept
    return lost


class _Words:
    """A conversation whose texts are placeholder words; `missing` says what stands for none of a text's."""

    def __init__(self, messages: list[Message], tools: list[Any] | None) -> None:
        self.words: dict[int, list[tuple[str, str]]] = {}  # message (-1: the tools) -> (word, what it stands for)
        self.names: list[tuple[int, str]] = []  # of speakers
        self.others: list[tuple[int, Any, Any, str]] = []  # message, what holds a value that is no text, key, name
        self._calls: list[tuple[str, str]] = []
        self.messages = [self._message(i, m) for i, m in enumerate(messages)]
        self.tools = [self._tool(tool) for tool in tools] if tools else None

    def missing(self, i: int, text: str) -> list[str]:
        """What message `i` has and `text` has not."""
        missing = [what for word, what in self.words.get(i, []) if word not in text]
        for word, what in self.words.get(i, []):
            # JSON inside a JSON string, or Python's way to show a dict, is no value
            if "argument" in what and (f'\\"{word}' in text or re.search(rf"\{{'\w+': '{word}'", text)):
                missing.append(f"{what} as a value")
        return list(dict.fromkeys(missing))

    def _word(self, i: int, what: str) -> str:
        words = self.words.setdefault(i, [])
        words.append((word := f"Qux{'t' if i < 0 else i}w{len(words)}z", what))
        return word

    def _message(self, i: int, message: Message) -> Message:
        new = {key: value for key, value in message.items() if value is not None}
        if isinstance(content := message.get("content"), str):
            new["content"] = self._text(i, content)
        if message.get("reasoning_content"):
            new["reasoning_content"] = self._word(i, "the reasoning")
        if message.get("tool_calls"):
            new["tool_calls"] = [self._call(i, call) for call in message["tool_calls"]]
        if message["role"] == "tool":
            at = next((n for n, (name, _) in enumerate(self._calls) if name == message.get("name")), None)
            new |= {"name": self._calls.pop(at)[1]} if at is not None else {}
        elif message.get("name"):
            self.names.append((i, f"Quxs{i}z"))
            new["name"] = f"Quxs{i}z"
        return new

    def _text(self, i: int, text: str) -> str:
        """Words for what stands between tags: a template may look for those."""
        parts, inside = TAG.split(text), ""
        if parts[1:2] == ["</think>"]:
            inside = "<think>"  # as a model writes whose prompt opens the reasoning
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
        function["name"] = self._word(i, f"the call {name!r}")
        self._calls.append((name, function["name"]))
        words = {key: self._value(i, name, key, value) for key, value in arguments_of(function).items()}
        self._note_others(i, name, "", words, set())
        # One more, so that a call without arguments shows too how they are written
        words["qux"] = self._word(i, f"an argument of {name!r}")
        function["arguments"] = words
        return {**call, "function": function}

    def _note_others(self, i: int, name: str, path: str, held: Any, seen: set[Any]) -> None:
        """Note the values that are no text, one of each kind in a list: a list of numbers may be long."""
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            inner = path if isinstance(held, list) else f"{path}.{key}".lstrip(".")
            kind = inner, type(value), bool(value)
            if isinstance(value, dict | list):
                self._note_others(i, name, inner, value, seen)
            elif isinstance(value, bool | int | float) and kind not in seen:
                seen.add(kind)
                self.others.append((i, held, key, f"the argument {inner!r} of {name!r}"))

    def _value(self, i: int, name: str, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: self._value(i, name, f"{key}.{inner}", item) for inner, item in value.items()}
        if isinstance(value, list):
            return [self._value(i, name, key, item) for item in value]
        return self._word(i, f"the argument {key!r} of {name!r}") if isinstance(value, str) and value else value

    def _tool(self, tool: Any) -> Any:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            return tool
        new = {**function, "name": self._word(-1, f"the tool {function['name']!r}")}
        return {**tool, "function": new} if "function" in tool else new
