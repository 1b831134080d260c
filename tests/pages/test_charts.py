"""Curves: round axes, gaps where there is no number, means of many steps, and words that say what is drawn."""

import math

import pytest

from ma_sft.pages.charts import HEIGHT, MOST_POINTS, WIDTH, charts, ticks


def log(values, key="loss"):
    return [{"step": step, key: value} for step, value in enumerate(values, 1)]


def only(logs):
    (chart,) = charts(logs)
    return chart


def test_a_line_bridges_no_gap():
    chart = only([log([3.0, 2.0, math.nan, math.inf, 1.0, 0.5])])
    assert chart["missing"] == 2
    assert [len(part.split()) for part in chart["lines"][0]["parts"]] == [2, 2]
    assert chart["lines"][0]["said"] == "from 3 at step 1 to 0.5 at step 6"


def test_many_steps_are_means_with_a_band():
    (line,) = only([log([2.0 + step % 2 for step in range(10_000)])])["lines"]
    assert len(line["parts"][0].split()) <= MOST_POINTS and line["each"] == 56
    assert {float(point.split(",")[1]) for point in line["parts"][0].split()} == {87.5}  # the mean, in the middle
    edges = {float(point.split(",")[1]) for point in line["bands"][0].split()}
    assert len(edges) == 2 and min(edges) < 87.5 < max(edges)


@pytest.mark.parametrize(
    ("key", "top", "unit", "labels"),
    [
        ("learning_rate", 8e-4, "times 10^-4", ["0", "2", "4", "6", "8"]),
        ("loss", 3.0, "nats per token", ["0", "1", "2", "3"]),
        ("tokens_per_second", 2_000_000.0, "tokens per second, times 10^6", ["0", "0.5", "1", "1.5", "2"]),
        ("mean_token_accuracy", 1.0, "share of trained tokens", ["0%", "20%", "40%", "60%", "80%", "100%"]),
    ],
)
def test_axes_have_units_and_read(key, top, unit, labels):
    chart = only([log([0.0, top], key)])
    assert chart["unit"] == unit
    assert [text.replace(".0%", "%") for _, text in chart["y"]] == labels


def test_everything_lies_inside_the_picture():
    logs = [log([value * 10**power for value in (1, -2, 5, 5, 5)]) for power in (-9, 0, 12)]
    for one in [*([entry] for entry in logs), logs]:
        chart = only(one)
        points = [point for line in chart["lines"] for part in line["parts"] for point in part.split()]
        for x, y in (map(float, point.split(",")) for point in points):
            assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT


def test_ticks_are_round_and_span():
    assert ticks(0.0, 8e-4) == [0.0, 2e-4, 4e-4, 6e-4, 8e-4]
    assert ticks(5.0, 5.0)[0] <= 5.0 <= ticks(5.0, 5.0)[-1]
    assert ticks(1, 3, whole=True) == [1, 2, 3]
