"""Recipe -> run folder: the steps of a fine-tune in the order in which they happen."""

import json
import shutil
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.errors import MaSftError
from ma_sft.files import write_whole
from ma_sft.recipe import Recipe, Settings
from ma_sft.terminal import console, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import SFTTrainer

    from ma_sft.tools.memory import Forecast
    from ma_sft.training.checkpoints import Stop
    from ma_sft.training.prepare import Prepared
from ma_sft.training.exam import Exam
from ma_sft.training.trainer import make_trainer

REVISIONS = "revisions.json"  # in the run's folder: the commits of its model and data, for when it is resumed


def run(recipe: Recipe, args: Sequence[str] = ()) -> dict[str, Any]:
    """Fine-tune as the recipe says and return the summary that is written to `<output_dir>/summary.json`.

    Args:
        recipe: data and settings.
        args: flags that win over the recipe, e.g. `["--max_steps", "20"]`.

    The output folder then holds `adapter/` and `merged/` (LoRA) or `model/` (full fine-tuning), `report.html`,
    `recipe.json` and `summary.json`.

    Raises:
        MaSftError: anything wrong with settings, data or labels, before the first step.
    """
    from ma_sft.training.checkpoints import Stop, claimed
    from ma_sft.training.processes import leave_together

    settings = recipe.resolve(args)
    with Stop() as stop, claimed(settings) as checkpoint:
        summary = _run(settings, stop, checkpoint)
    leave_together()
    return summary


def _run(settings: Settings, stop: "Stop", checkpoint: Path | None) -> dict[str, Any]:
    from ma_sft.hub import commits, pin_model, recall
    from ma_sft.labels.templates import load_tokenizer
    from ma_sft.pages.report import write_start
    from ma_sft.release.manifest import make_manifest, write_manifest
    from ma_sft.tools.memory import peak_memory
    from ma_sft.training.checkpoints import Survival, check_same_data
    from ma_sft.training.exam import evaluation, headlines, held_out_loss
    from ma_sft.training.prepare import prepare_once
    from ma_sft.training.processes import agree, digest, once
    from ma_sft.training.progress import Journal

    out = Path(settings.training.output_dir)
    if checkpoint and (out / REVISIONS).is_file():
        recall(json.loads((out / REVISIONS).read_text(encoding="utf-8")))
    recall(once(lambda: pin_model(settings)))
    tokenizer, added_tokens = load_tokenizer(settings)
    data, held_out = prepare_once(settings, tokenizer)
    content = digest(data.dataset, held_out.dataset if held_out else None)
    agree(content)
    if checkpoint:
        check_same_data(checkpoint, content, data.order)
    memory = _forecast(settings, data) if settings.training.process_index == 0 else None
    trainer = make_trainer(settings, tokenizer, added_tokens, data.dataset, held_out.dataset if held_out else None)
    journal, survival = Journal(out / "log.jsonl"), Survival(trainer, stop, content, data.order)
    trainer.add_callback(journal)  # first: survival stops at a loss that is no number
    trainer.add_callback(survival)
    main = trainer.is_world_process_zero()
    if main:
        write_whole(out / REVISIONS, json.dumps(commits(), indent=2))
        write_start(settings, data, tokenizer, show_start(settings, data, trainer, memory, checkpoint))

    exam = Exam(settings, tokenizer, held_out.conversations) if held_out and held_out.conversations else None
    # ZeRO and FSDP can run the model only once training has shared it out
    whole = not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
    losses = held_out_loss(trainer, held_out.dataset, held_out.sources) if held_out and whole else {}
    before = exam.answer(trainer, "answers before training") if exam and whole else []
    if main and losses:
        journal.held_out(0, losses["all"])
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - start
    if stop.signal:
        stop.now()
    peak = peak_memory()
    manifest = make_manifest(settings, tokenizer, data)
    saved = out / ("adapter" if settings.model.use_peft else "model")
    _save(trainer, tokenizer, saved, manifest)
    losses_after = held_out_loss(trainer, held_out.dataset, held_out.sources) if held_out else {}
    after = exam.answer(trainer, "answers after training") if exam else []
    if not main:
        return {}

    if losses_after:
        journal.held_out(trainer.state.global_step, losses_after["all"])
    summary: dict[str, Any] = {
        "name": settings.run.name,
        "rows": data.counts.rows or None,  # a stream does not know
        "trained_tokens": data.counts.trained_tokens,
        "tokens": trainer._total_train_tokens,
        "steps": trainer.state.global_step,
        "train_loss": mean_loss(trainer.state.log_history),
        "train_seconds": round(seconds, 1),
        "tokens_per_second": round((trainer._total_train_tokens - survival.tokens_before) / seconds, 1),
        "peak_memory": peak,
        "forecast_peak_memory": memory.peak if memory else None,
    }
    if held_out:
        graded = exam.grade(before, after, losses, losses_after) if exam else evaluation(losses, losses_after)
        summary |= {**headlines(graded), "evaluation": graded}
        write_manifest(saved, {**manifest, "kind": saved.name, "metrics": graded["after"]})
    if settings.model.use_peft and settings.adapter.merge:
        from ma_sft.release.merge import merge
        from ma_sft.training.processes import outside_zero3

        shutil.rmtree(out / "merged", ignore_errors=True)
        with outside_zero3():
            merged = merge(out, out / "merged", code=settings.training.trust_remote_code)
        say(f"merged model: {merged}")
        summary["merge_max_logit_difference"] = merged.difference
    return _finish(out, exam.table(before, after) if exam else [], summary)


def _save(trainer: "SFTTrainer", tokenizer: "PreTrainedTokenizerBase", folder: Path, manifest: dict[str, Any]) -> None:
    """Save adapter or model under another name first, so that `folder` is whole or not there."""
    from ma_sft.release.manifest import write_manifest
    from ma_sft.training.adapters import name_base, save_converted
    from ma_sft.training.exam import end_ids

    model = trainer.accelerator.unwrap_model(trainer.model)
    model.generation_config.eos_token_id = manifest["end_of_turn_ids"] = end_ids(model.generation_config, tokenizer)
    scratch = folder.with_name(f".{folder.name}")
    trainer.save_model(str(scratch))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        save_converted(model, scratch, folder.with_name("initial_adapter"))
        if folder.name == "adapter":
            name_base(scratch, manifest["base_model"]["name_or_path"], manifest["base_model"]["revision"])
        (scratch / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.json says the same
        write_manifest(scratch, {**manifest, "kind": folder.name})
        if folder.exists():  # the run was stopped between saving this and its end
            shutil.rmtree(folder)
        scratch.rename(folder)


def mean_loss(log_history: list[dict[str, float]]) -> float:
    """The mean over all steps of the run, those before a resume among them."""
    logs = [(0.0, 0.0)] + [(log["step"], log["loss"]) for log in log_history if "loss" in log]
    return sum(loss * (step - before) for (before, _), (step, loss) in pairwise(logs)) / max(logs[-1][0], 1)


def _forecast(settings: Settings, data: "Prepared") -> "Forecast | None":
    """The forecast of peak memory for the longest row that there is; None where the model cannot be simulated."""
    from ma_sft.packing.view import lengths
    from ma_sft.tools.memory import forecast

    rows: Any = data.dataset
    try:
        return forecast(settings, int(lengths(rows).max()) if hasattr(rows, "num_rows") else None)
    except MaSftError:
        raise
    except Exception as error:
        say(f"no forecast of memory: one step on fake tensors failed with {type(error).__name__}: {error}")
        return None


def show_start(
    settings: Settings,
    data: "Prepared",
    trainer: "SFTTrainer",
    memory: "Forecast | None",
    checkpoint: Path | None,
) -> list[tuple[str, str]]:
    """Print what will be trained, before the first step; the (what, how much) lines of it."""
    from rich.table import Table

    from ma_sft.labels.tokenize import counts_table
    from ma_sft.tools.memory import memory_table

    table = Table(title=f"{settings.run.name}: what will be trained", show_header=False)
    lines = counts_table(data.counts) + memory_table(settings, trainer.model, memory)
    for key, value in lines:
        table.add_row(key, value)
    screen = console()
    screen.print(table)
    if data.check is not None:
        screen.print(data.check)
    if data.packing is not None:
        screen.print(str(data.packing))
    if checkpoint:
        say(f"going on from {checkpoint}")
    return lines


def _finish(out: Path, answers: list[tuple[str, str, str, str]], summary: dict[str, Any]) -> dict[str, Any]:
    """Write answers, summary and report; print where everything is."""
    from rich.table import Table

    from ma_sft.pages.report import write_report
    from ma_sft.training.exam import evaluation_table

    screen = console()
    if answers:
        table = Table("message", "before", "after", title="held-out answers", show_lines=True)
        for question, before, after, _ in answers[:5]:
            table.add_row(*(text if len(text) < 300 else text[:300] + " ..." for text in (question, before, after)))
        screen.print(table)
    if found := summary.get("evaluation"):
        screen.print(evaluation_table(found))
    if summary.get("exact_match_after") is not None:
        first = summary["exact_match_before"]
        screen.print(
            f"held-out exact match: {'not measured' if first is None else f'{first:.1%}'} before, "
            f"{summary['exact_match_after']:.1%} after; stopped by itself: {summary['eos_rate']:.1%}"
        )
    write_whole(out / "answers.json", json.dumps(answers, ensure_ascii=False, indent=1))
    write_whole(out / "summary.json", json.dumps(summary, ensure_ascii=False, indent=2))
    write_report([out], out / "report.html")
    for what in ("adapter", "merged", "model", "report.html"):
        if (out / what).exists():
            screen.print(f"{what:>12}  {out / what}", soft_wrap=True)
    screen.print(f"{'chat':>12}  ma-sft chat {out}", soft_wrap=True)
    return summary
