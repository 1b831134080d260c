"""`ConstantLengthDataset`, the class that TRL 0.x had: a stream of rows of exactly `seq_length` tokens."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch

from ma_sft.errors import FormatError, LabelError, RecipeError
from ma_sft.packing.tokens import IGNORED


class ConstantLengthDataset(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """A stream of rows of exactly `seq_length` tokens: the class of TRL 0.x, with its constructor.

    Each item has `input_ids` and `labels`, int64 tensors of shape (seq_length,). Documents are joined and
    cut every `seq_length` tokens, so documents in one row see each other; `pack` keeps them apart.

    What differs from TRL 0.x:
        - Rows that carry `input_ids` need neither text field nor function, and keep their `labels`. A concat token
          after labelled ids has no label, and none is put after ids that end with it.
        - No token is lost: what a buffer leaves over goes to the next one, and the last row is filled up
          with tokens that carry no label.
        - Each data loader worker reads its own share of the rows. accelerate's loaders share rows between
          ranks by themselves; with a plain loader take `shard(world_size, rank)` on each rank.
        - The order depends on `seed` and the epoch alone: `set_epoch`, or how often the stream was read to its end.
          `state_dict` takes it up in the middle.
        - `len` is the number of rows of `seq_length` tokens (TRL gave the number of documents).

    Args:
        tokenizer: tokenizer of the texts; its end token joins documents.
        dataset: rows, as a data set or any iterable that can be iterated again.
        dataset_text_field: the column of the text, or of token ids.
        formatting_func: row -> text or token ids. Special tokens in the text are parsed, as the text is a rendered
            template.
        infinite: start again at the end instead of stopping.
        seq_length: tokens in each row.
        num_of_sequences: rows in the buffer.
        chars_per_token: characters per token, to fill the buffer with text of the right length.
        eos_token_id: joins documents if the tokenizer has no end token.
        shuffle: shuffle the documents, and the rows made of them, within a buffer.
        append_concat_token: put the end token after each document.
        add_special_tokens: let the tokenizer add its special tokens to each text.
        seed: seed of `shuffle`.

    Attributes:
        current_size: items given so far, in this process.
        pretokenized: whether the rows have a column `input_ids`.

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
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.formatting_func = formatting_func
        self.infinite = infinite
        self.seq_length = seq_length
        self.chars_per_token = chars_per_token
        self.max_buffer_size = seq_length * chars_per_token * num_of_sequences
        self.shuffle = shuffle
        self.append_concat_token = append_concat_token
        self.add_special_tokens = add_special_tokens
        self.seed = seed
        # `is None` and not falsy: 0 is a token id.
        self.concat_token_id = eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        names = getattr(dataset, "column_names", None)
        if names is None and dataset_text_field is None and formatting_func is None:
            names = next(iter(dataset), {"input_ids": []})
        self.pretokenized = names is not None and "input_ids" in names
        if dataset_text_field is None and formatting_func is None and not self.pretokenized:
            raise RecipeError(f"rows with the columns {list(names or [])}: set dataset_text_field or formatting_func")
        self.dataset_text_field = dataset_text_field or "input_ids"
        self.current_size = 0
        self.epoch = 0
        self._shard = (0, 1)
        self._state: dict[str, Any] = {}
        self._resume: dict[str, Any] | None = None
        self._length: int | None = None

    def shard(self, num_shards: int, index: int) -> "ConstantLengthDataset":
        """The same stream over every `num_shards`-th row, from row `index` on; for one rank of several."""
        other = object.__new__(ConstantLengthDataset)
        other.__dict__.update(self.__dict__, _length=None, _state={}, _resume=None)
        other._shard = (self._shard[0] + index * self._shard[1], num_shards * self._shard[1])
        return other

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the latest iteration stands; plain numbers and lists."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on behind the item after which `state` was taken."""
        self._resume = dict(state) or None

    def __len__(self) -> int:
        if self.infinite or not hasattr(self.dataset, "__len__"):
            raise TypeError("an infinite or streaming ConstantLengthDataset has no length; set max_steps")
        if self._length is None:
            tokens, rows = 0, self._rows(0, self._shard)
            while documents := self._read_buffer(rows):
                tokens += sum(len(ids) for ids, _ in documents)
            self._length = -(-tokens // self.seq_length)
        return self._length

    def to_iterable_dataset(self) -> datasets.IterableDataset:
        """This stream as a data set of `datasets`, which TRL 1.x's `SFTTrainer` asks for.

        Give it to the trainer with `dataset_kwargs={"skip_prepare_dataset": True}`; its `set_epoch` is the stream's.
        """
        items = _Items(self)
        # `datasets` and accelerate share its items between workers and ranks, so it must yield all of them.
        items.around = datasets.IterableDataset.from_generator(items, gen_kwargs={"shard": self._shard})
        return items.around

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        shard = self._shard
        # A streaming data set of `datasets` shares its files between the workers by itself.
        if worker is not None and not isinstance(self.dataset, datasets.IterableDataset):
            shard = shard[0] + worker.id * shard[1], shard[1] * worker.num_workers
        yield from self.iterate(shard, self.epoch)
        self.epoch = int(self._state.get("epoch", self.epoch)) + 1

    def iterate(self, shard: tuple[int, int], epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        """The items of every `shard[1]`-th row from row `shard[0]` on."""
        fresh = {"epoch": epoch, "row": 0, "ids": [], "labels": [], "yielded": 0, "shard": list(shard)}
        state: dict[str, Any] = self._resume or fresh
        self._resume = None
        if state["shard"] != list(shard):
            raise RecipeError(
                f"the saved state is of shard {state['shard']}, this is {list(shard)}; "
                "resume with as many workers and ranks"
            )
        rows = self._rows(state["row"], shard)
        empty = not state["ids"] and not state["row"]
        while True:
            documents = self._read_buffer(rows)
            rng = np.random.default_rng((self.seed, state["epoch"], shard[0], state["row"]))
            order = rng.permutation(len(documents)) if self.shuffle else range(len(documents))
            ids, labels = list(state["ids"]), list(state["labels"])
            for number in order:
                ids += documents[number][0]
                labels += documents[number][1]
            empty = empty and not ids
            if not documents and self.infinite:
                if empty and shard[0]:
                    return  # fewer rows than workers: the first one says whether there is a token
                if empty:
                    raise FormatError("an infinite ConstantLengthDataset over rows without a token; give it data")
                state = {**state, "epoch": state["epoch"] + 1, "row": 0, "yielded": 0}
                rows, empty = self._rows(0, shard), not ids
                continue
            if not documents:
                fill = -len(ids) % self.seq_length
                ids, labels = ids + [self.concat_token_id] * fill, labels + [IGNORED] * fill
            full = len(ids) // self.seq_length
            windows = rng.permutation(full) if self.shuffle else np.arange(full)
            for number in windows[state["yielded"] :].tolist():
                window = slice(number * self.seq_length, (number + 1) * self.seq_length)
                state = {**state, "yielded": state["yielded"] + 1}
                self._state = state
                self.current_size += 1
                yield {"input_ids": torch.tensor(ids[window]), "labels": torch.tensor(labels[window])}
            if not documents:
                return
            rest = slice(full * self.seq_length, None)
            row = state["row"] + len(documents)
            state = {**state, "row": row, "ids": ids[rest], "labels": labels[rest], "yielded": 0}

    def _rows(self, start: int, shard: tuple[int, int]) -> Iterator[Any]:
        """Rows of one shard, from its `start`-th on."""
        index, count = shard
        first = index + start * count
        if isinstance(self.dataset, datasets.Dataset):
            chosen = range(first, len(self.dataset), count)
            return iter(self.dataset.select(chosen)) if chosen else iter(())
        return islice(iter(self.dataset), first, None, count)

    def _read_buffer(self, rows: Iterator[Any]) -> list[tuple[list[int], list[int]]]:
        """Ids and labels of the next rows, as many as fill the buffer."""
        found: list[tuple[Any, list[int] | None]] = []
        size = 0.0
        while size < self.max_buffer_size and (row := next(rows, None)) is not None:
            found.append(self._document(row))
            text = isinstance(found[-1][0], str)
            size += max(len(found[-1][0]), 1) * (1 if text else self.chars_per_token)
        texts = [value for value, _ in found if isinstance(value, str)]
        how = {"add_special_tokens": self.add_special_tokens, "truncation": False}
        encoded = iter(self.tokenizer(texts, **how)["input_ids"] if texts else ())
        documents = []
        for value, labels in found:
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

    def __call__(self, shard: tuple[int, int]) -> Iterator[dict[str, torch.Tensor]]:
        return self.stream.iterate(shard, self.stream.epoch + (self.around.epoch if self.around else 0))
