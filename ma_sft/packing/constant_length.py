"""`ConstantLengthDataset`, the class that TRL 0.x had: a stream of rows of exactly `seq_length` tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch

from ma_sft.errors import FormatError, LabelError
from ma_sft.packing.pack import IGNORED


@dataclass(eq=False, repr=False)
class ConstantLengthDataset(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """A stream of rows of exactly `seq_length` tokens: the class of TRL 0.x, with its constructor.

    Each item has `input_ids` and `labels`, int64 tensors of shape (seq_length,). Documents are joined and cut every
    `seq_length` tokens, so documents in one row see each other; `pack` keeps them apart. What differs from TRL 0.x:
    rows that carry `input_ids` keep their `labels` (a concat token after them has none), no token is lost (the last
    row is filled up with tokens without a label), each worker of a loader reads its share of the rows, the order
    depends on `seed` and the epoch, and `len` counts rows of `seq_length` tokens, not documents.

    Raises:
        FormatError: a row that has neither tokens nor text, or an infinite stream without a token.
        LabelError: a row whose labels do not fit its tokens.
    """

    tokenizer: Any  # its end token joins documents
    dataset: Any  # rows, as a data set or any iterable that can be iterated again
    dataset_text_field: str | None = None  # the column of the text, or of token ids
    formatting_func: Callable[[Any], Any] | None = None  # row -> text, in which special tokens are parsed, or token ids
    infinite: bool = False  # start again at the end instead of stopping
    seq_length: int = 1024
    num_of_sequences: int = 1024  # in the buffer
    chars_per_token: float = 3.6  # by which texts fill the buffer
    eos_token_id: int = 0  # joins documents if the tokenizer has no end token
    shuffle: bool = True  # the documents, and the rows made of them, within a buffer
    append_concat_token: bool = True  # after each document
    add_special_tokens: bool = True  # those of the tokenizer to each text
    seed: int = 42

    def __post_init__(self) -> None:
        self.max_buffer_size = self.seq_length * self.chars_per_token * self.num_of_sequences
        # `is None` and not falsy: 0 is a token id.
        own = self.tokenizer.eos_token_id
        self.concat_token_id = self.eos_token_id if own is None else own
        self.pretokenized = "input_ids" in (getattr(self.dataset, "column_names", None) or ())
        self.current_size = self.epoch = 0
        self._length: int | None = None

    def set_epoch(self, epoch: int) -> None:  # of the next iteration, whose order depends on it
        self.epoch = epoch

    def __len__(self) -> int:
        if self.infinite or not hasattr(self.dataset, "__len__"):
            raise TypeError("an infinite or streaming ConstantLengthDataset has no length; set max_steps")
        if self._length is None:
            rows = iter(self.dataset)
            buffers = iter(lambda: self._read_buffer(rows), [])
            self._length = -(-sum(len(ids) for buffer in buffers for ids, _ in buffer) // self.seq_length)
        return self._length

    def to_iterable_dataset(self) -> datasets.IterableDataset:
        """This stream, its length and epochs as a data set of `datasets`, which TRL 1.x's `SFTTrainer` asks for.

        Give it to the trainer with `dataset_kwargs={"skip_prepare_dataset": True}`.
        """
        items = _Items(self)
        items.around = datasets.IterableDataset.from_generator(items)
        items.around.__class__, items.around.stream = _SizedIterableDataset, self
        return items.around

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        if isinstance(self.dataset, datasets.IterableDataset):  # which shares its files between the workers by itself
            worker = None
        yield from self.iterate(self.epoch, worker.id if worker else 0, worker.num_workers if worker else 1)
        self.epoch += 1

    def iterate(self, epoch: int, first: int = 0, step: int = 1) -> Iterator[dict[str, torch.Tensor]]:
        """The items of every `step`-th row from row `first` on."""
        ids: list[int] = []
        labels: list[int] = []
        while True:
            rows, row, tokens = islice(iter(self.dataset), first, None, step), 0, 0
            while documents := self._read_buffer(rows):
                rng = np.random.default_rng((self.seed, epoch, first, row))
                for number in rng.permutation(len(documents)) if self.shuffle else range(len(documents)):
                    ids += documents[number][0]
                    labels += documents[number][1]
                full = len(ids) // self.seq_length
                for number in rng.permutation(full) if self.shuffle else range(full):
                    yield self._item(ids, labels, number * self.seq_length)
                row, tokens = row + len(documents), tokens + sum(len(document) for document, _ in documents)
                ids, labels = ids[full * self.seq_length :], labels[full * self.seq_length :]
            if not self.infinite:
                break
            if not tokens:
                if first:  # fewer rows than workers: the first one raises if there is no token at all
                    return
                raise FormatError("an infinite ConstantLengthDataset over rows without a token; give it data")
            epoch += 1
        if missing := -len(ids) % self.seq_length:
            yield self._item(ids + [self.concat_token_id] * missing, labels + [IGNORED] * missing, 0)

    def _item(self, ids: list[int], labels: list[int], at: int) -> dict[str, torch.Tensor]:
        self.current_size += 1
        window = slice(at, at + self.seq_length)
        return {"input_ids": torch.tensor(ids[window]), "labels": torch.tensor(labels[window])}

    def _read_buffer(self, rows: Iterator[Any]) -> list[tuple[list[int], list[int]]]:
        """Ids and labels of the next rows, as many as fill the buffer."""
        read: list[tuple[Any, list[int] | None]] = []
        size = 0.0
        while size < self.max_buffer_size and (row := next(rows, None)) is not None:
            read.append(self._document(row))
            size += max(len(read[-1][0]), 1) * (1 if isinstance(read[-1][0], str) else self.chars_per_token)
        texts = [value for value, _ in read if isinstance(value, str)]
        options = {"add_special_tokens": self.add_special_tokens, "truncation": False}
        encoded = iter(self.tokenizer(texts, **options)["input_ids"] if texts else ())
        documents = []
        for value, labels in read:
            ids = list(next(encoded) if isinstance(value, str) else value)
            ends = not isinstance(value, str) and (not ids or ids[-1] == self.concat_token_id)
            end = [self.concat_token_id] if self.append_concat_token and not ends else []
            documents.append((ids + end, ids + end if labels is None else [*labels, *[IGNORED] * len(end)]))
        return documents

    def _document(self, row: Any) -> tuple[Any, list[int] | None]:
        """A row's text or ids, and its labels if it carries any."""
        field = self.dataset_text_field or "input_ids"
        if self.formatting_func is not None:
            value = self.formatting_func(row)
            if not isinstance(value, str) and (len(value) and isinstance(value[0], str)):
                raise FormatError("formatting_func gave several texts for a row; one text, or its ids, are needed")
            return value, None
        if field not in row:
            raise FormatError(f"{list(row)} has no '{field}'; set dataset_text_field or formatting_func")
        labels = row.get("labels") if field == "input_ids" else None
        if labels is not None and len(labels) != len(row[field]):
            raise LabelError(f"a row has {len(row[field])} input_ids but {len(labels)} labels; each needs one label")
        return row[field], labels


@dataclass(eq=False)
class _Items:
    """The generator of a stream's items: all of them, as `datasets` and accelerate share out what it yields."""

    stream: ConstantLengthDataset
    around: Any = None  # the data set of `datasets`, whose epoch counts

    def __call__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self.stream.iterate(self.stream.epoch + self.around.epoch)


class _SizedIterableDataset(datasets.IterableDataset):  # type: ignore[misc]
    """The stream's own length: a trainer counts the steps of its epochs by it."""

    def __len__(self) -> int:
        return len(self.stream)
