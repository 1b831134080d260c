"""Placeholder words in the place of a conversation's values: which of them does a chat template write?

A short text that stands elsewhere by accident proves nothing; a word that exists nowhere does. Each *shape* of a
conversation is rendered so once. Who makes labels refuses what a template drops by this, and the verifier accuses it by
this; it knows no rule of either.
"""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import Any

from ma_sft.errors import TemplateError

Message = dict[str, Any]
Render = Callable[[list[Message], list[Any] | None, bool], str]  # messages, tools, prompt; raises `TemplateError`
Lost = tuple[Any, str, bool]  # key of `Placeholders.values`, in what way it is lost, whether that is only worth a word
SPEAKER = "the name of a speaker"
_LEFT_OUT = object()


def tags_of(template: str) -> re.Pattern[str]:
    """Matches the tags that a chat template may look for in a text: those in its source."""
    found = {"<think>", "</think>", *re.findall(r"<[^<>\s{}'\"]{1,40}>|\[/?[A-Z_]+\]", template)}
    return re.compile(f"({'|'.join(sorted(map(re.escape, found), key=len, reverse=True))})")


def arguments_of(function: Message) -> dict[str, Any]:
    """The arguments of a call as an object, whichever way the row has them."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return {}
    return arguments if isinstance(arguments, dict) else {}


def shape(value: Any, tags: re.Pattern[str]) -> Any:
    """What decides which parts of a conversation a template writes: all but the words themselves."""
    if isinstance(value, str):
        return [part if n % 2 else bool(part.strip()) for n, part in enumerate(tags.split(value))] if value else ""
    if isinstance(value, dict):
        return [(k, item if k == "role" else shape(item, tags)) for k, item in value.items() if item is not None]
    if isinstance(value, list | tuple):
        return [shape(item, tags) for item in value]
    return type(value).__name__, bool(value)


class Placeholders:
    """A conversation whose texts are words that stand nowhere else.

    `values` names each value: key -> (message, or -1 for the tools; what it stands for). The key of a text is its word.
    Numbers, true, false, null and empty lists cannot be words: these are the `others`; `blank` is the number of one of
    them and what stands in its place.
    """

    def __init__(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        tags: re.Pattern[str],
        blank: tuple[int, Any] | None = None,
    ) -> None:
        self.values: dict[Any, tuple[int, str]] = {}
        self.others: list[Any] = []
        self._tags, self._blank, self._calls = tags, blank, list[tuple[str, str]]()
        # The tools come first: their words are the same for fewer messages
        self.tools = [self._tool(tool) for tool in tools] if tools else tools
        self.messages = [self._message(i, m) for i, m in enumerate(messages)]

    def _word(self, i: int, what: str) -> str:
        self.values[word := f"Qux{'t' if i < 0 else i}w{len(self.values)}z"] = i, what
        return word

    def _message(self, i: int, message: Message) -> Message:
        new = {key: value for key, value in message.items() if value is not None}
        if isinstance(new.get("content"), str):
            new["content"] = self._text(i, new["content"])
        if str(new.get("reasoning_content") or "").strip():
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
        parts = self._tags.split(text)
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
        own = {"id": call["id"].replace(f".{name}:", f".{word}:")} if isinstance(call.get("id"), str) else {}  # Kimi's
        return {**call, **own, "function": function}

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
        return self._blank[1] if self._blank and self._blank[0] == len(self.others) - 1 else value

    def _tool(self, tool: Any) -> Any:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            return tool
        new = {**function, "name": self._word(-1, f"the tool {function['name']!r}")}
        return {**tool, "function": new} if "function" in tool else new


def _one_of_each_kind(messages: list[Message], turns: list[int], tags: re.Pattern[str]) -> Iterable[int]:
    """The first of those turns that have the same keys, as many calls and the same tags."""
    kinds: dict[str, int] = {}
    for k in turns:
        message = {key: value for key, value in messages[k].items() if value}
        kind = sorted(message), len(message.get("tool_calls") or ()), tags.findall(str(message.get("content")))
        kinds.setdefault(repr(kind), k)
    return kinds.values()


def dropped_content(
    render: Render, messages: list[Message], tools: list[Any] | None, tags: re.Pattern[str]
) -> tuple[list[Lost], bool]:
    """What the template writes nowhere: of a turn when it is the last, of what stands before it in its prompt.

    And whether it shows arguments as Python shows a dict: another form of them may be the template's own.

    Raises:
        TemplateError: the template refuses the conversation in these words.
    """
    words = Placeholders(messages, tools, tags)
    lost, as_python = list[Lost](), False

    @cache
    def written(end: int, *, prompt: bool = False) -> str:
        return render(words.messages[:end], words.tools, prompt)

    turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    whole = written(turns[-1] + 1)
    with suppress(TemplateError):  # a conversation that begins with the assistant's turns has no prompt there
        whole = written(turns[-1], prompt=True) + whole

    def as_last(k: int) -> str:
        try:
            return written(k + 1)
        except TemplateError:  # of a turn before the first question (Qwen3.5)
            return whole

    own = {k: as_last(k) for k in dict.fromkeys([*_one_of_each_kind(messages, turns, tags), turns[-1]])}
    for key, (i, what) in words.values.items():
        if i > turns[-1] or key in words.others:
            continue
        text = own.get(i, whole)
        if key not in text:
            # History may leave out what the turn itself is trained on
            again = i in turns and i not in own and key in as_last(i)
            lost.append((key, " of earlier turns" if again else "", again or what == SPEAKER))
        elif key not in whole:
            lost.append((key, " of earlier turns", True))
        elif what.startswith("the argument"):
            as_python |= bool(re.search(rf"\{{'\w+': '{key}'", text))
            lost += [(key, " as a value", False)] * (f'\\"{key}' in text)  # JSON inside a JSON string is none

    @cache
    def is_lost(i: int, n: int, kind: type) -> bool:
        """Whether the n-th value is written as nothing is: unlike an empty text, too, if it is a number."""
        for value in (_LEFT_OUT, "")[: 2 if kind in (bool, int, float) else 1]:
            blank = Placeholders(messages[: i + 1], tools, tags, (n, value))
            with suppress(TemplateError):  # it reads the value
                if render(blank.messages, blank.tools, False) == written(i + 1):
                    return True
        return False

    first = dict[Any, tuple[int, int]]()  # a template writes an argument of one kind alike in all calls
    for n, key in enumerate(words.others):
        i, what = words.values[key]
        if i <= turns[-1] and is_lost(*first.setdefault((what, *key[2:]), (i, n)), key[2]):
            lost.append((key, "", False))
    return lost, as_python


def named(
    lost: list[Lost], messages: list[Message], tools: list[Any] | None, tags: re.Pattern[str]
) -> list[tuple[int, str, bool]]:
    """What a conversation of the shape in which `lost` was found loses: (message, what, only worth a word)."""
    values = Placeholders(messages, tools, tags).values if lost else {}
    found = [(values[key], how, harmless) for key, how, harmless in lost if key in values]  # it may have fewer tools
    return [(i, f"{what}{how}", harmless) for (i, what), how, harmless in found]
