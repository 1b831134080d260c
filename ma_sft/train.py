"""Recipe -> `SFTTrainer`: the one place where the pieces meet."""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.cache import write_whole
from ma_sft.errors import MaSftError, RecipeError
from ma_sft.recipe import Recipe, Settings

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase
    from trl import SFTTrainer

    from ma_sft.evaluate import Answer
    from ma_sft.plan import Forecast
    from ma_sft.prepare import Prepared


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
    settings = recipe.resolve(args)
    training = settings.training
    out = Path(training.output_dir)
    if training.process_index == 0:
        _claim(out, settings)

    from ma_sft.evaluate import end_ids
    from ma_sft.manifest import make_manifest
    from ma_sft.plan import peak_memory
    from ma_sft.prepare import load_tokenizer, prepare
    from ma_sft.progress import Journal
    from ma_sft.report import write_start

    tokenizer, added_tokens = load_tokenizer(settings)
    with training.main_process_first(desc="preparing the data"):
        data = prepare(settings, tokenizer)
        holds_out = settings.data.eval_dataset or settings.data.test_size
        held_out = prepare(settings, tokenizer, held_out=True) if holds_out else None
    memory = _forecast(settings, data) if training.process_index == 0 else None
    trainer = make_trainer(settings, tokenizer, added_tokens, data.dataset, held_out.dataset if held_out else None)
    journal = Journal(out / "log.jsonl")
    trainer.add_callback(journal)
    main = trainer.is_world_process_zero()
    if main:
        write_start(settings, data, tokenizer, show_start(settings, data, trainer, memory))

    exam = _Exam(settings, tokenizer, held_out) if held_out else None
    # ZeRO and FSDP can run the model only once training has shared it out
    whole = not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
    before = exam.take(trainer, "before training") if exam and whole else None
    if main and before:
        journal.write({"step": 0, **before.log})
    start = time.monotonic()
    result = trainer.train()
    seconds = time.monotonic() - start
    peak = peak_memory()
    after = exam.take(trainer, "after training") if exam else None
    if main and after:
        journal.write({"step": trainer.state.global_step, **after.log})
    manifest = (
        make_manifest(settings, tokenizer, data, end_ids(trainer.model.generation_config, tokenizer)) if main else {}
    )
    manifest["metrics"] = after.summary if after else {}
    _save(trainer, tokenizer, out / ("adapter" if settings.model.use_peft else "model"), manifest)
    if not main:
        return {}

    summary: dict[str, Any] = {
        "name": settings.data.name,
        "rows": data.counts.rows or None,  # a stream does not know
        "trained_tokens": data.counts.trained_tokens,
        "tokens": trainer._total_train_tokens,
        "steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        "train_seconds": round(seconds, 1),
        "tokens_per_second": round(trainer._total_train_tokens / seconds, 1),
        "peak_memory": peak,
        "forecast_peak_memory": memory.peak if memory else None,
    }
    if after:
        summary |= after.log
        summary["evaluation"] = {"before": before.summary if before else None, "after": after.summary}
        if after.answers and settings.data.metric == "exact-match":
            summary["exact_match_before"] = before.summary["score"] if before else None
            summary["exact_match_after"] = after.summary["score"]
        if after.answers:
            summary["eos_rate"] = after.summary["eos_rate"]
    if settings.model.use_peft and settings.data.merge:
        from ma_sft.adapters import merge

        merged = merge(out, out / "merged")
        print(f"merged model: {merged}")
        summary["merge_max_logit_difference"] = merged.difference
    return _finish(out, exam.table(before, after) if exam and after else [], summary)


def make_trainer(
    settings: Settings,
    tokenizer: "PreTrainedTokenizerBase",
    added_tokens: list[str],
    train: "Dataset | IterableDataset",
    held_out: "Dataset | IterableDataset | None",
) -> "SFTTrainer":
    """TRL's trainer on data that is labelled, cut and packed already: nothing is left for it to prepare.

    Packed rows carry `seq_lengths`; TRL's padding-free collator turns them into position ids that restart at each
    document, from which transformers keeps attention inside the documents.
    """
    from transformers import ProgressCallback
    from trl import SFTTrainer, get_quantization_config

    from ma_sft.adapters import (
        CHANGE_BASE,
        add_loraplus,
        check_targets,
        continue_adapter,
        freeze,
        keep_initial,
        lora_config,
        model_skeleton,
        with_new_tokens,
    )
    from ma_sft.progress import TrainingBar

    training, model = settings.training, settings.model
    training.padding_free = training.packing and training.packing_strategy != "wrapped"
    training.packing, training.max_length, training.chat_template_path = False, None, None
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    peft, quantization = lora_config(settings), get_quantization_config(model)
    if peft is not None:
        check_targets(model_skeleton(settings), peft)
    if quantization is not None and find_spec("bitsandbytes") is None:
        raise RecipeError("4-bit and 8-bit weights need bitsandbytes: pip install 'ma-sft[quant]'")
    if model.load_in_8bit:  # one line a layer and step on how its input is cast
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    try:
        trainer = SFTTrainer(
            with_new_tokens(settings, added_tokens, tokenizer, peft) if added_tokens else model.model_name_or_path,
            args=training,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            quantization_config=None if added_tokens else quantization,
            peft_config=peft,
        )
    except OSError as error:
        raise RecipeError(
            f"the model {model.model_name_or_path!r} cannot be loaded: {str(error).splitlines()[0]}"
        ) from None
    head = trainer.model.get_output_embeddings()
    if not hasattr(head, "bias"):  # PEFT's wrapper of a tied head with trained rows, whose bias TRL's loss asks for
        head.bias = None
    for module in trainer.model.modules():
        # bitsandbytes lays 4-bit weights out anew for inference on some CPUs; training goes on after an evaluation, and
        # no gradient passes through that layout
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    freeze(trainer.model, settings.data.freeze)
    if settings.data.adapter_name_or_path:
        continue_adapter(trainer.model, Path(settings.data.adapter_name_or_path), tokenizer)
    if settings.data.loraplus_lr_ratio is not None:
        add_loraplus(trainer, settings.data.loraplus_lr_ratio)
    if peft is not None and str(peft.init_lora_weights).startswith(CHANGE_BASE) and training.process_index == 0:
        keep_initial(trainer.model, Path(training.output_dir) / "initial_adapter")
    if not training.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TrainingBar)
    return trainer


def _save(trainer: "SFTTrainer", tokenizer: "PreTrainedTokenizerBase", folder: Path, manifest: dict[str, Any]) -> None:
    """Save adapter or model under another name first, so that `folder` is whole or not there."""
    from ma_sft.adapters import save_converted
    from ma_sft.evaluate import end_ids
    from ma_sft.manifest import write_manifest

    model = trainer.accelerator.unwrap_model(trainer.model)
    model.generation_config.eos_token_id = end_ids(model.generation_config, tokenizer)
    scratch = folder.with_name(f".{folder.name}")
    trainer.save_model(str(scratch))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        save_converted(model, scratch, folder.with_name("initial_adapter"))
        (scratch / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.json says the same
        write_manifest(scratch, {**manifest, "kind": folder.name})
        scratch.rename(folder)


def _claim(out: Path, settings: Settings) -> None:
    """Make the output folder this run's; never take a finished run's, or another recipe's, without being told to.

    Raises:
        RecipeError: the folder holds a finished run, another recipe's run, or something else.
    """
    recipe = json.loads(json.dumps({k: v for k, v in settings.chosen.items() if k not in _NOT_THE_RUN}, default=str))
    way_out = "pass --overwrite_output_dir true to delete it, or another --name or --output_dir"
    known = (out / "recipe.json").exists() or (out / "summary.json").exists()
    if out.exists() and not known and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out} holds something that is not a run; pass another --name or --output_dir")
    if known and settings.data.overwrite_output_dir:
        shutil.rmtree(out)
    elif (out / "summary.json").exists():
        raise RecipeError(f"{out} holds a finished run; {way_out}")
    elif known and json.loads((out / "recipe.json").read_text(encoding="utf-8")) != recipe:
        raise RecipeError(f"{out} holds an unfinished run of another recipe; {way_out}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").write_text(json.dumps(recipe, indent=2, ensure_ascii=False), encoding="utf-8")


# Settings that may differ between two starts of the same run.
_NOT_THE_RUN = {"overwrite_output_dir", "resume_from_checkpoint", "report_to", "disable_tqdm", "output_dir", "name"}


@dataclass(frozen=True)
class _Marks:
    """What an exam gave: the answers, and the figures for `summary.json`."""

    answers: "list[Answer]"
    summary: dict[str, Any]

    @property
    def log(self) -> dict[str, float]:
        """The figures by the names that the trainer logs them under."""
        return {"eval_loss": self.summary["loss"], "eval_mean_token_accuracy": self.summary["token_accuracy"]}


class _Exam:
    """Held-out rows: their loss by source, and questions (all but the last assistant turn) with references."""

    def __init__(self, settings: Settings, tokenizer: "PreTrainedTokenizerBase", held_out: "Prepared") -> None:
        from ma_sft.prepare import make_encoder

        self.data, self.held_out = settings.data, held_out
        self.questions, self.references, self.origins = [], [], []
        conversations = held_out.conversations
        if conversations is None or settings.data.generate_eval == 0:
            return
        self.encoder = make_encoder(settings, tokenizer)
        count = settings.data.generate_eval
        for row in conversations.select(range(len(conversations) if count < 0 else min(count, len(conversations)))):
            messages = row["messages"]
            last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
            if last == 0:  # plain text asks nothing
                continue
            self.questions.append(messages[:last])
            self.references.append(messages[last]["content"])
            self.origins.append(row["source"])

    def take(self, trainer: "SFTTrainer", when: str) -> _Marks:
        """Loss and token accuracy (every process takes part), and graded answers (the first process)."""
        from ma_sft.evaluate import generate_answers, grade, held_out_loss

        losses = held_out_loss(trainer, self.held_out.dataset, self.held_out.sources)
        parts = {name: {**asdict(found), "perplexity": found.perplexity} for name, found in losses.items()}
        if not self.questions or not trainer.is_world_process_zero():
            return _Marks([], {**parts.pop("all"), "sources": parts})
        model = trainer.accelerator.unwrap_model(trainer.model)
        tokens = self.data.max_new_tokens
        answers = generate_answers(model, self.encoder, self.questions, max_new_tokens=tokens, desc=f"answers {when}")
        grades = grade(answers, self.references, self.data.metric)
        for name, part in parts.items():
            rows = [i for i, origin in enumerate(self.origins) if name in ("all", origin)]
            if rows:
                part |= {
                    "answers": len(rows),
                    "metric": self.data.metric,
                    "score": sum(grades[i] for i in rows) / len(rows),
                    "eos_rate": sum(answers[i].stopped for i in rows) / len(rows),
                }
        return _Marks(answers, {**parts.pop("all"), "sources": parts})

    def table(self, before: _Marks | None, after: _Marks) -> list[tuple[str, str, str, str]]:
        """(question, before, after, reference) of each held-out row."""
        first = [a.text for a in before.answers] if before else [""] * len(after.answers)
        last = [a.text for a in after.answers]
        questions = [messages[-1]["content"] for messages in self.questions]
        return list(zip(questions, first, last, self.references, strict=True))


def _forecast(settings: Settings, data: "Prepared") -> "Forecast | None":
    """The forecast of peak memory for the longest row that there is; None where the model cannot be simulated."""
    from ma_sft.plan import forecast

    rows: Any = data.dataset
    try:
        arrow = rows.with_format("arrow")["input_ids"].combine_chunks() if hasattr(rows, "num_rows") else None
        return forecast(settings, None if arrow is None else max(arrow.value_lengths().to_pylist()))
    except MaSftError:
        raise
    except Exception as error:
        print(f"no forecast of memory: one step on fake tensors failed with {type(error).__name__}: {error}")
        return None


def show_start(
    settings: Settings, data: "Prepared", trainer: "SFTTrainer", memory: "Forecast | None"
) -> list[tuple[str, str]]:
    """Print what will be trained, before the first step; its (what, how much) lines."""
    from rich.console import Console
    from rich.table import Table

    from ma_sft.plan import memory_table
    from ma_sft.prepare import counts_table

    table = Table(title=f"{settings.data.name}: what will be trained", show_header=False)
    lines = counts_table(data.counts) + memory_table(settings, trainer.model, memory)
    for key, value in lines:
        table.add_row(key, value)
    Console().print(table)
    if data.check is not None:
        Console().print(data.check)
    if data.packing is not None:
        Console().print(str(data.packing), highlight=False)
    return lines


def _print_evaluation(console: "Console", evaluation: dict[str, Any] | None) -> None:
    """The held-out figures before and after training, by source where there are several."""
    from rich.table import Table

    if evaluation is None:
        return
    before, after = evaluation["before"], evaluation["after"]
    several = {name: ((before or {}).get("sources", {}).get(name), part) for name, part in after["sources"].items()}
    parts = {"all": (before, after), **(several if len(several) > 1 else {})}
    shown = {"loss": ".3f", "perplexity": ".2f", "token_accuracy": ".1%", "score": ".1%", "eos_rate": ".1%"}
    columns = [key for key in shown if key in after]
    names = {"score": after.get("metric"), "eos_rate": "stopped by itself"}
    table = Table("held-out", *(str(names.get(key, key)).replace("_", " ") for key in columns))
    for name, (first, last) in parts.items():
        table.add_row(
            name,
            *(
                f"{format(first[k], shown[k]) if first and k in first else '?'} -> {format(last[k], shown[k])}"
                for k in columns
                if k in last
            ),
        )
    console.print(table)
    if after.get("metric") == "exact-match":
        was = f"{before['score']:.1%}" if before else "not measured"
        console.print(
            f"held-out exact match: {was} before, {after['score']:.1%} after; "
            f"stopped by itself: {after['eos_rate']:.1%}"
        )


def _finish(out: Path, answers: list[tuple[str, str, str, str]], summary: dict[str, Any]) -> dict[str, Any]:
    """Write answers, summary and report; print where everything is."""
    from rich.console import Console
    from rich.table import Table

    from ma_sft.report import write_report

    console = Console()
    if answers:
        table = Table("message", "before", "after", title="held-out answers", show_lines=True)
        for question, before, after, _ in answers[:5]:
            table.add_row(*(text if len(text) < 300 else text[:300] + " ..." for text in (question, before, after)))
        console.print(table)
    _print_evaluation(console, summary.get("evaluation"))
    write_whole(out / "answers.json", json.dumps(answers, ensure_ascii=False, indent=1))
    write_whole(out / "summary.json", json.dumps(summary, ensure_ascii=False, indent=2))
    write_report([out], out / "report.html")
    for what in ("adapter", "merged", "model", "report.html"):
        if (out / what).exists():
            console.print(f"{what:>12}  {out / what}", highlight=False, soft_wrap=True)
    console.print(f"{'chat':>12}  ma-sft chat {out}", highlight=False, soft_wrap=True)
    return summary
