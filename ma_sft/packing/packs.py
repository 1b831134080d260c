"""Packs that are read through a data set: tokens stay where they were written, and are gathered on the way."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from ma_sft.data.load import fingerprint_of, pklregister, table_rows
from ma_sft.packing.pieces import Ints
from ma_sft.packing.plan import Plan
from ma_sft.packing.tokens import IGNORED, Tokens

COLUMNS = ("input_ids", "labels", "seq_lengths")


@dataclass(eq=False)
class Packs:
    """The transform of a data set whose columns hold numbers of packs: it puts what a pack holds in the number's place.

    Attributes:
        source: the rows.
        tokens: theirs.
        plan: what each pack holds. A pack without a piece is one padding token without a label.
        fingerprint: of rows and plan.
        arrays: give tokens and labels as NumPy arrays, not as lists.
        pad_token_id: the padding token.
    """

    source: datasets.Dataset
    tokens: Tokens
    plan: Plan
    fingerprint: str
    arrays: bool = False
    pad_token_id: int = 0

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        # A column without numbers was written by `map`, and stays as it is.
        numbers = {name: batch[name] for name in COLUMNS if batch.get(name) and isinstance(batch[name][0], int)}
        read = self.read(np.array(next(iter(numbers.values())))) if numbers else {}
        return {**batch, **{name: read[name] for name in numbers}}

    def read(self, packs: Ints) -> dict[str, list[Any]]:
        """What these packs hold, by column."""
        bounds = self.plan.bounds
        each = list(zip(bounds[packs].tolist(), bounds[packs + 1].tolist(), strict=True))
        pieces = self.plan.pieces.take(np.concatenate([np.arange(0), *(np.arange(*ends) for ends in each)]))
        piece = np.cumsum([0, *(end - begin for begin, end in each)])
        token = np.concatenate([[0], np.cumsum(pieces.length)])[piece]
        lengths = _parts(pieces.length, piece, 1) if self.plan.apart else np.maximum(np.diff(token), 1).reshape(-1, 1)
        ids = _parts(self.tokens.ids.gather(pieces), token, self.pad_token_id)
        labels = _parts(self.tokens.labels.gather(pieces), token, IGNORED)
        ids, labels = (_arrays(ids), _arrays(labels)) if self.arrays else (_lists(ids), _lists(labels))
        return {"input_ids": ids, "labels": labels, "seq_lengths": _lists(lengths)}

    @property
    def features(self) -> datasets.Features:
        """Of the packs as they are read."""
        types = (self.tokens.ids.type, self.tokens.labels.type, pa.int32())
        return datasets.Features(
            {name: datasets.List(datasets.Value(str(type))) for name, type in zip(COLUMNS, types, strict=True)}
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tokens": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, tokens=tokens_of(state["source"]))

    def __deepcopy__(self, memo: Any) -> "Packs":
        return self  # `datasets` copies a format with each data set, and nothing here is ever changed


# For hashing alone: without it, `datasets` would hash all tokens that are in memory.
@pklregister(Packs)  # type: ignore[untyped-decorator]
def _hash(pickler: Any, packs: Packs) -> None:
    pickler.save_reduce(str, (f"{packs.fingerprint} {packs.arrays} {packs.pad_token_id}",), obj=packs)


def tokens_of(source: datasets.Dataset) -> Tokens:
    rows = table_rows(source)
    return Tokens(source.data, slice(None) if rows is None else rows)


def _parts(values: NDArray[Any], bounds: Ints, filler: int) -> list[NDArray[Any]]:
    fill = np.array([filler], dtype=values.dtype)
    return [values[begin:end] if end > begin else fill for begin, end in pairwise(bounds.tolist())]


def _lists(arrays: Iterable[NDArray[Any]]) -> list[Any]:
    return [array.tolist() for array in arrays]


def _arrays(arrays: Iterable[NDArray[Any]]) -> list[Any]:
    return [array.astype(np.int64) for array in arrays]  # what a loss expects of labels


def numbers_of_packs(packs: Ints, fingerprint: str) -> datasets.Dataset:
    return datasets.Dataset(pa.table(dict.fromkeys(COLUMNS, pa.array(packs))), fingerprint=fingerprint)


def packs_of(dataset: datasets.Dataset) -> Packs | None:
    """What `pack` put into a data set, None for others."""
    transform = dataset.format["format_kwargs"].get("transform")
    return transform if isinstance(transform, Packs) else None


def as_arrays(dataset: Any) -> Any:
    """The same rows as NumPy arrays of int64, of which a collator makes tensors several times as fast as of lists.

    A stream is given back as it is.
    """
    if isinstance(dataset, datasets.IterableDataset):
        return dataset
    packs = packs_of(dataset)
    return dataset.with_transform(replace(packs, arrays=True)) if packs else dataset.with_format("numpy")


def lengths(dataset: datasets.Dataset) -> Ints:
    """The number of tokens in each pack, or in each row of a data set without packs; int64, shape (rows,)."""
    packs = packs_of(dataset)
    if packs is None:
        return tokens_of(dataset).lengths
    tokens = np.concatenate([[0], np.cumsum(packs.plan.pieces.length)])[packs.plan.bounds]
    return cast(Ints, np.diff(tokens)[dataset.with_format("numpy")["input_ids"][:]])


def fill(dataset: datasets.Dataset, count: int, pad_token_id: int) -> datasets.Dataset:
    """The packs, and `count` more of one padding token without a label."""
    packs = cast(Packs, packs_of(dataset))
    bounds = packs.plan.bounds
    plan = replace(packs.plan, bounds=np.append(bounds, bounds[-1]))
    fingerprint = Hasher.hash((packs.fingerprint, "filled"))
    empty = numbers_of_packs(np.full(count, len(bounds) - 1), fingerprint)
    filled = datasets.concatenate_datasets([dataset.with_format(None), empty])
    return filled.with_transform(replace(packs, plan=plan, fingerprint=fingerprint, pad_token_id=pad_token_id))


def flatten(
    packed: datasets.Dataset, *, keep_in_memory: bool = False, cache_file_name: str | None = None
) -> datasets.Dataset:
    """Real packs: the tokens of `pack`'s result once more, in one Arrow file, in the order of the packs.

    Args:
        packed: the result of `pack`.
        keep_in_memory: hold them in memory; a data set in memory stays there anyway.
        cache_file_name: the file to write; by default beside the rows, where the same call finds it again.

    Returns:
        `input_ids`, `labels` (dtypes of the rows) and `seq_lengths` (int32).
    """
    packs = cast(Packs, packs_of(packed))
    name = Hasher.hash((fingerprint_of(packed), "flatten"))
    if not keep_in_memory and cache_file_name is None and (files := packs.source.cache_files):
        cache_file_name = str(Path(files[0]["filename"]).with_name(f"packs-{name}.arrow"))
    return (
        as_arrays(packed)
        .map(
            dict,
            batched=True,
            features=packs.features,
            keep_in_memory=keep_in_memory,
            cache_file_name=cache_file_name,
            new_fingerprint=name,
            desc="writing packs",
        )
        .with_format(None)
    )
