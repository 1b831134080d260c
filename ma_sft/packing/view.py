"""Labelled rows as packs: tokens stay where they were written, and are gathered when a pack is read."""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from datasets.utils._dill import pklregister
from numpy.typing import NDArray

from ma_sft.packing.plan import Ints, Plan, arrange, check_settings, documents
from ma_sft.packing.report import PackingReport, make_report
from ma_sft.packing.tokens import IGNORED, Tokens

logger = logging.getLogger(__name__)

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
        if not self.arrays:
            ids, labels = _lists(ids), _lists(labels)
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
        self.__dict__.update(state, tokens=_tokens(state["source"]))

    def __deepcopy__(self, memo: Any) -> "Packs":
        return self  # `datasets` copies a format with each data set, and nothing here is ever changed


# For hashing alone: without it, `datasets` would hash all tokens that are in memory.
@pklregister(Packs)  # type: ignore[untyped-decorator]
def _hash(pickler: Any, packs: Packs) -> None:
    pickler.save_reduce(str, (f"{packs.fingerprint} {packs.arrays} {packs.pad_token_id}",), obj=packs)


def _tokens(source: datasets.Dataset) -> Tokens:
    # A shuffled or filtered data set is a table and a list of its rows; `flatten_indices` would copy it all.
    rows = source._indices
    return Tokens(source.data, slice(None) if rows is None else rows.column(0).to_numpy().astype(np.int64))


def _parts(values: NDArray[Any], bounds: Ints, filler: int) -> list[NDArray[Any]]:
    fill = np.array([filler], dtype=values.dtype)
    return [values[begin:end] if end > begin else fill for begin, end in pairwise(bounds.tolist())]


def _lists(arrays: Iterable[NDArray[Any]]) -> list[Any]:
    return [array.tolist() for array in arrays]


def pack(
    dataset: datasets.Dataset | datasets.IterableDataset,
    seq_length: int,
    strategy: str = "bfd",
    *,
    overflow: str | None = None,
    seed: int | None = 42,
    end_token_ids: Collection[int] | None = None,
    buffer_size: int = 10_000,
    keep_in_memory: bool | None = None,
    cache_file_name: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Put tokenised documents together in rows of at most `seq_length` tokens.

    The result goes to `SFTTrainer` with `padding_free=True, max_length=None, packing=False` and
    `dataset_kwargs={"skip_prepare_dataset": True}`: its collator turns `seq_lengths` into position ids that restart
    at each document, by which every attention backend keeps documents apart. No other columns survive packing.

    Args:
        dataset: rows with `input_ids` and `labels`, lists of whole numbers of the same length. Without
            `labels` every token is trained. A streaming data set is packed buffer by buffer.
        seq_length: room of one pack, in tokens.
        strategy: "bfd" is best-fit decreasing over the whole data set; "bfd_split" the same with long
            documents split; "wrapped" joins all documents and cuts every `seq_length` tokens, so that
            documents in one pack see each other and are cut in two; "none" keeps one document in each row.
        overflow: a document longer than `seq_length` is "cut", "split" into several, left out with "drop", cut at
            its beginning with "keep_end", or loses its oldest turns so that the last answer stays with
            "keep_answer". The default is "split" for "bfd_split" and "wrapped", else "cut".
        seed: decides which documents of one length meet, and the order of the packs; None keeps the source's
            order.
        end_token_ids: tokens that end an answer; with them the report tells an answer cut short from one
            that ends right at the cut.
        buffer_size: rows that a streaming data set packs at a time.
        keep_in_memory, cache_file_name: those of `flatten`; where one is given, the packs are written there.

    Returns:
        A data set with `input_ids` and `labels` (lists of whole numbers) and `seq_lengths`, the lengths of the
        documents in each pack. It holds numbers of packs; tokens are gathered from `dataset` when a pack is read.
        `pack_with_report` gives the counts too, `as_arrays` what a trainer reads fastest, `flatten` real packs.

    Raises:
        RecipeError: settings that are unknown or contradict each other.
        FormatError: rows that are not tokenised.
        LabelError: a row whose labels do not fit its tokens.
    """
    settings: dict[str, Any] = {"overflow": overflow, "seed": seed, "end_token_ids": end_token_ids}
    if isinstance(dataset, datasets.IterableDataset):
        check_settings(seq_length, strategy, overflow)
        buffer = partial(pack_table, seq_length=seq_length, strategy=strategy, **settings)
        names = dataset.column_names or list(next(iter(dataset)))
        extra = [name for name in names if name not in COLUMNS]
        stream = dataset.with_format("arrow")
        return stream.map(buffer, batched=True, batch_size=buffer_size, remove_columns=extra).with_format(None)
    packs, _ = pack_with_report(dataset, seq_length, strategy, **settings)
    if keep_in_memory is None and cache_file_name is None:
        return packs
    return flatten(packs, keep_in_memory=bool(keep_in_memory), cache_file_name=cache_file_name)


def pack_with_report(
    dataset: datasets.Dataset,
    seq_length: int,
    strategy: str = "bfd",
    *,
    overflow: str | None = None,
    seed: int | None = 42,
    end_token_ids: Collection[int] | None = None,
    batch_size: int = 8,
    drop_unlabelled: bool = False,
    groups: NDArray[Any] | None = None,
) -> tuple[datasets.Dataset, PackingReport]:
    """`pack` for a data set that is not a stream, and what it did.

    Args:
        batch_size: rows per batch that the report's padding, steps and speed-up assume.
        drop_unlabelled: leave out the rows of which no label is left.
        groups: the group of each row; rows of different groups share no pack.

    The other arguments, the result and the errors are those of `pack`.
    """
    names = [name for name in COLUMNS[:2] if name in dataset.column_names]
    tokens = _tokens(dataset)
    overflow = check_settings(seq_length, strategy, overflow)
    kept = documents(tokens.lengths, seq_length, overflow, partial(tokens.last_answers, seq_length=seq_length))
    labelled = kept
    if drop_unlabelled:
        labels = np.bincount(kept.row, weights=tokens.trained(kept), minlength=len(tokens.lengths))
        labelled = kept.take(np.flatnonzero(labels[kept.row]))
    plan = arrange(labelled, seq_length, strategy, seed, groups)
    report = make_report(tokens, kept, plan, (strategy, overflow, seq_length), batch_size, end_token_ids)
    # The fingerprint of the rows has no public name.
    settings = (dataset._fingerprint, seq_length, strategy, overflow, seed, drop_unlabelled, groups)
    fingerprint = Hasher.hash(settings)
    packs = _numbers(np.arange(len(plan.bounds) - 1), fingerprint)
    return packs.with_transform(Packs(dataset.select_columns(names), tokens, plan, fingerprint)), report


def _numbers(packs: Ints, fingerprint: str) -> datasets.Dataset:
    return datasets.Dataset(pa.table(dict.fromkeys(COLUMNS, pa.array(packs))), fingerprint=fingerprint)


def pack_table(
    table: pa.Table, seq_length: int, strategy: str, drop_unlabelled: bool = False, **settings: Any
) -> pa.Table:
    """A buffer of a stream's rows, as a table of packs; what is cut or left out is logged."""
    rows = datasets.Dataset(pa.table(table), fingerprint="buffer")
    packs, report = pack_with_report(rows, seq_length, strategy, drop_unlabelled=drop_unlabelled, **settings)
    if report.rows_cut or report.rows_dropped:
        logger.warning(
            "packing %d rows: %d cut (%d without a label, %d unfinished), %d dropped, %d empty",
            *(report.rows, report.rows_cut, report.rows_unlabelled),
            *(report.rows_unfinished, report.rows_dropped, report.rows_empty),
        )
    found = cast(Packs, packs_of(as_arrays(packs)))
    return pa.table(found.read(np.arange(len(packs))), schema=found.features.arrow_schema)


def packs_of(dataset: datasets.Dataset) -> Packs | None:
    """What `pack` put into a data set, None for others."""
    transform = dataset.format["format_kwargs"].get("transform")
    return transform if isinstance(transform, Packs) else None


def as_arrays(dataset: Any) -> Any:
    """The same rows as NumPy arrays, of which a collator makes tensors several times as fast as of lists.

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
        return _tokens(dataset).lengths
    tokens = np.concatenate([[0], np.cumsum(packs.plan.pieces.length)])[packs.plan.bounds]
    return cast(Ints, np.diff(tokens)[dataset.with_format("numpy")["input_ids"][:]])


def fill(dataset: datasets.Dataset, count: int, pad_token_id: int) -> datasets.Dataset:
    """The packs, and `count` more of one padding token without a label."""
    packs = cast(Packs, packs_of(dataset))
    bounds = packs.plan.bounds
    plan = replace(packs.plan, bounds=np.append(bounds, bounds[-1]))
    fingerprint = Hasher.hash((packs.fingerprint, "filled"))
    empty = _numbers(np.full(count, len(bounds) - 1), fingerprint)
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
    name = Hasher.hash((packed._fingerprint, "flatten"))
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
