"""Held-out rows: how well their labels are predicted, what is answered to them, and whether answers stop."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ma_sft.data.functions import load_function
from ma_sft.errors import RecipeError
from ma_sft.labels.encoder import ChatEncoder, Message
from ma_sft.recipe import Settings
from ma_sft.training.adapters import repacked

if TYPE_CHECKING:
    from rich.table import Table
    from trl import SFTTrainer


class Exam:
    """Held-out conversations as questions (all but the last assistant turn) and references (that turn)."""

    def __init__(self, settings: Settings, tokenizer: "PreTrainedTokenizerBase", conversations: "Dataset") -> None:
        from ma_sft.labels.tokenize import make_encoder

        count = settings.exam.generate_eval
        rows = conversations.select(range(len(conversations) if count < 0 else min(count, len(conversations))))
        self.encoder = make_encoder(settings, tokenizer)
        self.max_new_tokens, self.metric = settings.exam.max_new_tokens, settings.exam.metric
        self.questions, self.references, self.sources = [], [], []
        for messages, source in zip(rows["messages"], rows["source"], strict=True):
            last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
            if last == 0:  # plain text asks nothing
                continue
            self.questions.append(messages[:last])
            self.references.append(messages[last]["content"])
            self.sources.append(source)

    def answer(self, trainer: "SFTTrainer", desc: str) -> "list[Answer]":
        """All answers. Every process generates its share, equally many: under ZeRO-3 and FSDP each needs the others."""
        from ma_sft.training.processes import gather

        if not self.questions:
            return []
        model, args, count = trainer.accelerator.unwrap_model(trainer.model), trainer.args, len(self.questions)
        turns = range(args.process_index, -(-count // args.world_size) * args.world_size, args.world_size)
        mine = [self.questions[turn % count] for turn in turns]
        shares = gather(generate_answers(model, self.encoder, mine, max_new_tokens=self.max_new_tokens, desc=desc))
        return [shares[i % args.world_size][i // args.world_size] for i in range(count)]

    def grade(
        self,
        before: "list[Answer]",
        after: "list[Answer]",
        losses: "dict[str, HeldOut]",
        losses_after: "dict[str, HeldOut]",
    ) -> dict[str, Any]:
        graded = [marks(answers, self.references, self.sources, self.metric) for answers in (before, after)]
        return evaluation(losses, losses_after, *graded)

    def table(self, before: "list[Answer]", after: "list[Answer]") -> list[tuple[str, str, str, str]]:
        """(question, before, after, reference) of each held-out row."""
        questions = [messages[-1]["content"] for messages in self.questions]
        first, last = [a.text for a in before] or [""] * len(after), [a.text for a in after]
        return list(zip(questions, first, last, self.references, strict=True))


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text, and whether it ended with an end-of-turn token rather than at the limit."""

    text: str
    stopped: bool


@dataclass(frozen=True)
class HeldOut:
    """How well a model predicts held-out labels: mean loss in nats and share of first choices, over `tokens` labels."""

    loss: float
    token_accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))


def held_out_loss(trainer: "SFTTrainer", dataset: Dataset, sources: Sequence[str]) -> dict[str, HeldOut]:
    """Loss and token accuracy on labelled rows, of `"all"` and of each source; every process must call it.

    The trainer's own evaluation runs, but every label weighs the same whatever batch it is in (`eval_loss` averages
    batches), and rows that fill up the last batch of several processes count nothing.

    Args:
        trainer: its model, collator, batch size and processes are used.
        dataset: columns `input_ids` and `labels`.
        sources: the source of each row.
    """
    from ma_sft.training.processes import fill_up

    sums: list[torch.Tensor] = []
    accelerator, fresh = trainer.accelerator, not trainer.accelerator._models
    forward = trainer.model.__dict__.get("forward")  # TRL's, if the model is no PeftModel around it

    def count(model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        out = model(**inputs, use_cache=False, fused_lm_head=True)
        parts = torch.stack([p.double().sum() for p in (-out.log_probs, out.is_top1, out.label_mask)])
        sums.append(trainer.accelerator.gather(parts[None]).sum(0))
        return parts[0] / parts[2].clamp(min=1)

    found: dict[str, torch.Tensor] = {}
    world = trainer.args.world_size
    trainer.compute_loss = count
    try:
        for source in dict.fromkeys(sources):
            rows = dataset.select([i for i, name in enumerate(sources) if name == source])
            if world > 1:
                batch = world * trainer.args.per_device_eval_batch_size
                rows = fill_up(rows, batch, trainer.processing_class.pad_token_id)
            sums.clear()
            trainer.evaluate(rows, metric_key_prefix=f"eval_{source}")
            found[source] = torch.stack(sums).sum(0)
    finally:
        del trainer.compute_loss
        if fresh:
            # Prepared for evaluation, the model would pass for prepared: training would not put DDP around it, and
            # each process would train alone.
            accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            accelerator.free_memory()
            trainer.model._is_accelerate_prepared = False
            if forward is not None:  # taking mixed precision off takes TRL's with it
                trainer.model.forward = forward
    found = {"all": torch.stack([*found.values()]).sum(0), **found}
    counted = {name: tuple(values.tolist()) for name, values in found.items()}
    return {
        name: HeldOut(loss / tokens, right / tokens, int(tokens)) for name, (loss, right, tokens) in counted.items()
    }


def end_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a turn: the chat template's end-of-turn token (EOS without a template) and the model's own."""
    own = generation.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    end = ChatEncoder(tokenizer).end_token_id if tokenizer.chat_template else tokenizer.eos_token_id
    return list(dict.fromkeys([end, *own]))


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[list[Message]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    desc: str = "generating",
) -> list[Answer]:
    """Greedy answers to the conversations in `prompts`, in their order.

    Prompts are encoded as training encodes them, sorted by length and padded on the left.
    """
    ends = end_ids(model.generation_config, encoder.tokenizer)
    ids = [encoder.encode_prompt(messages) for messages in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    answers: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    with repacked(model), tqdm(total=len(ids), desc=desc) as bar:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            width = len(ids[chunk[0]])
            rows = [[ends[0]] * (width - len(ids[i])) + ids[i] for i in chunk]
            mask = [[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chunk]
            output: list[list[int]] = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0],
            )[:, width:].tolist()
            for i, row in zip(chunk, output, strict=True):
                end = next((at for at, token in enumerate(row) if token in ends), None)
                text = str(encoder.tokenizer.decode(row[:end], skip_special_tokens=True))
                answers[i] = Answer(text, end is not None)
            bar.update(len(chunk))
    model.train(was_training)
    return [answers[i] for i in range(len(ids))]


def exact_match(answer: str, reference: str) -> bool:
    """Whether two answers are the same: as JSON values if the reference is JSON, else as stripped text."""
    expected, found = _as_json(reference), _as_json(answer)
    return bool(expected == found if expected is not None else answer.strip() == reference.strip())


def grade(answers: Sequence[Answer], references: Sequence[str], metric: str = "exact-match") -> list[float]:
    """The grade of each answer: 1 or 0 for an exact match, or what the user's function gives.

    Args:
        answers: generated answers.
        references: what they should be.
        metric: `"exact-match"`, or `module:function` or `file.py:function` of (answer, reference) -> number or bool.

    Raises:
        RecipeError: no such function, or one that fails or gives no number.
    """
    function = exact_match if metric == "exact-match" else load_function(metric)
    grades = []
    for row, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        try:
            grades.append(float(function(answer.text, reference)))
        except Exception as error:
            raise RecipeError(f"metric {metric!r} on held-out row {row}: {type(error).__name__}: {error}") from None
    return grades


def marks(
    answers: Sequence[Answer], references: Sequence[str], sources: Sequence[str], metric: str
) -> dict[str, dict[str, Any]]:
    """Number of answers, mean grade and end-of-turn rate of `"all"` answers and of each source's."""
    if not answers:
        return {}
    grades = grade(answers, references, metric)
    found = {}
    for name in ("all", *dict.fromkeys(sources)):
        rows = [i for i, source in enumerate(sources) if name in ("all", source)]
        found[name] = {
            "answers": len(rows),
            "metric": metric,
            "score": sum(grades[i] for i in rows) / len(rows),
            "eos_rate": sum(answers[i].stopped for i in rows) / len(rows),
        }
    return found


def evaluation(
    losses: dict[str, HeldOut],
    losses_after: dict[str, HeldOut],
    marks_before: dict[str, dict[str, Any]] | None = None,
    marks_after: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """All held-out figures as `summary.json` keeps them: `before` (None if not measured) and `after` training, each
    over all rows, with the same for each source under `sources`."""

    def joined(losses: dict[str, HeldOut], marks: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        parts = {
            name: {**asdict(loss), "perplexity": loss.perplexity, **marks.get(name, {})}
            for name, loss in losses.items()
        }
        return {**parts.pop("all"), "sources": parts} if parts else None

    return {"before": joined(losses, marks_before or {}), "after": joined(losses_after, marks_after or {})}


def headlines(found: dict[str, Any]) -> dict[str, Any]:
    """The few figures of an evaluation that stand at the top of `summary.json`."""
    before, after = found["before"] or {}, found["after"]
    top = {"eval_loss": after["loss"], "eval_mean_token_accuracy": after["token_accuracy"]}
    if after.get("metric") == "exact-match":
        top |= {"exact_match_before": before.get("score"), "exact_match_after": after["score"]}
    return top | ({"eos_rate": after["eos_rate"]} if "eos_rate" in after else {})


def evaluation_table(found: dict[str, Any]) -> "Table":
    """The evaluation for the terminal: before -> after, by source where there are several."""
    from rich.table import Table

    from ma_sft.training.exam import evaluation_rows

    rows = evaluation_rows(found)
    table = Table("held-out", *rows[0]["cells"])
    for row in rows:
        table.add_row(row["name"], *(" -> ".join(text or "?" for text in cell) for cell in row["cells"].values()))
    return table


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def evaluation_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of an evaluation as text: `name` (all, then each of several sources) and `cells`, title -> (before,
    after) training, empty where not measured."""
    before, after = found["before"] or {"sources": {}}, found["after"]
    parts = {"all": (before, after)}
    if len(after["sources"]) > 1:
        parts |= {name: (before["sources"].get(name, {}), part) for name, part in after["sources"].items()}
    shown = {"loss": ".3f", "perplexity": ".2f", "token_accuracy": ".1%", "score": ".1%", "eos_rate": ".1%"}
    titles = {"token_accuracy": "token accuracy", "score": after.get("metric"), "eos_rate": "stopped by itself"}
    columns = {str(titles.get(key, key)): key for key in shown if key in after}
    return [
        {
            "name": name,
            "cells": {
                title: tuple(format(side[key], shown[key]) if key in side else "" for side in sides)
                for title, key in columns.items()
            },
        }
        for name, sides in parts.items()
    ]
