"""Sources -> one data set of conversations or preferences: convert, filter, split, draw, shuffle; with counts."""

import inspect
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, interleave_datasets
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ma_sft.data.code import code_of
from ma_sft.data.filters import (
    EXAMPLES,
    Filters,
    Stage,
    apply_filters,
    conversations,
    held_out_phrases,
    split_held_out,
    stream_filters,
)
from ma_sft.data.formats import FORMATS, Message, Row, detect_format, message_features, to_messages, to_tools
from ma_sft.data.preference import detect_preference, to_preference
from ma_sft.data.sources import Source, load_rows, rows_of
from ma_sft.errors import FormatError, RecipeError

SIDES = ("prompt", "chosen", "rejected")


MANY_ROWS = 20_000  # from here on, other processes are worth their start


SHUFFLE_BUFFER = 10_000


@dataclass
class Report:
    """What happened to the rows, step by step, and how many of each source are in the end."""

    stages: list[Stage] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        """Broken rows, and preferences without a better side."""
        return sum(n for stage in self.stages for why, n in stage.removed.items() if why in NOT_CONVERTED)

    @property
    def filtered(self) -> dict[str, int]:
        """Rows that each filter removed."""
        counts: Counter[str] = Counter()
        for stage in self.stages:
            counts.update({why: n for why, n in stage.removed.items() if why not in (*NOT_CONVERTED, *NOT_DRAWN)})
        return dict(counts)

    def to_dict(self) -> dict[str, Any]:
        return {"sources": self.sources, "stages": [asdict(stage) for stage in self.stages]}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Report":
        return cls([Stage(**stage) for stage in value["stages"]], value["sources"])

    def __rich__(self) -> RenderableType:
        table = Table("stage")
        for title in ("rows in", "removed", "rows out", "rows/s"):
            table.add_column(title, justify="right")
        examples = []
        for stage in self.stages:
            removed, speed = sum(stage.removed.values()), stage.rows_in / max(stage.seconds, 1e-9)
            table.add_row(stage.name, *(f"{n:,}" for n in (stage.rows_in, removed, stage.rows_out)), f"{speed:,.0f}")
            for why, count in stage.removed.items():
                table.add_row(f"  {why}", "", f"{count:,}", "", "")
                examples += [Text(f"{why}: {example}") for example in stage.examples.get(why, [])[:2]]
        return Group(table, *examples)


NOT_CONVERTED = ("broken rows", "no better side")


NOT_DRAWN = ("left out by weight", "held out")


@dataclass
class Mixture:
    """Rows to train on, rows held out (None unless asked for), and what happened on the way."""

    train: Dataset | IterableDataset
    test: Dataset | None
    report: Report


def load_mixture(
    datasets: Sequence[Any],
    *,
    kind: str = "conversation",
    seed: int = 0,
    on_error: str = "raise",
    format: str | None = None,
    system_prompt: str | None = None,
    split: str = "train",
    filters: Any = None,
    test_size: float | None = None,
    test_near_duplicates: float | None = None,
    stopping_strategy: str = "first_exhausted",
    streaming: bool = False,
    num_proc: int | None = None,
    tokenizer: str | None = None,
) -> Mixture:
    """All sources as one shuffled data set: `messages` and `tools`, or `prompt`, `chosen`, `rejected` and `tools`.

    Each row has its `source` (the path), `origin` (`file:line`) and `raw` (the row that it was made from as JSON text:
    after the column map, without the nulls that Arrow adds) too. Memory stays constant whatever the number of
    rows, but for some 150 bytes a row; the rows themselves are in Arrow files in `datasets`' cache, from where the same
    call has them again.

    Args:
        datasets: paths, or mappings with the fields of `ma_sft.data.sources.Source`.
        kind: `"conversation"`, or `"preference"`.
        seed: of draws and shuffles; the same seed and files give the same rows in the same order.
        on_error: `"raise"` at the first broken row, or `"skip"` it and count it.
        format, system_prompt, split: for sources that do not say themselves.
        filters: of all rows together; see `ma_sft.data.filters.Filters`.
        test_size: share of the rows (below 1) or number of rows to hold out, before rows are drawn by weight; see
            `ma_sft.data.filters.split_held_out`.
        test_near_duplicates: similarity from which near duplicates must be on the same side of the split.
        stopping_strategy: of `datasets.interleave_datasets`, for sources with weights: `"first_exhausted"` uses no row
            twice and stops when a source runs dry, `"all_exhausted"` repeats rows until every source was seen in full.
        streaming: give an `IterableDataset` that reads while it is read; takes neither `test_size` nor filters that
            look at all rows. Order is shuffled within 10,000 rows.
        num_proc: processes; by default all cores if there are many rows.
        tokenizer: for filters that count tokens and name none.

    Raises:
        FormatError: a row that is no conversation; names file, line and field. No row left.
        RecipeError: a source that cannot be found or read, or settings that contradict each other.
    """
    if kind not in ("conversation", "preference") or on_error not in ("raise", "skip"):
        raise RecipeError(f"kind: conversation or preference, on_error: raise or skip; found {kind!r}, {on_error!r}")
    if isinstance(datasets, str | dict) or not datasets:
        raise RecipeError(f"datasets: a list of sources expected, found {datasets!r}")
    sources = [Source.of(s, format=format, system_prompt=system_prompt, split=split) for s in datasets]
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and (len(weights) != len(sources) or sum(weights) <= 0):
        raise RecipeError("weight: all sources need one, or none; and one above 0")
    probabilities = [weight / sum(weights) for weight in weights] or None
    everywhere = Filters.of(filters, tokenizer)
    report = Report()
    combine = partial(interleave_datasets, seed=seed, stopping_strategy=stopping_strategy, probabilities=probabilities)

    if streaming and (test_size is not None or (len(sources) > 1 and not probabilities)):
        raise RecipeError("a stream cannot hold out rows (test_size), and several streams need a weight each")

    loaded = [_read(source, kind, seed, on_error, streaming, num_proc, report) for source in sources]
    rich = any(source.format not in FORMATS or FORMATS[str(source.format)].rich for source, _, _ in loaded)
    features = message_features(*(SIDES if kind == "preference" else ()), rich=rich)
    texts = ("source", "origin", "raw", "error", *(["group"] if any(source.group_by for source in sources) else []))
    features = Features({**features, **dict.fromkeys(texts, Value("string")), "_part": Value("int32")})
    load = partial(_load, on_error=on_error, features=features, report=report, tokenizer=tokenizer)
    parts = [load(*each, part=part, num_proc=num_proc) for part, each in enumerate(loaded)]
    if streaming:
        stream = combine(parts) if probabilities else parts[0]
        report.stages.append(stage := Stage("all: row filters"))
        stream = stream_filters(stream.remove_columns("_part"), everywhere, stage, _grams(everywhere, num_proc))
        return Mixture(stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), None, report)
    rows, grams = concatenate_datasets(parts), _grams(everywhere, num_proc)
    rows, stages = apply_filters(rows, everywhere, name="all", grams=grams, num_proc=processes(num_proc, len(rows)))
    report.stages += stages
    if len(rows) == 0:
        raise FormatError(f"every row was filtered: {', '.join(f'{n:,} by {w}' for w, n in report.filtered.items())}")
    test = None
    if test_size is not None:
        stage, start = Stage("hold out", len(rows)), time.monotonic()
        procs = processes(num_proc, len(rows))
        train_at, test_at = split_held_out(rows, test_size, seed=seed, near=test_near_duplicates, num_proc=procs)
        rows, test = rows.select(train_at), rows.select(test_at).shuffle(seed=seed).remove_columns("_part")
        stage.remove("held out", len(test))
        _done(stage, len(rows), start, report)
    stage, start = Stage("draw and shuffle", len(rows)), time.monotonic()
    part = _parts(rows)
    available = np.bincount(part, minlength=len(sources))
    if probabilities:
        if not available.all():
            raise FormatError(f"{sources[int(available.argmin())].path}: no row is left to draw by weight")
        shuffled = [rows.select(np.flatnonzero(part == i)).shuffle(seed=seed) for i in range(len(sources))]
        rows = combine(shuffled)
        part = _parts(rows)
        stage.rows_in = max(len(rows), int(available.sum()))  # drawn again, rows come in more than once
        stage.remove("left out by weight", stage.rows_in - len(rows))
    else:
        rows = rows.shuffle(seed=seed)
    _done(stage, len(rows), start, report)
    used = np.bincount(part, minlength=len(sources))
    for i, (source, _, _) in enumerate(loaded):
        counts = {"available": int(available[i]), "used": int(used[i])}
        report.sources.append({k: v for k, v in asdict(source).items() if v is not None} | counts)
    return Mixture(rows.remove_columns("_part"), test, report)


def read_mixture(path: str | Path) -> dict[str, Any]:
    """The arguments of `load_mixture` from a YAML file.

    Raises:
        RecipeError: no such file, or an unknown key (with the nearest right one).
    """
    from ma_sft.recipe import read_yaml
    from ma_sft.settings import nearest

    settings = read_yaml(Path(path))
    known = inspect.signature(load_mixture).parameters
    for key in settings:
        if key not in known:
            raise RecipeError(f"{path}: unknown key {key!r}{nearest(key, dict(known))}; keys are {', '.join(known)}")
    if "datasets" not in settings:
        raise RecipeError(f"{path}: no data: set datasets, a list of sources")
    return settings


def processes(num_proc: int | None, rows: int) -> int | None:
    """`num_proc`, or by default all cores for many rows and this process alone for few; None is this process alone."""
    if num_proc is None and rows >= MANY_ROWS:
        num_proc = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return None if num_proc == 1 else num_proc  # `datasets` would start a process for one


def _read(
    source: Source, kind: str, seed: int, on_error: str, streaming: bool, num_proc: int | None, report: Report
) -> tuple[Source, Any, Any]:
    """The source with its format known, its raw rows, and their numbers if they were drawn."""
    start = time.monotonic()
    rows, numbers = load_rows(source, seed=seed, streaming=streaming, num_proc=processes(num_proc, MANY_ROWS))
    if not streaming:
        _done(Stage(f"{source.path}: read", len(rows)), len(rows), start, report)
    return replace(source, format=source.format or _detect(rows, source, kind, on_error)), rows, numbers


def _load(
    source: Source,
    rows: Any,
    numbers: Any,
    *,
    part: int,
    on_error: str,
    features: Features,
    report: Report,
    tokenizer: str | None,
    num_proc: int | None,
) -> Any:
    """A source's rows, converted and filtered by its own filters."""
    start = time.monotonic()
    convert = partial(
        _convert,
        source=source,
        part=part,
        columns=list(features),
        on_error=on_error,
        numbers=numbers,
        code=code_of(source.format),
    )
    settings = {"batched": True, "with_indices": True, "remove_columns": rows.column_names, "features": features}
    stage = Stage(f"{source.path}: convert from {source.format}")
    filters = Filters.of(source.filters, tokenizer)
    if isinstance(rows, IterableDataset):
        report.stages.append(stage)

        def keep(errors: list[str]) -> list[bool]:
            whys = [error and ("no better side" if error == DROPPED else "broken rows") for error in errors]
            return stage.stream(whys, errors.__getitem__)

        converted = rows.map(convert, **settings).filter(keep, batched=True, input_columns="error")
        report.stages.append(filtering := Stage(f"{source.path}: row filters"))
        return stream_filters(converted.remove_columns("error"), filters, filtering, _grams(filters, num_proc))
    num_proc = processes(num_proc, len(rows))
    converted = rows.map(convert, **settings, num_proc=num_proc, desc=f"converting {Path(source.path).name}")
    stage.rows_in = len(rows)
    errors = converted.data.column("error")
    good, dropped = (pc.equal(errors, text).to_numpy() for text in ("", DROPPED))
    for why, which in (("broken rows", ~good & ~dropped), ("no better side", dropped)):
        at = np.flatnonzero(which)
        stage.remove(why, len(at), errors.take(at[:EXAMPLES]).to_pylist())
    converted = converted.remove_columns("error")
    converted = converted if good.all() else converted.select(np.flatnonzero(good))
    _done(stage, len(converted), start, report)
    if len(converted) == 0:
        raise FormatError(f"{source.path}: every row was skipped; the first: {errors[0]}")
    grams = _grams(filters, num_proc)
    converted, stages = apply_filters(converted, filters, name=source.path, grams=grams, num_proc=num_proc)
    report.stages += stages
    if len(converted) == 0:
        raise FormatError(f"{source.path}: every row was filtered: {stages[-1].removed}")
    return converted


DROPPED = "neither side is better"


def _detect(rows: Any, source: Source, kind: str, on_error: str) -> str:
    """The format of the first row; with `on_error="skip"`, of the first that has one."""
    first = ""
    head = list(rows.take(100))
    if not head:
        raise FormatError(f"{source.path}: the data set is empty; give at least one row")
    batch = {key: [row[key] for row in head] for key in head[0]}
    for where, _, row in rows_of(batch, range(len(head)), source):
        try:
            if isinstance(row, FormatError):
                raise row
            known = {key: value for key, value in row.items() if value is not None}
            return detect_preference(known) if kind == "preference" else detect_format(known)
        except FormatError as error:
            first = first or f"{where}: {error}"
            if on_error == "raise":
                break
    raise FormatError(first)


def _convert(
    batch: dict[str, Any],
    indices: list[int],
    source: Source,
    part: int,
    columns: list[str],
    on_error: str,
    numbers: Any,
    code: str,
) -> dict[str, list[Any]]:
    """A batch of raw rows as new columns. `code` is here for the fingerprint alone: an edited function is run again."""
    records: list[dict[str, Any]] = []
    for where, origin, row in rows_of(batch, indices if numbers is None else numbers[indices].tolist(), source):
        record: dict[str, Any] = {"source": source.path, "origin": origin, "error": "", "_part": part}
        try:
            if isinstance(row, FormatError):
                raise row
            record["raw"] = json.dumps(row, default=str)
            record |= _record(row, source, preference="prompt" in columns) or {"error": DROPPED}
        except FormatError as error:
            record["error"] = f"{where}: {error}"
            if on_error == "raise":
                raise FormatError(record["error"]) from None
        records.append(record)
    return {name: [record.get(name) for record in records] for name in columns}


def _record(row: Row, source: Source, preference: bool) -> dict[str, Any] | None:
    found: dict[str, list[Message]] | None
    found = to_preference(row, source.format) if preference else {"messages": to_messages(row, source.format)}
    if found is None:
        return None
    start = found["prompt" if preference else "messages"]
    if source.system_prompt and start[0]["role"] != "system":
        start.insert(0, {"role": "system", "content": source.system_prompt})
    group = None
    if source.group_by:
        if row.get(source.group_by) is None:
            raise FormatError(f"field {source.group_by!r} is missing or null; group_by needs it")
        group = json.dumps(row[source.group_by], sort_keys=True, default=str)
    return {**found, "tools": to_tools(row), "group": group}


def _grams(filters: Filters, num_proc: int | None) -> Any:
    """What the contamination filter looks for: the phrases of its held-out files."""
    if not filters.contamination:
        return None
    files = [filters.contamination] if isinstance(filters.contamination, str | dict) else filters.contamination
    rows = load_mixture(files, num_proc=num_proc).train
    return held_out_phrases(
        (messages for batch in rows.iter(1000) for messages in conversations(batch)), filters.contamination_words
    )


def _parts(rows: Dataset) -> Any:
    """The number of each row's source, read in batches: of selected rows `[:]` would make an object of each."""
    return np.concatenate([batch["_part"] for batch in rows.select_columns("_part").with_format("numpy").iter(10_000)])


def _done(stage: Stage, rows: int, start: float, report: Report) -> None:
    stage.rows_out, stage.seconds = rows, time.monotonic() - start
    report.stages.append(stage)
