"""What a chat template leaves out of a conversation, message by message.

Looking for a message's words in the text proves little: `Hi` stands in many a word. So each *shape* of a conversation
is rendered once with a placeholder in the place of every value, and what does not come back is left out. Whether a
template drops part of one text (`content.split('</think>')[-1]`) is seen by looking for each text in what was written.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ma_sft.errors import TemplateError

Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]  # (messages, with the generation prompt); "" if the template refuses

TOOL_NAME = "ZqToolzW"  # that every tool has where placeholders are rendered

_ESCAPED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_SCALARS = 50  # numbers, true and false of a call that are tried: a list of thousands goes the same way in each
_MARKUP = re.compile(r"</?(?:think|tool_call)>")
_SHAPES = 4096


@dataclass(frozen=True)
class _Place:
    """A value of a conversation: a message's text or reasoning, or its call number `call`; the tools are message -1."""

    message: int
    key: str = "content"
    call: int = 0


class Written:
    """Text that the template wrote; a value is in it as it is, or with the backslashes of some kind of quotes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._unescaped: str | None = None

    def __contains__(self, value: str) -> bool:
        value = value.strip()
        if value in self.text:
            return True
        if self._unescaped is None:
            self._unescaped = _ESCAPED.sub(_unescape, self.text) if "\\" in self.text else ""
        return value in self._unescaped


class DroppedContent:
    """Remembers what is left out of each shape."""

    def __init__(self) -> None:
        self._known: dict[Any, list[_Place]] = {}

    def check_context(
        self,
        messages: list[Message],
        kinds: tuple[str | None, ...],
        texts: list[str],
        render: Render,
        setting: Any,
        *,
        tools: bool,
    ) -> None:
        """Raise `TemplateError` if a message that is no assistant's is in none of `texts`: the whole one, the prompts.

        Args:
            kinds: what `describe` says of each message.
            setting: what decides beside the messages.
            tools: there are tools. `render` names them `TOOL_NAME`: a call in the row would hide that none is written.
        """
        dropped = {place.message for place in self._of_shape(messages, kinds, render, setting, prompts=True)}
        if tools and -1 in dropped:
            raise TemplateError("the chat template leaves out the tools; use a template that knows tools")
        written = [Written(text) for text in texts]
        for i, m in enumerate(messages):
            if m["role"] != "assistant" and (
                i in dropped or not all(any(text in each for each in written) for text in texts_of(m))
            ):
                raise TemplateError(
                    f"the chat template leaves out message {i} (role {m['role']!r}); "
                    "use a role that it knows, or another template"
                )

    def check_turn(
        self,
        messages: list[Message],
        kinds: tuple[str | None, ...],
        k: int,
        target: str,
        render: Render,
        setting: Any,
        *,
        reasoned: bool = False,
    ) -> None:
        """Raise `TemplateError` if something of assistant turn `k` is not in `target`, its trained text.

        Args:
            reasoned: the reasoning is known to be in the target.
        """
        turn, written = messages[k], Written(target)
        begin = next((i for i in range(k, -1, -1) if messages[i]["role"] == "user"), 0)
        window = messages[begin : k + 1]
        places = self._of_shape(window, kinds[begin : k + 1], render, setting, prompts=False)
        dropped = [place for place in places if place.message == len(window) - 1]
        texts = [text for text in texts_of(turn) if text not in written]
        if not all(part in written for text in texts for part in _MARKUP.split(text)):
            dropped.append(_Place(k))
        reasoning = turn.get("reasoning_content")
        if isinstance(reasoning, str) and reasoning not in written:
            dropped.append(_Place(k, "reasoning_content"))
        for number, call in enumerate(turn.get("tool_calls") or []):
            if not all(value in written for value in strings(call.get("function", call).get("arguments"))):
                dropped.append(_Place(k, "tool_calls", number))
        dropped = [place for place in dropped if not (reasoned and place.key == "reasoning_content")]
        if dropped:
            raise TemplateError(_explain(turn, k, dropped[0], last=k == len(messages) - 1))

    def _of_shape(
        self, messages: list[Message], kinds: tuple[str | None, ...], render: Render, setting: Any, *, prompts: bool
    ) -> list[_Place]:
        shape = (setting, prompts, *kinds) if None not in kinds else repr(messages)
        if shape not in self._known:
            if len(self._known) >= _SHAPES:
                self._known.clear()
            self._known[shape] = self._find(messages, render, prompts)
        return self._known[shape]

    def _find(self, messages: list[Message], render: Render, prompts: bool) -> list[_Place]:
        marked, places = _with_placeholders(messages)
        text = render(marked, False)
        if not text:
            return []
        dropped = {word: place for word, place in places.items() if word not in text}
        if (
            len(dropped) > (TOOL_NAME in dropped) and prompts
        ):  # some templates write a system message before the last question only
            asked = [k for k, m in enumerate(marked) if m["role"] == "assistant" and k]
            seen = "".join(render(marked[:k], True) for k in asked)
            dropped = {word: place for word, place in dropped.items() if word not in seen}
        unwritten = (
            [] if prompts else [place for place, other in _without_values(marked) if render(other, False) == text]
        )
        return [*dropped.values(), *unwritten]


def _with_placeholders(messages: list[Message]) -> tuple[list[Message], dict[str, _Place]]:
    """The messages with a word of its own for every text, and which value of which message each word stands for."""
    places = {TOOL_NAME: _Place(-1)}

    def word(*where: Any) -> str:
        new = f"Zq{len(places)}zW"
        places[new] = _Place(*where)
        return new

    def values(value: Any, *where: Any) -> Any:
        return map_values(value, lambda text: word(*where) if isinstance(text, str) and text else text)

    marked = []
    for i, message in enumerate(messages):
        message = dict(message)
        for key in ("content", "reasoning_content"):
            value = message.get(key)
            if isinstance(value, str) and value.strip():
                message[key] = word(i, key)
            elif isinstance(value, list):
                message[key] = [{**part, "text": word(i, key)} if "text" in part else part for part in value]
        calls = []
        for number, call in enumerate(message.get("tool_calls") or []):
            function, name = call.get("function", call), word(i, "tool_calls", number)
            arguments = function.get("arguments")
            arguments = arguments if isinstance(arguments, str) else values(arguments, i, "tool_calls", number)
            if isinstance(call.get("id"), str) and function.get("name"):  # Kimi writes a call's name by its id
                call = {**call, "id": call["id"].replace(function["name"], name)}
            function = {**function, "name": name, "arguments": arguments}
            calls.append({**call, "function": function} if "function" in call else {**call, **function})
        if calls:
            message["tool_calls"] = calls
        marked.append(message)
    return marked, places


def _without_values(messages: list[Message]) -> Iterator[tuple[_Place, list[Message]]]:
    """The messages with an empty text in the place of one number, true or false of a call, for each of them."""
    for i, message in enumerate(messages):
        for number, call in enumerate(message.get("tool_calls") or []):
            function = call.get("function", call)
            scalars: list[Any] = []
            map_values(function.get("arguments"), scalars.append)
            no_texts = [at for at, value in enumerate(scalars) if value is not None and not isinstance(value, str)]
            for at in no_texts[:_SCALARS]:
                others = iter([*scalars[:at], "", *scalars[at + 1 :]])
                other = map_values(function["arguments"], partial(_next_of, others))
                changed = {**function, "arguments": other}
                changed = {**call, "function": changed} if "function" in call else changed
                calls = [*message["tool_calls"][:number], changed, *message["tool_calls"][number + 1 :]]
                yield (
                    _Place(i, "tool_calls", number),
                    [*messages[:i], {**message, "tool_calls": calls}, *messages[i + 1 :]],
                )


def _next_of(values: Iterator[Any], _: Any) -> Any:
    return next(values)


def _explain(turn: Message, k: int, place: _Place, *, last: bool) -> str:
    if place.key == "content":
        text = " ".join(texts_of(turn))
        beside = " beside its tool call" if turn.get("tool_calls") else ""
        return (
            f"the chat template leaves out the text {text[:60]!r} of message {k}{beside}, or part of it; "
            "use a template that writes it, or data without it"
        )
    if place.key == "reasoning_content":
        whose = "the last message's reasoning_content" if last else f"the reasoning_content of message {k}"
        return f"the chat template leaves out {whose}; use a template that knows it, or data without it"
    call = turn["tool_calls"][place.call]
    name = call.get("function", call).get("name")
    return f"the chat template leaves out the tool call {name!r} of message {k}; use a template with tools"


def texts_of(message: Message) -> list[str]:
    content = message.get("content")
    if isinstance(content, list):
        return [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return [content] if isinstance(content, str) else []


def strings(value: Any) -> list[str]:
    """All texts in a JSON value, keys included."""
    if isinstance(value, dict):
        value = [either for item in value.items() for either in item]
    if isinstance(value, list | tuple):
        return [text for item in value for text in ([item] if isinstance(item, str) else strings(item))]
    return [value] if isinstance(value, str) else []


def map_values(value: Any, function: Callable[[Any], Any], *, keys: bool = False) -> Any:
    """The JSON value with every text, number, true, false and null (and keys) replaced by `function` of it."""
    if isinstance(value, dict):
        return {
            (map_values(key, function) if keys else key): map_values(item, function, keys=keys)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [map_values(item, function, keys=keys) for item in value]
    return function(value)


def _unescape(match: re.Match[str]) -> str:
    code, character = match.groups()
    return chr(int(code, 16)) if code else {"n": "\n", "r": "\r", "t": "\t"}.get(character, character)
