"""What decides the ids and labels of a row, in one digest that every cache, resume and hand-off goes by."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ma_sft.errors import MaSftError
from ma_sft.version import __version__

if TYPE_CHECKING:
    from ma_sft.labels.encoder import ChatEncoder

# Two turns with what tokenizers and templates differ in: spaces, digits, Chinese, a special token's text.
PROBE = [
    {"role": "user", "content": "Hi 你好,  what is 12*34? <|im_end|>"},
    {"role": "assistant", "content": "It is 408.\n"},
    {"role": "user", "content": "Danke!"},
]


def digest(*parts: Any) -> str:
    """32 hexadecimal digits of the parts, as JSON or as text."""
    return _hash(json.dumps(parts, sort_keys=True, default=str))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase, encoder: "ChatEncoder | None" = None) -> dict[str, Any]:
    """What makes two tokenizers with their templates the same, in a few lines of JSON.

    The ids of a test conversation are among it: whatever a template reads from outside (a date, another release's
    globals) shows in them. `encoder` is None for a tokenizer without a chat template.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {key: value for key, value in backend.items() if key not in ("truncation", "padding")}  # set by each call
    return {
        "tokenizer": {"digest": _hash(json.dumps(state, sort_keys=True)), "tokens": len(tokenizer)},
        "chat_template": _hash(str(tokenizer.chat_template)) if tokenizer.chat_template else None,
        "special_ids": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")},
        "probe": _probe(encoder),
    }


def label_fingerprint(rows: str, tokenizer: PreTrainedTokenizerBase, encoder: "ChatEncoder | None", *how: Any) -> str:
    """The digest of labelled rows.

    Args:
        rows: fingerprint of what is labelled; of raw rows or of conversations.
        encoder: None where no template makes the ids.
        how: the settings that labels depend on, and the code of the user's functions.
    """
    tokenizer("")  # without the truncation and padding of an earlier call
    backend = _hash(tokenizer.backend_tokenizer.to_str())
    template = tokenizer.special_tokens_map, tokenizer.chat_template, _probe(encoder)
    return digest(__version__, rows, backend, *template, *how)


def _probe(encoder: "ChatEncoder | None") -> list[int] | str | None:
    try:
        return encoder.encode_prompt(PROBE) if encoder else None
    except MaSftError as error:  # a template of another kind of conversation
        return str(error)
