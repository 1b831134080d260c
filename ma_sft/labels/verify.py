"""Proves ids and labels that somebody else made, by transformers' chat templates and the tokenizer alone.

Of each span of labels: the ids before it are inference's prompt of one turn; what is trained is what the template goes
on with or, where it writes history otherwise, the row's own values in order with only the template's text between them;
it ends at the first token that stops generation. What a template drops is found with placeholder words, once a shape.
What cannot be compared is "not proven". What follows the last label cannot change a label, and is not looked at.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any

from transformers import PreTrainedTokenizerBase

from ma_sft.hub import generation_config, stop_ids
from ma_sft.labels.apply_template import bounded, clock_at, text_and_marks
from ma_sft.labels.placeholders import FORMS, Form, Lost, Message, Refused, arguments_of, dropped_content, shape, walk

IGNORE_INDEX = -100
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # what an assistant writes itself as structure
PRIVATE = 0xF0000  # the first of the characters that stand for control tokens where ids are compared as text
EMPTY_REASONING = re.compile(r"\s*<think>\s*</think>\s*")
# A reasoning that a prompt opens and shuts, so that the answer follows, which history does not have
SHUT_REASONING = re.compile(
    r"<[^<>/]*(?:think|channel)[^<>]*>(?:thought)?\s*<[^<>]*(?:think|channel)[^<>]*>\s*", re.IGNORECASE
)
NO_TURNS = "turns cannot be read back from the ids"
NOT_CONTINUED = "the template does not continue its own generation prompt"
Labelled = tuple[list[int], list[int]]  # input_ids, labels


@dataclass
class VerifyResult:
    """What was found in one conversation.

    `proven` are the spans (sequence, begin, end) that are right, `confirmed` of them by generation marks, too. `errors`
    are (code, what is wrong); `losses` name what the row has and no sequence shows; `unproven` what could not be
    compared; `remarks` what does no harm; `untrained` the assistant messages that ought to be trained and are not.
    """

    proven: list[tuple[int, int, int]] = field(default_factory=list)
    confirmed: int = 0
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
        self.controls = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content.strip() and token.content in source)
        }
        self.signs = {index: chr(PRIVATE + n) for n, index in enumerate(self.controls.values())}
        self._names = {ord(sign): name for name, sign in zip(self.controls, self.signs.values(), strict=True)}
        longest_first = sorted(map(re.escape, self.controls), key=len, reverse=True)
        self.control_text = re.compile("|".join(longest_first) or r"(?!)")
        self._sections = re.compile(f"(?={self.control_text.pattern})") if longest_first else None
        self.stops: set[int] = {
            *stops,
            tokenizer.eos_token_id,
            *stop_ids(generation_config(tokenizer.name_or_path)),
        } - {None}
        self._by_shape: dict[str, tuple[list[tuple[Form, list[Lost]]], Any, str]] = {}
        self._own_ends: dict[str, int | None] = {}
        self._known: dict[str, tuple[int, ...]] = {}  # ids of texts of the batch at hand
        self.marked_template = self._marked_template()

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

    def verify_batch(
        self, rows: Iterable[tuple[list[Message], Sequence[Labelled], list[Any] | None, dict[str, Any] | None]]
    ) -> list[VerifyResult]:
        """`verify` of many conversations (messages, sequences, tools, kwargs), tokenised together."""
        prepared = [(self._conversations(m, tools, kwargs), sequences) for m, sequences, tools, kwargs in rows]
        self._known = {}
        texts = [text for (conversations, _), _ in prepared for each in conversations[:1] for text in each.texts()]
        self._known = dict(zip(texts, self.ids(texts), strict=True))
        results = [self._best(*conversations, sequences) for conversations, sequences in prepared]
        self._known = {}
        return results

    def _conversations(
        self, messages: list[Message], tools: Any, kwargs: dict[str, Any] | None
    ) -> tuple[list["_Conversation"], str]:
        """The conversation in each form in which the template loses least of it; else why there is none."""
        if not any(message["role"] == "assistant" for message in messages):
            return [], NO_TURNS
        variables = {**self.template_kwargs, **(kwargs or {})}
        if len(messages) == 1:
            return [_Conversation(self, messages, FORMS[0], tools, variables, [])], ""
        key = shape(messages, tools, variables)
        if key not in self._by_shape:
            self._by_shape[key] = self._weigh_forms(messages, tools or None, variables)
        forms, empty, refusal = self._by_shape[key]
        tools = tools or empty
        found = [_Conversation(self, messages, form, tools, variables, lost) for form, lost in forms]
        return found, f"the template refuses the conversation: {refusal}"

    def _weigh_forms(self, messages: list[Message], tools: Any, kwargs: dict[str, Any]) -> Any:
        found: list[tuple[Form, list[Lost]]] = []
        refusal = ""
        for given in (tools, []) if tools is None else (tools,):  # a template of rows with tools may need a list
            for form in FORMS:
                try:
                    found.append((form, dropped_content(self.render, messages, form, given, kwargs)))
                except Refused as error:
                    refusal = refusal or str(error)
                if found and not found[-1][1]:
                    break
            if found:
                fewest = min(len(lost) for _, lost in found)
                return [each for each in found if len(each[1]) == fewest], given, refusal
        return [], None, refusal

    def _best(self, conversations: list["_Conversation"], refusal: str, sequences: Sequence[Labelled]) -> VerifyResult:
        first: VerifyResult | None = None
        for conversation in conversations:
            result = conversation.verify(sequences)
            if not result.errors and not result.unproven:
                return result
            first = first or result
        return first or VerifyResult(unproven=[refusal])

    # -- texts and ids --------------------------------------------------------------------------------------------

    def render(self, messages: list[Message], tools: Any, kwargs: dict[str, Any], *, prompt: bool) -> str:
        """The text of `apply_chat_template`.

        Raises:
            Refused: the template raised.
        """
        template = self.tokenizer.get_chat_template(tools=tools)
        try:
            with bounded(), clock_at(self.template_date, template):
                rendered: Any = text_and_marks(
                    [messages], tools, chat_template=template, add_generation_prompt=prompt, **self.names(kwargs)
                )
            return str(rendered[0][0])
        except Exception as error:  # templates raise what they like
            raise Refused(" ".join(str(error).split())[:200] or type(error).__name__) from None

    def names(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a template can name beside the conversation: special tokens and variables."""
        return {**self.tokenizer.special_tokens_map, **kwargs}

    def ids(self, texts: list[str]) -> list[tuple[int, ...]]:
        """Ids of rendered texts, of which many share their beginnings, as in a long conversation.

        Control tokens cut a text before anything else does, so each section from one to the next is tokenised once.
        """
        new = [*dict.fromkeys(text for text in texts if text not in self._known)]
        parts = [[p for p in self._sections.split(t) if p] for t in new] if len(new) > 8 and self._sections else []
        sections = [*dict.fromkeys(part for each in parts for part in each)]
        longest = sorted(new, key=len)[-3:]
        found = self._tokenize(longest + sections if parts else new)
        if parts:
            joined = [tuple(i for part in each for i in found[part]) for each in parts]
            known = dict(zip(new, joined, strict=True))
            found = known if all(known[t] == found[t] for t in longest) else self._tokenize(new)
        return [self._known[text] if text in self._known else found[text] for text in texts]

    def _tokenize(self, texts: list[str]) -> dict[str, tuple[int, ...]]:
        found = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return {text: tuple(ids) for text, ids in zip(texts, found, strict=True)}

    def text(self, ids: Sequence[int]) -> str:
        """The ids as text in which each control token is one character that no text can hold."""
        parts: list[str] = []
        held: list[int] = []
        for index in [*ids, -1]:
            if index != -1 and index not in self.signs:
                held.append(index)
                continue
            parts.append(str(self.tokenizer.decode(held, clean_up_tokenization_spaces=False)) if held else "")
            parts.append(self.signs.get(index, ""))
            held = []
        return "".join(parts)

    def spell(self, value: Any) -> str:
        """Ids, or a text of `text`, as people read it."""
        return (value if isinstance(value, str) else self.text(value)).translate(self._names)

    def own_end(self, form: Form, tools: Any, kwargs: dict[str, Any]) -> int | None:
        """The control token that the template writes at the end of a plain turn; None where it writes none (GLM)."""
        key = repr((FORMS.index(form), bool(tools), sorted(kwargs)))
        if key not in self._own_ends:
            said = [form({"role": r, "content": f"Qux{r}"}) for r in ("user", "assistant", "user")]
            try:
                wholes = [self.render(said[:n], tools, kwargs, prompt=False) for n in (2, 3)]
                alone, more = self.ids([w.rpartition("Quxassistant")[2].partition("Quxuser")[0] for w in wholes])
                question = [self.render(said[:1], tools, kwargs, prompt=p) for p in (False, True)]
                if question[0] == question[1]:  # the next answer is always opened: what opens a question is not an end
                    (opening,) = self.ids([question[0].partition("Quxuser")[0]])
                    more = more[: len(more) - len(shared(opening[::-1], more[::-1]))]
                    alone = more[: next((n + 1 for n, i in enumerate(more) if i in self.stops), len(more))]
                both = [i for i in shared(alone, more) if i in self.signs]
                self._own_ends[key] = next(reversed(both or [i for i in alone if i in self.signs]), None)
            except Refused:
                self._own_ends[key] = None
        return self._own_ends[key]

    def _marked_template(self) -> str | None:
        """The template with generation marks: the tokenizer's own, or TRL's training twin of it."""
        own, shelf = self.tokenizer.chat_template, files("trl") / "chat_templates"
        if not isinstance(own, str) or re.search(r"\{%-?\s*generation", own):
            return own if isinstance(own, str) else None
        for twin in shelf.iterdir():
            base, _, rest = twin.name.rpartition("_training.jinja")
            if base and not rest and (shelf / f"{base}.jinja").read_text(encoding="utf-8") == own:
                return twin.read_text(encoding="utf-8")
        return None


class _Conversation:
    """One conversation in one form."""

    def __init__(
        self, verifier: Verifier, raw: list[Message], form: Form, tools: Any, kwargs: dict[str, Any], lost: list[Lost]
    ) -> None:
        self.verifier, self.raw, self.form, self.kwargs, self.lost = verifier, raw, form, kwargs, lost
        self.hidden: dict[str, str] = {}  # placeholder -> the text that spells a control token
        self.turns = [k for k, m in enumerate(raw) if m["role"] == "assistant"]
        self.messages = [self._hide(form(m)) for m in raw]
        self.tools = walk(tools, self._hide_text) if tools else tools
        self.rendered: dict[tuple[int, bool], str | None] = {}
        self.result = VerifyResult()

    def _hide(self, message: Message) -> Message:
        """The message with placeholders for text that spells control tokens, but not for an assistant's markup."""
        hidden: Message = {}
        for key, value in message.items():
            own = MARKUP if message["role"] == "assistant" and key == "content" else ()
            hidden[key] = walk(value, partial(self._hide_text, markup=own))
        return hidden

    def _hide_text(self, text: str, markup: tuple[str, ...] = ()) -> str:
        def placeholder(match: re.Match[str]) -> str:
            if match[0] in markup:
                return match[0]
            self.hidden[name := f"§{len(self.hidden)}§"] = match[0]
            return name

        return self.verifier.control_text.sub(placeholder, text)

    def render(self, end: int, *, prompt: bool) -> str | None:
        """The first `end` messages; None where the template refuses them."""
        if (end, prompt) not in self.rendered:
            try:
                text = self.verifier.render(self.messages[:end], self.tools, self.kwargs, prompt=prompt)
            except Refused:
                text = None
            self.rendered[end, prompt] = text
        return self.rendered[end, prompt]

    def texts(self) -> list[str]:
        """All texts whose ids are compared."""
        if len(self.raw) == 1:
            return [str(self.messages[0]["content"])]
        found = [self.render(k + end, prompt=not end) for k in self.turns for end in (0, 1)]
        return [text for text in found if text is not None]

    def text(self, ids: Sequence[int]) -> str:
        text = self.verifier.text(ids)
        for name, hidden in self.hidden.items():
            text = text.replace(name, hidden)
        return text

    def key(self, ids: Sequence[int]) -> Any:
        """What is compared: ids; or, where text spells control tokens, whose ids are not one choice, text."""
        return self.text(ids) if self.hidden else tuple(ids)

    def key_of(self, end: int, *, prompt: bool) -> Any:
        if len(self.raw) == 1:  # an assistant's message that answers nothing is a text, which no template sees
            tokenizer = self.verifier.tokenizer
            begin = tuple(tokenizer("")["input_ids"])
            (ids,) = self.verifier.ids(self.texts())
            return self.key(begin if prompt else (*begin, *ids, tokenizer.eos_token_id))
        text = self.render(end, prompt=prompt)
        return None if text is None else self.key(self.verifier.ids([text])[0])

    def verify(self, sequences: Sequence[Labelled]) -> VerifyResult:
        prompts = {k: key for k in self.turns if (key := self.key_of(k, prompt=True)) is not None}
        by_prompt = {key: k for k, key in prompts.items()}
        trained: list[int] = []
        for number, (ids, labels) in enumerate(sequences):
            for begin, end in runs(labels):
                if labels[begin:end] != ids[begin:end]:
                    self._add_error("foreign labels", f"tokens {begin}:{end} are labelled with other tokens")
                    continue
                before = self.key(ids[:begin])
                if before in by_prompt:
                    trained.append(by_prompt[before])
                    self._verify_turn(number, by_prompt[before], ids, begin, end)
                elif prompts:
                    nearest = max(prompts, key=lambda k: len(shared(prompts[k], before)))
                    trained.append(nearest)
                    difference = self._difference(before, prompts[nearest])
                    self._add_error("unlike inference", f"before message {nearest}: {difference}")
                else:
                    self.result.unproven.append("the template refuses every prompt of the conversation")
        self._compare_with_wanted(trained)
        self._compare_with_marks(sequences)
        return self.result

    def _add_error(self, code: str, what: str) -> None:
        self.result.errors.append((code, what))

    def _verify_turn(self, number: int, k: int, ids: list[int], begin: int, end: int) -> None:
        whole = self.key_of(k + 1, prompt=False)
        if whole is None:
            self.result.unproven.append(f"the template refuses message {k}")
            return
        before, stops = self.key(ids[:begin]), self._stops(k, whole)
        last = next((at + 1 for at in range(end - 1, begin, -1) if ids[at] in stops), end)
        if last < end and not self.verifier.spell(ids[last:end]).strip():
            self.result.remarks.append("whitespace behind the end token is trained too")
            end = last
        said, expected = self.key(ids[:end])[len(before) :], whole[len(before) :]
        opened = self._opens(before) and not re.search("</think>", self.verifier.spell(expected))
        goes_on = starts(whole, before) and not opened
        if ids[end - 1] not in stops:
            right = self.verifier.spell(expected[-8:]) if goes_on else "a token at which generation stops"
            what = f"message {k}: trained up to {self.verifier.spell(ids[begin:end][-8:])!r}, not to {right!r}"
            code = "missing end token" if not goes_on or starts(expected, said) else "unlike the template"
            self._add_error(code, what)
        elif (at := next((at for at in range(begin, end - 1) if ids[at] in stops), None)) is not None:
            rest = self.verifier.spell(ids[at + 1 : end])
            self._add_error("trained past the end", f"message {k}: {rest!r} is trained behind the end of the turn")
        elif not (goes_on and self._continues(k, said, expected, stops)):
            if opened and not self._reasons(k):
                self.result.unproven.append(NOT_CONTINUED)
                return
            if problem := self._unlike_values(k, before, ids, begin, end, goes_on, expected):
                self._add_error("unlike the template", f"message {k}: {problem}")
            else:
                self.result.proven.append((number, begin, end))
        else:
            self.result.proven.append((number, begin, end))

    def _continues(self, k: int, said: Any, expected: Any, stops: set[int]) -> bool:
        """Whether the template goes on with what is trained, and writes nothing more but stops and whitespace."""
        if k + 1 < len(self.raw) and not starts(expected, said):  # history is written without an empty reasoning
            head = expected[: max(0, len(expected) - len(said))]
            for cut in range(len(head) + 1):
                if EMPTY_REASONING.fullmatch(self.verifier.spell(expected[:cut])) and starts(expected[cut:], said):
                    expected = expected[cut:]
                    break
        rest = expected[len(said) :]
        text = rest if isinstance(rest, str) else self.verifier.text(rest)
        ends = {ord(self.verifier.signs[i]): None for i in stops if i in self.verifier.signs}
        own_end = (
            any(i in stops for i in expected)
            if not isinstance(expected, str)
            else bool({*map(ord, expected)} & {*ends})
        )
        own = self.verifier.own_end(self.form, self.tools, self.kwargs) if len(self.raw) > 1 else None
        last = self._ids_of_signs(said[-1:])[-1]
        at_its_end = last in self.verifier.stops or last == own or not text.translate(ends).strip()
        return (starts(expected, said) and at_its_end) or (
            not own_end and self._ended_by_others(k, said[:-1], expected)
        )

    def _ended_by_others(self, k: int, said: Any, expected: Any) -> bool:
        """Whether `said` is what the template writes, which ends no turn: its last whitespace is then no part of it.

        Such whitespace may be one token with the text before it, so texts are compared, and then ids without it.
        """
        text, written = (v if isinstance(v, str) else self.verifier.text(v) for v in (said, expected))
        if not written.startswith(text) or written[len(text) :].strip():
            return False
        if said == expected or isinstance(said, str):
            return True
        whole = self.render(k + 1, prompt=False) or ""
        (ids,) = self.verifier.ids([whole[: len(whole) - (len(written) - len(text))]])
        return ids == (*self.key_of(k, prompt=True), *said)

    def _stops(self, k: int, whole: Any) -> set[Any]:
        """The ids at which the turn ends: generation's, the template's own, or the token that begins what follows."""
        if len(self.raw) == 1:
            return set(self.verifier.stops)
        own = self.verifier.own_end(self.form, self.tools, self.kwargs)
        stops = self.verifier.stops | ({own} if own is not None else set())
        written = self._ids_of_signs(whole)
        tail = next((i for i in reversed(written) if self.verifier.spell([i] if i >= 0 else "x").strip()), None)
        if any(i in stops for i in written[-4:]):
            return stops
        if self.raw[k].get("tool_calls") and own is not None and tail in self.verifier.signs:
            return stops | ({tail} if tail is not None else set())
        if own is None or tail != own:
            begins = self._next_begins(k, whole)
            if begins is None and self.raw[k].get("tool_calls") and tail in self.verifier.signs:
                begins = tail  # the result stands right behind what closes the call
            stops = stops | ({begins} if begins is not None else set())
        return stops

    def _ids_of_signs(self, written: Any) -> Sequence[int]:
        """What is compared, as ids: of a text, those of its control tokens."""
        by_sign = {sign: index for index, sign in self.verifier.signs.items()}
        return [by_sign.get(unit, -1) for unit in written] if isinstance(written, str) else written

    def _next_begins(self, k: int, whole: Any) -> int | None:
        """The control token that begins the message after turn `k`: the result of a call, a question (GLM)."""
        following: list[Message] = self.messages[k + 1 : k + 2]
        if not following and (calls := self.raw[k].get("tool_calls")):
            called = calls[0].get("function") or calls[0]
            number = {"tool_call_id": calls[0].get("id", "call00001")}
            following = [self.form({"role": "tool", "content": "Qux", "name": called["name"], **number})]
        following = following or [self.form({"role": "user", "content": "Qux"})]
        try:
            text = self.verifier.render([*self.messages[: k + 1], *following], self.tools, self.kwargs, prompt=False)
        except Refused:
            return None
        key = self.key(self.verifier.ids([text])[0])
        begins = key[len(whole) : len(whole) + 1] if starts(key, whole) else ""
        return next((i for i, sign in self.verifier.signs.items() if begins and begins[0] in (i, sign)), None)

    # -- where history is written otherwise than in the prompt ----------------------------------------------------

    def _opens(self, before: Any) -> bool:
        return bool(self.verifier.spell(before[-8:]).rstrip().endswith("<think>"))

    def _reasons(self, k: int) -> bool:
        return bool(self.raw[k].get("reasoning_content") or "</think>" in str(self.raw[k].get("content")))

    def _unlike_values(
        self, k: int, before: Any, ids: list[int], begin: int, end: int, goes_on: bool, expected: Any
    ) -> str | None:
        """What the turn has beside its own values in their order and what the template writes between them."""
        if goes_on:
            return self._difference(self.key(ids[:end]), (*before, *expected) if not self.hidden else before + expected)
        spell, opened = self.verifier.spell, self._opens(before)
        context = self.text(ids[:begin])
        text, context = spell(self.text(ids[:end])[len(context) :][:-1]), spell(context)
        own = self._written_around(k)
        # What stands before the turn, and where: history has the prompt's shut reasoning, or it has not
        around = [(context[-12:], own), (SHUT_REASONING.sub("", context)[-12:], SHUT_REASONING.sub("", own))]
        for n, options in enumerate([*self._values(k, opened, text), ()]):
            value = next((option for option in options if option in text), None)
            if options and value is None:
                return f"{options[0][:40]!r} is not in {text[:60]!r}"
            head, _, text = text.partition(value) if value else (text, "", "")
            if n and opened:  # what closes the reasoning that the prompt opened
                head = head.removeprefix(head[: head.find("</think>") + len("</think>")] if "</think>" in head else "")
            if (
                head.strip()
                and not any((before_it + head).strip() in written for before_it, written in around)
                and not (n and opened and head.strip() == "</think>")
            ):
                return f"{head[:40]!r} is trained, which the template does not write there"
            around = [("", written) for _, written in around]
        return None

    def _written_around(self, k: int) -> str:
        words = dropped_content(self.verifier.render, self.raw[: k + 1], self.form, self.tools, self.kwargs, text=True)
        return self.verifier.spell(self.verifier.text(self.verifier.ids([str(words)])[0]))

    def _values(self, k: int, opened: bool, text: str) -> Iterator[tuple[str, ...]]:
        """The values of a turn in the order in which templates write them, each as it may be written."""
        message = self.raw[k]
        reasoning = str(message.get("reasoning_content") or "").strip()
        if reasoning and (opened or reasoning in text):
            yield (reasoning,)
        for part in re.split(r"</?(?:think|tool_call)>", str(message.get("content") or "")):
            if part.strip():
                yield (part.strip(),)
        for call in message.get("tool_calls") or ():
            function = call.get("function") or call
            yield (str(function["name"]),)
            for value in arguments_of(function).values():
                if value not in ("", None) and not isinstance(value, dict | list):
                    plain = json.dumps(value, ensure_ascii=False)
                    yield (value, plain[1:-1]) if isinstance(value, str) else (plain, str(value))

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
        for i, what, harmless in self.lost:
            if harmless:
                self.result.losses.append(what)
            elif i in trained and "reasoning" in what and self._opens(self.key_of(i, prompt=True)):
                continue  # the turn goes on with it, and is compared with it
            elif i in trained or i not in self.turns:
                where = "the tools" if i < 0 else f"message {i}"
                self._add_error("lost content", f"{where}: the template does not write {what}")

    def _compare_with_marks(self, sequences: Sequence[Labelled]) -> None:
        """Generation marks of the same ids end where labels do, and leave out nothing of a turn that they confirm."""
        verifier = self.verifier
        if not verifier.marked_template or self.hidden or len(self.raw) == 1 or not self.result.proven:
            return
        try:
            with bounded(), clock_at(verifier.template_date, verifier.marked_template):
                rendered: Any = text_and_marks(
                    [self.messages],
                    self.tools,
                    chat_template=verifier.marked_template,
                    return_assistant_tokens_mask=True,
                    **verifier.names(self.kwargs),
                )
        except Exception:  # a twin may refuse what the template takes; it is no more than a second opinion
            return
        (text,), (marks,) = rendered
        encoded = verifier.tokenizer(text, add_special_tokens=False) if marks else None
        spans = [(encoded.char_to_token(b), encoded.char_to_token(e - 1)) for b, e in marks] if encoded else []
        marked_spans = [range(b, e + 1) for b, e in spans if b is not None and e is not None]
        for number, begin, end in self.result.proven:
            ids = sequences[number][0]
            own = [
                span for span in marked_spans if span.start < end and begin < span.stop
            ]  # neighbours' may touch them
            if encoded is None or ids != encoded["input_ids"] or not own:
                continue
            marked = {at for span in own for at in span}
            first, beyond = max(begin, min(marked)), max(end, max(marked) + 1)
            edge = [at for at in range(first, end) if at not in marked]
            wrong = [ids[at] for at in [*edge, *range(end, beyond)] if ids[at] not in verifier.stops]
            if not verifier.spell(wrong).strip():
                self.result.confirmed += 1
            elif beyond > end and verifier.spell([i for i in ids[end:beyond] if i not in verifier.stops]).strip():
                self._add_error(
                    "unlike the marks", f"tokens {begin}:{end} are trained, generation marks go on to {beyond}"
                )

    def _difference(self, found: Any, right: Any) -> str:
        at, spell = len(shared(found, right)), self.verifier.spell

        def unit(value: Any) -> str:
            if at >= len(value):
                return "nothing more"
            return repr(spell(value[at : at + 1])) + (f" ({value[at]})" if isinstance(value[at], int) else "")

        after = spell(found[max(0, at - 8) : at])
        return f"token {at}: training has {unit(found)}, inference {unit(right)}, after {after!r}"


def runs(labels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of each stretch of labels."""
    begin = None
    for at, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and begin is None:
            begin = at
        elif label == IGNORE_INDEX and begin is not None:
            yield begin, at
            begin = None


def starts(whole: Any, begin: Any) -> bool:
    """Whether one text, or list of ids, begins with the other."""
    return bool(whole[: len(begin)] == begin)


def shared(one: Any, other: Any) -> Any:
    """The common beginning of two texts or lists of ids."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))]
