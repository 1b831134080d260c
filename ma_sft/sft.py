"""Recipe -> run folder: the steps of a fine-tune in the order in which they happen."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.config import Recipe
from ma_sft.errors import first_line
from ma_sft.hub import pin_model, recall
from ma_sft.labels.templates import load_tokenizer
from ma_sft.pages.report import write_report, write_start
from ma_sft.pages.screen import forecast_memory, show_end, show_start
from ma_sft.release.manifest import make_manifest, save, write_manifest
from ma_sft.release.publish import check_login, publish, write_cards
from ma_sft.tools.memory import peak_memory
from ma_sft.training.checkpoints import CheckpointCallback, JsonlLogger, SignalHandler, add_callbacks, claimed
from ma_sft.training.distributed import agree, leave_together, once, outside_zero3
from ma_sft.training.evaluation import EvalCallback
from ma_sft.training.prepare import prepare_once
from ma_sft.training.rehearsal import rehearse
from ma_sft.training.trainer import build_trainer, check_early, with_same_date
from ma_sft.utils import say, write_whole

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
    with SignalHandler() as signals, claimed(settings) as folder:
        out = folder.out
        folder.restore_revisions()
        recall(once(lambda: pin_model(settings)))
        tokenizer, added_tokens = load_tokenizer(settings)
        settings = with_same_date(settings)
        peft = check_early(settings)
        rehearsed = rehearse(settings, tokenizer, added_tokens)
        data, held_out = prepare_once(settings, tokenizer)  # rows, tokens, the check, packs
        digests = agree("/".join(part.digest for part in (data, held_out) if part))
        content = {"data": digests, "stream": data.order and asdict(data.order)}
        checkpoint = folder.begin(content, settings)
        manifest = make_manifest(settings, tokenizer, data)
        memory = forecast_memory(settings, data) if settings.training.process_index == 0 else None
        tests = held_out.by_source() if held_out else None
        trainer = build_trainer(settings, tokenizer, added_tokens, data.dataset, tests, peft_config=peft)
        evaluation = EvalCallback(settings, tokenizer, held_out, trainer, out / "before.json")
        checkpoints = CheckpointCallback(trainer, signals, {**content, "recipe": folder.recipe()})
        add_callbacks(trainer, JsonlLogger(out / "log.jsonl"), evaluation, checkpoints)
        if on_trainer:
            on_trainer(trainer)
        if trainer.is_world_process_zero():
            lines = [("rehearsal", rehearsed), *show_start(settings, data, trainer, memory, checkpoint)]
            write_start(settings, data, tokenizer, lines)
            say(rehearsed)
        trainer.train(resume_from_checkpoint=checkpoint)
        signals.stop_if_asked()
        summary: dict[str, Any] = {
            "name": settings.run.name,
            "rows": data.counts.rows or None,  # a stream does not know
            "trained_tokens": data.counts.trained_tokens,
            **checkpoints.figures(),
            "train_loss": mean_loss(trainer.state.log_history),
            "peak_memory": peak_memory(),
            "forecast_peak_memory": memory.peak if memory else None,
        }
        saved = out / ("adapter" if settings.model.use_peft else "model")
        save(trainer, tokenizer, saved, manifest)
        summary = finish(settings, trainer, evaluation, saved, manifest, summary)
    leave_together()
    return summary


def mean_loss(log_history: list[dict[str, float]]) -> float:
    """The mean over all steps of the run, those before a resume among them."""
    logs = [(0.0, 0.0)] + [(log["step"], log["loss"]) for log in log_history if "loss" in log]
    return sum(loss * (step - before) for (before, _), (step, loss) in pairwise(logs)) / max(logs[-1][0], 1)


def finish(
    settings: Any,
    trainer: "SFTTrainer",
    evaluation: EvalCallback,
    saved: Path,
    manifest: dict[str, Any],
    summary: dict[str, Any],
) -> dict[str, Any]:
    """What follows the saved model; each step may fail alone, which is said and stands in the summary's `failed`."""
    out = saved.parent

    def write_summary() -> None:
        write_whole(out / "summary.json", json.dumps(summary, ensure_ascii=False, indent=2))

    def grade_answers() -> None:
        summary.update(evaluation.figures())
        write_manifest(saved, {**manifest, "metrics": summary.get("evaluation", {}).get("after")})

    def merge_adapter() -> None:
        summary["merge_max_logit_difference"] = merge_into(out / "merged", settings.training.trust_remote_code)

    def upload() -> None:
        summary["published"] = publish(settings, saved, summary)

    _attempt("the held-out rows after training", evaluation.finish, summary, alone=trainer.args.world_size == 1)
    if not trainer.is_world_process_zero():
        return {}
    steps: list[tuple[str, Callable[[], object]]] = [("grading the answers", grade_answers)]
    if saved.name == "adapter" and settings.adapter.merge:
        steps.append(("merging the adapter", merge_adapter))
    answers = out / "answers.json"
    steps += [
        ("the model card", lambda: write_cards(settings, saved, summary)),
        ("the answers", lambda: write_whole(answers, json.dumps(evaluation.table(), ensure_ascii=False, indent=1))),
        ("the summary", write_summary),  # which the report reads
        ("the report", lambda: write_report([out], out / "report.html")),
    ]
    if settings.chosen.get("push_to_hub"):
        steps.append(("publishing", upload))
    for name, step in steps:
        _attempt(name, step, summary)
    write_summary()
    _attempt("showing the result", lambda: show_end(out, evaluation.table(), summary), summary)
    return summary


def _attempt(name: str, step: Callable[[], object], summary: dict[str, Any], *, alone: bool = True) -> None:
    """Take a step that comes after training; say, and enter in `summary`, what it failed with.

    Args:
        alone: whether no other process takes part, which would wait for this one for ever.
    """
    try:
        step()
    except Exception as error:
        if not alone:
            raise
        text = f"{type(error).__name__}: {first_line(error)}"
        summary.setdefault("failed", {})[name] = text
        say(f"{name} failed, what was trained is saved: {text}", error=True)


def merge_into(folder: Path, code: bool) -> float | None:
    """Merge the run's adapter; the largest difference of a logit, None where the models were not compared."""
    from ma_sft.release.merge import merge

    shutil.rmtree(folder, ignore_errors=True)
    with outside_zero3():
        merged = merge(folder.parent, folder, code=code)
    say(f"merged model: {merged}")
    return merged.difference
