"""Where rows come from: hub ids, files, globs, `save_to_disk` folders; each row with its file and line."""

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from ma_sft.data.reader import FILE, KINDS, PLACE, RAW, ROW, TOO_DEEP, RowReader, kind_of, not_utf_8, other_encoding
from ma_sft.data.values import Row, are_objects, plain, read_json
from ma_sft.errors import FormatError, RecipeError
from ma_sft.hub import is_hub_id, load_dataset
from ma_sft.utils import not_there
from ma_sft.version import __version__

# What a source is, in words, and which of its fields say where its rows are and how they are read; of files by suffix.
PLACES = {
    "memory": ("a data set in memory", ("split",)),
    "folder": ("a saved data set", ("split",)),
    "hub": ("a hub data set", ("name", "split", "revision", "data_files", "data_dir")),
}
OF_A_FILE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), ("field", "encoding")),
    **dict.fromkeys((".csv", ".tsv"), ("encoding", "delimiter")),
    **dict.fromkeys((".parquet", ".arrow"), ()),
    ".txt": ("encoding", "sample_by"),
}
OF_ANY_FILE = tuple({key for keys in OF_A_FILE.values() for key in keys})
PLACING = {*PLACES["hub"][1], *OF_ANY_FILE}
MANY_BYTES = 64 << 20  # of several files; from here on, other processes are worth their start


@dataclass(frozen=True)
class Source:
    """One place that rows come from.

    Args:
        path: a hub id, also as `owner/name@revision:configuration`, a file (`ma_sft.data.reader.KINDS`; also .gz, .zst,
            .bz2, .xz), a glob, or a `save_to_disk` folder.
        name: configuration of a hub data set.
        split: split of a hub data set or folder.
        revision: branch, tag or commit of a hub data set; resolved once in a run.
        data_files, data_dir: which files of a hub data set, as in `datasets.load_dataset`.
        format: as in `ma_sft.to_messages`, or `ma_sft.to_preference` in a mixture of preferences.
        columns: `{name in the data: name that the format wants}`, as in `Dataset.rename_columns`.
        ignore: columns that are left out, whatever they say.
        merge_turns: join neighbouring turns of one role.
        field: key of the JSON object that holds the list of rows.
        encoding: of text files; UTF-8, and UTF-16 with its mark, are known without it.
        delimiter: between the cells of a CSV file.
        sample_by: what one row of a .txt file is: a `line`, a `paragraph` or the `document`.
        limit: take this many rows, drawn with the mixture's seed (the first ones of a stream); None takes all.
        weight: share of this source among the rows drawn, relative to the other weights.
        system_prompt: system message for conversations that have none.
        filters: filters of this source alone; see `ma_sft.data.filters.Filters`.
        group_by: column that holds the same value in rows which a split must not part, e.g. a conversation's id.
        license: for the card.
        rows: a data set in memory, in place of what lies at `path`.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: Any = None
    data_dir: str | None = None
    format: str | None = None
    columns: dict[str, str] | None = None
    ignore: tuple[str, ...] = ()
    merge_turns: bool = False
    field: str | None = None
    encoding: str | None = None
    delimiter: str | None = None
    sample_by: str = "line"
    limit: int | None = None
    weight: float | None = None
    system_prompt: str | None = None
    filters: dict[str, Any] | None = None
    group_by: str | None = None
    license: str | None = None
    rows: Dataset | IterableDataset | None = None

    @classmethod
    def of(cls, value: Any, **defaults: Any) -> "Source":
        """A source from a path, a data set of `datasets`, or a mapping of the fields above.

        Raises:
            RecipeError: an unknown key or a value of a wrong type.
        """
        if isinstance(value, cls):
            return value
        settings = dict(value) if isinstance(value, Mapping) and not isinstance(value, DatasetDict) else {"path": value}
        given = settings.get("path")
        if isinstance(given, DatasetDict):
            given = _of_split(given, settings.get("split") or defaults.get("split", "train"), "the data set")
        if isinstance(given, Dataset | IterableDataset):
            settings |= {"path": f"{type(given).__name__} {given.info.dataset_name or 'in memory'}", "rows": given}
        elif isinstance(given, Path):
            settings["path"] = str(given)
        unknown = sorted(set(settings) - {f.name for f in fields(cls)})
        if unknown or not isinstance(settings.get("path"), str):
            raise RecipeError(
                f"source {value!r}: {'unknown key ' + repr(unknown[0]) if unknown else 'no path'}; "
                f"keys are {', '.join(f.name for f in fields(cls) if f.name != 'rows')}"
            )
        found = re.fullmatch(r"([^@:]+)(?:@([^@:]+))?(?::([^@:]+))?", settings["path"])
        if found and is_hub_id(found[1]) and "rows" not in settings:
            short = {"path": found[1], "revision": found[2], "name": found[3]}
            settings |= {key: value for key, value in short.items() if value}
        source = cls(**{**defaults, **settings})
        source._check()
        what, read = source.kind()
        said = [f.name for f in fields(cls) if f.name in PLACING and settings.get(f.name, f.default) != f.default]
        for key in (key for key in said if key not in read):
            raise RecipeError(f"source {source.path}: {key} says nothing of {what}; remove it")
        return replace(source, ignore=tuple(source.ignore))

    @property
    def place(self) -> str:
        """Where the rows are: in `memory`, a saved `folder`, `files`, or on a `hub`."""
        if self.rows is not None:
            return "memory"
        if Path(self.path).is_dir() and not (self.data_files or self.data_dir):
            return "folder"
        return "files" if Path(self.path).is_file() or kind_of(self.path) in KINDS else "hub"

    def kind(self) -> tuple[str, tuple[str, ...]]:
        """What the source is, in words, and which of its fields say where the rows are and how they are read."""
        if self.place != "files":
            return PLACES[self.place]
        suffix = kind_of(self.path)
        return f"a {suffix} file", OF_A_FILE.get(suffix, OF_ANY_FILE)

    def _check(self) -> None:
        kinds: dict[str, Any] = {"limit": int, "weight": int | float, "merge_turns": bool, "columns": dict}
        kinds |= {"ignore": list | tuple} | dict.fromkeys(("field", "encoding", "delimiter", "name", "revision"), str)
        for key, kind in kinds.items():
            value, low = getattr(self, key), {"limit": 1, "weight": 0}.get(key)
            wrong = not isinstance(value, kind) or (low is not None and (isinstance(value, bool) or value < low))
            if value is not None and wrong:
                what = "map names to names" if key == "columns" else f"be {getattr(kind, '__name__', kind)}"
                what = what if low is None else f"be a number from {low}"
                raise RecipeError(f"source {self.path}: {key} must {what}, found {value!r}")
        if self.sample_by not in ("line", "paragraph", "document"):
            raise RecipeError(f"source {self.path}: sample_by: line, paragraph or document, found {self.sample_by!r}")

    def described(self) -> dict[str, Any]:
        """What a report says of it: the fields that are set."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rows"}
        return {name: value for name, value in values.items() if value not in (None, ())}


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
    path, local, place = source.path, Path(source.path), source.place
    if place == "memory":
        return _in_memory(source, streaming)
    if place == "folder":
        if not ((local / "state.json").exists() or (local / "dataset_dict.json").exists()):
            raise RecipeError(f"{path} is a folder without a saved data set; name its files, e.g. {path}/*.jsonl")
        saved = load_from_disk(path)
        saved = _of_split(saved, source.split, path) if isinstance(saved, DatasetDict) else saved
        return saved.to_iterable_dataset() if streaming else saved
    if place == "files":
        return _load_files(source, streaming, num_proc)
    if glob.has_magic(path):
        raise RecipeError(f"the files {path!r} must end in one of {', '.join(KINDS)}, and .gz or .zst if compressed")
    chosen = {key: value for key in ("data_files", "data_dir") if (value := getattr(source, key))}
    return load_dataset(path, source.name, source.split, source.revision, streaming=streaming, **chosen)


def _in_memory(source: Source, streaming: bool) -> Any:
    if isinstance(source.rows, IterableDataset) and not streaming:
        raise RecipeError(f"{source.path} is a stream: set dataset_streaming (streaming=True), or pass a Dataset")
    return source.rows.to_iterable_dataset() if streaming and isinstance(source.rows, Dataset) else source.rows


def _of_split(saved: DatasetDict, split: str, path: str) -> Dataset:
    if split not in saved:
        raise RecipeError(f"{path} has no split {split!r}, it has {', '.join(saved)}; set split")
    return saved[split]


def _load_files(source: Source, streaming: bool, num_proc: int | None) -> Any:
    path = source.path
    files = [path] if Path(path).is_file() else sorted(f for f in glob.glob(path, recursive=True) if Path(f).is_file())
    if not files:
        raise RecipeError(f"the file {not_there(path)}")
    size = sum(Path(file).stat().st_size for file in files)
    if size == 0:
        raise FormatError(f"{path}: the file is empty")
    builder = RowReader(
        data_files={"train": [glob.escape(str(Path(f).resolve())) for f in files]},
        hash=f"{__version__} {' '.join(RAW)}",
        **{key: getattr(source, key) for key in ("field", "encoding", "delimiter", "sample_by")},
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


def rows_of(
    batch: Mapping[str, Sequence[Any]], indices: Sequence[int], source: Source
) -> Iterator[tuple[str, str, Row | FormatError]]:
    """(where for an error, `file:line`, row or why it is none) of each row in a batch of `load_rows`."""
    for at, index in enumerate(indices):
        row: Any
        if ROW in batch:
            file, place = batch[FILE][at], batch[PLACE][at]
            where, origin = f"{file}, {place}", f"{file}:{place.rpartition(' ')[2]}"
            row = _parse(batch[ROW][at], is_table=kind_of(file) in (".csv", ".tsv"))
        else:
            where, origin = f"{source.path}, row {index + 1}", f"{source.path}:{index + 1}"
            origin = batch["origin"][at] if "origin" in batch else origin  # what `ma-sft data build` wrote
            row = plain({key: values[at] for key, values in batch.items()})
        yield where, origin, _mapped(row, source) if isinstance(row, dict) else row


def _parse(text: bytes, is_table: bool) -> Row | FormatError:
    try:
        row = read_json(text)
    except json.JSONDecodeError as error:
        nulls = f"; {other_encoding(text)}" if b"\0" in text else ""
        return FormatError(f"not valid JSON: {error.msg} at column {error.colno}{nulls}")
    except UnicodeDecodeError as error:
        return FormatError(f"not valid JSON: {not_utf_8(error)}")
    except RecursionError:
        return FormatError(f"not valid JSON: {TOO_DEEP}")
    except ValueError as error:
        return FormatError(f"not valid JSON: {error}")
    if isinstance(row, str) and is_table:
        return FormatError(row)
    if row and are_objects(row):
        return {"messages": row}  # a bare conversation
    if not isinstance(row, dict):
        return FormatError(f"a JSON object expected, found {type(row).__name__} {str(row)[:60]!r}")
    return row


def _mapped(row: Row, source: Source) -> Row | FormatError:
    """The row under the names of the column map; a column that this row lacks is null."""
    if not source.columns and not source.ignore:
        return row
    columns = source.columns or {}
    kept = {key: value for key, value in row.items() if key not in columns and key not in source.ignore}
    for old, new in columns.items():
        if row.get(old) is not None and kept.get(new) is not None:
            return FormatError(f"the column map would write {old!r} over {new!r}; ignore: [{new}], or map it as well")
        kept[new] = row.get(old)
    return kept
