"""`ma-sft init`: four questions and a look at the rows become a recipe with comments, ready for `ma-sft check`."""

import json
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ma_sft.config import Recipe
from ma_sft.errors import FormatError, RecipeError, TemplateError
from ma_sft.tools.gallery import YAML, as_yaml
from ma_sft.utils import must_be_new, say, visible

LOOKED_AT = 5000  # rows, drawn at random
PREFERENCES = ("preference", "hh-rlhf", "pku-saferlhf")
TASKS = {
    "chat": "answers in conversations",
    "exact": "short answers that are right or wrong: JSON, labels, numbers",
    "reasoning": "thoughts between <think> and </think>, then the answer",
    "tools": "calls of functions",
    "text": "plain text, no conversation",
}
COMMENTS = {
    "model_name_or_path": "a hub id, a folder, or 'demo'",
    "template": "the model has no chat template; its two tokens are added and trained",
    "history": "where the template drops earlier thoughts, each turn is trained as it is seen",
    "test_size": "rows held out: their loss is measured before, while and after training",
    "generate_eval": "held-out answers to compare before and after",
    "max_new_tokens": "longest of these answers, in tokens",
    "gradient_accumulation_steps": "raise it and lower the one above if memory runs out",
    "learning_rate": "for LoRA; a tenth of it without use_peft",
    "warmup_steps": "a share of all steps",
    "save_total_limit": "checkpoints to keep",
    "use_peft": "train an adapter (LoRA); False trains all weights",
    "lora_preset": "or attention, or mini (q and v)",
    "load_in_4bit": "the frozen base in 4 bits (QLoRA): in 16 it would not fit",
}


@dataclass(frozen=True)
class Rows:
    """What the rows look like, from up to `LOOKED_AT` of them."""

    total: int  # rows in all
    format: str
    sources: list[dict[str, Any]]  # entries of `datasets`
    broken: int  # rows that are no conversation
    example: str  # what is wrong with the first of them
    lengths: "np.ndarray[Any, Any]"  # tokens of each row
    answers: "np.ndarray[Any, Any]"  # and of what is trained in it
    task: str
    template: str | None
    context: int  # of the model, in tokens

    def __str__(self) -> str:
        half, most = np.percentile(self.lengths, [50, 99]).astype(int)
        return (
            f"{self.total:,} rows in the format {self.format}: half have up to {half:,} tokens, 99% up to {most:,}, "
            f"the longest {self.lengths.max():,}"
            + (f"; {self.broken:,} broken rows" if self.broken else "")
            + ("; of each pair the better answer is trained, `rejected` is not used" * (self.format in PREFERENCES))
        )


def init(
    model: str | None,
    data: str | None,
    hardware: str | None,
    task: str | None,
    out: Path | None,
    *,
    split: str = "train",
    code: bool = False,
    columns: str | None = None,
) -> tuple[Path, str]:
    """Write a recipe, asking for what is None; its path and the command that trains it.

    Args:
        model, data: a hub id, or a folder; `"demo"`; of data a file or a glob, too.
        hardware: `"cpu"`, or GPUs as `"1x24GB"`.
        task: one of `TASKS`.
        out: the recipe; by default it is named after the data, here.
        split: of a hub data set.
        code: whether the model's own Python code may run.
        columns: what columns mean, as `"theirs=question,other=answer"`; None asks where their names do not tell.

    Raises:
        MaSftError: `out` exists, nobody can be asked, or model or data cannot be had or used.
    """
    if task is not None and task not in TASKS:
        raise RecipeError(f"--task: one of {', '.join(TASKS)} expected, found {task!r}")
    gpus, memory = _parse_hardware(hardware) if hardware else (0, "")
    data = data or _ask("data", "Data: a file (.jsonl, .json, .csv, .parquet, .txt), a folder or a hub id")
    out = out or Path(_module(data) + ".py")
    must_be_new(out, "pass another file with -o")
    if out.suffix not in (".py", *YAML):
        raise RecipeError(f"-o: a recipe is a .py or .yaml file, found {out}")
    sources, form, total = _sources(data, split, columns)  # before the next question
    if form == "text" and task not in (None, "text"):
        raise RecipeError(
            f"--task {task}: the rows are plain text; pass --task text, or say what columns mean: "
            "--columns THEIRS=question,THEIRS=answer"
        )
    model = model or _ask("model", "Model: a hub id or a folder", "demo")
    extra: dict[str, Any] = {"dataset_train_split": split} if split != "train" else {}
    extra |= {"trust_remote_code": True} if code else {}
    rows = look(model, sources, form, total, extra)
    say(f"{data}: {rows}")
    if not hardware:
        hardware = _ask("hardware", "Hardware: cpu, or GPUs as 1x24GB", _here())
        gpus, memory = _parse_hardware(hardware)
    while task not in TASKS:
        task = _ask("task", "\n".join(f"  {name}: {text}" for name, text in TASKS.items()) + "\nTask", rows.task)
    settings, comments = _choose(model, task, rows, gpus)
    settings |= extra
    command = _fit(settings, gpus, memory, out) if gpus else f"ma-sft train {out}"
    head = f"{TASKS[task].capitalize()}, on {hardware}.\n\n{str(rows).capitalize()}.\n\n    {command}"
    write = as_yaml if out.suffix in YAML else _write
    out.write_text(write(settings, comments, head), encoding="utf-8")
    return out, command


def look(model: str, sources: list[dict[str, Any]], form: str, total: int, extra: dict[str, Any]) -> Rows:
    """Label rows of sources with `total` rows of a format as training with these extra settings would.

    Raises:
        MaSftError: the model cannot be had, no row is a conversation, or its template knows no tools.
    """
    from transformers import AutoConfig

    from ma_sft.hub import load_pretrained
    from ma_sft.labels.templates import load_tokenizer
    from ma_sft.labels.tokenize import label
    from ma_sft.packing.pack import Tokens
    from ma_sft.packing.truncation import whole_rows

    drawn: dict[str, Any] = {"datasets": [{**source, "limit": LOOKED_AT} for source in sources], "on_error": "skip"}
    recipe, template = Recipe(model_name_or_path=model, report_to="none", **drawn, **extra), None
    settings = recipe.resolve()
    try:
        tokenizer, _ = load_tokenizer(settings)
    except TemplateError:  # a base model
        template = "chatml"
        settings = Recipe(**recipe.settings, template=template).resolve()
        tokenizer, _ = load_tokenizer(settings)
    labelled = label(settings, tokenizer)
    tokens = Tokens(labelled.dataset)
    answers = tokens.trained(whole_rows(np.arange(len(tokens.lengths)), tokens.lengths))
    name, revision = str(settings.model.model_name_or_path), settings.model.model_revision
    config = load_pretrained(AutoConfig, name, revision, code=settings.training.trust_remote_code).get_text_config()
    return Rows(
        total=total,
        format=form,
        sources=sources,
        broken=sum(stage.removed.get("broken rows", 0) for stage in labelled.stages),
        example=next((t for stage in labelled.stages for t in stage.examples.get("broken rows", [])), ""),
        lengths=tokens.lengths,
        answers=answers,
        task=_task(form, labelled.conversations, answers),
        template=None if form == "text" else template,
        context=getattr(config, "max_position_embeddings", 1 << 30),
    )


def _sources(data: str, split: str, columns: str | None) -> tuple[list[dict[str, Any]], str, int]:
    """The entries of `datasets`, with what columns mean where their names do not tell; their format; how many rows."""
    from ma_sft.data.formats import detect_format
    from ma_sft.data.load import Source, load_rows, rows_of

    found = _files(Path(data)) if Path(data).is_dir() else [{"path": data}]
    loaded = [(source := Source.of(entry, split=split), load_rows(source)) for entry in found]
    source, rows = loaded[0]
    first: Any = next((row for _, _, row in rows_of(rows[:20], 0, source) if isinstance(row, dict)), {})
    meaning = dict(pair.split("=", 1) for pair in columns.split(",")) if columns else _meaning(first)
    if wrong := [name for name in meaning if name not in first]:
        raise RecipeError(f"--columns: there is no column {wrong[0]!r}, there are {', '.join(first)}")
    form = detect_format({meaning.get(name, name): value for name, value in first.items()}) if first else "?"
    more = {"columns": meaning} if meaning else {}
    return [{**entry, **more} for entry in found], form, sum(len(each) for _, each in loaded)


def _files(folder: Path) -> list[dict[str, Any]]:
    """The entries of a folder: a saved data set, or its files by suffix; of texts, each is a row."""
    from ma_sft.data.load import OF_A_FILE

    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return [{"path": str(folder)}]
    suffixes = [suffix for suffix in OF_A_FILE if any(folder.glob(f"*{suffix}"))]
    if not suffixes:
        raise RecipeError(f"{folder} holds no files that end in {', '.join(OF_A_FILE)}")
    texts = {suffix: {"sample_by": "document"} for suffix in (".txt", ".md")}
    return [{"path": f"{folder}/*{suffix}", **texts.get(suffix, {})} for suffix in suffixes]


def _meaning(row: dict[str, Any]) -> dict[str, str]:
    """`{name in the data: name that a format has}`, asked for where the names are those of no format."""
    from ma_sft.data.formats import detect_format

    if not row:  # it is broken, which is said with the rows
        return {}
    try:
        detect_format(row)
        return {}
    except FormatError as error:
        problem = error
    if not sys.stdin.isatty():
        raise FormatError(f"{problem}; or say what columns mean: --columns THEIRS=question,THEIRS=answer")
    say(*(f"  {name}: {str(value)[:60]}" for name, value in row.items()))
    found: dict[str, str] = {}
    for what in ("question", "answer"):
        while (name := _ask("columns", f"Which column is the {what}?")) not in row:
            say(f"one of {', '.join(row)}")
        found[name] = what
    return found


def _task(form: str, conversations: Any, answers: "np.ndarray[Any, Any]") -> str:
    if form == "text":
        return "text"
    first = conversations[: min(50, len(conversations))]
    if any(first["tools"]):
        return "tools"
    turns = [m for messages in first["messages"] for m in messages if m["role"] == "assistant"]
    if any(m.get("reasoning_content") or "</think>" in (m["content"] or "") for m in turns):
        return "reasoning"
    return "exact" if len(turns) == len(first["messages"]) and np.percentile(answers, 90) <= 48 else "chat"


def _choose(model: str, task: str, rows: Rows, gpus: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings that fit rows, task and hardware, and a comment on some of them."""
    good = round(rows.total * len(rows.lengths) / (len(rows.lengths) + rows.broken))
    longest, most = int(rows.lengths.max()), int(np.percentile(rows.lengths, 99))
    many = good >= 500  # enough to fill packs with
    limit = min(rows.context, 8192 if gpus else 2048)
    length = min(max(1024 if many else 256, 1 << (min(longest, 2 * most) - 1).bit_length()), limit)
    held_out = min(200, good // 10)
    packing = bool(many and np.median(rows.lengths) * 2 <= length)
    units = max(1, round(rows.lengths.mean() * good / length) if packing else good - held_out)
    batch = 16 if units >= 1600 else 8 if units >= 400 else 4
    epochs = max(1 if good >= 50_000 else 2 if good >= 10_000 else 3, min(8, -(-60 * batch // units)))
    device = min(batch, max(1, (8192 if gpus else 2048) // length))
    steps = -(-units // batch) * epochs
    answer = {"exact": int(rows.answers.max() * 1.5) // 16 * 16 + 16, "reasoning": 2048}.get(task, 256)
    shown = {"exact": min(50, held_out), "chat": min(10, held_out), "reasoning": min(5, held_out)}.get(task, 0)
    simple = len(rows.sources) == len(rows.sources[0]) == 1
    settings = {
        "model_name_or_path": model,
        **({"dataset_name": rows.sources[0]["path"]} if simple else {"datasets": rows.sources}),
        **({"on_error": "skip"} if rows.broken else {}),
        **({"template": rows.template} if rows.template else {}),
        **({"history": "split"} if task == "reasoning" else {}),
        **({"test_size": held_out, "eval_strategy": "epoch"} if held_out else {}),
        **({"generate_eval": shown, "max_new_tokens": answer} if shown else {}),
        "max_length": length,
        "packing": packing,
        "per_device_train_batch_size": device,
        "gradient_accumulation_steps": max(1, batch // (device * max(gpus, 1))),
        "num_train_epochs": epochs,
        "learning_rate": 5e-4 if units < 400 else 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "logging_steps": max(1, min(10, steps // 40)),
        "save_total_limit": 2,
        "use_peft": True,
        "lora_preset": "all-linear",
    }
    cut = f"{int((rows.lengths > length).sum()):,} of the {len(rows.lengths):,} rows looked at are longer, and cut"
    return settings, COMMENTS | {
        "on_error": f"counts and leaves out {rows.broken:,} broken rows: {rows.example}",
        "max_length": f"tokens; {cut}",
        "packing": "short rows share a sequence and do not see each other" if packing else "few or long rows",
        "num_train_epochs": f"about {steps:,} steps",
    }


def _fit(settings: dict[str, Any], gpus: int, memory: str, out: Path) -> str:
    """The command of the first launcher that fits the GPUs; settings that it needs are set."""
    from ma_sft.tools.memory import plan, start_command

    found = plan(Recipe(**settings).resolve(), gpus, memory)
    if not found["choice"]:
        raise RecipeError(
            f"nothing fits {gpus} GPU(s) of {memory}, not even 4-bit QLoRA; take a smaller model or larger GPUs"
        )
    settings |= found["changes"]
    return start_command(found["choice"], gpus, [str(out)])


def _write(settings: dict[str, Any], comments: dict[str, str], head: str) -> str:
    text = [f'"""{head}\n"""', "", "from ma_sft import Recipe, launch", "", "recipe = Recipe("]
    for name, value in settings.items():
        line = f"    {name}={json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)},"
        comment = " ".join(comments.get(name, "").split())[:200]
        if len(line) + len(comment) > 114:
            text.append(f"    # {comment}")
            comment = ""
        text.append(line + (f"  # {comment}" if comment else ""))
    return "\n".join([*text, ")", "", 'if __name__ == "__main__":', "    launch(recipe)", ""])


def _ask(flag: str, question: str, default: str | None = None) -> str:
    if not sys.stdin.isatty():
        raise RecipeError(f"there is nobody to ask for the {flag}; pass --{flag}" + (f" {default}" if default else ""))
    answer = ""
    while not answer:
        answer = input(visible(f"{question}{f' [{default}]' if default else ''}: ")).strip() or default or ""
    return answer


def _module(data: str) -> str:
    """A name for the recipe of `data` that hides no installed module from a script beside it."""
    name = re.sub(r"\W+", "_", Path(data).name.split(".")[0]).strip("_") or "recipe"
    return f"{name}_recipe" if find_spec(name) else name


def _here() -> str:
    """This machine's hardware as an answer."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"{torch.cuda.device_count()}x{torch.cuda.get_device_properties(0).total_memory / 1e9:.0f}GB"


def _parse_hardware(text: str) -> tuple[int, str]:
    """How many GPUs, and the memory of each."""
    if text.lower() == "cpu":
        return 0, ""
    match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+\.?\d*\s*[kmgt]i?b?)\s*", text.lower())
    if match is None or int(match[1]) < 1:
        raise RecipeError(f"--hardware: cpu, or GPUs as 1x24GB expected, found {text!r}")
    return int(match[1]), match[2]
