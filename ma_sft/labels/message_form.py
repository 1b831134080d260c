"""What one chat template asks for, found out by what it writes: the form of its messages, and how its turns end.

Templates differ in what they take (arguments as an object or as JSON text, content as text or as a list of parts,
tools always or only where there are some) and in how a turn ends (a token after it, the role token of whoever speaks
next, another token after a tool call). A few probes say which; nothing is guessed from names.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from ma_sft.errors import TemplateError

Message = dict[str, Any]

_SAID, _ASKED, _RESULT = "probe-said", "probe-asked", "probe-result"
_PARAMETERS = {"type": "object", "properties": {"probe_key": {"type": "string", "description": "A probe."}}}
_TOOL = {
    "type": "function",
    "function": {"name": "probe_tool", "description": "A probe.", "parameters": _PARAMETERS},
}
_FUNCTION = {"name": "probe_tool", "arguments": {"probe_key": _SAID}}
_USER = {"role": "user", "content": _ASKED}
_ANSWER = {"role": "assistant", "content": _SAID}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "probe1234", "type": "function", "function": _FUNCTION}],
}
_TOOL_RESULT = {"role": "tool", "name": "probe_tool", "tool_call_id": "probe1234", "content": _RESULT}
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class End:
    """The token at which generation stops after a turn.

    `tail` is what the template writes after the turn if nothing follows. `added` says that it does not write the
    token there: it is the next message's role token, or one that it writes only where a message follows, or the EOS
    token that the recipe adds. `gap` is what then stands between the turn and the token.
    """

    token: str
    tail: str = ""
    gap: str = ""
    added: bool = False


class MessageForm:
    """One template's form of messages and ends of turns.

    Args:
        render: `Renderer.render` with these variables.
        control: matches every control token.
        eos: the tokenizer's EOS token.
        with_tools: whether this is the template of rows with tools.
        add_eos: the EOS token ends turns, for a template that writes no end.

    Attributes:
        end, end_of_call: of an answer, and of a turn with tool calls.
        default_tools: what the template wants for rows without tools.

    Raises:
        TemplateError: the template refuses a question and an answer, or no token ends a turn.
    """

    def __init__(
        self,
        render: Callable[..., str],
        control: re.Pattern[str],
        eos: str | None,
        with_tools: bool,
        add_eos: bool,
    ) -> None:
        self._render, self._control, self._eos, self._add_eos = render, control, eos, add_eos
        self._tools: list[Any] | None = [_TOOL] if with_tools else None
        self._find_form()
        self.end = self._find_end(*self._after(_ANSWER, {**_USER, "content": _RESULT}))
        self.end_of_call = self._find_end_of_call(*self._after(_CALL, _TOOL_RESULT, [_TOOL])) or self.end
        ends = dict.fromkeys([self.end.token, self.end_of_call.token, eos or self.end.token])
        either = "|".join(map(re.escape, ends))
        self._at_end = re.compile(rf"({either})(?:\s|{either})*\Z")
        self.default_tools = None if self._tools == [_TOOL] else self._tools

    def messages(self, messages: list[Message]) -> list[Message]:
        """The messages as the template wants them; arguments are objects, or text that is no JSON object."""
        return [m if is_plain(m) and not self._parts else self._message(m) for m in messages]

    def render(self, messages: list[Message], tools: list[Any] | None, prompt: bool) -> str:
        """The template's text of messages in any form."""
        return self._render(self.messages(messages), tools, prompt=prompt)

    def end_in(self, text: str) -> tuple[int, int] | None:
        """Where the turn's end token begins and ends, behind which nothing stands but space and further end tokens."""
        found = self._at_end.search(text)
        return found.span(1) if found else None

    def _message(self, message: Message) -> Message:
        if message.get("tool_calls"):
            calls = [self._call(call) for call in message["tool_calls"]]
            message = {**message, "content": message.get("content") or "", "tool_calls": calls}
        if self._parts and isinstance(message.get("content"), str):
            message = {**message, "content": [{"type": "text", "text": message["content"]}]}
        # transformers gives it to templates under all the names that they read
        reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
        return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        if self._text_arguments and not isinstance(function.get("arguments"), str):
            function = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
        return {"type": "function", **call, "function": function} if "function" in call else function

    def _try(self, messages: list[Message], tools: list[Any] | None = None, prompt: bool = False) -> str:
        try:
            return self.render(messages, tools or self._tools, prompt)
        except TemplateError:
            return ""

    def _find_form(self) -> None:
        """Which tools the template wants, whether content is a list of parts, and whether arguments are text."""
        self._text_arguments = False
        wanted = [self._tools] if self._tools else (None, [], [_TOOL])
        for self._tools, self._parts in product(wanted, (False, True)):
            text = self._try([_USER, _ANSWER])
            if _SAID in text and _ASKED in text:
                break
        else:
            self._tools, self._parts = None, False
            self.render([_USER, _ANSWER], None, False)  # raises what the template says
        for self._text_arguments in (False, True):
            text = self._try([_USER, _CALL], [_TOOL])
            # Neither as Python's `repr` of a dict nor as JSON inside JSON
            if _SAID in text and "probe_tool" in text and "{'probe_key'" not in text and '\\"probe_key' not in text:
                return
        self._text_arguments = False

    def _after(self, turn: Message, following: Message, tools: list[Any] | None = None) -> tuple[str, str]:
        """What the template writes after a turn's words: if nothing follows, and up to the words that follow."""
        alone, history = self._try([_USER, turn], tools), self._try([_USER, turn, following], tools)
        if _SAID not in alone:
            return "", ""
        rest = history.rpartition(_SAID)[2].partition(_RESULT)[0] if _SAID in history else ""
        return alone.rpartition(_SAID)[2], rest

    def _find_end(self, alone: str, history: str) -> End:
        shared = self._last_shared(alone, history)
        first = self._control.search(alone) or self._control.search(history)
        if self._add_eos and (shared or first):
            token = shared.token if shared else first and first.group()
            raise TemplateError(f"add_eos: the chat template ends a turn by {token!r} itself; remove the setting")
        if shared:
            return shared
        if first is None and self._add_eos and self._eos:
            return End(self._eos, alone, added=True)
        if first is None:
            raise TemplateError(
                "the chat template writes no end-of-turn token after an assistant turn, so a model trained with it "
                "would never learn to stop; add the EOS token to the template, or set add_eos"
            )
        if alone.strip():
            return End(first.group(), alone[first.end() :])
        return End(first.group(), alone, history[: first.start()], added=True)

    def _find_end_of_call(self, alone: str, history: str) -> End | None:
        if not self.end.added:
            last = self._last_shared(alone, history)
            return last if last and (last.token == self.end.token or not last.tail.strip()) else None
        if self._add_eos:
            return End(self.end.token, alone, added=True)
        # Whatever closes the call, the turn ends where the tool begins to speak
        rest = history[len(alone) :] if history.startswith(alone) else ""
        if first := self._control.search(rest):
            return End(first.group(), gap=rest[: first.start()], added=True)
        # The result stands right behind the call (Apertus), so generation stops at what closes the call.
        closing = [m for m in self._control.finditer(alone) if m.end() == len(alone)] if rest else []
        return End(closing[0].group()) if closing else None

    def _last_shared(self, alone: str, history: str) -> End | None:
        """The control token that ends what both begin with: EOS, at which generation stops whatever follows, or the
        last one; the first one if the next speaker's header may be shared too."""
        shared = shared_length(alone, history)
        found = [m for m in self._control.finditer(alone) if m.end() <= shared]
        if not found:
            return None
        last = next((m for m in found if m.group() == self._eos), None)
        if last is None:
            text = self._try([_USER])  # some templates end every text with the generation prompt, asked for or not
            last = found[0 if text and text == self._try([_USER], prompt=True) else -1]
        return End(last.group(), alone[last.end() :])


def is_plain(message: Message) -> bool:
    """Whether a message is a role and a text."""
    return len(message) == 2 and isinstance(message.get("content"), str)


def shared_length(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
