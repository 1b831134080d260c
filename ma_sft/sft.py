"""Recipe -> run folder: the steps of a fine-tune in the order in which they happen."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ma_sft.finish import finish
from ma_sft.hub import pin_model, recall
from ma_sft.labels.templates import load_tokenizer
from ma_sft.pages.report import write_start
from ma_sft.pages.screen import forecast_memory, show_start
from ma_sft.recipe import Recipe
from ma_sft.release.manifest import make_manifest, save
from ma_sft.release.publish import check_login
from ma_sft.terminal import say
from ma_sft.tools.memory import peak_memory
from ma_sft.training.checkpoints import Stop, Survival
from ma_sft.training.exam import Exam
from ma_sft.training.folder import claimed
from ma_sft.training.prepare import prepare_once
from ma_sft.training.processes import agree, digest, leave_together, once
from ma_sft.training.progress import Journal, add_callbacks
from ma_sft.training.rehearsal import rehearse
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
        rehearsed = rehearse(settings, tokenizer, added_tokens)
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
            lines = [("rehearsal", rehearsed), *show_start(settings, data, trainer, memory, checkpoint)]
            write_start(settings, data, tokenizer, lines)
            say(rehearsed)
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
        summary = finish(settings, trainer, exam, saved, manifest, summary)
    leave_together()
    return summary


def mean_loss(log_history: list[dict[str, float]]) -> float:
    """The mean over all steps of the run, those before a resume among them."""
    logs = [(0.0, 0.0)] + [(log["step"], log["loss"]) for log in log_history if "loss" in log]
    return sum(loss * (step - before) for (before, _), (step, loss) in pairwise(logs)) / max(logs[-1][0], 1)
