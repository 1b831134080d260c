"""Messages -> token ids, and for each id a mark: is it a label?

A conversation is a text with a structure, and a model sees one sequence of ids. Two things must come out right:

1. *Only what the assistant writes is learned*: its content **and the token that ends its turn**. A model that never
   learned the end token never stops.
2. *Training sees what inference sees.* At inference the prompt is tokenised first, and the answer comes after it, id
   by id. So the prompt and the answer are tokenised apart and the ids joined ("tokenise, then join"). Tokenising
   the joined text could merge the prompt's last character with the answer's first: `:` + `yes` -> `:yes`.

`role-tags` writes `\\n#ROLE:` + content, and the EOS token after each assistant turn:

    \\n#USER:What is 2+2?\\n#ASSISTANT:4</s>\\n#USER:And 3+3?\\n#ASSISTANT:6</s>
                                      ^^^^^                             ^^^^^     labels

`chatml` puts each message between special tokens; the line break after the end token is structure, not a label:

    <|im_start|>user\\nWhat is 2+2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>\\n
                                                                    ^^^^^^^^^^^     labels
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ma_sft.reference import InputError

Message = dict[str, str]


class Encoded(NamedTuple):
    """Two lists of length n_tokens; `is_label[k]` says whether the model learns to write `input_ids[k]`."""

    input_ids: list[int]
    is_label: list[bool]


class Piece(NamedTuple):
    """A text, or the id of a special token; structure comes as ids, so no text can ever become structure."""

    value: str | int
    is_label: bool


def encode(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str = "role-tags") -> Encoded:
    """Ids and marks of a conversation; `template` is `"role-tags"` or `"chatml"`.

    Raises:
        InputError: an unknown template or role, a tokenizer without the template's tokens, no assistant turn.
    """
    if not any(m["role"] == "assistant" for m in messages):
        raise InputError("the conversation has no assistant turn, so there is nothing to learn")
    return join(pieces(messages, tokenizer, template), tokenizer)


def encode_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Ids of the conversation so far and the opening of the assistant's turn: what generation starts from."""
    opened = pieces([*messages, {"role": "assistant", "content": ""}], tokenizer, template)
    first_label = max(i for i, piece in enumerate(opened) if piece.is_label and piece.value == "")
    return join(opened[:first_label], tokenizer).input_ids


def pieces(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str) -> list[Piece]:
    """The conversation as texts and special ids, each with its mark."""
    for m in messages:
        if m["role"] not in ("system", "user", "assistant"):
            raise InputError(f"role {m['role']!r}: the reference knows system, user and assistant")
    if template == "role-tags":
        return _role_tags(messages, tokenizer)
    if template == "chatml":
        return _chatml(messages, tokenizer)
    raise InputError(f"unknown template {template!r}; the reference knows 'role-tags' and 'chatml'")


def _role_tags(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    end = special_id(tokenizer, tokenizer.eos_token)
    found = [Piece(i, False) for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
    for m in messages:
        learned = m["role"] == "assistant"
        found += [Piece(f"\n#{m['role'].upper()}:", False), Piece(m["content"], learned)]
        if learned:
            found.append(Piece(end, True))
    return found


def _chatml(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    start, end = special_id(tokenizer, "<|im_start|>"), special_id(tokenizer, "<|im_end|>")
    found: list[Piece] = []
    for m in messages:
        learned = m["role"] == "assistant"
        found += [Piece(start, False), Piece(f"{m['role']}\n", False)]
        found += [Piece(m["content"], learned), Piece(end, learned), Piece("\n", False)]
    return found


def special_id(tokenizer: PreTrainedTokenizerBase, token: str | None) -> int:
    """Id of a special token.

    Raises:
        InputError: the tokenizer has no such token.
    """
    index: Any = None if token is None else tokenizer.convert_tokens_to_ids(token)
    if index is None or tokenizer.convert_ids_to_tokens(index) != token:  # it may be that of the unknown token
        raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has no token {token or 'EOS'}")
    return int(index)


def join(parts: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Tokenise and join: neighbouring texts with the same mark are one text, as they are at inference."""
    ids: list[int] = []
    marks: list[bool] = []
    follows_text = False
    for (is_text, is_label), group in groupby(parts, key=lambda p: (isinstance(p.value, str), p.is_label)):
        values = [piece.value for piece in group]
        new = _ids("".join(map(str, values)), tokenizer, follows_text) if is_text else [int(v) for v in values]
        ids += new
        marks += [is_label] * len(new)
        follows_text = is_text
    return Encoded(ids, marks)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, follows_text: bool) -> list[int]:
    """Ids of ordinary text: `<|im_end|>` in it is spelled out, never the special token.

    SentencePiece tokenizers (Llama 2) put a space before a text. One that continues another text must not get
    it, so it is tokenised after an anchor, whose ids are cut off again.
    """

    def plain(value: str) -> list[int]:
        return list(tokenizer(value, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    anchor = "\n" if follows_text and tokenizer.tokenize("a")[0].startswith("▁") else ""
    return plain(anchor + text)[len(plain(anchor)) :]
