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
        - Rows that carry `input_ids` (and `labels`) are used as they are; the concat token gets no label
          there, and is not added twice.
        - No token is lost: what a buffer leaves over goes to the next one, and the last row is filled up
          with tokens that carry no label.
        - Each data loader worker reads its own share of the rows. accelerate's loaders share rows between
          ranks by themselves; with a plain loader take `shard(world_size, rank)` on each rank.
        - The order depends on `seed` and `set_epoch` alone, and `state_dict` takes it up in the middle.
        - `len` is the number of rows of `seq_length` tokens (TRL gave the number of documents).

    Args:
        tokenizer: tokenizer of the texts; its end token joins documents.
        dataset: rows, as a data set or any iterable that can be iterated again.
        dataset_text_field: the text's column, when there is no `formatting_func` and rows are not tokenised.
        formatting_func: row -> text. Special tokens in the text are parsed, as the text is a rendered
            template.
        infinite: start again at the end instead of stopping.
        seq_length: tokens in each row.
        num_of_sequences: rows in the buffer.
        chars_per_token: characters per token, to fill the buffer with text of the right length.
        eos_token_id: joins documents if the tokenizer has no end token.
        shuffle: shuffle the rows of a buffer.
        append_concat_token: put the end token after each document.
        add_special_tokens: let the tokenizer add its special tokens to each text.
        seed: seed of `shuffle`.

    Raises:
        FormatError: a row that has neither tokens nor the text field, or an infinite stream without a token.
        LabelError: a row whose labels do not fit its tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        dataset: Any,
        dataset_text_field: str | None = None,
        formatting_func: Callable[[Any], str] | None = None,
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
        self.dataset_text_field = dataset_text_field
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
            while True:
                ids, _, count = self._read_buffer(rows)
                if not count:
                    break
                tokens += len(ids)
            self._length = -(-tokens // self.seq_length)
        return self._length

    def _rows(self, start: int, shard: tuple[int, int]) -> Iterator[Any]:
        """Rows of one shard, from its `start`-th on."""
        index, count = shard
        first = index + start * count
        if isinstance(self.dataset, datasets.Dataset):
            chosen = range(first, len(self.dataset), count)
            return iter(self.dataset.select(chosen)) if chosen else iter(())
        return islice(iter(self.dataset), first, None, count)

    def _read_buffer(self, rows: Iterator[Any]) -> tuple[list[int], list[int], int]:
        """Tokens and labels of the next buffer of rows, and how many rows it took."""
        texts: list[str] = []
        documents: list[tuple[list[int], list[int]] | None] = []
        size = 0.0
        while size < self.max_buffer_size and (row := next(rows, None)) is not None:
            if self.formatting_func is None and "input_ids" in row:
                ids = list(row["input_ids"])
                labels = list(row.get("labels", ids))
                if len(ids) != len(labels):
                    raise LabelError(f"a row has {len(ids)} input_ids but {len(labels)} labels; each needs one label")
                if self.append_concat_token and ids and ids[-1] != self.concat_token_id:
                    labels.append(IGNORED if "labels" in row else self.concat_token_id)
                    ids.append(self.concat_token_id)
                documents.append((ids, labels))
                size += len(ids) * self.chars_per_token
                continue
            if self.formatting_func is None and self.dataset_text_field not in row:
                raise FormatError(
                    f"a row with the fields {list(row)} has no '{self.dataset_text_field}'; "
                    "set dataset_text_field or formatting_func"
                )
            text = self.formatting_func(row) if self.formatting_func else row[self.dataset_text_field]
            texts.append(text)
            documents.append(None)
            size += max(len(text), 1)
        tokens: Iterator[list[int]] = iter(())
        if texts:
            settings = {"add_special_tokens": self.add_special_tokens, "truncation": False}
            tokens = iter(self.tokenizer(texts, **settings)["input_ids"])
        all_ids: list[int] = []
        all_labels: list[int] = []
        for document in documents:
            if document is None:
                ids = next(tokens) + [self.concat_token_id] * self.append_concat_token
                document = ids, ids
            all_ids += document[0]
            all_labels += document[1]
        return all_ids, all_labels, len(documents)

    def _worker_shard(self) -> tuple[int, int]:
        worker = torch.utils.data.get_worker_info()
        # A streaming data set of `datasets` shares its files between the workers by itself.
        if worker is None or isinstance(self.dataset, datasets.IterableDataset):
            return self._shard
        return self._shard[0] + worker.id * self._shard[1], self._shard[1] * worker.num_workers

    def to_iterable_dataset(self) -> datasets.IterableDataset:
        """This stream as a data set of `datasets`, which TRL 1.x's `SFTTrainer` asks for.

        Give it to the trainer with `dataset_kwargs={"skip_prepare_dataset": True}`.
        """
        # `datasets` and accelerate share its items between workers and ranks, so it must yield all of them.
        return datasets.IterableDataset.from_generator(self._iterate, gen_kwargs={"shard": self._shard})

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self._iterate(self._worker_shard())

    def _iterate(self, shard: tuple[int, int]) -> Iterator[dict[str, torch.Tensor]]:
        fresh: dict[str, Any] = {
            "epoch": self.epoch,
            "row": 0,
            "ids": [],
            "labels": [],
            "yielded": 0,
            "shard": list(shard),
        }
        state, self._resume = self._resume or fresh, None
        if state["shard"] != list(shard):
            raise RecipeError(
                f"the saved state is of shard {state['shard']}, this is {list(shard)}; "
                "resume with as many workers and ranks"
            )
        rows = self._rows(state["row"], shard)
        while True:
            ids, labels, count = self._read_buffer(rows)
            if not count and self.infinite:
                if not state["row"]:
                    raise FormatError("an infinite ConstantLengthDataset over no rows; give it data")
                state = {**state, "epoch": state["epoch"] + 1, "row": 0, "yielded": 0}
                rows = self._rows(0, shard)
                continue
            ids, labels = state["ids"] + ids, state["labels"] + labels
            if not count and ids:
                fill = -len(ids) % self.seq_length
                ids, labels = ids + [self.concat_token_id] * fill, labels + [IGNORED] * fill
            full = len(ids) // self.seq_length
            order = np.arange(full)
            if self.shuffle:
                order = np.random.default_rng((self.seed, state["epoch"], shard[0], state["row"])).permutation(full)
            for number in order[state["yielded"] :].tolist():
                window = slice(number * self.seq_length, (number + 1) * self.seq_length)
                state = {**state, "yielded": state["yielded"] + 1}
                self._state = state
                yield {"input_ids": torch.tensor(ids[window]), "labels": torch.tensor(labels[window])}
            if not count:
                return
            rest = slice(full * self.seq_length, None)
            state = {
                **state,
                "row": state["row"] + count,
                "ids": ids[rest],
                "labels": labels[rest],
                "yielded": 0,
            }
