"""What inference's prompt and the model's answer are, for each assistant turn of a conversation, as text.

For turn k, `prompt = render(messages[:k], add_generation_prompt=True)` is what the model sees, and
`target = render(messages[:k+1]) - prompt` is what it should write, up to and with the token that stops it.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ma_sft.errors import TemplateError
from ma_sft.labels.message_form import MessageForm, is_plain, shared_length
from ma_sft.labels.placeholders import Lost, dropped_content, named, shape, tags_of
from ma_sft.labels.render import Renderer, describe

Message = dict[str, Any]

FORBIDDEN = "marked not to be trained in the row"
_ADVICE = "choose another template, or set its variable for reasoning (such as enable_thinking) in template_kwargs"

# Markup that an assistant itself writes in its content; everybody else's is ordinary text.
ASSISTANT_MARKUP = frozenset({"<think>", "</think>", "<tool_call>", "</tool_call>"})
_OPEN_THOUGHT = re.compile(r"<think>\s*\Z")
# A reasoning that the generation prompt opens and closes, so that the answer follows.
_SHUT_THOUGHT = re.compile(
    r"(<(?!/|\|END)[^<>]*(?:think|channel)[^<>]*>)(?:thought)?\s*(<[^<>]*(?:think|channel)[^<>]*>)\s*\Z", re.IGNORECASE
)
_FORMS = 1024  # of a template with the variables of rows
_SHAPES = 4096


@dataclass
class Chat:
    """A conversation whose control-token text is cut by `marker`, and how it is rendered."""

    messages: list[Message]  # as the row has them
    formed: list[Message]  # as the template wants them
    kinds: tuple[str, ...]  # `describe` of each message and, last, of tools and variables
    tools: list[Any] | None
    kwargs: dict[str, Any]
    untrained: frozenset[int]  # messages that the row forbids to train
    form: MessageForm
    marker: str
    special_text: tuple[str, ...]


class TurnText(NamedTuple):
    """What assistant turn `message` writes after `prompt`, with the token that stops it; or why it is not trained."""

    message: int
    prompt: str = ""
    target: str = ""
    reason: str = ""
    built: bool = False  # of the row's own reasoning, which the template drops


class Turns:
    """Finds the prompts and targets of conversations for one tokenizer and its chat template.

    Args:
        control: the tokens that cut its text; see `control_tokens`.
        train_on, template_kwargs, template_now, add_eos: as `ChatEncoder`'s.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        control: Collection[str],
        train_on: str,
        template_kwargs: dict[str, Any],
        template_now: str | None,
        add_eos: bool,
    ) -> None:
        self.tokenizer, self.train_on, self.template_kwargs = tokenizer, train_on, template_kwargs
        self.add_eos, self.control_pattern = add_eos, _any_of(control)
        self.renderer = Renderer(tokenizer, template_now)
        own_markup = [token for token in control if token not in ASSISTANT_MARKUP]
        self._overlapping = _overlapping(control), _overlapping(own_markup)  # but for an assistant's content
        self._tags = tags_of(str(tokenizer.chat_template))
        self._lost: dict[Any, list[Lost]] = {}
        self._forms: dict[tuple[str, str], MessageForm] = {}
        self.end_token = self._form(None, template_kwargs).end.token

    def chat(self, messages: list[Message], tools: list[Any] | None, kwargs: dict[str, Any] | None) -> Chat:
        """The conversation with control-token text cut in two by a few characters that stand nowhere in it."""
        untrained = frozenset(i for i, m in enumerate(messages) if m.get("train") is False)
        if not (plain := all(map(is_plain, messages))):
            # Arguments are parsed before anything is cut: JSON can spell a control token with escapes.
            messages = [*map(_cleaned, messages)]
        row, marker, special = kwargs or {}, "", ()
        form = self._form(tools, {**self.template_kwargs, **row})
        texts = chain.from_iterable(m.values() for m in messages) if plain else _texts(messages)
        everything = "\0".join([*texts, *_texts([tools, row])])
        if found := self.control_pattern.findall(everything):
            # No template trims, splits, escapes or changes these
            marker = next(mark for n in count() if (mark := f"~{n}~") not in everything)
            given = messages, row, tools
            messages = [
                {
                    k: _cut(v, marker, self._overlapping[m["role"] == "assistant" and k == "content"])
                    for k, v in m.items()
                }
                for m in messages
            ]
            row, tools = (_cut(each, marker, self._overlapping[False]) for each in (row, tools))
            special = () if (messages, row, tools) == given else tuple(dict.fromkeys(found))
        kwargs, tools = {**self.template_kwargs, **row}, tools or form.default_tools
        formed = form.messages(messages)
        kinds = (*map(describe, formed), describe([tools, kwargs]))
        return Chat(messages, formed, kinds, tools, kwargs, untrained, form, marker, special)

    def turns(self, chat: Chat) -> tuple[str, list[TurnText]]:
        """The whole conversation's text, and what each turn that is to be trained writes."""
        full = self.render(chat, len(chat.messages))
        assistants = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
        turns = [self._turn(chat, k, full) for k in assistants[0 if self.train_on == "all" else -1 :]]
        for i, what in (*self._dropped(chat, turns), *self._altered(chat, turns)):
            role = chat.messages[i]["role"] if i >= 0 else ""
            where = f" of message {i} (role {role!r})" if role else ""
            advice = f"{_ADVICE if 'reasoning' in what else 'choose another template'}, or data without it"
            if what.startswith(("the tool", "the call")):
                advice = "use a template that knows tools"
            raise TemplateError(f"the chat template leaves out {what}{where}; {advice}")
        return full, turns

    def render(self, chat: Chat, count: int, *, prompt: bool = False) -> str:
        """The template's text of the first `count` messages."""
        kinds = (*chat.kinds[:count], chat.kinds[-1])
        return self.renderer.render(chat.formed[:count], chat.tools, chat.kwargs, prompt=prompt, kinds=kinds)

    def _form(self, tools: list[Any] | None, kwargs: dict[str, Any]) -> MessageForm:
        """What the template asks for with these variables, which may change what it writes."""
        key = (self.tokenizer.get_chat_template(tools=tools), repr(kwargs))
        if key not in self._forms:
            if len(self._forms) >= _FORMS:
                self._forms.clear()
                self._lost.clear()  # whose keys hold ids of forms
            render, eos = partial(self.renderer.render, variables=kwargs), self.tokenizer.eos_token
            self._forms[key] = MessageForm(render, self.control_pattern, eos, bool(tools), self.add_eos)
        return self._forms[key]

    # -- one turn -----------------------------------------------------------------------------------------------

    def _turn(self, chat: Chat, k: int, full: str) -> TurnText:
        """What turn `k` writes. `full` is the text of the whole conversation."""
        form, message = chat.form, chat.messages[k]
        if k in chat.untrained:
            return TurnText(k, reason=FORBIDDEN)
        if k == 0:
            return TurnText(k, reason="no message comes before it, so nobody would ask the model for it")
        prompt = self.render(chat, k, prompt=True)
        if chat.messages[k - 1]["role"] == "assistant" and form.end_in(prompt):
            return TurnText(k, reason="the template opens no turn after an assistant's; join the two messages")
        whole = full if k == len(chat.messages) - 1 else self.render(chat, k + 1)
        rest, built = self._continuation(chat, k, prompt, whole), False
        opened = _OPEN_THOUGHT.search(prompt)
        if opened and (rest is None or "</think>" not in rest):
            answer = self._continuation(chat, k, prompt[: opened.start()], whole) if rest is None else rest
            rest = _thought_and_answer(message, answer, form)
            built = rest is not None
        elif rest is None and (shut := _SHUT_THOUGHT.search(prompt)):
            rest = self._continuation(chat, k, prompt[: shut.start()], whole)
            rest = None if rest is None or rest.lstrip().startswith(shut.groups()) else rest
        if rest is None:
            what = "opens <think> and this turn has no reasoning" if opened else "is not how it begins the turn"
            return TurnText(k, reason=f"the template's generation prompt {what}: give it reasoning_content, {_ADVICE}")
        end = form.end_of_call if message.get("tool_calls") else form.end
        written = rest.removesuffix(end.tail)
        stop = form.end_in(written)
        if stop is None and not end.added:
            return TurnText(k, reason="the template writes no end-of-turn token after this turn")
        target = written + end.gap + end.token if stop is None else rest[: stop[1]]
        if form.end.token in target[:-1]:
            what = f"the template writes {form.end.token} inside this turn, where generation would stop"
            return TurnText(k, reason=f"{what}; choose another template")
        return TurnText(k, prompt, target, built=built)

    def _continuation(self, chat: Chat, k: int, prompt: str, whole: str) -> str | None:
        """What follows the prompt in the text of the conversation up to turn `k`."""
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        if k < 2:
            return None
        # The turns before may be written otherwise once this one follows; the message before it and the generation
        # prompt are not, and they show where it begins.
        said = chat.formed[k - 1].get("content")
        if isinstance(said, str) and said.strip() and (begin := prompt.rfind(said.strip())) >= 0:
            at = whole.rfind(question := prompt[begin:])
            if at >= 0 and self.control_pattern.search(question, len(said.strip())):
                return whole[at + len(question) :]
        # Even that message may be (Hermes closes a result otherwise once an answer follows): then the prompt shows it.
        written = self.render(chat, k)
        opening = prompt[len(written) :] if prompt.startswith(written) else ""
        at = whole.find(opening, shared_length(prompt, whole))
        return whole[at + len(opening) :] if at >= 0 and self.control_pattern.search(opening) else None

    # -- what is left out ------------------------------------------------------------------------------------------

    def _dropped(self, chat: Chat, turns: list[TurnText]) -> Iterator[tuple[int, str]]:
        """What the template does not write of the turns that are trained and of what stands before them."""
        parted = (i for i, m in enumerate(chat.messages) if not is_plain(m) or self._tags.search(m["content"]))
        tagged = repr([(i, shape(chat.messages[i], self._tags)) for i in parted])
        key = (chat.kinds, id(chat.form), bool(chat.tools), tagged)
        if key not in self._lost:
            if len(self._lost) >= _SHAPES:
                self._lost.clear()
            try:
                found = dropped_content(chat.form.render, chat.messages, chat.tools, self._tags)[0]
            except TemplateError:  # of the words, not of the row
                found = []
            self._lost[key] = [lost for lost in found if not lost[2]]
        trained = {turn.message: turn for turn in turns if not turn.reason}
        for i, what, _ in named(self._lost[key], chat.messages, chat.tools, self._tags):
            if (turn := trained.get(i)) is not None:
                # The row's own reasoning stands behind the prompt that opens it
                reasoning = str(chat.messages[i].get("reasoning_content") or "").strip()
                written = "the reasoning in the text", *["the reasoning"] * (reasoning in turn.target)
                if turn.built and what in written:
                    continue
            elif i >= 0 and chat.messages[i]["role"] == "assistant":
                continue
            yield i, what.replace(chat.marker, "")

    def _altered(self, chat: Chat, turns: list[TurnText]) -> Iterator[tuple[int, str]]:
        """Texts of trained turns that are not written as they stand: a template may look for more than tags."""
        for turn in turns:
            content = chat.messages[turn.message].get("content")
            if turn.reason or not isinstance(content, str) or content.strip() in turn.target:
                continue
            target = turn.target.replace(chat.marker, "")
            for part in self._tags.split(content.replace(chat.marker, ""))[::2]:
                as_json = (json.dumps(part.strip(), ensure_ascii=ascii)[1:-1] for ascii in (False, True))
                if part.strip() not in target and not any(each in target for each in as_json):
                    yield turn.message, f"the text {part.strip()[:40]!r}"


def _cleaned(message: Message) -> Message:
    """The message for the template: without the nulls that Arrow gives, and with arguments as objects."""
    given = {k: v for k, v in message.items() if k != "train" and (v is not None or k == "content")}
    if given.get("tool_calls"):
        calls = [{k: v for k, v in call.items() if v is not None} for call in given["tool_calls"]]
        given["tool_calls"] = [_with_object(call) for call in calls]
    return given


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_object(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _thought_and_answer(message: Message, written: str | None, form: MessageForm) -> str | None:
    """What a turn writes after a prompt that opened `<think>`, where the template drops the reasoning of history.

    `written` is what the template writes of the turn: the answer, and the end of the turn.
    """
    content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
    if written is None or not isinstance(content, str):
        return None
    thought, closed, answer = content.partition("</think>")
    thought = thought.strip().removeprefix("<think>").strip() if closed else reasoning.strip()
    answer = answer.strip() if closed else content.strip()
    end, _ = form.end_in(written) or (len(written), 0)  # its token may have the answer's letters
    at = written.rfind(answer, 0, end) if answer else 0  # a call may be all
    # An empty reasoning is none, and one that holds another's mark is not what would be written behind `<think>`
    if not thought or "<think>" in thought or at < 0:
        return None
    return f"{thought}\n</think>\n\n{written[at:]}"


def _texts(value: Any) -> list[str]:
    """All texts of a value, keys included."""
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in ([part] if isinstance(part, str) else _texts(part))]


def _any_of(tokens: Any) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _overlapping(tokens: Any) -> re.Pattern[str]:
    """Matches the first character of every occurrence of a token, overlaps included."""
    rest: dict[str, list[str]] = {}
    for token in sorted(tokens, key=len, reverse=True):
        rest.setdefault(token[0], []).append(re.escape(token[1:]))
    return re.compile("|".join(f"{re.escape(c)}(?={'|'.join(each)})" for c, each in rest.items()) or r"(?!)")


def _cut(value: Any, marker: str, overlapping: re.Pattern[str]) -> Any:
    """The value with `marker` behind the first character of every control token in its texts, keys included."""
    if isinstance(value, str):
        return overlapping.sub(lambda found: found.group() + marker, value)
    if isinstance(value, dict):
        return {_cut(key, marker, overlapping): _cut(item, marker, overlapping) for key, item in value.items()}
    return [_cut(item, marker, overlapping) for item in value] if isinstance(value, list | tuple) else value
