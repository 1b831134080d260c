"""Recipe -> run folder: the steps of a fine-tune in the order in which they happen."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.config import Recipe, Settings
from ma_sft.errors import RecipeError, first_line, one_line
from ma_sft.hub import commits, pin
from ma_sft.labels.templates import load_tokenizer
from ma_sft.pages.report import write_report, write_start
from ma_sft.pages.screen import forecast_memory, show_end, show_start
from ma_sft.release.manifest import make_manifest, save, write_manifest
from ma_sft.release.merge import merge
from ma_sft.release.publish import check_login, publish, write_cards
from ma_sft.tools.memory import peak_memory
from ma_sft.training.checkpoints import CheckpointCallback, JsonlLogger, SignalHandler, claimed, recipe_of, with_date
from ma_sft.training.distributed import agree, leave_together, once, outside_zero3
from ma_sft.training.evaluation import EvalCallback
from ma_sft.training.prepare import prepare_once
from ma_sft.training.rehearsal import rehearse
from ma_sft.training.trainer import build_trainer, check_early, early_stopping
from ma_sft.utils import say, timed, write_whole

if TYPE_CHECKING:
    from trl import SFTTrainer

MERGING = "merging the adapter"


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
        out, settings = folder.out, at_commit(folder.settings)
        tokenizer, added_tokens = load_tokenizer(settings)
        settings = with_date(settings, tokenizer)
        check_early(settings)
        rehearsed = rehearse(settings, tokenizer, added_tokens)
        data, held_out = prepare_once(settings, tokenizer)  # rows, tokens, the check, packs
        content = {"data": agree("/".join(part.digest for part in (data, held_out) if part)), **data.order}
        once(lambda: folder.begin(content, settings))
        checkpoint = str(folder.checkpoint) if folder.checkpoint else None
        manifest = make_manifest(settings, tokenizer, data)
        memory = forecast_memory(settings, data) if settings.training.process_index == 0 else None
        tests = held_out.by_source() if held_out else None
        try:
            trainer = build_trainer(settings, tokenizer, added_tokens, data.dataset, tests)
        except ValueError as error:  # TRL's and PEFT's own are clear
            raise RecipeError(one_line(error)) from error
        evaluation = EvalCallback(settings, tokenizer, held_out, trainer, out / "before.json", signals)
        checkpoints = CheckpointCallback(trainer, signals, {**content, "recipe": recipe_of(settings)})
        for callback in (logger := JsonlLogger(out / "log.jsonl"), evaluation, checkpoints, *early_stopping(settings)):
            trainer.add_callback(callback)
        if on_trainer:
            on_trainer(trainer)
        if trainer.is_world_process_zero():
            lines = [("rehearsal", rehearsed), *show_start(settings, data, trainer, memory, checkpoint)]
            write_start(settings, data, tokenizer, lines)
            say(rehearsed)
        trainer.train(resume_from_checkpoint=checkpoint)
        if signals.signal:
            signals.stop()
        summary: dict[str, Any] = {
            "name": settings.run.name,
            "rows": data.counts.rows or None,  # a stream does not know
            "trained_tokens": data.counts.trained_tokens,
            **logger.figures(),
            "train_loss": mean_loss(trainer.state.log_history),
            "peak_memory": peak_memory(),
            "forecast_peak_memory": memory.peak if memory else None,
        }
        saved = out / ("adapter" if settings.model.use_peft else "model")
        save(trainer, tokenizer, saved, manifest)
        summary = finish(settings, trainer, evaluation, saved, manifest, summary)
    leave_together()
    return summary


def at_commit(settings: Settings) -> Settings:
    """The settings with the commit that the model's revision is, as the first process finds it out for all."""
    name, revision = str(settings.model.model_name_or_path), settings.model.model_revision
    if Path(name).expanduser().is_dir():
        return settings
    commit = once(lambda: pin(name, revision))
    commits[f"model/{name}@{commit}"] = commit
    return replace(settings, model=replace(settings.model, model_revision=commit))


def mean_loss(log_history: list[dict[str, float]]) -> float:
    """The mean over all steps of the run, those before a resume among them."""
    logs = [(0.0, 0.0)] + [(log["step"], log["loss"]) for log in log_history if "loss" in log]
    return sum(loss * (step - before) for (before, _), (step, loss) in pairwise(logs)) / max(logs[-1][0], 1)


def finish(
    settings: Settings,
    trainer: "SFTTrainer",
    evaluation: EvalCallback,
    saved: Path,
    manifest: dict[str, Any],
    summary: dict[str, Any],
) -> dict[str, Any]:
    """What follows the saved model; each step may fail alone, which is said and stands in the summary's `failed`."""
    out = saved.parent
    with attempt("the held-out rows after training", summary, alone=trainer.args.world_size == 1):
        evaluation.finish()
    if not trainer.is_world_process_zero():
        return {}
    with attempt("grading the answers", summary):
        summary.update(evaluation.figures())
        write_manifest(saved, {**manifest, "metrics": summary.get("evaluation", {}).get("after")})
    if saved.name == "adapter" and settings.adapter.merge:
        with attempt(MERGING, summary), outside_zero3(), timed(MERGING):
            shutil.rmtree(out / "merged", ignore_errors=True)
            merged = merge(out, out / "merged", code=settings.training.trust_remote_code)
            say(f"merged model: {merged}")
            summary["merge_max_logit_difference"] = merged.difference
    with attempt("the model card", summary):
        write_cards(settings, saved, summary)
    with attempt("the answers", summary):
        write_whole(out / "answers.json", json.dumps(evaluation.table(), ensure_ascii=False, indent=1))
    with attempt("the report", summary):
        _write_summary(out, summary)  # which it reads
        write_report([out], out / "report.html")
    if settings.chosen.get("push_to_hub"):
        with attempt("publishing", summary):
            summary["published"] = publish(settings, saved, summary)
    _write_summary(out, summary)
    with attempt("showing the result", summary):
        show_end(out, evaluation.table(), summary)
    return summary


def _write_summary(out: Path, summary: dict[str, Any]) -> None:
    write_whole(out / "summary.json", json.dumps(summary, ensure_ascii=False, indent=2))


@contextmanager
def attempt(name: str, summary: dict[str, Any], *, alone: bool = True) -> Iterator[None]:
    """A step that comes after training: what it failed with is said and entered in `summary`.

    Args:
        alone: whether no other process takes part, which would wait for this one for ever.
    """
    try:
        yield
    except Exception as error:
        if not alone:
            raise
        text = f"{type(error).__name__}: {first_line(error)}"
        summary.setdefault("failed", {})[name] = text
        say(f"{name} failed, what was trained is saved: {text}", error=True)
