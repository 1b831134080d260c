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
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ma_sft.errors import MaSftError, TemplateError
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


@dataclass
class _Sequence:
    """A text to encode, and its turns, whose `start` and `end` count characters.

    `starts` are where the texts of its stretches begin, `heads` how the prompt of each turn ends: in which stretch.
    """

    text: str
    chat: Chat
    turns: list[Turn] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    heads: dict[int, tuple[int, Stretch]] = field(default_factory=dict)


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
        self._known: dict[Stretch, Ids] = {}
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
            plans: list[list[_Sequence]] = []
            for index, messages in enumerate(conversations[start : start + _BATCH], start):
                kwargs = template_kwargs[index] if template_kwargs else None
                try:
                    plans.append(self._plan(messages, tools[index] if tools else None, kwargs))
                except MaSftError as error:
                    error.index = index  # type: ignore[attr-defined]
                    raise
            self._learn_all([sequence for plan in plans for sequence in plan])
            examples += [[e for sequence in plan for e in self._label(sequence)] for plan in plans]
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
        sequence = _Sequence(self._turns.render(chat, len(messages), prompt=True), chat)
        self._learn_all([sequence])
        (example,) = self._label(sequence)
        self._known.clear()
        return example.input_ids

    # -- sequences ----------------------------------------------------------------------------------------------

    def _plan(self, messages: list[Message], tools: list[Any] | None, kwargs: dict[str, Any] | None) -> list[_Sequence]:
        check_messages(messages)
        chat = self._turns.chat(messages, tools, kwargs)
        if len(messages) == 1:
            return [self._plain_text(chat)]
        full, turns = self._turns.turns(chat)
        last = turns[-1]
        # What is rewritten already when the last turn is answered (gpt-oss drops reasoning then) is not what
        # inference saw: the main sequence is then the last prompt with its answer.
        main = full if last.reason or _fit(full, last) else last.prompt + last.target
        sequences = [_Sequence(main, chat)]
        for turn in reversed(turns):
            # A turn shares a sequence wherever that one begins as inference does; else it gets its own.
            fits = ((sequence, span) for sequence in sequences if (span := _fit(sequence.text, turn)))
            sequence, span = next(fits, (sequences[0], None))
            if span:
                sequence.turns.append(span)
            elif turn.reason or self.history == "mask":
                what = "this turn" if full.startswith(turn.prompt) else "the turns before this one"
                reason = turn.reason or f"the template rewrites {what} in history"
                sequence.turns.append(Turn(turn.message, reason=reason))
            else:
                text = turn.prompt + turn.target
                sequences.append(_Sequence(text, chat, [Turn(turn.message, len(turn.prompt), len(text))]))
        if len(sequences) > 1 and not any(turn.trained for turn in sequences[0].turns):
            sequences[-1].turns += sequences.pop(0).turns
        for sequence in sequences:
            sequence.turns.sort(key=lambda turn: turn.message)
        return [sequences[0], *reversed(sequences[1:])]

    def _plain_text(self, chat: Chat) -> _Sequence:
        """An assistant's turn that answers nothing is a text: no template, all of it trained, then the EOS token."""
        bos = (self.tokenizer.bos_token or "") if self.tokenizer("")["input_ids"] else ""
        text = f"{bos}{chat.messages[0]['content']}{self.tokenizer.eos_token}"
        turn = Turn(0, reason=FORBIDDEN) if chat.untrained else Turn(0, len(bos), len(text))
        return _Sequence(text, chat, [turn])

    def _label(self, sequence: _Sequence) -> list[Example]:
        """The sequence with its labels, and those of its turns whose first characters merge into the prompt's."""
        chat, known = sequence.chat, self._known
        parts = [known[stretch] for stretch in sequence.stretches]
        offsets = [*accumulate(map(len, parts), initial=0)]
        ids, turns, apart = np.concatenate(parts), [], []
        for turn in sequence.turns:
            if turn.reason:
                turns.append(turn)
                continue
            n, stretch = sequence.heads[turn.message]
            head = known[stretch]
            start = offsets[n] + len(head)
            end = offsets[bisect_left(sequence.starts, turn.end)] + 1  # a turn ends with a control token
            if parts[n][: len(head)].tobytes() != head.tobytes():
                final = turn.end == len(sequence.text) or turn.message == len(chat.messages) - 1
                if not final or turn is not sequence.turns[-1]:
                    turns.append(Turn(turn.message, reason=_MERGED))
                    apart.append(turn)
                    continue
                # nothing follows, so the text can be cut where inference does
                behind = len(ids) - end
                (_, first, after), *rest = self._cut(sequence.text[turn.start :], chat.marker)[0]
                self._learn(continued := [(None, first, after), *rest])
                ids = np.concatenate([ids[: offsets[n]], head, *(known[stretch] for stretch in continued)])
                end = len(ids) - behind
            turns.append(Turn(turn.message, start, end, unthought=turn.unthought))
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        for turn in turns:
            labels[turn.start : turn.end] = ids[turn.start : turn.end]
        examples = [Example(ids, labels, turns, list(chat.special_text), chat.shape)]
        own = [_Sequence(sequence.text[: t.end], chat, [t]) for t in apart if self.history == "split"]
        self._learn_all(own)
        return examples + [example for each in own for example in self._label(each)]

    # -- ids ----------------------------------------------------------------------------------------------------

    def _cut(self, text: str, marker: str) -> tuple[list[Stretch], list[int]]:
        """The stretches of text between control tokens and markers, and where each begins."""
        if marker not in self._cuts:
            self._cuts[marker] = re.compile(f"({self._turns.control_pattern.pattern}{'|' * bool(marker)}{marker})")
        parts = ["", *self._cuts[marker].split(text), ""]  # control token, text, control token, text ... control token
        return [*zip(parts[:-1:2], parts[1::2], parts[2::2], strict=True)], [*accumulate(map(len, parts))][:-1:2]

    def _learn_all(self, sequences: list[_Sequence]) -> None:
        """Tokenise all that is new of a batch, each stretch once."""
        stretches: list[Stretch] = []
        for sequence in sequences:
            sequence.stretches, sequence.starts = self._cut(sequence.text, sequence.chat.marker)
            stretches += sequence.stretches
            for turn in sequence.turns:
                if not turn.reason:
                    n = bisect_right(sequence.starts, turn.start) - 1
                    before, text, _ = sequence.stretches[n]
                    sequence.heads[turn.message] = n, (before, text[: turn.start - sequence.starts[n]], "")
                    stretches.append(sequence.heads[turn.message][1])
        self._learn(stretches)

    def _learn(self, stretches: list[Stretch]) -> None:
        new, texts, control = [], list[str](), self.control
        for stretch in dict.fromkeys(stretches):
            before, text, after = stretch
            if stretch in self._known:
                continue
            if self._adds_prefix and text and before not in control and before != "":
                self._known[stretch] = np.array(self._ids_after(text), np.int32)
                continue
            new.append(stretch)
            texts.append(f"{before if before in control else ''}{text}{after if after in control else ''}")
        found = self.backend(texts) if len(texts) >= _FEW else [np.array(self._ids(t), np.int32) for t in texts]
        for (before, text, after), ids in zip(new, found, strict=True):
            if any(ids.item(at) != control[token] for at, token in ((0, before), (-1, after)) if token in control):
                raise TemplateError(f"the tokenizer finds other control tokens than the template wrote: {text[:80]!r}")
            self._known[before, text, after] = ids[:-1] if after in control else ids

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids_after(self, text: str) -> list[int]:
        """Ids of a text that continues another one."""
        for anchor in ("a", "0", "\n", "中"):
            ids, start = self._ids(anchor + text), self._ids(anchor)
            if ids[: len(start)] == start:
                return ids[len(start) :]
        raise TemplateError(f"the tokenizer gives no ids for the continuation {text[:40]!r}")


def _fit(text: str, turn: TurnText) -> Turn | None:
    """The characters of `turn` in a sequence that begins with its prompt, as it is written last or as history is."""
    start = len(turn.prompt)
    if turn.reason or not text.startswith(turn.prompt):
        return None
    if text.startswith(turn.target, start):
        return Turn(turn.message, start, start + len(turn.target))
    # An empty reasoning block is scaffolding, not something that the turn says.
    said = _EMPTY_REASONING.sub("", turn.target, count=1)
    return Turn(turn.message, start, start + len(said), unthought=True) if text.startswith(said, start) else None


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
