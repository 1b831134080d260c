"""A recipe's rows -> the data set that `SFTTrainer` takes as it is: labelled, cut, and packed if asked."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, load_from_disk
from transformers import PreTrainedTokenizerBase

from ma_sft.errors import LabelError, RecipeError
from ma_sft.files import atomic_dir, cache_dir

if TYPE_CHECKING:
    from ma_sft.data.filters import Stage
    from ma_sft.labels.check import CheckReport
    from ma_sft.packing.report import PackingReport
    from ma_sft.recipe import Settings
from ma_sft.labels.tokenize import (
    ENCODED,
    Counts,
    Labelled,
    _mixture,
    check,
    label,
    logger,
    make_encoder,
)

SHOWN_ROWS = 4  # in the report


@dataclass
class Prepared:
    """The data set to train on, the conversations it came from, the counts, what the check and packing said.

    A stream knows its conversations and counts only when it was read.
    """

    dataset: Dataset | IterableDataset
    conversations: Dataset | None
    counts: Counts
    check: "CheckReport | None"
    packing: "PackingReport | None"
    sources: list[str]  # of each held-out row; empty for training rows
    stages: "list[Stage]"  # conversion and filters, with what each removed
    sample: list[dict[str, Any]]  # the first rows before they are cut: input_ids, labels, row
    lengths: dict[str, Any]  # a histogram of all rows' lengths before they are cut, in tokens


def prepare(settings: "Settings", tokenizer: PreTrainedTokenizerBase, *, held_out: bool = False) -> Prepared:
    """Load, label, cut and (training rows only) pack the recipe's rows.

    Raises:
        MaSftError: a source, row, template or label that is wrong; the message says which.
    """
    training = settings.training
    if settings.rows.dataset_streaming and not held_out:
        return _prepare_stream(settings, tokenizer)
    labelled = label(settings, tokenizer, held_out=held_out)
    counts = labelled.counts
    report = None
    if settings.labels.check and not held_out and len(labelled.dataset):
        report = check(settings, tokenizer, labelled)
        report.raise_errors()
    pack_rows = training.packing and not held_out
    splits = pack_rows and training.packing_strategy != "bfd"  # these keep all of a long sequence, in pieces
    dataset = labelled.dataset
    if held_out:
        origin = labelled.conversations["source"] if labelled.conversations is not None else None
        names = [origin[row] for row in dataset["row"]] if origin is not None else ["held-out"] * len(dataset)
        dataset = dataset.add_column("source", names)
    cut = _cut(dataset, None if splits else training.max_length, counts)
    sources = list(cut["source"]) if held_out else []
    cut = cut.select_columns(["input_ids", "labels"])
    counts.sequences = len(cut)
    counts.tokens, counts.trained_tokens = _count_tokens(cut)
    packing = None
    if pack_rows:
        from ma_sft.packing.view import pack_with_report

        if training.max_length is None:
            raise RecipeError("packing needs max_length, the length of a pack in tokens")
        batch_size = training.per_device_train_batch_size
        cut, packing = pack_with_report(cut, training.max_length, training.packing_strategy, batch_size=batch_size)
    return Prepared(cut, labelled.conversations, counts, report, packing, sources, labelled.stages, *_look(labelled))


def prepare_once(settings: "Settings", tokenizer: PreTrainedTokenizerBase) -> tuple[Prepared, Prepared | None]:
    """Training and held-out rows, prepared by one process per machine; the others read the Arrow files it wrote.

    A stream is read by each process, which then keeps its share.

    Raises:
        MaSftError: `prepare`'s, in every process alike.
    """
    from ma_sft.training.processes import digest, once

    def make() -> tuple[Prepared, Prepared | None]:
        data = prepare(settings, tokenizer)
        holds_out = settings.rows.eval_dataset or settings.rows.test_size
        return data, prepare(settings, tokenizer, held_out=True) if holds_out else None

    def make_files() -> tuple[Prepared, Prepared | None]:
        data, held_out = make()
        for prepared in filter(None, (data, held_out)):
            rows: Any = prepared.dataset
            prepared.dataset = _on_disk(rows, digest(rows))
        data.conversations = None  # nobody asks for them, and they need not be files
        return data, held_out

    if settings.training.world_size == 1 or settings.rows.dataset_streaming:
        return make()
    return once(make_files, per_machine=True)


def _on_disk(rows: Dataset, key: str) -> Dataset:
    """The same rows in files of the cache folder, which every process of this machine can open."""
    folder = cache_dir() / "tokenized" / key
    if not folder.is_dir():
        with atomic_dir(folder) as target:
            rows.save_to_disk(str(target))
    return load_from_disk(str(folder))


def _prepare_stream(settings: "Settings", tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The recipe's rows as an `IterableDataset` that reads, labels, cuts and packs while it is read.

    Its labels cannot all be checked before training: the first `STREAM_SAMPLE` are.
    """
    training = settings.training
    if training.max_steps <= 0:
        raise RecipeError("dataset_streaming: a stream's length is not known; set max_steps")
    if settings.labels.formatting_func:
        raise RecipeError("dataset_streaming does not go with formatting_func; leave one of them out")
    sample = label(settings, tokenizer)
    report = check(settings, tokenizer, sample) if settings.labels.check else None
    if report is not None:
        report.raise_errors()
    encoder = make_encoder(settings, tokenizer)
    stream: Any = _mixture(settings).train
    names = stream.column_names
    stream = stream.map(encoder.tokenize_batch, batched=True, with_indices=True, remove_columns=names)
    splits = training.packing and training.packing_strategy != "bfd"
    limit = None if splits else training.max_length

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [(ids[:limit], labels[:limit]) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
        kept = [(ids, labels) for ids, labels in rows if any(label != -100 for label in labels)]
        if len(kept) < len(rows):
            logger.warning(
                "%d of %d sequences have nothing to train on, or not before max_length",
                len(rows) - len(kept),
                len(rows),
            )
        return {"input_ids": [ids for ids, _ in kept], "labels": [labels for _, labels in kept]}

    token = List(Value("int64"))
    features = Features({"input_ids": token, "labels": token})
    stream = stream.map(cut, batched=True, remove_columns=ENCODED, features=features)
    if training.packing:
        from ma_sft.packing.view import pack

        if training.max_length is None:
            raise RecipeError("packing needs max_length, the length of a pack in tokens")
        stream = pack(stream, training.max_length, training.packing_strategy, seed=training.seed)
    stream = stream.repeat(None)  # without an end: a resumed run finds its place by counting batches from the start
    return Prepared(stream, None, sample.counts, report, None, [], sample.stages, *_look(sample))


def _look(labelled: Labelled) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the report shows of the rows: the first ones, and a histogram of lengths in tokens."""
    dataset = labelled.dataset
    lengths = np.concatenate(
        [batch["input_ids"].combine_chunks().value_lengths() for batch in dataset.with_format("arrow").iter(10_000)]
    )
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, 25).astype(int))
    rows, _ = np.histogram(lengths, edges)
    median, p99 = (int(np.percentile(lengths, q, method="inverted_cdf")) for q in (50, 99))
    return [dataset[row] for row in range(min(SHOWN_ROWS, len(dataset)))], {
        "rows": rows.tolist(),
        "edges": edges.tolist(),
        "median": median,
        "p99": p99,
        "longest": int(lengths.max()),
    }


def _cut(dataset: Dataset, max_length: int | None, counts: Counts) -> Dataset:
    """Keep the first `max_length` tokens of each sequence; drop, and count, those with nothing left to train.

    Raises:
        LabelError: no row at all, or none with anything left to train.
    """
    if len(dataset) == 0:
        raise LabelError("the data set is empty: no rows to train on")
    dataset = dataset.select_columns([c for c in ("input_ids", "labels", "source") if c in dataset.column_names])
    lengths, first, last = _label_spans(dataset)
    limit = max_length if max_length is not None else int(lengths.max())
    counts.cut_sequences = int((lengths > limit).sum())
    keep = (first < limit) & (last >= 0)
    counts.dropped_sequences = int((~keep).sum())
    if not keep.any():
        if (last < 0).all():
            raise LabelError("no row has anything to train on: no assistant turn gave a label")
        raise LabelError(
            f"max_length={limit} cuts off every response: the shortest row needs {int(lengths[last >= 0].min())} "
            "tokens to keep its whole response; raise max_length"
        )
    if counts.dropped_sequences:
        dataset = dataset.select(np.flatnonzero(keep))
    if counts.cut_sequences:
        dataset = dataset.map(
            lambda batch: {name: [row[:limit] for row in batch[name]] for name in ("input_ids", "labels")},
            batched=True,
            desc="cutting to max_length",
        )
    return dataset


def _label_spans(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row: its length, and the positions of its first and last label (length and -1 where it has none)."""
    lengths, first, last = [], [], []
    for batch in dataset.with_format("numpy").iter(batch_size=1000):
        for row in batch["labels"]:
            (at,) = np.nonzero(row != -100)
            lengths.append(len(row))
            first.append(at[0] if len(at) else len(row))
            last.append(at[-1] if len(at) else -1)
    return np.array(lengths), np.array(first), np.array(last)


def _count_tokens(dataset: Dataset) -> tuple[int, int]:
    """(tokens, trained tokens) of a labelled data set."""
    tokens = trained = 0
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        labels = batch["labels"].combine_chunks().flatten().to_numpy()
        tokens += len(labels)
        trained += int((labels != -100).sum())
    return tokens, trained
