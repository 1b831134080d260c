"""Sources -> one data set of conversations or preferences: convert, filter, split, draw, shuffle; with counts."""

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, interleave_datasets

from ma_sft.data.filters import Filters, column, drop_duplicates, hashes_of, split_held_out
from ma_sft.data.formats import FORMATS, detect_format, message_features, read_row
from ma_sft.data.functions import code_of
from ma_sft.data.load import EMPTY, Source, load_rows, processes, rows_of
from ma_sft.data.messages import BadAnswer, Row, TrackedRow, show_columns
from ma_sft.data.preference import SIDES as PREFERENCES
from ma_sft.data.stages import BAD_ANSWER, BROKEN, NOT_CONVERTED, Report, Stage
from ma_sft.errors import FormatError, RecipeError
from ma_sft.version import __version__

SIDES = ("prompt", "chosen", "rejected")
SHUFFLE_BUFFER = 10_000
REASONS = ["error", "removed_by", "unused"]
KEYS = ["_part", "_row", "_question"]  # the number of a row's source, and what it is compared by


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
    rows, but for some 150 bytes a row; the rows themselves are in `datasets`' cache, for the same call.

    Args:
        datasets: paths, rows in memory, or mappings with the fields of `ma_sft.data.load.Source`.
        kind: `"conversation"`, or `"preference"`.
        seed: of draws and shuffles; the same seed and files give the same rows in the same order.
        on_error: `"raise"` at the first broken row, or `"skip"` it and count it.
        format, system_prompt, merge_turns, split: for sources that do not say themselves.
        filters: of all rows together; see `ma_sft.data.filters.Filters`, `tokenizer` for those that name none.
        test_size, test_near_duplicates: see `ma_sft.data.filters.split_held_out`; before rows are drawn by weight.
        stopping_strategy: of `datasets.interleave_datasets`, for sources with weights; docs/formats.md has them.
        streaming: give an `IterableDataset`, shuffled within 10,000 rows; for no `test_size`, no filter of duplicates.
        num_proc: processes; by default all cores if there are many rows.

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
    shares = _shares(sources)
    combine = partial(interleave_datasets, seed=seed, stopping_strategy=stopping_strategy, probabilities=shares)
    how = (kind, seed, on_error, streaming, num_proc, tokenizer)
    mixer = _Mixer(*how, Filters.of(filters, tokenizer), split=test_size is not None)
    if streaming:
        if test_size is not None or (len(sources) > 1 and not shares):
            raise RecipeError("a stream cannot hold out rows (test_size), and several streams need a weight each")
        parts = mixer.convert(sources)
        stream = (combine(parts) if shares else parts[0]).remove_columns(KEYS)
        return Mixture(stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), None, mixer.report)
    rows, test = mixer.filter(concatenate_datasets(mixer.convert(sources))), None
    if test_size is not None:
        rows, test = mixer.hold_out(rows, test_size, test_near_duplicates)
    rows = mixer.draw(rows, combine if shares else None)
    return Mixture(rows.remove_columns(KEYS), test, mixer.report)


def _shares(sources: Sequence[Source]) -> list[float] | None:
    """Of each source among the rows drawn; None where none has a weight."""
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and (len(weights) != len(sources) or sum(weights) <= 0):
        raise RecipeError("weight: all sources need one, or none; and one above 0")
    return [weight / sum(weights) for weight in weights] or None


def read_mixture(path: str | Path) -> dict[str, Any]:
    """The arguments of `load_mixture` from a YAML file; raises `RecipeError` at an unknown key."""
    from ma_sft.config import nearest, read_yaml

    settings = read_yaml(Path(path))
    known = inspect.signature(load_mixture).parameters
    for key in settings.keys() - known:
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
    filters: Filters
    split: bool
    sources: list[Source] = field(default_factory=list)
    report: Report = field(default_factory=Report)

    def convert(self, sources: Sequence[Source]) -> list[Any]:
        """The rows of each source, converted and filtered, under the same columns."""
        loaded = []
        for source in sources:
            with self.report.stage(f"{source.path}: read") as stage:
                loaded.append(load_rows(source, seed=self.seed, streaming=self.streaming))
                stage.rows_in = 0 if self.streaming else len(loaded[-1])
            self.sources.append(replace(source, format=source.format or self._detect(loaded[-1], source)))
        formats = [source.format for source in self.sources]
        rich = any(not isinstance(name, str) or name not in FORMATS or FORMATS[name].rich for name in formats)
        columns = message_features(*(SIDES if self.kind == "preference" else ()), rich=rich)
        texts = ["chat_template_kwargs", "source", "origin", *(["group"] if any(s.group_by for s in sources) else [])]
        columns |= dict.fromkeys((*texts, *REASONS), Value("string")) | dict.fromkeys(KEYS, Value("int64"))
        features = Features(columns)
        return [self._convert(part, rows, features) for part, rows in enumerate(loaded)]

    def _detect(self, rows: Any, source: Source) -> str:
        """The format of the first row; with `on_error="skip"`, of the first that has one."""
        batch = next(iter(rows.take(100).iter(100)), None)
        if batch is None:
            raise FormatError(f"{source.path}: {EMPTY}")
        if source.columns:
            whole = list(rows_of(batch, 0, replace(source, columns=None, ignore=())))
            known = set().union(*(row for _, _, row in whole if isinstance(row, dict)))
            if known and (missing := [old for old in source.columns if old not in known]):
                what = f"field {missing[0]!r} of the column map is missing; found {show_columns(known)}"
                raise FormatError(f"{whole[0][0]}: {what}")
        errors = []
        for where, _, row in rows_of(batch, 0, source):
            try:
                if isinstance(row, FormatError):
                    raise row
                return detect_format(TrackedRow(row), PREFERENCES if self.kind == "preference" else FORMATS)
            except FormatError as error:
                errors.append(FormatError(f"{where}: {error}"))
                if self.on_error == "raise":
                    break
        raise errors[0]

    def _convert(self, part: int, rows: Any, features: Features) -> Any:
        source = self.sources[part]
        filters = [Filters.of(source.filters, self.tokenizer), self.filters]
        code = "\0".join((__version__, code_of(source.format), *(each.code() for each in filters)))
        compared = self.split or any(each.exact_duplicates for each in filters)
        how: dict[str, Any] = {"source": replace(source, rows=None, filters=None), "part": part}
        how |= {"schema": features.arrow_schema, "on_error": self.on_error}
        function = partial(_convert_batch, **how, filters=filters, compared=compared, code=code)
        settings = {"batched": True, "with_indices": True, "features": features}
        name = f"{source.path}: convert from {source.format}"
        if self.streaming:
            if any(each.exact_duplicates or each.near_duplicates for each in filters):
                raise RecipeError("filters of duplicates need to see all rows: build the mixture, then stream that")
            if rows.features is None:  # a stream of tables has nothing to remove: it loses what is made under the names
                settings["remove_columns"] = list(next(iter(rows), {}))
            self.report.stages.append(Stage(name))
            rows = rows.map(function, **settings).with_format(None)
            return rows.filter(partial(self.report.stages[-1].keep, say=True), batched=True).remove_columns(REASONS)
        settings |= {"remove_columns": rows.column_names, "num_proc": processes(self.num_proc, len(rows))}
        with self.report.stage(name) as stage:
            rows = rows.map(function, **settings, desc=f"converting {Path(source.path).name}").with_format(None)
            keep = stage.keep({column: rows.data.column(column).to_pylist() for column in REASONS})
            rows = rows.remove_columns(REASONS)
            rows = rows if all(keep) else rows.select(np.flatnonzero(keep))
        if len(rows) == 0 and {*stage.removed} <= {*NOT_CONVERTED}:
            first = next(iter(stage.examples.values()))[0]
            raise FormatError(f"{source.path}: every row was skipped; the first: {first}")
        return drop_duplicates(rows, filters[0], self.report, source.path, processes(self.num_proc, len(rows)))

    def filter(self, rows: Dataset) -> Dataset:
        """Rows of all sources without the duplicates that the filters of all drop."""
        if len(rows) == 0:
            words = ", ".join(f"{count:,} by {why}" for why, count in self.report.removed.items())
            raise FormatError(f"every row was filtered: {words}")
        if rows.data.column("chat_template_kwargs").null_count == len(rows.data):
            rows = rows.remove_columns("chat_template_kwargs")  # TRL would take its nulls for variables
        return drop_duplicates(rows, self.filters, self.report, "all", processes(self.num_proc, len(rows)))

    def hold_out(self, rows: Dataset, size: float, near: float | None) -> tuple[Dataset, Dataset]:
        """Training rows and held-out rows."""
        with self.report.stage("hold out", len(rows)) as stage:
            procs = processes(self.num_proc, len(rows))
            train, test = split_held_out(rows, size, seed=self.seed, near=near, num_proc=procs)
            stage.remove("held out", len(test))
            return rows.select(train), rows.select(test).shuffle(seed=self.seed).remove_columns(KEYS)

    def draw(self, rows: Dataset, combine: Any) -> Dataset:
        """All rows shuffled; or, to `combine`, the shuffled rows of each source."""
        parts = column(rows, "_part")
        available = np.bincount(parts, minlength=len(self.sources))
        with self.report.stage("draw and shuffle", len(rows)) as stage:
            if combine and not available.all():
                raise FormatError(f"{self.sources[int(available.argmin())].path}: no row is left to draw by weight")
            each = [rows.select(np.flatnonzero(parts == i)) for i in range(len(available))] if combine else [rows]
            each = [some.shuffle(seed=self.seed) for some in each]
            rows = combine(each) if combine else each[0]
            stage.rows_in = max(len(rows), int(available.sum()))  # drawn again, rows come in more than once
            stage.remove("left out by weight", stage.rows_in - len(rows))
        used = np.bincount(column(rows, "_part"), minlength=len(self.sources))
        for source, left, taken in zip(self.sources, available.tolist(), used.tolist(), strict=True):
            self.report.sources.append(source.described() | {"available": left, "used": taken})
        return rows


def _convert_batch(
    batch: Any,
    indices: list[int],
    *,
    source: Source,
    part: int,
    schema: pa.Schema,
    on_error: str,
    filters: list[Filters],
    compared: bool,
    code: str,  # for the fingerprint: an edited function is run again
) -> Any:
    """For `datasets.map`: raw rows, a table or a mapping, as the same of conversations."""
    records: list[Row] = []
    told: set[str] = set()  # columns that are not used, and that an earlier row of the batch told
    for where, origin, row in rows_of(batch, indices[0], source):
        record: Row = {"source": source.path, "_part": part, "error": "", "removed_by": ""}
        records.append(record | {"origin": origin})
        try:
            if isinstance(row, FormatError):
                raise row
            records[-1] |= (found := _record(row, source, "prompt" in schema.names, told))
            records[-1] |= hashes_of(found) if compared else {}
        except (FormatError, RecursionError) as error:
            if not isinstance(error, BadAnswer) and on_error == "raise":
                raise FormatError(f"{where}: {error}") from None
            why = BAD_ANSWER if isinstance(error, BadAnswer) else BROKEN
            records[-1] |= {"error": f"{where}: {error}", "removed_by": why}
    for each in filters:
        each.mark(records)
    found = {name: [record.get(name) for record in records] for name in schema.names}
    return pa.Table.from_pydict(found, schema=schema) if isinstance(batch, pa.Table) else found


def _record(row: Row, source: Source, preference: bool, told: set[str]) -> Row:
    """The columns of a converted row."""
    record = read_row(row, source.format, merge=source.merge_turns, preference=preference)
    start = record["prompt" if preference else "messages"]
    if source.system_prompt and start[0]["role"] != "system":
        start.insert(0, {"role": "system", "content": source.system_prompt})
    if source.group_by:
        if row.get(source.group_by) is None:
            raise FormatError(f"field {source.group_by!r} is missing or null; group_by needs it")
        record["group"] = json.dumps(row[source.group_by], sort_keys=True, default=str)
    unused = {name: shown for name, shown in record["unused"].items() if name != source.group_by and name not in told}
    told.update(unused)
    return record | {"unused": json.dumps(unused) if unused else None}
