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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import numpy as np
from jinja2 import TemplateError as JinjaError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ma_sft.errors import TemplateError
from ma_sft.labels.backend import Backend
from ma_sft.labels.bounds import RunawayTemplateError
from ma_sft.labels.render import Renderer
from ma_sft.labels.templates import control_tokens, set_chat_template

Message = dict[str, Any]


Ids = NDArray[np.int32]


IGNORE_INDEX = -100


# Markup that an assistant itself writes in its content; everybody else's is ordinary text.
ASSISTANT_MARKUP = frozenset({"<think>", "</think>", "<tool_call>", "</tool_call>"})


_CHUNK = 250  # conversations


_EMPTY_REASONING = re.compile(r"<think>\s*</think>\s*")


_PRIVATE_USE = [chr(code) for code in range(0xE000, 0xF900)]


@dataclass(frozen=True)
class Turn:
    """One assistant turn of a sequence: tokens `start:end` are trained, the end-of-turn token included.

    A turn that is not trained in this sequence has an empty span and says why in `reason`.
    """

    message: int
    start: int = 0
    end: int = 0
    reason: str = ""

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


@dataclass
class _Plan:
    """What one conversation needs: the text to encode, and for each turn where to look in it."""

    text: str
    # message index, prompt's text, target's text up to the end-of-turn token, reason against training
    turns: list[tuple[int, str, str, str]]
    marker: str
    special_text: list[str]


class ChatEncoder:
    """Turns conversations into examples for one tokenizer and its chat template.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        train_on: `"all"` assistant turns, or only the `"last"` one.
        history: what happens to a turn that the template writes differently once it is history: `"split"` trains
            it in a sequence of its own, `"mask"` does not train it.
        template_kwargs: passed to the template, e.g. `{"enable_thinking": False}`.

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
        self.backend = Backend(tokenizer)
        self._renderer = Renderer(tokenizer, self.template_kwargs)
        self.control = control_tokens(tokenizer)
        alternatives = sorted(map(re.escape, self.control), key=len, reverse=True)
        self._control_pattern = re.compile("|".join(alternatives) or r"(?!)")
        self._is_control = np.zeros(max(len(tokenizer), *tokenizer.added_tokens_decoder, 1) + 1, dtype=bool)
        self._is_control[list(self.control.values())] = True
        self._escape = _escaper([*self.control])
        self._escape_assistant = _escaper([t for t in self.control if t not in ASSISTANT_MARKUP])
        # sentencepiece-like tokenizers put a space before a text; one that continues another must not get it
        self._adds_prefix = tokenizer.convert_ids_to_tokens(self._ids("a"))[0].startswith("▁")
        self.encode_suffix = lru_cache(maxsize=4096)(self._encode_marked)
        self.end_token, self._tail = self._find_end_of_turn()

    @property
    def end_token_id(self) -> int:
        """Id of the token that ends an ordinary assistant turn; generation stops there."""
        return self.control[self.end_token]

    def encode(
        self, conversations: Sequence[list[Message]], tools: Sequence[list[Any] | None] | None = None
    ) -> list[list[Example]]:
        """Examples of each conversation: one, or more where history is split.

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
                    try:
                        new = self._plan(conversations[index], tools[index] if tools else None)
                    except TemplateError as error:
                        error.index = index  # type: ignore[attr-defined]
                        raise
                    plans += new
                    owner += [index] * len(new)
                texts = [(plan.text, plan.marker) for plan in plans]
                chunks.append((plans, owner, pool.submit(self._encode_batch, texts)))
            for plans, owner, tokenised in chunks:
                for plan, index, ids in zip(plans, owner, tokenised.result(), strict=True):
                    examples[index].append(self._label(plan, ids))
        if self.history == "split":
            for index, found in enumerate(examples):
                examples[index] = self._split_merged(conversations[index], tools[index] if tools else None, found)
        return examples

    def tokenize_batch(self, batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        """For `datasets.map(batched=True, with_indices=True)`: columns `messages` (and `tools`) become examples.

        Returns columns `input_ids`, `labels`, `row` (index of the conversation), `turns` (trained turns in the
        sequence), `untrained` (why turns are trained in no sequence of the row) and `special_text` (control-token
        texts that stood in the content).

        Raises:
            TemplateError: naming the row, by its `origin` if there is that column.
        """
        tools = [json.loads(t) if isinstance(t, str) else t for t in batch["tools"]] if "tools" in batch else None
        conversations = [[_without_nulls(m) for m in messages] for messages in batch["messages"]]
        try:
            encoded = self.encode(conversations, tools)
        except TemplateError as error:
            at: int = error.index  # type: ignore[attr-defined]
            raise TemplateError(f"{batch['origin'][at] if 'origin' in batch else f'row {rows[at]}'}: {error}") from None
        columns: dict[str, list[Any]] = {
            name: [] for name in ("input_ids", "labels", "row", "turns", "untrained", "special_text")
        }
        for row, examples in zip(rows, encoded, strict=True):
            trained = {turn.message for example in examples for turn in example.turns if turn.trained}
            for position, example in enumerate(examples):
                columns["input_ids"].append(example.ids)
                columns["labels"].append(example.label_ids)
                columns["row"].append(row)
                columns["turns"].append(sum(turn.trained for turn in example.turns))
                columns["untrained"].append(
                    [t.reason for t in example.turns if t.message not in trained] if position == 0 else []
                )
                columns["special_text"].append(example.special_text if position == 0 else [])
        return columns

    def encode_prompt(self, messages: list[Message], tools: list[Any] | None = None) -> list[int]:
        """Ids of the conversation so far with the generation prompt: what inference feeds to the model."""
        escaped, escaped_tools, marker, _ = self._escape_all([_without_nulls(m) for m in messages], tools)
        return list(self._encode_marked(self._render(escaped, escaped_tools, prompt=True), marker))

    # -- text ---------------------------------------------------------------------------------------------------

    def _render(self, messages: list[Message], tools: list[Any] | None, *, prompt: bool) -> str:
        """The template's text. Templates differ in how they want a tool call; the second form is tried if needed."""
        forms = [messages]
        if any(m.get("tool_calls") for m in messages):
            forms += [_tool_call_form(messages, as_text=False), _tool_call_form(messages, as_text=True)]
        errors = []
        for form in forms:
            try:
                return self._renderer.render(form, tools, prompt=prompt)
            except RunawayTemplateError:
                raise
            except (JinjaError, TypeError, KeyError, AttributeError, ValueError, IndexError) as error:
                errors.append(error)
        roles = ", ".join(str(m.get("role")) for m in messages)
        raise TemplateError(f"the chat template refuses a conversation with roles [{roles}]: {errors[0]}")

    def _escape_all(
        self, messages: list[Message], tools: list[Any] | None
    ) -> tuple[list[Message], list[Any] | None, str, list[str]]:
        """Cut control-token text in content in two with a character that occurs nowhere in the conversation."""
        everything = "\0".join(_strings([messages, tools]))
        found = self._control_pattern.findall(everything)
        if not found:
            return messages, tools, "", []
        marker = next(char for char in _PRIVATE_USE if char not in everything)
        escaped = [
            {
                key: _map_strings(
                    value,
                    self._escape_assistant if m.get("role") == "assistant" and key == "content" else self._escape,
                    marker,
                )
                for key, value in m.items()
            }
            for m in messages
        ]
        escaped_tools: list[Any] | None = _map_strings(tools, self._escape, marker)
        text = [t for t in dict.fromkeys(found) if escaped != messages or escaped_tools != tools]
        return escaped, escaped_tools, marker, text

    def _find_end_of_turn(self) -> tuple[str, str]:
        """The control token that the template puts after an assistant's content, and the text after that."""
        probe = "end-of-turn probe"
        text = self._render(
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": probe}], None, prompt=False
        )
        rest = text[text.rindex(probe) + len(probe) :]
        match = self._control_pattern.search(rest)
        if match is None:
            raise TemplateError(
                "the chat template writes no end-of-turn token after an assistant turn, so a model trained with it "
                "would never learn to stop; add the EOS token to the template"
            )
        return match.group(), rest[match.end() :]

    def _plan(self, messages: list[Message], tools: list[Any] | None) -> list[_Plan]:
        _check_messages(messages)
        messages, tools, marker, special_text = self._escape_all(messages, tools)
        if [m["role"] for m in messages] == ["assistant"]:
            return [self._plain_text(messages[0]["content"], marker, special_text)]
        assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        full = self._render(messages, tools, prompt=False)
        self._check_nothing_lost(messages, tools, full)
        whole = _Plan(full, [], marker, special_text)
        plans = [whole]
        for k in assistants if self.train_on == "all" else assistants[-1:]:
            solo = full if k == len(messages) - 1 else self._render(messages[: k + 1], tools, prompt=False)
            prompt = self._render(messages[:k], tools, prompt=True)
            target, reason = self._target(prompt, solo)
            if reason:
                whole.turns.append((k, prompt, target, reason))
                continue
            after = full[len(prompt) :] if full.startswith(prompt) else None
            # An empty reasoning block is scaffolding, not something that the turn says.
            bare = _EMPTY_REASONING.sub("", target, count=1)
            if after is not None and after.startswith(target):
                whole.turns.append((k, prompt, target, ""))
            elif after is not None and after.startswith(bare):
                whole.turns.append((k, prompt, bare, ""))
            else:
                what = "this turn" if after is not None else "the turns before this one"
                whole.turns.append((k, prompt, target, f"the template rewrites {what} in history"))
                if self.history == "split":
                    plans.append(_Plan(solo, [(k, prompt, target, "")], marker, special_text))
        return plans

    def _plain_text(self, text: str, marker: str, special_text: list[str]) -> _Plan:
        """An assistant's turn that answers nothing is a text: no template, all of it trained, then the EOS token."""
        bos = self.tokenizer.bos_token if self.tokenizer("")["input_ids"] else ""
        target = f"{text}{self.tokenizer.eos_token}"
        return _Plan(f"{bos}{target}", [(0, bos or "", target, "")], marker, special_text)

    def _target(self, prompt: str, solo: str) -> tuple[str, str]:
        """What the model should write after `prompt`, up to the end-of-turn token; or why it cannot be trained."""
        if not solo.startswith(prompt):
            return "", "the template's generation prompt is not how it begins the turn"
        target = solo[len(prompt) :].removesuffix(self._tail)
        ends = [m.end() for m in self._control_pattern.finditer(target)]
        if not ends or ends[-1] != len(target):
            return "", "the template writes no end-of-turn token after this turn"
        return target, ""

    def _check_nothing_lost(self, messages: list[Message], tools: list[Any] | None, text: str) -> None:
        for i, m in enumerate(messages):
            content = m.get("content")
            if m["role"] not in ("assistant", "tool") and isinstance(content, str) and content.strip() not in text:
                raise TemplateError(
                    f"the chat template leaves out message {i} (role {m['role']!r}); "
                    "use a role that it knows, or another template"
                )
            for call in m.get("tool_calls") or []:
                name = call.get("function", call).get("name", "")
                if name not in text:
                    raise TemplateError(
                        f"the chat template leaves out the tool call {name!r} of message {i}; use a template with tools"
                    )
        reasoning = messages[-1].get("reasoning_content")
        if isinstance(reasoning, str) and reasoning.strip() not in text:
            raise TemplateError(
                "the chat template leaves out the last message's reasoning_content; use a template that knows it, "
                "or data without it"
            )
        if tools and not all(_tool_name(tool) in text for tool in tools):
            raise TemplateError("the chat template leaves out the tools; use a template that knows tools")

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
        for position, (k, prompt, target, reason) in enumerate(plan.turns):
            if reason:
                turns.append(Turn(k, reason=reason))
                continue
            start, suffix = self._prompt_end(prompt, plan, controls, cuts)
            end_at = len(prompt) + len(target)
            end = controls[bisect_left(cuts, end_at) - 1] + 1
            if tuple(ids[start - len(suffix) : start].tolist()) != suffix:
                # The turn's first characters merge with the prompt's last ones. Nothing follows the last turn but
                # the template's own tail, so there the text can be cut where inference cuts it.
                last = position == len(plan.turns) - 1 and not plan.text[end_at:].removeprefix(self._tail)
                if not last:
                    turns.append(Turn(k, reason="the turn's first characters merge into the prompt's last token"))
                    continue
                rest = plan.text[len(prompt) :]
                pieces = rest.split(plan.marker) if plan.marker else [rest]
                said = [i for p in pieces for i in self._ids_after(p)]
                ids = np.array([*ids[: start - len(suffix)].tolist(), *suffix, *said], dtype=np.int32)
                labels = np.concatenate([labels[:start], np.full(len(ids) - start, IGNORE_INDEX, dtype=np.int32)])
                ends = np.flatnonzero(self._is_control[ids]).tolist()
                end = ends[bisect_left(cuts, end_at) - 1] + 1
            labels[start:end] = ids[start:end]
            turns.append(Turn(k, start, end))
        return Example(ids, labels, turns, plan.special_text)

    def _prompt_end(
        self, prompt: str, plan: _Plan, controls: list[int], cuts: list[int]
    ) -> tuple[int, tuple[int, ...]]:
        """Token position at which `prompt` ends, and the ids of its last piece, which must stand just before it."""
        n = bisect_left(cuts, len(prompt))
        if n == 0:
            suffix = self.encode_suffix(prompt, plan.marker)
            return len(suffix), suffix
        suffix = self.encode_suffix(prompt[cuts[n - 1] :], plan.marker)
        return controls[n - 1] + len(suffix), suffix

    def _split_merged(self, messages: list[Message], tools: list[Any] | None, examples: list[Example]) -> list[Example]:
        """Turns that could not be trained only because of a merge get a sequence that ends with them."""
        whole = examples[0]
        merged = [t.message for t in whole.turns if "merge" in t.reason]
        for k in merged:
            again = self._plan(messages[: k + 1], tools)[0]
            again.turns = [turn for turn in again.turns if turn[0] == k]
            (ids,) = self._encode_batch([(again.text, again.marker)])
            examples.append(self._label(again, ids))
        return examples


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


def _escaper(tokens: list[str]) -> Callable[[str, str], str]:
    """A function that puts `marker` after the first character of every occurrence of a token, overlaps included."""
    if not tokens:
        return lambda text, marker: text
    alternatives = "|".join(sorted(map(re.escape, tokens), key=len, reverse=True))
    pattern = re.compile(f"(?=(?:{alternatives}))(.)", re.DOTALL)
    return lambda text, marker: pattern.sub(lambda m: m.group(1) + marker, text)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [s for item in value.items() for part in item for s in _strings(part)]
    if isinstance(value, list | tuple):
        return [s for item in value for s in _strings(item)]
    return []


def _map_strings(value: Any, function: Callable[[str, str], str], marker: str) -> Any:
    if isinstance(value, str):
        return function(value, marker)
    if isinstance(value, dict):
        return {key: _map_strings(item, function, marker) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, function, marker) for item in value]
    return value


def _tool_call_form(messages: list[Message], *, as_text: bool) -> list[Message]:
    """The messages with tool-call arguments as JSON text or as objects, and empty content as "" or None."""

    def convert(call: dict[str, Any]) -> dict[str, Any]:
        function = dict(call.get("function", call))
        arguments = function.get("arguments")
        if as_text and not isinstance(arguments, str):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        elif not as_text and isinstance(arguments, str):
            function["arguments"] = json.loads(arguments)
        return {**call, "type": call.get("type", "function"), "function": function} if "function" in call else function

    return [
        {
            **m,
            "content": m.get("content") or (None if as_text else ""),
            "tool_calls": [convert(c) for c in m["tool_calls"]],
        }
        if m.get("tool_calls")
        else m
        for m in messages
    ]


def _tool_name(tool: Any) -> str:
    return str(tool.get("function", tool).get("name", "")) if isinstance(tool, dict) else getattr(tool, "__name__", "")
