"""Where rows come from: hub ids, files, globs, `save_to_disk` folders; each row with its file and line.

Files are not handed to `datasets`' own readers, which guess one type for a column from its first rows: a CSV answer
`None` would become null, a number text, and an error would name neither file nor line. `RowReader` is a `datasets`
builder (its Arrow cache, streaming, and processes) that keeps each row as JSON text until its format is known.
"""

import csv
import glob
import importlib.util
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    ArrowBasedBuilder,
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    IterableDataset,
    SplitGenerator,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.builder import Key
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from ma_sft import __version__
from ma_sft.errors import FormatError, RecipeError
from ma_sft.formats import Row

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".zst", ".bz2", ".xz")
BOM = b"\xef\xbb\xbf"
CHUNK = 4 << 20  # bytes that are read at a time
ROW, FILE, LINE = RAW = ("_row", "_file", "_line")


@dataclass(frozen=True)
class Source:
    """One place that rows come from.

    Args:
        path: a hub id, a file (.jsonl, .json, .csv, .tsv, .parquet; also .gz, .zst, .bz2, .xz), a glob, or a
            `save_to_disk` folder.
        name: configuration of a hub data set.
        split: split of a hub data set or folder.
        format: as in `ma_sft.to_messages`, or `ma_sft.to_preference` in a mixture of preferences.
        columns: `{name in the data: name that the format wants}`, as in `Dataset.rename_columns`.
        limit: take this many rows, drawn with the mixture's seed (the first ones of a stream); None takes all.
        weight: share of this source among the rows drawn, relative to the other weights.
        system_prompt: system message for conversations that have none.
        filters: filters of this source alone; see `ma_sft.filters.Filters`.
        group_by: column that holds the same value in rows which a split must not part, e.g. a conversation's id.
        license: for the card.
    """

    path: str
    name: str | None = None
    split: str = "train"
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
        return cls(**{**defaults, **settings})


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
    kind = _kind(file)
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
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise FormatError(f"{where}: cannot be read as {kind[1:]}: {_line(error)[:200]}") from None


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
        while batch := list(itertools.islice(rows, 10_000)):
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
    reader = csv.DictReader(text, delimiter="\t" if _kind(where) == ".tsv" else ",", strict=True)
    lines: list[int] = []
    rows: list[bytes] = []
    line = 1
    try:
        for row in reader:
            line, last = reader.line_num, line
            if None in row:
                raise FormatError(f"{where}, line {line}: more cells than the {len(row) - 1} columns of the first line")
            lines.append(last + 1)
            rows.append(json.dumps(row).encode())
            if len(rows) == 10_000:
                yield lines, rows
                lines, rows = [], []
    except csv.Error as error:
        raise FormatError(f"{where}, line {reader.line_num}: not valid CSV: {error}") from None
    if rows:
        yield lines, rows


def _parquet(stream: Any, where: str) -> Iterator[Batch]:
    done = 0
    for batch in pq.ParquetFile(stream).iter_batches(1000):
        rows = [json.dumps(row, default=str).encode() for row in batch.to_pylist()]
        yield list(range(done + 1, done + 1 + len(rows))), rows
        done += len(rows)


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
                raise RecipeError(f"{path} has no split {source.split!r}, it has {', '.join(saved)}; set split")
            saved = saved[source.split]
        return saved.to_iterable_dataset() if streaming else saved
    if _kind(path) in KINDS:
        files = [path] if local.is_file() else sorted(f for f in glob.glob(path, recursive=True) if Path(f).is_file())
        if not files:
            raise RecipeError(f"the file {path!r} does not exist")
        if all(Path(file).stat().st_size == 0 for file in files):
            raise FormatError(f"{path}: the file is empty")
        builder = RowReader(
            data_files={"train": [glob.escape(str(Path(f).resolve())) for f in files]}, hash=__version__
        )
        if streaming:
            return builder.as_streaming_dataset(split="train")
        try:
            builder.download_and_prepare(num_proc=num_proc if len(files) > 1 else None)
        except DatasetGenerationError as error:
            cause = error.__cause__
            raise cause if isinstance(cause, FormatError | RecipeError | OSError) else error from None
        if not builder.info.splits["train"].num_examples:
            raise FormatError(f"{path}: the data set is empty; give at least one row")
        return builder.as_dataset(split="train")
    try:
        return load_dataset(path, source.name, split=source.split, streaming=streaming)
    except (DatasetNotFoundError, DatasetGenerationError, OSError, ValueError) as error:
        raise RecipeError(
            f"the data {path!r} is no file or folder here and cannot be had from a hub; pass a file or folder: "
            f"--dataset_name PATH (make: DATA=PATH). {str(error).splitlines()[0]}"
        ) from None


def rows_of(
    batch: Mapping[str, Sequence[Any]], indices: Sequence[int], source: Source
) -> Iterator[tuple[str, str, Row | FormatError]]:
    """(where for an error, `file:line`, row or why it is none) of each row in a batch of `load_rows`."""
    for at, index in enumerate(indices):
        row: Any
        if ROW in batch:
            file, line = batch[FILE][at], batch[LINE][at]
            where, origin = f"{file}, {'row' if _kind(file) == '.parquet' else 'line'} {line}", f"{file}:{line}"
            try:
                row = json.loads(batch[ROW][at])
                if not isinstance(row, dict):
                    raise FormatError(f"a JSON object expected, found {type(row).__name__} {str(row)[:60]!r}")
            except FormatError as error:
                row = error
            except json.JSONDecodeError as error:
                row = FormatError(f"not valid JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                row = FormatError(f"not valid JSON: {_line(error)}")
        else:
            where, origin = f"{source.path}, row {index + 1}", f"{source.path}:{index + 1}"
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


def _kind(path: str) -> str:
    name = Path(path)
    return (Path(name.stem).suffix if name.suffix in PACKED else name.suffix).lower()


def _short(file: str) -> str:
    """The path as the user would write it: relative where it is below the working folder."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
