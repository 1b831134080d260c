"""Sources -> one data set of conversations: load, convert, mix and shuffle, with counts."""

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from ma_sft.errors import FormatError, RecipeError
from ma_sft.formats import to_messages

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Source:
    """One place that rows come from.

    Args:
        path: a hub id, a file (.json, .jsonl, .parquet, .csv, also .gz), a glob, or a `save_to_disk` folder.
        name: configuration of a hub data set.
        split: split of a hub data set or folder.
        format: as in `ma_sft.to_messages`.
        limit: take this many rows, drawn with the mixture's seed; None takes all.
        system_prompt: system message for conversations that have none.
    """

    path: str
    name: str | None = None
    split: str = "train"
    format: str | None = None
    limit: int | None = None
    system_prompt: str | None = None

    @classmethod
    def of(cls, value: Any, **defaults: Any) -> "Source":
        """A source from a path or a mapping of the fields above."""
        settings = {"path": value} if isinstance(value, str) else dict(value)
        unknown = sorted(set(settings) - {f.name for f in fields(cls)})
        if unknown or "path" not in settings:
            raise RecipeError(
                f"source {value!r}: {'unknown key ' + repr(unknown[0]) if unknown else 'no path'}; "
                f"keys are {', '.join(f.name for f in fields(cls))}"
            )
        return cls(**{**defaults, **settings})


@dataclass
class Report:
    """Rows per source, and the rows that were skipped with why."""

    rows: dict[str, int] = field(default_factory=dict)
    skips: list[str] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        return len(self.skips)


def load_mixture(
    sources: Sequence[Any],
    *,
    seed: int = 0,
    on_error: str = "raise",
    format: str | None = None,
    system_prompt: str | None = None,
    split: str = "train",
    num_proc: int | None = None,
) -> tuple[Dataset, Report]:
    """All sources as one shuffled data set with the columns `messages` and `source`, and the counts.

    Args:
        sources: paths, or mappings with the fields of `Source`.
        seed: of the draw and the shuffle; the same seed gives the same order.
        on_error: `"raise"` at the first broken row, or `"skip"` it and count it.
        format, system_prompt, split: for sources that do not say themselves.
        num_proc: processes for the conversion.

    Raises:
        FormatError: a row that is no conversation; names source, row and field.
        RecipeError: a source that cannot be found or read.
    """
    report = Report()
    parts = []
    for value in sources:
        source = Source.of(value, format=format, system_prompt=system_prompt, split=split)
        rows = load_rows(source.path, name=source.name, split=source.split)
        if len(rows) == 0:
            raise FormatError(f"{source.path}: the data set is empty; give at least one row")
        if source.limit is not None and source.limit < len(rows):
            rows = rows.shuffle(seed=seed).select(range(source.limit))
        converted = rows.map(
            _convert,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            fn_kwargs={"source": source, "on_error": on_error},
            num_proc=num_proc,
            desc=f"converting {Path(source.path).name}",
        )
        report.skips += [error for error in converted["error"] if error]
        converted = converted.filter(lambda error: not error, input_columns="error").remove_columns("error")
        if len(converted) == 0:
            raise FormatError(f"{source.path}: every row was skipped; the first: {report.skips[-1]}")
        report.rows[source.path] = len(converted)
        parts.append(converted)
    return concatenate_datasets(parts).shuffle(seed=seed), report


def load_rows(path: str, *, name: str | None = None, split: str = "train") -> Dataset:
    """The raw rows of a file, glob, `save_to_disk` folder or hub data set.

    Raises:
        RecipeError: nothing there, or the hub does not answer.
        FormatError: a file that is not what its name says; names the line where there is one.
    """
    local = Path(path)
    if local.is_dir():
        if not ((local / "state.json").exists() or (local / "dataset_dict.json").exists()):
            raise RecipeError(f"{path} is a folder without a saved data set; name its files, e.g. {path}/*.jsonl")
        saved = load_from_disk(path)
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise RecipeError(f"{path} has no split {split!r}, it has {', '.join(saved)}; set dataset_train_split")
            saved = saved[split]
        return saved
    suffix = local.with_suffix("").suffix if local.suffix == ".gz" else local.suffix
    if suffix in BUILDERS:
        files = [path] if local.is_file() else sorted(glob.glob(path, recursive=True))
        if not files:
            raise RecipeError(f"the file {path!r} does not exist")
        if all(Path(file).stat().st_size == 0 for file in files):
            raise FormatError(f"{path}: the file is empty")
        try:
            return load_dataset(BUILDERS[suffix], data_files=files, split="train")
        except (DatasetGenerationError, ValueError, OSError) as error:
            raise FormatError(_why_unreadable(files, suffix, error)) from None
    try:
        return load_dataset(path, name, split=split)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise RecipeError(
            f"the data {path!r} is no file or folder here and cannot be had from a hub; pass a file or folder: "
            f"--dataset_name PATH (make: DATA=PATH). {str(error).splitlines()[0]}"
        ) from None


def _convert(batch: dict[str, list[Any]], indices: list[int], source: Source, on_error: str) -> dict[str, list[Any]]:
    messages: list[Any] = []
    errors: list[str] = []
    for at, index in enumerate(indices):
        row = {key: values[at] for key, values in batch.items()}
        try:
            converted = to_messages(row, source.format)
            if source.system_prompt and converted[0]["role"] != "system":
                converted = [{"role": "system", "content": source.system_prompt}, *converted]
            # Arrow cannot hold arguments of different shapes in one column; the template gets objects back
            messages.append([_plain(message) for message in converted])
            errors.append("")
        except FormatError as error:
            text = f"{source.path}, row {index + 1}: {error}"
            if on_error == "raise":
                raise FormatError(text) from None
            messages.append([])
            errors.append(text)
    tools = [None if t is None else t if isinstance(t, str) else json.dumps(t) for t in batch.get("tools", [])]
    return {
        "messages": messages,
        **({"tools": tools} if tools else {}),
        "source": [source.path] * len(messages),
        "error": errors,
    }


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    plain = []
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        plain.append({"type": "function", "function": {"name": function["name"], "arguments": text}})
    return {**message, "tool_calls": plain}


def _why_unreadable(files: list[str], suffix: str, error: Exception) -> str:
    """The file and line at fault; the loader itself names neither."""
    if suffix in (".json", ".jsonl"):
        for file in files:
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        json.loads(line)
                    except ValueError as broken:
                        if suffix == ".jsonl" or line.strip()[:1] == b"{":
                            return f"{file}, line {number}: not valid JSON: {broken}"
                        break
    cause = error.__cause__ or error
    return f"{', '.join(files)}: cannot be read as {suffix[1:]}: {' '.join(str(cause).split())[:200]}"
