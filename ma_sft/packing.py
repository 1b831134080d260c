"""Fill sequences of a fixed length with documents; labels move with their tokens and borders are kept.

`bfd` is best-fit decreasing over the whole data set: longest document first, each into the fullest pack that still
has room (Coffman et al. 1978; for training: https://arxiv.org/abs/2404.10830). `seq_lengths` keeps the documents'
lengths, from which TRL's padding-free collator restarts position ids, so attention stays inside a document.
`wrapped` cuts one long stream into equal pieces and so lets documents see each other: see `ConstantLengthDataset`.
"""

import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Sequence, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from ma_sft.cache import cache_dir
from ma_sft.errors import LabelError

COLUMNS = ("input_ids", "labels")


def pack(
    dataset: Dataset, seq_length: int, strategy: Literal["bfd", "bfd_split", "wrapped", "none"] = "bfd"
) -> Dataset:
    """Pack a labelled data set into sequences of at most `seq_length` tokens.

    Args:
        dataset: columns `input_ids` and `labels`, lists of int of equal length per row.
        seq_length: tokens per pack.
        strategy: `"bfd"` keeps documents whole and refuses longer ones; `"bfd_split"` splits longer ones into pieces
            of `seq_length`; `"wrapped"` cuts the stream of all documents, each pack exactly `seq_length`; `"none"`
            returns the data set as it is.

    Returns:
        Columns `input_ids`, `labels` and, except for `"wrapped"`, `seq_lengths` (lengths of a pack's documents).

    Raises:
        LabelError: a document longer than `seq_length` with `"bfd"`; a data set without labels.
    """
    missing = [column for column in COLUMNS if column not in dataset.column_names]
    if missing:
        raise LabelError(f"pack needs the column {missing[0]!r}; the data set has {dataset.column_names}")
    dataset = dataset.select_columns(list(COLUMNS))
    if strategy == "none":
        return dataset
    if strategy == "wrapped":
        stream = ConstantLengthDataset(None, dataset, seq_length=seq_length)
        packs = [{key: value.tolist() for key, value in row.items()} for row in stream]
        if not packs:
            raise LabelError(
                f"all documents together are shorter than one pack of {seq_length} tokens; lower max_length"
            )
        return Dataset.from_list(packs)
    if strategy not in ("bfd", "bfd_split"):
        raise LabelError(f"unknown packing strategy {strategy!r}; known: bfd, bfd_split, wrapped, none")
    lengths = _lengths(dataset)
    if strategy == "bfd_split" and lengths.max() > seq_length:
        dataset = dataset.map(_split, batched=True, fn_kwargs={"seq_length": seq_length}, desc="splitting")
        lengths = _lengths(dataset)
    if lengths.max() > seq_length:
        row = int(lengths.argmax())
        raise LabelError(
            f"row {row} has {lengths[row]} tokens, more than a pack of {seq_length}; cut it, or choose 'bfd_split'"
        )
    return _gather(dataset, best_fit_decreasing(lengths, seq_length), f"{dataset._fingerprint}-{seq_length}")


def best_fit_decreasing(lengths: np.ndarray, seq_length: int) -> list[list[int]]:
    """Indices of the documents in each pack.

    Args:
        lengths: int array of shape (n_documents,), each at most `seq_length`; documents of length 0 are left out.
        seq_length: room of a pack.

    Room is a small integer, so the packs with some room left form a set of at most `seq_length` values; as bits of
    one integer, the least room that fits is its lowest set bit after a shift: O(1) per document in practice.
    """
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(seq_length + 1)]
    rooms = 0
    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length == 0:
            break
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            packs[pack].append(document)
        else:
            room, pack = seq_length, len(packs)
            packs.append([document])
        room -= length
        if room:
            with_room[room].append(pack)
            rooms |= 1 << room
    return packs


def _lengths(dataset: Dataset) -> np.ndarray:
    batches = dataset.with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([batch["input_ids"].combine_chunks().value_lengths().to_numpy() for batch in batches])


def _split(batch: dict[str, list[list[int]]], seq_length: int) -> dict[str, list[list[int]]]:
    return {
        name: [row[at : at + seq_length] for row in rows for at in range(0, len(row), seq_length)]
        for name, rows in batch.items()
    }


def _gather(dataset: Dataset, packs: list[list[int]], key: str) -> Dataset:
    """Move the documents' tokens into packs, through a file of the cache: memory stays that of a batch of packs."""
    path = cache_dir() / "packed" / f"{key}.arrow"
    if path.exists():
        return Dataset.from_file(str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    features = Features({name: Sequence(Value("int32")) for name in (*COLUMNS, "seq_lengths")})
    rows = dataset.with_format("arrow")
    with ArrowWriter(path=str(scratch), features=features) as writer:
        for at in range(0, len(packs), 1000):
            chunk = packs[at : at + 1000]
            table = rows[[document for pack in chunk for document in pack]]
            lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
            documents = np.cumsum([0] + [len(pack) for pack in chunk])
            tokens = np.concatenate([[0], np.cumsum(lengths)])[documents]
            columns = [
                pa.ListArray.from_arrays(
                    pa.array(tokens, pa.int32()), table[name].combine_chunks().flatten().cast(pa.int32())
                )
                for name in COLUMNS
            ]
            columns.append(pa.ListArray.from_arrays(pa.array(documents, pa.int32()), pa.array(lengths, pa.int32())))
            writer.write_table(pa.Table.from_arrays(columns, names=[*COLUMNS, "seq_lengths"]))
        writer.finalize()
    scratch.rename(path)
    return Dataset.from_file(str(path))


class ConstantLengthDataset(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """A stream of documents, joined with an end token between them and cut into pieces of exactly `seq_length`.

    The constructor is TRL 0.x's. What differs: rows that carry `input_ids` and `labels` keep both (TRL 0.x trained on
    every token); what is left of one buffer goes on in the next (TRL 0.x dropped it), so only the very last piece is
    left out, and `dropped_tokens` counts it; data loader workers share the pieces instead of repeating them.
    Documents see each other across the borders, by the nature of this packing; `pack(..., "bfd")` keeps them apart.

    Args:
        tokenizer: tokenises text; not used for rows with `input_ids`.
        dataset: an iterable of rows.
        dataset_text_field: column of the text; or else
        formatting_func: row -> text.
        infinite: start again at the end.
        seq_length: tokens per piece.
        num_of_sequences, chars_per_token: a buffer holds about their product times `seq_length` characters.
        eos_token_id: joins documents if the tokenizer has no EOS token.
        shuffle: shuffle the pieces of a buffer, from `seed`.
        append_concat_token: put the end token after each document.
        add_special_tokens: let the tokenizer add its own (BOS).

    Yields:
        `{"input_ids", "labels"}`, int64 tensors of shape (seq_length,).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        dataset: Iterable[dict[str, Any]],
        dataset_text_field: str | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        infinite: bool = False,
        seq_length: int = 1024,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        eos_token_id: int = 0,
        shuffle: bool = True,
        append_concat_token: bool = True,
        add_special_tokens: bool = True,
        seed: int = 0,
    ) -> None:
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            eos_token_id = tokenizer.eos_token_id
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.concat_token_id = eos_token_id
        self.infinite = infinite
        self.seq_length = seq_length
        self.chars_per_token = chars_per_token
        self.max_buffer_size = seq_length * chars_per_token * num_of_sequences
        self.shuffle = shuffle
        self.append_concat_token = append_concat_token
        self.add_special_tokens = add_special_tokens
        self.seed = seed
        self.dropped_tokens = 0
        if formatting_func is not None:
            self._text: Callable[[dict[str, Any]], str] | None = formatting_func
        elif dataset_text_field is not None:
            self._text = lambda row: str(row[dataset_text_field])
        else:
            self._text = None

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, piece in enumerate(self._pieces()):
            if number % step == first:
                ids, labels = piece
                yield {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def _pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rng = random.Random(self.seed)
        rest = np.zeros((2, 0), dtype=np.int64)
        for buffer in self._buffers():
            stream = np.concatenate([rest, *self._encode(buffer)], axis=1)
            whole = stream.shape[1] // self.seq_length * self.seq_length
            pieces = [stream[:, at : at + self.seq_length] for at in range(0, whole, self.seq_length)]
            rest = stream[:, whole:]
            if self.shuffle:
                rng.shuffle(pieces)
            yield from ((piece[0].copy(), piece[1].copy()) for piece in pieces)
        self.dropped_tokens = rest.shape[1]

    def _buffers(self) -> Iterator[list[dict[str, Any] | str]]:
        while True:
            buffer: list[dict[str, Any] | str] = []
            size = 0.0
            for row in self.dataset:
                if "labels" in row:
                    buffer.append(row)
                    size += len(row["labels"]) * self.chars_per_token
                else:
                    if self._text is None:
                        raise LabelError(
                            "ConstantLengthDataset needs dataset_text_field, formatting_func or labelled rows"
                        )
                    buffer.append(self._text(row))
                    size += len(buffer[-1])
                if size >= self.max_buffer_size:
                    yield buffer
                    buffer, size = [], 0.0
            if buffer:
                yield buffer
            if not self.infinite:
                return
            warnings.warn("the data set reached its end and starts again", stacklevel=2)

    def _encode(self, buffer: list[dict[str, Any] | str]) -> list[np.ndarray]:
        """The buffer's documents as arrays of shape (2, n_tokens): ids above labels."""
        texts = [item for item in buffer if isinstance(item, str)]
        encoded: Iterator[list[int]] = iter(())
        if texts:
            if self.tokenizer is None:
                raise LabelError("ConstantLengthDataset needs a tokenizer for rows of text")
            # Text never becomes a special token, whatever it spells.
            encoded = iter(
                self.tokenizer(texts, add_special_tokens=self.add_special_tokens, split_special_tokens=True)[
                    "input_ids"
                ]
            )
        documents = []
        for item in buffer:
            if isinstance(item, str):
                ids = next(encoded) + ([self.concat_token_id] if self.append_concat_token else [])
                documents.append(np.array([ids, ids], dtype=np.int64))
            else:
                documents.append(np.array([item["input_ids"], item["labels"]], dtype=np.int64))
        return documents
