"""A recipe's rows -> the data set that `SFTTrainer` takes as it is: labelled, cut, and packed if asked."""

import re
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from ma_sft.config import Settings
from ma_sft.data.stages import Stage
from ma_sft.errors import LabelError, RecipeError
from ma_sft.labels.report import CheckReport
from ma_sft.labels.tokenize import Counts, Labelled, _mixture, check, label, make_encoder
from ma_sft.packing.pack import (
    COLUMNS,
    IGNORED,
    PackingReport,
    check_settings,
    lengths,
    pack_table,
    pack_with_report,
    packs_of,
)
from ma_sft.training.distributed import Order, Share, digest, once, share_out

SHOWN_ROWS = 4  # in the report
STREAM_BUFFER = 10_000  # sequences of a stream that are packed together


@dataclass
class Prepared:
    """The data set to train on, the conversations it came from, the counts, what the check and packing said.

    A stream knows its conversations and counts only when it was read.
    """

    dataset: Dataset | IterableDataset
    conversations: Dataset | None
    counts: Counts
    check: CheckReport | None
    packing: PackingReport | None
    sources: list[str]  # of each held-out row; empty for training rows
    stages: list[Stage]  # conversion and filters, with what each removed
    sample: list[dict[str, Any]]  # the first rows before they are cut: input_ids, labels, row
    lengths: dict[str, Any]  # a histogram of all rows' lengths before they are cut, in tokens
    order: Order | None = None  # of a stream

    @cached_property
    def digest(self) -> str:
        """Hash of all ids, labels and borders of documents."""
        return digest(self.dataset)

    def metric_names(self) -> dict[str, str]:
        """Of held-out rows: the name of a source among an evaluation's figures (`eval_NAME_loss`) -> the source."""
        sources = list(dict.fromkeys(self.sources))
        names = {re.sub(r"[^\w-]+", "_", Path(source).stem): source for source in sources}
        if len(names) < len(sources):  # files of one name in several folders
            names = {re.sub(r"[^\w-]+", "_", source): source for source in sources}
        return names

    def by_source(self) -> Dataset | dict[str, Dataset]:
        """The held-out rows as a trainer takes them: of several sources, those of each by its name."""
        names: Any = self.metric_names()
        if len(names) < 2:
            return self.dataset
        rows: Any = self.dataset
        return {
            name: rows.select([i for i, of in enumerate(self.sources) if of == source])
            for name, source in names.items()
        }


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
            judged.

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
    report = None
    if len(labelled.dataset) == 0:
        raise LabelError("the data set is empty: no rows to train on")
    if settings.labels.check and not held_out and given is None:
        report = check_as_trained(settings, tokenizer, labelled)
        report.raise_errors()
    dataset, conversations, counts = labelled.dataset, labelled.conversations, labelled.counts
    given = given or {"held-out": dataset}
    sources = np.repeat([*given], [len(part) for part in given.values()])
    if held_out and conversations is not None:
        sources = np.array(conversations["source"])[dataset["row"]]
    how = _how_to_pack(settings, held_out)
    packing = how["strategy"] != "none"
    how["seq_length"] = how["seq_length"] or int(lengths(dataset).max())
    groups = sources if packing and held_out else None  # a source's loss is measured by itself
    dataset, packed = pack_with_report(dataset, **how, groups=groups)
    packs: Any = packs_of(dataset)
    kept = packs.plan.documents
    if not len(kept.row):
        raise _nothing_left(labelled.dataset, how["seq_length"])
    counts.sequences, counts.cut_sequences = len(np.unique(kept.row)), packed.rows_cut
    counts.dropped_sequences = packed.rows - counts.sequences
    counts.tokens, counts.trained_tokens = packed.tokens, int(packs.tokens.trained(kept).sum())
    if settings.training.dataloader_drop_last and not held_out:
        batch = settings.training.per_device_train_batch_size * settings.training.world_size
        counts.left_out_of_each_epoch = len(dataset) % batch
    first = packs.plan.pieces.row[packs.plan.bounds[:-1]]  # of each pack
    return Prepared(
        dataset,
        conversations,
        counts,
        report,
        packed if packing else None,
        sources[first].tolist() if held_out else [],
        labelled.stages,
        *_look(labelled),
    )


def _how_to_pack(settings: Settings, held_out: bool = False) -> dict[str, Any]:
    """The arguments of `pack_with_report`."""
    training, overflow = settings.training, settings.labels.overflow
    packing = training.eval_packing if held_out else training.packing
    if packing and training.max_length is None:
        raise RecipeError("packing needs max_length, the length of a pack in tokens")
    strategy = training.packing_strategy if packing else "none"
    if overflow is None and training.truncation_mode == "keep_end" and strategy in ("none", "bfd"):
        overflow = "keep_end"
    return {
        "seq_length": training.max_length,
        "strategy": strategy,
        "overflow": overflow,
        "drop_unlabelled": True,
    }


def _truncated(settings: Settings, rows: Dataset) -> Dataset:
    """What `max_length` and `overflow` leave of labelled rows, one piece a row."""
    how = _how_to_pack(settings)
    limit = how["seq_length"] or max(1, int(lengths(rows).max(initial=1)))
    overflow = check_settings(limit, how["strategy"], how["overflow"])
    return pack_with_report(rows, limit, "none", overflow=overflow)[0]


def check_as_trained(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, labelled: Labelled, *, every_row: bool = False
) -> CheckReport:
    """Prove the labels of the rows as they are trained; see `ma_sft.labels.tokenize.check`."""
    packs: Any = packs_of(_truncated(settings, labelled.dataset))
    return check(settings, tokenizer, labelled, every_row=every_row, kept=packs.plan.documents)


def as_trained(settings: Settings, rows: Dataset) -> list[dict[str, Any]]:
    """Labelled rows as training has them after `max_length`; `cut` says of a row which of its tokens are left."""
    packs = _truncated(settings, rows)
    plan: Any = packs_of(packs)
    shown, whole, pieces = [], lengths(rows), plan.plan.pieces
    for number, (row, start, length) in enumerate(zip(pieces.row, pieces.start, pieces.length, strict=True)):
        left = f"tokens {start + 1:,} to {start + length:,} of {whole[row]:,}" if length < whole[row] else None
        shown.append({**rows[int(row)], **{name: packs[number][name] for name in ("input_ids", "labels")}, "cut": left})
    return shown


def _nothing_left(rows: Dataset, max_length: int) -> LabelError:
    last = [np.flatnonzero(row != IGNORED)[-1:] for row in rows.with_format("numpy")["labels"]]
    needed = np.concatenate(last) + 1
    if not len(needed):
        return LabelError("no row has anything to train on: no assistant turn gave a label")
    return LabelError(
        f"max_length={max_length} cuts off every response: the shortest row needs {needed.min()} tokens to keep its "
        "whole response; raise max_length"
    )


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

    def make() -> tuple[Prepared, Prepared | None]:
        data = prepare(settings, tokenizer, given={"train": train} if train is not None else None)
        holds_out = test is not None or settings.rows.eval_dataset or (train is None and settings.rows.test_size)
        return data, prepare(settings, tokenizer, held_out=True, given=test) if holds_out else None

    def make_to_send() -> tuple[Prepared, Prepared | None]:
        data, held_out = make()
        data.conversations = None  # nobody asks for them
        return data, held_out

    if settings.training.world_size == 1 or settings.rows.dataset_streaming:
        return make()
    return once(make_to_send, per_machine=True)


def _prepare_stream(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The recipe's rows as an `IterableDataset` that reads, labels, cuts and packs while it is read.

    Its labels cannot all be checked before training: the first `STREAM_SAMPLE` are.
    """
    training = settings.training
    if training.max_steps <= 0:
        raise RecipeError("dataset_streaming: a stream's length is not known; set max_steps")
    if settings.labels.formatting_func:
        raise RecipeError("dataset_streaming does not go with formatting_func; leave one of them out")
    sample = label(settings, tokenizer)
    report = check_as_trained(settings, tokenizer, sample) if settings.labels.check else None
    if report is not None:
        report.raise_errors()
    how = _how_to_pack(settings)
    order = Order.of(training, STREAM_BUFFER if training.packing else 1)
    share = Share(
        _mixture(settings).train,
        make_encoder(settings, tokenizer).tokenize_batch,
        partial(pack_table, seed=training.seed, **how),
        parts=len(order.parts()),
        block=1 if training.packing else order.per_device_train_batch_size,
        buffer=order.buffer,
    )
    features = Features(dict.fromkeys(COLUMNS, List(Value("int64"))))
    stream = share_out(share, order, features)
    return Prepared(stream, None, sample.counts, report, None, [], sample.stages, *_look(sample), order=order)


def _look(labelled: Labelled) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the report shows of the rows: the first ones, and a histogram of lengths in tokens."""
    dataset, tokens = labelled.dataset, lengths(labelled.dataset)
    edges = np.unique(np.linspace(tokens.min(), tokens.max() + 1, 25).astype(int))
    rows, _ = np.histogram(tokens, edges)
    median, p99 = (int(np.percentile(tokens, q, method="inverted_cdf")) for q in (50, 99))
    return [dataset[row] for row in range(min(SHOWN_ROWS, len(dataset)))], {
        "rows": rows.tolist(),
        "edges": edges.tolist(),
        "median": median,
        "p99": p99,
        "longest": int(tokens.max()),
    }
