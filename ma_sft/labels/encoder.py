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
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from typing import Any, Literal, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ma_sft.errors import MaSftError, TemplateError
from ma_sft.hub import stop_ids
from ma_sft.labels.backend import Backend
from ma_sft.labels.render import digest
from ma_sft.labels.templates import control_tokens, set_chat_template
from ma_sft.labels.turns import FORBIDDEN, Chat, Message, Turns, TurnText

Ids = NDArray[np.int32]
# A text between control tokens: the token before it ("" at the beginning, None after other text), it, the one after it
Stretch = tuple[str | None, str, str]

IGNORE_INDEX = -100

_FEW = 200  # stretches that are left to the standard tokenizer
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


@dataclass(slots=True)
class _Text:
    """A text cut at its control tokens and markers; once they are tokenised, its ids as bytes.

    `starts` and `at` are where each stretch begins, in characters without its control token, in bytes with it.
    """

    stretches: list[Stretch]
    starts: list[int]
    ids: bytes = b""
    at: list[int] = field(default_factory=list)

    def last(self, end: int) -> tuple[int, Stretch]:
        """The last stretch of the first `end` characters, and what they have of it."""
        number = bisect_right(self.starts, end) - 1
        before, text, _ = self.stretches[number]
        return number, (before, text[: end - self.starts[number]], "")


# The texts in which a turn's targets follow its prompt
Targets = list[tuple[TurnText, dict[str, _Text]]]


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
        self._control_ids = {token: np.int32(i).tobytes() for token, i in self.control.items()}
        # sentencepiece-like tokenizers put a space before a text; one that continues another must not get it
        self._adds_prefix = tokenizer.convert_ids_to_tokens(self._ids("a"))[0].startswith("▁")
        self._known: dict[Stretch, bytes] = {}
        self._turns = Turns(tokenizer, self.control, train_on, self.template_kwargs, template_now, add_eos)
        self.end_token = self._turns.end_token
        self._split = re.compile(f"({self._turns.control_pattern.pattern})").split

    @property
    def end_token_id(self) -> int:
        """Id of the token that ends an ordinary assistant turn; generation stops there."""
        return self.control[self.end_token]

    def leave_faster_engines(self) -> None:
        """Render by transformers and tokenise by `tokenizers` alone, after another engine was seen to differ."""
        self.backend, self._turns.renderer.fast = Backend(self.tokenizer, fast=False), False

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
        plans: list[tuple[list[Stretch], Callable[[], list[Example]]]] = []
        for index, messages in enumerate(conversations):
            kwargs = template_kwargs[index] if template_kwargs else None
            try:
                plans.append(self._plan(messages, tools[index] if tools else None, kwargs))
            except MaSftError as error:
                error.index = index  # type: ignore[attr-defined]
                raise
        self._learn(chain.from_iterable(stretches for stretches, _ in plans))
        examples = [join() for _, join in plans]
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
        try:
            encoded = self.encode(batch["messages"], *(parsed(batch.get(name), len(rows)) for name in given))
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
        self, messages: list[Message], tools: list[Any] | None = None, template_kwargs: dict[str, Any] | None = None
    ) -> list[int]:
        """Ids of the conversation so far with the generation prompt: what inference feeds to the model."""
        chat = self._turns.chat(messages, tools, template_kwargs)
        text = self._cut(self._turns.render(chat, len(messages), prompt=True), chat.marker)
        self._learn(text.stretches)
        ids = np.frombuffer(self._ids_of(text), np.int32).tolist()
        self._known.clear()
        return cast(list[int], ids)

    # -- sequences ----------------------------------------------------------------------------------------------

    def _plan(
        self, messages: list[Message], tools: list[Any] | None, kwargs: dict[str, Any] | None
    ) -> tuple[list[Stretch], Callable[[], list[Example]]]:
        """What has to be tokenised of a conversation, and what gives its examples then."""
        for i, message in enumerate(messages):
            thought_or_calls = message.get("tool_calls") or message.get("reasoning_content")
            if "role" not in message or (message.get("content") is None and not thought_or_calls):
                raise TemplateError(f"message {i} has no 'role' or no 'content': {str(message)[:60]!r}")
        if "assistant" not in [message["role"] for message in messages]:
            raise TemplateError("the conversation has no assistant turn, so there is nothing to train on")
        chat = self._turns.chat(messages, tools, kwargs)
        if len(messages) > 1:
            text, turns = self._turns.turns(chat)
        else:  # an assistant's turn that answers nothing is a text: no template, all of it trained, then the EOS token
            prompt = (self.tokenizer.bos_token or "") if self.tokenizer("")["input_ids"] else ""
            target = f"{chat.messages[0]['content']}{self.tokenizer.eos_token}"
            text, turns = prompt + target, [TurnText(0, prompt, target)]
            turns = [TurnText(0, reason=FORBIDDEN)] if chat.untrained else turns
        main = self._cut(text, chat.marker)
        targets_of: Targets = []
        stretches = [*main.stretches]
        for turn in turns:
            # An empty reasoning block is scaffolding, not something that the turn says
            targets = dict.fromkeys((turn.target, _EMPTY_REASONING.sub("", turn.target, count=1)) * bool(turn.target))
            begin, follows = len(turn.prompt), text.startswith(turn.prompt)
            if written := [each for each in targets if follows and text.startswith(each, begin)]:
                texts = {written[0]: main}
            else:
                texts = {each: self._cut(turn.prompt + each, chat.marker) for each in targets}
                stretches += chain.from_iterable(each.stretches for each in texts.values())
            stretches += [each.last(begin)[1] for each in texts.values()]
            targets_of.append((turn, texts))
        return stretches, partial(self._join, chat, text, main, targets_of)

    def _join(self, chat: Chat, text: str, main: _Text, turns: Targets) -> list[Example]:
        """The sequences of a conversation: a turn shares one that begins with its ids, else it gets its own."""
        sequences: list[tuple[bytes, list[Turn]]] = [(self._ids_of(main), [])]
        for turn, targets in reversed(turns):
            ids = [self._answer(turn, *each, chat.marker) for each in targets.items()]
            written = main in targets.values()
            if turn is turns[-1][0] and ids:
                # What is rewritten already when the last turn is answered (gpt-oss drops reasoning then) is not what
                # inference saw: the main sequence is then the last prompt with its answer.
                end = main.last(len(turn.prompt + next(iter(targets))))[0] if written else -1
                sequences = [(ids[0][1] + main.ids[main.at[end] + 4 :], [])]
            fits = ((n, s) for s in sequences for n, (_, whole) in enumerate(ids) if s[0].startswith(whole))
            n, (_, own) = next(fits, (None, sequences[0]))
            if n is not None:
                unthought = [*targets][n] != turn.target
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
        examples, shape = [], digest(chat.kinds, bool(chat.special_text), bool(chat.untrained))
        for raw, own in (sequences[0], *reversed(sequences[1:])):
            ids_of_all = np.frombuffer(raw, np.int32)
            labels = np.full(len(ids_of_all), IGNORE_INDEX, dtype=np.int32)
            for each in own:
                labels[each.start : each.end] = ids_of_all[each.start : each.end]
            examples.append(Example(ids_of_all, labels, sorted(own), list(chat.special_text), shape))
        return examples

    # -- ids, as the bytes of int32 arrays ----------------------------------------------------------------------

    def _answer(self, turn: TurnText, target: str, text: _Text, marker: str) -> tuple[int, bytes]:
        """How many ids the prompt has, and they with those of the target, which follows it in a text."""
        ids, known = self._ids_of(text), self._known
        number, part = text.last(len(turn.prompt))
        opening, stretch = known[part], known[text.stretches[number]]
        start = text.at[number] + len(opening)
        if stretch.startswith(opening):
            end, _ = text.last(len(turn.prompt) + len(target))  # the stretch that begins with the target's last token
            return start // 4, ids[: text.at[end] + 4]
        # The answer's first characters merge into the prompt's last token
        (_, first, after), *rest = self._cut(target, marker).stretches
        self._learn(continued := [(None, first, after), *rest])
        return start // 4, ids[: text.at[number]] + opening + b"".join([known[each] for each in continued])

    def _ids_of(self, text: _Text) -> bytes:
        if not text.at:
            known = [self._known[stretch] for stretch in text.stretches]
            text.ids, text.at = b"".join(known), [0, *accumulate(map(len, known))]
        return text.ids

    def _cut(self, text: str, marker: str) -> _Text:
        cut, at = _Text([], []), 0
        for piece in text.split(marker) if marker else [text]:
            parts = self._split(piece)  # text, control token, text ... text
            control = parts[1::2]
            cut.stretches += zip([None if at else "", *control], parts[::2], [*control, ""], strict=True)
            cut.starts += [*accumulate(map(len, parts), initial=at)][:-1:2]
            at += len(piece) + len(marker)
        return cut

    def _learn(self, stretches: Iterable[Stretch]) -> None:
        """Tokenise all that is new, each stretch once."""
        known, control = self._known, self._control_ids
        new = [stretch for stretch in dict.fromkeys(stretches) if stretch not in known]
        if self._adds_prefix:
            continued = [stretch for stretch in new if stretch[0] is None and stretch[1]]
            known.update((each, np.array(self._ids_after(each[1]), np.int32).tobytes()) for each in continued)
            new = [stretch for stretch in new if stretch not in known]
        tokenize = self.backend if len(new) >= _FEW else self.backend.standard
        found = tokenize([f"{before or ''}{text}{after}" for before, text, after in new])
        for stretch, ids in zip(new, found, strict=True):
            before, text, after = stretch
            if (before and ids[:4] != control[before]) or (after and ids[-4:] != control[after]):
                raise TemplateError(f"the tokenizer finds other control tokens than the template wrote: {text[:80]!r}")
            known[stretch] = ids[:-4] if after else ids

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids_after(self, text: str) -> list[int]:
        """Ids of a text that continues another one."""
        for anchor in ("a", "0", "\n", "中"):
            ids, start = self._ids(anchor + text), self._ids(anchor)
            if ids[: len(start)] == start:
                return ids[len(start) :]
        raise TemplateError(f"the tokenizer gives no ids for the continuation {text[:40]!r}")


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
