"""Held-out rows: how well their labels are predicted, what is answered to them, and what the answers are worth."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
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

from ma_sft.config import Settings
from ma_sft.data.functions import load_function
from ma_sft.errors import RecipeError, one_line
from ma_sft.hub import stop_ids
from ma_sft.labels.encoder import ChatEncoder, parsed
from ma_sft.labels.tokenize import make_encoder
from ma_sft.labels.turns import Message
from ma_sft.training.distributed import gather, once
from ma_sft.training.prepare import Prepared
from ma_sft.training.quantized import repacked
from ma_sft.training.trainer import ResumableTrainer, score_name
from ma_sft.utils import write_whole


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


@dataclass
class Measured:
    """Held-out rows at one time: losses of `"all"` rows and of each source, and the answers."""

    losses: dict[str, HeldOut] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)


@dataclass
class Question:
    """A held-out conversation without its last assistant turn, and that turn as the reference."""

    messages: list[Message]
    tools: Any
    template_kwargs: Any
    reference: str
    source: str


class EvalCallback(TrainerCallback):
    """Held-out rows before the first step and after the last; answers in between, too, if they choose the best model.

    Before the first step the launcher's engine has prepared the model already, so that ZeRO and FSDP are measured as
    they train. What was measured then is kept in the file `kept` for a run that is resumed. Without held-out rows
    nothing is measured.
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
        self.before, self.after = Measured(), Measured()
        self.score = score_name(settings)
        self.questions: list[Question] = []
        if held_out and held_out.conversations is not None and settings.exam.generate_eval:
            self.encoder = make_encoder(settings, tokenizer)
            self.questions = questions_of(held_out.conversations, settings.exam.generate_eval)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 0:
            with torch.random.fork_rng([]):  # what is trained does not depend on whether it is measured
                self.before = self._measure("answers before training")
            if state.is_world_process_zero and self.held_out:
                write_whole(self.kept, json.dumps(asdict(self.before), ensure_ascii=False))
        elif self.kept.is_file():
            kept = json.loads(self.kept.read_text(encoding="utf-8"))
            losses = {name: HeldOut(**loss) for name, loss in kept["losses"].items()}
            self.before = Measured(losses, [Answer(**answer) for answer in kept["answers"]])

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Add the answers' score to an evaluation during training, if the best model is chosen by it."""
        best = (args.metric_for_best_model or "").removeprefix("eval_")
        if not (self.questions and best == self.score and self.trainer.is_in_train and state.global_step):
            return
        with torch.random.fork_rng([]):
            answers = self._answers(f"answers at step {state.global_step}")
        grades = once(lambda: grade(answers, self._references(), self.settings.metric))
        metrics[f"eval_{self.score}"] = sum(grades) / len(grades)
        self.trainer.log({f"eval_{self.score}": metrics[f"eval_{self.score}"]})

    def finish(self) -> None:
        """Measure again, after training; every process must call it."""
        self.after = self._measure("answers after training")

    def _measure(self, desc: str) -> Measured:
        if self.held_out is None:
            return Measured()
        self.trainer.evaluate()
        losses = {
            source: HeldOut(sums[0] / sums[3], sums[1] / sums[3], int(sums[3]))
            for source, sums in self.trainer.held_out_sums(self.held_out.metric_names()).items()
        }
        return Measured(losses, self._answers(desc))

    def _answers(self, desc: str) -> list[Answer]:
        """All answers. Every process generates its share, equally many: under ZeRO-3 and FSDP each needs the others."""
        if not self.questions:
            return []
        model, args = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.args
        world, count = args.world_size, len(self.questions)
        mine = [self.questions[i % count] for i in range(args.process_index, -(-count // world) * world, world)]
        prompts = [self.encoder.encode_prompt(q.messages, q.tools, q.template_kwargs) for q in mine]
        limit = self.settings.max_new_tokens
        shares = gather(generate_answers(model, self.encoder, prompts, max_new_tokens=limit, desc=desc))
        return [shares[i % world][i // world] for i in range(count)]

    def _references(self) -> list[str]:
        return [question.reference for question in self.questions]

    def figures(self) -> dict[str, Any]:
        """What `summary.json` keeps of it: the headlines, and all under `evaluation`.

        Raises:
            RecipeError: the metric fails.
        """
        if not self.after.losses:
            return {}
        sides = [self._side(measured) for measured in (self.before, self.after)]
        before, after = sides[0] or {}, sides[1] or {}
        top = {"eval_loss": after["loss"], "eval_mean_token_accuracy": after["token_accuracy"]}
        if after.get("metric") == "exact-match":
            top |= {"exact_match_before": before.get("score"), "exact_match_after": after["score"]}
        top |= {"eos_rate": after["eos_rate"]} if "eos_rate" in after else {}
        return {**top, "evaluation": {"before": sides[0], "after": after}}

    def _side(self, measured: Measured) -> dict[str, Any] | None:
        """The figures of one time over all rows, with the same for each source under `sources`; None without any."""
        grades = grade(measured.answers, self._references(), self.settings.metric) if measured.answers else []
        parts: dict[str, dict[str, Any]] = {}
        for name, loss in measured.losses.items():
            parts[name] = {**asdict(loss), "perplexity": loss.perplexity}
            rows = [i for i in range(len(grades)) if name in ("all", self.questions[i].source)]
            if rows:
                parts[name] |= {
                    "answers": len(rows),
                    "metric": self.settings.metric,
                    "score": sum(grades[i] for i in rows) / len(rows),
                    "eos_rate": sum(measured.answers[i].stopped for i in rows) / len(rows),
                }
        return {**parts.pop("all"), "sources": parts} if parts else None

    def table(self) -> list[tuple[str, str, str, str]]:
        """(question, answer before, answer after, reference) of each held-out row that was asked after training."""
        before = [answer.text for answer in self.before.answers] or [""] * len(self.questions)
        after = [answer.text for answer in self.after.answers]
        asked = [str(question.messages[-1]["content"]) for question in self.questions]
        return list(zip(asked, before, after, self._references(), strict=True)) if after else []


def questions_of(rows: Any, count: int) -> list[Question]:
    """The first `count` held-out conversations (-1: all) as questions; plain text asks nothing."""
    rows = rows.select(range(len(rows) if count < 0 else min(count, len(rows))))
    names = ("tools", "chat_template_kwargs")
    given = [parsed(rows[name] if name in rows.column_names else None, len(rows)) for name in names]
    found = []
    for messages, source, tools, kwargs in zip(rows["messages"], rows["source"], *given, strict=True):
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        if last:
            found.append(Question(messages[:last], tools, kwargs, messages[last]["content"], source))
    return found


def exact_match(answer: str, reference: str) -> bool:
    """Whether two answers are the same: as JSON values if the reference is JSON, else as stripped text."""
    expected, given = _as_json(reference), _as_json(answer)
    return bool(expected == given if expected is not None else answer.strip() == reference.strip())


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


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
            why = error.__cause__ or error  # what the user's own function raised
            raise RecipeError(f"metric {metric!r} on held-out row {row}: {type(why).__name__}: {why}") from None
    return grades


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


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    ends: list[int],
    **settings: Any,
) -> list[list[int]]:
    """The ids that the model writes behind each of the prompts, padded behind their end; greedy unless `settings` say.

    Args:
        settings: `generate`'s own, such as `max_new_tokens`, `temperature`, `streamer`.

    Raises:
        RecipeError: the model's own generation config holds what it cannot generate with.
    """
    width = max(map(len, prompts))
    rows = [[ends[0]] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    try:
        output = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            eos_token_id=ends,
            pad_token_id=ends[0],
            tokenizer=tokenizer,  # for stop strings of the model's own
            **{"do_sample": False, **settings},
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"the model's generation_config.json cannot be followed: {one_line(error)}; mend it, or leave "
            "generate_eval out"
        ) from error
    written: list[list[int]] = output[:, width:].tolist()
    return written


def generate_answers(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    desc: str = "generating",
) -> list[Answer]:
    """Greedy answers to prompts that `encoder` encoded, in their order; made in batches of prompts of like length.

    Raises:
        RecipeError: as `generate`.
    """
    ends = end_ids(model.generation_config, encoder.tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    batches = math.ceil(len(prompts) / batch_size)
    with repacked(model), tqdm(total=batches * max_new_tokens, desc=desc, unit="token") as bar:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            progress = TokenByToken(bar)
            limits = {"max_new_tokens": max_new_tokens, "stopping_criteria": StoppingCriteriaList([progress])}
            output = generate(model, encoder.tokenizer, [prompts[i] for i in chunk], ends, **limits)
            for i, row in zip(chunk, output, strict=True):
                end = next((at for at, token in enumerate(row) if token in ends), None)
                text = str(encoder.tokenizer.decode(row[:end], skip_special_tokens=True))
                answers[i] = Answer(text, end is not None)
            bar.update(max_new_tokens - progress.tokens)  # all answers may have ended before the limit
    model.train(was_training)
    return [answers[i] for i in range(len(prompts))]
