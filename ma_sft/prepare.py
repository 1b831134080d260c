"""Raw rows -> the data set that `SFTTrainer` takes as it is: `input_ids` and `labels`, cut, and packed if asked.

Done once per machine: what is tokenised is kept under the cache folder, named by a digest of the rows, the
tokenizer, the template and the settings; packing is quick and done each time.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, load_from_disk
from transformers import PreTrainedTokenizerBase

from ma_sft import __version__
from ma_sft.cache import atomic_dir, cache_dir
from ma_sft.errors import FormatError, LabelError, RecipeError
from ma_sft.template import TEMPLATES, ChatEncoder, set_chat_template

if TYPE_CHECKING:
    from ma_sft.collator import DataCollatorForCompletionOnlyLM
    from ma_sft.filters import Stage
    from ma_sft.inspect import CheckReport
    from ma_sft.mixture import Mixture
    from ma_sft.packing import PackingReport
    from ma_sft.recipe import Settings

logger = logging.getLogger(__name__)

SHOWN_ROWS = 4  # in the report
STREAM_SAMPLE = 1000  # rows of a stream that are checked before training
ENCODED = ["input_ids", "labels", "row", "turns", "untrained", "special_text"]  # ChatEncoder.tokenize_batch's columns


@dataclass
class Counts:
    """What went in, what came out, and where the rest went."""

    rows: int = 0
    skipped_rows: int = 0
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    cut_sequences: int = 0
    dropped_sequences: int = 0
    filtered_rows: dict[str, int] = field(default_factory=dict)
    untrained_turns: dict[str, int] = field(default_factory=dict)
    special_text_rows: int = 0
    checked_rows_of_the_stream: int = 0


@dataclass
class Labelled:
    """Rows of `input_ids` and `labels`, neither cut nor packed, with what they were made from and by.

    `conversations` and `encoder` are None on the text path, `collator` is None elsewhere.
    """

    dataset: Dataset
    counts: Counts
    conversations: Dataset | None = None
    encoder: ChatEncoder | None = None
    collator: "DataCollatorForCompletionOnlyLM | None" = None
    stages: "list[Stage]" = field(default_factory=list)


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


def load_tokenizer(settings: "Settings") -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The recipe's tokenizer with the recipe's chat template, and the special tokens added for it.

    Raises:
        RecipeError: the model is no folder and no hub answers.
        TemplateError: the template does not fit.
    """
    from transformers import AutoTokenizer

    model = settings.model
    if model.model_name_or_path == "demo":
        from ma_sft.demo import demo_model

        model.model_name_or_path = str(demo_model())
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            trust_remote_code=settings.training.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"the model {model.model_name_or_path!r} is no local folder with a tokenizer and cannot be had from a hub; "
            f"pass a folder: --model_name_or_path PATH (make: MODEL=PATH). {str(error).splitlines()[0]}"
        ) from None
    data = settings.data
    if data.formatting_func is None or data.template or data.formatting_func in TEMPLATES:
        added = set_chat_template(tokenizer, data.template or data.formatting_func)
    else:
        added = []
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, added


def make_encoder(settings: "Settings", tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """The encoder of the recipe's conversations."""
    kwargs = settings.data.template_kwargs
    if isinstance(kwargs, str):
        try:
            kwargs = json.loads(kwargs)
        except ValueError:
            raise RecipeError(f"template_kwargs: a JSON object expected, found {kwargs!r}") from None
    return ChatEncoder(
        tokenizer,
        train_on=settings.data.train_on,  # type: ignore[arg-type]
        history=settings.data.history,  # type: ignore[arg-type]
        template_kwargs=kwargs,
    )


def prepare(settings: "Settings", tokenizer: PreTrainedTokenizerBase, *, held_out: bool = False) -> Prepared:
    """Load, label, cut and (training rows only) pack the recipe's rows.

    Raises:
        MaSftError: a source, row, template or label that is wrong; the message says which.
    """
    data, training = settings.data, settings.training
    if data.dataset_streaming and not held_out:
        return _prepare_stream(settings, tokenizer)
    labelled = label(settings, tokenizer, held_out=held_out)
    counts = labelled.counts
    report = None
    if data.check and not held_out and len(labelled.dataset):
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
        from ma_sft.packing import pack_with_report

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
    from ma_sft.distributed import digest, once

    def make() -> tuple[Prepared, Prepared | None]:
        data = prepare(settings, tokenizer)
        holds_out = settings.data.eval_dataset or settings.data.test_size
        return data, prepare(settings, tokenizer, held_out=True) if holds_out else None

    def make_files() -> tuple[Prepared, Prepared | None]:
        data, held_out = make()
        for prepared in filter(None, (data, held_out)):
            rows: Any = prepared.dataset
            prepared.dataset = _cached(_digest(digest(rows)), lambda rows=rows: rows)  # type: ignore[misc]
        data.conversations = None  # nobody asks for them, and they need not be files
        return data, held_out

    if settings.training.world_size == 1 or settings.data.dataset_streaming:
        return make()
    return once(make_files, per_machine=True)


def label(settings: "Settings", tokenizer: PreTrainedTokenizerBase, *, held_out: bool = False) -> Labelled:
    """Load the recipe's rows (the first `STREAM_SAMPLE` of a stream) and make their labels; errors as `prepare`'s."""
    make = _label_text if settings.data.formatting_func else _label_conversations
    return make(settings, tokenizer, held_out)


def check(settings: "Settings", tokenizer: PreTrainedTokenizerBase, labelled: Labelled) -> "CheckReport":
    """Prove the labels of all rows: see `ma_sft.inspect.check_dataset`."""
    from ma_sft.inspect import check_dataset

    return check_dataset(
        labelled.dataset,
        tokenizer,
        conversations=labelled.conversations,
        encoder=labelled.encoder,
        template_report=labelled.collator.check(labelled.dataset) if labelled.collator else None,
        max_length=settings.training.max_length,
    )


def _sources(settings: "Settings", held_out: bool) -> list[Any]:
    data = settings.data
    if held_out and data.eval_dataset:
        return [data.eval_dataset] if isinstance(data.eval_dataset, str) else list(data.eval_dataset)
    return [data.dataset_name] if data.dataset_name else list(data.datasets)


def _mixture(settings: "Settings", held_out: bool = False) -> "Mixture":
    from ma_sft.mixture import load_mixture

    data, training = settings.data, settings.training
    own_file = held_out and bool(data.eval_dataset)
    shared = ("filters", "test_size", "test_near_duplicates", "stopping_strategy")
    return load_mixture(
        _sources(settings, held_out),
        seed=training.seed,
        on_error=data.on_error,
        format=data.dataset_format,
        system_prompt=data.system_prompt,
        split=data.dataset_test_split if own_file else data.dataset_train_split,
        streaming=data.dataset_streaming and not held_out,
        num_proc=training.dataset_num_proc,
        tokenizer=settings.model.model_name_or_path,
        **({} if own_file else {name: getattr(data, name) for name in shared}),
    )


def _label_conversations(settings: "Settings", tokenizer: PreTrainedTokenizerBase, held_out: bool) -> Labelled:
    mixture = _mixture(settings, held_out)
    conversations: Any = mixture.train if mixture.test is None or not held_out else mixture.test
    counts = Counts(skipped_rows=mixture.report.skipped, filtered_rows=mixture.report.filtered)
    if isinstance(conversations, IterableDataset):
        conversations = Dataset.from_list(list(conversations.take(STREAM_SAMPLE)), features=conversations.features)
        counts.checked_rows_of_the_stream = len(conversations)
    else:
        counts.rows = len(conversations)
    encoder = make_encoder(settings, tokenizer)
    labelled = tokenize(conversations, encoder, num_proc=settings.training.dataset_num_proc)
    for reasons in labelled["untrained"]:
        for reason in reasons:
            counts.untrained_turns[reason] = counts.untrained_turns.get(reason, 0) + 1
    counts.special_text_rows = sum(bool(text) for text in labelled["special_text"])
    return Labelled(labelled, counts, conversations, encoder, stages=mixture.report.stages)


def tokenize(conversations: Dataset, encoder: ChatEncoder, *, num_proc: int | None = None) -> Dataset:
    """`encoder.tokenize_batch` on all rows, kept in the cache folder by the content of rows, tokenizer and template."""
    from ma_sft.mixture import processes

    settings = (encoder.train_on, encoder.history, encoder.template_kwargs)
    key = _digest(conversations._fingerprint, *settings, _describe(encoder.tokenizer))
    return _cached(
        key,
        lambda: conversations.map(
            encoder.tokenize_batch,
            batched=True,
            with_indices=True,
            remove_columns=conversations.column_names,
            num_proc=processes(num_proc, len(conversations)),
            new_fingerprint=key,
            desc="tokenising",
        ),
    )


def _prepare_stream(settings: "Settings", tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The recipe's rows as an `IterableDataset` that reads, labels, cuts and packs while it is read.

    Its labels cannot all be checked before training: the first `STREAM_SAMPLE` are.
    """
    training = settings.training
    if training.max_steps <= 0:
        raise RecipeError("dataset_streaming: a stream's length is not known; set max_steps")
    if settings.data.formatting_func:
        raise RecipeError("dataset_streaming does not go with formatting_func; leave one of them out")
    sample = label(settings, tokenizer)
    report = check(settings, tokenizer, sample) if settings.data.check else None
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
        from ma_sft.packing import pack

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


def _label_text(settings: "Settings", tokenizer: PreTrainedTokenizerBase, held_out: bool) -> Labelled:
    """The classic path: a `formatting_func` makes text, and the response template finds the labels in its ids."""
    from ma_sft.formats import load_function
    from ma_sft.sources import Source, load_rows, rows_of

    data = settings.data
    if data.filters or data.test_size or len(_sources(settings, held_out)) != 1:
        raise RecipeError("formatting_func takes one source, no filters and no test_size; see `ma-sft data build`")
    split = data.dataset_test_split if held_out else data.dataset_train_split
    source = Source.of(_sources(settings, held_out)[0], split=split)
    rows, numbers = load_rows(source, seed=settings.training.seed)
    function = load_function(str(data.formatting_func))
    collator = make_collator(settings, tokenizer)
    bos = [tokenizer.bos_token_id] if tokenizer("")["input_ids"] else []

    def label(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        found: list[dict[str, Any]] = []
        for where, _, row in rows_of(batch, indices if numbers is None else numbers[indices].tolist(), source):
            if not isinstance(row, dict):
                raise FormatError(f"{where}: {row}")
            found.append(row)
        names = dict.fromkeys(name for row in found for name in row)
        texts = function({name: [row.get(name) for row in found] for name in names})
        # The end token is joined as an id: text cannot make one, and the tokenizer cannot split it.
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [[*bos, *row, tokenizer.eos_token_id] for row in encoded]
        labels = (
            ids
            if collator is None
            else [collator.labels_for(row, index=index) for row, index in zip(ids, indices, strict=True)]
        )
        return {"input_ids": ids, "labels": labels}

    labelled = rows.map(
        label, batched=True, with_indices=True, remove_columns=rows.column_names, desc="formatting and tokenising"
    )
    return Labelled(labelled, Counts(rows=len(rows)), collator=collator)


def make_collator(settings: "Settings", tokenizer: PreTrainedTokenizerBase) -> "DataCollatorForCompletionOnlyLM | None":
    """The response-only collator of the classic path, None if the recipe has no response template."""
    if settings.data.response_template is None:
        return None
    from ma_sft.collator import DataCollatorForCompletionOnlyLM

    return DataCollatorForCompletionOnlyLM(
        settings.data.response_template,
        settings.data.instruction_template,
        tokenizer=tokenizer,
        on_missing="mask" if settings.data.check else "raise",  # the check counts them all, then stops the run
    )


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


def _describe(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.backend_tokenizer.to_str()) + str(tokenizer.chat_template)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([__version__, *parts], default=str).encode()).hexdigest()[:32]


def _cached(key: str, make: Callable[[], Dataset]) -> Dataset:
    folder = cache_dir() / "tokenized" / key
    if not folder.is_dir():
        with atomic_dir(folder) as target:
            make().save_to_disk(str(target))
    return load_from_disk(str(folder))


def counts_table(counts: Counts) -> list[tuple[str, str]]:
    """The counts as (what, how many) lines for the terminal and the report; what is zero is left out."""
    values = asdict(counts)
    groups = {"filtered by": values.pop("filtered_rows"), "untrained turns:": values.pop("untrained_turns")}
    lines = [(key.replace("_", " "), f"{value:,}") for key, value in values.items() if value]
    return lines + [(f"{what} {why}", f"{n:,}") for what, reasons in groups.items() for why, n in reasons.items()]
