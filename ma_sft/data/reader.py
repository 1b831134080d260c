"""Files -> rows as JSON text, each with its file and line.

`datasets`' own readers guess one type for a column from its first rows: a CSV answer `None` would become null, a number
text, and their errors name neither file nor line. This is a `datasets` builder like them, with its Arrow cache,
streaming and processes, that keeps each row as JSON text until its format is known. It is a module of its own because
`datasets` puts its own `open`, `Path` and `glob` into the module of a builder.
"""

import csv
import importlib.util
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ArrowBasedBuilder, BuilderConfig, DatasetInfo, Features, SplitGenerator, Value
from datasets.builder import Key

from ma_sft.data.values import are_objects, plain, read_json, show_columns
from ma_sft.errors import FormatError, RecipeError, one_line

PACKED = (".gz", ".zst", ".bz2", ".xz")
CHUNK = 4 << 20  # bytes that are read at a time
BATCH = 10_000  # rows that are handed on at a time
WHOLE = 1 << 30  # bytes of the longest object or document that is read as one
UNPACKED = 256 << 20  # bytes that any small archive or Arrow file may become; beyond, 200 times its size
DECODED = 1 << 30  # bytes that the rows which are decoded at a time may be, at worst
TOO_DEEP = f"nested deeper than Python reads, some {sys.getrecursionlimit():,} levels"
BOM = b"\xef\xbb\xbf"
UTF_16 = re.compile(rb"\xff\xfe[^\0]\0|\xfe\xff\0[^\0]")  # the mark, and a first letter of ASCII
ROW, FILE, PLACE = RAW = ("_row", "_file", "_place")


@cache  # asked of each row
def kind_of(path: str) -> str:
    """The suffix that says how a file is read: `.jsonl` of `rows.jsonl.gz`."""
    stem, suffix = os.path.splitext(path)
    return (os.path.splitext(stem)[1] if suffix in PACKED else suffix).lower()


@dataclass
class ReaderConfig(BuilderConfig):  # type: ignore[misc]
    """How files are read: see `ma_sft.data.sources.Source`."""

    field: str | None = None
    encoding: str | None = None
    delimiter: str | None = None
    sample_by: str = "line"


class RowReader(ArrowBasedBuilder):  # type: ignore[misc]
    """Files -> their rows as JSON text, with file and place (`line 3`, `row 3`). Holds some megabytes at a time."""

    BUILDER_CONFIG_CLASS = ReaderConfig

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=Features({ROW: Value("binary"), FILE: Value("string"), PLACE: Value("string")}))

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        return [SplitGenerator(name="train", gen_kwargs={"files": list(self.config.data_files["train"])})]

    def _generate_shards(self, files: list[str]) -> Iterator[str]:
        yield from files

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Key, pa.Table]]:
        for number, file in enumerate(files):
            rows = _read(file, self.config)
            batches = iter(lambda rows=rows: list(itertools.islice(rows, BATCH)), [])  # type: ignore[misc]
            for batch, placed in enumerate(batches):
                places, texts = zip(*placed, strict=True)
                columns = [pa.array(texts, pa.binary()), pa.array([_short(file)] * len(texts)), pa.array(places)]
                yield Key(number, batch), pa.table(columns, names=list(RAW))


Rows = Iterator[tuple[str, bytes]]  # place, row as JSON


def _read(file: str, config: ReaderConfig) -> Rows:
    """The rows of one file."""
    where, kind = _short(file), kind_of(file)
    if file.endswith(".zst") and not importlib.util.find_spec("zstandard"):
        raise RecipeError(f"{where}: reading .zst needs another package: pip install 'ma-sft[data]'")
    try:
        with fsspec.open(file, "rb", compression="infer") as stream:
            kind = kind if kind in READERS else _sniff(file, where)
            unpacked = _Unpacked(file, kind)
            if kind in (".parquet", ".arrow"):
                yield from _arrow_rows(READERS[kind](stream, unpacked), unpacked)
            else:
                yield from READERS[kind](_text_stream(stream, unpacked, config), where, config)
    except FormatError:
        raise
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: {not_utf_8(error)}") from None
    except Exception as error:  # each compression library and Arrow have their own
        raise FormatError(f"{where}: cannot be read as {kind[1:]}: {one_line(error)[:200]}") from None


def not_utf_8(error: UnicodeDecodeError) -> str:
    """What to do about a text in another encoding, or about none."""
    if error.object.startswith(b"\x1f\x8b"):
        return "not UTF-8 text but gzip; end the file's name in .gz"
    return f"not UTF-8 text: {error.reason} at byte {error.start}; {other_encoding(error.object)}"


def other_encoding(text: bytes) -> str:
    """What to do about a text that may be in another encoding."""
    try:
        text.decode("gb18030")
        guess = "gb18030 would fit"
    except UnicodeDecodeError:
        guess = "such as cp1252"
    if b"\0" in text:  # each letter of ASCII has one; gb18030 takes any
        guess = "such as utf-16-le, utf-16-be or utf-32"
    return f"if it is another encoding, set encoding: ({guess}) in its entry of `datasets`, or save it as UTF-8"


def _sniff(file: str, where: str) -> str:
    """What a file is whose name does not say it."""
    with fsspec.open(file, "rb", compression="infer") as stream:
        head = stream.read(1000)
    for kind, magic in ((".parquet", b"PAR1"), (".arrow", b"ARROW1")):
        if head.startswith(magic):
            return kind
    if head.removeprefix(BOM).lstrip()[:1] in (b"{", b"["):
        return ".json"
    raise FormatError(
        f"the file {where!r} exists, but it is none of {', '.join(READERS)}; save its rows as one of them "
        "(a spreadsheet as CSV in UTF-8), and end its name so"
    )


class _Stream(io.RawIOBase):
    """What a function reads, as a stream."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self.read_some = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.read_some(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Unpacked:
    """Counts the bytes that an archive, a Parquet or an Arrow file became; far more than its size is an error."""

    def __init__(self, file: str, kind: str) -> None:
        self.file, self.way_out = file, "unpack it yourself" if file.endswith(PACKED) else "write its rows as .jsonl"
        bounded = file.endswith(PACKED) or kind in (".parquet", ".arrow")
        self.limit = max(UNPACKED, 200 * os.stat(file).st_size) if bounded else sys.maxsize
        self.bytes = 0

    def add(self, size: int) -> None:
        self.bytes += size
        if self.bytes > self.limit:
            what = f"{_short(self.file)}: unpacks to more than {self.limit:,} bytes, 200 times its size"
            raise FormatError(f"{what}; {self.way_out}")


def _text_stream(stream: Any, unpacked: _Unpacked, config: ReaderConfig) -> Any:
    """The file's text in UTF-8."""

    def read(size: int) -> bytes:
        data: bytes = stream.read(size)
        unpacked.add(len(data))
        return data

    packed = io.BufferedReader(_Stream(read), CHUNK)
    encoding = config.encoding or ("utf-16" if UTF_16.match(packed.peek(4)) else None)
    if encoding is None:
        return packed
    text = io.TextIOWrapper(packed, encoding=encoding, newline="")
    return io.BufferedReader(_Stream(lambda size: text.read(max(1, size // 4)).encode()), CHUNK)


def _json_lines(stream: Any, where: str, config: ReaderConfig) -> Rows:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(BOM) if number == 1 else line
        if line.strip():
            yield f"line {number}", line.removesuffix(b"\n")


def _json(stream: io.BufferedReader, where: str, config: ReaderConfig) -> Rows:
    """A row a line; or a list of rows, read in chunks; or one object, which is a row or holds them."""
    head = stream.peek(1).removeprefix(BOM).lstrip()
    first, end, rest = head.partition(b"\n")
    try:
        value, whole = json.loads(first.decode()), bool(rest.strip())
        problem = -1
    except (ValueError, RecursionError) as error:
        value, whole, problem = None, False, getattr(error, "pos", 0)
    if head.startswith(b"[") and not (isinstance(value, list) and (whole or _is_dialogue(value))):
        yield from _json_list(io.TextIOWrapper(stream, encoding="utf-8-sig"), where)
    elif config.field or (head.startswith(b"{") and not whole and (value or not end or problem >= len(first.rstrip()))):
        yield from _object(stream, where, config)
    else:
        yield from _json_lines(stream, where, config)


def _is_dialogue(value: list[Any]) -> bool:
    """Whether a list is one conversation rather than a list of rows."""
    return bool(value) and are_objects(value) and all("role" in turn or "from" in turn for turn in value)


def _object(stream: io.BufferedReader, where: str, config: ReaderConfig) -> Rows:
    """One object that is written over several lines: a row, or an object that holds the rows as a list."""
    data = stream.read(WHOLE + 1)
    if len(data) > WHOLE:
        raise FormatError(f"{where}: one JSON object of more than {WHOLE:,} bytes; write a row a line (.jsonl)")
    try:
        value = read_json(data.removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        if data.partition(b"\n")[2].startswith(b"{"):  # a line that is cut off, among good ones
            yield from _json_lines(io.BytesIO(data), where, config)
            return
        if isinstance(error, json.JSONDecodeError):
            raise FormatError(f"{where}, line {error.lineno}: not valid JSON: {error.msg}") from None
        if isinstance(error, RecursionError):
            raise FormatError(f"{where}: not valid JSON: {TOO_DEEP}") from None
        if isinstance(error, FormatError):  # a key that stands twice: whoever converts the row tells it
            yield "line 1", data.removeprefix(BOM)
            return
        raise
    if config.field:
        held = {config.field: value.get(config.field)}
        if not isinstance(held[config.field], list):
            raise FormatError(f"{where}: field: {config.field!r} is no list of rows; found {show_columns(value)}")
    else:
        lists = {key: rows for key, rows in value.items() if key not in OWN_LISTS and rows and are_objects(rows)}
        held = {key: rows for key, rows in lists.items() if not _is_dialogue(rows)}
    if len(held) > 1:
        raise FormatError(f"{where}: rows may be in {show_columns(held)}; say which: field")
    if not held:
        yield "line 1", data.removeprefix(BOM)
    for number, row in enumerate(next(iter(held.values()), []), 1):
        yield f"row {number}", json.dumps(row).encode()


# Columns of a row that hold objects, and are no rows themselves.
OWN_LISTS = ("messages", "conversations", "conversation", "contents", "history", "tools", "functions", "choices")


def _json_list(text: io.TextIOWrapper, where: str) -> Rows:
    """The rows of a list; of its text, a chunk and the row at hand are in memory."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    buffer, at, line, expect, problem = "", 0, 1, "[", "the list does not end"
    last = number = 0

    def skip(to: int) -> None:
        nonlocal at, line
        line += buffer.count("\n", at, to)
        at = to

    while True:
        skip(space.match(buffer, at).end())  # type: ignore[union-attr]
        token = buffer[at : at + 1]
        if token == "]" and expect != "[":
            if buffer[at + 1 :].strip() or text.read(CHUNK).strip():
                raise FormatError(f"{where}, line {line}: not valid JSON: something follows the end of the list")
            return
        if expect == "row" and token:
            try:
                end = decoder.raw_decode(buffer, at)[1]
            except (ValueError, RecursionError) as error:  # broken, or it goes on in the next chunk
                problem = getattr(error, "msg", str(error))
            else:
                if end < len(buffer):  # else it may be the first half of a number
                    number += 1
                    yield (f"line {line}" if line > last else f"row {number}"), buffer[at:end].encode()
                    last, expect = line, ","
                    skip(end)
                    continue
        elif token == expect:
            at, expect = at + 1, "row"
            continue
        elif token:
            raise FormatError(
                f"{where}, line {line}: not valid JSON: {expect!r} expected, found {buffer[at : at + 20]!r}"
            )
        chunk = text.read(max(CHUNK, len(buffer) - at))
        if not chunk:
            raise FormatError(f"{where}, line {line}: not valid JSON: {problem}")
        buffer, at = buffer[at:] + chunk, 0


def _csv(stream: io.BufferedReader, where: str, config: ReaderConfig) -> Rows:
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    delimiter = config.delimiter or ("\t" if kind_of(where) == ".tsv" else ",")
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    line = 1
    try:
        names = list(reader.fieldnames or [])
        line = reader.line_num
        _check_header(names, f"{where}, line 1")
        # A first column without a name is the index that pandas writes; any other holds something.
        reader.fieldnames = [name or (f"column {at}" if at > 1 else "") for at, name in enumerate(names, 1)]
        for row in reader:
            wrong = f"more cells than the {len(row) - 1} columns of the first line" if None in row else None
            if list(row.values()) == names:
                wrong = "the names of the columns once more; remove this line"
            yield f"line {line + 1}", json.dumps(wrong or row).encode()
            line = reader.line_num
    except csv.Error as error:
        raise FormatError(f"{where}, line {line + 1}: not valid CSV: {error}") from None


def _check_header(names: list[str], where: str) -> None:
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise FormatError(f"{where}: column {twice[0]!r} stands twice in the first line; rename one of them")
    mark = next((mark for mark in ";|\t" if len(names) == 1 and mark in names[0]), None)
    if mark:
        raise FormatError(
            f"{where}: one column {names[0]!r}; if {mark!r} parts its cells, set delimiter: {json.dumps(mark)} "
            "in its entry of `datasets`, or save it with commas"
        )


def _parquet(stream: Any, unpacked: _Unpacked) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(stream)
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).total_byte_size
        if size > unpacked.limit:  # before it is unpacked
            unpacked.add(size)
        yield from file.iter_batches(_rows_at_a_time(size), row_groups=[group])


def _arrow(stream: Any, unpacked: _Unpacked) -> Iterator[pa.RecordBatch]:
    try:
        file = pa.ipc.open_file(stream)
        return (file.get_batch(i) for i in range(file.num_record_batches))
    except pa.ArrowInvalid:  # what `datasets` caches is a stream
        stream.seek(0)
        return iter(pa.ipc.open_stream(stream))


def _rows_at_a_time(size: int) -> int:
    """Of a group of rows of this many bytes: as a dictionary's values may stand in every row, each may be as large."""
    return max(1, min(1000, DECODED // max(1, size)))


def _named(batch: pa.RecordBatch) -> pa.RecordBatch:
    if twice := next((name for name in batch.schema.names if batch.schema.names.count(name) > 1), None):
        raise ValueError(f"column {twice!r} stands twice; rename one of them")
    return batch


def _arrow_rows(batches: Iterator[pa.RecordBatch], unpacked: _Unpacked) -> Rows:
    sized = ((_named(batch), _rows_at_a_time(batch.nbytes)) for batch in batches)
    pieces = (batch[at : at + step] for batch, step in sized for at in range(0, batch.num_rows, step))
    for number, row in enumerate(itertools.chain.from_iterable(piece.to_pylist() for piece in pieces), 1):
        text = json.dumps(plain(row), default=str).encode()
        unpacked.add(len(text))
        yield f"row {number}", text


def _text(stream: io.BufferedReader, where: str, config: ReaderConfig) -> Rows:
    """A text a line, a paragraph or a file, as `datasets`' own reader has it; blank ones are none."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")
    if config.sample_by == "line":
        for number, line in enumerate(text, 1):
            if line.strip():
                yield f"line {number}", json.dumps({"text": line.removesuffix("\n")}).encode()
        return
    whole = text.read(WHOLE)
    if text.read(1):
        raise FormatError(f"{where}: more than {WHOLE:,} characters in one file; set sample_by: line")
    pieces = [whole] if config.sample_by == "document" else re.split(r"\n\s*\n", whole.strip("\n"))
    for number, piece in enumerate((piece for piece in pieces if piece.strip()), 1):
        yield f"row {number}", json.dumps({"text": piece}).encode()


READERS: dict[str, Callable[..., Iterator[Any]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".ndjson": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _text,
}

KINDS = tuple(READERS)


def _short(file: str) -> str:
    """The path as the user would write it: relative where it is below the working folder."""
    return file.removeprefix(os.path.join(os.getcwd(), ""))
