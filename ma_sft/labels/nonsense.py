"""Nonsense words in the place of what a conversation says: which of them does a chat template write?

A short text that stands elsewhere by accident proves nothing; a nonsense word does. And the forms in which a serving
stack gives messages to a template: of these, the one in which nothing is lost is the template's own.
"""

import json
import re
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
TAG = re.compile(r"(<[^<>\s][^<>]{0,40}>)")


class Words:
    """A conversation whose texts are nonsense words; `missing` says what stands for none of a text's."""

    def __init__(self, messages: list[Message], tools: list[Any] | None) -> None:
        self.words: dict[int, list[tuple[str, str]]] = {}  # message (-1: the tools) -> (word, what it stands for)
        self._names: list[tuple[str, str]] = []
        self.messages = [self._message(i, m) for i, m in enumerate(messages)]
        self.tools = [self._tool(tool) for tool in tools] if tools else None

    def missing(self, i: int, text: str) -> list[str]:
        """What message `i` says and `text` does not."""
        missing = [what for word, what in self.words.get(i, []) if word not in text]
        for word, what in self.words.get(i, []):
            # JSON inside a JSON string, or Python's way to show a dict, is no value
            if "argument" in what and (f'\\"{word}' in text or re.search(rf"\{{'\w+': '{word}'", text)):
                missing.append(f"{what} as a value")
        return list(dict.fromkeys(missing))

    def _word(self, i: int, what: str) -> str:
        words = self.words.setdefault(i, [])
        word = f"Qux{'t' if i < 0 else i}w{len(words)}z"
        words.append((word, what))
        return word

    def _message(self, i: int, message: Message) -> Message:
        new = dict(message)
        if isinstance(content := message.get("content"), str):
            new["content"] = self._text(i, content)
        if message.get("reasoning_content"):
            new["reasoning_content"] = self._word(i, "the reasoning")
        if message.get("tool_calls"):
            new["tool_calls"] = [self._call(i, call) for call in message["tool_calls"]]
        if message["role"] == "tool":
            at = next((n for n, (name, _) in enumerate(self._names) if name == message.get("name")), None)
            new |= {"name": self._names.pop(at)[1]} if at is not None else {}
        return new

    def _text(self, i: int, text: str) -> str:
        """Words for what stands between tags: a template may look for those."""
        parts, inside = TAG.split(text), ""
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
        self._names.append((name, function["name"]))
        words = {key: self._value(i, name, key, value) for key, value in arguments_of(function).items()}
        # One more, so that a call without arguments shows too how they are written
        function["arguments"] = {**words, "qux": self._word(i, f"an argument of {name!r}")}
        return {**call, "function": function}

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


def shape(messages: list[Message], tools: Any, kwargs: dict[str, Any]) -> str:
    """What decides which parts of a conversation a template writes: all but the words themselves."""

    def of(value: Any) -> Any:
        if isinstance(value, str):
            return TAG.findall(value) if value.strip() else ""
        if isinstance(value, dict):
            return [(key, of(item)) for key, item in value.items()]
        return [of(item) for item in value] if isinstance(value, list | tuple) else value

    return repr(([(m["role"], of(m)) for m in messages], bool(tools), sorted(kwargs.items())))


def one_of_each_kind(messages: list[Message], turns: list[int]) -> list[int]:
    """The first of the `turns` with each set of keys, tags and number of calls."""
    kinds: dict[str, int] = {}
    for k in turns:
        message = messages[k]
        kind = [sorted(message), len(message.get("tool_calls") or []), TAG.findall(str(message.get("content")))]
        kinds.setdefault(repr(kind), k)
    return list(kinds.values())


def arguments_of(function: Message) -> dict[str, Any]:
    """The arguments of a call as an object, whichever way the row has them."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return {}
    return arguments if isinstance(arguments, dict) else {}


def with_objects(message: Message) -> Message:
    """Arguments of calls as objects, as vLLM and transformers serve give them to a template."""
    return _with_arguments(message, arguments_of, "")


def with_text(message: Message) -> Message:
    """Arguments of calls as JSON text, as OpenAI's API has them."""
    return _with_arguments(message, lambda function: json.dumps(arguments_of(function), ensure_ascii=False), None)


def with_text_and_content(message: Message) -> Message:
    """As `with_text`, with an empty content, for templates that read it beside calls too."""
    return {"content": "", **{key: value for key, value in with_text(message).items() if value is not None}}


def with_parts(message: Message) -> Message:
    """Content as a list of parts, as templates of models with images take it."""
    message = with_objects(message)
    return {**message, "content": [{"type": "text", "text": message.get("content") or ""}]}


def _with_arguments(message: Message, convert: Callable[[Message], Any], empty: str | None) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function") or call)
        calls.append({"type": "function", **call, "function": {**function, "arguments": convert(function)}})
    return {**message, "content": message.get("content") or empty, "tool_calls": calls}


FORMS = (with_objects, with_parts)
FORMS_OF_CALLS = (with_objects, with_text, with_text_and_content, with_parts)
