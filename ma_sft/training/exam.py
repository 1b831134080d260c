"""Held-out rows: how well their labels are predicted, what is answered to them, and whether answers stop."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.utils.logging import tqdm

from ma_sft.errors import RecipeError, one_line
from ma_sft.files import write_whole
from ma_sft.hub import stop_ids
from ma_sft.labels.encoder import ChatEncoder, parsed
from ma_sft.labels.tokenize import make_encoder
from ma_sft.labels.turns import Message
from ma_sft.recipe import Settings
from ma_sft.training.grades import Answer, HeldOut, evaluation, headlines, marks
from ma_sft.training.prepare import Prepared
from ma_sft.training.processes import fill_up, gather
from ma_sft.training.quantized import repacked
from ma_sft.training.trainer import ResumableTrainer


@dataclass
class Found:
    """What held-out rows showed at one time: losses of all rows and of each source, and the answers."""

    losses: dict[str, HeldOut] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)


_GIVEN = ("tools", "chat_template_kwargs")


class Exam(TrainerCallback):
    """Held-out rows before the first step and after the last one.

    Conversations are questions (all but the last assistant turn) and references (that turn). Before the first step the
    launcher's engine has prepared the model already, so that ZeRO and FSDP are measured as they train. What was found
    then is kept in the file `kept` for a run that is resumed. Without held-out rows there is nothing to find.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        held_out: Prepared | None,
        trainer: ResumableTrainer,
        kept: Path,
    ) -> None:
        self.trainer, self.held_out, self.kept, self.settings = trainer, held_out, kept, settings.exam
        self.before, self.after = Found(), Found()
        self.questions: list[list[Message]] = []
        self.given: list[tuple[Any, Any]] = []  # each question's tools and template variables
        self.references: list[str] = []
        self.sources: list[str] = []
        rows = held_out.conversations if held_out else None
        if rows is None:
            return
        count = settings.exam.generate_eval
        rows = rows.select(range(len(rows) if count < 0 else min(count, len(rows))))
        self.encoder = make_encoder(settings, tokenizer)
        given = [parsed(rows[name] if name in rows.column_names else None, len(rows)) for name in _GIVEN]
        for messages, source, *more in zip(rows["messages"], rows["source"], *given, strict=True):
            last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
            if last == 0:  # plain text asks nothing
                continue
            self.questions.append(messages[:last])
            self.given.append((more[0], more[1]))
            self.references.append(messages[last]["content"])
            self.sources.append(source)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 0:
            with torch.random.fork_rng([]):  # what is trained does not depend on whether it is measured
                self.before = self._sit("answers before training")
            if state.is_world_process_zero and self.held_out:
                write_whole(self.kept, json.dumps(asdict(self.before), ensure_ascii=False))
        elif self.kept.is_file():
            found = json.loads(self.kept.read_text(encoding="utf-8"))
            losses = {name: HeldOut(**loss) for name, loss in found["losses"].items()}
            self.before = Found(losses, [Answer(**answer) for answer in found["answers"]])

    def finish(self) -> None:
        """Measure again, after training; every process must call it."""
        self.after = self._sit("answers after training")

    def _sit(self, desc: str) -> Found:
        if self.held_out is None:
            return Found()
        losses = held_out_loss(self.trainer, self.held_out.dataset, self.held_out.sources)
        self.trainer.log({"eval_loss": losses["all"].loss, "eval_mean_token_accuracy": losses["all"].token_accuracy})
        return Found(losses, self._answers(desc))

    def _answers(self, desc: str) -> list[Answer]:
        """All answers. Every process generates its share, equally many: under ZeRO-3 and FSDP each needs the others."""
        if not self.questions:
            return []
        model, args = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.args
        world, count = args.world_size, len(self.questions)
        mine = [turn % count for turn in range(args.process_index, -(-count // world) * world, world)]
        questions, given = [self.questions[i] for i in mine], [self.given[i] for i in mine]
        limit = self.settings.max_new_tokens
        shares = gather(generate_answers(model, self.encoder, questions, given, max_new_tokens=limit, desc=desc))
        return [shares[i % world][i // world] for i in range(count)]

    def figures(self) -> dict[str, Any]:
        """What `summary.json` keeps of it: the headlines, and all under `evaluation`.

        Raises:
            RecipeError: the metric fails.
        """
        if not self.after.losses:
            return {}
        times = (self.before, self.after)
        graded = [marks(found.answers, self.references, self.sources, self.settings.metric) for found in times]
        found = evaluation(self.before.losses, self.after.losses, *graded)
        return {**headlines(found), "evaluation": found}

    def table(self) -> list[tuple[str, str, str, str]]:
        """(question, answer before, answer after, reference) of each held-out row that was asked after training."""
        before = [answer.text for answer in self.before.answers] or [""] * len(self.questions)
        after = [answer.text for answer in self.after.answers]
        questions = [str(messages[-1]["content"]) for messages in self.questions]
        return list(zip(questions, before, after, self.references, strict=True)) if after else []


def held_out_loss(trainer: ResumableTrainer, dataset: Dataset, sources: Sequence[str]) -> dict[str, HeldOut]:
    """Loss and token accuracy on labelled rows, of `"all"` and of each source; every process must call it.

    The trainer's own evaluation runs, but every label weighs the same whatever batch it is in (`eval_loss` averages
    batches), and rows that fill up the last batch of several processes count nothing.

    Args:
        trainer: its model, prepared for training, its collator, batch size and processes are used.
        dataset: columns `input_ids` and `labels`.
        sources: the source of each row.
    """
    sums: list[torch.Tensor] = []

    def count(model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        parts = trainer.label_sums(model, inputs)
        sums.append(trainer.accelerator.gather(parts[None]).sum(0))
        return parts[0] / parts[2].clamp(min=1)

    found: dict[str, torch.Tensor] = {}
    metrics, trainer.compute_metrics = trainer.compute_metrics, None  # they would ask for the logits
    drop_last, trainer.args.dataloader_drop_last = trainer.args.dataloader_drop_last, False  # each row counts here
    trainer.compute_loss = count  # type: ignore[method-assign]
    try:
        for source in dict.fromkeys(sources):
            rows = dataset.select([i for i, name in enumerate(sources) if name == source])
            sums.clear()
            if (world := trainer.args.world_size) > 1:
                batch = world * trainer.args.per_device_eval_batch_size
                rows = fill_up(rows, batch, trainer.processing_class.pad_token_id)
            trainer.evaluate(rows, metric_key_prefix=f"eval_{source}")
            found[source] = torch.stack(sums).sum(0)
    finally:
        del trainer.compute_loss
        trainer.compute_metrics, trainer.args.dataloader_drop_last = metrics, drop_last
    found = {"all": torch.stack([*found.values()]).sum(0), **found}
    counted = {name: tuple(values.tolist()) for name, values in found.items()}
    return {
        name: HeldOut(loss / tokens, right / tokens, int(tokens)) for name, (loss, right, tokens) in counted.items()
    }


def end_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a turn: the chat template's end-of-turn token (EOS without a template) and the model's own."""
    end = ChatEncoder(tokenizer).end_token_id if tokenizer.chat_template else tokenizer.eos_token_id
    return list(dict.fromkeys([end, *stop_ids(generation)]))


class TokenByToken(StoppingCriteria):
    """Moves a bar on with each token that a batch of answers gets, and counts them; stops none."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.tokens = bar, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.bar.update()
        self.tokens += 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: list[list[int]],
    ends: list[int],
    max_new_tokens: int,
    progress: StoppingCriteria,
) -> list[list[int]]:
    """The ids that the model writes behind each of the prompts, the first of which is the longest."""
    width = len(prompts[0])
    rows = [[ends[0]] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    try:
        output = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
            tokenizer=encoder.tokenizer,  # for stop strings of the model's own
            stopping_criteria=StoppingCriteriaList([progress]),
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"the model's generation_config.json cannot be followed: {one_line(error)}; mend it, or leave "
            "generate_eval out"
        ) from error
    found: list[list[int]] = output[:, width:].tolist()
    return found


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[list[Message]],
    given: Sequence[tuple[Any, Any]] | None = None,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    desc: str = "generating",
) -> list[Answer]:
    """Greedy answers to the conversations in `prompts`, in their order.

    Prompts, each with the tools and template variables `given` for it, are encoded as training encodes them, sorted by
    length and padded on the left.

    Raises:
        RecipeError: the model's own generation config holds what it cannot generate with.
    """
    ends = end_ids(model.generation_config, encoder.tokenizer)
    given = given or [(None, None)] * len(prompts)
    ids = [encoder.encode_prompt(messages, *more) for messages, more in zip(prompts, given, strict=True)]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    answers: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    batches = math.ceil(len(ids) / batch_size)
    with repacked(model), tqdm(total=batches * max_new_tokens, desc=desc, unit="token") as bar:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            progress = TokenByToken(bar)
            output = _generate(model, encoder, [ids[i] for i in chunk], ends, max_new_tokens, progress)
            for i, row in zip(chunk, output, strict=True):
                end = next((at for at, token in enumerate(row) if token in ends), None)
                text = str(encoder.tokenizer.decode(row[:end], skip_special_tokens=True))
                answers[i] = Answer(text, end is not None)
            bar.update(max_new_tokens - progress.tokens)  # all answers may have ended before the limit
    model.train(was_training)
    return [answers[i] for i in range(len(ids))]
