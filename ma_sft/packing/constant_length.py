"""`ConstantLengthDataset`, the class that TRL 0.x had: a stream of rows of exactly `seq_length` tokens."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch

from ma_sft.errors import FormatError, LabelError, RecipeError
from ma_sft.packing.pack import IGNORED


class ConstantLengthDataset(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """A stream of rows of exactly `seq_length` tokens: the class of TRL 0.x, with its constructor.

    Each item has `input_ids` and `labels`, int64 tensors of shape (seq_length,). Documents are joined and
    cut every `seq_length` tokens, so documents in one row see each other; `pack` keeps them apart.

    What differs from TRL 0.x: rows that carry `input_ids` need neither text field nor function, and keep their `labels`
    (a concat token after labelled ids has no label, and none is put after ids that end with it). No token is lost: what
    a buffer leaves over goes to the next one, and the last row is filled up with tokens without a label. Each worker of
    a data loader reads its own share of the rows. The order depends on `seed` and the epoch (`set_epoch`, or how often
    the stream was read to its end). `len` is the number of rows of `seq_length` tokens (TRL: of documents).

    Args:
        tokenizer: tokenizer of the texts; its end token joins documents.
        dataset: rows, as a data set or any iterable that can be iterated again.
        dataset_text_field: the column of the text, or of token ids.
        formatting_func: row -> text or token ids. Special tokens in the text are parsed: it is a rendered template.
        infinite: start again at the end instead of stopping.
        seq_length: tokens in each row.
        num_of_sequences: rows in the buffer.
        chars_per_token: characters per token, to fill the buffer with text of the right length.
        eos_token_id: joins documents if the tokenizer has no end token.
        shuffle: shuffle the documents, and the rows made of them, within a buffer.
        append_concat_token: put the end token after each document.
        add_special_tokens: let the tokenizer add its special tokens to each text.
        seed: seed of `shuffle`.

    Raises:
        RecipeError: neither text field nor function for rows that are not tokenised.
        FormatError: a row that has neither tokens nor text, or an infinite stream without a token.
        LabelError: a row whose labels do not fit its tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        dataset: Any,
        dataset_text_field: str | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        infinite: bool = False,
        seq_length: int = 1024,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        eos_token_id: int = 0,
        shuffle: bool = True,
        append_concat_token: bool = True,
        add_special_tokens: bool = True,
        seed: int = 42,
    ) -> None:
        self.tokenizer, self.dataset, self.formatting_func = tokenizer, dataset, formatting_func
        self.infinite, self.seq_length, self.chars_per_token = infinite, seq_length, chars_per_token
        self.max_buffer_size = seq_length * chars_per_token * num_of_sequences
        self.shuffle, self.seed = shuffle, seed
        self.append_concat_token, self.add_special_tokens = append_concat_token, add_special_tokens
        # `is None` and not falsy: 0 is a token id.
        self.concat_token_id = eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        names = getattr(dataset, "column_names", None)
        if names is None and dataset_text_field is None and formatting_func is None:
            names = next(iter(dataset), {"input_ids": []})
        self.pretokenized = names is not None and "input_ids" in names
        if dataset_text_field is None and formatting_func is None and not self.pretokenized:
            raise RecipeError(f"rows with the columns {list(names or [])}: set dataset_text_field or formatting_func")
        self.dataset_text_field = dataset_text_field or "input_ids"
        self.current_size = self.epoch = 0
        self._length: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
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
        """This stream as a data set of `datasets`, which TRL 1.x's `SFTTrainer` asks for; it has a length if this has.

        Give it to the trainer with `dataset_kwargs={"skip_prepare_dataset": True}`; its `set_epoch` is the stream's.
        """
        items = _Items(self)
        items.around = datasets.IterableDataset.from_generator(items)
        items.around.__class__ = _SizedIterableDataset
        items.around.stream = self
        return items.around

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        # A streaming data set of `datasets` shares its files between the workers by itself.
        if worker is None or isinstance(self.dataset, datasets.IterableDataset):
            yield from self.iterate(self.epoch)
        else:
            yield from self.iterate(self.epoch, worker.id, worker.num_workers)
        self.epoch += 1

    def iterate(self, epoch: int, first: int = 0, step: int = 1) -> Iterator[dict[str, torch.Tensor]]:
        """The items of every `step`-th row from row `first` on."""
        ids: list[int] = []
        labels: list[int] = []
        rows, row, empty = islice(iter(self.dataset), first, None, step), 0, True
        while True:
            documents = self._read_buffer(rows)
            rng = np.random.default_rng((self.seed, epoch, first, row))
            for number in rng.permutation(len(documents)) if self.shuffle else range(len(documents)):
                ids += documents[number][0]
                labels += documents[number][1]
            empty = empty and not ids
            if not documents and self.infinite:
                if empty and first:
                    return  # fewer rows than workers: the first one raises if there is no token at all
                if empty:
                    raise FormatError("an infinite ConstantLengthDataset over rows without a token; give it data")
                epoch, row, empty = epoch + 1, 0, not ids
                rows = islice(iter(self.dataset), first, None, step)
                continue
            if not documents:
                missing = -len(ids) % self.seq_length
                ids, labels = ids + [self.concat_token_id] * missing, labels + [IGNORED] * missing
            full = len(ids) // self.seq_length
            for number in rng.permutation(full) if self.shuffle else range(full):
                window = slice(number * self.seq_length, (number + 1) * self.seq_length)
                self.current_size += 1
                yield {"input_ids": torch.tensor(ids[window]), "labels": torch.tensor(labels[window])}
            if not documents:
                return
            row += len(documents)
            ids, labels = ids[full * self.seq_length :], labels[full * self.seq_length :]

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
            text = isinstance(value, str)
            ids = list(next(encoded) if text else value)
            labels = ids if labels is None else labels
            if self.append_concat_token and (text or (ids and ids[-1] != self.concat_token_id)):
                labels = [*labels, self.concat_token_id if labels is ids else IGNORED]
                ids = [*ids, self.concat_token_id]
            documents.append((ids, labels))
        return documents

    def _document(self, row: Any) -> tuple[Any, list[int] | None]:
        """A row's text or ids, and its labels if it carries any."""
        if self.formatting_func is not None:
            value = self.formatting_func(row)
            if not isinstance(value, str) and (len(value) and isinstance(value[0], str)):
                raise FormatError("formatting_func gave several texts for a row; one text, or its ids, are needed")
            return value, None
        if self.dataset_text_field not in row:
            raise FormatError(
                f"a row with the fields {list(row)} has no '{self.dataset_text_field}'; "
                "set dataset_text_field or formatting_func"
            )
        value = row[self.dataset_text_field]
        labels = row.get("labels") if self.dataset_text_field == "input_ids" else None
        if labels is not None and len(labels) != len(value):
            raise LabelError(f"a row has {len(value)} input_ids but {len(labels)} labels; each needs one label")
        return value, labels


class _Items:
    """The generator of a stream's items, in the epoch of the data set around it."""

    def __init__(self, stream: ConstantLengthDataset) -> None:
        self.stream = stream
        self.around: Any = None

    def __call__(self) -> Iterator[dict[str, torch.Tensor]]:
        # `datasets` and accelerate share its items between workers and ranks, so it must yield all of them.
        return self.stream.iterate(self.stream.epoch + (self.around.epoch if self.around is not None else 0))


class _SizedIterableDataset(datasets.IterableDataset):  # type: ignore[misc]
    """The stream's own length: a trainer counts the steps of its epochs by it."""

    stream: ConstantLengthDataset

    def __len__(self) -> int:
        return len(self.stream)
