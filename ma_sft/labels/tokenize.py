"""Raw rows -> rows of `input_ids` and `labels`, kept in the cache by what decides them.

What decides the ids and labels of a row is one digest, by which every cache, resume and hand-off goes.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import transformers
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from ma_sft.data.load import Inherited, fingerprint_of, processes
from ma_sft.errors import FormatError, MaSftError, RecipeError, first_line
from ma_sft.labels.backend import DifferentResultError
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.utils import atomic_dir, cache_dir, frozen, timed, write_whole
from ma_sft.version import __version__

if TYPE_CHECKING:
    from ma_sft.config import Settings
    from ma_sft.data.functions import TextFunction
    from ma_sft.data.load import Source
    from ma_sft.data.mixture import Mixture
    from ma_sft.data.stages import Stage
    from ma_sft.labels.check import CheckReport, Kept
    from ma_sft.labels.collator import DataCollatorForCompletionOnlyLM
    from ma_sft.labels.verify import Verifier


logger = logging.getLogger(__name__)

STREAM_SAMPLE = 1000  # rows of a stream that are checked before training
_BATCH = 250  # rows: the texts of more would take longer, as a processor's cache does not hold them
_MANY = 100  # rows, from which on one date is warned about
# Two turns with what tokenizers and templates differ in: spaces, digits, Chinese, a special token's text.
PROBE = [
    {"role": "user", "content": "Hi 你好,  what is 12*34? <|im_end|>"},
    {"role": "assistant", "content": "It is 408.\n"},
    {"role": "user", "content": "Danke!"},
]


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
    left_out_of_each_epoch: int = 0
    filtered_rows: dict[str, int] = field(default_factory=dict)
    untrained_turns: dict[str, int] = field(default_factory=dict)
    special_text_rows: int = 0
    turns_without_their_empty_reasoning: int = 0
    sequences_that_history_adds: int = 0
    tokens_that_history_adds: int = 0
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

    def first(self, n: int) -> list[dict[str, Any]]:
        """The first rows; the `origin` of each is the line of the file that it comes from, where there is one."""
        rows = [self.dataset[row] for row in range(min(max(n, 0), len(self.dataset)))]
        if self.conversations is not None and "origin" in self.conversations.column_names:
            origins = self.conversations.select([row["row"] for row in rows])["origin"]
            rows = [{**row, "origin": origin} for row, origin in zip(rows, origins, strict=True)]
        return rows


class WholeRowEncoder(ChatEncoder):
    """Trains every token of a conversation (`completion_only_loss=False`), which stays one sequence."""

    def tokenize_batch(self, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
        columns = super().tokenize_batch(*args, **kwargs)
        return {**columns, "labels": columns["input_ids"], "untrained": [[] for _ in columns["input_ids"]]}


def make_encoder(settings: "Settings", tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """The encoder of the recipe's conversations."""
    labels, whole = settings.labels, settings.training.completion_only_loss is False
    return (WholeRowEncoder if whole else ChatEncoder)(
        tokenizer,
        train_on=labels.train_on,
        history="mask" if whole else labels.history,
        template_kwargs=labels.template_kwargs,  # type: ignore[arg-type]  # text was parsed with the recipe
        template_now=labels.template_now,
        add_eos=labels.add_eos,
    )


@frozen()
def label(settings: "Settings", tokenizer: PreTrainedTokenizerBase, *, held_out: bool = False) -> Labelled:
    """Load the recipe's rows (the first `STREAM_SAMPLE` of a stream) and make their labels; errors as `prepare`'s."""
    make = _label_text if settings.labels.formatting_func else _label_conversations
    with timed(f"{'held-out rows' if held_out else 'rows'} read and tokenised"):
        return make(settings, tokenizer, held_out)


@frozen()
def check(
    settings: "Settings",
    tokenizer: PreTrainedTokenizerBase,
    labelled: Labelled,
    *,
    every_row: bool = False,
    kept: "Kept | None" = None,
) -> "CheckReport":
    """Prove the labels of all rows: see `ma_sft.labels.check.check_dataset`. A report without errors is stored.

    What truncation leaves, `kept`, is packing's to say: `ma_sft.training.prepare.check_as_trained` asks it.
    """
    from ma_sft.data.stages import unused_columns
    from ma_sft.labels.check import CheckReport, check_dataset
    from ma_sft.labels.verify import Verifier

    if isinstance(labelled.encoder, WholeRowEncoder):  # all is trained: there is no boundary to verify
        labelled = replace(labelled, conversations=None)
    kwargs = labelled.encoder.template_kwargs if labelled.encoder else None
    now, train_on = settings.labels.template_now, settings.labels.train_on
    verifier = Verifier(tokenizer, template_kwargs=kwargs, template_date=now, train_on=train_on)
    limit, left = settings.training.max_length, hashlib.sha256()
    for places in (kept.row, kept.start, kept.length) if kept is not None else ():
        left.update(places.tobytes())
    how = (labelled.conversations is None, limit, left.hexdigest(), every_row)
    stored = _stored_report(labelled.dataset, verifier, *how)
    if stored.is_file():
        report = CheckReport.from_json(stored.read_text(encoding="utf-8"))
    else:
        with timed("labels verified"):
            report = check_dataset(
                labelled.dataset,
                tokenizer,
                conversations=labelled.conversations,
                verifier=verifier,
                template_report=labelled.collator.check(labelled.dataset) if labelled.collator else None,
                kept=kept,
                max_length=limit,
                num_proc=settings.training.dataset_num_proc,
                **({"sample": None} if every_row else {}),
            )
        if stored.parent.is_dir() and not report.errors:  # rows of the cache
            write_whole(stored, report.to_json())
    report.unused_columns = unused_columns(labelled.stages)
    return report


def _stored_report(labelled: Dataset, verifier: "Verifier", *how: Any) -> Path:
    """Where the report on rows of the cache is stored, by all that it depends on: the verifier's code, the content.

    The folder's name is the fingerprint of rows, tokenizer, template and settings.
    """
    folder = cache_dir() / "tokenized" / fingerprint_of(labelled)
    content = hashlib.sha256()
    for file in (*sorted(Path(__file__).parent.glob("*.py")), *sorted(folder.glob("rows*.arrow"))):
        with file.open("rb") as opened:
            content.update(hashlib.file_digest(opened, "sha256").digest())
    known = (sorted(verifier.stops), verifier.template_kwargs, verifier.template_date, verifier.train_on)
    return folder / f"check-{digest(content.hexdigest(), transformers.__version__, *map(str, known), *how)}.json"


def _sources(settings: "Settings", held_out: bool) -> list[Any]:
    """The recipe's sources with the settings that hold for those that do not say themselves."""
    from ma_sft.data.load import Source

    data, text = settings.rows, settings.training.dataset_text_field
    own_file = held_out and bool(data.eval_dataset)
    defaults = {
        "name": data.dataset_config,
        "split": data.dataset_test_split if own_file else data.dataset_train_split,
        "format": data.dataset_format,
        "columns": {text: "text"} if text != "text" else None,
        "system_prompt": data.system_prompt,
        "merge_turns": data.merge_turns,
    }
    sources = data.eval_dataset if own_file else data.datasets if data.datasets else [data.dataset_name]
    found = [Source.of(source, **defaults) for source in sources]
    split = "dataset_test_split" if own_file else "dataset_train_split"
    for setting, key in (("dataset_config", "name"), (split, "split")):
        value = settings.chosen.get(setting)
        other = next((source for source in found if key not in source.kind()[1]), None)
        if other and value not in (None, getattr(Source, key)):
            raise RecipeError(
                f"{setting}={value} says nothing of {other.path}, {other.kind()[0]}; remove it, or give those of "
                f"datasets that it is for a {key}"
            )
    return found


def _mixture(settings: "Settings", held_out: bool = False) -> "Mixture":
    from ma_sft.data.mixture import load_mixture
    from ma_sft.hub import model_folder

    data, training = settings.rows, settings.training
    own_file = held_out and bool(data.eval_dataset)
    shared = ("filters", "test_size", "test_near_duplicates", "stopping_strategy")
    return load_mixture(
        _sources(settings, held_out),
        seed=training.seed,
        on_error=data.on_error,
        streaming=data.dataset_streaming and not held_out,
        num_proc=training.dataset_num_proc,
        tokenizer=str(model_folder(str(settings.model.model_name_or_path), settings.model.model_revision)),
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
    if settings.labels.template_now and not held_out:
        another_day = replace(settings.labels, template_now="1987-06-05T04:03:02")
        if _probe(make_encoder(replace(settings, labels=another_day), tokenizer)) != _probe(encoder):
            date = f"the template writes the date {settings.labels.template_now} (template_now)"
            warning = f"{len(conversations):,} rows with one date teach the model that it is always that day"
            logger.warning(f"{date}; {warning}" if len(conversations) >= _MANY else date)
    columns = labelled.data  # iterating rows would cost as much as reading them all
    reasons = pc.value_counts(pc.list_flatten(columns["untrained"])).to_pylist()
    counts.untrained_turns = {found["values"]: found["counts"] for found in reasons}
    counts.special_text_rows = pc.sum(pc.greater(pc.list_value_length(columns["special_text"]), 0)).as_py() or 0
    counts.turns_without_their_empty_reasoning = pc.sum(columns["unthought"]).as_py() or 0
    first = np.unique(columns["row"].to_numpy(), return_index=True)[1]
    lengths = pc.list_value_length(columns["input_ids"]).to_numpy()
    counts.sequences_that_history_adds = len(lengths) - len(first)
    counts.tokens_that_history_adds = int(lengths.sum() - lengths[first].sum())
    return Labelled(labelled, counts, conversations, encoder, stages=mixture.report.stages)


def tokenize(conversations: Dataset, encoder: ChatEncoder, *, num_proc: int | None = None) -> Dataset:
    """`encoder.tokenize_batch` on all rows, kept in the cache folder by what decides ids and labels."""
    settings = (
        *(type(encoder).__name__, encoder.train_on, encoder.history, encoder.template_kwargs, encoder.template_now),
        *(encoder.add_eos, encoder.backend.wanted),
    )
    key = label_fingerprint(fingerprint_of(conversations), encoder.tokenizer, encoder, *settings)
    each = conversations.data.nbytes / (processes(num_proc, len(conversations)) or 1)
    if each > 4 * encoder.backend.from_characters:  # so many will come that the faster tokenizer is built at once
        encoder.backend.from_characters = 0
    try:
        return _mapped(conversations, partial(_as_table, encoder), key, "tokenising", num_proc)
    except DifferentResultError as error:
        logger.warning("tokenising again, by transformers and tokenizers alone: %s", error)
        encoder.leave_faster_engines()
        return tokenize(conversations, encoder, num_proc=num_proc)


def _as_table(encoder: ChatEncoder, batch: dict[str, list[Any]], rows: list[int]) -> pa.Table:
    """`encoder.tokenize_batch` in Arrow, which `datasets` would make of each row's ids for itself."""
    columns: dict[str, Any] = encoder.tokenize_batch(batch, rows)
    offsets = pa.array(np.cumsum([0, *map(len, columns["input_ids"])]), pa.int32())
    ids = {name: pa.ListArray.from_arrays(offsets, np.concatenate(columns[name])) for name in ("input_ids", "labels")}
    texts = {name: pa.array(columns[name], pa.list_(pa.string())) for name in ("untrained", "special_text")}
    return pa.table({**columns, **ids, **texts})


def _mapped(rows: Dataset, label: Callable[..., Any], key: str, what: str, num_proc: int | None) -> Dataset:
    """The labelled rows that the cache has under `key`, or makes: Arrow files that are written once, one a process."""
    folder = cache_dir() / "tokenized" / key
    if not folder.is_dir():
        inherited = Inherited(label)
        with atomic_dir(folder) as target:
            rows.map(
                inherited,
                batched=True,
                batch_size=_BATCH,
                with_indices=True,
                remove_columns=rows.column_names,
                num_proc=processes(num_proc, len(rows)),
                cache_file_name=str(target / "rows.arrow"),
                new_fingerprint=key,
                desc=what,
            )
    os.utime(folder)  # tells what was not used for long
    found = concatenate_datasets([Dataset.from_file(str(file)) for file in sorted(folder.glob("rows*.arrow"))])
    return Dataset(found.data, fingerprint=key)


def _label_text(settings: "Settings", tokenizer: PreTrainedTokenizerBase, held_out: bool) -> Labelled:
    """The classic path: a `formatting_func` makes text, and the response template finds the labels in its ids."""
    from ma_sft.data.functions import TextFunction, code_of
    from ma_sft.data.load import load_rows

    data, labels = settings.rows, settings.labels
    sources = _sources(settings, held_out)
    if data.filters or data.test_size or len(sources) != 1:
        raise RecipeError("formatting_func takes one source, no filters and no test_size; see `ma-sft data build`")
    rows = load_rows(sources[0], seed=settings.training.seed)
    collator = make_collator(settings, tokenizer)
    bos = [tokenizer.bos_token_id] if tokenizer("")["input_ids"] else []
    ends = None  # with eos_token and instruction_template set, the recipe says that this text ends a turn
    if "eos_token" in settings.chosen and labels.instruction_template:
        after = rf"\s*(?:{re.escape(labels.instruction_template.strip())}|$)"
        ends = re.compile(f"{re.escape(str(tokenizer.eos_token))}(?={after})")
    name = str(labels.formatting_func)
    to_texts = TextFunction(name)

    def label(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        texts, origins = _texts_of(to_texts, name, sources[0], batch, indices)
        # The end token is joined as an id: text cannot make one, and the tokenizer cannot split it.
        turns = [ends.split(text) if ends else [text] for text in texts]
        encoded = tokenizer([t for each in turns for t in each], add_special_tokens=False, split_special_tokens=True)
        pieces = iter(encoded["input_ids"])
        ids = [[*bos, *(i for t in each if t for i in (*next(pieces), tokenizer.eos_token_id))] for each in turns]
        found = ids
        if collator is not None:
            found = [collator.labels_for(row, index=index) for row, index in zip(ids, indices, strict=True)]
        return {"input_ids": ids, "labels": found, "origin": origins}

    templates = labels.response_template, labels.instruction_template, labels.check
    how = (sources[0].described(), code_of(labels.formatting_func), ends and ends.pattern, *templates)
    key = label_fingerprint(fingerprint_of(rows), tokenizer, None, *how)
    labelled = _mapped(rows, label, key, "formatting and tokenising", settings.training.dataset_num_proc)
    return Labelled(labelled, Counts(rows=len(rows)), collator=collator)


def _texts_of(
    to_texts: "TextFunction", name: str, source: "Source", batch: dict[str, list[Any]], indices: list[int]
) -> tuple[list[str], list[str]]:
    """The texts that the user's function gives of a batch of raw rows, and where each row stands."""
    from ma_sft.data.load import rows_of
    from ma_sft.data.messages import check_text

    rows: list[dict[str, Any]] = []
    origins: list[str] = []
    for where, origin, row in rows_of(batch, indices[0], source):
        if not isinstance(row, dict):
            raise FormatError(f"{where}: {row}")
        rows.append(row)
        origins.append(origin)
    try:
        texts: list[str] = to_texts(rows)
    except (FormatError, TypeError) as error:
        columns = ", ".join(dict.fromkeys(column for row in rows for column in row))
        what = f"formatting_func {name} on {source.path}, whose columns are {columns}"
        raise RecipeError(f"{what}: {first_line(error)}") from error
    for number, text in zip(indices, texts, strict=True):
        check_text(text, f"row {number + 1} by {name}")
    return texts, origins


def make_collator(settings: "Settings", tokenizer: PreTrainedTokenizerBase) -> "DataCollatorForCompletionOnlyLM | None":
    """The response-only collator of the classic path, None if the recipe has no response template."""
    if settings.labels.response_template is None:
        return None
    from ma_sft.labels.collator import DataCollatorForCompletionOnlyLM

    return DataCollatorForCompletionOnlyLM(
        settings.labels.response_template,
        settings.labels.instruction_template,
        tokenizer=tokenizer,
        on_missing="mask" if settings.labels.check else "raise",  # the check counts them all, then stops the run
    )


def counts_table(counts: Counts) -> list[tuple[str, str]]:
    """The counts as (what, how many) lines for the terminal and the report; what is zero is left out."""
    values = asdict(counts)
    groups = {"filtered by": values.pop("filtered_rows"), "untrained turns:": values.pop("untrained_turns")}
    added = values["tokens_that_history_adds"]
    lines = [(key.replace("_", " "), f"{value:,}") for key, value in values.items() if value]
    if added and counts.tokens > added:
        lines.append(
            ("tokens with history=split against without", f"{counts.tokens / (counts.tokens - added):.2f} times")
        )
    return lines + [(f"{what} {why}", f"{n:,}") for what, reasons in groups.items() for why, n in reasons.items()]


def digest(*parts: Any) -> str:
    """32 hexadecimal digits of the parts, as JSON or as text."""
    return _hash(json.dumps(parts, sort_keys=True, default=str))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase, encoder: ChatEncoder | None = None) -> dict[str, Any]:
    """What makes two tokenizers with their templates the same, in a few lines of JSON.

    The ids of a test conversation are among it: whatever a template reads from outside (a date, another release's
    globals) shows in them. `encoder` is None for a tokenizer without a chat template.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {key: value for key, value in state.items() if key not in ("truncation", "padding")}  # of a call
    return {
        "tokenizer": {"digest": _hash(json.dumps(state, sort_keys=True)), "tokens": len(tokenizer)},
        "chat_template": _hash(str(tokenizer.chat_template)) if tokenizer.chat_template else None,
        "special_ids": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")},
        "probe": _probe(encoder),
    }


def label_fingerprint(rows: str, tokenizer: PreTrainedTokenizerBase, encoder: ChatEncoder | None, *how: Any) -> str:
    """The digest of labelled rows.

    Args:
        rows: fingerprint of what is labelled; of raw rows or of conversations.
        encoder: None where no template makes the ids.
        how: the settings that labels depend on, and the code of the user's functions.
    """
    tokenizer("")  # without the truncation and padding of an earlier call
    backend = _hash(tokenizer.backend_tokenizer.to_str())
    template = tokenizer.special_tokens_map, tokenizer.chat_template, _probe(encoder)
    return digest(__version__, rows, backend, *template, *how)


def _probe(encoder: ChatEncoder | None) -> list[int] | str | None:
    try:
        return encoder.encode_prompt(PROBE) if encoder else None
    except MaSftError as error:  # a template of another kind of conversation
        return str(error)
