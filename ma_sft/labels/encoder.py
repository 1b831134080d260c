"""Conversations -> token ids and labels, the one place where labels are made.

The chat template renders a conversation to text. *Control tokens* (the special tokens, and the other added tokens that
the template writes itself, such as `<think>`) cut that text into stretches, each different one of which is tokenised
once a batch, between its control tokens. A control token's text in *content* is cut in two before rendering, so it is
tokenised as the ordinary text it is.

`turns.py` finds for each assistant turn the prompt that the model sees at inference, and what it should write, up to
and with the end-of-turn token. A turn is trained only in a sequence that begins with the prompt and goes on with that.
A template that rewrites history (Qwen3 drops earlier `<think>` blocks, gpt-oss ends earlier turns with another token)
breaks this for some turns; those get a sequence of their own (`history="split"`) or are masked (`history="mask"`).
"""

import json
import re
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ma_sft.errors import MaSftError, TemplateError
from ma_sft.hub import stop_ids
from ma_sft.labels.backend import Backend
from ma_sft.labels.templates import control_tokens, set_chat_template
from ma_sft.labels.turns import FORBIDDEN, Chat, Message, Turns, TurnText

Ids = NDArray[np.int32]
Stretch = tuple[str | None, str, str]  # what stands before a text (None: another text), the text, what stands after it

IGNORE_INDEX = -100

_BATCH = 250  # conversations
_FEW = 200  # stretches for which the faster tokenizer is not built: that takes longer
_EMPTY_REASONING = re.compile(r"<think>\s*</think>\s*")
_MERGED = "the turn's first characters merge into the prompt's last token"


class Turn(NamedTuple):
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


@dataclass
class Example:
    """One training sequence: `input_ids` and `labels` (`-100` where nothing is learned), both of length n_tokens.

    `ids` and `label_ids` are the same as int32 arrays of shape (n_tokens,).
    """

    ids: Ids
    label_ids: Ids
    turns: list[Turn]
    special_text: list[str] = field(default_factory=list)
    shape: str = ""

    @property
    def input_ids(self) -> list[int]:
        return cast(list[int], self.ids.tolist())

    @property
    def labels(self) -> list[int]:
        return cast(list[int], self.label_ids.tolist())


class _Answer(NamedTuple):
    """What a turn writes after its prompt, as an answer or as history has it; stretches of the prompt and of both."""

    text: str
    prompt: list[Stretch]
    whole: list[Stretch]
    written: bool  # the conversation's text goes on so


class _Plan(NamedTuple):
    """A conversation's text, its stretches, and the answers of each turn that may be trained."""

    chat: Chat
    text: str
    stretches: list[Stretch]
    turns: list[tuple[TurnText, list[_Answer]]]


class ChatEncoder:
    """Turns conversations into examples for one tokenizer and its chat template.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        train_on: `"all"` assistant turns, or only the `"last"` one.
        history: what happens to a turn that the template writes differently once it is history: `"split"` trains
            it in a sequence of its own, `"mask"` does not train it.
        template_kwargs: passed to the template, e.g. `{"enable_thinking": False}`.
        template_now: the ISO date or date-time that a template which reads the clock takes for now; None for the
            machine's clock.
        add_eos: for a template that writes no end of turn: put the EOS token behind each.

    Raises:
        TemplateError: no chat template, a slow tokenizer, or a template without an end-of-turn token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train_on: Literal["all", "last"] = "all",
        history: Literal["split", "mask"] = "split",
        template_kwargs: dict[str, Any] | None = None,
        template_now: str | None = None,
        add_eos: bool = False,
    ) -> None:
        if train_on not in ("all", "last"):
            raise TemplateError(f"train_on must be 'all' or 'last', not {train_on!r}")
        if history not in ("split", "mask"):
            raise TemplateError(f"history must be 'split' or 'mask', not {history!r}")
        if not tokenizer.is_fast:
            name = type(tokenizer).__name__
            raise TemplateError(f"{name} is a slow tokenizer; a fast one (tokenizer.json) is needed")
        set_chat_template(tokenizer, None)
        self.tokenizer, self.train_on, self.history, self.add_eos = tokenizer, train_on, history, add_eos
        self.template_kwargs, self.template_now = template_kwargs or {}, template_now
        self.backend = Backend(tokenizer)
        self.control = control_tokens(tokenizer)
        # sentencepiece-like tokenizers put a space before a text; one that continues another must not get it
        self._adds_prefix = tokenizer.convert_ids_to_tokens(self._ids("a"))[0].startswith("▁")
        self._known: dict[Stretch, bytes] = {}
        self._turns = Turns(
            tokenizer,
            self.control,
            train_on=train_on,
            template_kwargs=self.template_kwargs,
            template_now=template_now,
            add_eos=add_eos,
        )
        self.end_token = self._turns.end_token
        self._cuts: dict[str, re.Pattern[str]] = {}  # by the marker of a conversation

    @property
    def end_token_id(self) -> int:
        """Id of the token that ends an ordinary assistant turn; generation stops there."""
        return self.control[self.end_token]

    def render_by_transformers(self) -> None:
        """Leave minijinja, after it was seen to give another text."""
        self._turns.renderer.fast = False

    def encode(
        self,
        conversations: Sequence[list[Message]],
        tools: Sequence[list[Any] | None] | None = None,
        template_kwargs: Sequence[dict[str, Any] | None] | None = None,
    ) -> list[list[Example]]:
        """Examples of each conversation: one, or more where history is split.

        Args:
            conversations: messages; an assistant's with `"train": False` is context and not trained.
            tools: JSON schemas of each conversation's tools.
            template_kwargs: each conversation's own variables for the template, which come before the encoder's.

        Raises:
            TemplateError: a conversation that the template refuses or would lose part of; its position in
                `conversations` is the exception's `index`.
        """
        examples: list[list[Example]] = []
        for start in range(0, len(conversations), _BATCH):
            plans: list[_Plan] = []
            for index, messages in enumerate(conversations[start : start + _BATCH], start):
                kwargs = template_kwargs[index] if template_kwargs else None
                try:
                    plans.append(self._plan(messages, tools[index] if tools else None, kwargs))
                except MaSftError as error:
                    error.index = index  # type: ignore[attr-defined]
                    raise
            self._learn(stretch for plan in plans for stretch in plan.stretches)
            answers = [answer for plan in plans for _, answers in plan.turns for answer in answers]
            self._learn(stretch for a in answers for stretch in (a.prompt[-1], *a.whole[-1 if a.written else 0 :]))
            examples += [self._join(plan) for plan in plans]
            self._known.clear()
        return examples

    def tokenize_batch(self, batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        """For `datasets.map(batched=True, with_indices=True)`: conversations become examples.

        Args:
            batch: columns `messages` and, if there, `tools` and `chat_template_kwargs` (lists and objects, or their
                JSON) and `origin`.
            rows: indices of the conversations.

        Returns columns `input_ids`, `labels`, `row` (index of the conversation), `turns` (trained turns in the
        sequence), `untrained` (why turns are trained in no sequence of the row), `unthought` (turns trained as
        history, without the empty reasoning block that the template writes before the last one), `special_text`
        (control-token texts that stood in the content) and `shape` (conversations of one shape are rendered alike).

        Raises:
            TemplateError: naming the row, by its `origin` if there is that column.
        """
        given = ("tools", "chat_template_kwargs")
        conversations = [[_without_nulls(m) for m in messages] for messages in batch["messages"]]
        try:
            encoded = self.encode(conversations, *(parsed(batch.get(name), len(rows)) for name in given))
        except MaSftError as error:
            at: int = error.index  # type: ignore[attr-defined]
            raise TemplateError(f"{batch['origin'][at] if 'origin' in batch else f'row {rows[at]}'}: {error}") from None
        names = ("input_ids", "labels", "row", "turns", "untrained", "unthought", "special_text", "shape")
        made: list[tuple[Any, ...]] = []
        for row, examples in zip(rows, encoded, strict=True):
            trained = {turn.message for example in examples for turn in example.turns if turn.trained}
            reasons = {t.message: t.reason for e in examples for t in e.turns if t.message not in trained}
            untrained, special = [*reasons.values()], examples[0].special_text
            for e in examples:
                spans = [turn for turn in e.turns if turn.trained]
                unthought = sum(turn.unthought for turn in spans)
                made.append((e.ids, e.label_ids, row, len(spans), untrained, unthought, special, e.shape))
                untrained, special = [], []  # the first sequence of a row tells of all
        return {name: [values[n] for values in made] for n, name in enumerate(names)}

    def encode_prompt(
        self,
        messages: list[Message],
        tools: list[Any] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Ids of the conversation so far with the generation prompt: what inference feeds to the model."""
        chat = self._turns.chat([_without_nulls(m) for m in messages], tools, template_kwargs)
        stretches, _ = self._cut(self._turns.render(chat, len(messages), prompt=True), chat.marker)
        self._learn(stretches)
        raw = self._raw(stretches)
        self._known.clear()
        return cast(list[int], np.frombuffer(raw, np.int32).tolist())

    # -- sequences ----------------------------------------------------------------------------------------------

    def _plan(self, messages: list[Message], tools: list[Any] | None, kwargs: dict[str, Any] | None) -> _Plan:
        check_messages(messages)
        chat = self._turns.chat(messages, tools, kwargs)
        if len(messages) > 1:
            text, turns = self._turns.turns(chat)
        else:  # an assistant's turn that answers nothing is a text: no template, all of it trained, then the EOS token
            prompt = (self.tokenizer.bos_token or "") if self.tokenizer("")["input_ids"] else ""
            target = f"{chat.messages[0]['content']}{self.tokenizer.eos_token}"
            text, turns = prompt + target, [TurnText(0, prompt, target)]
            turns = [TurnText(0, reason=FORBIDDEN)] if chat.untrained else turns
        stretches, starts = self._cut(text, chat.marker)
        found: list[tuple[TurnText, list[_Answer]]] = []
        for turn in turns:
            # An empty reasoning block is scaffolding, not something that the turn says
            texts = dict.fromkeys((turn.target, _EMPTY_REASONING.sub("", turn.target, count=1))) if turn.target else ()
            begin = len(turn.prompt)
            written = [each for each in texts if text.startswith(turn.prompt + each)][:1]
            answers = [_answer(begin, each, stretches, starts, written=True) for each in written]
            if not written:
                cuts = [(each, *self._cut(turn.prompt + each, chat.marker)) for each in texts]
                answers = [_answer(begin, *cut, written=False) for cut in cuts]
            found.append((turn, answers))
        return _Plan(chat, text, stretches, found)

    def _join(self, plan: _Plan) -> list[Example]:
        """The sequences of a conversation: a turn shares one that begins with its ids, else it gets its own."""
        chat, text, stretches, turns = plan
        sequences: list[tuple[bytes, list[Turn]]] = [(self._raw(stretches), [])]
        for turn, answers in reversed(turns):
            ids = [self._ids_of(answer, chat.marker) for answer in answers]
            written = bool(answers) and answers[0].written
            if turn is turns[-1][0] and ids:
                # What is rewritten already when the last turn is answered (gpt-oss drops reasoning then) is not what
                # inference saw: the main sequence is then the last prompt with its answer.
                behind = sequences[0][0][len(self._raw(answers[0].whole)) :] if written else b""
                sequences = [(ids[0][1] + behind, [])]
            fits = ((n, s) for s in sequences for n, (_, whole) in enumerate(ids) if s[0].startswith(whole))
            n, (_, own) = next(fits, (None, sequences[0]))
            if n is not None:
                unthought = answers[n].text != turn.target
                own.append(Turn(turn.message, ids[n][0], len(ids[n][1]) // 4, unthought=unthought))
                continue
            if turn.reason or self.history == "mask" or written:
                what = "this turn" if text.startswith(turn.prompt) else "the turns before this one"
                rewritten = _MERGED if written else f"the template rewrites {what} in history"
                own.append(Turn(turn.message, reason=turn.reason or rewritten))
            if not turn.reason and self.history == "split":
                start, whole = ids[0]
                sequences.append((whole, [Turn(turn.message, start, len(whole) // 4)]))
        if len(sequences) > 1 and not any(turn.trained for turn in sequences[0][1]):
            sequences[-1][1].extend(sequences.pop(0)[1])
        examples = []
        for raw, own in (sequences[0], *reversed(sequences[1:])):
            ids_of_all = np.frombuffer(raw, np.int32)
            labels = np.full(len(ids_of_all), IGNORE_INDEX, dtype=np.int32)
            for each in own:
                labels[each.start : each.end] = ids_of_all[each.start : each.end]
            examples.append(Example(ids_of_all, labels, sorted(own), list(chat.special_text), chat.shape))
        return examples

    # -- ids, as the bytes of int32 arrays ----------------------------------------------------------------------

    def _ids_of(self, answer: _Answer, marker: str) -> tuple[int, bytes]:
        """How many ids the prompt has, and they with those of the answer."""
        prompt, whole = self._raw(answer.prompt), self._raw(answer.whole)
        if not whole.startswith(prompt):  # the answer's first characters merge into the prompt's last token
            (_, text, after), *rest = self._cut(answer.text, marker)[0]
            self._learn(continued := [(None, text, after), *rest])
            whole = prompt + self._raw(continued)
        return len(prompt) // 4, whole

    def _raw(self, stretches: list[Stretch]) -> bytes:
        known = self._known
        return b"".join([known[stretch] for stretch in stretches])

    def _cut(self, text: str, marker: str) -> tuple[list[Stretch], list[int]]:
        """The stretches of text between control tokens and markers, and where each text begins."""
        if marker not in self._cuts:
            self._cuts[marker] = re.compile(f"({self._turns.control_pattern.pattern}{'|' * bool(marker)}{marker})")
        parts = ["", *self._cuts[marker].split(text), ""]  # control token, text, control token, text ... control token
        starts = [*accumulate(map(len, parts))][:-1:2]
        return [*zip(parts[:-1:2], parts[1::2], parts[2::2], strict=True)], starts

    def _learn(self, stretches: Iterable[Stretch]) -> None:
        """Tokenise all that is new, each stretch once."""
        new, texts, control = [], list[str](), self.control
        for stretch in dict.fromkeys(stretches):
            before, text, after = stretch
            if stretch in self._known:
                continue
            if self._adds_prefix and text and before not in control and before != "":
                self._known[stretch] = np.array(self._ids_after(text), np.int32).tobytes()
                continue
            new.append(stretch)
            texts.append(f"{before if before in control else ''}{text}{after if after in control else ''}")
        found = self.backend(texts) if len(texts) >= _FEW else [np.array(self._ids(t), np.int32) for t in texts]
        for (before, text, after), ids in zip(new, found, strict=True):
            if any(ids.item(at) != control[token] for at, token in ((0, before), (-1, after)) if token in control):
                raise TemplateError(f"the tokenizer finds other control tokens than the template wrote: {text[:80]!r}")
            self._known[before, text, after] = (ids[:-1] if after in control else ids).tobytes()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids_after(self, text: str) -> list[int]:
        """Ids of a text that continues another one."""
        for anchor in ("a", "0", "\n", "中"):
            ids, start = self._ids(anchor + text), self._ids(anchor)
            if ids[: len(start)] == start:
                return ids[len(start) :]
        raise TemplateError(f"the tokenizer gives no ids for the continuation {text[:40]!r}")


def _answer(begin: int, text: str, stretches: list[Stretch], starts: list[int], *, written: bool) -> _Answer:
    """The answer that stands in stretches from a character on, to the control token that ends it."""
    first, last = bisect_right(starts, begin) - 1, bisect_left(starts, begin + len(text))
    before, opening, _ = stretches[first]
    prompt = [*stretches[:first], (before, opening[: begin - starts[first]], "")]
    return _Answer(text, prompt, [*stretches[:last], (stretches[last][0], "", "")], written)


def check_messages(messages: list[Message]) -> None:
    """Raise `TemplateError` for what is no conversation with an assistant."""
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TemplateError(f"message {i} must be a dict with a 'role', found {str(message)[:60]!r}")
        if message.get("content") is None and not message.get("tool_calls") and not message.get("reasoning_content"):
            raise TemplateError(f"message {i} (role {message['role']!r}) has no content")
    if "assistant" not in [message["role"] for message in messages]:
        raise TemplateError("the conversation has no assistant turn, so there is nothing to train on")


def _without_nulls(message: Message) -> Message:
    """Arrow gives every row every key of the column; what a message does not have must not reach the template."""
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    if "tool_calls" in message:
        calls = message["tool_calls"]
        message["tool_calls"] = [{key: value for key, value in call.items() if value is not None} for call in calls]
    return message


def parsed(column: Sequence[Any] | None, count: int) -> list[Any]:
    """A column whose values may be JSON, because Arrow cannot hold rows of different shapes, or `count` None."""
    return [json.loads(v) if isinstance(v, str) else v for v in column or [None] * count]


_ENCODERS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, ChatEncoder]] = WeakKeyDictionary()


def tokenize_conversation(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: list[Any] | None = None,
    train_on: Literal["all", "last"] = "all",
    template: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> dict[str, list[int]]:
    """Token ids and labels of one conversation, as one sequence.

    Args:
        messages: `[{"role": ..., "content": ...}, ...]`; roles as the chat template knows them.
        tokenizer: a fast tokenizer.
        tools: JSON schemas of the tools, passed to the template.
        train_on: every assistant turn (`"all"`) or only the `"last"` one.
        template: None for the tokenizer's own, else see `set_chat_template` (which changes `tokenizer`).
        template_kwargs: passed to the template, e.g. `{"enable_thinking": False}`.

    Returns:
        `{"input_ids": [...], "labels": [...]}`, two lists of int of equal length. `labels[i]` is `input_ids[i]` for
        the tokens of trained assistant turns with their end-of-turn token, and `-100` elsewhere. The ids are
        `tokenizer.apply_chat_template(messages)`'s. A turn that inference would see differently is not trained
        here and a warning says which and why; `ChatEncoder` gives it a sequence of its own.

    Raises:
        TemplateError: the template refuses the conversation or loses part of it; no assistant turn.
    """
    if template is not None:
        set_chat_template(tokenizer, template)
    encoders = _ENCODERS.setdefault(tokenizer, {})  # probing a template takes longer than one row
    key = repr((tokenizer.chat_template, len(tokenizer), train_on, template_kwargs))
    if key not in encoders:
        encoders[key] = ChatEncoder(tokenizer, train_on=train_on, history="mask", template_kwargs=template_kwargs)
    ((example,),) = encoders[key].encode([messages], [tools])
    for turn in example.turns:
        if not turn.trained:
            warnings.warn(f"message {turn.message} is not trained: {turn.reason}", stacklevel=2)
    return {"input_ids": example.input_ids, "labels": example.labels}


def end_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a turn: the chat template's end-of-turn token (EOS without a template) and the model's own."""
    end = ChatEncoder(tokenizer).end_token_id if tokenizer.chat_template else tokenizer.eos_token_id
    return list(dict.fromkeys([end, *stop_ids(generation)]))
