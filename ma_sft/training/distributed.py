"""Several processes and loader workers: who prepares the data, do all have the same, and who reads what of a stream.

Objects travel between the processes of one run over gloo on the CPU, beside whatever the training uses: a group of
its own may wait for hours of tokenising, which would be a dead rank to NCCL.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain, count
from typing import Any, TypeVar

import dill
import numpy as np
import torch.distributed as dist
from accelerate import PartialState
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, Features, IterableDataset, List, Value
from torch.utils.data import Sampler
from transformers.integrations.deepspeed import HfDeepSpeedConfig, deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import import_utils

from ma_sft.errors import LabelError, MaSftError, RunError
from ma_sft.packing.pack import COLUMNS, as_arrays, fill, packs_of
from ma_sft.utils import say

ROWS_AT_A_TIME = 1000  # of a stream

T = TypeVar("T")


@functools.cache  # said once, though the rehearsal and the run both ask
def available_attention(wanted: str | None) -> str | None:
    """The wanted attention, or SDPA, which gives the same, where a FlashAttention is wanted and missing."""
    found = True
    if version := re.fullmatch(r"flash_attention_(\d)", wanted or ""):
        found = getattr(import_utils, f"is_flash_attn_{version[1]}_available")(kernels_fallback_ok=True)
    elif "/" in (wanted or ""):
        found = import_utils.is_kernels_available()
    if not found and PartialState().is_main_process:
        say(f"{wanted} is not installed for this machine: attention by PyTorch's SDPA instead")
    return wanted if found else "sdpa"


@functools.cache
def _cpu_group() -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def gather(value: T) -> list[T]:
    """The `value` of every process, by rank; waits for the last one."""
    values: list[Any] = [value] * PartialState().num_processes
    if len(values) > 1:
        dist.all_gather_object(values, value, group=_cpu_group())
    return values


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


def digest(dataset: Dataset | IterableDataset) -> str:
    """Hash of all token ids, labels and document borders in their order: of data, template and labels at once.

    Of a stream, the first hundred rows.
    """
    content = hashlib.sha256()
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


def fill_up(dataset: Any, multiple: int, pad_token_id: int) -> Any:
    """Add packs of one padding token without a label until the last batch of all processes is full.

    Without them accelerate would repeat rows of the data set at the end of an epoch. A stream has no end.
    """
    missing = -len(dataset) % multiple if isinstance(dataset, Dataset) and packs_of(dataset) else 0
    return fill(dataset, missing, pad_token_id) if missing else dataset


class PaddedSampler(Sampler[int]):
    """The rows in the order that they have in one process without padding, and then the rows that `fill_up` added."""

    def __init__(self, rows: int, padding: int, seed: int | None) -> None:
        self.shuffled = SeedableRandomSampler(range(rows), data_seed=seed)
        self.padding = range(rows, rows + padding)

    def __iter__(self) -> Iterator[int]:
        return chain(self.shuffled, self.padding)

    def __len__(self) -> int:
        return len(self.shuffled) + len(self.padding)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.shuffled.set_epoch(epoch)


class Epochs:
    """The generator of a stream's packs, epoch after epoch in another order, without an end.

    A resumed run finds its place by counting batches from the start.
    """

    def __init__(self, packs: IterableDataset) -> None:
        self.packs = packs

    # Loader workers that are not forked get the stream pickled, and `pickle` knows no local function
    def __getstate__(self) -> bytes:
        return dill.dumps(self.packs, recurse=True)  # type: ignore[no-any-return]

    def __setstate__(self, state: bytes) -> None:
        self.packs = dill.loads(state)

    def __call__(self) -> Iterator[dict[str, Any]]:
        packs = self.packs.with_format(None)  # loader workers share the epoch of the data set that they were given
        for epoch in count():
            packs.set_epoch(epoch)
            empty = True
            for batch in packs.iter(100):  # which, unlike `iter(packs)`, gives a loader worker all of them
                empty = False
                for values in zip(*batch.values(), strict=True):
                    yield dict(zip(batch, values, strict=True))
            if empty:
                raise LabelError("the stream has no row with anything to train on")


def endless_stream(rows: IterableDataset, encode: Callable[..., Any], pack: Callable[..., Any], buffer: int) -> Any:
    """The stream that a trainer's loader reads: one shard, of which each process gets its share of every batch.

    So each row comes once an epoch, and the order depends neither on files nor on loader workers. (`datasets` and
    accelerate would share out files, and begin a short one again while another process is still at its first.)

    Args:
        rows: the stream.
        encode: rows and their numbers -> `input_ids` and `labels`.
        pack: a table of labelled rows -> a table of packs.
        buffer: labelled rows that are packed together.
    """
    names = rows.column_names or list(next(iter(rows)))
    labelled = rows.map(encode, batched=True, batch_size=ROWS_AT_A_TIME, with_indices=True, remove_columns=names)
    tables = labelled.select_columns(["input_ids", "labels"]).with_format("arrow")
    features = Features(dict.fromkeys(COLUMNS, List(Value("int64"))))
    packs = tables.map(pack, batched=True, batch_size=buffer, features=features)
    return IterableDataset.from_generator(Epochs(packs), features=features)
