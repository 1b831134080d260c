"""Conversations -> token ids and labels, the one place where labels are made.

How it works. The chat template renders the conversation to text. *Control tokens* (the special tokens, and the
other added tokens that the template writes itself, such as `<think>`) cut that text into pieces; each piece is
tokenised, each control token is one id, and the ids are joined. Where a control token's text stands inside the
*content*, it is cut in two before rendering, so it is tokenised as the ordinary text it is.

What is trained. For assistant turn k, `prompt = render(messages[:k], add_generation_prompt=True)` is what the
model sees at inference, and `target = render(messages[:k+1]) - prompt` is what it should write, up to and with the
end-of-turn token. The turn is trained in a sequence only if that sequence's ids begin with the prompt's ids and go
on with the target's: training sees exactly what inference will see. A template that rewrites history (Qwen3
drops earlier `<think>` blocks, gpt-oss ends earlier turns with another token) breaks this for some turns; those
get a sequence of their own (`history="split"`) or are masked (`history="mask"`).
"""

import json
import re
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ma_sft.errors import TemplateError
from ma_sft.labels.backend import Backend
from ma_sft.labels.bounds import RunawayTemplateError
from ma_sft.labels.dialect import REFUSALS, Dialect, map_strings, shared_length, strings, switches
from ma_sft.labels.losses import TOOL_WORD, Losses
from ma_sft.labels.render import Renderer
from ma_sft.labels.templates import control_tokens, set_chat_template

Message = dict[str, Any]
Ids = NDArray[np.int32]

IGNORE_INDEX = -100

# Markup that an assistant itself writes in its content; everybody else's is ordinary text.
ASSISTANT_MARKUP = frozenset({"<think>", "</think>", "<tool_call>", "</tool_call>"})

_CHUNK = 250  # conversations
_FEW = 16  # texts for which the faster tokenizer is not built: that takes longer

_EXACT = 4  # turns that are rendered one by one; in longer conversations the others are found by them

_EMPTY_REASONING = re.compile(r"<think>\s*</think>\s*")

_OPEN_THOUGHT = re.compile(r"<think>\s*\Z")

# A reasoning that the generation prompt opens and closes, so that the answer follows.
_SHUT_THOUGHT = re.compile(
    r"(<(?!/|\|END)[^<>]*(?:think|channel)[^<>]*>)(?:thought)?\s*(<[^<>]*(?:think|channel)[^<>]*>)\s*\Z", re.IGNORECASE
)

_FORBIDDEN = "marked not to be trained in the row"

_MERGED = "the turn's first characters merge into the prompt's last token"

_PRIVATE_USE = [chr(code) for code in range(0xE000, 0xF900)]


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

    @property
    def input_ids(self) -> list[int]:
        return cast(list[int], self.ids.tolist())

    @property
    def labels(self) -> list[int]:
        return cast(list[int], self.label_ids.tolist())


@dataclass(frozen=True)
class _Chat:
    """A conversation whose control-token text is cut by `marker`, and how it is rendered."""

    messages: list[Message]
    tools: list[Any] | None
    kwargs: dict[str, Any]
    untrained: frozenset[int]  # messages that the row forbids to train
    dialect: Dialect
    marker: str
    special_text: list[str]


@dataclass(frozen=True)
class _Said:
    """What assistant turn `message` writes after `prompt`, with the token that stops it; or why it is not trained."""

    message: int
    prompt: str = ""
    target: str = ""
    reason: str = ""
    built: bool = False  # of the row's own reasoning, which the template drops


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
        self._renderer = Renderer(tokenizer, template_now)
        self.control = control_tokens(tokenizer)
        self._control_pattern = _any_of(self.control)
        self._is_control = np.zeros(max(len(tokenizer), *tokenizer.added_tokens_decoder, 1) + 1, dtype=bool)
        self._is_control[list(self.control.values())] = True
        self._escape = _escaper(self.control)
        self._escape_assistant = _escaper(t for t in self.control if t not in ASSISTANT_MARKUP)
        # sentencepiece-like tokenizers put a space before a text; one that continues another must not get it
        self._adds_prefix = tokenizer.convert_ids_to_tokens(self._ids("a"))[0].startswith("▁")
        self.encode_suffix = lru_cache(maxsize=4096)(self._encode_marked)
        self._losses = Losses()
        self._advice: dict[Any, str] = {}
        self._dialects: dict[tuple[str, str], Dialect] = {}
        self._tails: set[str] = set()
        self.end_token = self._dialect(None, self.template_kwargs).end.token

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
        chat = self._chat([_without_nulls(m) for m in messages], tools, template_kwargs)
        return list(self._encode_marked(self._render(chat, len(messages), prompt=True), chat.marker))

    # -- text ---------------------------------------------------------------------------------------------------

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
                render, self._control_pattern, self.tokenizer.eos_token, with_tools=bool(tools)
            )
            self._tails |= self._dialects[key].tails
        return self._dialects[key]

    def _chat(self, messages: list[Message], tools: list[Any] | None, kwargs: dict[str, Any] | None) -> _Chat:
        """The conversation with control-token text cut in two by a character that occurs nowhere in it."""
        untrained = frozenset(i for i, m in enumerate(messages) if m.get("train") is False)
        # Arguments are parsed before anything is cut: JSON can spell a control token with escapes.
        messages = [_with_objects({key: m[key] for key in m if key != "train"}) for m in messages]
        row = kwargs or {}
        dialect = self._dialect(tools, {**self.template_kwargs, **row})
        everything = "\0".join(strings([messages, tools, row]))
        found = self._control_pattern.findall(everything)
        if not found:
            return _Chat(messages, tools, {**self.template_kwargs, **row}, untrained, dialect, "", [])
        marker = next(char for char in _PRIVATE_USE if char not in everything)

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
        return _Chat(escaped, tools_cut, {**self.template_kwargs, **row_cut}, untrained, dialect, marker, text)

    def _render(self, chat: _Chat, count: int, *, prompt: bool = False, kwargs: dict[str, Any] | None = None) -> str:
        """The template's text of the first `count` messages."""
        messages = chat.messages[:count]
        tools = chat.tools or chat.dialect.default_tools
        try:
            variables = chat.kwargs if kwargs is None else kwargs
            return self._renderer.render(chat.dialect.messages(messages), tools, variables, prompt=prompt)
        except RunawayTemplateError:
            raise
        except REFUSALS as error:
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise TemplateError(f"the chat template refuses a conversation with roles [{roles}]: {error}") from None

    def _plan(self, messages: list[Message], tools: list[Any] | None, kwargs: dict[str, Any] | None) -> list[_Plan]:
        _check_messages(messages)
        chat = self._chat(messages, tools, kwargs)
        if [m["role"] for m in messages] == ["assistant"]:
            return [self._plain_text(chat)]
        full, turns = self._turns(chat)
        last = turns[-1]
        # What is rewritten already when the last turn is answered (gpt-oss drops reasoning then) is not what
        # inference saw: the main sequence is then the last prompt with its answer.
        main = full if last.reason or _fit(full, last) else last.prompt + last.target
        plans = [_Plan(main, chat.marker, chat.special_text)]
        for turn in reversed(turns):
            # A turn shares a sequence wherever that one begins as inference does; else it gets its own.
            fits = ((plan, fit) for plan in plans if (fit := _fit(plan.text, turn)))
            plan, fit = next(fits, (plans[0], None))
            if fit:
                plan.turns.append(fit)
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

    def _plain_text(self, chat: _Chat) -> _Plan:
        """An assistant's turn that answers nothing is a text: no template, all of it trained, then the EOS token."""
        bos = (self.tokenizer.bos_token or "") if self.tokenizer("")["input_ids"] else ""
        text = f"{bos}{chat.messages[0]['content']}{self.tokenizer.eos_token}"
        turn = Turn(0, reason=_FORBIDDEN) if chat.untrained else Turn(0, len(bos), len(text))
        return _Plan(text, chat.marker, chat.special_text, [turn])

    # -- turns --------------------------------------------------------------------------------------------------

    def _turns(self, chat: _Chat) -> tuple[str, list[_Said]]:
        """The whole conversation's text, and what each turn that is to be trained writes."""
        full = self._render(chat, len(chat.messages))
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

    def _check_turn(self, chat: _Chat, turn: _Said) -> None:
        """Raise `TemplateError` if something that the turn says is not in its target."""
        reasoned = chat.messages[turn.message].get("reasoning_content") or ""
        self._losses.check_turn(
            chat.messages,
            turn.message,
            turn.target,
            partial(self._shape_text, chat),
            _setting(chat),
            reasoned=turn.built or (len(reasoned) > 12 and reasoned.strip() in turn.target),
        )

    def _shape_text(self, chat: _Chat, messages: list[Message]) -> str:
        tools = [_named(tool, TOOL_WORD) for tool in chat.tools] if chat.tools else None
        try:
            return self._render(replace(chat, messages=messages, tools=tools), len(messages))
        except RunawayTemplateError:
            raise
        except TemplateError:
            return ""

    def _exact(self, chat: _Chat, k: int, full: str) -> _Said:
        """What turn `k` writes, by rendering the conversation before it and with it."""
        if k in chat.untrained:
            return _Said(k, reason=_FORBIDDEN)
        if k == 0:
            return _Said(k, reason="no message comes before it, so nobody would ask the model for it")
        said = self._say(chat, k, full if k == len(chat.messages) - 1 else None)
        return said if isinstance(said, _Said) else _Said(k, reason=self._why_unlike(chat, k, said))

    def _say(self, chat: _Chat, k: int, solo: str | None = None) -> _Said | str:
        """What turn `k` writes, or the generation prompt after which the template does not write it.

        `solo` is the text of the conversation up to this turn.
        """
        prompt = self._render(chat, k, prompt=True)
        solo = self._render(chat, k + 1) if solo is None else solo
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
            return _Said(k, reason="the template writes no end-of-turn token after this turn")
        target = rest + end.gap + end.token if stop is None else rest[:stop]
        if chat.dialect.end.token in target[:-1]:
            what = f"the template writes {chat.dialect.end.token} inside this turn, where generation would stop"
            return _Said(k, reason=f"{what}; choose another template")
        return _Said(k, prompt, target, built=built)

    def _stop(self, dialect: Dialect, rest: str) -> int | None:
        """Where the turn's end token ends, behind which nothing stands but space and further end tokens."""
        ends = "|".join(map(re.escape, dict.fromkeys([*dialect.ends, self.tokenizer.eos_token or dialect.ends[0]])))
        found = re.search(rf"({ends})(?:\s|{ends})*\Z", rest)
        return found.end(1) if found else None

    def _continuation(self, chat: _Chat, k: int, prompt: str, solo: str) -> str | None:
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
        written = self._render(chat, k)
        opening = prompt[len(written) :] if prompt.startswith(written) else ""
        at = solo.find(opening, differs_at)
        found = at >= 0 and asked_at <= differs_at and self._control_pattern.search(opening)
        return solo[at + len(opening) :] if found else None

    def _why_unlike(self, chat: _Chat, k: int, prompt: str) -> str:
        """Why the turn does not begin as the generation prompt does, and which variable would change that."""
        opened = "" if _OPEN_THOUGHT.search(prompt) is None else " opens <think> and this turn has no reasoning"
        advice = self._advise(chat, k) or "no variable of the template changes that; " + (
            "give the turn reasoning_content, or choose another template" if opened else "choose another template"
        )
        return f"the template's generation prompt{opened or ' is not how it begins the turn'}: {advice}"

    def _advise(self, chat: _Chat, k: int) -> str:
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

    def _is_trained(self, chat: _Chat, kwargs: dict[str, Any], k: int) -> bool:
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

    def _anchored(self, chat: _Chat, full: str, assistants: list[int]) -> list[_Said] | None:
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
        exact |= {k: _Said(k, reason=_FORBIDDEN) for k in chat.untrained.intersection(assistants)}
        rendered = [exact[k] for k in sorted(probes)]
        reasons = {turn.reason for turn in rendered}
        if not rendered or (len(reasons) == 1 and rendered[0].reason):
            return [exact.get(k) or _Said(k, reason=rendered[0].reason) for k in assistants]
        if rendered[-1].message == len(chat.messages) - 1 and not _fit(full, rendered[-1]):
            full = rendered[-1].prompt + rendered[-1].target  # with the end token that a next message would write
        if any(turn.reason or not _fit(full, turn) for turn in rendered):
            return None
        ends_of_prompts = [turn.prompt[::-1] for turn in rendered]
        common = min(shared_length(ends_of_prompts[0], other) for other in ends_of_prompts)
        header = ends_of_prompts[0][:common][::-1]
        control = self._control_pattern.search(header)
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
                fit = _fit(full, exact[k])
                if fit is None or fit.start != start or (stop is not None and fit.end != stop.end()):
                    return None
                turns.append(exact[k])
            elif stop is None:
                return None
            else:
                turns.append(_Said(k, full[:start], full[start : stop.end()]))
        return turns

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
        """One call of the tokenizer for all texts without markers; marked ones are rare and go one by one."""
        if len(texts) < _FEW:
            return [np.array(self._encode_marked(text, marker), dtype=np.int32) for text, marker in texts]
        return [
            np.array(self._encode_marked(text, marker), dtype=np.int32) if marker and marker in text else ids
            for (text, marker), ids in zip(texts, self.backend([text for text, _ in texts]), strict=True)
        ]

    def _label(self, plan: _Plan, ids: Ids) -> Example:
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        controls = self._is_control[ids].nonzero()[0].tolist()
        cuts = [m.start() for m in self._control_pattern.finditer(plan.text)]
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
                if turn is not plan.turns[-1] or plan.text[turn.end :] not in self._tails:
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
    encoder = _encoder(tokenizer, train_on, template_kwargs)
    ((example,),) = encoder.encode([messages], [tools])
    for turn in example.turns:
        if not turn.trained:
            warnings.warn(f"message {turn.message} is not trained: {turn.reason}", stacklevel=2)
    return {"input_ids": example.input_ids, "labels": example.labels}


_ENCODERS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, ChatEncoder]] = WeakKeyDictionary()


def _encoder(
    tokenizer: PreTrainedTokenizerBase,
    train_on: Literal["all", "last"],
    template_kwargs: dict[str, Any] | None,
) -> ChatEncoder:
    """The encoder of this tokenizer as it is now; kept, because probing a template takes longer than one row."""
    known = _ENCODERS.setdefault(tokenizer, {})
    key = repr((tokenizer.chat_template, len(tokenizer), train_on, template_kwargs))
    if key not in known:
        known[key] = ChatEncoder(tokenizer, train_on=train_on, history="mask", template_kwargs=template_kwargs)
    return known[key]


def _check_messages(messages: list[Message]) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TemplateError(f"message {i} must be a dict with a 'role', found {str(message)[:60]!r}")
        if message.get("content") is None and not message.get("tool_calls") and not message.get("reasoning_content"):
            raise TemplateError(f"message {i} (role {message['role']!r}) has no content")
    if not any(m["role"] == "assistant" for m in messages):
        raise TemplateError("the conversation has no assistant turn, so there is nothing to train on")


def _without_nulls(message: Message) -> Message:
    """Arrow gives every row every key of the column; what a message does not have must not reach the template."""
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    if "tool_calls" in message:
        calls = message["tool_calls"]
        message["tool_calls"] = [{key: value for key, value in call.items() if value is not None} for call in calls]
    return message


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


def parsed(column: Sequence[Any] | None, count: int) -> list[Any]:
    """A column whose values may be JSON, because Arrow cannot hold rows of different shapes, or `count` None."""
    return [json.loads(v) if isinstance(v, str) else v for v in column or [None] * count]


def _fit(text: str, turn: _Said) -> Turn | None:
    """The characters of `turn` in a sequence that begins with its prompt, as it is written last or as history is."""
    start = len(turn.prompt)
    if turn.reason or not text.startswith(turn.prompt):
        return None
    # An empty reasoning block is scaffolding, not something that the turn says.
    for target in dict.fromkeys((turn.target, _EMPTY_REASONING.sub("", turn.target, count=1))):
        if text.startswith(target, start):
            return Turn(turn.message, start, start + len(target), unthought=target != turn.target)
    return None


def _thought_and_answer(message: Message, written: str | None) -> str | None:
    """What a turn writes after a prompt that opened `<think>`, where the template drops the reasoning of history.

    `written` is what the template writes of the turn: the answer, and the end of the turn.
    """
    content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
    if written is None or not isinstance(content, str):
        return None
    thought, closed, answer = content.rpartition("</think>")
    if not (reasoning or closed) or answer.strip() not in written:
        return None
    end = written[written.rindex(answer.strip()) + len(answer.strip()) :] if answer.strip() else written
    if closed:
        return thought.removeprefix("<think>").lstrip() + closed + answer.rstrip() + end
    return f"{reasoning.strip()}\n</think>\n\n{answer.strip()}{end}"


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _escaper(tokens: Iterable[str]) -> Callable[[str, str], str]:
    """A function that puts `marker` after the first character of every occurrence of a token, overlaps included."""
    pattern = re.compile(f"(?=(?:{_any_of(tokens).pattern}))(.)", re.DOTALL)
    return lambda text, marker: pattern.sub(lambda m: m.group(1) + marker, text)


def _setting(chat: _Chat) -> tuple[Any, ...]:
    """What decides, beside the shape of its messages, what the template leaves out of a conversation."""
    return (repr(chat.kwargs), id(chat.dialect), bool(chat.tools))


def _named(tool: Any, name: str) -> Any:
    """The schema of a tool under another name."""
    if not isinstance(tool, dict):
        return tool
    return {**tool, "function": _named(tool["function"], name)} if "function" in tool else {**tool, "name": name}


def _tool_name(tool: Any) -> str:
    return str(tool.get("function", tool).get("name", "")) if isinstance(tool, dict) else getattr(tool, "__name__", "")
