"""Held-out rows: how well their labels are predicted, what is answered to them, and what the answers are worth."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.utils.logging import tqdm

from ma_sft.config import Settings
from ma_sft.data.functions import load_function
from ma_sft.errors import RecipeError
from ma_sft.labels.encoder import ChatEncoder, end_ids, parsed
from ma_sft.labels.tokenize import make_encoder
from ma_sft.labels.turns import Message
from ma_sft.training.checkpoints import SignalHandler
from ma_sft.training.distributed import gather, once
from ma_sft.training.prepare import Prepared
from ma_sft.training.trainer import ResumableTrainer
from ma_sft.utils import read_json, write_whole


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text, and whether it ended with an end-of-turn token rather than at the limit."""

    text: str
    stopped: bool


@dataclass
class Measured:
    """Held-out rows at one time: their answers, and of `"all"` rows and each source the mean `loss` in nats, the share
    of labels that are the model's first choice (`token_accuracy`), and the number of labels (`tokens`)."""

    losses: dict[str, dict[str, float]] = field(default_factory=dict)
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
    """Held-out rows before the first step and after the last; answers at each evaluation between, too, if they are
    asked for or choose the best model.

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
        signals: SignalHandler,
    ) -> None:
        self.trainer, self.held_out, self.kept, self.settings = trainer, held_out, kept, settings.evaluation
        self.before, self.after, self.signals = Measured(), Measured(), signals
        self.score = "exact_match" if self.settings.metric == "exact-match" else "score"
        self.evaluated_step: int | None = None
        self.evaluated_answers: list[Answer] = []  # at that step, if they were generated
        self.questions: list[Question] = []
        if held_out and held_out.conversations is not None and settings.evaluation.generate_eval:
            metric, self.encoder = self.settings.metric, make_encoder(settings, tokenizer)
            self.grade = exact_match if metric == "exact-match" else load_function(metric)
            self.questions = questions_of(held_out.conversations, settings.evaluation.generate_eval)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 0:
            with torch.random.fork_rng([]):  # what is trained does not depend on whether it is measured
                self.before = self._measure("answers before training")
            if state.is_world_process_zero and self.held_out:
                write_whole(self.kept, json.dumps(asdict(self.before), ensure_ascii=False))
        elif known := read_json(self.kept, None):
            self.before = Measured(known["losses"], [Answer(**answer) for answer in known["answers"]])

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Add the answers' score to an evaluation during training, and see that the best model's metric is measured."""
        self.evaluated_step = None if args.load_best_model_at_end else state.global_step
        self.evaluated_answers = []
        best = (args.metric_for_best_model or "").removeprefix("eval_")
        known = [name.removeprefix("eval_") for name in metrics] + [self.score] * bool(self.questions)
        if best and best not in known:
            raise RecipeError(f"metric_for_best_model: {best!r} is not measured; one of {', '.join(known)}")
        wanted = self.settings.predict_with_generate or best == self.score
        if not (self.questions and wanted and self.trainer.is_in_train and state.global_step):
            return
        with torch.random.fork_rng([]):
            answers = self.evaluated_answers = self._answers(f"answers at step {state.global_step}")
        grades = once(lambda: self._grade(answers))
        metrics[f"eval_{self.score}"] = sum(grades) / len(grades)
        self.trainer.log({f"eval_{self.score}": metrics[f"eval_{self.score}"]})

    def finish(self) -> None:
        """Measure again, after training; every process must call it."""
        self.after = self._measure("answers after training")

    def _measure(self, desc: str) -> Measured:
        if self.held_out is None:
            return Measured()
        if self.evaluated_step != self.trainer.state.global_step:  # `eval_strategy` may have done it at the last step
            self.trainer.evaluate()
        names, losses = {"all": "", **{source: f"_{name}" for name, source in self.held_out.metric_names().items()}}, {}
        for source, name in names.items():
            loss, right, _, tokens = self.trainer.totals.get(f"eval{name}", self.trainer.totals["eval"])
            losses[source] = {"loss": loss / tokens, "token_accuracy": right / tokens, "tokens": int(tokens)}
        return Measured(losses, self.evaluated_answers or self._answers(desc))

    def _answers(self, desc: str) -> list[Answer]:
        """All answers. Every process generates its share, equally many: under ZeRO-3 and FSDP each needs the others."""
        if not self.questions:
            return []
        model, args = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.args
        world, count = args.world_size, len(self.questions)
        mine = [self.questions[i % count] for i in range(args.process_index, -(-count // world) * world, world)]
        prompts = [self.encoder.encode_prompt(q.messages, q.tools, q.template_kwargs) for q in mine]
        limit, check = self.settings.max_new_tokens, self.signals.check
        shares = gather(generate_answers(model, self.encoder, prompts, max_new_tokens=limit, desc=desc, check=check))
        return [shares[i % world][i // world] for i in range(count)]

    def _grade(self, answers: list[Answer]) -> list[float]:
        """The grade of each answer: 1 or 0 for an exact match, or what the user's function gives."""
        grades = []
        for row, (answer, question) in enumerate(zip(answers, self.questions, strict=True)):
            try:
                grades.append(float(self.grade(answer.text, question.reference)))
            except Exception as error:
                why = error.__cause__ or error  # what the user's own function raised
                what = f"metric {self.settings.metric!r} on held-out row {row}"
                raise RecipeError(f"{what}: {type(why).__name__}: {why}") from None
        return grades

    def figures(self) -> dict[str, Any]:
        """What `summary.json` keeps of it: the headlines, and all under `evaluation`.

        Raises:
            RecipeError: the user's metric fails, or gives no number.
        """
        if not self.after.losses:
            return {}
        before, after = self._side(self.before), self._side(self.after)
        top = {"eval_loss": after["loss"], "eval_mean_token_accuracy": after["token_accuracy"]}
        if after.get("metric") == "exact-match":
            top |= {"exact_match_before": before.get("score"), "exact_match_after": after["score"]}
        top |= {"eos_rate": after["eos_rate"]} if "eos_rate" in after else {}
        return {**top, "evaluation": {"before": before or None, "after": after}}

    def _side(self, measured: Measured) -> dict[str, Any]:
        """The figures of one time over all rows, with the same for each source under `sources`; empty without any."""
        grades = self._grade(measured.answers) if measured.answers else []
        parts: dict[str, dict[str, Any]] = {}
        for name, figures in measured.losses.items():
            parts[name] = {**figures, "perplexity": math.exp(min(figures["loss"], 700))}
            rows = [i for i in range(len(grades)) if name in ("all", self.questions[i].source)]
            if rows:
                parts[name] |= {
                    "answers": len(rows),
                    "metric": self.settings.metric,
                    "score": sum(grades[i] for i in rows) / len(rows),
                    "eos_rate": sum(measured.answers[i].stopped for i in rows) / len(rows),
                }
        return {**parts.pop("all"), "sources": parts} if parts else {}

    def table(self) -> list[tuple[str, str, str, str]]:
        """(question, answer before, answer after, reference) of each held-out row that was asked after training."""
        before = self.before.answers or [Answer("", False)] * len(self.questions)
        return [
            (str(question.messages[-1]["content"]), old.text, new.text, question.reference)
            for question, old, new in zip(self.questions, before, self.after.answers, strict=False)
        ]


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
    try:
        return bool(json.loads(answer) == json.loads(reference))
    except ValueError:
        return answer.strip() == reference.strip()


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    desc: str = "generating",
    check: Callable[[], object] = lambda: None,
) -> list[Answer]:
    """Greedy answers to prompts that `encoder` encoded, in their order; made in batches of prompts of like length.

    Args:
        check: called before each batch, and in a single process after each token; what it raises ends the generation.
    """
    ends, alone = end_ids(model.generation_config, encoder.tokenizer), PartialState().num_processes == 1
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    starts = range(0, len(order), batch_size)
    answers: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(starts) * max_new_tokens, desc=desc, unit="token", disable=not sys.stderr.isatty())

    def each_token(ids: torch.Tensor, *_: Any, **kwargs: Any) -> torch.Tensor:
        bar.update()
        if alone:
            check()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # stops no answer by itself

    with bar:
        for start in starts:
            check()
            chunk = order[start : start + batch_size]
            width = len(prompts[chunk[0]])
            rows = [[ends[0]] * (width - len(prompts[i])) + prompts[i] for i in chunk]
            mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chunk]
            output = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0],
                stopping_criteria=StoppingCriteriaList([each_token]),
                tokenizer=encoder.tokenizer,  # for stop strings of the model's own
            )
            new = output[:, width:].tolist()
            for i, row in zip(chunk, new, strict=True):
                end = next((at for at, token in enumerate(row) if token in ends), None)
                answers[i] = Answer(str(encoder.tokenizer.decode(row[:end], skip_special_tokens=True)), end is not None)
            bar.update(max_new_tokens - len(new[0]))  # all answers may have ended before the limit
    model.train(was_training)
    return [answers[i] for i in range(len(prompts))]
