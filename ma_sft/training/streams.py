"""A stream for several loader workers and processes: each row of an epoch is read once, whatever the files.

`datasets` and accelerate share out files, and a worker whose file is short would begin it again while another is still
at its first. Here each worker reads all rows, and labels those that are its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import dill
import numpy as np
import pyarrow as pa
from datasets import Features, IterableDataset
from trl import SFTConfig

from ma_sft.errors import LabelError, RecipeError

ROWS_AT_A_TIME = 1000


@dataclass
class Order:
    """What the order of a stream's rows depends on, beside the rows and the seed: kept with each checkpoint.

    No loader worker counts as one: the order is the same.
    """

    dataloader_num_workers: int
    processes: int
    per_device_train_batch_size: int
    buffer: int

    @classmethod
    def of(cls, training: SFTConfig, buffer: int) -> "Order":
        """That of a run.

        Raises:
            RecipeError: a setting with which accelerate would share out the stream in another way.
        """
        if training.accelerator_config.split_batches:
            raise RecipeError("dataset_streaming does not go with split_batches; give each process batches of its own")
        others = training.parallelism_config.non_data_parallel_size if training.parallelism_config else 1
        workers, batch_size = max(1, training.dataloader_num_workers), training.per_device_train_batch_size
        return cls(workers, training.world_size // others, batch_size, buffer)

    def parts(self) -> list[int]:
        """The parts in the order in which accelerate gives them to processes and `datasets` to workers.

        Process and worker of part n read batches n, n + parts, ... of the stream: those that the loader hands to them.
        """
        return [
            worker * self.processes + rank
            for rank in range(self.processes)
            for worker in range(self.dataloader_num_workers)
        ]


@dataclass
class Share:
    """The generator of one part of a stream: its rows, labelled and packed, epoch after epoch in another order.

    Attributes:
        rows: the stream.
        label: rows and their numbers -> `input_ids` and `labels`.
        pack: a table of labelled rows -> a table of packs.
        parts: how many parts there are.
        block: neighbouring rows that stay in one part.
        buffer: labelled rows that are packed together.
    """

    rows: IterableDataset
    label: Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]]
    pack: Callable[[pa.Table], pa.Table]
    parts: int
    block: int
    buffer: int

    def __reduce__(self) -> tuple[Any, ...]:
        # Loader workers that are not forked get the stream pickled, and `pickle` knows no local function.
        return _unpickle, (dill.dumps(self.__dict__, recurse=True),)

    def __call__(self, part: list[int]) -> Iterator[dict[str, Any]]:
        rows = self.rows.with_format(None)  # workers share the epoch of the data set that they were given
        first = empty = 0
        # Without an end: a resumed run finds its place by counting batches from the start.
        for epoch in count():
            rows.set_epoch(epoch)
            before, empty = first, empty + 1
            waiting: dict[str, list[Any]] = {"input_ids": [], "labels": []}
            for batch in chain(rows.iter(ROWS_AT_A_TIME), [{}]):  # the end of the epoch is a batch of nothing
                numbers = np.arange(first, first + len(next(iter(batch.values()), ())))
                first += len(numbers)
                mine = np.flatnonzero(numbers // self.block % self.parts == part[0])
                own = {name: [values[row] for row in mine] for name, values in batch.items()}
                labelled = self.label(own, numbers[mine].tolist()) if batch else {}
                for name, values in waiting.items():
                    values += labelled.get(name, [])
                if not batch or len(waiting["labels"]) >= self.buffer:
                    for pack in self._packs(waiting):
                        empty = 0
                        yield pack
            if first == before or empty > self.parts:
                raise LabelError("the stream has no row with anything to train on")

    def _packs(self, waiting: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
        table = pa.table({name: pa.array(values, pa.list_(pa.int64())) for name, values in waiting.items()})
        for values in waiting.values():
            values.clear()
        for batch in self.pack(table).to_batches(100):
            yield from batch.to_pylist()


def _unpickle(state: bytes) -> Share:
    return Share(**dill.loads(state))


def share_out(share: Share, order: Order, features: Features) -> IterableDataset:
    """The stream that a trainer's loader reads, one part for each worker of each process."""
    return IterableDataset.from_generator(share, gen_kwargs={"part": order.parts()}, features=features)
