"""`ma-sft check` and `preview` on a recipe, as a script would call them."""

import re

import pytest
from helpers import assistant, user, write_rows

import ma_sft
from ma_sft.cli import main

GOOD = {"instruction": "Say hi", "input": "", "output": "hi <|im_end|> there"}


@pytest.fixture
def recipe(tiny_bpe, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ({**GOOD, "input": str(i)} for i in range(20)))
    path = tmp_path / "mine.yaml"
    path.write_text(f"model_name_or_path: {tiny_bpe}\ndataset_name: {rows}\n")
    return path


def test_check_finds_a_response_template_that_is_not_there(recipe, capsys):
    flags = ["--formatting_func", "question-answer", "--response_template", "### Reply:"]
    assert main(["check", str(recipe), *flags]) == 1
    assert "response template" in " ".join(capsys.readouterr().out.split())
    assert main(["train", str(recipe), *flags, "--output_dir", str(recipe.parent / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the labels are wrong") and "rows.jsonl:1, rows.jsonl:2" in error


def test_preview_writes_a_page(recipe, tmp_path, capsys):
    page = tmp_path / "preview.html"
    assert main(["preview", str(recipe), "-n", "2", "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "there" in re.sub("</?span[^>]*>", "", text) and "http://" not in text and "<script" not in text
    assert main(["preview", str(recipe), "-n", "20"]) == 0
    shown = capsys.readouterr().out
    assert "<|im_end|>" in shown
    assert {f"rows.jsonl:{n + 1}:" for n in range(20)} <= {*shown.split()}, "lines of the file, not of shuffled rows"


def test_tools_are_functions_of_python_too_and_rows_in_memory_a_source(recipe, tiny_bpe, capsys):
    """In every container, says `data/test_load.py`."""
    loaded = ma_sft.Recipe.load(recipe)
    report = ma_sft.check(loaded, ["--seed", "3"], every_row=True)
    assert report.proven and f"every label is right: {report.verified}" in repr(report) == str(report)
    ma_sft.preview(loaded, n=1)
    assert "rows.jsonl:" in capsys.readouterr().out
    pairs = {"path": "pairs", "rows": [{"q": "Why?"}] * 5, "format": lambda row: [user(row["q"]), assistant("Yes.")]}
    for source in (pairs, [GOOD] * 5):
        report = ma_sft.check(ma_sft.Recipe(model_name_or_path=str(tiny_bpe), dataset_name=source))
        assert report.proven and report.rows == 5
