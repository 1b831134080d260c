"""Several processes and loader workers: who prepares the data, do all have the same, and who reads what of a stream.

Objects travel between the processes of one run over gloo on the CPU, beside whatever the training uses: a group of
its own may wait for hours of tokenising, which would be a dead rank to NCCL.

`datasets` and accelerate share out the files of a stream, and a worker whose file is short would begin it again while
another is still at its first. Here each worker reads all rows, and labels those that are its own.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from itertools import chain, count
from typing import Any, TypeVar

import dill
import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, concatenate_datasets
from transformers.integrations.deepspeed import HfDeepSpeedConfig, deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import import_utils
from trl import SFTConfig

from ma_sft.errors import LabelError, MaSftError, RecipeError, RunError
from ma_sft.packing.pack import as_arrays, fill, packs_of
from ma_sft.utils import say

ROWS_AT_A_TIME = 1000  # of a stream


T = TypeVar("T")


def available_attention(wanted: str | None) -> str | None:
    """The wanted attention, or SDPA, which gives the same, where a FlashAttention is wanted and missing."""
    found = True
    if version := re.fullmatch(r"flash_attention_(\d)", wanted or ""):
        found = getattr(import_utils, f"is_flash_attn_{version[1]}_available")(kernels_fallback_ok=True)
    elif "/" in (wanted or ""):
        found = import_utils.is_kernels_available()
    if not found and PartialState().is_main_process:
        _say_once(f"{wanted} is not installed for this machine: attention by PyTorch's SDPA instead")
    return wanted if found else "sdpa"


@lru_cache
def _say_once(line: str) -> None:
    """For what the rehearsal and the run both come across."""
    say(line)


@functools.cache
def _cpu_group() -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def gather(value: T) -> list[T]:
    """The `value` of every process, by rank; waits for the last one."""
    state = PartialState()
    if state.num_processes == 1:
        return [value]
    values: list[Any] = [None] * state.num_processes
    dist.all_gather_object(values, value, group=_cpu_group())
    return values


def largest(value: int) -> int:
    """The largest `value` of all processes."""
    if PartialState().num_processes == 1:
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_cpu_group())
    return int(tensor)


def once(make: Callable[[], T], *, per_machine: bool = False) -> T:
    """Call `make` in the first process of the run (or of each machine) and give its result to the others.

    Raises:
        MaSftError: what `make` raised, in every process alike.
    """
    state = PartialState()
    result: T | None = None
    error: MaSftError | None = None
    if state.is_local_main_process if per_machine else state.is_main_process:
        try:
            result = make()
        except MaSftError as raised:
            error = raised
    everyone = gather((result, error))
    for _, error in everyone:
        if error is not None:
            raise error
    return everyone[state.process_index - state.local_process_index if per_machine else 0][0]  # type: ignore[return-value]


_kept: list[Any] = []  # transformers holds its DeepSpeed configuration by a weak reference


@contextmanager
def outside_zero3() -> Iterator[None]:
    """Models that are made inside are whole and where they are asked to be, also while ZeRO-3 splits all others."""
    config = deepspeed_config()
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            _kept[:] = [HfDeepSpeedConfig(config)]


def leave_together() -> None:
    """Wait for the last process and close the connections: what others still need does not vanish."""
    gather(None)
    if dist.is_initialized():
        _cpu_group.cache_clear()
        dist.destroy_process_group()


def digest(*datasets: Dataset | IterableDataset | None) -> str:
    """Hash of all token ids, labels and document borders in their order: of data, template and labels at once.

    Of a stream, the first hundred rows.
    """
    content = hashlib.sha256()
    for dataset in datasets:
        if dataset is None:
            continue
        if isinstance(dataset, IterableDataset):
            dataset = Dataset.from_list(list(dataset.take(100)))
        for batch in as_arrays(dataset).iter(batch_size=1000):
            for column in sorted(batch):
                content.update(column.encode())
                content.update(np.array([len(row) for row in batch[column]]).tobytes())
                content.update(np.concatenate(batch[column]).tobytes())
    return content.hexdigest()


def agree(mine: str) -> str:
    """The digest, if it is that of all processes.

    Raises:
        RunError: they differ.
    """
    digests = gather(mine)
    if other := [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]:
        raise RunError(
            f"the processes prepared different data: rank 0 has {digests[0][:12]}, rank {other[0]} has "
            f"{digests[other[0]][:12]}; give every machine the same files, tokenizer, template and package versions"
        )
    return mine


def fill_up(dataset: Dataset | IterableDataset, multiple: int, pad_token_id: int) -> Dataset | IterableDataset:
    """Add rows of one padding token without a label until the last batch of all processes is full.

    Without them the sampler would repeat rows of the data set at the end of an epoch, and the order of the rows would
    depend on how many processes share a batch. A stream has no end.
    """
    missing = -len(dataset) % multiple if isinstance(dataset, Dataset) else 0
    if not missing:
        return dataset
    if packs_of(dataset):
        return fill(dataset, missing, pad_token_id)
    row = {"input_ids": [pad_token_id], "labels": [-100]}
    rows = {name: [row[name]] * missing for name in dataset.column_names}
    return concatenate_datasets([dataset, Dataset.from_dict(rows, features=dataset.features)])


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
