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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.errors import RecipeError
from ma_sft.files import write_whole
from ma_sft.version import versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ma_sft.recipe import Settings
    from ma_sft.training.prepare import Prepared
from ma_sft.training.grades import evaluation_rows

SHOWN_TOKENS = 600  # of a row in the mask preview


SHOWN_ANSWERS = 200


# title, format of its values, key of the training log, key of the held-out log
CHARTS = (
    ("loss", ".3g", "loss", "eval_loss"),
    ("token accuracy", ".0%", "mean_token_accuracy", "eval_mean_token_accuracy"),
    ("learning rate", ".2g", "learning_rate", None),
    ("tokens per second", ",.0f", "tokens_per_second", None),
    ("gradient norm", ".3g", "grad_norm", None),
)


# The figures of summary.json that come first: label and format.
FIGURES = {
    "exact_match_before": ("exact match before", ".1%"),
    "exact_match_after": ("exact match after", ".1%"),
    "eos_rate": ("answers stopped by themselves", ".1%"),
    "eval_loss": ("held-out loss", ".4f"),
    "eval_mean_token_accuracy": ("held-out token accuracy", ".1%"),
    "train_loss": ("mean training loss", ".4f"),
    "rows": ("rows", ","),
    "trained_tokens": ("trained tokens in them", ","),
    "steps": ("steps", ","),
    "tokens": ("tokens computed", ","),
    "train_seconds": ("seconds", ",.0f"),
    "tokens_per_second": ("tokens per second", ",.0f"),
}


WIDTH, HEIGHT, LEFT, BOTTOM = 360, 190, 46, 20  # of a chart and its axes, in SVG units


def write_start(
    settings: "Settings", data: "Prepared", tokenizer: "PreTrainedTokenizerBase", lines: list[tuple[str, str]]
) -> None:
    """Write `run.json` into the output folder: all that the page tells and that is known before the first step.

    Args:
        lines: what the terminal was told too, as (what, how much).
    """
    from ma_sft.labels.preview import heading, pieces

    rows = []
    for number, row in enumerate(data.sample):
        shown = pieces(row["input_ids"][:SHOWN_TOKENS], row["labels"][:SHOWN_TOKENS], tokenizer)
        more = len(row["input_ids"]) - SHOWN_TOKENS
        rows.append({"heading": heading(row, number), "pieces": [asdict(p) for p in shown], "more": max(0, more)})
    out = Path(settings.training.output_dir)
    facts = {
        "name": settings.run.name or out.name,
        "model": settings.chosen.get("model_name_or_path"),
        "started": time.time(),
        "command": _command(),
        "lines": lines,
        "lengths": data.lengths,
        "rows": rows,
        "stages": [asdict(stage) for stage in data.stages],
        "packing": {**asdict(data.packing), "density": data.packing.density, "text": str(data.packing)}
        if data.packing
        else None,
        "findings": None if data.check is None else [{"level": f.level, "text": str(f)} for f in data.check.findings],
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
        started = (folder / "recipe.json").is_file()
        raise RecipeError(
            f"{folder} is a run that has not come to its first step; wait with --watch, or start it again if it stopped"
            if started
            else f"{folder} is not a run's folder; give one that `ma-sft train` made, such as runs/NAME"
        )

    def read(name: str, default: Any) -> Any:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default

    log, planned = _read_log(folder / "log.jsonl")
    return {
        **read("run.json", {}),
        "folder": str(folder),
        "settings": read("recipe.json", {}),
        "log": log,
        "planned_steps": planned,
        "answers": read("answers.json", []),
        "summary": read("summary.json", None),
    }


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
    """Write the page of one or several runs.

    Args:
        refresh: seconds after which a browser shall load the page again, for runs that train.

    Returns:
        Whether all runs are finished.

    Raises:
        RecipeError: as `read_run`.
    """
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        run |= {"state": _state(run), "figures": _figures(run), "yaml": _yaml(run["settings"])}
        run["again"] = shlex.join(["ma-sft", "train", f"{run['folder']}/recipe.json", "--name", f"{run['name']}-again"])
        evaluation = (run["summary"] or {}).get("evaluation")
        run["evaluation"] = evaluation_rows(evaluation) if evaluation else []
    page = environment().get_template("report.html.jinja").render(
        runs=runs,
        charts=[chart for spec in CHARTS if (chart := _chart(spec, [run["log"] for run in runs]))],
        differences=_differences([run["settings"] for run in runs]),
        figure_names=[label for label, _ in FIGURES.values() if any(label in run["figures"] for run in runs)],
        refresh=refresh,
        shown_answers=SHOWN_ANSWERS,
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "bottom": BOTTOM},
    )  # fmt: skip
    write_whole(path, page)
    return all(run["summary"] for run in runs)


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
    """Jinja, with everything from data escaped."""
    from jinja2 import Environment, PackageLoader

    jinja = Environment(loader=PackageLoader("ma_sft", "pages"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    jinja.filters |= {"comma": "{:,}".format, "percent": "{:.1%}".format}
    return jinja


def _state(run: dict[str, Any]) -> str:
    if run["summary"]:
        return "finished"
    step = max((int(log["step"]) for log in run["log"]), default=0)
    last = max((log["time"] for log in run["log"]), default=run["started"])
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last))
    return f"not finished: step {step:,} of {run['planned_steps']:,}, last heard of at {at}"


def _figures(run: dict[str, Any]) -> dict[str, str]:
    summary = run["summary"] or {}
    return {
        label: format(summary[key], how)
        for key, (label, how) in FIGURES.items()
        if isinstance(summary.get(key), int | float)
    }


def _differences(settings: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The settings in which runs differ: key -> value in each run."""
    keys = dict.fromkeys(key for one in settings for key in one)
    texts = {key: [json.dumps(one.get(key), ensure_ascii=False) for one in settings] for key in keys}
    return {key: values for key, values in texts.items() if len(set(values)) > 1}


def _chart(spec: tuple[str, str, str, str | None], logs: list[list[dict[str, float]]]) -> dict[str, Any] | None:
    """A chart with one line a run for training and one for held-out rows, scaled to SVG units; None without values."""
    title, how, *keys = spec
    lines: list[dict[str, Any]] = []
    missing = 0
    for run, log in enumerate(logs):
        for held_out, key in enumerate(keys):
            values = {int(entry["step"]): float(entry[key]) for entry in log if key in entry}
            points = [(step, value) for step, value in sorted(values.items()) if math.isfinite(value)]
            missing += len(values) - len(points)
            if points:
                lines.append({"run": run, "held_out": bool(held_out), "values": points})
    if not lines:
        return None
    steps: list[int] = [step for line in lines for step, _ in line["values"]]
    numbers: list[float] = [value for line in lines for _, value in line["values"]]
    xticks, yticks = _ticks(min(steps), max(steps), whole=True), _ticks(min(numbers), max(numbers))
    low, high = min(*numbers, yticks[0]), max(*numbers, yticks[-1])
    first, last = min(steps), max(*steps, min(steps) + 1)

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - 10), 1)

    def y(value: float) -> float:
        return round(8 + (high - value) / ((high - low) or 1) * (HEIGHT - BOTTOM - 12), 1)

    for line in lines:
        points = line.pop("values")
        line["dots"] = [(x(step), y(value), f"step {step:,}: {format(value, how)}") for step, value in points]
        line["points"] = " ".join(f"{a},{b}" for a, b, _ in line["dots"])
        line["ends"] = [format(value, how) for _, value in (points[0], points[-1])]
    return {
        "title": title,
        "lines": lines,
        "missing": missing,
        "x": [(x(tick), f"{tick:,.0f}") for tick in xticks],
        "y": [(y(tick), format(tick, how)) for tick in yticks],
    }


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to six round numbers that span [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / 4))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= span / 5)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [round(n * step, 12) for n in range(first, last + 1)]
    return [tick for tick in ticks if low <= tick <= high] if whole else ticks


def _yaml(settings: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)


def _hardware(settings: "Settings") -> dict[str, str]:
    import psutil
    import torch

    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    found = {"CPU": f"{cpu}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"}
    if torch.cuda.is_available() and not settings.training.use_cpu:
        gpu = torch.cuda.get_device_properties(0)
        found["GPU"] = f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    state: Any = settings.training.distributed_state
    return found | {
        "processes": f"{settings.training.world_size} ({state.distributed_type.value if state else 'NO'})",
        "precision": "bf16" if settings.training.bf16 else "fp16" if settings.training.fp16 else "float32",
        "system": platform.platform(),
    }


def _command() -> str:
    """The command that started this process; the launcher's where `accelerate launch` or `torchrun` did."""
    import psutil

    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if Path(sys.argv[0]).suffix == ".py":
        command = ["python", *sys.argv]
    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()
        except psutil.Error:
            break
        at = next((i for i, word in enumerate(words[:3]) if Path(word).name in ("accelerate", "torchrun")), None)
        if at is not None:
            return shlex.join([Path(words[at]).name, *words[at + 1 :]])
    return shlex.join(command)
