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
from itertools import chain, groupby, product
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ma_sft.errors import TemplateError
from ma_sft.hub import generation_config, stop_ids
from ma_sft.labels.apply_template import apply_template
from ma_sft.labels.placeholders import Lost, Message, arguments_of, dropped_content, named, shape, tags_of

IGNORE_INDEX = -100
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # what an assistant writes itself as structure
PRIVATE = 0xF0000  # the first of the characters that stand for control tokens where ids are compared as text
EMPTY_REASONING = re.compile(r"\s*<think>\s*</think>\s*")
Labelled = tuple[list[int], list[int]]  # input_ids, labels
Form = Callable[[Message], Message]  # in which a serving stack may give a message to a template
Ids = tuple[int, ...]
# Messages, the sequences that train them, tools, variables of the template
Row = tuple[list[Message], Sequence[Labelled], list[Any] | None, dict[str, Any] | None]


def _formed(message: Message, *, as_json: bool = False, empty: str | None = "", parts: bool = False) -> Message:
    message = {key: value for key, value in message.items() if value is not None and key != "train"}
    if message.get("tool_calls"):
        calls = []
        for call in message["tool_calls"]:
            function = dict(call.get("function") or call)
            arguments: Any = arguments_of(function)
            function["arguments"] = json.dumps(arguments, ensure_ascii=False) if as_json else arguments
            calls.append({"type": "function", **call, "function": function})
        message |= {"content": message.get("content") or empty, "tool_calls": calls}
    if parts and not isinstance(message.get("content"), list):
        message["content"] = [{"type": "text", "text": message.get("content") or ""}]
    return message


as_json = partial(_formed, as_json=True)
FORMS: tuple[Form, ...] = (_formed, partial(as_json, empty=None), as_json, partial(_formed, parts=True))


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
        self._ends: dict[str, tuple[int | None, str]] = {}
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
        texts = [text for conversation, _ in found for text in conversation.texts]
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
                found.append((sum(not harmless for *_, harmless in lost), as_python, len(found), form, given, lost))
                if found[-1][:2] == (0, False):
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
        try:
            return apply_template(self.tokenizer, messages, tools, kwargs, prompt=prompt, date=self.template_date)
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

    def end_of_turn(self, form: Form, tools: Any, kwargs: dict[str, Any]) -> tuple[int | None, str]:
        """The control token with which the template ends a plain turn, None where it writes none (GLM).

        And what it writes behind a turn's text if nothing follows.
        """
        key = repr((FORMS.index(form), tools, sorted(kwargs.items())))
        if key not in self._ends:
            said = [form({"role": role, "content": f"Qux{role}"}) for role in ("user", "assistant", "user")]
            try:
                asked, *wholes = [self.render(said[:n], tools, kwargs, prompt=False) for n in (1, 2, 3)]
                always_opened = asked == self.render(said[:1], tools, kwargs, prompt=True)
            except TemplateError:
                return None, ""
            tails = [whole.rpartition("Quxassistant")[2].partition("Quxuser")[0] for whole in wholes]
            alone, more = self.ids(tails)
            both = [i for i in alone[: shared(alone, more)] if i in self.signs]
            signs = both or [i for i in alone if i in self.signs]
            ends = [*(i for i in signs if i in self.stops), *(signs[:1] if always_opened else signs[-1:]), None]
            self._ends[key] = ends[0], tails[0]
        return self._ends[key]


class _Conversation:
    """One conversation. An assistant's message that answers nothing is a text, which no template sees."""

    def __init__(self, verifier: Verifier, raw: list[Message], tools: Any, kwargs: dict[str, Any]) -> None:
        self.verifier, self.raw, self.given_tools, self.result = verifier, raw, tools or None, VerifyResult()
        self.kwargs = {**verifier.template_kwargs, **kwargs}
        self.turns = [k for k, m in enumerate(raw) if m["role"] == "assistant"]
        self.is_text = len(raw) == 1
        self.form, used_tools, self.lost = FORMS[0], self.given_tools, list[Lost]()
        if not self.turns:
            self.result.unproven = ["turns cannot be read back from the ids"]
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
        self.tools = self._hide(used_tools)
        self.prompts = {k: "" if self.is_text else self.render(k, prompt=True) for k in self.turns}
        self.wholes = {k: str(self.messages[0]["content"]) if self.is_text else self.render(k + 1) for k in self.turns}
        self.texts = [text for text in (*self.prompts.values(), *self.wholes.values()) if text is not None]

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
        with suppress(TemplateError):
            return self.verifier.render(self.messages[:end], self.tools, self.kwargs, prompt=prompt)
        return None

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
        verifier, before, behind = self.verifier, list[int](), list[int]()
        if self.is_text:  # between ids that the tokenizer puts around it
            self.own_end, self.tail = verifier.tokenizer.eos_token_id, ""
            before, behind = verifier.tokenizer("")["input_ids"], [self.own_end]
        else:
            self.own_end, self.tail = verifier.end_of_turn(self.form, self.tools, self.kwargs)
        known = dict(zip(self.texts, verifier.ids(self.texts), strict=True))
        self.asked = {k: (*before, *known[text]) for k, text in self.prompts.items() if text is not None}
        self.told = {k: (*before, *known[text], *behind) for k, text in self.wholes.items() if text is not None}
        by_prompt, trained = {self.key(ids): k for k, ids in self.asked.items()}, list[int]()
        for number, (ids, labels) in enumerate(sequences):
            for begin, end in runs(labels):
                k = by_prompt.get(self.key(tuple(ids[:begin])))
                if labels[begin:end] != ids[begin:end]:
                    self._add_error("foreign labels", f"tokens {begin}:{end} are labelled with other tokens")
                elif k is not None:
                    trained.append(k)
                    self._verify_turn(number, k, tuple(ids), begin, end)
                elif by_prompt:
                    trained.append(self._misplaced(tuple(ids), labels, begin))
                else:
                    self.result.unproven.append("the template refuses every prompt of the conversation")
        self._compare_with_wanted(trained)
        return self.result

    def _misplaced(self, ids: Ids, labels: list[int], begin: int) -> int:
        """Say in a user's words where labels begin that begin behind no prompt; the turn that is meant."""
        whole, before = self.key(ids), self.key(ids[:begin])
        prompts = {k: self.key(prompt) for k, prompt in self.asked.items()}

        def nearness(k: int) -> tuple[bool, int]:
            if whole[: len(prompts[k])] == prompts[k]:
                return True, -abs(len(prompts[k]) - len(before))
            return False, shared(prompts[k], before)

        k, what = max(prompts, key=nearness), ""
        if ids[: len(self.asked[k])] == self.asked[k]:
            early, trained = len(self.asked[k]) - begin, [label != IGNORE_INDEX for label in labels]
            asked = self.text(ids[begin : len(self.asked[k])])
            texts = [(m["role"], str(m.get("content") or "").strip()) for m in self.raw[:k] if m["role"] != "assistant"]
            roles = " and ".join(dict.fromkeys(role for role, text in texts if text and text in asked))
            what = f"labels begin {abs(early)} tokens {'early' if early > 0 else 'late'}; "
            if early > 0 and roles:
                what = f"{roles} tokens are trained ({np.mean(trained):.0%} of the row); "
            elif any(trained[len(self.asked[k]) : begin]):
                what = "tokens inside a turn are not trained; "
        self._add_error("unlike inference", f"{what}before message {k}: {self._difference(before, prompts[k])}")
        return k

    def _add_error(self, code: str, what: str) -> None:
        self.result.errors.append((code, what))

    # -- one turn -------------------------------------------------------------------------------------------------

    def _verify_turn(self, number: int, k: int, ids: Ids, begin: int, end: int) -> None:
        if k not in self.told:
            self.result.unproven.append(f"the template refuses message {k}")
            return
        prompt, whole, spell, stops = self.asked[k], self.told[k], self.verifier.spell, self._stops(k)
        last = next((at + 1 for at in range(end - 1, begin, -1) if ids[at] in stops), end)
        if last < end and not spell(ids[last:end]).strip():
            self.result.remarks.append("whitespace behind the end token is trained too")
            end = last
        # The reasoning that its prompt opens, from the last turn too
        dropped = self._opens(k) and "</think>" not in spell(whole[len(prompt) :])
        goes_on = not dropped and self._rest(whole, prompt, prompt) is not None
        if ids[end - 1] not in stops:
            what = f"message {k}: trained up to {spell(ids[begin:end][-8:])!r}, not to {spell(whole[-8:])!r}"
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

    def _opens(self, k: int) -> bool:
        return (self.prompts.get(k) or "").rstrip().endswith("<think>")

    def _stops(self, k: int) -> set[int]:
        """The ids at which the turn ends: generation's, the template's own, or the token that begins what follows."""
        verifier = self.verifier
        last = next((index for index in reversed(self.told[k]) if verifier.spell([index]).strip()), -1)
        closing = {last} & {*verifier.signs} if self.raw[k].get("tool_calls") else set()
        if self.own_end is not None:
            return verifier.stops | closing | {self.own_end}
        _, next_message = self._followed(k)
        begins = verifier.control_text.match(next_message.lstrip())
        return verifier.stops | ({verifier.controls[begins[0]]} if begins else closing)

    def _followed(self, k: int) -> tuple[str, str]:
        """What the template writes of a turn, and behind it: the result of a call, a question."""
        written, text = str(self.wholes[k]).rstrip(), self.render(k + 2) or ""
        return written, text[len(written) :] if text.startswith(written) else ""

    def _rest(self, whole: Ids, begin: Ids, prompt: Ids) -> Any:
        """What `whole` has behind `begin`, as ids or text; None if it does not begin with it.

        Texts are compared where text spells control tokens, or the prompt's last token has become another one.
        """
        same = not self.hidden and whole[: len(prompt)] == prompt
        text, start = (whole, begin) if same else (self.text(whole), self.text(begin))
        return text[len(start) :] if text[: len(start)] == start else None

    def _goes_on(self, k: int, prompt: Ids, trained: Ids, stops: set[int]) -> bool:
        """Whether the template goes on with what is trained, and writes nothing more but stops and whitespace."""
        text, asked, whole = str(self.wholes[k]), str(self.prompts[k]), self.told[k]
        rest = self._rest(whole, trained, prompt)
        if rest is None and k + 1 < len(self.raw):  # history is written without an empty reasoning
            (shorter,) = self.verifier.ids([asked + EMPTY_REASONING.sub("", text[len(asked) :], count=1)])
            rest = self._rest(shorter, trained, prompt) if text.startswith(asked) else None
        certain = trained[-1] in {*self.verifier.stops, self.own_end}
        if rest is not None and (certain or self._is_blank(rest, stops)):
            return True
        if self.own_end is not None:
            return False
        # The template ends no turn: the next message's token does, or another one behind the text
        following, written = self.verifier.ids(["".join(self._followed(k)), text.removesuffix(self.tail)])
        ended = self._rest(following, trained, prompt) is not None
        return ended or self._rest(written, trained[:-1], prompt) in ((), "")

    def _stands_behind_its_header(self, k: int, ids: Ids, begin: int, stops: set[int]) -> bool:
        """Whether the template writes the turn as it is trained, where it writes what stands before it otherwise.

        The turn then stands behind what the generation prompt writes, or behind the beginning of that, which may have
        opened a reasoning that the template writes otherwise, or nowhere.
        """
        spell, prompt, both = self.verifier.spell, self.text(ids[:begin]), self.text(ids)
        trained = answer = spell(both[len(prompt) : None if self.own_end is not None else -1])
        (before_turn,) = self.verifier.ids([self.render(k) or ""])
        prompt, history, whole = map(spell, (prompt, self.text(before_turn), self.text(self.told[k])))
        thought = rf"\s*{re.escape(self._reasoning(k))}\s*</think>\s*"
        if self._opens(k):
            answer = re.sub(rf"\A{thought}", "", trained)
        before, found, rest = whole.rpartition(answer or "\0")
        if answer != trained:
            before = re.sub(rf"(?:\s*</?think>)*{thought}\Z", "", before)
        if not found or not (prompt.endswith(rest) or self._is_blank(rest, stops)):
            return False  # the next answer may be opened always
        said = str(self.messages[k - 1].get("content") or "").strip()
        behind = prompt.rpartition(said)[2] if said else prompt[-12:]  # without a generation prompt of its own
        header = prompt[shared(prompt, history) :] or behind
        claimed = [header[:n] for n in range(len(header)) if header[n].isspace() and trained.startswith(header[n])]
        if any(before.endswith(each) for each in claimed if each):
            return False  # the whitespace that begins it there is the header's
        return any(before.rstrip().endswith(header[:n].rstrip() or "\0") for n in range(1, len(header) + 1))

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

    def _difference(self, found: Any, right: Any) -> str:
        at, spell = shared(found, right), self.verifier.spell

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


def shared(one: Any, other: Any) -> int:
    """The length of the common beginning of two texts, or two tuples of ids."""
    unlike = (n for n, (mine, its) in enumerate(zip(one, other, strict=False)) if mine != its)
    return next(unlike, min(len(one), len(other)))
