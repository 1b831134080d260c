"""Curves and histograms as SVG: numbers scaled to a picture that reads at every width, with axes, units and words."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT, LEFT, BOTTOM = 360, 205, 46, 36  # of a chart and its axes, in SVG units
MOST_POINTS = 180  # of one line: more steps are drawn as means, with a band from the lowest to the highest
COLOURS = 8  # the page has as many, each readable on its ground; further runs have them again, dashed
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


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


def charts(logs: Sequence[list[dict[str, Any]]], titles: Sequence[str] = ("run",)) -> list[dict[str, Any]]:
    """What the page draws of the logs of one or several runs; a curve without values is left out.

    Returns:
        Of each chart its `title`, `unit`, `svg`, how many values are no numbers (`missing`), and `lines`: the number of
        the `run`, whether it is of `held_out` rows, first and last value (`ends`), steps in one mean (`each`).
    """
    return [drawn for curve in CURVES if (drawn := _chart(curve, logs, titles))]


def _chart(curve: Curve, logs: Sequence[list[dict[str, Any]]], titles: Sequence[str]) -> dict[str, Any] | None:
    lines: list[dict[str, Any]] = []
    missing = 0
    for run, log in enumerate(logs):
        for held_out, key in enumerate(filter(None, (curve.key, curve.held_out))):
            points = sorted({int(entry["step"]): float(entry[key]) for entry in log if key in entry}.items())
            finite = [point for point in points if math.isfinite(point[1])]
            missing += len(points) - len(finite)
            if finite:
                line = {"run": run, "held_out": bool(held_out), "points": points, "finite": finite}
                ends = [format(finite[at][1], curve.how) for at in (0, -1)]
                said = f"from {ends[0]} at step {finite[0][0]:,} to {ends[1]} at step {finite[-1][0]:,}"
                said = f"{titles[run % len(titles)]}{', held-out' if held_out else ''} {said}"
                lines.append({**line, "each": math.ceil(len(points) / MOST_POINTS), "ends": ends, "said": said})
    if not lines:
        return None
    steps = [step for line in lines for step, _ in line["points"]]
    numbers = [value for line in lines for _, value in line["finite"]]
    yticks = ticks(min(numbers), max(numbers))
    plane = _Plane(min(steps), max(*steps, min(steps) + 1), min(*numbers, yticks[0]), max(*numbers, yticks[-1]))
    share, power = curve.how.endswith("%"), math.floor(math.log10(abs(plane.top))) if plane.top else 0
    power = 0 if share or -3 < power < 6 else power  # small numbers such as learning rates as 2, 4, 6 times 10⁻⁴
    tick_format = curve.how if share else ",g"
    return {
        "title": curve.title,
        "unit": ", ".join(filter(None, (curve.unit, f"× 10{str(power).translate(RAISED)}" if power else ""))),
        "lines": lines,
        "missing": missing,
        "svg": _picture(
            f"{curve.title}: {'; '.join(line['said'] for line in lines)}",
            "step",
            [(plane.x(tick), f"{tick:,.0f}", "middle") for tick in ticks(plane.left, plane.right, whole=True)],
            [(plane.y(tick), format(tick / 10**power, tick_format).replace(".0%", "%")) for tick in yticks],
            [_line(line, plane, curve.how) for line in lines],
        ),
    }


class _Plane(NamedTuple):
    """The values at the edges of a picture: where others lie in it."""

    left: float
    right: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - LEFT - 10), 1)

    def y(self, value: float) -> float:
        return round(10 + (self.top - value) / ((self.top - self.bottom) or 1) * (HEIGHT - BOTTOM - 14), 1)

    def points(self, places: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x)},{self.y(y)}" for x, y in places)


def _line(line: dict[str, Any], plane: _Plane, how: str) -> Markup:
    """A line with its points; it bridges no gap where a value is no number."""
    parts = [list(part) for finite, part in groupby(line["points"], lambda point: math.isfinite(point[1])) if finite]
    each, count, marks = line["each"], len(line["points"]), Markup()
    kind = " ".join(filter(None, ("again" * (line["run"] >= COLOURS), "held" * line["held_out"])))
    look, size = ("dot", 2.5) if line["held_out"] or count < 3 or (len(parts) > 1 and count < 60) else ("hover", 4)
    circle = Markup('<circle class="{}" cx="{}" cy="{}" r="{}"><title>step {:,.0f}: {}</title></circle>\n')
    for part in parts:
        groups = [part[at : at + each] for at in range(0, len(part), each)]
        values = [[value for _, value in group] for group in groups]
        steps = [sum(step for step, _ in group) / len(group) for group in groups]
        means = [(step, sum(some) / len(some)) for step, some in zip(steps, values, strict=True)]
        if each > 1:
            edge = [*zip(steps, map(max, values), strict=True), *[*zip(steps, map(min, values), strict=True)][::-1]]
            marks += Markup('<polygon class="band" points="{}"/>').format(plane.points(edge))
        marks += Markup('<polyline class="{}" points="{}"/>\n').format(kind, plane.points(means))
        for step, mean in means:
            marks += circle.format(look, plane.x(step), plane.y(mean), size, step, format(mean, how))
    return Markup('<g class="s{}">{}</g>').format(line["run"] % COLOURS, marks)


def histogram(lengths: dict[str, Any]) -> Markup:
    """How many `rows` lie between `edges`, one more than bars; `median` and `longest` are said in words."""
    counts, edges = lengths["rows"], lengths["edges"]
    plane = _Plane(0, len(counts), 0, max(*counts, 1))
    bar = Markup('<rect class="bar" x="{}" width="{:.1f}" y="{}" height="{:.1f}"><title>{}</title></rect>\n')
    bars = []
    for at, count in enumerate(counts):
        x, y, title = plane.x(at), plane.y(count), f"{count:,} rows of {edges[at]:,} to {edges[at + 1]:,} tokens"
        bars.append(bar.format(x, 0.9 * (plane.x(at + 1) - x), y, plane.y(0) - y, title))
    anchors = {len(counts) // 2: "middle", 0: "start", len(counts): "end"}
    xticks = [(plane.x(at), f"{edges[at]:,}", anchor) for at, anchor in anchors.items()]
    yticks = [(plane.y(count), f"{count:,}") for count in (0, int(plane.top))]
    said = f"half have up to {lengths['median']:,} tokens, the longest {lengths['longest']:,}"
    return _picture(f"histogram of row lengths: {said}", "tokens of a row", xticks, yticks, bars)


def _picture(label: str, unit: str, xticks: Iterable[Any], yticks: Iterable[Any], marks: Iterable[Markup]) -> Markup:
    """The picture around its marks: grid, numbers and unit of the axes; ticks are (place, text, anchor of x)."""
    text = Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>\n')
    grid = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    axes = [grid.format(LEFT, WIDTH - 4, y, y) + text.format(LEFT - 5, y + 3.5, "end", words) for y, words in yticks]
    axes += [text.format(x, HEIGHT - 20, anchor, words) for x, words, anchor in xticks]
    axes.append(text.format((LEFT + WIDTH) / 2, HEIGHT - 5, "middle", unit))
    picture = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">\n{}</svg>')
    return picture.format(WIDTH, HEIGHT, label, Markup().join([*axes, *marks]))


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to six round numbers that span [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / 4))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= span / 5)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step)
    found = [float(f"{n * step:.12g}") for n in range(first, last + 1)]
    return [tick for tick in found if low <= tick <= high] if whole else found
