"""What is trained, token by token, for the terminal."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ma_sft.labels.encoder import IGNORE_INDEX
from ma_sft.labels.token_bytes import TokenBytes


@dataclass(frozen=True)
class Piece:
    """What is shown as one token: usually one, several where only together they make a character."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    control: bool


def pieces(input_ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The row cut into readable pieces; joined, their `ids` are `input_ids`."""
    token_bytes = TokenBytes(tokenizer)
    shown: list[Piece] = []
    kinds = (
        (token, label != IGNORE_INDEX, token in token_bytes.control)
        for token, label in zip(input_ids, labels, strict=True)
    )
    for (trained, control), group in groupby(kinds, key=itemgetter(1, 2)):
        held: list[int] = []
        tokens = [token for token, _, _ in group]
        for n, token in enumerate(tokens):
            held.append(token)
            raw = b"".join(token_bytes[each] for each in held)
            if codecs.utf_8_decode(raw, "replace", False)[1] == len(raw) or n == len(tokens) - 1:
                shown.append(Piece(token_bytes.readable(raw), tuple(held), trained, control))
                held = []
    return shown


def preview_text(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, borders: bool = False
) -> RenderableType:
    """Rows for the terminal: trained tokens green, masked ones dim, control tokens reversed; `borders` shows `│`."""
    parts: list[RenderableType] = [
        Text.assemble(("trained", "bold green"), "  ", ("masked", "dim"), "  ", ("control token", "reverse"))
    ]
    for number, row in enumerate(rows):
        text = Text()
        for piece in pieces(row["input_ids"], row["labels"], tokenizer):
            style = "bold green" if piece.trained else "dim"
            # Terminal escapes in data must not reach the terminal.
            visible = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in piece.text)
            text.append(visible.replace("\n", "↵\n") if piece.trained else visible, style + " reverse" * piece.control)
            if borders:
                text.append("│", "blue")
        if row.get("cut"):
            text.append(" ✂ max_length", "bold red")
        parts += [Rule(heading(row, number), align="left"), text]
    return Group(*parts)


def heading(row: dict[str, Any], number: int) -> str:
    """Which row it is, and how much of it is trained."""
    total = len(row["labels"])
    trained = sum(label != IGNORE_INDEX for label in row["labels"])
    cut = f"; cut by max_length: {row['cut']}" if row.get("cut") else ""
    place = Path(row.get("origin") or f"row {row.get('row', number)}").name
    return f"{place}: {total:,} tokens, {trained:,} trained ({trained / max(total, 1):.0%}){cut}"
