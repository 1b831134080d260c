"""Proves ids and labels that somebody else made, by transformers' chat templates and the tokenizer alone.

Of each span of labels: the ids before it are inference's prompt of one turn; what is trained is what the template goes
on with or, where it writes history otherwise, what it writes behind the turn's header; it ends at the first token that
stops generation. What a template drops is found with placeholder words, once a shape. What cannot be compared is "not
proven". What follows the last label cannot change a label, and is not looked at.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, groupby, product, takewhile
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ma_sft.errors import TemplateError
from ma_sft.hub import generation_config, stop_ids
from ma_sft.labels.apply_template import bounded, clock_at
from ma_sft.labels.placeholders import Lost, Message, arguments_of, dropped_content, named, shape, tags_of

IGNORE_INDEX = -100
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # what an assistant writes itself as structure
PRIVATE = 0xF0000  # the first of the characters that stand for control tokens where ids are compared as text
EMPTY_REASONING = re.compile(r"\s*<think>\s*</think>\s*")
Labelled = tuple[list[int], list[int]]  # input_ids, labels
Form = Callable[[Message], Message]  # in which a serving stack may give a message to a template
Ids = tuple[int, ...]
End = tuple[int | None, str, str]
# Messages, the sequences that train them, tools, variables of the template
Row = tuple[list[Message], Sequence[Labelled], list[Any] | None, dict[str, Any] | None]


def _form(convert: Callable[[Message], Any], empty: str | None = "", *, parts: bool = False) -> Form:
    def form(message: Message) -> Message:
        message = {key: value for key, value in message.items() if value is not None and key != "train"}
        if message.get("tool_calls"):
            called = [(call, dict(call.get("function") or call)) for call in message["tool_calls"]]
            calls = [{"type": "function", **c, "function": {**f, "arguments": convert(f)}} for c, f in called]
            message |= {"content": message.get("content") or empty, "tool_calls": calls}
        if parts and not isinstance(message.get("content"), list):
            message["content"] = [{"type": "text", "text": message.get("content") or ""}]
        return message

    return form


def _as_text(function: Message) -> str:
    return json.dumps(arguments_of(function), ensure_ascii=False)


FORMS = (_form(arguments_of), _form(_as_text, None), _form(_as_text), _form(arguments_of, parts=True))


@dataclass
class VerifyResult:
    """What was found in one conversation.

    `proven` are the spans (sequence, begin, end) that are right; `errors` are (code, what is wrong); `losses` name what
    the row has and no sequence shows; `unproven` what could not be compared; `remarks` what does no harm; `untrained`
    the assistant messages that ought to be trained and are not.
    """

    proven: list[tuple[int, int, int]] = field(default_factory=list)
    errors: list[tuple[str, str]] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    untrained: list[int] = field(default_factory=list)


class Verifier:
    """Verifies sequences of one tokenizer and chat template.

    Args:
        tokenizer: a fast tokenizer with its chat template, as inference will have it.
        stops: further ids at which generation stops; the EOS token and the folder's generation_config are known.
        template_kwargs: variables of the chat template; a conversation's own win.
        template_date: the date that the template reads at inference, in ISO's form; None for the machine's.
        train_on: which assistant turns ought to be trained, `"all"` or the `"last"`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stops: Sequence[int] = (),
        template_kwargs: dict[str, Any] | None = None,
        template_date: str | None = None,
        train_on: str = "all",
    ) -> None:
        self.tokenizer, self.template_kwargs, self.train_on = tokenizer, template_kwargs or {}, train_on
        self.template_date = template_date
        source = str(tokenizer.chat_template or "")
        self.tags, added = tags_of(source), tokenizer.added_tokens_decoder.items()
        self.controls = {t.content: i for i, t in added if t.special or (t.content.strip() and t.content in source)}
        self.signs = {index: chr(PRIVATE + n) for n, index in enumerate(self.controls.values())}
        self._names = str.maketrans(dict(zip(self.signs.values(), self.controls, strict=True)))
        self.control_text = re.compile("|".join(sorted(map(re.escape, self.controls), key=len)[::-1]) or r"(?!)")
        self._sections = re.compile(f"(?={self.control_text.pattern})")
        known = (tokenizer.eos_token_id, *stop_ids(generation_config(tokenizer.name_or_path)))
        self.stops: set[int] = {*stops, *known} - {None}
        self._by_shape: dict[str, tuple[Form, Any, list[Lost]] | TemplateError] = {}
        self._ends: dict[str, End] = {}
        self._known: dict[str, Ids] = {}  # ids of texts and sections of the batch at hand
        self._by_section = True
        # Beginnings of a conversation share most of their stretches
        self._decode = lru_cache(4096)(partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False))

    def verify(
        self,
        messages: list[Message],
        sequences: Sequence[Labelled],
        *,
        tools: list[Any] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> VerifyResult:
        """Verify the sequences (`input_ids`, `labels`) that train one conversation; nothing is raised."""
        (result,) = self.verify_batch([(messages, sequences, tools, kwargs)])
        return result

    def verify_batch(self, rows: Iterable[Row]) -> list[VerifyResult]:
        """`verify` of many conversations, tokenised together."""
        found = [(_Conversation(self, m, tools, kwargs or {}), sequences) for m, sequences, tools, kwargs in rows]
        texts = [text for conversation, _ in found for text in conversation.texts()]
        whole = self._tokenize({*sorted(texts, key=len)[-3:]})
        self._known, self._by_section = {}, True
        if self.ids([*whole]) != [*whole.values()]:
            self._known, self._by_section = whole, False
        self.ids(texts)
        return [conversation.verify(sequences) for conversation, sequences in found]

    def form_of(self, messages: list[Message], tools: Any, kwargs: dict[str, Any]) -> tuple[Form, Any, list[Lost]]:
        """The form and tools with which the template loses least of a conversation, and what it loses.

        Raises:
            TemplateError: it refuses every form.
        """
        key = repr((shape(messages, self.tags), bool(tools), sorted(kwargs.items())))
        if key not in self._by_shape:
            found, refusal = list[Any](), TemplateError()
            # A template of rows with tools may need a list
            for given, form in product((tools,) if tools else (None, []), FORMS):

                def render(said: list[Message], tools: Any, prompt: bool, form: Form = form) -> str:
                    return self.render([form(message) for message in said], tools, kwargs, prompt=prompt)

                try:
                    lost, as_python = dropped_content(render, messages, given, self.tags)
                except TemplateError as error:
                    refusal = refusal if refusal.args else error
                    continue
                hard = sum(not harmless for _, _, harmless in lost)
                found.append((hard, as_python, len(found), form, given, lost))
                if not hard and not as_python:
                    break
            self._by_shape[key] = min(found)[3:] if found else refusal
        if isinstance(known := self._by_shape[key], TemplateError):
            raise known
        return known

    # -- texts and ids --------------------------------------------------------------------------------------------

    def render(self, messages: list[Message], tools: Any, kwargs: dict[str, Any], *, prompt: bool) -> str:
        """The text of `apply_chat_template`.

        Raises:
            TemplateError: the template raised.
        """
        apply, template = self.tokenizer.apply_chat_template, self.tokenizer.get_chat_template(tools=tools)
        try:
            with bounded(), clock_at(self.template_date, template):
                # A batch of one may be an empty conversation
                texts = apply([messages], tools=tools, tokenize=False, add_generation_prompt=prompt, **kwargs)
            return str(texts[0])
        except Exception as error:  # templates raise what they like
            raise TemplateError(" ".join(str(error).split())[:200] or type(error).__name__) from None

    def ids(self, texts: list[str]) -> list[Ids]:
        """Ids of rendered texts, of which many share their beginnings, as in a long conversation.

        Control tokens cut a text before anything else does, so each section from one to the next is tokenised once,
        if that gives the ids of the longest texts of the batch.
        """
        new = {text: [text] for text in texts if text not in self._known}
        if self._by_section:
            new = {text: [part for part in self._sections.split(text) if part] for text in new}
        if parts := {*chain.from_iterable(new.values())} - self._known.keys():
            self._known |= self._tokenize(parts)
        self._known |= {text: tuple(chain.from_iterable(map(self._known.__getitem__, new[text]))) for text in new}
        return [self._known[text] for text in texts]

    def _tokenize(self, texts: Iterable[str]) -> dict[str, Ids]:
        self.tokenizer("")  # leaves the backend without padding, truncation or split special tokens
        found = self.tokenizer.backend_tokenizer.encode_batch_fast(texts := [*texts], add_special_tokens=False)
        return {text: tuple(encoding.ids) for text, encoding in zip(texts, found, strict=True)}

    def text(self, ids: Sequence[int]) -> str:
        """The ids as text in which each control token is one character that no text can hold."""
        runs = groupby(ids, key=self.signs.__contains__)
        return "".join(
            "".join(map(self.signs.__getitem__, run)) if control else self._decode((*run,)) for control, run in runs
        )

    def spell(self, value: Any) -> str:
        """Ids, or a text of `text`, as people read it."""
        return (value if isinstance(value, str) else self.text(value)).translate(self._names)

    def end_of_turn(self, form: Form, tools: Any, kwargs: dict[str, Any]) -> End:
        """How the template ends a plain turn: the control token that it writes, None where it writes none (GLM).

        And what it writes behind a turn's text if nothing follows, and if a question does, up to its first token.
        """
        key = repr((FORMS.index(form), tools, sorted(kwargs.items())))
        if key not in self._ends:
            said = [form({"role": role, "content": f"Qux{role}"}) for role in ("user", "assistant", "user")]
            try:
                wholes = [self.render(said[:n], tools, kwargs, prompt=False) for n in (2, 3)]
                tails = [whole.rpartition("Quxassistant")[2].partition("Quxuser")[0] for whole in wholes]
                prompts = {self.render(said[:1], tools, kwargs, prompt=prompt) for prompt in (False, True)}
            except TemplateError:
                return None, "", ""
            alone, more = self.ids(tails)
            written = [[i for i in each if i in self.signs] for each in (shared(alone, more), alone)]
            signs = written[0] or written[1]
            last = signs[:1] if len(prompts) == 1 else signs[-1:]  # the next answer may be opened always
            end = next((i for i in signs if i in self.stops), last[0] if last else None)
            self._ends[key] = end, tails[0], self.control_text.split(tails[1])[0]
        return self._ends[key]


class _Conversation:
    """One conversation. An assistant's message that answers nothing is a text, which no template sees."""

    def __init__(self, verifier: Verifier, raw: list[Message], tools: Any, kwargs: dict[str, Any]) -> None:
        self.verifier, self.raw, self.given_tools = verifier, raw, tools or None
        self.kwargs = {**verifier.template_kwargs, **kwargs}
        self.turns = [k for k, m in enumerate(raw) if m["role"] == "assistant"]
        self.is_text, self.result = len(raw) == 1, VerifyResult()
        if not self.turns:
            self.result.unproven = ["turns cannot be read back from the ids"]
        self.form, used_tools, self.lost = FORMS[0], self.given_tools, list[Lost]()
        try:
            if self.turns and not self.is_text:
                self.form, used_tools, self.lost = verifier.form_of(raw, self.given_tools, self.kwargs)
        except TemplateError as error:
            self.turns, self.result.unproven = [], [f"the template refuses the conversation: {error}"]
        self.hidden: dict[str, str] = {}  # placeholder -> the text that spells a control token
        answers = [{"role": "tool" if m.get("tool_calls") else "user", "content": "Qux"} for m in raw[-1:]]
        self.messages = [  # and one that may follow
            {k: self._hide(v, MARKUP if (m["role"], k) == ("assistant", "content") else ()) for k, v in m.items()}
            for m in map(self.form, [*raw, *answers])
        ]
        self.tools, self.rendered = self._hide(used_tools), dict[tuple[int, bool], str | None]()
        self.around: tuple[list[int], list[int]] = [], []  # ids that stand around what a template writes
        if self.is_text:
            self.rendered = {(0, True): "", (1, False): str(self.messages[0]["content"])}
            self.own_end, self.tail, self.gap = verifier.tokenizer.eos_token_id, "", ""
            self.around = verifier.tokenizer("")["input_ids"], [self.own_end]

    def _hide(self, value: Any, markup: tuple[str, ...] = ()) -> Any:
        """The value with placeholders for text that spells control tokens, but not for an assistant's `markup`."""

        def placeholder(match: re.Match[str]) -> str:
            if match[0] in markup:
                return match[0]
            # A template may ask whether a text has a `<`, and may write it as ASCII
            self.hidden[name := f"{match[0][:-1][:1]}Qux{len(self.hidden)}qux"] = match[0]
            return name

        if isinstance(value, dict):
            return {self._hide(key): self._hide(item, markup) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(item, markup) for item in value]
        return self.verifier.control_text.sub(placeholder, value) if isinstance(value, str) else value

    def render(self, end: int, *, prompt: bool = False) -> str | None:
        """The first `end` messages; None where the template refuses them."""
        if (end, prompt) not in self.rendered:
            self.rendered[end, prompt] = None
            with suppress(TemplateError):
                text = self.verifier.render(self.messages[:end], self.tools, self.kwargs, prompt=prompt)
                self.rendered[end, prompt] = text
        return self.rendered[end, prompt]

    def texts(self) -> list[str]:
        """All texts whose ids are compared."""
        found = [self.render(k + end, prompt=not end) for k in self.turns for end in (0, 1)]
        return [text for text in found if text is not None]

    def ids(self, end: int, *, prompt: bool = False) -> Ids | None:
        """The ids of `render`, and those that the tokenizer puts around a text."""
        if (text := self.render(end, prompt=prompt)) is None:
            return None
        (ids,), (before, behind) = self.verifier.ids([text]), self.around
        return (*before, *ids, *(() if prompt else behind))

    def text(self, ids: Sequence[int]) -> str:
        text = self.verifier.text(ids)
        for name, hidden in self.hidden.items():
            text = text.replace(name, hidden)
        return text

    def key(self, ids: Ids) -> Any:
        """What is compared: ids; or, where text spells control tokens, whose ids are not one choice, text."""
        return self.text(ids) if self.hidden else ids

    def verify(self, sequences: Sequence[Labelled]) -> VerifyResult:
        if not self.turns:
            return self.result
        if not self.is_text:
            self.own_end, self.tail, self.gap = self.verifier.end_of_turn(self.form, self.tools, self.kwargs)
        prompts = {k: self.key(asked) for k in self.turns if (asked := self.ids(k, prompt=True)) is not None}
        by_prompt = {key: k for k, key in prompts.items()}
        trained: list[int] = []
        for number, (ids, labels) in enumerate(sequences):
            for begin, end in runs(labels):
                before = self.key(tuple(ids[:begin]))
                if labels[begin:end] != ids[begin:end]:
                    self._add_error("foreign labels", f"tokens {begin}:{end} are labelled with other tokens")
                elif before in by_prompt:
                    trained.append(by_prompt[before])
                    self._verify_turn(number, by_prompt[before], tuple(ids), begin, end)
                elif prompts:
                    trained.append(self._misplaced(prompts, tuple(ids), labels, begin))
                else:
                    self.result.unproven.append("the template refuses every prompt of the conversation")
        self._compare_with_wanted(trained)
        return self.result

    def _misplaced(self, prompts: dict[int, Any], ids: Ids, labels: list[int], begin: int) -> int:
        """Say in a user's words where labels begin that begin behind no prompt; the turn that is meant."""
        whole, before = self.key(ids), self.key(ids[:begin])

        def nearness(k: int) -> tuple[bool, int]:
            if whole[: len(prompts[k])] == prompts[k]:
                return True, -abs(len(prompts[k]) - len(before))
            return False, len(shared(prompts[k], before))

        k, what = max(prompts, key=nearness), ""
        prompt, history = self.ids(k, prompt=True) or (), self.ids(k) or ()
        early = len(prompt) - begin
        if ids[: len(prompt)] != prompt:  # another prompt
            pass
        elif early < 0:
            masked = any(label != IGNORE_INDEX for label in labels[len(prompt) : begin])
            what = "tokens inside a turn are not trained; " if masked else f"labels begin {-early} tokens late; "
        elif early <= len(prompt) - len(history) + 2:  # the header, and what ends the message before
            what = f"labels begin {early} tokens early; "
        else:
            roles = " and ".join(sorted({m["role"] for m in self.raw[:k]} - {"assistant"}, reverse=True))
            share = sum(label != IGNORE_INDEX for label in labels) / len(labels)
            what = f"{roles} tokens are trained ({share:.0%} of the row); "
        difference = self._difference(before, prompts[k])
        self._add_error("unlike inference", f"{what}before message {k}: {difference}")
        return k

    def _add_error(self, code: str, what: str) -> None:
        self.result.errors.append((code, what))

    # -- one turn -------------------------------------------------------------------------------------------------

    def _verify_turn(self, number: int, k: int, ids: Ids, begin: int, end: int) -> None:
        prompt, whole, spell = self.ids(k, prompt=True), self.ids(k + 1), self.verifier.spell
        if prompt is None or whole is None:
            self.result.unproven.append(f"the template refuses message {k}")
            return
        stops = self._stops(k, whole)
        last = next((at + 1 for at in range(end - 1, begin, -1) if ids[at] in stops), end)
        if last < end and not spell(ids[last:end]).strip():
            self.result.remarks.append("whitespace behind the end token is trained too")
            end = last
        # The reasoning that its prompt opens, from the last turn too
        dropped = self._opens(k) and "</think>" not in spell(whole[len(prompt) :])
        goes_on = not dropped and self._rest(whole, prompt, prompt) is not None
        if ids[end - 1] not in stops:
            right = repr(spell(whole[-8:])) if goes_on else "a token at which generation stops"
            what = f"message {k}: trained up to {spell(ids[begin:end][-8:])!r}, not to {right}"
            if goes_on and self._rest(whole, ids[:end], prompt) is None:
                self._add_error("unlike the template", what)
            else:
                self._add_error("missing end token", f"the end token is not trained; {what}")
        elif any(index in stops for index in ids[begin : end - 1]):
            rest = spell(ids[next(at for at in range(begin, end) if ids[at] in stops) + 1 : end])
            self._add_error("trained past the end", f"message {k}: {rest!r} is trained behind the end of the turn")
        elif goes_on and self._goes_on(k, prompt, ids[:end], stops):
            self.result.proven.append((number, begin, end))
        elif dropped and not self._reasoning(k):
            self.result.unproven.append("the template does not continue its own generation prompt")
        elif not goes_on and self._stands_behind_its_header(k, ids[:end], begin, stops):
            self.result.proven.append((number, begin, end))
        else:
            difference = self._difference(self.key(ids[:end]), self.key(whole))
            self._add_error("unlike the template", f"message {k}: {difference}")

    def _reasoning(self, k: int) -> str:
        in_text, closed, _ = str(self.raw[k].get("content") or "").partition("</think>")
        reasoning = self.raw[k].get("reasoning_content") or (closed and in_text.replace("<think>", ""))
        return str(reasoning).strip()

    def _stops(self, k: int, whole: Ids) -> set[int]:
        """The ids at which the turn ends: generation's, the template's own, or the token that begins what follows."""
        last = next((index for index in reversed(whole) if self.verifier.spell([index]).strip()), -1)
        closing = {last} & {*self.verifier.signs} if self.raw[k].get("tool_calls") else set()
        if self.own_end is not None:
            return self.verifier.stops | closing | {self.own_end}
        return self.verifier.stops | (self._next_begins(k) or closing)

    def _next_begins(self, k: int) -> set[int]:
        """The control token that begins the message after turn `k`: the result of a call, a question (GLM)."""
        text, written = self.render(k + 2) or "", (self.render(k + 1) or "").rstrip()
        begins = self.verifier.control_text.match(text[len(written) :].lstrip()) if text.startswith(written) else None
        return {self.verifier.controls[begins[0]]} if begins else set()

    def _rest(self, whole: Ids, begin: Ids, prompt: Ids) -> Any:
        """What `whole` has behind `begin`, as ids or text; None if it does not begin with it.

        Texts are compared where text spells control tokens, or the prompt's last token has become another one.
        """
        same = not self.hidden and whole[: len(prompt)] == prompt
        text, start = (whole, begin) if same else (self.text(whole), self.text(begin))
        return text[len(start) :] if text[: len(start)] == start else None

    def _goes_on(self, k: int, prompt: Ids, trained: Ids, stops: set[int]) -> bool:
        """Whether the template goes on with what is trained, and writes nothing more but stops and whitespace."""
        whole = self.ids(k + 1) or ()
        rest = self._rest(whole, trained, prompt)
        if rest is None and k + 1 < len(self.raw):  # history is written without an empty reasoning
            text, asked = self.render(k + 1) or "", self.render(k, prompt=True) or ""
            (shorter,) = self.verifier.ids([asked + EMPTY_REASONING.sub("", text[len(asked) :], count=1)])
            rest = self._rest(shorter, trained, prompt) if text.startswith(asked) else None
        certain = trained[-1] in {*self.verifier.stops, self.own_end}
        if rest is not None and (certain or self._is_blank(rest, stops)):
            return True
        if self.own_end is not None or any(index in stops for index in whole[len(prompt) :]):
            return False
        # The template ends no turn: whitespace that it writes behind one is then no part of it
        text = self.render(k + 1) or ""
        written = [text.removesuffix(self.tail) + self.gap, text.removesuffix(self.tail)]
        if self.raw[k].get("tool_calls"):
            written = [text, text.rstrip()]
        rests = [self._rest(ids, trained[:-1], prompt) for ids in self.verifier.ids(written)]
        return any(rest is not None and not rest for rest in rests)

    def _stands_behind_its_header(self, k: int, ids: Ids, begin: int, stops: set[int]) -> bool:
        """Whether the template writes the turn as it is trained, where it writes what stands before it otherwise.

        The turn then stands behind what the generation prompt writes, or behind the beginning of that, which may have
        opened a reasoning that the template writes otherwise, or nowhere.
        """
        spell, own, opens = self.verifier.spell, self.own_end, self._opens(k)
        prompt, both = self.text(ids[:begin]), self.text(ids)
        trained = spell(both[len(prompt) : None if own is not None else -1])
        prompt, history, whole = map(spell, (prompt, self.text(self.ids(k) or ()), self.text(self.ids(k + 1) or ())))
        before, found, rest = whole.rpartition(trained)
        certain = bool(history) and before.startswith(history) and ids[-1] in {*self.verifier.stops, own}
        thought = rf"\s*{re.escape(self._reasoning(k))}\s*</think>\s*"
        if opens and (begins := re.match(thought, trained)):
            before, found, rest = whole.rpartition(trained[begins.end() :])
            before = re.sub(rf"(?:\s*</?think>)*{thought}\Z", "", before)
        if not found or not (certain or prompt.endswith(rest) or self._is_blank(rest, stops)):
            return False  # the next answer may be opened always
        said = str(self.messages[k - 1].get("content") or "").strip()
        behind = prompt.rpartition(said)[2] if said else ""  # a template without a generation prompt of its own
        header = prompt[len(shared(prompt, history)) :] or rest or behind or prompt[-12:]
        claimed = [header[:n] for n in range(len(header)) if header[n].isspace() and trained.startswith(header[n])]
        if any(before.endswith(each) for each in claimed if each):
            return False  # the whitespace that begins it there is the header's
        headers = {header[:n].rstrip() for n in range(1, len(header) + 1)} | ({"<think>"} if opens else set())
        return any(before.rstrip().endswith(each) for each in headers - {""})

    def _is_blank(self, rest: Any, stops: set[int]) -> bool:
        """Whether ids or a text hold nothing but whitespace and tokens at which generation stopped already."""
        controls, text = self.verifier.controls, self.verifier.spell(rest)
        return not self.verifier.control_text.sub(lambda m: "" if controls[m[0]] in stops else m[0], text).strip()

    # -- the conversation as a whole ------------------------------------------------------------------------------

    def _compare_with_wanted(self, trained: list[int]) -> None:
        allowed = [k for k in self.turns if self.raw[k].get("train", True) is not False]
        wanted = allowed if self.verifier.train_on == "all" else [k for k in allowed if k == self.turns[-1]]
        for k in dict.fromkeys(trained):
            if k not in wanted:
                self._add_error("trained against the row", f"message {k} must not be trained")
            if trained.count(k) > 1:
                self._add_error("trained twice", f"message {k} is trained {trained.count(k)} times")
        self.result.untrained = [k for k in wanted if k not in trained]
        for i, what, harmless in named(self.lost, self.raw, self.given_tools, self.verifier.tags):
            # A turn that goes on with the reasoning that its prompt opens is compared with it
            opened = i in trained and what.startswith("the reasoning") and self._opens(i)
            if harmless:
                self.result.losses.append(what)
            elif (i in trained or i not in self.turns) and not opened:
                where = "the tools" if i < 0 else f"message {i}"
                self._add_error("lost content", f"{where}: the template does not write {what}")

    def _opens(self, k: int) -> bool:
        return self.verifier.spell((self.ids(k, prompt=True) or ())[-8:]).rstrip().endswith("<think>")

    def _difference(self, found: Any, right: Any) -> str:
        at, spell = len(shared(found, right)), self.verifier.spell

        def unit(value: Any) -> str:
            if at >= len(value):
                return "nothing more"
            return repr(spell(value[at : at + 1])) + (f" ({value[at]})" if isinstance(value[at], int) else "")

        after = spell(found[max(0, at - 8) : at])
        return f"token {at}: training has {unit(found)}, inference {unit(right)}, after {after!r}"


def runs(labels: Any) -> Iterator[tuple[int, int]]:
    """Begin and end of each stretch of labels."""
    edges = np.flatnonzero(np.diff(np.asarray(labels) != IGNORE_INDEX, prepend=False, append=False)).tolist()
    yield from zip(edges[::2], edges[1::2], strict=True)


def shared(one: Any, other: Any) -> Any:
    """The common beginning of two texts, or two tuples of ids."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return one[: sum(1 for _ in same)]
