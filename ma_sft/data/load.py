"""Where rows come from: files, globs, `save_to_disk` folders, hub ids, objects in memory; each row with its place.

Parquet, Arrow, saved folders and the hub are read by `datasets` itself. Files of text go through its generator, a row
as JSON text: its JSON reader makes dates of texts like `2024-01-02`, a number of the answer `"4"` where other rows hold
a list, and stops at a column that a later part of the file adds. Here, no value's meaning depends on other rows.
"""

import csv
import gc
import glob
import importlib.util
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import datasets
import fsspec
import multiprocess
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.utils._dill import pklregister

from ma_sft.data.messages import Row, are_objects, read_json, show_columns
from ma_sft.errors import FormatError, RecipeError, one_line
from ma_sft.hub import is_hub_id, load_dataset
from ma_sft.utils import not_there
from ma_sft.version import __version__

__all__ = ["Source", "fingerprint_of", "load_rows", "pklregister", "processes", "rows_of", "table_rows"]

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
KINDS = tuple(OF_A_FILE)
OF_ANY_FILE = tuple({key for keys in OF_A_FILE.values() for key in keys})
PACKED = (".gz", ".zst", ".bz2", ".xz")
MANY_BYTES = 64 << 20  # of several files; from here on, other processes are worth their start
MANY_ROWS, EACH = 20_000, 5_000  # rows for which other processes are worth it, and of each process at least
TOO_DEEP = f"nested deeper than Python reads, some {sys.getrecursionlimit():,} levels"
ENCODING = (
    "if it is in another encoding, set encoding: (such as gb18030, cp1252, utf-16, utf-16-le, utf-16-be or utf-32) in "
    "its entry of `datasets`, or save it as UTF-8"
)
# Columns of rows as JSON text; ERROR stands in a row that its reader refuses.
ROW, PLACE = "_row", "_place"
ERROR = "_error"
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Source:
    """One place that rows come from.

    Args:
        path: a hub id, also as `owner/name@revision:configuration`, a file (`KINDS`; text also .gz, .zst, .bz2, .xz), a
            glob, or a `save_to_disk` folder.
        name: configuration of a hub data set.
        split: split of a hub data set or folder.
        revision: branch, tag or commit of a hub data set; resolved once in a run.
        data_files, data_dir: which files of a hub data set, as in `datasets.load_dataset`.
        format: as in `ma_sft.to_messages`, or `ma_sft.to_preference` in a mixture of preferences.
        columns: `{name in the data: name that the format wants}`, as in `Dataset.rename_columns`.
        ignore: columns that are left out, whatever they hold.
        merge_turns: join neighbouring turns of one role.
        field: key of the JSON object that holds the list of rows.
        encoding: of text files; UTF-8 by default.
        delimiter: between the cells of a CSV file.
        sample_by: what one row of a .txt file is: a `line`, a `paragraph` or the `document`.
        limit: take this many rows, drawn with the mixture's seed (the first ones of a stream); None takes all.
        weight: share of this source among the rows drawn, relative to the other weights.
        system_prompt: system message for conversations that have none.
        filters: filters of this source alone; see `ma_sft.data.filters.Filters`.
        group_by: column that holds the same value in rows which a split must not part, e.g. a conversation's id.
        license: for the card.
        rows: rows in memory, in place of what lies at `path`: a data set of `datasets`, anything with a length whose
            items are rows, or any iterable of rows.
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
    rows: Any = None

    @classmethod
    def of(cls, value: Any, **defaults: Any) -> "Source":
        """A source from a path, rows in memory, or a mapping of the fields above.

        Raises:
            RecipeError: an unknown key or a value of a wrong type.
        """
        if isinstance(value, cls):
            return value
        settings = dict(value) if isinstance(value, Mapping) and not isinstance(value, DatasetDict) else {"path": value}
        path = settings.get("path")
        if isinstance(path, DatasetDict):
            path = _of_split(path, settings.get("split") or defaults.get("split", "train"), "the data set")
        if isinstance(path, Path):
            settings["path"] = str(path)
        elif not isinstance(path, str) and (hasattr(path, "__iter__") or hasattr(path, "__getitem__")):
            name = getattr(getattr(path, "info", None), "dataset_name", None)
            settings |= {"path": f"{type(path).__name__} {name or 'in memory'}", "rows": path}
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown or not isinstance(settings.get("path"), str):
            raise RecipeError(
                f"source {value!r}: {'unknown key ' + repr(unknown[0]) if unknown else 'no path'}; "
                f"keys are {', '.join(known[:-1])}"
            )
        short = re.fullmatch(r"([^@:]+)(?:@([^@:]+))?(?::([^@:]+))?", settings["path"])
        if short and is_hub_id(short[1]) and "rows" not in settings:
            parts = {"path": short[1], "revision": short[2], "name": short[3]}
            settings |= {key: part for key, part in parts.items() if part}
        source = cls(**{**defaults, **settings})
        source._check()
        what, read = source.kind()
        placing = {*PLACES["hub"][1], *OF_ANY_FILE} - {*read}
        for f in fields(cls):
            if f.name in placing and settings.get(f.name, f.default) != f.default:
                raise RecipeError(f"source {source.path}: {f.name} says nothing of {what}; remove it")
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
        """The fields that are set, for a report."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rows"}
        return {name: value for name, value in values.items() if value not in (None, ())}


def kind_of(path: str) -> str:
    """The suffix that tells how a file is read: `.jsonl` of `rows.jsonl.gz`."""
    stem, suffix = os.path.splitext(path)
    return (os.path.splitext(stem)[1] if suffix in PACKED else suffix).lower()


def load_rows(
    source: Source, *, seed: int = 0, streaming: bool = False, num_proc: int | None = None
) -> tuple[Dataset | IterableDataset, np.ndarray[Any, Any] | None]:
    """The raw rows of a source, for `rows_of`; and their numbers in it if they were drawn.

    Raises:
        RecipeError: nothing there, or the hub does not answer.
        FormatError: a file that is not what its name says.
    """
    rows = _load(source, streaming, num_proc)
    if not (isinstance(source.rows, IterableDataset) and rows.features is None):
        rows = rows.with_format("arrow")  # its types tell a null that was written from one that Arrow fills in
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
    if source.place == "memory":
        return _in_memory(source, streaming)
    if source.place == "folder":
        if not ((local / "state.json").exists() or (local / "dataset_dict.json").exists()):
            raise RecipeError(f"{path} is a folder without a saved data set; name its files, e.g. {path}/*.jsonl")
        saved = load_from_disk(path)
        saved = _of_split(saved, source.split, path) if isinstance(saved, DatasetDict) else saved
        return saved.to_iterable_dataset() if streaming else saved
    if source.place == "files":
        return _load_files(source, streaming, num_proc)
    if glob.has_magic(path):
        raise RecipeError(f"the files {path!r} must end in one of {', '.join(KINDS)}, and .gz or .zst if compressed")
    chosen = {key: value for key in ("data_files", "data_dir") if (value := getattr(source, key))}
    return load_dataset(path, source.name, source.split, source.revision, streaming=streaming, **chosen)


def _in_memory(source: Source, streaming: bool) -> Any:
    rows = source.rows
    if isinstance(rows, IterableDataset) and not streaming:
        raise RecipeError(f"{source.path} is a stream: set dataset_streaming (streaming=True), or pass a Dataset")
    if isinstance(rows, Dataset):
        return rows.to_iterable_dataset() if streaming else rows
    if isinstance(rows, IterableDataset):
        return rows
    features = Features({ROW: Value("string")})
    if streaming:
        rows = list(rows) if isinstance(rows, Iterator) else rows  # an iterator ends with the first epoch
        return IterableDataset.from_generator(partial(_as_json, rows), features=features)
    return Dataset.from_dict({ROW: [row[ROW] for row in _as_json(rows)]}, features=features)


def _as_json(rows: Any) -> Iterator[Row]:
    has_length = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    for row in (rows[i] for i in range(len(rows))) if has_length else rows:
        yield {ROW: json.dumps(row, default=lambda value: _text_of_bytes(value) or str(value))}


def _of_split(saved: DatasetDict, split: str, path: str) -> Dataset:
    if split not in saved:
        raise RecipeError(f"{path} has no split {split!r}, it has {', '.join(saved)}; set split")
    return saved[split]


def _load_files(source: Source, streaming: bool, num_proc: int | None) -> Any:
    path = source.path
    files = [path] if Path(path).is_file() else sorted(f for f in glob.glob(path, recursive=True) if Path(f).is_file())
    if not files:
        raise RecipeError(f"the file {not_there(path)}")
    stats = [Path(file).stat() for file in files]
    if not (size := sum(stat.st_size for stat in stats)):
        raise FormatError(f"{path}: the file is empty")
    files = [str(Path(file).resolve()) for file in files]
    kinds = {kind_of(file) for file in files}
    num_proc = num_proc if len(files) > 1 and size > MANY_BYTES and not streaming else None
    more = {"streaming": streaming} | ({"num_proc": min(num_proc, len(files))} if num_proc else {})
    try:
        if kinds <= {".parquet", ".arrow"} and len(kinds) == 1:
            names = [glob.escape(file) for file in files]
            return datasets.load_dataset(kinds.pop()[1:], data_files=names, split="train", **more)
        stamped = [(file, stat.st_mtime_ns, stat.st_size) for file, stat in zip(files, stats, strict=True)]
        how = {key: getattr(source, key) for key in OF_ANY_FILE}
        make: Any = IterableDataset if streaming else Dataset
        return make.from_generator(
            read_files,
            features=Features({ROW: Value("string"), PLACE: Value("string")}),
            gen_kwargs={"files": stamped, "how": how, "version": __version__},
            **{key: value for key, value in more.items() if key == "num_proc"},
        )
    except (DatasetGenerationError, pa.ArrowException, ValueError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        if isinstance(cause, FormatError | RecipeError):
            raise cause from None
        if "corresponds to no data" in str(error):
            raise FormatError(f"{path}: the data set is empty; give at least one row") from None
        other_process = re.search(r"ma_sft\.errors\.\w+: (.*)", str(cause))
        what = f"{path}: cannot be read as {kind_of(path)[1:]}: {one_line(cause)[:200]}"
        raise FormatError(other_process[1] if other_process else what) from None


def read_files(files: list[tuple[str, int, int]], how: dict[str, Any], version: str) -> Iterator[Row]:
    """The rows of files of text as JSON text with their places (`file, line 3`); what it depends on are its arguments.

    Args:
        files: paths, with the times and sizes that tell `datasets`' cache that they changed.
        how: the fields of `Source` in `OF_A_FILE`.
    """
    for file, _, _ in files:
        where, kind = _short(file), kind_of(file)
        if file.endswith(".zst") and not importlib.util.find_spec("zstandard"):
            raise RecipeError(f"{where}: reading .zst needs another package: pip install 'ma-sft[data]'")
        encoding, errors = (how["encoding"], "strict") if how["encoding"] else ("utf-8-sig", "surrogateescape")
        newline = "" if kind in (".csv", ".tsv") else "\n"
        try:
            with fsspec.open(
                file, "rt", compression="infer", encoding=encoding, errors=errors, newline=newline
            ) as stream:
                for place, text in READERS.get(kind, _json)(stream, where, how):
                    if not text.isascii() and (broken := SURROGATE.search(text)):
                        of_a_byte = "\udc80" <= broken[0] <= "\udcff"  # how Python reads one that is not UTF-8
                        text = json.dumps({ERROR: f"not UTF-8 text: {ENCODING}"} if of_a_byte else json.loads(text))
                    yield {ROW: text, PLACE: f"{file}, {place}"}
        except FormatError:
            raise
        except UnicodeDecodeError as error:
            raise FormatError(f"{where}: not {encoding} text: {error.reason}; {ENCODING}") from None
        except Exception as error:  # each compression library has its own
            raise FormatError(f"{where}: cannot be read as {kind[1:]}: {one_line(error)[:200]}") from None


Rows = Iterator[tuple[str, str]]  # place in the file, row as JSON text


def _json(stream: Any, where: str, how: dict[str, Any]) -> Rows:
    """A row a line; or a list of rows; or one object, which is a row or holds them."""
    head: list[str] = []
    for line in stream:
        head.append(line)
        if len(list(filter(str.strip, head))) == 2:
            break
    full = [line for line in head if line.strip()]
    if kind_of(where) not in READERS and full and full[0].lstrip()[0] not in "{[":
        raise FormatError(
            f"the file {where!r} exists, but it is none of {', '.join(KINDS)}; save its rows as one of them "
            "(a spreadsheet as CSV in UTF-8), and end its name so"
        )
    lines: Iterator[str] = itertools.chain(head, stream)
    if how["field"] or not _has_a_row_a_line(full):
        text = "".join(lines)
        try:
            yield from _json_document(text, where, how["field"])
            return
        except FormatError:  # or the first line is cut off, among good ones
            if how["field"] or len(full) < 2 or full[0][0] != "{" or (kind_of(where) == ".json" and full[1][0] != "{"):
                raise
        lines = iter(text.split("\n"))
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"line {number}", line.rstrip("\r\n")


def _has_a_row_a_line(lines: list[str]) -> bool:
    """Whether the first lines of a file with anything on them begin JSON Lines, rather than one JSON document."""
    first = lines[0] if lines else ""
    try:
        json.loads(first)
    except RecursionError:
        return True
    except ValueError as error:  # broken inside the line, or the value goes on in the next one
        return getattr(error, "pos", 0) < len(first.rstrip())
    return len(lines) > 1


def _is_dialogue(value: list[Any]) -> bool:
    """Whether a list is one conversation rather than a list of rows."""
    return bool(value) and are_objects(value) and all("role" in turn or "from" in turn for turn in value)


# Columns of a row that hold objects, and are no rows themselves.
OWN_LISTS = ("messages", "conversations", "conversation", "contents", "history", "tools", "functions", "choices")


_dump = partial(json.dumps, ensure_ascii=False)


def _json_document(text: str, where: str, field: str | None) -> Rows:
    try:
        value = read_json(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"{where}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except (FormatError, RecursionError) as error:
        what = TOO_DEEP if isinstance(error, RecursionError) else error
        raise FormatError(f"{where}: not valid JSON: {what}") from None
    held: dict[str, Any] = {}
    if field:
        held = {field: value.get(field) if isinstance(value, dict) else None}
        if not isinstance(held[field], list):
            found = show_columns(value) if isinstance(value, dict) else type(value).__name__
            raise FormatError(f"{where}: field: {field!r} is no list of rows; found {found}")
    elif isinstance(value, list) and not (_is_dialogue(value) and "\n" not in text.strip()):
        held = {"": value}
    elif isinstance(value, dict):
        lists = {key: rows for key, rows in value.items() if key not in OWN_LISTS and rows and are_objects(rows)}
        held = {key: rows for key, rows in lists.items() if not _is_dialogue(rows)}
    if len(held) > 1:
        raise FormatError(f"{where}: rows may be in {show_columns(held)}; say which: field")
    if not held:
        yield "line 1", _dump(value)
    for number, row in enumerate(next(iter(held.values()), []), 1):
        yield f"row {number}", _dump(row)


def _csv(stream: Any, where: str, how: dict[str, Any]) -> Rows:
    csv.field_size_limit(sys.maxsize)
    delimiter = how["delimiter"] or ("\t" if kind_of(where) == ".tsv" else ",")
    reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
    line = 1
    try:
        names = list(reader.fieldnames or [])
        if twice := next((name for name in names if name and names.count(name) > 1), None):
            raise FormatError(f"{where}, line 1: column {twice!r} stands twice; rename one of them")
        mark = next((mark for mark in ";|\t" if len(names) == 1 and mark in names[0]), None)
        if mark:
            raise FormatError(
                f"{where}, line 1: one column {names[0]!r}; if {mark!r} parts its cells, set delimiter: "
                f"{json.dumps(mark)} in its entry of `datasets`, or save it with commas"
            )
        # A first column without a name is the index that pandas writes; any other holds something.
        reader.fieldnames = [name or (f"column {at}" if at > 1 else "") for at, name in enumerate(names, 1)]
        line = reader.line_num
        for row in reader:
            wrong = f"more cells than the {len(row) - 1} columns of the first line" if None in row else None
            if list(row.values()) == names:
                wrong = "the names of the columns once more; remove this line"
            yield f"line {line + 1}", _dump({ERROR: wrong} if wrong else row)
            line = reader.line_num
    except csv.Error as error:
        raise FormatError(f"{where}, line {line + 1}: not valid CSV: {error}") from None


def _text(stream: Any, where: str, how: dict[str, Any]) -> Rows:
    """A text a line, a paragraph or a file, as `datasets`' own reader has it; blank ones are none."""
    if how["sample_by"] == "line":
        texts = ((f"line {number}", line.removesuffix("\n")) for number, line in enumerate(stream, 1))
    else:
        whole = stream.read()
        pieces = [whole] if how["sample_by"] == "document" else re.split(r"\n\s*\n", whole.strip("\n"))
        texts = ((f"row {number}", piece) for number, piece in enumerate(filter(str.strip, pieces), 1))
    yield from ((place, _dump({"text": text})) for place, text in texts if text.strip())


READERS: dict[str, Callable[[Any, str, dict[str, Any]], Rows]] = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), _json),
    **dict.fromkeys((".csv", ".tsv"), _csv),
    ".txt": _text,
}


def _short(file: str) -> str:
    """The path as the user would write it: relative where it is below the working folder."""
    return file.removeprefix(os.path.join(os.getcwd(), ""))


def rows_of(batch: Any, indices: Sequence[int], source: Source) -> Iterator[tuple[str, str, Row | FormatError]]:
    """(where for an error, `file:line`, row or why it is none) of each row in a batch of `load_rows`."""
    if isinstance(batch, pa.Table):
        batch = {name: _values(batch.column(name)) for name in batch.column_names}
    for at, index in enumerate(indices):
        row: Any
        where, origin = f"{source.path}, row {index + 1}", f"{source.path}:{index + 1}"
        if PLACE in batch:
            where = _short(batch[PLACE][at])
            file, _, place = where.rpartition(", ")
            origin = f"{file}:{place.rpartition(' ')[2]}"
        if ROW in batch:
            row = _parse(batch[ROW][at])
        else:
            origin = batch["origin"][at] if "origin" in batch else origin  # what `ma-sft data build` wrote
            row = {key: values[at] for key, values in batch.items()}
        yield where, origin, _mapped(row, source) if isinstance(row, dict) else row


def _values(column: pa.ChunkedArray) -> list[Any]:
    convert = _from_arrow(column.type)
    return [convert(value) for value in column.to_pylist()] if convert else column.to_pylist()


def _from_arrow(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """How a value of an Arrow type becomes the JSON that it was made from; None if it is that already.

    Arrow gives each object every key that any row has: a null argument of a tool call would be learned. So the nulls of
    its objects go. `datasets`' `Json` holds the text of an object: there, a null was written, and stays.
    """
    if isinstance(kind, pa.JsonType):
        return lambda text: None if text is None else json.loads(text)
    if pa.types.is_struct(kind):
        inner = {field.name: _from_arrow(field.type) or (lambda item: item) for field in kind}
        return lambda value: (
            None if value is None else {key: inner[key](v) for key, v in value.items() if v is not None}
        )
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = _from_arrow(kind.value_type)
        return item and (lambda values: None if values is None else [item(value) for value in values])
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return lambda value: None if value is None else _text_of_bytes(value)
    return None


def _text_of_bytes(value: Any) -> Any:
    """Bytes as text, or as an object that no format takes for text; None for other values."""
    if not isinstance(value, bytes):
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return {"bytes": f"{len(value)}, which are no UTF-8 text"}


def _parse(text: str) -> Row | FormatError:
    try:
        row = read_json(text)
    except json.JSONDecodeError as error:
        nulls = f"; {ENCODING}" if "\0" in text else ""
        return FormatError(f"not valid JSON: {error.msg} at column {error.colno}{nulls}")
    except RecursionError:
        return FormatError(f"not valid JSON: {TOO_DEEP}")
    except ValueError as error:
        return FormatError(f"not valid JSON: {error}")
    if row and are_objects(row):
        return {"messages": row}  # a bare conversation
    if not isinstance(row, dict):
        return FormatError(f"a JSON object expected, found {type(row).__name__} {str(row)[:60]!r}")
    return FormatError(row[ERROR]) if ERROR in row else row


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


def fingerprint_of(rows: Any) -> str:
    """What decides the rows, by which `datasets` finds again what was made of them."""
    return str(rows._fingerprint)


def table_rows(rows: Dataset) -> Any:
    """The numbers (int64) of the rows in the table `rows.data`, None where they are all of it in its order.

    A shuffled or filtered data set is a table and a list of its rows; `flatten_indices` would copy it all.
    """
    return None if rows._indices is None else rows._indices.column(0).to_numpy().astype("int64")


def processes(num_proc: int | None, rows: int) -> int | None:
    """`num_proc`, or by default all cores for many rows and this process alone for few; None is this process alone."""
    if num_proc is None and rows >= MANY_ROWS:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_proc = min(cores, rows // EACH)
    return None if num_proc == 1 else num_proc  # `datasets` would start a process for one


@contextmanager
def frozen() -> Iterator[None]:
    """Let the garbage collector leave alone what is there already: the libraries' objects, a million and more.

    To walk through them again and again took a tenth of the preparation, and makes forked workers copy them.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Inherited:
    """A function for `Dataset.map` that forked workers have already, so that it is not pickled for each of them.

    To pickle a tokenizer of 150,000 tokens takes two seconds, which are 40,000 tokenised rows. It must be there
    before the workers are; where they are not forked it is pickled.
    """

    _known: ClassVar[WeakValueDictionary[int, "Inherited"]] = WeakValueDictionary()

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._known[id(self)] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        if multiprocess.get_start_method() == "fork":
            return _inherited, (id(self),)
        return Inherited, (self.function,)


def _inherited(key: int) -> Inherited:
    return Inherited._known[key]
