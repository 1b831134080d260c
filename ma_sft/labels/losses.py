"""What a chat template leaves out of a conversation, message by message.

Looking for a message's words in the text proves little: `Hi` stands in many a word. So each *shape* of a conversation
(roles, calls, reasoning, what is empty) is rendered once with a word of its own in the place of every value, and what
does not come back is lost. Whether a template drops part of one text (`content.split('</think>')[-1]`) is seen by
comparing each text with what was written of it.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from ma_sft.errors import TemplateError
from ma_sft.labels.dialect import strings

Message = dict[str, Any]
Render = Callable[[list[Message]], str]

_ESCAPED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_MARKUP = re.compile(r"</?(?:think|tool_call)>")
_SHAPES = 4096

TOOL_WORD = "ZqToolzW"  # the name that every tool has where a shape is rendered


class Losses:
    """Remembers what is lost of each shape. `render` gives the template's text of messages, or "" if it refuses."""

    def __init__(self) -> None:
        self._lost: dict[Any, list[tuple[int, str]]] = {}

    def check_context(
        self, messages: list[Message], text: str, render: Render, setting: Any, *, tools: bool = False
    ) -> None:
        """Raise `TemplateError` if a message that is no assistant's is not in `text`, the whole conversation's.

        Args:
            tools: there are tools. `render` names them `TOOL_WORD`: a call in the row would hide that none is written.
        """
        lost = dict(self._of_shape(messages, render, setting))
        if tools and -1 in lost:
            raise TemplateError("the chat template leaves out the tools; use a template that knows tools")
        for i, m in enumerate(messages):
            if m["role"] != "assistant" and (i in lost or not all(_written(part, text) for part in _texts(m))):
                raise TemplateError(
                    f"the chat template leaves out message {i} (role {m['role']!r}); "
                    "use a role that it knows, or another template"
                )

    def check_turn(
        self, messages: list[Message], k: int, target: str, render: Render, setting: Any, *, reasoned: bool = False
    ) -> None:
        """Raise `TemplateError` if something that assistant turn `k` says is not in `target`, its trained text.

        Args:
            reasoned: the reasoning is known to be in the target.
        """
        turn = messages[k]
        begin = next((i for i in range(k, -1, -1) if messages[i]["role"] == "user"), 0)
        window = messages[begin : k + 1]
        lost = [what for i, what in self._of_shape(window, render, setting) if i == len(window) - 1]
        if not all(_written(part, target) for text in _texts(turn) for part in _MARKUP.split(text)):
            lost.append("content")
        reasoning = turn.get("reasoning_content")
        if isinstance(reasoning, str) and not _written(reasoning, target):
            lost.append("reasoning_content")
        for call in turn.get("tool_calls") or []:
            function = call.get("function", call)
            if not all(_written(value, target) for value in strings(function.get("arguments"))):
                lost.append(f"tool call {function.get('name')!r}")
        if reasoned:
            lost = [what for what in lost if what != "reasoning_content"]
        if lost:
            raise TemplateError(_explain(turn, k, lost[0], last=k == len(messages) - 1))

    def _of_shape(self, messages: list[Message], render: Render, setting: Any) -> list[tuple[int, str]]:
        shape = (setting, *map(_shape, messages))
        if shape not in self._lost:
            if len(self._lost) >= _SHAPES:
                self._lost.clear()
            marked, words = _with_words(messages)
            words[TOOL_WORD] = (-1, "the tools")
            text = render(marked)
            self._lost[shape] = [where for word, where in words.items() if text and word not in text]
        return self._lost[shape]


def _texts(message: Message) -> list[str]:
    content = message.get("content")
    if isinstance(content, list):
        return [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return [content] if isinstance(content, str) else []


def _written(value: str, text: str) -> bool:
    """Whether a value stands in a text, as it is or with the backslashes of some kind of quotes."""
    value = value.strip()
    return value in text or value in _ESCAPED.sub(_unescape, text)


def _unescape(match: re.Match[str]) -> str:
    code, character = match.groups()
    return chr(int(code, 16)) if code else {"n": "\n", "r": "\r", "t": "\t"}.get(character, character)


def _shape(message: Message) -> tuple[Any, ...]:
    calls = [call.get("function", call) for call in message.get("tool_calls") or []]
    return (
        message["role"],
        *(bool(text.strip()) for text in _texts(message)),
        bool((message.get("reasoning_content") or "").strip()),
        *(json.dumps(call.get("arguments"), sort_keys=True, default=str, skipkeys=True) == "{}" for call in calls),
    )


def _with_words(messages: list[Message]) -> tuple[list[Message], dict[str, tuple[int, str]]]:
    """The messages with a word of its own for every text, and which value of which message each word stands for."""
    words: dict[str, tuple[int, str]] = {}

    def word(i: int, what: str) -> str:
        new = f"Zq{len(words)}zW"
        words[new] = (i, what)
        return new

    def values(value: Any, i: int, what: str) -> Any:
        if isinstance(value, dict):
            return {key: values(item, i, what) for key, item in value.items()}
        if isinstance(value, list):
            return [values(item, i, what) for item in value]
        return word(i, what) if isinstance(value, str) and value else value

    marked = []
    for i, message in enumerate(messages):
        message = dict(message)
        for key in ("content", "reasoning_content"):
            value = message.get(key)
            if isinstance(value, str) and value.strip():
                message[key] = word(i, key)
            elif isinstance(value, list):
                message[key] = [{**p, "text": word(i, key)} if "text" in p else p for p in value]
        calls = []
        for call in message.get("tool_calls") or []:
            function = call.get("function", call)
            what = f"tool call {function.get('name')!r}"
            arguments = values(function.get("arguments"), i, what)
            if isinstance(function.get("arguments"), str):
                arguments = function["arguments"]
            function = {**function, "name": word(i, what), "arguments": arguments}
            calls.append({**call, "function": function} if "function" in call else function)
        if calls:
            message["tool_calls"] = calls
        marked.append(message)
    return marked, words


def _explain(turn: Message, k: int, what: str, *, last: bool) -> str:
    if what == "content":
        text = " ".join(_texts(turn))
        beside = " beside its tool call" if turn.get("tool_calls") else ""
        return (
            f"the chat template leaves out the text {text[:60]!r} of message {k}{beside}, or part of it; "
            "use a template that writes it, or data without it"
        )
    if what == "reasoning_content":
        whose = "the last message's reasoning_content" if last else f"the reasoning_content of message {k}"
        return f"the chat template leaves out {whose}; use a template that knows it, or data without it"
    return f"the chat template leaves out the {what} of message {k}; use a template with tools"
