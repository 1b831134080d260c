"""What inference has before each turn of a conversation, and what the model must write there, by transformers itself.

Prompts are `apply_chat_template(earlier messages, add_generation_prompt=True)`; what the model must write is what the
template writes after that, up to the token at which generation stops: one of `generation_config`, the EOS token, the
template's own end of a turn, or, in templates that have none (GLM), the token that begins the next message.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.resources import files
from itertools import pairwise
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ma_sft.hub import generation_config, stop_ids
from ma_sft.labels.apply_template import RunawayTemplateError, bounded, check_size, clock_at, text_and_marks
from ma_sft.labels.nonsense import (
    FORMS,
    FORMS_OF_CALLS,
    Message,
    Words,
    one_of_each_kind,
    shape,
    with_objects,
)

# What an assistant itself writes in its content as structure; everybody else's is ordinary text.
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")
EMPTY_REASONING = re.compile(r"\s*<think>\s*</think>\s*")
# A reasoning that a prompt opens and closes, so that the answer follows
SHUT_REASONING = re.compile(
    r"(<[^<>/]*(?:think|channel)[^<>]*>)(?:thought)?\s*(<[^<>]*(?:think|channel)[^<>]*>)\s*$", re.I
)
PLANE = 0xF0000  # characters that stand for control tokens where ids are compared as text

Form = Callable[[Message], Message]
Lost = tuple[int, str, bool]  # message (-1: the tools), what of it, whether only once it is history


class Refused(Exception):
    """The template raised; the message is its own."""


@dataclass
class Turn:
    """What inference has and writes at one turn: ids, or characters where text spells control tokens.

    `targets` are what the model may write, the stop token included; none where the template does not continue its own
    prompt. `whole` is the conversation up to this turn as the template writes it.
    """

    prompt: Any
    whole: Any
    targets: tuple[Any, ...] = ()
    thinks_on: bool = False  # the targets go on with the row's reasoning, which the template itself drops


class Inference:
    """A tokenizer with its chat template, as inference uses them."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int] = (), template_now: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template_now = template_now
        templates = tokenizer.chat_template or ""
        source = "".join(templates.values()) if isinstance(templates, dict) else templates
        self.controls = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content.strip() and token.content in source)
        }
        self.signs = {index: chr(PLANE + n) for n, index in enumerate(self.controls.values())}
        self._texts = {chr(PLANE + n): text for n, text in enumerate(self.controls)}
        self.stops = {*stops, tokenizer.eos_token_id, *stop_ids(generation_config(tokenizer.name_or_path))} - {None}
        longest_first = sorted(map(re.escape, self.controls), key=len, reverse=True)
        self.control_text = re.compile("|".join(longest_first) or r"(?!)")
        self._pieces = re.compile(f"({self.control_text.pattern})")
        # By shape: the forms, whether an empty list of tools is needed, and what the template refuses
        self.forms: dict[str, tuple[list[tuple[Form, list[Lost]]], bool, str]] = {}
        self.own_ends: dict[str, int | None] = {}  # by variables of the template
        self._latest: tuple[str, BatchEncoding] | None = None
        self._decoded: dict[tuple[int, ...], str] = {}

    def render(self, messages: list[Message], tools: Any, kwargs: dict[str, Any], *, prompt: bool) -> str:
        """The text that `apply_chat_template` gives.

        Raises:
            Refused: the template raised.
            RunawayTemplateError: it does not come to an end.
        """
        try:
            with bounded(), clock_at(self.template_now, self.tokenizer.get_chat_template(tools=tools)):
                text = self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **kwargs
                )
            return check_size(text)
        except RunawayTemplateError:
            raise
        except Exception as error:  # templates raise what they like
            raise Refused(" ".join(str(error).split())[:200] or type(error).__name__) from None

    def ids(self, texts: list[str]) -> list[tuple[int, ...]]:
        """Ids of rendered texts, as `apply_chat_template` makes them."""
        return [tuple(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    def encoding(self, text: str) -> BatchEncoding:
        """The ids of a rendered text, with their places in it; the latest is kept."""
        if self._latest is None or self._latest[0] != text:
            self._latest = text, self.tokenizer(text, add_special_tokens=False)
        return self._latest[1]

    def ids_of_prefixes(self, texts: list[str]) -> list[tuple[int, ...]]:
        """`ids` of texts that share their beginnings, in time linear in what differs.

        Control tokens cut a text before anything else does, so the ids between two of them depend on what stands there
        alone: what the longest text has, it gives, and the rest is tokenised between its own control tokens.
        """
        parts = [self._pieces.split(text) for text in texts]
        longest = max(range(len(texts)), key=lambda n: len(texts[n]))
        sections = [_sections(part) for part in parts]
        known = self._ids_of_sections(parts[longest], self.encoding(texts[longest])["input_ids"])
        if not known:
            return self.ids(texts)
        rest = [*dict.fromkeys("".join(section) for each in sections for section in each if section not in known)]
        for text, ids in zip(rest, self.ids(rest), strict=True):
            known |= self._ids_of_sections(self._pieces.split(text), ids)
        if not all(section in known for each in sections for section in each):
            return self.ids(texts)
        control = {"": (), **{text: (self.controls[text],) for part in parts for text in part[1::2]}}
        return [tuple(i for section in each for i in (*known[section], *control[section[2]])) for each in sections]

    def _ids_of_sections(self, parts: list[str], ids: Sequence[int]) -> dict[tuple[str, ...], Sequence[int]]:
        """The ids between control tokens, by what stands there and around; nothing if the ids have others."""
        cuts = [-1, *(at for at, index in enumerate(ids) if index in self.signs), len(ids)]
        if [ids[at] for at in cuts[1:-1]] != [self.controls[text] for text in parts[1::2]]:
            return {}
        return {
            section: ids[begin + 1 : end]
            for section, (begin, end) in zip(_sections(parts), pairwise(cuts), strict=True)
        }

    def characters(self, ids: Sequence[int]) -> str:
        """The ids as text in which each control token is one character that no text can hold."""
        parts: list[str] = []
        held: list[int] = []
        for index in [*ids, -1]:
            if index != -1 and index not in self.signs:
                held.append(index)
                continue
            if held:
                parts.append(self._decode(tuple(held)))
                held = []
            parts.append(self.signs.get(index, ""))
        return "".join(parts)

    def _decode(self, ids: tuple[int, ...]) -> str:
        """What stands between two control tokens is asked for again at every turn that follows."""
        if ids not in self._decoded:
            if len(self._decoded) >= 1000:
                self._decoded.clear()
            self._decoded[ids] = str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        return self._decoded[ids]

    def spell(self, value: Any) -> str:
        """Ids or characters as readable text."""
        if not isinstance(value, str):
            return str(self.tokenizer.decode(list(value), clean_up_tokenization_spaces=False))
        return "".join(self._texts.get(c, c) for c in value)

    def trailing_control(self, written: Any) -> int | None:
        """Position of the control token that ends what is written, but for whitespace."""
        for at in range(len(written) - 1, -1, -1):
            if written[at] in (self._texts if isinstance(written, str) else self.signs):
                return at
            if self.spell(written[at : at + 1]).strip():
                return None
        return None

    @cached_property
    def mark(self) -> str:
        """A character that the tokenizer gives back as it is, and that hardly any text holds."""
        for mark in ("\ue0f3", "⁂", "§", "¤"):
            if self.spell(self.ids([f"a{mark}b"])[0]) == f"a{mark}b":
                return mark
        return "^"

    @cached_property
    def twin(self) -> str | None:
        """The template with generation marks: the tokenizer's own, or TRL's training twin of it."""
        own, shelf = self.tokenizer.chat_template, files("trl") / "chat_templates"
        if not isinstance(own, str) or re.search(r"\{%-?\s*generation", own):
            return own if isinstance(own, str) else None
        for twin in shelf.iterdir():
            base, _, rest = twin.name.rpartition("_training.jinja")
            if base and not rest and (shelf / f"{base}.jinja").read_text(encoding="utf-8") == own:
                return twin.read_text(encoding="utf-8")
        return None

    def marked(
        self, messages: list[Message], tools: Any, kwargs: dict[str, Any], written: str | None
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation by the template's twin, and which of them stand between generation marks.

        As `apply_chat_template(..., return_assistant_tokens_mask=True)`, of a text that need not be tokenised again:
        if `written`, the template's own, is known and another, no ids.
        """
        with bounded(), clock_at(self.template_now, str(self.twin)):
            rendered: Any = text_and_marks(
                [messages],
                tools,
                chat_template=self.twin,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **kwargs},
            )
        (text,), (marks,) = rendered
        if written not in (None, text):
            return [], []
        found = self.encoding(text)
        ids: list[int] = found["input_ids"]
        trained = [False] * len(ids)
        for begin, end in marks:
            first, last = found.char_to_token(begin), found.char_to_token(end - 1)
            if first is not None:
                for at in range(first, len(ids) if last is None else last + 1):
                    trained[at] = True
        return ids, trained


class Conversation:
    """One conversation as inference sees it: its forms, and what it has and writes at each turn."""

    def __init__(
        self, inference: Inference, messages: list[Message], tools: list[Any] | None, kwargs: dict[str, Any]
    ) -> None:
        self.inference = inference
        self.kwargs = kwargs
        self.turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        self.said = [{k: v for k, v in m.items() if v is not None and k != "train"} for m in messages]
        self.refusal = ""
        self.written: str | None = None  # the template's text of all messages, where it was read
        self.hidden: dict[str, str] = {}  # placeholder -> the control token's text that it stands for
        self.messages = [self._hide(m) for m in self.said]
        self.tools = _map(tools or None, self._hide_text)

    # -- text that spells control tokens ------------------------------------------------------------------------

    def _hide(self, message: Message) -> Message:
        hidden: Message = {}
        for key, value in message.items():
            own = MARKUP if message["role"] == "assistant" and key == "content" else ()
            hidden[key] = _map(value, partial(self._hide_text, markup=own))
        return hidden

    def _hide_text(self, text: str, markup: tuple[str, ...] = ()) -> str:
        """Placeholders for what spells a control token and is not the speaker's markup, so that it stays text."""

        def placeholder(match: re.Match[str]) -> str:
            if match.group() in markup:
                return match.group()
            name = f"{self.inference.mark}{len(self.hidden)}{self.inference.mark}"
            self.hidden[name] = match.group()
            return name

        return self.inference.control_text.sub(placeholder, text)

    def key(self, ids: Sequence[int], *, shown: bool = False) -> Any:
        """What is compared: ids, or characters where text spells control tokens (whose ids are not one choice)."""
        if not self.hidden and not shown:
            return tuple(ids)
        text = self.inference.characters(ids)
        for name, hidden in self.hidden.items():
            text = text.replace(name, hidden)
        return text

    # -- forms --------------------------------------------------------------------------------------------------

    def forms(self) -> Iterator[tuple[Form, list[Lost]]]:
        """The forms of messages in which the template loses least, best first, and what each loses."""
        if len(self.messages) == 1:  # a text: no template sees it
            yield with_objects, []
            return
        key = shape(self.said, self.tools, self.kwargs)
        if key not in self.inference.forms:
            found = self._weigh_forms()
            if not found and self.tools is None:  # a template of rows with tools goes through them, unasked
                self.tools = []
                found = self._weigh_forms()
            self.inference.forms[key] = found, self.tools == [], self.refusal
        found, empty, self.refusal = self.inference.forms[key]
        self.tools = [] if empty else self.tools
        yield from found

    def _weigh_forms(self) -> list[tuple[Form, list[Lost]]]:
        called = any(m.get("tool_calls") for m in self.messages)
        found: list[tuple[Form, list[Lost]]] = []
        for form in FORMS_OF_CALLS if called else FORMS:
            try:
                found.append((form, self._losses(form)))
            except Refused as refusal:
                self.refusal = self.refusal or str(refusal)
                continue
            if not found[-1][1] and not called:
                break
        fewest = min((len(lost) for _, lost in found), default=0)
        return [each for each in found if len(each[1]) == fewest]

    def _losses(self, form: Form) -> list[Lost]:
        words = Words(self.messages, self.tools)
        messages = [form(m) for m in words.messages]
        tools = words.tools if self.tools else self.tools
        lost: list[Lost] = []
        last = self.turns[-1]
        for k in dict.fromkeys([*one_of_each_kind(self.said, self.turns), last]):
            before = self._render(messages[:k], tools, prompt=True) if k else ""
            own = self._render(messages[: k + 1], tools, prompt=False)
            own = own[len(shared(before, own)) :]
            lost += [(k, what, False) for what in words.missing(k, own)]
        for i in range(-1, last):
            known = {what for at, what, _ in lost if at == i}
            lost += [(i, what, i in self.turns) for what in words.missing(i, before + own) if what not in known]
        return lost

    def _render(self, messages: list[Message], tools: Any, *, prompt: bool) -> str:
        return self.inference.render(messages, tools, self.kwargs, prompt=prompt)

    # -- turns --------------------------------------------------------------------------------------------------

    def read(self, form: Form, turns_at: Sequence[int]) -> dict[int, Turn]:
        """What inference has and writes at these assistant messages.

        Raises:
            Refused: the template raised.
        """
        if len(self.messages) == 1:
            return {0: self._plain_text()}
        messages = [form(m) for m in self.messages]
        texts: list[str] = []
        for k in turns_at:
            texts.append(self._render(messages[:k], self.tools, prompt=True))
            texts.append(self._render(messages[: k + 1], self.tools, prompt=False))
        keys = [self.key(ids) for ids in self.inference.ids_of_prefixes(texts)]
        turns = {}
        for n, k in enumerate(turns_at):
            prompt, whole = texts[2 * n : 2 * n + 2]
            self.written = whole if k + 1 == len(messages) else self.written
            turn = turns[k] = Turn(keys[2 * n], keys[2 * n + 1])
            written = self._written(turn.prompt, turn.whole, prompt, whole)
            if written is None:
                written = self._behind_the_opening(turn.prompt, messages, k, prompt)
            opened = re.search(r"<think>\s*$", prompt)
            if written is not None and not (opened and "</think>" not in self.inference.spell(written)):
                turn.targets = self._up_to_the_stop(written, messages, k)
            elif opened:
                turn.targets = self._on_with_thinking(turn, messages[k], prompt[: opened.start()], prompt, whole)
                turn.thinks_on = True
        return turns

    def ending(self, form: Form) -> Any:
        """The whole conversation as the template writes it, where it does not end with a turn of the assistant."""
        if self.turns[-1] == len(self.messages) - 1:
            return None
        (ids,) = self.inference.ids([self._render([form(m) for m in self.messages], self.tools, prompt=False)])
        return self.key(ids)

    def _written(self, before: Any, both: Any, prompt: str, whole: str) -> Any:
        """What the template writes for the turn after its prompt; as characters where a token spans the border.

        `before` and `both` are the keys of `prompt` and `whole`.
        """
        if not whole.startswith(prompt):
            return None
        if starts(both, before):
            return both[len(before) :]
        before, both = (self.key(ids, shown=True) for ids in self.inference.ids([prompt, whole]))
        return both[len(before) :] if starts(both, before) else None

    def _behind_the_opening(self, before: Any, messages: list[Message], k: int, prompt: str) -> Any:
        """What the template writes for a turn once what stands before it is written otherwise than in its prompt.

        That is what follows the prompt's opening of the turn, the first one behind the message before, in whose place
        a word stands. The opening's empty reasoning, which templates do not write in a turn, is inference's.
        """
        word = "Quxu"
        content = messages[k - 1].get("content")
        said = {**messages[k - 1], "content": [{"type": "text", "text": word}] if isinstance(content, list) else word}
        marked = [*messages[: k - 1], said, messages[k]]
        try:
            so_far = self._render(messages[:k], self.tools, prompt=False)
            if so_far == prompt:  # it always opens the next answer
                opening = self._render(marked[:k], self.tools, prompt=False).partition(word)[2]
            else:
                opening = prompt.removeprefix(so_far) if prompt.startswith(so_far) else ""
            whole = self._render(marked, self.tools, prompt=False)
        except Refused:
            return None
        shut = SHUT_REASONING.search(opening)
        opening = opening[: shut.start()] if shut else opening
        if not self.inference.control_text.search(opening):
            return None
        _, found, written = whole.partition(word)[2].partition(opening)
        if not found or (shut and written.lstrip().startswith(shut.groups())):
            return None
        (ids,) = self.inference.ids([prompt + written])
        return self._written(before, self.key(ids), prompt, prompt + written)

    def _up_to_the_stop(self, written: Any, messages: list[Message], k: int) -> tuple[Any, ...]:
        """What is written, cut where generation stops; templates may leave that token to what follows."""
        own = self._own_end(messages)
        stops = self.inference.stops
        cuts = [self._first(written, {*stops, own} - {None}), self._first(written, stops)]
        if cuts == [None, None] and own is not None:
            cuts = [self.inference.trailing_control(written)]
        if found := tuple(written[: at + 1] for at in cuts if at is not None):
            return found
        begins = self._next_begins(messages, k)
        if (
            begins is None
            and messages[k].get("tool_calls")
            and self.inference.trailing_control(written) == len(written) - 1
        ):
            return (written,)  # the result stands right behind what closes the call
        ends = {*stops, *([] if begins is None else [begins])}
        if isinstance(written, str):
            return tuple(written + self.inference.signs.get(end, "") for end in ends)
        return tuple((*written, end) for end in ends)

    def _first(self, written: Any, stops: set[Any]) -> int | None:
        units = {self.inference.signs.get(i, i) for i in stops} if isinstance(written, str) else stops
        return next((at for at, unit in enumerate(written) if unit in units), None)

    def _next_begins(self, messages: list[Message], k: int) -> int | None:
        """The control token that begins the message after turn `k`, if it has one: the result of a call, a question."""
        if k + 1 < len(messages):
            following = messages[k + 1]
        elif calls := messages[k].get("tool_calls"):
            name, number = calls[0]["function"]["name"], calls[0].get("id", "call00001")
            following = {"role": "tool", "content": "Quxu", "name": name, "tool_call_id": number}
        else:
            following = {"role": "user", "content": "Quxu"}
        # Without reasoning, which a template may drop once its turn is history
        so_far = [{key: value for key, value in m.items() if key != "reasoning_content"} for m in messages[: k + 1]]
        if isinstance(so_far[k].get("content"), str) and not so_far[k].get("tool_calls"):
            so_far[k]["content"] = "Quxa"
        try:
            whole = self._render(so_far, self.tools, prompt=False)
            after = self._render([*so_far, following], self.tools, prompt=False)
        except Refused:
            return None
        here, there = self.inference.ids([whole, after])
        begins = there[len(here)] if starts(there, here) and len(there) > len(here) else None
        return begins if begins in self.inference.signs else None

    def _own_end(self, messages: list[Message]) -> int | None:
        """The control token that the template writes at the end of a plain turn, last or followed by another."""
        known, key = self.inference.own_ends, repr((sorted(self.kwargs), bool(self.tools)))
        if key not in known:
            start = [m for m in messages[: self.turns[0]] if m["role"] == "system"]
            example = type(messages[-1].get("content")) is list
            texts = ["Quxq", "Quxa", "Quxu"]
            content = [[{"type": "text", "text": text}] for text in texts] if example else texts
            roles = ("user", "assistant", "user")
            try:
                known[key] = self._find_own_end(
                    [*start, *({"role": r, "content": c} for r, c in zip(roles, content, strict=True))]
                )
            except Refused:
                known[key] = None
        return known[key]

    def _find_own_end(self, messages: list[Message]) -> int | None:
        prompt = self._render(messages[:-2], self.tools, prompt=True)
        followed = self._render(messages, self.tools, prompt=False)
        opening, between, alone = self.inference.ids(
            [
                prompt.partition("Quxq")[0],
                followed.partition("Quxa")[2].partition("Quxu")[0],
                self._render(messages[:-1], self.tools, prompt=False).partition("Quxa")[2],
            ]
        )
        candidates = [shared(alone, between), alone]
        if self._render(messages[:-2], self.tools, prompt=False) == prompt:
            # It always opens the next answer, so only what opens a question tells the end of an answer
            opens = len(shared(opening[::-1], between[::-1]))
            stop = self._first(between, self.inference.stops)
            candidates = [between[: len(between) - opens if stop is None else stop + 1]]
        ends = ((ids, self.inference.trailing_control(ids)) for ids in candidates)
        return next((ids[at] for ids, at in ends if at is not None), None)

    def _on_with_thinking(
        self, turn: Turn, message: Message, unopened: str, prompt: str, whole: str
    ) -> tuple[Any, ...]:
        """The prompt opens a reasoning that the template leaves out of the turn: the row's own continues it.

        `unopened` is the prompt without what opens it.
        """
        inline = re.match(r"\s*(?:<think>)?(.*?)</think>(.*)", str(message.get("content") or ""), re.DOTALL)
        reasoning = message.get("reasoning_content") or (inline and inline.group(1))
        if not reasoning:
            return ()
        answer = whole.removeprefix(prompt)
        answer = answer if answer != whole else whole[len(shared(unopened, whole)) :]
        spoken = inline.group(2).strip() if inline else ""
        if spoken and spoken in answer:  # without the reasoning, where the template writes the content as it is
            answer = answer[answer.rindex(spoken) :]
        (ids,) = self.inference.ids([f"{prompt}{reasoning.strip()}\n</think>\n\n{answer.strip()}"])
        written = self.key(ids)
        at = self.inference.trailing_control(written)
        return (written[len(turn.prompt) : None if at is None else at + 1],) if starts(written, turn.prompt) else ()

    def _plain_text(self) -> Turn:
        """An assistant's message that answers nothing is a text, and all of it is trained, then the EOS token."""
        bos = tuple(self.inference.tokenizer("")["input_ids"])
        (ids,) = self.inference.ids([str(self.messages[0]["content"])])
        whole, begin = self.key((*bos, *ids, self.inference.tokenizer.eos_token_id)), self.key(bos)
        return Turn(begin, whole, (whole[len(begin) :],))


def _map(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    return [_map(item, function) for item in value] if isinstance(value, list | tuple) else value


def _sections(parts: list[str]) -> list[tuple[str, ...]]:
    """Each text between control tokens with the one before and the one behind it, empty at the ends."""
    padded = ["", *parts, ""]
    return [tuple(padded[at : at + 3]) for at in range(0, len(parts), 2)]


def starts(whole: Any, begin: Any) -> bool:
    """Whether one text, or list of ids, begins with the other."""
    return bool(whole[: len(begin)] == begin)


def shared(one: Any, other: Any) -> Any:
    """The common beginning of two texts or lists of ids."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))]
