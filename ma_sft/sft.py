"""Recipe -> run folder: the steps of a fine-tune in the order in which they happen."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.errors import first_line
from ma_sft.files import write_whole
from ma_sft.hub import pin_model, recall
from ma_sft.labels.templates import load_tokenizer
from ma_sft.pages.report import write_report, write_start
from ma_sft.pages.screen import forecast_memory, show_end, show_start
from ma_sft.recipe import Recipe, Settings
from ma_sft.release.manifest import make_manifest, write_manifest
from ma_sft.release.publish import check_login, publish
from ma_sft.release.save import save
from ma_sft.terminal import say
from ma_sft.tools.memory import peak_memory
from ma_sft.training.checkpoints import Stop, Survival
from ma_sft.training.exam import Exam
from ma_sft.training.folder import claimed, enter
from ma_sft.training.prepare import prepare_once
from ma_sft.training.processes import agree, digest, leave_together, once, outside_zero3
from ma_sft.training.progress import Journal, add_callbacks
from ma_sft.training.trainer import build_trainer, check_early

if TYPE_CHECKING:
    from trl import SFTTrainer


def run(
    recipe: Recipe, args: Sequence[str] = (), *, on_trainer: "Callable[[SFTTrainer], object] | None" = None
) -> dict[str, Any]:
    """Fine-tune as the recipe says and return the summary that is written to `<output_dir>/summary.json`.

    Args:
        recipe: data and settings.
        args: flags that win over the recipe, e.g. `["--max_steps", "20"]`.
        on_trainer: called with the trainer before its first step, to add a callback or change what it does.

    The output folder then holds `adapter/` and `merged/` (LoRA) or `model/` (full fine-tuning), `report.html`,
    `recipe.json` and `summary.json`. Every process but the first returns {}.

    Raises:
        MaSftError: anything wrong with settings, data or labels, before the first step.
    """
    settings = recipe.resolve(args)
    check_login(settings)
    with Stop() as stop, claimed(settings) as folder:
        out = folder.out
        folder.recall_revisions()
        recall(once(lambda: pin_model(settings)))
        tokenizer, added_tokens = load_tokenizer(settings)
        settings.labels.template_now = once(lambda: settings.labels.template_now)
        check_early(settings)
        data, held_out = prepare_once(settings, tokenizer)  # rows, tokens, the check, packs
        test = held_out.dataset if held_out else None
        content = {"data": agree(digest(data.dataset, test)), "stream": data.order and asdict(data.order)}
        checkpoint = folder.begin(content)
        manifest = make_manifest(settings, tokenizer, data)
        memory = forecast_memory(settings, data) if settings.training.process_index == 0 else None
        trainer = build_trainer(settings, tokenizer, added_tokens, data.dataset, test)
        exam = Exam(settings, tokenizer, held_out, trainer, out / "before.json")
        survival = Survival(trainer, stop, content)
        add_callbacks(trainer, Journal(out / "log.jsonl"), exam, survival)
        if on_trainer:
            on_trainer(trainer)
        if trainer.is_world_process_zero():
            write_start(settings, data, tokenizer, show_start(settings, data, trainer, memory, checkpoint))
        trainer.train(resume_from_checkpoint=checkpoint)
        stop.end()
        summary: dict[str, Any] = {
            "name": settings.run.name,
            "rows": data.counts.rows or None,  # a stream does not know
            "trained_tokens": data.counts.trained_tokens,
            **survival.figures(),
            "train_loss": mean_loss(trainer.state.log_history),
            "peak_memory": peak_memory(),
            "forecast_peak_memory": memory.peak if memory else None,
        }
        saved = out / ("adapter" if settings.model.use_peft else "model")
        save(trainer, tokenizer, saved, manifest)
        summary = release(settings, trainer, exam, saved, manifest, summary)
    leave_together()
    return summary


def release(
    settings: Settings,
    trainer: "SFTTrainer",
    exam: Exam,
    saved: Path,
    manifest: dict[str, Any],
    summary: dict[str, Any],
) -> dict[str, Any]:
    """All that comes after saving: held-out figures, the merged model, summary and report.

    What was trained lies in `saved`. A step that fails is said and entered in the summary under `failed`; the others
    go on, and the run is finished.
    """
    out, failed = saved.parent, dict[str, str]()
    with attempt("the held-out rows after training", failed, alone=trainer.args.world_size == 1):
        exam.finish()
    if not trainer.is_world_process_zero():
        return {}
    with attempt("grading the answers", failed):
        summary |= exam.figures()
        write_manifest(saved, {**manifest, "metrics": summary.get("evaluation", {}).get("after")})
    if saved.name == "adapter" and settings.adapter.merge:
        with attempt("merging the adapter", failed):
            summary["merge_max_logit_difference"] = merge_into(out / "merged", settings.training.trust_remote_code)
    if failed:
        summary["failed"] = failed
    write_whole(out / "answers.json", json.dumps(exam.table(), ensure_ascii=False, indent=1))
    write_whole(out / "summary.json", json.dumps(summary, ensure_ascii=False, indent=2))
    with attempt("the report", failed):
        write_report([out], out / "report.html")
    if settings.chosen.get("push_to_hub"):
        with attempt("publishing", failed):
            summary["published"] = publish(settings, saved, summary)
        write_whole(out / "summary.json", json.dumps(summary | ({"failed": failed} if failed else {}), indent=2))
    with attempt("showing the result", failed):
        show_end(out, exam.table(), summary)
    return summary


@contextmanager
def attempt(step: str, failed: dict[str, str], *, alone: bool = True) -> Iterator[None]:
    """Say, and enter in `failed`, what a step that comes after training failed with.

    Args:
        alone: whether no other process takes part, which would wait for this one for ever.
    """
    try:
        yield
    except Exception as error:
        if not alone:
            raise
        failed[step] = f"{type(error).__name__}: {first_line(error)}"
        say(f"{step} failed, what was trained is saved: {failed[step]}", error=True)


def merge_into(folder: Path, code: bool) -> float | None:
    """Merge the run's adapter; the largest difference of a logit, None where the models were not compared."""
    from ma_sft.release.merge import merge

    shutil.rmtree(folder, ignore_errors=True)
    with outside_zero3():
        merged = merge(folder.parent, folder, code=code)
    enter(folder.parent, folder.name, folder)
    say(f"merged model: {merged}")
    return merged.difference


def mean_loss(log_history: list[dict[str, float]]) -> float:
    """The mean over all steps of the run, those before a resume among them."""
    logs = [(0.0, 0.0)] + [(log["step"], log["loss"]) for log in log_history if "loss" in log]
    return sum(loss * (step - before) for (before, _), (step, loss) in pairwise(logs)) / max(logs[-1][0], 1)
