"""Where rows come from: hub ids, files, globs, `save_to_disk` folders; each row with its file and line."""

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from ma_sft.data.formats import Row
from ma_sft.data.reader import FILE, KINDS, LINE, ROW, RowReader, kind_of
from ma_sft.errors import FormatError, RecipeError
from ma_sft.hub import is_hub_id, load_dataset
from ma_sft.version import __version__

MANY_BYTES = 64 << 20  # of several files; from here on, other processes are worth their start


@dataclass(frozen=True)
class Source:
    """One place that rows come from.

    Args:
        path: a hub id, also as `owner/name@revision:configuration`, a file (.jsonl, .json, .csv, .tsv, .parquet; also
            .gz, .zst, .bz2, .xz), a glob, or a `save_to_disk` folder.
        name: configuration of a hub data set.
        split: split of a hub data set or folder.
        revision: branch, tag or commit of a hub data set; resolved once in a run.
        data_files, data_dir: which files of a hub data set, as in `datasets.load_dataset`.
        format: as in `ma_sft.to_messages`, or `ma_sft.to_preference` in a mixture of preferences.
        columns: `{name in the data: name that the format wants}`, as in `Dataset.rename_columns`.
        limit: take this many rows, drawn with the mixture's seed (the first ones of a stream); None takes all.
        weight: share of this source among the rows drawn, relative to the other weights.
        system_prompt: system message for conversations that have none.
        filters: filters of this source alone; see `ma_sft.data.filters.Filters`.
        group_by: column that holds the same value in rows which a split must not part, e.g. a conversation's id.
        license: for the card.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: Any = None
    data_dir: str | None = None
    format: str | None = None
    columns: dict[str, str] | None = None
    limit: int | None = None
    weight: float | None = None
    system_prompt: str | None = None
    filters: dict[str, Any] | None = None
    group_by: str | None = None
    license: str | None = None

    @classmethod
    def of(cls, value: Any, **defaults: Any) -> "Source":
        """A source from a path or a mapping of the fields above.

        Raises:
            RecipeError: an unknown key or a value of a wrong type.
        """
        if isinstance(value, cls):
            return value
        settings = {"path": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else {}
        unknown = sorted(set(settings) - {f.name for f in fields(cls)})
        if unknown or not isinstance(settings.get("path"), str):
            raise RecipeError(
                f"source {value!r}: {'unknown key ' + repr(unknown[0]) if unknown else 'no path'}; "
                f"keys are {', '.join(f.name for f in fields(cls))}"
            )
        for key, types, low in (("limit", int, 1), ("weight", (int, float), 0)):
            number = settings.get(key)
            if number is not None and (isinstance(number, bool) or not isinstance(number, types) or number < low):
                raise RecipeError(f"source {settings['path']}: {key} must be a number from {low}, found {number!r}")
        if not isinstance(settings.get("columns") or {}, dict):
            raise RecipeError(f"source {settings['path']}: columns must map names to names")
        found = re.fullmatch(r"([^@:]+)(?:@([^@:]+))?(?::([^@:]+))?", settings["path"])
        if found and is_hub_id(found[1]):
            short = {"path": found[1], "revision": found[2], "name": found[3]}
            settings |= {key: value for key, value in short.items() if value}
        return cls(**{**defaults, **settings})


def load_rows(
    source: Source, *, seed: int = 0, streaming: bool = False, num_proc: int | None = None
) -> tuple[Dataset | IterableDataset, np.ndarray[Any, Any] | None]:
    """The raw rows of a source, and their numbers in it if they were drawn from a folder or hub data set.

    A file's rows have the columns of `RAW`; `rows_of` reads both kinds.

    Raises:
        RecipeError: nothing there, or the hub does not answer.
        FormatError: a file that is not what its name says.
    """
    rows = _load(source, streaming, num_proc)
    if streaming:
        return (rows.take(source.limit) if source.limit else rows), None
    if len(rows) == 0:
        raise FormatError(f"{source.path}: the data set is empty; give at least one row")
    if source.limit is None or source.limit >= len(rows):
        return rows, None
    drawn = np.sort(np.random.default_rng(seed).choice(len(rows), source.limit, replace=False))
    return rows.select(drawn), drawn


def _load(source: Source, streaming: bool, num_proc: int | None) -> Any:
    path, local = source.path, Path(source.path)
    if local.is_dir():
        if not ((local / "state.json").exists() or (local / "dataset_dict.json").exists()):
            raise RecipeError(f"{path} is a folder without a saved data set; name its files, e.g. {path}/*.jsonl")
        saved = load_from_disk(path)
        if isinstance(saved, DatasetDict):
            if source.split not in saved:
                known = ", ".join(saved)
                raise RecipeError(f"{path} has no split {source.split!r}, it has {known}; set split")
            saved = saved[source.split]
        return saved.to_iterable_dataset() if streaming else saved
    if kind_of(path) in KINDS:
        files = [path] if local.is_file() else sorted(f for f in glob.glob(path, recursive=True) if Path(f).is_file())
        if not files:
            raise RecipeError(f"the file {path!r} does not exist")
        size = sum(Path(file).stat().st_size for file in files)
        if size == 0:
            raise FormatError(f"{path}: the file is empty")
        builder = RowReader(
            data_files={"train": [glob.escape(str(Path(f).resolve())) for f in files]}, hash=__version__
        )
        if streaming:
            return builder.as_streaming_dataset(split="train")
        try:
            builder.download_and_prepare(num_proc=num_proc if len(files) > 1 and size > MANY_BYTES else None)
        except DatasetGenerationError as error:
            cause = error.__cause__
            raise cause if isinstance(cause, FormatError | RecipeError | OSError) else error from None
        if not builder.info.splits["train"].num_examples:
            raise FormatError(f"{path}: the data set is empty; give at least one row")
        return builder.as_dataset(split="train")
    if glob.has_magic(path):
        raise RecipeError(f"the files {path!r} must end in one of {', '.join(KINDS)}, and .gz or .zst if compressed")
    chosen = {key: value for key in ("data_files", "data_dir") if (value := getattr(source, key))}
    return load_dataset(path, source.name, source.split, source.revision, streaming=streaming, **chosen)


def rows_of(
    batch: Mapping[str, Sequence[Any]], indices: Sequence[int], source: Source
) -> Iterator[tuple[str, str, Row | FormatError]]:
    """(where for an error, `file:line`, row or why it is none) of each row in a batch of `load_rows`."""
    for at, index in enumerate(indices):
        row: Any
        if ROW in batch:
            file, line = batch[FILE][at], batch[LINE][at]
            where, origin = f"{file}, {'row' if file.endswith('.parquet') else 'line'} {line}", f"{file}:{line}"
            try:
                row = json.loads(batch[ROW][at])
                if isinstance(row, str) and kind_of(file) in (".csv", ".tsv"):
                    raise FormatError(row)
                if not isinstance(row, dict):
                    raise FormatError(f"a JSON object expected, found {type(row).__name__} {str(row)[:60]!r}")
            except FormatError as error:
                row = error
            except json.JSONDecodeError as error:
                row = FormatError(f"not valid JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                row = FormatError(f"not valid JSON: {error}")
        else:
            where, origin = f"{source.path}, row {index + 1}", f"{source.path}:{index + 1}"
            origin = batch["origin"][at] if "origin" in batch else origin  # what `ma-sft data build` wrote
            row = _without_nulls({key: values[at] for key, values in batch.items()})
        if isinstance(row, dict):
            for old, new in (source.columns or {}).items():
                if old not in row:
                    row = FormatError(f"field {old!r} of the column map is missing; found {sorted(row)}")
                    break
                row = {**{key: value for key, value in row.items() if key != old}, new: row[old]}
        yield where, origin, row


def _without_nulls(value: Any) -> Any:
    """Arrow gives each object every key that any row has; a null argument of a tool call would be learned."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
