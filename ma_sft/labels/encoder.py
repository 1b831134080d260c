"""Conversations -> token ids and labels, the one place where labels are made.

How it works. The chat template renders the conversation to text. *Control tokens* (the special tokens, and the
other added tokens that the template writes itself, such as `<think>`) cut that text into pieces; each piece is
tokenised, each control token is one id, and the ids are joined. Where a control token's text stands inside the
*content*, it is cut in two before rendering, so it is tokenised as the ordinary text it is.

What is trained. `targets.py` finds for each assistant turn the prompt that the model sees at inference, and the
target: what it should write, up to and with the end-of-turn token. The turn is trained in a sequence only if that
sequence's ids begin with the prompt's ids and go on with the target's: training sees exactly what inference will
see. A template that rewrites history (Qwen3 drops earlier `<think>` blocks, gpt-oss ends earlier turns with another
token) breaks this for some turns; those get a sequence of their own (`history="split"`) or are masked
(`history="mask"`).
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ma_sft.errors import TemplateError
from ma_sft.labels.backend import Backend
from ma_sft.labels.targets import FORBIDDEN, Chat, Message, Targets, Turn, check_messages, fit
from ma_sft.labels.templates import control_tokens, set_chat_template

Ids = NDArray[np.int32]

IGNORE_INDEX = -100

_CHUNK = 250  # conversations
_FEW = 16  # texts for which the faster tokenizer is not built: that takes longer

_MERGED = "the turn's first characters merge into the prompt's last token"


@dataclass
class Example:
    """One training sequence: `input_ids` and `labels` (`-100` where nothing is learned), both of length n_tokens.

    `ids` and `label_ids` are the same as int32 arrays of shape (n_tokens,).
    """

    ids: Ids
    label_ids: Ids
    turns: list[Turn]
    special_text: list[str] = field(default_factory=list)

    @property
    def input_ids(self) -> list[int]:
        return cast(list[int], self.ids.tolist())

    @property
    def labels(self) -> list[int]:
        return cast(list[int], self.label_ids.tolist())


@dataclass
class _Plan:
    """A text to encode, and its turns, whose `start` and `end` count characters."""

    text: str
    marker: str
    special_text: list[str]
    turns: list[Turn] = field(default_factory=list)


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
    ) -> None:
        if train_on not in ("all", "last"):
            raise TemplateError(f"train_on must be 'all' or 'last', not {train_on!r}")
        if history not in ("split", "mask"):
            raise TemplateError(f"history must be 'split' or 'mask', not {history!r}")
        if not tokenizer.is_fast:
            raise TemplateError(
                f"{type(tokenizer).__name__} is a slow tokenizer; a fast one (tokenizer.json) is needed"
            )
        set_chat_template(tokenizer, None)
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.history = history
        self.template_kwargs = template_kwargs or {}
        self.template_now = template_now
        self.backend = Backend(tokenizer)
        self.control = control_tokens(tokenizer)
        self._is_control = np.zeros(max(len(tokenizer), *tokenizer.added_tokens_decoder, 1) + 1, dtype=bool)
        self._is_control[list(self.control.values())] = True
        # sentencepiece-like tokenizers put a space before a text; one that continues another must not get it
        self._adds_prefix = tokenizer.convert_ids_to_tokens(self._ids("a"))[0].startswith("▁")
        self.encode_suffix = lru_cache(maxsize=4096)(self._encode_marked)
        self._targets = Targets(tokenizer, self.control, train_on, self.template_kwargs, template_now)
        self.end_token = self._targets.end_token

    @property
    def end_token_id(self) -> int:
        """Id of the token that ends an ordinary assistant turn; generation stops there."""
        return self.control[self.end_token]

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
        examples: list[list[Example]] = [[] for _ in conversations]
        # The tokenizer lets go of the interpreter, so one chunk is tokenised while the next is rendered.
        with ThreadPoolExecutor(1) as pool:
            chunks = []
            for start in range(0, len(conversations), _CHUNK):
                plans: list[_Plan] = []
                owner: list[int] = []
                for index in range(start, min(start + _CHUNK, len(conversations))):
                    kwargs = template_kwargs[index] if template_kwargs else None
                    try:
                        new = self._plan(conversations[index], tools[index] if tools else None, kwargs)
                    except TemplateError as error:
                        error.index = index  # type: ignore[attr-defined]
                        raise
                    plans += new
                    owner += [index] * len(new)
                texts = [(plan.text, plan.marker) for plan in plans]
                chunks.append((plans, owner, pool.submit(self._encode_batch, texts)))
            for plans, owner, tokenised in chunks:
                for plan, index, ids in zip(plans, owner, tokenised.result(), strict=True):
                    example = self._label(plan, ids)
                    examples[index].append(example)
                    if self.history == "split":
                        examples[index] += self._apart(plan, example)
        return examples

    def tokenize_batch(self, batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        """For `datasets.map(batched=True, with_indices=True)`: conversations become examples.

        Args:
            batch: columns `messages` and, if there, `tools` and `chat_template_kwargs` (lists and objects, or their
                JSON) and `origin`.
            rows: indices of the conversations.

        Returns columns `input_ids`, `labels`, `row` (index of the conversation), `turns` (trained turns in the
        sequence), `untrained` (why turns are trained in no sequence of the row), `unthought` (turns trained as
        history, without the empty reasoning block that the template writes before the last one) and `special_text`
        (control-token texts that stood in the content).

        Raises:
            TemplateError: naming the row, by its `origin` if there is that column.
        """
        given = ("tools", "chat_template_kwargs")
        conversations = [[_without_nulls(m) for m in messages] for messages in batch["messages"]]
        try:
            encoded = self.encode(conversations, *(parsed(batch.get(name), len(rows)) for name in given))
        except TemplateError as error:
            at: int = error.index  # type: ignore[attr-defined]
            raise TemplateError(f"{batch['origin'][at] if 'origin' in batch else f'row {rows[at]}'}: {error}") from None
        names = ("input_ids", "labels", "row", "turns", "untrained", "unthought", "special_text")
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for row, examples in zip(rows, encoded, strict=True):
            trained = {turn.message for example in examples for turn in example.turns if turn.trained}
            reasons = {t.message: t.reason for e in examples for t in e.turns if t.message not in trained}
            for position, example in enumerate(examples):
                columns["input_ids"].append(example.ids)
                columns["labels"].append(example.label_ids)
                columns["row"].append(row)
                columns["turns"].append(sum(turn.trained for turn in example.turns))
                columns["untrained"].append([*reasons.values()] if position == 0 else [])
                columns["unthought"].append(sum(turn.trained and turn.unthought for turn in example.turns))
                columns["special_text"].append(example.special_text if position == 0 else [])
        return columns

    def encode_prompt(
        self,
        messages: list[Message],
        tools: list[Any] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Ids of the conversation so far with the generation prompt: what inference feeds to the model."""
        chat = self._targets.chat([_without_nulls(m) for m in messages], tools, template_kwargs)
        return list(self._encode_marked(self._targets.render(chat, len(messages), prompt=True), chat.marker))

    def _plan(self, messages: list[Message], tools: list[Any] | None, kwargs: dict[str, Any] | None) -> list[_Plan]:
        check_messages(messages)
        chat = self._targets.chat(messages, tools, kwargs)
        if [m["role"] for m in messages] == ["assistant"]:
            return [self._plain_text(chat)]
        full, turns = self._targets.turns(chat)
        last = turns[-1]
        # What is rewritten already when the last turn is answered (gpt-oss drops reasoning then) is not what
        # inference saw: the main sequence is then the last prompt with its answer.
        main = full if last.reason or fit(full, last) else last.prompt + last.target
        plans = [_Plan(main, chat.marker, chat.special_text)]
        for turn in reversed(turns):
            # A turn shares a sequence wherever that one begins as inference does; else it gets its own.
            fits = ((plan, span) for plan in plans if (span := fit(plan.text, turn)))
            plan, span = next(fits, (plans[0], None))
            if span:
                plan.turns.append(span)
            elif turn.reason or self.history == "mask":
                what = "this turn" if full.startswith(turn.prompt) else "the turns before this one"
                reason = turn.reason or f"the template rewrites {what} in history"
                plan.turns.append(Turn(turn.message, reason=reason))
            else:
                text = turn.prompt + turn.target
                own = Turn(turn.message, len(turn.prompt), len(text))
                plans.append(_Plan(text, chat.marker, chat.special_text, [own]))
        if len(plans) > 1 and not any(turn.trained for turn in plans[0].turns):
            plans[-1].turns += plans.pop(0).turns
        for plan in plans:
            plan.turns.sort(key=lambda turn: turn.message)
        return [plans[0], *reversed(plans[1:])]

    def _plain_text(self, chat: Chat) -> _Plan:
        """An assistant's turn that answers nothing is a text: no template, all of it trained, then the EOS token."""
        bos = (self.tokenizer.bos_token or "") if self.tokenizer("")["input_ids"] else ""
        text = f"{bos}{chat.messages[0]['content']}{self.tokenizer.eos_token}"
        turn = Turn(0, reason=FORBIDDEN) if chat.untrained else Turn(0, len(bos), len(text))
        return _Plan(text, chat.marker, chat.special_text, [turn])

    # -- ids ----------------------------------------------------------------------------------------------------

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids_after(self, text: str) -> list[int]:
        """Ids of a text that continues another one."""
        if not self._adds_prefix or not text:
            return self._ids(text)
        for anchor in ("a", "0", "\n", "中"):
            ids, start = self._ids(anchor + text), self._ids(anchor)
            if ids[: len(start)] == start:
                return ids[len(start) :]
        raise TemplateError(f"the tokenizer gives no ids for the continuation {text[:40]!r}")

    def _encode_marked(self, text: str, marker: str = "") -> tuple[int, ...]:
        """Ids of a rendered text; pieces at the markers are tokenised apart, so no control token forms across one."""
        first, *rest = text.split(marker) if marker else [text]
        ids = self._ids(first)
        for piece in rest:
            ids += self._ids_after(piece)
        return tuple(ids)

    def _encode_batch(self, texts: list[tuple[str, str]]) -> list[Ids]:
        """Ids of rendered texts and their markers, by one call of the tokenizer."""
        if len(texts) < _FEW:
            return [np.array(self._encode_marked(text, marker), np.int32) for text, marker in texts]
        pieces = [text.split(marker) if marker else [text] for text, marker in texts]
        together = [each[:1] if self._adds_prefix else each for each in pieces]  # see `_ids_after`
        ids = iter(self.backend([piece for each in together for piece in each]))
        return [
            np.concatenate(
                [
                    *islice(ids, len(known)),
                    *(np.array(self._ids_after(piece), np.int32) for piece in each[len(known) :]),
                ]
            )
            for each, known in zip(pieces, together, strict=True)
        ]

    def _label(self, plan: _Plan, ids: Ids) -> Example:
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        controls = self._is_control[ids].nonzero()[0].tolist()
        cuts = [m.start() for m in self._targets.control_pattern.finditer(plan.text)]
        if len(controls) != len(cuts):
            raise TemplateError(
                f"the tokenizer finds {len(controls)} control tokens where the template wrote {len(cuts)}; "
                f"text: {plan.text[:80]!r}"
            )
        turns = []
        for turn in plan.turns:
            if turn.reason:
                turns.append(turn)
                continue
            n = bisect_left(cuts, turn.start)
            suffix = self.encode_suffix(plan.text[cuts[n - 1] if n else 0 : turn.start], plan.marker)
            start = (controls[n - 1] if n else 0) + len(suffix)
            end = controls[bisect_left(cuts, turn.end) - 1] + 1
            if tuple(ids[start - len(suffix) : start].tolist()) != suffix:
                # The turn's first characters merge with the prompt's last ones. Nothing follows the last turn but
                # the template's own tail, so there the text can be cut where inference cuts it.
                if turn is not plan.turns[-1] or plan.text[turn.end :] not in self._targets.tails:
                    turns.append(Turn(turn.message, reason=_MERGED))
                    continue
                pieces = plan.text[turn.start :].split(plan.marker) if plan.marker else [plan.text[turn.start :]]
                said = [i for p in pieces for i in self._ids_after(p)]
                ids = np.array([*ids[: start - len(suffix)].tolist(), *suffix, *said], dtype=np.int32)
                labels = np.concatenate([labels[:start], np.full(len(ids) - start, IGNORE_INDEX, dtype=np.int32)])
                end = self._is_control[ids].nonzero()[0].tolist()[bisect_left(cuts, turn.end) - 1] + 1
            labels[start:end] = ids[start:end]
            turns.append(replace(turn, start=start, end=end))
        return Example(ids, labels, turns, plan.special_text)

    def _apart(self, plan: _Plan, example: Example) -> list[Example]:
        """Turns whose first characters merge into the prompt's last token, in sequences that end with them."""
        merged = {turn.message for turn in example.turns if turn.reason == _MERGED}
        alone = [
            _Plan(plan.text[: turn.end], plan.marker, plan.special_text, [turn])
            for turn in plan.turns
            if turn.message in merged
        ]
        ids = self._encode_batch([(p.text, p.marker) for p in alone])
        return [self._label(p, i) for p, i in zip(alone, ids, strict=True)]


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
