"""Encoded conversations -> one batch of tensors.

The model reads ids x_0 .. x_{T-1} and at position k gives a distribution over the *next* id x_{k+1}. So the label at
position k is x_{k+1}, if that id is one to learn, and -100 ("ignore") otherwise:

    input_ids   \\n  #USER:  hi  \\n  #ASSISTANT:  hello  </s>   pad
    is_label    0   0       0   0   0            1      1      0
    labels     -100 -100   -100 -100 hello      </s>   -100   -100

Here the shift is made once, in the batch. (transformers' models want unshifted labels and shift inside.)

`attention_mask` holds *document numbers*: 0 is padding, 1, 2, ... are documents. In a padded batch each row is one
document and the mask is the usual 0/1. In a packed batch one row holds several: 1 1 1 2 2 3 3 3 3. One rule covers
both: position q may look at position k if k <= q and both belong to the same document (`model.attention_pattern`).
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from ma_sft.reference import InputError
from ma_sft.reference.template import Encoded

IGNORE_INDEX = -100


class Batch(TypedDict):
    """Three int64 tensors of shape (B, T): B rows, T the longest row of the batch."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def shifted_labels(example: Encoded) -> list[int]:
    """`labels[k] = input_ids[k+1]` where k+1 is a label, else -100; the last position has nothing to predict."""
    following = zip(example.input_ids[1:], example.is_label[1:], strict=True)
    return [token if learned else IGNORE_INDEX for token, learned in following] + [IGNORE_INDEX]


def collate(examples: Sequence[Encoded], pad_id: int) -> Batch:
    """One row per example, padded on the right: causal attention never looks right, so padding changes nothing.

    Raises:
        InputError: an example in which nothing is learned.
    """
    return pack([[example] for example in examples], pad_id)


def pack(rows: Sequence[Sequence[Encoded]], pad_id: int) -> Batch:
    """One row per list of examples, joined end to end; no example sees another, and none is cut.

    The labels are shifted within each example: the last id of one must not be asked for the first of the next.

    Raises:
        InputError: an example in which nothing is learned.
    """
    for row in rows:
        for example in row:
            if not any(example.is_label[1:]):
                raise InputError(f"an example of {len(example.input_ids)} tokens has no label, nothing can be learned")
    width = max(sum(len(example.input_ids) for example in row) for row in rows)
    batch: Batch = {
        "input_ids": torch.full((len(rows), width), pad_id),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), IGNORE_INDEX),
    }
    for i, row in enumerate(rows):
        start = 0
        for document, example in enumerate(row, start=1):
            span = slice(start, start + len(example.input_ids))
            batch["input_ids"][i, span] = torch.tensor(example.input_ids)
            batch["attention_mask"][i, span] = document
            batch["labels"][i, span] = torch.tensor(shifted_labels(example))
            start = span.stop
    return batch


def first_fit(examples: Sequence[Encoded], max_length: int) -> list[list[Encoded]]:
    """Rows of at most `max_length` tokens: each example, longest first, goes into the first row with room for it."""
    rows: list[list[Encoded]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: len(e.input_ids), reverse=True):
        size = len(example.input_ids)
        index = next((i for i, left in enumerate(room) if left >= size), None)
        if index is None:
            rows.append([])
            room.append(max_length)
            index = len(rows) - 1
        rows[index].append(example)
        room[index] -= size
    return rows
