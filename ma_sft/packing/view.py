"""Labelled rows -> packs: a plan, and a data set through which it is read."""

import logging
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from ma_sft.data.load import fingerprint_of
from ma_sft.packing.packs import COLUMNS, Packs, flatten, numbers_of_packs, packs_of, tokens_of
from ma_sft.packing.plan import arrange, check_settings, documents
from ma_sft.packing.report import PackingReport, make_report

logger = logging.getLogger(__name__)


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

    Give the result to `SFTTrainer` with `padding_free=True, max_length=None` and
    `dataset_kwargs={"skip_prepare_dataset": True}`: its collator turns `seq_lengths` into position ids that restart
    at each document, by which every attention backend keeps documents apart. Other columns do not survive packing.

    Args:
        dataset: rows with `input_ids` and `labels`, lists of whole numbers of the same length. Without `labels` every
            token is trained. A streaming data set is packed buffer by buffer.
        seq_length: room of one pack, in tokens.
        strategy: "bfd" (best-fit decreasing over the whole data set), "bfd_split", "wrapped" (documents are joined,
            cut every `seq_length` tokens, and see each other), "none" (one document in each row).
        overflow: a longer document is "cut", "split", left out with "drop", cut at its beginning with "keep_end", or
            loses its oldest turns with "keep_answer". By default "bfd_split" and "wrapped" split, the others cut.
        seed: decides which documents of one length meet, and the order of the packs; None keeps the source's order.
        end_token_ids: tokens that end an answer, by which the report knows one that ends right at the cut.
        buffer_size: rows that a streaming data set packs at a time.
        keep_in_memory, cache_file_name: those of `flatten`; where one is given, the packs are written.

    Returns:
        A data set of `input_ids`, `labels` and `seq_lengths`, the lengths of the documents in each pack. It holds
        numbers of packs, and gathers tokens from `dataset` when a pack is read.

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
    tokens = tokens_of(dataset)
    overflow = check_settings(seq_length, strategy, overflow)
    kept = documents(tokens.lengths, seq_length, overflow, partial(tokens.last_answers, seq_length=seq_length))
    labelled = kept
    if drop_unlabelled:
        labels = np.bincount(kept.row, weights=tokens.trained(kept), minlength=len(tokens.lengths))
        labelled = kept.take(np.flatnonzero(labels[kept.row]))
    plan = arrange(labelled, seq_length, strategy, seed, groups)
    report = make_report(tokens, kept, plan, (strategy, overflow, seq_length), batch_size, end_token_ids)
    settings = (fingerprint_of(dataset), seq_length, strategy, overflow, seed, drop_unlabelled, groups)
    name = Hasher.hash(settings)
    packs = numbers_of_packs(np.arange(len(plan.bounds) - 1), name)
    return packs.with_transform(Packs(dataset.select_columns(names), tokens, plan, name)), report


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
    found = replace(cast(Packs, packs_of(packs)), arrays=True)
    return pa.table(found.read(np.arange(len(packs))), schema=found.features.arrow_schema)
