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
from collections.abc import Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ArrowBasedBuilder, DatasetInfo, Features, SplitGenerator, Value
from datasets.builder import Key

from ma_sft.errors import FormatError, RecipeError

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


PACKED = (".gz", ".zst", ".bz2", ".xz")


CHUNK = 4 << 20  # bytes that are read at a time


BATCH = 10_000  # rows that are handed on at a time


BOM = b"\xef\xbb\xbf"


ROW, FILE, LINE = RAW = ("_row", "_file", "_line")


def kind_of(path: str) -> str:
    """The suffix that says how a file is read: `.jsonl` of `rows.jsonl.gz`."""
    stem, suffix = os.path.splitext(path)
    return (os.path.splitext(stem)[1] if suffix in PACKED else suffix).lower()


class RowReader(ArrowBasedBuilder):  # type: ignore[misc]
    """Files -> their rows as JSON text, with file and line. Holds some megabytes of a file at a time."""

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=Features({ROW: Value("binary"), FILE: Value("string"), LINE: Value("int64")}))

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        return [SplitGenerator(name="train", gen_kwargs={"files": list(self.config.data_files["train"])})]

    def _generate_shards(self, files: list[str]) -> Iterator[str]:
        yield from files

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Key, pa.Table]]:
        for number, file in enumerate(files):
            for batch, (lines, rows) in enumerate(_read(file)):
                columns = [
                    pa.array(rows, pa.binary()),
                    pa.array([_short(file)] * len(rows)),
                    pa.array(lines, pa.int64()),
                ]
                yield Key(number, batch), pa.table(columns, names=list(RAW))


Batch = tuple[list[int], list[bytes]]


def _read(file: str) -> Iterator[Batch]:
    """Batches of (line numbers, rows as JSON) of one file; of .parquet, row numbers."""
    kind = kind_of(file)
    where = _short(file)
    if file.endswith(".zst") and not importlib.util.find_spec("zstandard"):
        raise RecipeError(f"{where}: reading .zst needs another package: pip install 'ma-sft[data]'")
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    try:
        with fsspec.open(file, "rb", compression="infer") as stream:
            yield from readers[kind](stream if kind == ".parquet" else io.BufferedReader(stream, CHUNK), where)
    except FormatError:
        raise
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except Exception as error:  # each compression library and Arrow have their own
        raise FormatError(f"{where}: cannot be read as {kind[1:]}: {' '.join(str(error).split())[:200]}") from None


def _json_lines(stream: io.BufferedReader, where: str) -> Iterator[Batch]:
    done = 0
    while chunk := stream.read(CHUNK):
        lines = (chunk + stream.readline()).removesuffix(b"\n").split(b"\n")
        if done == 0:
            lines[0] = lines[0].removeprefix(BOM)
        numbered = [(number, line) for number, line in enumerate(lines, done + 1) if line.strip()]
        done += len(lines)
        if numbered:
            yield [number for number, _ in numbered], [line for _, line in numbered]


def _json(stream: io.BufferedReader, where: str) -> Iterator[Batch]:
    """A list of rows, of which a chunk is held at a time; or JSON Lines under another name."""
    if stream.peek(1).lstrip(BOM + b" \t\r\n").startswith(b"["):
        rows = _json_list(io.TextIOWrapper(stream, encoding="utf-8-sig"), where)
        while batch := list(itertools.islice(rows, BATCH)):
            yield [line for line, _ in batch], [row for _, row in batch]
    else:
        yield from _json_lines(stream, where)


def _json_list(text: io.TextIOWrapper, where: str) -> Iterator[tuple[int, bytes]]:
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    buffer, at, line, expect, problem = "", 0, 1, "[", "the list does not end"

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
                    yield line, buffer[at:end].encode()
                    skip(end)
                    expect = ","
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


def _csv(stream: io.BufferedReader, where: str) -> Iterator[Batch]:
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, delimiter="\t" if kind_of(where) == ".tsv" else ",", strict=True)
    lines: list[int] = []
    rows: list[bytes] = []
    line = 1
    try:
        for row in reader:
            line, last = reader.line_num, line
            extra = f"more cells than the {len(row) - 1} columns of the first line" if None in row else None
            lines.append(last + 1)
            rows.append(json.dumps(extra or row).encode())
            if len(rows) == BATCH:
                yield lines, rows
                lines, rows = [], []
    except csv.Error as error:
        raise FormatError(f"{where}, line {line + 1}: not valid CSV: {error}") from None
    if rows:
        yield lines, rows


def _parquet(stream: Any, where: str) -> Iterator[Batch]:
    done = 0
    for batch in pq.ParquetFile(stream).iter_batches(1000):
        rows = [json.dumps(row, default=str).encode() for row in batch.to_pylist()]
        yield list(range(done + 1, done + 1 + len(rows))), rows
        done += len(rows)


def _short(file: str) -> str:
    """The path as the user would write it: relative where it is below the working folder."""
    return file.removeprefix(os.path.join(os.getcwd(), ""))
