"""What a held-out answer is worth, and the figures before and after training as `summary.json` keeps them."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ma_sft.data.functions import load_function
from ma_sft.errors import RecipeError


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
            why = error.__cause__ or error  # what the user's own function raised
            raise RecipeError(f"metric {metric!r} on held-out row {row}: {type(why).__name__}: {why}") from None
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


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
