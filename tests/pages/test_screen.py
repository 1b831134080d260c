"""The end of a run fits one screen, whatever the answers say."""

import pytest
from rich.cells import cell_len

from ma_sft.pages.screen import shorten, show_end

LONG = "[/foo] \x1b[31m long 订单 " * 200
SIDE = {"loss": 1.5, "perplexity": 4.5, "token_accuracy": 0.5, "metric": "exact-match", "score": 0.1, "eos_rate": 0.9}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_fits_one_screen(width, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(tmp_path)
    out = tmp_path.relative_to(tmp_path) / "runs" / "demo"
    for name in ("adapter", "merged"):
        (out / name).mkdir(parents=True)
    (out / "report.html").touch()
    evaluation = {"before": {**SIDE, "sources": {}}, "after": {**SIDE, "sources": {}}}
    show_end(out, [(LONG, LONG + "\n\n", LONG, LONG)] * 40, {"evaluation": evaluation})
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert len(lines) <= 24 and max(map(cell_len, lines)) <= width and "\x1b" not in said
    assert lines[-1].split() == ["chat", "ma-sft", "chat", "runs/demo"]
    assert "held-out exact match: 10.0% before, 10.0% after" in lines
    assert "40 held-out answers in all, in runs/demo/report.html" in lines
    assert sum(line.lstrip().startswith("message") for line in lines) == 3


def test_shorten_keeps_what_fits():
    assert shorten("a\nb", 60) == "a b"
    assert cell_len(shorten("订" * 100, 40)) <= 40
