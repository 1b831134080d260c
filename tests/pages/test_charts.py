"""Curves: round axes, gaps where there is no number, means of many steps, and words that say what is drawn."""

import math
import re

import pytest

from ma_sft.pages.charts import HEIGHT, MOST_POINTS, WIDTH, charts, histogram, ticks


def log(values, key="loss"):
    return [{"step": step, key: value} for step, value in enumerate(values, 1)]


def only(logs):
    (chart,) = charts(logs)
    return chart


def polygons(chart, what="polyline"):
    """The points of each line (or band) of a chart."""
    found = re.findall(rf'<{what} class="[^"]*" points="([^"]+)"', chart["svg"])
    return [[tuple(map(float, point.split(","))) for point in points.split()] for points in found]


def test_a_line_bridges_no_gap():
    chart = only([log([3.0, 2.0, math.nan, math.inf, 1.0, 0.5])])
    assert chart["missing"] == 2
    assert [len(points) for points in polygons(chart)] == [2, 2]
    assert "run from 3 at step 1 to 0.5 at step 6" in chart["svg"]


def test_many_steps_are_means_with_a_band():
    chart = only([log([2.0 + step % 2 for step in range(10_000)])])
    (points,) = polygons(chart)
    assert len(points) <= MOST_POINTS and chart["lines"][0]["each"] == 56
    assert {y for _, y in points} == {87.5}  # the mean, in the middle
    edges = {y for _, y in polygons(chart, "polygon")[0]}
    assert len(edges) == 2 and min(edges) < 87.5 < max(edges)


@pytest.mark.parametrize(
    ("key", "top", "unit", "labels"),
    [
        ("learning_rate", 8e-4, "× 10⁻⁴", ["0", "2", "4", "6", "8"]),
        ("loss", 3.0, "nats per token", ["0", "1", "2", "3"]),
        ("tokens_per_second", 2_000_000.0, "tokens per second, × 10⁶", ["0", "0.5", "1", "1.5", "2"]),
        ("mean_token_accuracy", 1.0, "share of trained tokens", ["0%", "20%", "40%", "60%", "80%", "100%"]),
    ],
)
def test_axes_have_units_and_read(key, top, unit, labels):
    chart = only([log([0.0, top], key)])
    assert chart["unit"] == unit
    assert re.findall(r'text-anchor="end">([^<]*)<', chart["svg"]) == labels


def test_everything_lies_inside_the_picture():
    logs = [log([value * 10**power for value in (1, -2, 5, 5, 5)]) for power in (-9, 0, 12)]
    for one in [*([entry] for entry in logs), logs]:
        chart = only(one)
        for x, y in (point for points in polygons(chart) for point in points):
            assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT


def test_a_histogram_has_the_axes_of_a_curve_and_names_its_bars():
    svg = histogram({"rows": [3, 1200], "edges": [10, 20, 4000], "median": 1500, "longest": 3999})
    assert re.findall(r"<title>(.*?)</title>", svg) == ["3 rows of 10 to 20 tokens", "1,200 rows of 20 to 4,000 tokens"]
    assert f'viewBox="0 0 {WIDTH} {HEIGHT}"' in svg and "half have up to 1,500 tokens" in svg
    heights = [float(height) for height in re.findall(r'<rect [^>]* height="([^"]+)"', svg)]
    assert heights[1] > 300 * heights[0] > 0


def test_ticks_are_round_and_span():
    assert ticks(0.0, 8e-4) == [0.0, 2e-4, 4e-4, 6e-4, 8e-4]
    assert ticks(5.0, 5.0)[0] <= 5.0 <= ticks(5.0, 5.0)[-1]
    assert ticks(1, 3, whole=True) == [1, 2, 3]
