"""Sources -> one data set of conversations or preferences: convert, filter, split, draw, shuffle; with counts."""

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, interleave_datasets

from ma_sft.data.filters import Filters, apply_filters, sift, split_held_out
from ma_sft.data.formats import (
    FORMATS,
    BadAnswer,
    detect_format,
    message_features,
    read_row,
    refuse_changing,
    unused_of,
)
from ma_sft.data.functions import code_of
from ma_sft.data.load import TOO_DEEP, Source, load_rows, processes, rows_of
from ma_sft.data.messages import Row, TrackedRow, show_columns, to_template_kwargs, to_tools
from ma_sft.data.preference import SIDES as PREFERENCES
from ma_sft.data.preference import detect_preference, to_preference
from ma_sft.data.stages import BAD_ANSWER, BROKEN, NO_BETTER, Report, Stage
from ma_sft.errors import FormatError, RecipeError
from ma_sft.version import __version__

SIDES = ("prompt", "chosen", "rejected")
SHUFFLE_BUFFER = 10_000


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

    Each row has its `source` (the path) and `origin` (`file:line`), too. Memory stays constant whatever the number of
    rows, but for some 150 bytes a row; the rows themselves are in Arrow files in `datasets`' cache, from where the same
    call has them again. A mixture by weight is drawn once: each epoch of training has the same rows.

    Args:
        datasets: paths, rows in memory, or mappings with the fields of `ma_sft.data.load.Source`.
        kind: `"conversation"`, or `"preference"`.
        seed: of draws and shuffles; the same seed and files give the same rows in the same order.
        on_error: `"raise"` at the first broken row, or `"skip"` it and count it.
        format, system_prompt, merge_turns, split: for sources that do not say themselves.
        filters: of all rows together; see `ma_sft.data.filters.Filters`.
        test_size: share of the rows (below 1) or number of rows to hold out, before rows are drawn by weight; see
            `ma_sft.data.filters.split_held_out`.
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
    mixer = _Mixer(kind, seed, on_error, streaming, num_proc, tokenizer)
    combine = partial(interleave_datasets, seed=seed, stopping_strategy=stopping_strategy, probabilities=probabilities)
    everywhere = Filters.of(filters, tokenizer)
    loaded = [mixer.load(source) for source in sources]
    features = _features([source for source, _, _ in loaded], kind)
    parts = [mixer.convert(*each, part=part, features=features) for part, each in enumerate(loaded)]
    if streaming:
        stream = mixer.filter((combine(parts) if probabilities else parts[0]).remove_columns("_part"), everywhere)
        return Mixture(stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), None, mixer.report)
    rows, test = mixer.filter(_drop_empty(concatenate_datasets(parts)), everywhere), None
    if test_size is not None:
        rows, test = mixer.hold_out(rows, test_size, test_near_duplicates)
    available = np.bincount(_parts(rows), minlength=len(sources))
    rows = mixer.draw(rows, available, sources, combine if probabilities else None)
    used = np.bincount(_parts(rows), minlength=len(sources))
    for (source, _, _), left, taken in zip(loaded, available.tolist(), used.tolist(), strict=True):
        mixer.report.sources.append(source.described() | {"available": left, "used": taken})
    return Mixture(rows.remove_columns("_part"), test, mixer.report)


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
    texts = ["chat_template_kwargs", "source", "origin", "error", "removed_by", "unused"]
    texts += ["group"] if any(source.group_by for source in sources) else []
    return Features({**features, **dict.fromkeys(texts, Value("string")), "_part": Value("int32")})


def _drop_empty(rows: Dataset) -> Dataset:
    """Without the column of template variables where no row has any: TRL would take its nulls for variables."""
    column = "chat_template_kwargs"
    return rows.remove_columns(column) if rows.data.column(column).null_count == len(rows.data) else rows


def _parts(rows: Dataset) -> Any:
    """The number of each row's source, read in batches: of selected rows `[:]` would make an object of each."""
    return np.concatenate([batch["_part"] for batch in rows.select_columns("_part").with_format("numpy").iter(10_000)])


def read_mixture(path: str | Path) -> dict[str, Any]:
    """The arguments of `load_mixture` from a YAML file.

    Raises:
        RecipeError: no such file, or an unknown key (with the nearest right one).
    """
    from ma_sft.config import nearest, read_yaml

    settings = read_yaml(Path(path))
    known = inspect.signature(load_mixture).parameters
    for key in settings:
        if key not in known:
            raise RecipeError(f"{path}: unknown key {key!r}{nearest(key, dict(known))}; keys are {', '.join(known)}")
    if "datasets" not in settings:
        raise RecipeError(f"{path}: no data: set datasets, a list of sources")
    return settings


@dataclass
class _Mixer:
    """The steps of a mixture, with the settings that they share; each is a stage of the report."""

    kind: str
    seed: int
    on_error: str
    streaming: bool
    num_proc: int | None
    tokenizer: str | None
    report: Report = field(default_factory=Report)

    def load(self, source: Source) -> tuple[Source, Any, Any]:
        """The source with its format known, its raw rows, and their numbers if they were drawn."""
        if self.streaming:
            rows, numbers = load_rows(source, streaming=True)
        else:
            with self.report.stage(f"{source.path}: read") as stage:
                rows, numbers = load_rows(source, seed=self.seed, num_proc=processes(self.num_proc, sys.maxsize))
                stage.rows_in = len(rows)
        return replace(source, format=source.format or self._detect(rows, source)), rows, numbers

    def _detect(self, rows: Any, source: Source) -> str:
        """The format of the first row; with `on_error="skip"`, of the first that has one."""
        batch = next(iter(rows.take(100).iter(100)), None)
        if batch is None:
            raise FormatError(f"{source.path}: the data set is empty; give at least one row")
        numbers = range(len(batch) if isinstance(batch, pa.Table) else len(next(iter(batch.values()))))
        whole = list(rows_of(batch, numbers, replace(source, columns=None, ignore=())))
        known = set().union(*(row for _, _, row in whole if isinstance(row, dict)))
        if known and (missing := [old for old in source.columns or {} if old not in known]):
            what = f"field {missing[0]!r} of the column map is missing; found {show_columns(known)}"
            raise FormatError(f"{whole[0][0]}: {what}")
        first = ""
        for where, _, row in rows_of(batch, numbers, source):
            try:
                if isinstance(row, FormatError):
                    raise row
                found = {key: value for key, value in row.items() if value is not None}
                return detect_preference(found) if self.kind == "preference" else detect_format(found)
            except FormatError as error:
                first = first or f"{where}: {error}"
                if self.on_error == "raise":
                    break
        raise FormatError(first)

    def convert(self, source: Source, rows: Any, numbers: Any, *, part: int, features: Features) -> Any:
        """A source's rows, converted and filtered by its own filters."""
        code = __version__ + code_of(source.format)
        function = _Converter(replace(source, rows=None), part, features.arrow_schema, self.on_error, numbers, code)
        settings = {"batched": True, "with_indices": True, "features": features}
        if not self.streaming:
            settings["remove_columns"] = rows.column_names
        elif rows.features is None:  # a stream of tables has nothing to remove: it loses what is made under those names
            settings["remove_columns"] = list(next(iter(rows), {}))
        name = f"{source.path}: convert from {source.format}"
        if self.streaming:
            self.report.stages.append(stage := Stage(name))
            rows = sift(rows.map(function, **settings).with_format(None), stage)
            return self.filter(rows, source.filters, source.path)
        with self.report.stage(name) as stage:
            procs, what = processes(self.num_proc, len(rows)), f"converting {Path(source.path).name}"
            rows = sift(rows.map(function, **settings, num_proc=procs, desc=what).with_format(None), stage)
        if len(rows) == 0:
            first = next(iter(stage.examples.values()))[0]
            raise FormatError(f"{source.path}: every row was skipped; the first: {first}")
        return self.filter(rows, source.filters, source.path)

    def filter(self, rows: Any, filters: Any, path: str | None = None) -> Any:
        """Filters of one source, or of all together."""
        filters = Filters.of(filters, self.tokenizer)
        procs = None if self.streaming else processes(self.num_proc, len(rows))
        before = len(self.report.stages)
        rows = apply_filters(rows, filters, self.report, name=path or "all", num_proc=procs)
        if not self.streaming and len(rows) == 0:
            removed = Report(self.report.stages[before:]).filtered
            words = ", ".join(f"{count:,} by {why}" for why, count in removed.items())
            raise FormatError(f"{path + ': ' if path else ''}every row was filtered: {words}")
        return rows

    def hold_out(self, rows: Dataset, size: float, near: float | None) -> tuple[Dataset, Dataset]:
        """Training rows and held-out rows."""
        with self.report.stage("hold out", len(rows)) as stage:
            procs = processes(self.num_proc, len(rows))
            train, test = split_held_out(rows, size, seed=self.seed, near=near, num_proc=procs)
            stage.remove("held out", len(test))
            return rows.select(train), rows.select(test).shuffle(seed=self.seed).remove_columns("_part")

    def draw(self, rows: Dataset, available: Any, sources: Sequence[Source], combine: Any) -> Dataset:
        """All rows shuffled; or, to `combine`, the shuffled rows of each source."""
        with self.report.stage("draw and shuffle", len(rows)) as stage:
            if not combine:
                return rows.shuffle(seed=self.seed)
            if not available.all():
                raise FormatError(f"{sources[int(available.argmin())].path}: no row is left to draw by weight")
            part = _parts(rows)
            each = [rows.select(np.flatnonzero(part == i)).shuffle(seed=self.seed) for i in range(len(sources))]
            rows = combine(each)
            stage.rows_in = max(len(rows), int(available.sum()))  # drawn again, rows come in more than once
            stage.remove("left out by weight", stage.rows_in - len(rows))
            return rows


@dataclass
class _Converter:
    """For `datasets.map`: raw rows, a table or a mapping, as the same of conversations.

    `code` is for the fingerprint: an edited function is run again.
    """

    source: Source
    part: int
    schema: pa.Schema
    on_error: str
    numbers: Any
    code: str

    def __call__(self, batch: Any, indices: list[int]) -> Any:
        records: list[dict[str, Any]] = []
        known: set[str] = set()  # columns that are not used, and that an earlier row of the batch told
        numbers = indices if self.numbers is None else self.numbers[indices].tolist()
        shared: dict[str, Any] = {"source": self.source.path, "_part": self.part, "error": "", "removed_by": ""}
        for where, origin, row in rows_of(batch, numbers, self.source):
            records.append(record := {**shared, "origin": origin})
            try:
                if isinstance(row, FormatError):
                    raise row
                record |= _record(row, self.source, preference="prompt" in self.schema.names)
                new = {column: shown for column, shown in record.pop("unused").items() if column not in known}
                known.update(new)
                record["unused"] = json.dumps(new) if new else None
            except BadAnswer as error:
                record |= {"error": f"{where}: {error}", "removed_by": BAD_ANSWER}
            except (FormatError, RecursionError) as error:
                what = f"{where}: {TOO_DEEP if isinstance(error, RecursionError) else error}"
                if self.on_error == "raise":
                    raise FormatError(what) from None
                record |= {"error": what, "removed_by": BROKEN}
        found = {name: [record.get(name) for record in records] for name in self.schema.names}
        return pa.Table.from_pydict(found, schema=self.schema) if isinstance(batch, pa.Table) else found


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
