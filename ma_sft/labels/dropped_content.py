"""What a chat template leaves out of a conversation, message by message.

Looking for a message's words in the text proves little: `Hi` stands in many a word. So each *shape* of a conversation
is rendered once with a placeholder in the place of every value, and what does not come back is left out. Whether a
template drops part of one text (`content.split('</think>')[-1]`) is seen by looking for each text in what was written.
"""

import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from ma_sft.errors import TemplateError

Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]  # (messages, with the generation prompt); "" if the template refuses
Path = tuple[Any, ...]  # where a value stands in a conversation: number of the message, key, and so on

TOOL_NAME = "ZqToolzW"  # that every tool has where placeholders are rendered

_TOOLS = (-1, "tools")
_ESCAPED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_SCALARS = 50  # numbers, true and false of a conversation's calls that are tried: thousands go the same way in each
_MARKUP = re.compile(r"</?(?:think|tool_call)>")
_SHAPES = 4096


class DroppedContent:
    """Remembers what is left out of each shape.

    Arguments of both methods: `kinds` is what `describe` says of each message, `setting` what decides beside them.
    """

    def __init__(self) -> None:
        self._known: dict[Any, list[Path]] = {}

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
            tools: there are tools. `render` names them `TOOL_NAME`: a call in the row would hide that none is written.
        """
        dropped = {path[0] for path in self._of_shape(messages, kinds, render, setting, prompts=True)}
        if tools and -1 in dropped:
            raise TemplateError("the chat template leaves out the tools; use a template that knows tools")
        for i, m in enumerate(messages):
            if m["role"] == "assistant":
                continue
            if i in dropped or not all(any(_writes(text, value) for text in texts) for value in texts_of(m)):
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
        turn = messages[k]
        begin = next((i for i in range(k, -1, -1) if messages[i]["role"] == "user"), 0)
        paths = self._of_shape(messages[begin : k + 1], kinds[begin : k + 1], render, setting, prompts=False)
        dropped = [path[1:] for path in paths if path[0] == k - begin]
        texts = [text for text in texts_of(turn) if not _writes(target, text)]
        if not all(_writes(target, part) for text in texts for part in _MARKUP.split(text)):
            dropped.append(("content",))
        reasoning = turn.get("reasoning_content")
        if isinstance(reasoning, str) and not _writes(target, reasoning):
            dropped.append(("reasoning_content",))
        for number, call in enumerate(turn.get("tool_calls") or ()):
            if not all(_writes(target, value) for value in strings(call.get("function", call).get("arguments"))):
                dropped.append(("tool_calls", number))
        dropped = [path for path in dropped if not (reasoned and path[0] == "reasoning_content")]
        if dropped:
            raise TemplateError(_explain(turn, k, dropped[0], last=k == len(messages) - 1))

    def _of_shape(
        self, messages: list[Message], kinds: tuple[str | None, ...], render: Render, setting: Any, *, prompts: bool
    ) -> list[Path]:
        shape = (setting, prompts, kinds) if None not in kinds else repr(messages)
        if shape not in self._known:
            if len(self._known) >= _SHAPES:
                self._known.clear()
            self._known[shape] = _find_dropped(messages, render, prompts)
        return self._known[shape]


def _find_dropped(messages: list[Message], render: Render, prompts: bool) -> list[Path]:
    """Paths of the values that the template does not write, of calls as of one value."""
    words = {TOOL_NAME: _TOOLS}
    scalars: list[Path] = []

    def as_word(path: Path, value: Any) -> Any:
        if value is not None and not isinstance(value, str) and "arguments" in path:
            scalars.append(path)
        if not isinstance(value, str) or not value.strip() or not _is_said(path):
            return value
        words[word := f"Zq{len(words)}zW"] = path
        return word

    marked = _walk(messages, as_word)
    for message, original in zip(marked, messages, strict=True):
        for call, named in zip(message.get("tool_calls") or (), original.get("tool_calls") or (), strict=True):
            if isinstance(call.get("id"), str):  # Kimi writes a call's name by its id
                name, word = (each.get("function", each).get("name") or "" for each in (named, call))
                call["id"] = call["id"].replace(name, word) if name else call["id"]
    text = render(marked, False)
    if not text:
        return []
    dropped = {word: path for word, path in words.items() if word not in text}
    if prompts and dropped.keys() - {TOOL_NAME}:  # a system message may stand before the last question only
        asked = [k for k, m in enumerate(marked) if m["role"] == "assistant" and k]
        seen = "".join(render(marked[:k], True) for k in asked)
        dropped = {word: path for word, path in dropped.items() if word not in seen}
    paths = sorted(dropped.values(), key=lambda path: path[1] == "tool_calls")  # texts are named first
    for path in [] if prompts else scalars[:_SCALARS]:
        if render(_walk(marked, partial(_without, path)), False) == text:
            paths.append(path)
    return [path[:3] for path in paths]


def _without(path: Path, at: Path, value: Any) -> Any:
    return "" if at == path else value


def _is_said(path: Path) -> bool:
    """Whether somebody says what stands there: texts, and a call's name and arguments."""
    match path[1:]:
        case ("content" | "reasoning_content",) | ("content", _, "text"):
            return True
        case ("tool_calls", _, "function", *rest) | ("tool_calls", _, *rest):
            return rest == ["name"] or (rest[0] == "arguments" and len(rest) > 1)
    return False


def _walk(value: Any, function: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    if isinstance(value, dict):
        return {key: _walk(item, function, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(item, function, (*path, at)) for at, item in enumerate(value)]
    return function(path, value)


def _explain(turn: Message, k: int, path: Path, *, last: bool) -> str:
    if path[0] == "content":
        text = " ".join(texts_of(turn))
        beside = " beside its tool call" if turn.get("tool_calls") else ""
        return (
            f"the chat template leaves out the text {text[:60]!r} of message {k}{beside}, or part of it; "
            "use a template that writes it, or data without it"
        )
    if path[0] == "reasoning_content":
        whose = "the last message's reasoning_content" if last else f"the reasoning_content of message {k}"
        return f"the chat template leaves out {whose}; use a template that knows it, or data without it"
    call = turn["tool_calls"][path[1]]
    name = call.get("function", call).get("name")
    return f"the chat template leaves out the tool call {name!r} of message {k}; use a template with tools"


def texts_of(message: Message) -> list[str]:
    """The texts of a message's content, which may be a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        return [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return [content] if isinstance(content, str) else []


def strings(value: Any) -> list[str]:
    """All texts in a JSON value, keys included."""
    texts, values = [], [value]
    for item in values:  # which grows meanwhile
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, dict):
            values += item.keys()
            values += item.values()
        elif isinstance(item, (list, tuple)):
            values += item
    return texts


def _writes(text: str, value: str) -> bool:
    """Whether a value is in a text, as it is or with the backslashes of some kind of quotes."""
    value = value.strip()
    return value in text or ("\\" in text and value in _unescaped(text))


@lru_cache(8)
def _unescaped(text: str) -> str:
    def character(match: re.Match[str]) -> str:
        code, other = match.groups()
        return chr(int(code, 16)) if code else {"n": "\n", "r": "\r", "t": "\t"}.get(other, other)

    return _ESCAPED.sub(character, text)
