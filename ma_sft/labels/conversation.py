"""One conversation -> token ids and labels, for a script of one's own."""

import warnings
from typing import Any, Literal
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ma_sft.labels.encoder import ChatEncoder
from ma_sft.labels.templates import set_chat_template
from ma_sft.labels.turns import Message


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
