"""Where rows come from: files, globs, `save_to_disk` folders, hub ids, objects in memory; each row with its place.

Parquet, Arrow, saved folders and the hub are read by `datasets` itself. Files of text are read here, each row as JSON
text: the JSON reader of `datasets` makes dates of texts like `2024-01-02`, a number of the answer `"4"` where other
rows hold a list, and stops at a column that a later part of the file adds; its CSV reader takes a row with one cell too
many for one with an index. Here, no value's meaning depends on other rows.
"""

import csv
import glob
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints
from weakref import WeakValueDictionary

import datasets
import fsspec
import multiprocess
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from datasets.utils._dill import pklregister
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ma_sft.data.messages import Row, are_objects, read_json, show_columns
from ma_sft.errors import FormatError, RecipeError, one_line
from ma_sft.hub import is_hub_id, load_dataset
from ma_sft.utils import atomic_dir, not_there
from ma_sft.version import __version__

__all__ = ["Source", "fingerprint_of", "load_rows", "pklregister", "processes", "read_saved", "rows_of", "table_rows"]

# What a source is, in words, and which of its fields say where its rows are and how they are read; of files by suffix.
PLACES = {
    "memory": ("a data set in memory", ("split",)),
    "folder": ("a saved data set", ("split",)),
    "hub": ("a hub data set", ("name", "split", "revision", "data_files", "data_dir")),
}
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
JSON_LINES = (".jsonl", ".ndjson")  # the other is mostly one document
OF_A_FILE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(JSON_SUFFIXES, ("field", "encoding")),
    **dict.fromkeys((".csv", ".tsv"), ("encoding", "delimiter")),
    **dict.fromkeys((".parquet", ".arrow"), ()),
    **dict.fromkeys((".txt", ".md"), ("encoding", "sample_by")),
}
OF_ANY_FILE = ("field", "encoding", "delimiter", "sample_by")
PACKED = (".gz", ".zst", ".bz2", ".xz")
AT_ONCE = 1_000  # rows of text that are written at once
MANY_ROWS, EACH = 20_000, 5_000  # rows for which other processes are worth it, and of each process at least
ENCODING = (
    "save it as UTF-8, or name its encoding: datasets: [{path: FILE, encoding: cp1252}] (or gb18030, utf-16, "
    "utf-16-le, utf-16-be, utf-32, ...)"
)
# Columns of rows as JSON text; ERROR stands in a row that its reader refuses.
ROW, PLACE = "ma_sft row", "ma_sft place"  # no column of a user's is named so
NUMBER = "ma_sft number"  # of a row that was drawn
ERROR = "ma_sft error"
TEXT = Features({ROW: Value("string"), PLACE: Value("string")})
EMPTY = "the data set is empty; give at least one row"
SURROGATE = re.compile("[\ud800-\udfff]")
NOT_UTF8 = json.dumps({ERROR: f"not UTF-8 text: {ENCODING}"})
T = TypeVar("T")


def checked(cls: type[T], settings: Mapping[str, Any], what: str) -> T:
    """A `strict` dataclass of these settings; raises `RecipeError` at an unknown key or a value of another type."""
    try:
        return cls(**settings)
    except (TypeError, StrictDataclassError) as error:
        keys = f"; keys are {', '.join(get_type_hints(cls))}" if isinstance(error, TypeError) else ""
        raise RecipeError(f"{what}: {one_line(error.__cause__ or error)}{keys}") from None


@strict
@dataclass
class Source:
    """One place that rows come from; in a recipe an entry of `datasets`."""

    path: str  # a hub id, a file (of `OF_A_FILE`, text also .gz, .zst, .bz2, .xz), a glob, a `save_to_disk` folder
    name: str | None = None  # configuration of a hub data set; short: `owner/name@revision:configuration`
    split: str = "train"  # of a hub data set or folder
    revision: str | None = None  # branch, tag or commit of a hub data set; resolved once in a run
    data_files: Any = None  # which files of a hub data set, as in `datasets.load_dataset`
    data_dir: str | None = None  # and of which folder in it
    format: Any = None  # as in `to_messages`, or `to_preference` in preferences
    columns: dict[str, str] | None = None  # {name in the data: name that the format wants}
    ignore: list[str] | tuple[str, ...] = ()  # columns that are left out, whatever they hold
    merge_turns: bool = False  # join neighbouring turns of one role
    field: str | None = None  # key of the JSON object that holds the list of rows
    encoding: str | None = None  # of text files; UTF-8 by default
    delimiter: str | None = None  # between the cells of a CSV file; a comma by default
    sample_by: Literal["line", "paragraph", "document"] = "line"  # what one row of a .txt file is
    limit: int | None = None  # take this many rows, drawn with the mixture's seed (the first ones of a stream)
    weight: float | int | None = None  # share of this source among the rows drawn, relative to the other weights
    system_prompt: str | None = None  # system message for conversations that have none
    filters: Any = None  # of this source alone; see `ma_sft.data.filters.Filters`
    group_by: str | None = None  # column with the same value in rows that a split must not part
    license: str | None = None  # for the card
    # In place of what lies at `path`: a data set of `datasets`, a DataFrame, anything with a length whose items are
    # rows, any iterable of rows, or a function that gives one
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
        if isinstance(path, Path):
            settings["path"] = str(path)
        elif path is not None and not isinstance(path, str):
            name = getattr(getattr(path, "info", None), "dataset_name", None)
            settings |= {"path": f"{type(path).__name__} {name or 'in memory'}", "rows": path}
        what = f"source {settings.get('path', value)}"
        found = checked(cls, {**defaults, **settings}, what)
        short = re.fullmatch(r"([^@:]+)(?:@([^@:]+))?(?::([^@:]+))?", found.path)
        if short and is_hub_id(short[1]) and "rows" not in settings:
            parts: dict[str, Any] = {"path": short[1], "revision": short[2], "name": short[3]}
            found = replace(found, **{key: part for key, part in parts.items() if part})
        kind, read = found.kind()
        for key in {*PLACES["hub"][1], *OF_ANY_FILE} - {*read}:
            if settings.get(key, getattr(cls, key)) != getattr(cls, key):
                raise RecipeError(f"{what}: {key} says nothing of {kind}; remove it")
        return found

    @property
    def place(self) -> str:
        """Where the rows are: in `memory`, a saved `folder`, `files`, or on a `hub`."""
        if self.rows is not None:
            return "memory"
        if Path(self.path).is_dir() and not (self.data_files or self.data_dir):
            return "folder"
        is_file = Path(self.path).is_file() or kind_of(self.path) in OF_A_FILE or glob.has_magic(self.path)
        return "files" if is_file else "hub"

    def kind(self) -> tuple[str, tuple[str, ...]]:
        """What the source is, in words, and which of its fields say where the rows are and how they are read."""
        suffix = kind_of(self.path)
        return PLACES.get(self.place) or (f"a {suffix} file", OF_A_FILE.get(suffix, OF_ANY_FILE))

    def described(self) -> dict[str, Any]:
        """The fields that are set, for a report."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rows"}
        return {name: value for name, value in values.items() if value not in (None, (), [])}


def kind_of(path: str) -> str:
    """The suffix that tells how a file is read: `.jsonl` of `rows.jsonl.gz`."""
    stem, suffix = os.path.splitext(path)
    return (os.path.splitext(stem)[1] if suffix in PACKED else suffix).lower()


def load_rows(source: Source, *, seed: int = 0, streaming: bool = False) -> Any:
    """The raw rows of a source, a data set or a stream, for `rows_of`. Errors as `load_mixture`."""
    rows = _load(source, streaming)
    if isinstance(rows, Dataset):
        if len(rows) == 0:
            raise FormatError(f"{source.path}: {EMPTY}")
        rows = rows.with_format(None).to_iterable_dataset() if streaming else rows
    if not (isinstance(source.rows, IterableDataset) and rows.features is None):
        rows = rows.with_format("arrow")  # its types tell a null that was written from one that Arrow fills in
    if streaming:
        return rows.take(source.limit) if source.limit is not None else rows
    if source.limit is None or source.limit >= len(rows):
        return rows
    drawn = np.sort(np.random.default_rng(seed).choice(len(rows), source.limit, replace=False))
    return rows.add_column(NUMBER, np.arange(len(rows))).select(drawn)


def _load(source: Source, streaming: bool) -> Any:
    path, place, rows = source.path, source.place, source.rows
    if place == "files":
        return _load_files(source, streaming)
    if place == "hub":
        chosen = {key: value for key in ("data_files", "data_dir") if (value := getattr(source, key))}
        return load_dataset(path, source.name, source.split, source.revision, streaming=streaming, **chosen)
    if place == "folder":
        rows = read_saved(path)
    if isinstance(rows, DatasetDict):
        if source.split not in rows:
            raise RecipeError(f"{path} has no split {source.split!r}, it has {', '.join(rows)}; set split")
        rows = rows[source.split]
    if isinstance(rows, IterableDataset) and not streaming:
        how = "set dataset_streaming (streaming=True) for rows to train on; held-out rows are a Dataset"
        raise RecipeError(f"{path} is a stream: {how}")
    if isinstance(rows, IterableDataset) or (isinstance(rows, Dataset) and rows.format["type"] != "custom"):
        return rows
    rows = list(rows) if isinstance(rows, Iterator) else rows  # an iterator ends with the first epoch
    if streaming:
        return IterableDataset.from_generator(partial(_read_object, rows, path), features=TEXT)
    return Dataset.from_list([*_read_object(rows, path)], features=TEXT)


def read_saved(folder: str) -> Any:
    """What `save_to_disk` wrote, a data set or several by split; raises `FormatError` where it cannot be read."""
    try:
        return load_from_disk(folder)
    except (pa.ArrowException, ValueError, TypeError, LookupError, FileNotFoundError) as error:
        what = "cannot be read as a saved data set with a row in each split"
        raise FormatError(f"{folder} {what}: {one_line(error)[:200]}; name files by a glob: {folder}/*.jsonl") from None


def _read_object(rows: Any, path: str) -> Iterator[Row]:
    try:
        rows = rows() if callable(rows) else rows
        if hasattr(rows, "notna"):  # a DataFrame, whose empty cells are NaN
            rows = rows.astype(object).where(rows.notna(), None).to_dict("records")
        has_length = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
        for number, row in enumerate((rows[i] for i in range(len(rows))) if has_length else rows, 1):
            yield {ROW: json.dumps(row, default=_plain), PLACE: f"{path}, row {number}"}
    except Exception as error:  # the code is the user's
        raise FormatError(f"{path}: its rows cannot be read: {type(error).__name__}: {one_line(error)}") from error


def _plain(value: Any) -> Any:
    """A value that JSON does not know; a list that pandas read from Arrow has nulls as Arrow's objects have them."""
    if hasattr(value, "tolist"):
        return without_nulls(value.tolist())
    return _text_of_bytes(value) if isinstance(value, bytes) else str(value)


def without_nulls(value: Any) -> Any:
    """The value without the keys that Arrow gives each of its objects because another one has them."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [*map(without_nulls, value)] if isinstance(value, list) else value


def _load_files(source: Source, streaming: bool) -> Any:
    path = source.path
    files = [path] if Path(path).is_file() else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    if not files:
        raise RecipeError(f"the file {not_there(path)}")
    files = [str(Path(file).resolve()) for file in files]
    kinds = {kind_of(file) for file in files}
    try:
        if kinds in ({".parquet"}, {".arrow"}):
            names = [glob.escape(file) for file in files]
            # Of a Parquet file without a row, `datasets` would make batches of none
            how = {"batch_size": EACH} if kinds == {".parquet"} else {}
            return datasets.load_dataset(kinds.pop()[1:], data_files=names, split="train", streaming=streaming, **how)
        reading: dict[str, Any] = {"files": files, "how": {key: getattr(source, key) for key in OF_ANY_FILE}}
        if streaming:
            return IterableDataset.from_generator(_read_files, gen_kwargs=reading, features=TEXT)
        stamps = [(os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in files]
        key = Hasher.hash((reading, stamps, __version__))
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "ma_sft_rows" / key
        if not folder.is_dir():  # `Dataset.from_generator` would take twice as long
            schema, rows = TEXT.arrow_schema, _read_files(**reading)
            with atomic_dir(folder) as target, pa.ipc.new_stream(str(target / "rows.arrow"), schema) as writer:
                while batch := [*itertools.islice(rows, AT_ONCE)]:
                    writer.write_table(pa.Table.from_pylist(batch, schema))
        return Dataset(Dataset.from_file(str(folder / "rows.arrow")).data, fingerprint=key)
    except (DatasetGenerationError, pa.ArrowException, ValueError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, FormatError):
            raise cause from None
        raise FormatError(f"{path}: cannot be read as {kind_of(path)[1:]}: {one_line(cause)[:200]}") from None


def _read_files(files: list[str], how: dict[str, Any]) -> Iterator[Row]:
    """The rows of files of text as JSON text with their places (`file, line 3`); `how` has fields of a source."""
    for file in files:
        where, kind = _short(file), kind_of(file)
        encoding, errors = (how["encoding"], "strict") if how["encoding"] else ("utf-8-sig", "surrogateescape")
        newline = {".csv": "", ".tsv": "", ".txt": None, ".md": None}.get(kind, "\n")
        # What fsspec opens asks at each line whether it is closed
        opened: Any = partial(fsspec.open, compression="infer") if file.endswith(PACKED) else open
        try:
            with opened(file, "rt", encoding=encoding, errors=errors, newline=newline) as stream:
                for place, text in READERS.get(kind, _json)(stream, where, how):
                    try:
                        if not text.isascii():
                            text.encode()
                    except UnicodeEncodeError as error:
                        of_a_byte = "\udc80" <= text[error.start] <= "\udcff"  # how Python reads one that is not UTF-8
                        text = NOT_UTF8 if of_a_byte else json.dumps(json.loads(text))
                    yield {ROW: text, PLACE: f"{file}, {place}"}
        except FormatError:
            raise
        except Exception as error:  # each compression library has its own
            hint = f"; {ENCODING}" if isinstance(error, UnicodeDecodeError) else ""
            raise FormatError(f"{where}: cannot be read as {kind[1:]}: {one_line(error)[:200]}{hint}") from None


Rows = Iterator[tuple[str, str]]  # place in the file, row as JSON text
_dump = partial(json.dumps, ensure_ascii=False)


def _json(stream: Any, where: str, how: dict[str, Any]) -> Rows:
    """A row a line; or a list of rows; or one object, which is a row or holds them."""
    head: list[str] = []
    while len(full := [line for line in head if line.strip()]) < 2 and (line := stream.readline()):
        head.append(line)
    if not full:
        return iter(())
    if kind_of(where) not in READERS and full[0].lstrip()[0] not in "{[":
        raise FormatError(
            f"the file {where!r} exists, but it is none of {', '.join(OF_A_FILE)}; save its rows as one of them "
            "(a spreadsheet as CSV in UTF-8), and end its name so"
        )
    if how["field"] or not _has_a_row_a_line(full):
        return _json_document("".join(head) + stream.read(), where, how["field"])
    return _lines(itertools.chain(head, stream))


def _lines(lines: Iterable[str]) -> Rows:
    return ((f"line {number}", line.rstrip("\r\n")) for number, line in enumerate(lines, 1) if line.strip())


def _has_a_row_a_line(lines: list[str]) -> bool:
    """Whether the first lines of a file with anything on them begin JSON Lines, rather than one JSON document."""
    first = lines[0].rstrip()
    try:
        json.loads(first)
    except (ValueError, RecursionError) as error:  # broken inside the line, or the value goes on in the next one
        return getattr(error, "pos", 0) < len(first)
    return len(lines) > 1


def _is_dialogue(value: list[Any]) -> bool:
    """Whether a list is one conversation rather than a list of rows."""
    return bool(value) and are_objects(value) and all("role" in turn or "from" in turn for turn in value)


# Columns of a row that hold objects, and are no rows themselves.
OWN_LISTS = ("messages", "conversations", "conversation", "contents", "history", "tools", "functions", "choices")


def _json_document(text: str, where: str, field: str | None) -> Rows:
    try:
        value = read_json(text)
    except (ValueError, RecursionError) as error:
        lines = text.split("\n") if kind_of(where) in JSON_LINES and not field else []
        if any(isinstance(_parse(line), dict) for line in lines):  # whose first line is cut off
            return _lines(lines)
        line, what = getattr(error, "lineno", None), getattr(error, "msg", error)
        raise FormatError(f"{where}{f', line {line}' if line else ''}: not valid JSON: {what}") from None
    held = value if isinstance(value, dict) else {}
    if field:
        held = {field: held.get(field)}
        if not isinstance(held[field], list):
            found = show_columns(value) if isinstance(value, dict) else type(value).__name__
            raise FormatError(f"{where}: field: {field!r} is no list of rows; found {found}")
    elif isinstance(value, list):
        held = {} if _is_dialogue(value) else {"": value}
    else:
        held = {key: rows for key, rows in held.items() if key not in OWN_LISTS and rows and are_objects(rows)}
        held = {key: rows for key, rows in held.items() if not _is_dialogue(rows)}
    if len(held) > 1:
        raise FormatError(f"{where}: rows may be in {show_columns(held)}; say which: field")
    rows = [(f"row {number}", row) for rows in held.values() for number, row in enumerate(rows, 1)]
    return ((place, _dump(row)) for place, row in (rows if held else [("line 1", value)]))


def _csv(stream: Any, where: str, how: dict[str, Any]) -> Rows:
    csv.field_size_limit(sys.maxsize)
    delimiter = how["delimiter"] or ("\t" if kind_of(where) == ".tsv" else ",")
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    line = 0
    try:
        names = next(filter(None, reader), [])
        line = reader.line_num
        at = f"{where}, line {line}"
        if SURROGATE.search("".join(names)):
            raise FormatError(f"{at}: not UTF-8 text: {ENCODING}")
        if twice := next((name for name in names if name and names.count(name) > 1), None):
            raise FormatError(f"{at}: column {twice!r} stands twice; rename one of them")
        if len(names) == 1 and (mark := re.search(rf"(?!{re.escape(delimiter)})[,;|\t]", names[0])):
            raise FormatError(
                f"{at}: one column {names[0]!r}; if {mark[0]!r} parts its cells, set delimiter: "
                f"datasets: [{{path: FILE, delimiter: {json.dumps(mark[0])}}}], or save it with commas"
            )
        # A first column without a name is the index that pandas writes; any other holds something.
        columns = [name or (f"column {at}" if at > 1 else "") for at, name in enumerate(names, 1)]
        for cells in reader:
            row: Row = dict(itertools.zip_longest(columns, cells))
            if len(cells) > len(names):
                row = {ERROR: f"more cells than the {len(names)} columns of the first line"}
            elif cells == names:
                row = {ERROR: "the names of the columns once more; remove this line"}
            if cells:  # of a blank line there are none
                yield f"line {line + 1}", _dump(row)
            line = reader.line_num
    except csv.Error as error:
        raise FormatError(f"{where}, line {line + 1}: not valid CSV: {error}") from None


def _text(stream: Any, where: str, how: dict[str, Any]) -> Rows:
    """A text a line, a paragraph or a file, as `datasets`' own reader has it; blank ones are none."""
    if how["sample_by"] == "line":
        texts = _lines(stream)
    else:
        whole = stream.read()
        pieces = [whole] if how["sample_by"] == "document" else re.split(r"\n\s*\n", whole.strip("\n"))
        texts = ((f"row {number}", piece) for number, piece in enumerate(filter(str.strip, pieces), 1))
    return ((place, _dump({"text": text})) for place, text in texts)


READERS: dict[str, Callable[[Any, str, dict[str, Any]], Rows]] = {
    **dict.fromkeys(JSON_SUFFIXES, _json),
    **dict.fromkeys((".csv", ".tsv"), _csv),
    **dict.fromkeys((".txt", ".md"), _text),
}


def _short(file: str) -> str:
    """The path as the user would write it: relative where it is below the working folder."""
    return file.removeprefix(os.path.join(os.getcwd(), ""))


def rows_of(batch: Any, first: int, source: Source) -> Iterator[tuple[str, str, Row | FormatError]]:
    """(where for an error, `file:line`, row or why it is none) of each row in a batch of `load_rows`.

    `first` is the number of the batch's first row, from 0.
    """
    if isinstance(batch, pa.Table):
        columns = zip(batch.column_names, batch.columns, strict=True)
        batch = {name: [*map(_from_arrow(cells.type), cells.to_pylist())] for name, cells in columns}
    for at, values in enumerate(zip(*batch.values(), strict=True), first):
        cells = dict(zip(batch, values, strict=True))
        number = cells.pop(NUMBER, at) + 1
        where, origin = f"{source.path}, row {number}", f"{source.path}:{number}"
        if PLACE in cells:
            where = _short(cells[PLACE])
            file, _, place = where.rpartition(", ")
            origin = f"{file}:{place.rpartition(' ')[2]}"
        row = _parse(cells[ROW]) if ROW in cells else cells
        own = cells.get("origin")  # what `ma-sft data build` wrote has origins
        yield where, own if isinstance(own, str) else origin, _mapped(row, source) if isinstance(row, dict) else row


def _same(value: Any) -> Any:
    return value


def _from_arrow(kind: pa.DataType) -> Callable[[Any], Any]:
    """How a value of an Arrow type becomes the JSON that it was made from; `_same` if it is that already.

    Arrow gives each object every key that any row has: a null argument of a tool call would be learned. So the nulls of
    its objects go. `datasets`' `Json` holds the text of an object: there, a null was written, and stays.
    """
    if isinstance(kind, pa.JsonType):
        return lambda text: None if text is None else json.loads(text)
    if pa.types.is_struct(kind):
        inner = {field.name: _from_arrow(field.type) for field in kind}
        return lambda value: value and {key: inner[key](item) for key, item in value.items() if item is not None}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        convert = _from_arrow(kind.value_type)
        return _same if convert is _same else lambda values: values and [*map(convert, values)]
    return _text_of_bytes if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else _same


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
    except (ValueError, RecursionError) as error:
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
    """The numbers (int64) of the rows in the table `rows.data`, None where they are all of it in its order."""
    return None if rows._indices is None else rows._indices.column(0).to_numpy().astype("int64")


def processes(num_proc: int | None, rows: int) -> int | None:
    """`num_proc`, or by default all cores for many rows and this process alone for few; None is this process alone."""
    if num_proc is None and rows >= MANY_ROWS:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_proc = min(cores, rows // EACH)
    return None if num_proc == 1 else num_proc  # `datasets` would start a process for one


class Inherited:
    """A function for `Dataset.map` that forked workers have already: to pickle a large tokenizer takes two seconds.

    It must be there before the workers are; where they are not forked it is pickled.
    """

    _known: ClassVar[WeakValueDictionary[int, "Inherited"]] = WeakValueDictionary()

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._known[id(self)] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        forked = multiprocess.get_start_method() == "fork"
        return (_inherited, (id(self),)) if forked else (Inherited, (self.function,))


def _inherited(key: int) -> Inherited:
    return Inherited._known[key]
