"""What one chat template asks for, found out by what it writes: the form of its messages, and how its turns end.

Templates differ in what they take (arguments as an object or as JSON text, content as text or as a list of parts,
tools always or only where there are some) and in how a turn ends (a token after it, the role token of whoever speaks
next, another token after a tool call). A few probes say which; nothing is guessed from names.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes

from ma_sft.errors import TemplateError
from ma_sft.labels.bounds import RunawayTemplateError
from ma_sft.labels.jinja import compiled

Message = dict[str, Any]

# What templates raise when they are given something that they do not expect.
REFUSALS = (JinjaError, TypeError, KeyError, AttributeError, ValueError, IndexError)

_SWITCH = re.compile("think|reason")

_SAID, _ASKED, _RESULT = "probe-said", "probe-asked", "probe-result"
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "A probe."}}},
    },
}
_USER = {"role": "user", "content": _ASKED}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "probe1234",
            "type": "function",
            "function": {"name": "probe_tool", "arguments": {"probe_key": _SAID}},
        }
    ],
}
_TOOL_RESULT = {"role": "tool", "name": "probe_tool", "tool_call_id": "probe1234", "content": _RESULT}


@dataclass(frozen=True)
class End:
    """The token at which generation stops after a turn.

    `tail` is what the template writes after it if nothing follows. `shared` says that it is the next message's role
    token: the template writes `gap` and it only where a message follows.
    """

    token: str
    tail: str = ""
    gap: str = ""
    shared: bool = False


class Dialect:
    """One template's form of messages and ends of turns.

    Args:
        render: `(messages, tools, prompt) -> text`, with the template's own errors.
        control: matches every control token.
        eos: the tokenizer's EOS token.
        with_tools: whether this is the template of rows with tools.

    Raises:
        TemplateError: no token ends a turn.
    """

    def __init__(
        self,
        render: Callable[[list[Message], list[Any] | None, bool], str],
        control: re.Pattern[str],
        eos: str | None,
        with_tools: bool,
    ) -> None:
        self._raw, self._control, self._eos = render, control, eos
        self._refusal: Exception | None = None
        self._parts, self._text_arguments, self._blank = False, False, ""
        self._tools: list[Any] | None = [_TOOL] if with_tools else None
        self._find_form()
        after_text = self._after(_SAID, {"role": "assistant", "content": _SAID}, {**_USER, "content": _RESULT})
        self.end = self._find_end(*after_text)
        after_call = self._after(_SAID, _CALL, _TOOL_RESULT, [_TOOL])
        self.end_of_call = self._find_end_of_call(*after_call) or self.end
        self.ends = list(dict.fromkeys((self.end.token, self.end_of_call.token)))
        self.tails = {"", self.end.tail, self.end_of_call.tail}
        self.default_tools = None if self._tools == [_TOOL] else self._tools

    def messages(self, messages: list[Message]) -> list[Message]:
        """The messages as the template wants them; arguments are objects, or text that is no JSON object."""
        return [self._message(m) for m in messages]

    def _message(self, message: Message) -> Message:
        if message.get("tool_calls"):
            content = message.get("content") or self._blank
            calls = [self._call(call) for call in message["tool_calls"]]
            message = {**message, "content": content, "tool_calls": calls}
        if self._parts and isinstance(message.get("content"), str):
            message = {**message, "content": [{"type": "text", "text": message["content"]}]}
        return message

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        if self._text_arguments and not isinstance(function.get("arguments"), str):
            function = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
        return {"type": "function", **call, "function": function} if "function" in call else function

    # -- probes -------------------------------------------------------------------------------------------------

    def _try(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        try:
            return self._raw(self.messages(messages), tools or self._tools, False)
        except RunawayTemplateError:
            raise
        except REFUSALS as error:
            self._refusal = error
            return ""

    def _find_form(self) -> None:
        turn = [_USER, {"role": "assistant", "content": _SAID}]
        for tools, parts in product([self._tools] if self._tools else (None, [], [_TOOL]), (False, True)):
            self._tools, self._parts = tools, parts
            text = self._try(turn)
            if _SAID in text and _ASKED in text:
                break
        else:
            self._tools, self._parts = None, False
        for as_text, blank in product((False, True), ("", None)):
            self._text_arguments, self._blank = as_text, blank  # type: ignore[assignment]
            if _writes_call(self._try([_USER, _CALL], [_TOOL])):
                return
        self._text_arguments, self._blank = False, ""

    def _after(self, said: str, turn: Message, following: Message, tools: list[Any] | None = None) -> tuple[str, str]:
        """What the template writes after a turn's words: if nothing follows, and up to the words that follow."""
        alone, history = self._try([_USER, turn], tools), self._try([_USER, turn, following], tools)
        if said not in alone:
            return "", ""
        rest = history[history.rfind(said) + len(said) :].partition(_RESULT)[0] if said in history else ""
        return alone[alone.rindex(said) + len(said) :], rest

    def _find_end(self, alone: str, history: str) -> End:
        shared = self._last_shared(alone, history)
        if shared:
            return shared
        if self._refusal is not None and not alone:
            raise TemplateError(f"the chat template refuses a question and an answer: {self._refusal}")
        first = self._control.search(alone) or self._control.search(history)
        if first is None:
            raise TemplateError(
                "the chat template writes no end-of-turn token after an assistant turn, so a model trained with it "
                "would never learn to stop; add the EOS token to the template"
            )
        if alone.strip():
            return End(first.group(), alone[first.end() :])
        return End(first.group(), gap=history[: first.start()], shared=True)

    def _find_end_of_call(self, alone: str, history: str) -> End | None:
        if self.end.shared:  # whatever closes the call, the turn ends where the tool begins to speak
            rest = history[len(alone) :] if history.startswith(alone) else ""
            if first := self._control.search(rest):
                return End(first.group(), gap=rest[: first.start()], shared=True)
            # The result stands right behind the call (Apertus), so generation stops at what closes the call.
            closing = [m for m in self._control.finditer(alone) if m.end() == len(alone)] if rest else []
            return End(closing[0].group()) if closing else None
        last = self._last_shared(alone, history)
        return last if last and (last.token == self.end.token or not last.tail.strip()) else None

    def _last_shared(self, alone: str, history: str) -> End | None:
        """The control token that ends what both begin with: EOS, at which generation stops whatever follows, or the
        last one; the first one if the next speaker's header may be shared too."""
        shared = shared_length(alone, history)
        found = [m for m in self._control.finditer(alone) if m.end() <= shared]
        if not found:
            return None
        named = [m for m in found if m.group() == self._eos]
        last = (named or found)[0] if named or self._always_prompts() else found[-1]
        return End(last.group(), alone[last.end() :])

    def _always_prompts(self) -> bool:
        """Whether the template ends every text with the generation prompt, asked for or not."""
        try:
            return self._try([_USER]) == self._raw(self.messages([_USER]), self._tools, True)
        except REFUSALS:
            return False


def _writes_call(text: str) -> bool:
    """Whether name and argument stand in the text, neither as Python's `repr` of a dict nor as JSON inside JSON."""
    wrong = ("{'probe_key'", '\\"probe_key')
    return _SAID in text and "probe_tool" in text and not any(form in text for form in wrong)


@lru_cache
def switches(template: str) -> list[tuple[str, Any]]:
    """The variables by which a template may switch reasoning, each with each value that could matter."""
    tree = compiled(template).environment.parse(template)
    names = [name.name for name in tree.find_all(nodes.Name) if _SWITCH.search(name.name)]
    values: dict[str, dict[Any, None]] = {name: dict.fromkeys((False, True)) for name in names}
    for compared in tree.find_all(nodes.Compare):
        if isinstance(compared.expr, nodes.Name) and compared.expr.name in values:
            texts = [const.value for op in compared.ops for const in op.find_all(nodes.Const)]
            values[compared.expr.name].update(dict.fromkeys(text for text in texts if isinstance(text, str) and text))
    return [(name, value) for name in values for value in values[name]]


def shared_length(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def strings(value: Any) -> Iterator[str]:
    """All texts in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """The JSON value with every text, keys included, replaced by `function` of it."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {map_strings(key, function): map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, function) for item in value]
    return value
