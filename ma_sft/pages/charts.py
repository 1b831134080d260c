"""Curves as SVG: numbers of logs scaled to a picture that reads at every width, with axes, units and words for it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM = 360, 205, 46, 36  # of a chart and its axes, in SVG units
MOST_POINTS = 180  # of one line: more steps are drawn as means, with a band from the lowest to the highest
COLOURS = 8  # the page has as many, each readable on its ground; further runs have them again, dashed

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """One chart: its title and unit, the format of its values, its key in the logs of training and of held-out rows."""

    title: str
    unit: str
    how: str
    key: str
    held_out: str = ""


CURVES = (
    Curve("loss", "nats per token", ".3g", "loss", "eval_loss"),
    Curve("token accuracy", "share of trained tokens", ".1%", "mean_token_accuracy", "eval_mean_token_accuracy"),
    Curve("learning rate", "", ".3g", "learning_rate"),
    Curve("speed", "tokens per second", ",.0f", "tokens_per_second"),
    Curve("gradient norm", "", ".3g", "grad_norm"),
)


def charts(logs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What the page draws of the logs of one or several runs; a curve without values is left out."""
    return [drawn for curve in CURVES if (drawn := _chart(curve, logs))]


def _chart(curve: Curve, logs: Sequence[list[dict[str, Any]]]) -> dict[str, Any] | None:
    lines: list[dict[str, Any]] = []
    missing = 0
    for run, log in enumerate(logs):
        for held_out, key in enumerate(filter(None, (curve.key, curve.held_out))):
            values = {int(entry["step"]): float(entry[key]) for entry in log if key in entry}
            points = sorted(values.items())
            missing += sum(not math.isfinite(value) for _, value in points)
            if any(math.isfinite(value) for _, value in points):
                lines.append({"run": run, "held_out": bool(held_out), "points": points})
    if not lines:
        return None
    steps: list[int] = [step for line in lines for step, _ in line["points"]]
    numbers: list[float] = [value for line in lines for _, value in line["points"] if math.isfinite(value)]
    first, last = min(steps), max(*steps, min(steps) + 1)
    yticks = ticks(min(numbers), max(numbers))
    low, high = min(*numbers, yticks[0]), max(*numbers, yticks[-1])

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - 10), 1)

    def y(value: float) -> float:
        return round(10 + (high - value) / ((high - low) or 1) * (HEIGHT - BOTTOM - 14), 1)

    for line in lines:
        points = line.pop("points")
        finite = [point for point in points if math.isfinite(point[1])]
        line["ends"] = [format(value, curve.how) for _, value in (finite[0], finite[-1])]
        line["said"] = f"from {line['ends'][0]} at step {finite[0][0]:,} to {line['ends'][1]} at step {finite[-1][0]:,}"
        each = math.ceil(len(points) / MOST_POINTS)
        line["each"] = each
        line["parts"], line["bands"], line["dots"] = [], [], []
        for part in _unbroken(points):
            means = [_mean(part[at : at + each]) for at in range(0, len(part), each)]
            line["parts"].append(" ".join(f"{x(step)},{y(mean)}" for step, mean, _, _ in means))
            line["dots"] += [
                (x(step), y(mean), f"step {step:,.0f}: {format(mean, curve.how)}") for step, mean, _, _ in means
            ]
            if each > 1:
                above = [f"{x(step)},{y(top)}" for step, _, _, top in means]
                below = [f"{x(step)},{y(bottom)}" for step, _, bottom, _ in reversed(means)]
                line["bands"].append(" ".join(above + below))
    power = 0 if curve.how.endswith("%") else _power(high)
    return {
        "title": curve.title,
        "unit": ", ".join(filter(None, (curve.unit, f"times 10^{power}" if power else ""))),
        "lines": lines,
        "missing": missing,
        "x": [(x(tick), f"{tick:,.0f}") for tick in ticks(first, last, whole=True)],
        "y": [(y(tick), _tick_text(tick / 10**power, curve.how)) for tick in yticks],
    }


def _unbroken(points: Points) -> Iterator[Points]:
    """The points cut where a value is no number: a line bridges no gap."""
    part: Points = []
    for step, value in points:
        if math.isfinite(value):
            part.append((step, value))
        elif part:
            yield part
            part = []
    if part:
        yield part


def _mean(points: Points) -> tuple[float, float, float, float]:
    """Mean step, mean, lowest and highest value."""
    values = [value for _, value in points]
    return sum(step for step, _ in points) / len(points), sum(values) / len(values), min(values), max(values)


def _power(high: float) -> int:
    """The power of ten that an axis is read in: small numbers such as learning rates as 2, 4, 6 times 10^-4."""
    power = math.floor(math.log10(abs(high))) if high else 0
    return power if power <= -3 or power >= 6 else 0


def _tick_text(tick: float, how: str) -> str:
    return format(tick, how if how.endswith("%") else ",g").replace(".0%", "%")


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to six round numbers that span [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / 4))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= span / 5)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step)
    found = [float(f"{n * step:.12g}") for n in range(first, last + 1)]
    return [tick for tick in found if low <= tick <= high] if whole else found
