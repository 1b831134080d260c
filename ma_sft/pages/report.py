"""The run's page: one self-contained HTML file, made from what a run keeps in its folder, at any time.

A run writes `run.json` before its first step (what is trained, on what), a line of `log.jsonl` at each log,
`answers.json` and `summary.json` at its end. So an unfinished run has a page too, and several runs have one together.
"""

import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ma_sft.config import shown, shown_command
from ma_sft.errors import RecipeError
from ma_sft.pages.charts import COLOURS, charts, histogram
from ma_sft.pages.screen import evaluation_rows
from ma_sft.utils import as_written, read_json, say, visible, write_whole
from ma_sft.version import versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ma_sft.config import Settings
    from ma_sft.training.prepare import Prepared

SHOWN_TOKENS = 600  # of a row in the mask preview
SHOWN_ANSWERS = 200
SHORT = 200  # characters of a reference that is the one right answer
# What decides which rows are trained and held out: results of runs that differ in one of them do not compare
DATA = (
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_format", "datasets"),
    *("eval_dataset", "test_size", "test_near_duplicates", "seed", "filters"),
)


def _data(run: dict[str, Any]) -> Any:
    """Which rows a run trained and held out."""
    asked = sorted((answer["question"], answer["reference"]) for answer in run["answers"])
    return [run["settings"].get(key) for key in DATA], asked


def _ids(run: dict[str, Any]) -> Any:
    """Which rows these were, and which ids and labels the first of them became."""
    return _data(run), [(piece["ids"], piece["trained"]) for row in run["rows"] for piece in row["pieces"]]


def _same(runs: Sequence[dict[str, Any]], facts: Callable[[dict[str, Any]], Any]) -> bool:
    return len({json.dumps(facts(run)) for run in runs}) == 1


@dataclass(frozen=True)
class Figure:
    """A figure of a finished run: its group and label, its format, where `summary.json` has it, now and before training
    (keys joined by dots), which of several is best, and what must be the same in runs to say so."""

    group: str
    label: str
    how: str
    key: str
    before: str = ""
    best: Callable[[Sequence[float]], float] | None = None
    facts: Callable[[dict[str, Any]], Any] | None = None


ACCURACY = "token accuracy"
FIGURES = (
    Figure("result", "{metric}", ".1%", "evaluation.after.score", "evaluation.before.score", max, _data),
    Figure("result", "answers stopped by themselves", ".1%", "eos_rate", "evaluation.before.eos_rate", max, _data),
    Figure("result", "held-out loss", ".4f", "eval_loss", "evaluation.before.loss", min, _ids),
    Figure("result", ACCURACY, ".1%", "eval_mean_token_accuracy", "evaluation.before.token_accuracy", max, _ids),
    Figure("training", "mean training loss", ".4f", "train_loss"),
    Figure("training", "rows", ",", "rows"),
    Figure("training", "trained tokens in them", ",", "trained_tokens"),
    Figure("training", "steps", ",", "steps"),
    Figure("training", "tokens computed", ",", "tokens"),
    Figure("cost", "time", "duration", "train_seconds", "", min, _data),
    Figure("cost", "tokens per second", ",.0f", "tokens_per_second", "", max),
    Figure("cost", "peak memory", "bytes", "peak_memory", "", min),
)


def write_start(
    settings: "Settings", data: "Prepared", tokenizer: "PreTrainedTokenizerBase", lines: list[tuple[str, str]]
) -> None:
    """Write `run.json` into the output folder: what the page tells and is known before the first step, `lines` as the
    terminal was told them among it."""
    from ma_sft.labels.preview import heading, pieces

    rows = []
    for number, row in enumerate(data.sample):
        cut = pieces(row["input_ids"][:SHOWN_TOKENS], row["labels"][:SHOWN_TOKENS], tokenizer)
        more = len(row["input_ids"]) - SHOWN_TOKENS
        rows.append({"heading": heading(row, number), "pieces": [asdict(p) for p in cut], "more": max(0, more)})
    out, check, packing = Path(settings.training.output_dir), data.check, data.packing
    parts = [part for part in vars(settings).values() if is_dataclass(part)]
    facts = {
        "name": settings.run.name,
        "model": settings.chosen.get("model_name_or_path"),
        "started": time.time(),
        "command": _command(),
        "values": shown({field.name: getattr(part, field.name) for part in parts for field in fields(part)}),
        "lines": lines,
        "lengths": data.lengths,
        "rows": rows,
        "stages": [asdict(stage) for stage in data.stages],
        "packing": packing and {**asdict(packing), "density": packing.density, "text": str(packing)},
        "findings": check and [{"level": f.level, "text": str(f)} for f in check.findings],
        "proof": check and {"proven": check.proven, "verdict": check.verdict},
        "hardware": _hardware(settings),
        "versions": versions(),
    }
    write_whole(out / "run.json", json.dumps(facts, ensure_ascii=False, indent=1))


def read_run(folder: Path) -> dict[str, Any]:
    """All that a run's folder tells: `run.json`, the settings, the log, and answers and summary if it is finished.

    Raises:
        RecipeError: the folder is no run's, or its run never got to the first step.
    """
    if not (folder / "run.json").is_file():
        raise RecipeError(
            f"{folder} is not a run's folder, or its run has not come to its first step (--watch waits for it); give "
            "one that `ma-sft train` made, such as runs/NAME"
        )
    with as_written(folder):
        log, planned = _read_log(folder / "log.jsonl")
        return {
            **read_json(folder / "run.json"),
            "folder": str(folder),
            "settings": read_json(folder / "recipe.json", {}),
            "log": log,
            "planned_steps": planned,
            "answers": read_json(folder / "answers.json", []),
            "summary": read_json(folder / "summary.json", None),
        }


def only_runs(folders: Sequence[Path]) -> Sequence[Path]:
    """Those of several folders that are runs', as `runs/*` names others too; what is left out is said."""
    runs = [folder for folder in folders if (folder / "recipe.json").is_file()]
    if not runs or len(folders) == 1:
        return folders
    say(*(f"{folder} is not a run's folder: left out" for folder in folders if folder not in runs), error=True)
    return runs


def _read_log(path: Path) -> tuple[list[dict[str, float]], int]:
    """The log and the planned number of steps; what a resumed run trained again counts once."""
    log: list[dict[str, float]] = []
    planned = 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # a line that a killed run did not finish
            continue
        if "start" in entry:
            log = [old for old in log if old["step"] <= entry["start"]]
            planned = entry["max_steps"]
        else:
            log.append(entry)
    return log, planned


def write_report(folders: Sequence[Path], path: Path, refresh: int | None = None) -> bool:
    """Write the page of one or several runs, which a browser loads again after `refresh` seconds; are all finished?

    Raises:
        RecipeError: as `read_run`.
    """
    runs = [read_run(folder) for folder in folders]
    with as_written(", ".join(map(str, folders))):
        names = [run["name"] for run in runs]
        for run in runs:
            run["title"] = run["name"] if names.count(run["name"]) == 1 else f"{run['name']} ({run['folder']})"
            _tell(run)
        page = environment().get_template("report.html.jinja").render(
            runs=runs,
            charts=charts([run["log"] for run in runs], [run["title"] for run in runs]),
            differences=_differences(runs),
            figures=_figures(runs),
            answers=_side_by_side(runs) if len(runs) > 1 else [],
            note="" if _same(runs, _data) else "Different data or held-out rows: no result and no time is the best.",
            refresh=refresh,
            shown_answers=SHOWN_ANSWERS,
            colours=COLOURS,
        )  # fmt: skip
    write_whole(path, page)
    return all(run["summary"] for run in runs)


def _tell(run: dict[str, Any]) -> None:
    """Add what the page says of a run and its folder does not."""
    summary = run["summary"] or {}
    evaluation = summary.get("evaluation")
    run |= {
        "state": _state(run),
        "verdict": _verdict(evaluation, [reference for *_, reference in run["answers"]]) if evaluation else "",
        "evaluation": evaluation_rows(evaluation) if evaluation else [],
        "yaml": yaml.safe_dump(run["settings"], allow_unicode=True, sort_keys=False),
        "histogram": histogram(run["lengths"]) if run["lengths"] else "",
        "again": shlex.join(["ma-sft", "train", f"{run['folder']}/recipe.json", "--name", f"{run['name']}-again"]),
    }
    answers = [
        {"question": question, "before": before, "after": after, "same": after == reference, "reference": reference}
        for question, before, after, reference in run["answers"]
    ]
    run["answers"] = sorted(answers, key=lambda answer: answer["same"])


def _verdict(evaluation: dict[str, Any], references: Sequence[str]) -> str:
    """Whether it worked, in a line: by the held-out loss, or by the answers' score where one answer is the right one.

    That is so where the metric is the user's, or all references are short; a chat has many right answers.
    """
    before, after = evaluation["before"], evaluation["after"]
    if not before:
        return "How the model did on the held-out rows before training was not measured."
    one_right = after.get("metric") != "exact-match" or all(len(reference) <= SHORT for reference in references)
    key, sign, name, how = ("loss", -1, "the held-out loss", ".3f")
    if "score" in before and one_right and before["score"] != after.get("score", before["score"]):
        key, sign, name, how = ("score", 1, "the held-out answers' score", ".1%")
    gain = sign * (after[key] - before[key])
    word = "It worked" if gain > 0 else "No change" if gain == 0 else "It got worse"
    return f"{word}: {name} went from {before[key]:{how}} to {after[key]:{how}}."


def watch(folders: Sequence[Path], path: Path, seconds: int = 5) -> None:
    """Write the page again and again until all runs are finished; a browser that shows it keeps up."""

    def preparing() -> bool:
        return any((run / "recipe.json").is_file() and not (run / "run.json").is_file() for run in folders)

    try:
        while preparing() or not write_report(folders, path, refresh=seconds):
            time.sleep(seconds)
    finally:
        if not preparing():
            write_report(folders, path)


def environment() -> Any:
    """Jinja, with everything from data escaped, and no character of it obeyed."""
    from jinja2 import Environment, PackageLoader

    def plain(value: Any) -> Any:  # what a template writes itself is Markup
        return visible(value) if type(value) is str else value

    jinja = Environment(
        loader=PackageLoader("ma_sft", "pages"), autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=plain
    )
    jinja.filters |= {"comma": "{:,}".format, "percent": "{:.1%}".format}
    return jinja


def _state(run: dict[str, Any]) -> str:
    if run["summary"]:
        return "finished"
    step = max((int(log["step"]) for log in run["log"]), default=0)
    last = max((log["time"] for log in run["log"]), default=run["started"])
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last))
    return f"not finished: step {step:,} of {run['planned_steps']:,}, last heard of at {at}"


def _figures(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures that one of the runs has: `group`, `label`, and of each run (before training, now, whether it is the
    best), of several runs with three digits.

    There is a best where all runs have the figure; of results and of times, where all had the same rows; of figures per
    token, where these were the same tokens.
    """
    summaries: list[dict[str, Any]] = [run["summary"] or {} for run in runs]
    figures = []
    metric = (
        next((summary for summary in summaries if summary), {})
        .get("evaluation", {})
        .get("after", {})
        .get("metric", "score")
    )
    for figure in FIGURES:
        values = [_value(summary, figure.key) for summary in summaries]
        known = [value for value in values if value is not None]
        compares = len(known) == len(values) and len(set(known)) > 1
        compares = compares and (figure.facts is None or _same(runs, figure.facts))
        best = figure.best(known) if figure.best and compares else math.nan
        how = ".3g" if figure.how.endswith("f") and len(runs) > 1 else figure.how
        befores = [_text(_value(summary, figure.before), how) for summary in summaries]
        cells = [(before, _text(now, how), now == best) for before, now in zip(befores, values, strict=True)]
        if known:
            figures.append({"group": figure.group, "label": figure.label.format(metric=metric), "cells": cells})
    return figures


def _side_by_side(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The held-out questions that all of several runs were asked, with each one's answer; different ones come first."""
    asked = [{answer["question"]: answer for answer in run["answers"]} for run in runs]
    found = [
        {"question": question, "answers": [own[question]["after"] for own in asked], "reference": answer["reference"]}
        for question, answer in asked[0].items()
        if all(question in own for own in asked)
    ]
    return sorted(found, key=lambda each: len(set(each["answers"])) == 1)


def _value(summary: dict[str, Any], key: str) -> float | None:
    found: Any = summary
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, int | float) else None


def _text(value: float | None, how: str) -> str:
    if value is None:
        return ""
    if how == "bytes":
        return f"{value / 1e9:.2f} GB"
    if how == "duration":
        minutes, seconds = divmod(round(value), 60)
        if minutes < 60:
            return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
        return f"{minutes // 60} h {minutes % 60:02} min"
    return format(value, how) if abs(value) < 1000 or "," in how else format(value, ",.0f")


def _differences(runs: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The settings in which runs differ: key -> value in each run, also of one that left it at its default."""

    def text(run: dict[str, Any], key: str) -> str:
        value = run["settings"].get(key, run.get("values", {}).get(key))
        how = "" if key in run["settings"] else " (default)"
        return "not set" if value is None else json.dumps(value, ensure_ascii=False) + how

    keys = dict.fromkeys(key for run in runs for key in run["settings"])
    texts = {key: [text(run, key) for run in runs] for key in keys}
    return {key: each for key, each in texts.items() if len({one.removesuffix(" (default)") for one in each}) > 1}


def _hardware(settings: "Settings") -> dict[str, str]:
    import psutil
    import torch

    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file() and "model name" in (text := info.read_text()):
        cpu = text.partition("model name")[2].partition(":")[2].partition("\n")[0].strip()
    found = {"CPU": f"{cpu}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB"}
    if torch.cuda.is_available() and not settings.training.use_cpu:
        gpu = torch.cuda.get_device_properties(0)
        found["GPU"] = f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 1e9:.0f} GB"
    state: Any = settings.training.distributed_state
    return found | {
        "processes": f"{settings.training.world_size} ({state.distributed_type.value if state else 'NO'})",
        "precision": "bf16" if settings.training.bf16 else "fp16" if settings.training.fp16 else "float32",
        "system": platform.platform(),
    }


def _command() -> str:
    """The command that started this process; the launcher's where there was one."""
    import psutil

    command = ["python", *sys.argv] if sys.argv[0].endswith(".py") else [Path(sys.argv[0]).name, *sys.argv[1:]]
    with suppress(psutil.Error):
        for words in (parent.cmdline() for parent in psutil.Process().parents()):
            names = [Path(word).name for word in words[:3]]
            if launcher := next((name for name in names if name in ("accelerate", "torchrun", "ma-sft")), None):
                command = [launcher, *words[names.index(launcher) + 1 :]]
                break
    return shlex.join(shown_command(command))
