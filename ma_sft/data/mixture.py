"""Sources -> one data set of conversations or preferences: convert, filter, split, draw, shuffle; with counts."""

import inspect
import itertools
import json
import logging
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
from ma_sft.data.context import to_template_kwargs, to_tools
from ma_sft.data.duplicates import conversations, split_held_out
from ma_sft.data.filters import (
    EXAMPLES,
    Filters,
    Stage,
    apply_filters,
    held_out_phrases,
    stream_filters,
    unused_columns,
)
from ma_sft.data.formats import (
    FORMATS,
    BadAnswer,
    detect_format,
    message_features,
    read_row,
    refuse_changing,
    unused_of,
)
from ma_sft.data.preference import SIDES as PREFERENCES
from ma_sft.data.preference import detect_preference, to_preference
from ma_sft.data.reader import TOO_DEEP
from ma_sft.data.sources import Source, check_columns, load_rows, rows_of
from ma_sft.data.values import SHOWN_COLUMNS, Row, TrackedRow
from ma_sft.errors import FormatError, RecipeError
from ma_sft.version import __version__

logger = logging.getLogger(__name__)


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

    @property
    def unused(self) -> dict[str, dict[str, str]]:
        """Of each source, the columns that nothing read and that may mean something, with an example."""
        return unused_columns(self.stages)

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
        return Group(table, *examples, *map(Text, unused_lines(self.unused)))


def unused_lines(unused: dict[str, dict[str, str]]) -> list[str]:
    """A line for each source whose rows have columns that are not used."""
    lines = []
    for source, columns in unused.items():
        some = itertools.islice(columns.items(), SHOWN_COLUMNS)
        shown = ", ".join(f"{column} ({example})" for column, example in some)
        more = f" and {len(columns) - SHOWN_COLUMNS:,} more" if len(columns) > SHOWN_COLUMNS else ""
        lines.append(f"{source}: columns that are not used: {shown}{more}")
    return lines


BROKEN, NO_BETTER, BAD_ANSWER = NOT_CONVERTED = ("broken rows", "no better side", "bad answers")

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
    merge_turns: bool = False,
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
        datasets: paths, data sets of `datasets`, or mappings with the fields of `ma_sft.data.sources.Source`.
        kind: `"conversation"`, or `"preference"`.
        seed: of draws and shuffles; the same seed and files give the same rows in the same order.
        on_error: `"raise"` at the first broken row, or `"skip"` it and count it.
        format, system_prompt, merge_turns, split: for sources that do not say themselves.
        filters: of all rows together; see `ma_sft.data.filters.Filters`.
        test_size: share of the rows (below 1) or number of rows to hold out, before rows are drawn by weight; see
            `ma_sft.data.duplicates.split_held_out`.
        test_near_duplicates: similarity from which near duplicates must be on the same side of the split.
        stopping_strategy: of `datasets.interleave_datasets`, for sources with weights: `"first_exhausted"` uses no row
            twice and stops when a source runs dry, `"all_exhausted"` repeats rows until every source was seen in full,
            `"all_exhausted_without_replacement"` goes on with the other sources and uses every row once.
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
    defaults = {"format": format, "system_prompt": system_prompt, "merge_turns": merge_turns, "split": split}
    sources = [Source.of(source, **defaults) for source in datasets]
    probabilities = _probabilities(sources)
    if streaming and (test_size is not None or (len(sources) > 1 and not probabilities)):
        raise RecipeError("a stream cannot hold out rows (test_size), and several streams need a weight each")
    everywhere = Filters.of(filters, tokenizer)
    report = Report()
    combine = partial(interleave_datasets, seed=seed, stopping_strategy=stopping_strategy, probabilities=probabilities)
    loaded = [_read(source, kind, seed, on_error, streaming, num_proc, report) for source in sources]
    features = _features([source for source, _, _ in loaded], kind)
    load = partial(_load, on_error=on_error, features=features, report=report, tokenizer=tokenizer, num_proc=num_proc)
    parts = [load(*each, part=part) for part, each in enumerate(loaded)]
    if streaming:
        return _stream(combine(parts) if probabilities else parts[0], everywhere, report, seed, num_proc)
    rows = _filter_all(_drop_empty(concatenate_datasets(parts)), everywhere, report, num_proc)
    test = None
    if test_size is not None:
        rows, test = _hold_out(rows, test_size, test_near_duplicates, seed, report, num_proc)
    available = np.bincount(_parts(rows), minlength=len(sources))
    rows = _draw(rows, available, sources, combine if probabilities else None, seed, report)
    used = np.bincount(_parts(rows), minlength=len(sources))
    for i, (source, _, _) in enumerate(loaded):
        report.sources.append(source.described() | {"available": int(available[i]), "used": int(used[i])})
    return Mixture(rows.remove_columns("_part"), test, report)


def _probabilities(sources: Sequence[Source]) -> list[float] | None:
    """The share of each source, None where none has a weight."""
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and (len(weights) != len(sources) or sum(weights) <= 0):
        raise RecipeError("weight: all sources need one, or none; and one above 0")
    return [weight / sum(weights) for weight in weights] or None


def _features(sources: Sequence[Source], kind: str) -> Features:
    """The columns of converted rows."""
    rich = any(source.format not in FORMATS or FORMATS[str(source.format)].rich for source in sources)
    features = message_features(*(SIDES if kind == "preference" else ()), rich=rich)
    texts = ["chat_template_kwargs", "source", "origin", "raw", "error", "removed_by", "unused"]
    texts += ["group"] if any(source.group_by for source in sources) else []
    return Features({**features, **dict.fromkeys(texts, Value("string")), "_part": Value("int32")})


def _stream(rows: Any, filters: Filters, report: Report, seed: int, num_proc: int | None) -> Mixture:
    report.stages.append(stage := Stage("all: row filters"))
    rows = stream_filters(rows.remove_columns("_part"), filters, stage, _grams(filters, num_proc))
    return Mixture(rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), None, report)


def _drop_empty(rows: Dataset) -> Dataset:
    """Without the column of template variables where no row has any: TRL would take its nulls for variables."""
    column = "chat_template_kwargs"
    return rows.remove_columns(column) if rows.data.column(column).null_count == len(rows.data) else rows


def _filter_all(rows: Dataset, filters: Filters, report: Report, num_proc: int | None) -> Dataset:
    procs = processes(num_proc, len(rows))
    rows, stages = apply_filters(rows, filters, name="all", grams=_grams(filters, num_proc), num_proc=procs)
    report.stages += stages
    if len(rows) == 0:
        raise FormatError(f"every row was filtered: {', '.join(f'{n:,} by {w}' for w, n in report.filtered.items())}")
    return rows


def _hold_out(
    rows: Dataset, size: float, near: float | None, seed: int, report: Report, num_proc: int | None
) -> tuple[Dataset, Dataset]:
    stage, start = Stage("hold out", len(rows)), time.monotonic()
    procs = processes(num_proc, len(rows))
    train_at, test_at = split_held_out(rows, size, seed=seed, near=near, num_proc=procs)
    train, test = rows.select(train_at), rows.select(test_at).shuffle(seed=seed).remove_columns("_part")
    stage.remove("held out", len(test))
    _done(stage, len(train), start, report)
    return train, test


def _draw(rows: Dataset, available: Any, sources: Sequence[Source], combine: Any, seed: int, report: Report) -> Dataset:
    """All rows shuffled; or, to `combine`, the shuffled rows of each source."""
    stage, start = Stage("draw and shuffle", len(rows)), time.monotonic()
    if combine:
        if not available.all():
            raise FormatError(f"{sources[int(available.argmin())].path}: no row is left to draw by weight")
        part = _parts(rows)
        rows = combine([rows.select(np.flatnonzero(part == i)).shuffle(seed=seed) for i in range(len(sources))])
        stage.rows_in = max(len(rows), int(available.sum()))  # drawn again, rows come in more than once
        stage.remove("left out by weight", stage.rows_in - len(rows))
    else:
        rows = rows.shuffle(seed=seed)
    _done(stage, len(rows), start, report)
    return rows


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
        source=replace(source, rows=None),
        part=part,
        columns=list(features),
        on_error=on_error,
        numbers=numbers,
        code=__version__ + code_of(source.format),
    )
    settings = {"batched": True, "with_indices": True, "remove_columns": rows.column_names, "features": features}
    stage = Stage(f"{source.path}: convert from {source.format}")
    filters, own = Filters.of(source.filters, tokenizer), ["error", "removed_by", "unused"]
    if isinstance(rows, IterableDataset):
        report.stages.append(stage)

        def keep(errors: list[str], reasons: list[str], unused: list[str | None]) -> list[bool]:
            _note_unused(stage, unused)
            return stage.stream(reasons, errors.__getitem__)

        converted = rows.map(convert, **settings).filter(keep, batched=True, input_columns=own)
        report.stages.append(filtering := Stage(f"{source.path}: row filters"))
        return stream_filters(converted.remove_columns(own), filters, filtering, _grams(filters, num_proc))
    num_proc = processes(num_proc, len(rows))
    converted = rows.map(convert, **settings, num_proc=num_proc, desc=f"converting {Path(source.path).name}")
    errors, good = converted.data.column("error"), _count_removed(converted, stage)
    converted = converted.remove_columns(own)
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


def _count_removed(converted: Dataset, stage: Stage) -> Any:
    """Which rows were converted; the others are counted in the stage, and the columns that were not used noted."""
    errors, removed = (converted.data.column(name) for name in ("error", "removed_by"))
    stage.rows_in = len(converted)
    for why in NOT_CONVERTED:
        at = np.flatnonzero(pc.equal(removed, why).to_numpy())
        stage.remove(why, len(at), errors.take(at[:EXAMPLES]).to_pylist())
    _note_unused(stage, converted.data.column("unused").drop_null().to_pylist())
    return pc.equal(removed, "").to_numpy()


def _note_unused(stage: Stage, found: Sequence[str | None]) -> None:
    """Keep the first example of each column that was not used; on a stream, say it when it comes."""
    new = {column: shown for text in found if text for column, shown in json.loads(text).items()}
    new = {column: shown for column, shown in new.items() if column not in stage.unused}
    stage.unused |= new
    for line in unused_lines({stage.name.rpartition(": convert")[0]: new} if new else {}):
        logger.warning(line)


def _detect(rows: Any, source: Source, kind: str, on_error: str) -> str:
    """The format of the first row; with `on_error="skip"`, of the first that has one."""
    first = ""
    head = list(rows.take(100))
    if not head:
        raise FormatError(f"{source.path}: the data set is empty; give at least one row")
    batch = {key: [row[key] for row in head] for key in head[0]}
    unmapped = rows_of(batch, range(len(head)), replace(source, columns=None, ignore=()))
    known = [(where, row) for where, _, row in unmapped if isinstance(row, dict)]
    for where, _, row in rows_of(batch, range(len(head)), source):
        try:
            if known:
                check_columns([row for _, row in known], source)
            if isinstance(row, FormatError):
                raise row
            found = {key: value for key, value in row.items() if value is not None}
            return detect_preference(found) if kind == "preference" else detect_format(found)
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
    known: set[str] = set()  # columns that are not used, and that an earlier row of the batch told
    for where, origin, row in rows_of(batch, indices if numbers is None else numbers[indices].tolist(), source):
        record: dict[str, Any] = {"source": source.path, "origin": origin, "error": "", "removed_by": "", "_part": part}
        try:
            if isinstance(row, FormatError):
                raise row
            record["raw"] = json.dumps(row, default=str)
            record |= _record(row, source, preference="prompt" in columns)
            new = {column: shown for column, shown in record.pop("unused").items() if column not in known}
            known.update(new)
            record["unused"] = json.dumps(new) if new else None
        except BadAnswer as error:
            record |= {"error": f"{where}: {error}", "removed_by": BAD_ANSWER}
        except (FormatError, RecursionError) as error:
            what = TOO_DEEP if isinstance(error, RecursionError) else error
            record |= {"error": f"{where}: {what}", "removed_by": BROKEN}
            if on_error == "raise":
                raise FormatError(record["error"]) from None
        records.append(record)
    return {name: [record.get(name) for record in records] for name in columns}


def _record(row: Row, source: Source, preference: bool) -> dict[str, Any]:
    """The columns of a converted row."""
    if preference:
        tracked = TrackedRow(row)
        found = to_preference(tracked, source.format)
        tools, kwargs = to_tools(tracked), to_template_kwargs(tracked)
        if found is None:
            return {"error": "neither side is better", "removed_by": NO_BETTER, "unused": {}}
        if source.format in PREFERENCES:
            refuse_changing(tracked, source.format)
        sides, unused = dict(found), unused_of(tracked) if source.format in PREFERENCES else {}
    else:
        read = read_row(row, source.format, merge=source.merge_turns)
        sides, tools, kwargs, unused = {"messages": read.messages}, read.tools, read.chat_template_kwargs, read.unused
    start = sides["prompt" if preference else "messages"]
    if source.system_prompt and start[0]["role"] != "system":
        start.insert(0, {"role": "system", "content": source.system_prompt})
    group = None
    if source.group_by:
        if row.get(source.group_by) is None:
            raise FormatError(f"field {source.group_by!r} is missing or null; group_by needs it")
        group = json.dumps(row[source.group_by], sort_keys=True, default=str)
        unused = {column: shown for column, shown in unused.items() if column != source.group_by}
    return {**sides, "tools": tools, "chat_template_kwargs": kwargs, "group": group, "unused": unused}


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
