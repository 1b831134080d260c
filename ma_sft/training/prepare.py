"""A recipe's rows -> the data set that `SFTTrainer` takes as it is: labelled, cut, and packed if asked."""

import re
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from ma_sft.config import Settings
from ma_sft.data.stages import Stage
from ma_sft.errors import LabelError, RecipeError
from ma_sft.labels.check import CheckReport
from ma_sft.labels.tokenize import Counts, Labelled, _mixture, check, label, make_encoder
from ma_sft.packing.pack import (
    PackingReport,
    Tokens,
    check_settings,
    lengths,
    pack_table,
    pack_with_report,
    packs_of,
)
from ma_sft.packing.truncation import truncate
from ma_sft.training.distributed import ROWS_AT_A_TIME, digest, endless_stream, once

SHOWN_ROWS = 4  # in the report
STREAM_BUFFER = 10_000  # sequences of a stream that are packed together


@dataclass
class Prepared:
    """The data set to train on or to measure, the counts, and what the check and packing said.

    Attributes:
        stages: conversion and filters, with what each removed.
        sample: the first rows before they are cut: `input_ids`, `labels`, `row`.
        lengths: a histogram of all rows' lengths before they are cut, in tokens.
        conversations: of held-out rows, what they were made from.
        sources: the source of each held-out row or pack; empty for training rows.
        order: what the rows of a step depend on beside the settings: the processes that share them, and of a stream,
            whose rows are counted only when it is read, all that its order does.
    """

    dataset: Dataset | IterableDataset
    counts: Counts
    check: CheckReport | None
    packing: PackingReport | None
    stages: list[Stage]
    sample: list[dict[str, Any]]
    lengths: dict[str, Any]
    conversations: Dataset | None = None
    sources: list[str] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Hash of all ids, labels and borders of documents."""
        return digest(self.dataset)

    def metric_names(self) -> dict[str, str]:
        """Of held-out rows: the name of a source among an evaluation's figures (`eval_NAME_loss`) -> the source."""
        sources = dict.fromkeys(self.sources)
        names = {re.sub(r"[^\w-]+", "_", Path(source).stem): source for source in sources}
        if len(names) < len(sources):  # files of one name in several folders
            names = {re.sub(r"[^\w-]+", "_", source): source for source in sources}
        return names

    def by_source(self, given: list[str] | None = None) -> Dataset | dict[str, Dataset]:
        """The held-out rows as a trainer takes them: of several sources, or `given` ones, those of each by its name."""
        rows: Any = self.dataset
        names, sources = self.metric_names(), np.array(self.sources)
        if given:
            names = {name: name for name in given if name in self.sources}
        elif len(names) < 2:
            return rows
        return {name: rows.select(np.flatnonzero(sources == source)) for name, source in names.items()}


def prepare(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    held_out: bool = False,
    given: dict[str, Dataset] | None = None,
) -> Prepared:
    """Load, label, cut and pack the recipe's rows (those held out only if `eval_packing` says so).

    Args:
        given: rows of `input_ids` and `labels` by source that take the recipe's place; they are cut and packed, not
            verified.

    Raises:
        MaSftError: a source, row, template or label that is wrong; the message says which.
    """
    if given is not None:
        rows = concatenate_datasets([part.select_columns(["input_ids", "labels"]) for part in given.values()])
        labelled = Labelled(rows, Counts(rows=len(rows)))
    elif settings.rows.dataset_streaming and not held_out:
        return _prepare_stream(settings, tokenizer)
    else:
        labelled = label(settings, tokenizer, held_out=held_out)
    rows, counts, training = labelled.dataset, labelled.counts, settings.training
    if len(rows) == 0:
        raise LabelError("the data set is empty: no rows to train on")
    verified = settings.labels.check and not held_out and given is None
    report = _check(settings, tokenizer, labelled) if verified else None
    sources = np.repeat([*given], [len(part) for part in given.values()]) if given else np.full(len(rows), "held-out")
    if held_out and labelled.conversations is not None:
        sources = np.array(labelled.conversations["source"])[rows["row"]]
    how = _how_to_pack(settings, rows, held_out)
    packing = how["strategy"] != "none"
    groups = sources if packing and held_out else None  # a source's loss is measured by itself
    dataset, packed = pack_with_report(rows, **how, groups=groups)
    packs: Any = packs_of(dataset)
    kept = packs.plan.documents
    if not len(kept.row):
        raise LabelError(
            f"no row has anything to train on within max_length={how['seq_length']}: raise it, or look for assistant "
            "turns with `ma-sft preview`"
        )
    counts.sequences, counts.cut_sequences = len(np.unique(kept.row)), packed.rows_cut
    counts.dropped_sequences = packed.rows - counts.sequences
    counts.tokens, counts.trained_tokens = packed.tokens, int(packs.tokens.trained(kept).sum())
    if training.dataloader_drop_last and not held_out:
        counts.left_out_of_each_epoch = len(dataset) % (training.per_device_train_batch_size * training.world_size)
    prepared = Prepared(dataset, counts, report, packed if packing else None, labelled.stages, *_look(labelled))
    prepared.order = {"processes": _readers(training)}
    if held_out:
        first = packs.plan.pieces.row[packs.plan.bounds[:-1]]  # of each pack
        prepared.conversations, prepared.sources = labelled.conversations, sources[first].tolist()
    return prepared


def _how_to_pack(settings: Settings, rows: Dataset | None, held_out: bool = False) -> dict[str, Any]:
    """The arguments of `pack_with_report`; without `max_length`, the longest of the rows sets the limit."""
    training, overflow = settings.training, settings.labels.overflow
    packing = training.eval_packing if held_out else training.packing
    strategy, limit = training.packing_strategy if packing else "none", training.max_length
    if overflow is None and training.truncation_mode == "keep_end" and strategy in ("none", "bfd"):
        overflow = "keep_end"
    if limit is None and rows is not None:
        limit = max(1, int(lengths(rows).max(initial=1)))
    return {"seq_length": limit, "strategy": strategy, "overflow": overflow, "drop_unlabelled": True}


def _kept(settings: Settings, rows: Dataset) -> Any:
    """What `max_length` and `overflow` leave of labelled rows, as `Spans`."""
    how, tokens = _how_to_pack(settings, rows), Tokens(rows)
    overflow = check_settings(how["seq_length"], how["strategy"], how["overflow"])
    return truncate(tokens.lengths, tokens.label_runs, how["seq_length"], overflow)


def check_as_trained(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, labelled: Labelled, *, every_row: bool = False
) -> CheckReport:
    """Prove the labels of the rows as they are trained; see `ma_sft.labels.tokenize.check`."""
    return check(settings, tokenizer, labelled, every_row=every_row, kept=_kept(settings, labelled.dataset))


def _check(settings: Settings, tokenizer: PreTrainedTokenizerBase, labelled: Labelled) -> CheckReport:
    report = check_as_trained(settings, tokenizer, labelled)
    report.raise_errors()
    return report


def as_trained(settings: Settings, labelled: Labelled, n: int) -> list[dict[str, Any]]:
    """The first rows as training has them after `max_length`; `cut` says of a row which of its tokens are left."""
    rows = labelled.first(n)
    kept, shown = _kept(settings, labelled.dataset.select(range(len(rows)))), []
    for number, start, length in zip(kept.row.tolist(), kept.start.tolist(), kept.length.tolist(), strict=True):
        row, end = rows[number], start + length
        whole = len(row["input_ids"])
        left = f"tokens {start + 1:,} to {end:,} of {whole:,}" if length < whole else None
        shown.append({**row, **{name: row[name][start:end] for name in ("input_ids", "labels")}, "cut": left})
    return shown


def prepare_once(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset | None = None,
    test: dict[str, Dataset] | None = None,
) -> tuple[Prepared, Prepared | None]:
    """Training and held-out rows, prepared by one process per machine; the others read the Arrow files it wrote.

    A stream is read by each process, which then keeps its share.

    Args:
        train: labelled rows that take the recipe's place.
        test: the same for those held out, by source.

    Raises:
        MaSftError: `prepare`'s, in every process alike.
    """

    if train is not None and settings.rows.test_size:
        raise RecipeError("test_size: rows that have labels already are not split; pass eval_dataset, too")

    def make() -> tuple[Prepared, Prepared | None]:
        data = prepare(settings, tokenizer, given={"train": train} if train is not None else None)
        holds_out = test is not None or settings.rows.eval_dataset or settings.rows.test_size
        return data, prepare(settings, tokenizer, held_out=True, given=test) if holds_out else None

    return make() if settings.rows.dataset_streaming else once(make, per_machine=True)


def _prepare_stream(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The recipe's rows as an `IterableDataset` that reads, labels, cuts and packs while it is read.

    Its labels cannot all be checked before training: the first `STREAM_SAMPLE` are.
    """
    training = settings.training
    if settings.labels.formatting_func:
        raise RecipeError("dataset_streaming and formatting_func do not go together; leave one of them out")
    sample = label(settings, tokenizer)
    report = _check(settings, tokenizer, sample) if settings.labels.check else None
    buffer, batch = STREAM_BUFFER if training.packing else ROWS_AT_A_TIME, training.per_device_train_batch_size
    order = {"processes": _readers(training), "per_device_train_batch_size": batch, "buffer": buffer}
    encode = make_encoder(settings, tokenizer).tokenize_batch
    pack = partial(pack_table, seed=training.seed, **_how_to_pack(settings, None))
    stream = endless_stream(_mixture(settings).train, encode, pack, buffer)
    return Prepared(stream, sample.counts, report, None, sample.stages, *_look(sample), order=order)


def _readers(training: SFTConfig) -> int:
    """The processes that share the rows of a step; others may share each row."""
    others = training.parallelism_config.non_data_parallel_size if training.parallelism_config else 1
    return int(training.world_size // others)


def _look(labelled: Labelled) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the report shows of the rows: the first ones, and a histogram of lengths in tokens."""
    tokens = lengths(labelled.dataset)
    edges = np.unique(np.linspace(tokens.min(), tokens.max() + 1, 25).astype(int))
    median, p99 = (int(np.percentile(tokens, q, method="inverted_cdf")) for q in (50, 99))
    return labelled.first(SHOWN_ROWS), {
        "rows": np.histogram(tokens, edges)[0].tolist(),
        "edges": edges.tolist(),
        "median": median,
        "p99": p99,
        "longest": int(tokens.max()),
    }
