"""The run's page: one self-contained HTML file that opens offline."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

CHARTS = {
    "loss": "loss",
    "mean_token_accuracy": "token accuracy",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
}


def write_report(
    path: Path,
    summary: dict[str, Any],
    log_history: list[dict[str, float]],
    counts: list[tuple[str, str]],
    answers: list[tuple[str, str, str, str]],
) -> None:
    """Write the page: curves from the trainer's `log_history`, the summary, the data's counts, held-out answers."""
    charts = []
    for key, title in CHARTS.items():
        points = [(float(log["step"]), float(log[key])) for log in log_history if key in log]
        if len(points) > 1:
            charts.append(
                {
                    "title": title,
                    "points": _polyline(points),
                    "first": f"{points[0][1]:.4g}",
                    "last": f"{points[-1][1]:.4g}",
                }
            )
    environment = Environment(loader=PackageLoader("ma_sft", "."), autoescape=True)
    page = environment.get_template("report.html.jinja").render(
        summary=summary, charts=charts, counts=counts, answers=answers
    )
    path.write_text(page, encoding="utf-8")


def _polyline(points: list[tuple[float, float]]) -> str:
    """Points scaled into a box of 100 x 100, y upwards, with a margin of 5 above and below."""
    xs, ys = zip(*points, strict=True)
    width, height = (max(xs) - min(xs)) or 1, (max(ys) - min(ys)) or 1
    return " ".join(f"{(x - min(xs)) / width * 100:.2f},{95 - (y - min(ys)) / height * 90:.2f}" for x, y in points)
