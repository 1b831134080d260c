"""What inference's prompt and the model's answer are, for each assistant turn of a conversation, as text.

For turn k, `prompt = render(messages[:k], add_generation_prompt=True)` is what the model sees, and
`target = render(messages[:k+1]) - prompt` is what it should write, up to and with the token that stops it.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ma_sft.errors import TemplateError
from ma_sft.labels.bounds import RunawayTemplateError
from ma_sft.labels.dialect import REFUSALS, Dialect, map_strings, shared_length, strings, switches
from ma_sft.labels.losses import TOOL_WORD, Losses
from ma_sft.labels.render import Renderer

Message = dict[str, Any]

FORBIDDEN = "marked not to be trained in the row"

# Markup that an assistant itself writes in its content; everybody else's is ordinary text.
ASSISTANT_MARKUP = frozenset({"<think>", "</think>", "<tool_call>", "</tool_call>"})

_EXACT = 4  # turns that are rendered one by one; in longer conversations the others are found by them

_EMPTY_REASONING = re.compile(r"<think>\s*</think>\s*")

_OPEN_THOUGHT = re.compile(r"<think>\s*\Z")

# A reasoning that the generation prompt opens and closes, so that the answer follows.
_SHUT_THOUGHT = re.compile(
    r"(<(?!/|\|END)[^<>]*(?:think|channel)[^<>]*>)(?:thought)?\s*(<[^<>]*(?:think|channel)[^<>]*>)\s*\Z", re.IGNORECASE
)

_PRIVATE_USE = [chr(code) for code in range(0xE002, 0xF900)]  # the two before them are those of traces


@dataclass(frozen=True)
class Chat:
    """A conversation whose control-token text is cut by `marker`, and how it is rendered."""

    messages: list[Message]
    tools: list[Any] | None
    kwargs: dict[str, Any]
    untrained: frozenset[int]  # messages that the row forbids to train
    dialect: Dialect
    marker: str
    special_text: list[str]


@dataclass(frozen=True)
class Said:
    """What assistant turn `message` writes after `prompt`, with the token that stops it; or why it is not trained."""

    message: int
    prompt: str = ""
    target: str = ""
    reason: str = ""
    built: bool = False  # of the row's own reasoning, which the template drops
    unthought: bool = False  # `target` stands in history, which lacks the last turn's empty reasoning block


@dataclass(frozen=True)
class Turn:
    """One assistant turn of a sequence: tokens `start:end` are trained, the end-of-turn token included.

    A turn that is not trained in this sequence has an empty span and says why in `reason`. `unthought` turns stand in
    it as history, without the empty reasoning block that the template writes before the last turn.
    """

    message: int
    start: int = 0
    end: int = 0
    reason: str = ""
    unthought: bool = False

    @property
    def trained(self) -> bool:
        return self.end > self.start


class Targets:
    """Finds the prompts and targets of conversations for one tokenizer and its chat template.

    Args:
        tokenizer: with a chat template.
        control: the tokens that cut its text; see `control_tokens`.
        train_on, template_kwargs, template_now: as `ChatEncoder`'s.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        control: Collection[str],
        train_on: Literal["all", "last"],
        template_kwargs: dict[str, Any],
        template_now: str | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.template_kwargs = template_kwargs
        self.control_pattern = _any_of(control)
        self.tails: set[str] = set()  # what the template may write behind a conversation
        self._renderer = Renderer(tokenizer, template_now)
        self._escape = _escaper(control)
        self._escape_assistant = _escaper(t for t in control if t not in ASSISTANT_MARKUP)
        self._losses = Losses()
        self._advice: dict[Any, str] = {}
        self._dialects: dict[tuple[str, str], Dialect] = {}
        self.end_token = self._dialect(None, template_kwargs).end.token

    def turns(self, chat: Chat) -> tuple[str, list[Said]]:
        """The whole conversation's text, and what each turn that is to be trained writes."""
        full = self.render(chat, len(chat.messages))
        render = partial(self._shape_text, chat)
        named = bool(chat.tools) and all(isinstance(tool, dict) for tool in chat.tools or [])
        self._losses.check_context(chat.messages, full, render, _setting(chat), tools=named)
        for tool in chat.tools or []:
            if _tool_name(tool) not in full:
                raise TemplateError("the chat template leaves out the tools; use a template that knows tools")
        assistants = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
        wanted = assistants if self.train_on == "all" else assistants[-1:]
        turns = self._anchored(chat, full, assistants) if len(wanted) > _EXACT else None
        turns = turns or [self._exact(chat, k, full) for k in wanted]
        for turn in turns:
            if not turn.reason:
                try:
                    self._check_turn(chat, turn)
                except TemplateError as error:
                    if not (advice := self._advise(chat, turn.message)):
                        raise
                    raise TemplateError(f"{str(error).rpartition('; ')[0]}; {advice}") from None
        return full, turns

    def chat(self, messages: list[Message], tools: list[Any] | None, kwargs: dict[str, Any] | None) -> Chat:
        """The conversation with control-token text cut in two by a character that occurs nowhere in it."""
        untrained = frozenset(i for i, m in enumerate(messages) if m.get("train") is False)
        # Arguments are parsed before anything is cut: JSON can spell a control token with escapes.
        messages = [_with_objects({key: m[key] for key in m if key != "train"}) for m in messages]
        row = kwargs or {}
        dialect = self._dialect(tools, {**self.template_kwargs, **row})
        everything = "\0".join(strings([messages, tools, row]))
        found = self.control_pattern.findall(everything)
        if not found:
            return Chat(messages, tools, {**self.template_kwargs, **row}, untrained, dialect, "", [])
        marker = next(c for c in _PRIVATE_USE if c not in everything and _as_json(c) not in everything)

        def cut(text: str) -> str:
            return self._escape(text, marker)

        def cut_said(text: str) -> str:
            return self._escape_assistant(text, marker)

        escaped = [
            {
                key: map_strings(value, cut_said if m.get("role") == "assistant" and key == "content" else cut)
                for key, value in m.items()
            }
            for m in messages
        ]
        row_cut, tools_cut = map_strings(row, cut), map_strings(tools, cut)
        same = (escaped, row_cut, tools_cut) == (messages, row, tools)
        text = [] if same else list(dict.fromkeys(found))
        return Chat(escaped, tools_cut, {**self.template_kwargs, **row_cut}, untrained, dialect, marker, text)

    def render(self, chat: Chat, count: int, *, prompt: bool = False) -> str:
        """The template's text of the first `count` messages."""
        messages = chat.messages[:count]
        tools = chat.tools or chat.dialect.default_tools
        try:
            text = self._renderer.render(chat.dialect.messages(messages), tools, chat.kwargs, prompt=prompt)
            # A template may write JSON in ASCII alone, the marker among it
            return text.replace(_as_json(chat.marker), chat.marker) if chat.marker else text
        except RunawayTemplateError:
            raise
        except REFUSALS as error:
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise TemplateError(f"the chat template refuses a conversation with roles [{roles}]: {error}") from None

    def _dialect(self, tools: list[Any] | None, kwargs: dict[str, Any]) -> Dialect:
        """The dialect of the template with these variables, of which those of reasoning change what it writes."""
        template = self.tokenizer.get_chat_template(tools=tools)
        named = {name: kwargs[name] for name, _ in switches(template) if name in kwargs}
        key = (template, repr(named))
        if key not in self._dialects:
            variables = {**self.template_kwargs, **named}

            def render(messages: list[Message], tools: list[Any] | None, prompt: bool) -> str:
                return self._renderer.render(messages, tools, variables, prompt=prompt)

            self._dialects[key] = Dialect(
                render, self.control_pattern, self.tokenizer.eos_token, with_tools=bool(tools)
            )
            self.tails |= self._dialects[key].tails
        return self._dialects[key]

    def _exact(self, chat: Chat, k: int, full: str) -> Said:
        """What turn `k` writes, by rendering the conversation before it and with it."""
        if k in chat.untrained:
            return Said(k, reason=FORBIDDEN)
        if k == 0:
            return Said(k, reason="no message comes before it, so nobody would ask the model for it")
        said = self._say(chat, k, full if k == len(chat.messages) - 1 else None)
        return said if isinstance(said, Said) else Said(k, reason=self._why_unlike(chat, k, said))

    def _anchored(self, chat: Chat, full: str, assistants: list[int]) -> list[Said] | None:
        """All turns of a long conversation from its one text, or None where that cannot be shown to be right.

        Rendering all prefixes takes time that grows with the square of the turns. Three turns of each kind (the first,
        a middle and the last one) are rendered so. If the whole text holds them as inference sees them, and the
        generation prompt stands in it once for every turn, the other turns are where it stands.
        """
        allowed = [k for k in assistants if k not in chat.untrained]
        kinds: dict[Any, list[int]] = {}
        for k in allowed:
            m = chat.messages[k]
            kind = (chat.messages[k - 1]["role"], bool(m.get("tool_calls")), bool(m.get("reasoning_content")))
            marked = "</think>" in str(m.get("content"))
            kinds.setdefault((kind, marked, bool(m.get("content")), k == len(chat.messages) - 1), []).append(k)
        probes = {k for members in kinds.values() for k in (members[0], members[len(members) // 2], members[-1])}
        exact = {k: self._exact(chat, k, full) for k in sorted(probes)}
        first_of = {k: members[0] for members in kinds.values() for k in members}
        exact |= {k: Said(k, reason=FORBIDDEN) for k in chat.untrained.intersection(assistants)}
        rendered = [exact[k] for k in sorted(probes)]
        reasons = {turn.reason for turn in rendered}
        if not rendered or (len(reasons) == 1 and rendered[0].reason):
            return [exact.get(k) or Said(k, reason=rendered[0].reason) for k in assistants]
        if rendered[-1].message == len(chat.messages) - 1 and not fit(full, rendered[-1]):
            full = rendered[-1].prompt + rendered[-1].target  # with the end token that a next message would write
        spans = {turn.message: span for turn in rendered if (span := fit(full, turn))}
        if len(spans) < len(rendered):
            return None
        ends_of_prompts = [turn.prompt[::-1] for turn in rendered]
        common = min(shared_length(ends_of_prompts[0], other) for other in ends_of_prompts)
        header = ends_of_prompts[0][:common][::-1]
        control = self.control_pattern.search(header)
        if control is None:
            return None
        starts = [m.end() for m in re.finditer(re.escape(header[control.start() :]), full)]
        starts = starts[: len(starts) - (starts[-1:] == [len(full)])]  # some templates always end with the prompt
        if len(starts) != len(assistants):
            return None
        ends = re.compile("|".join(map(re.escape, chat.dialect.ends)))
        turns = []
        for k, start, following in zip(assistants, starts, [*starts[1:], len(full)], strict=True):
            stop = ends.search(full, start, following)
            if k in chat.untrained:
                turns.append(exact[k])
            elif k in exact:
                if spans[k].start != start or (stop is not None and spans[k].end != stop.end()):
                    return None
                turns.append(exact[k])
            elif stop is None:
                return None
            else:
                unthought = spans[first_of[k]].unthought
                turns.append(Said(k, full[:start], full[start : stop.end()], unthought=unthought))
        return turns

    def _say(self, chat: Chat, k: int, solo: str | None = None) -> Said | str:
        """What turn `k` writes, or the generation prompt after which the template does not write it.

        `solo` is the text of the conversation up to this turn.
        """
        prompt = self.render(chat, k, prompt=True)
        if chat.messages[k - 1]["role"] == "assistant" and self._stop(chat.dialect, prompt):
            return Said(k, reason="the template opens no turn after an assistant's; join the two messages")
        solo = self.render(chat, k + 1) if solo is None else solo
        rest, built = self._continuation(chat, k, prompt, solo), False
        if (opened := _OPEN_THOUGHT.search(prompt)) and (rest is None or "</think>" not in rest):
            answer = self._continuation(chat, k, prompt[: opened.start()], solo) if rest is None else rest
            rest = _thought_and_answer(chat.messages[k], answer)
            built = rest is not None
        elif rest is None and (shut := _SHUT_THOUGHT.search(prompt)):
            rest = self._continuation(chat, k, prompt[: shut.start()], solo)
            rest = None if rest is None or rest.lstrip().startswith(shut.groups()) else rest
        if rest is None:
            return prompt
        end = chat.dialect.end_of_call if chat.messages[k].get("tool_calls") else chat.dialect.end
        stop = self._stop(chat.dialect, rest.removesuffix(end.tail))
        if stop is None and not end.shared:
            return Said(k, reason="the template writes no end-of-turn token after this turn")
        target = rest + end.gap + end.token if stop is None else rest[:stop]
        if chat.dialect.end.token in target[:-1]:
            what = f"the template writes {chat.dialect.end.token} inside this turn, where generation would stop"
            return Said(k, reason=f"{what}; choose another template")
        return Said(k, prompt, target, built=built)

    def _stop(self, dialect: Dialect, rest: str) -> int | None:
        """Where the turn's end token ends, behind which nothing stands but space and further end tokens."""
        ends = "|".join(map(re.escape, dict.fromkeys([*dialect.ends, self.tokenizer.eos_token or dialect.ends[0]])))
        found = re.search(rf"({ends})(?:\s|{ends})*\Z", rest)
        return found.end(1) if found else None

    def _continuation(self, chat: Chat, k: int, prompt: str, solo: str) -> str | None:
        """What follows the prompt in the text of the conversation up to turn `k`."""
        if solo.startswith(prompt):
            return solo[len(prompt) :]
        if k < 2:
            return None
        # The turns before may be written otherwise once this one follows; the message before it and the generation
        # prompt are not, and they show where it begins.
        before = self._shape_text(chat, chat.messages[: k - 1])
        asked_at, differs_at = shared_length(prompt, before), shared_length(prompt, solo)
        asked = prompt[asked_at:]
        at = solo.rfind(asked)
        if at >= 0 and asked_at:
            return solo[at + len(asked) :]
        # Even that message may be (Hermes closes a result otherwise once an answer follows): then the prompt shows it.
        written = self.render(chat, k)
        opening = prompt[len(written) :] if prompt.startswith(written) else ""
        at = solo.find(opening, differs_at)
        found = at >= 0 and asked_at <= differs_at and self.control_pattern.search(opening)
        return solo[at + len(opening) :] if found else None

    def _check_turn(self, chat: Chat, turn: Said) -> None:
        """Raise `TemplateError` if something that the turn says is not in its target."""
        reasoned = (chat.messages[turn.message].get("reasoning_content") or "").strip()
        self._losses.check_turn(
            chat.messages,
            turn.message,
            turn.target,
            partial(self._shape_text, chat),
            _setting(chat),
            reasoned=(turn.built or len(reasoned) > 12) and reasoned in turn.target,
        )

    def _shape_text(self, chat: Chat, messages: list[Message]) -> str:
        tools = [_named(tool, TOOL_WORD) for tool in chat.tools] if chat.tools else None
        try:
            return self.render(replace(chat, messages=messages, tools=tools), len(messages))
        except RunawayTemplateError:
            raise
        except TemplateError:
            return ""

    def _why_unlike(self, chat: Chat, k: int, prompt: str) -> str:
        """Why the turn does not begin as the generation prompt does, and which variable would change that."""
        opened = "" if _OPEN_THOUGHT.search(prompt) is None else " opens <think> and this turn has no reasoning"
        advice = self._advise(chat, k) or "no variable of the template changes that; " + (
            "give the turn reasoning_content, or choose another template" if opened else "choose another template"
        )
        return f"the template's generation prompt{opened or ' is not how it begins the turn'}: {advice}"

    def _advise(self, chat: Chat, k: int) -> str:
        """The template's variable with which turn `k` is trained and nothing of it lost; empty if there is none."""
        turn = chat.messages[k]
        shape = [bool(turn.get(key)) for key in ("content", "reasoning_content", "tool_calls")]
        key = (id(chat.dialect), repr(chat.kwargs), *shape, chat.messages[k - 1]["role"])
        if key not in self._advice:
            self._advice[key] = next(
                (
                    f"set {name}={json.dumps(value)} in template_kwargs, or in the row's chat_template_kwargs"
                    for name, value in switches(self.tokenizer.get_chat_template(tools=chat.tools))
                    if self._is_trained(chat, {**chat.kwargs, name: value}, k)
                ),
                "",
            )
        return self._advice[key]

    def _is_trained(self, chat: Chat, kwargs: dict[str, Any], k: int) -> bool:
        """Whether turn `k` is trained, and wholly, with these variables of the template."""
        try:
            chat = replace(chat, kwargs=kwargs, dialect=self._dialect(chat.tools, kwargs))
            said = self._say(chat, k)
            if isinstance(said, str) or said.reason:
                return False
            self._check_turn(chat, said)
        except RunawayTemplateError:
            raise
        except TemplateError:
            return False
        return True


def fit(text: str, turn: Said) -> Turn | None:
    """The characters of `turn` in a sequence that begins with its prompt, as it is written last or as history is."""
    start = len(turn.prompt)
    if turn.reason or not text.startswith(turn.prompt):
        return None
    # An empty reasoning block is scaffolding, not something that the turn says.
    for target in dict.fromkeys((turn.target, _EMPTY_REASONING.sub("", turn.target, count=1))):
        if text.startswith(target, start):
            unthought = turn.unthought or target != turn.target
            return Turn(turn.message, start, start + len(target), unthought=unthought)
    return None


def check_messages(messages: list[Message]) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TemplateError(f"message {i} must be a dict with a 'role', found {str(message)[:60]!r}")
        if message.get("content") is None and not message.get("tool_calls") and not message.get("reasoning_content"):
            raise TemplateError(f"message {i} (role {message['role']!r}) has no content")
    if not any(m["role"] == "assistant" for m in messages):
        raise TemplateError("the conversation has no assistant turn, so there is nothing to train on")


def _with_objects(message: Message) -> Message:
    """The message with the arguments of its calls as objects, where they are the JSON text of one."""
    if not message.get("tool_calls"):
        return message

    def parsed(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": parsed(call["function"])}
        try:
            arguments = json.loads(call["arguments"])
        except (KeyError, TypeError, ValueError):
            return call
        return {**call, "arguments": arguments} if isinstance(arguments, dict) else call

    return {**message, "tool_calls": [parsed(call) for call in message["tool_calls"]]}


def _thought_and_answer(message: Message, written: str | None) -> str | None:
    """What a turn writes after a prompt that opened `<think>`, where the template drops the reasoning of history.

    `written` is what the template writes of the turn: the answer, and the end of the turn.
    """
    content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
    if written is None or not isinstance(content, str):
        return None
    thought, closed, answer = content.partition("</think>")
    thought = thought.strip().removeprefix("<think>").strip() if closed else reasoning.strip()
    answer = answer.strip() if closed else content.strip()
    # An empty reasoning is none, and one that holds another's mark is not what would be written behind `<think>`
    if not thought or "<think>" in thought or answer not in written:
        return None
    end = written[written.rindex(answer) + len(answer) :] if answer else written
    return f"{thought}\n</think>\n\n{answer}{end}"


def _as_json(character: str) -> str:
    return f"\\u{ord(character):04x}"


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _escaper(tokens: Iterable[str]) -> Callable[[str, str], str]:
    """A function that puts `marker` after the first character of every occurrence of a token, overlaps included."""
    pattern = re.compile(f"(?=(?:{_any_of(tokens).pattern}))(.)", re.DOTALL)
    return lambda text, marker: pattern.sub(lambda m: m.group(1) + marker, text)


def _setting(chat: Chat) -> tuple[Any, ...]:
    """What decides, beside the shape of its messages, what the template leaves out of a conversation."""
    return (repr(chat.kwargs), id(chat.dialect), bool(chat.tools))


def _named(tool: Any, name: str) -> Any:
    """The schema of a tool under another name."""
    if not isinstance(tool, dict):
        return tool
    return {**tool, "function": _named(tool["function"], name)} if "function" in tool else {**tool, "name": name}


def _tool_name(tool: Any) -> str:
    return str(tool.get("function", tool).get("name", "")) if isinstance(tool, dict) else getattr(tool, "__name__", "")
