"""`ma-sft check` and `preview` on a recipe, as a script would call them."""

import json

import pytest

from ma_sft.cli import main

GOOD = {"instruction": "Say hi", "input": "", "output": "hi <|im_end|> there"}


@pytest.fixture
def recipe(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({**GOOD, "input": str(i)}) + "\n" for i in range(20)))
    path = tmp_path / "mine.yaml"
    path.write_text(f"model_name_or_path: demo\ndataset_name: {rows}\n")
    return path


def test_check_as_json(recipe, capsys):
    assert main(["check", str(recipe), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 20 and report["turns"] == 20
    assert report["trained_tokens"] > 20 * 5


def test_check_finds_what_a_setting_breaks(recipe, capsys):
    assert main(["check", str(recipe), "--max_length", "12"]) == 1
    assert "cuts off every response" in " ".join(capsys.readouterr().out.split())


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
    assert "there</span>" in text and "http://" not in text and "<script" not in text
    assert main(["preview", str(recipe), "-n", "1"]) == 0
    assert "<|im_end|>" in capsys.readouterr().out
