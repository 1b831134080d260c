"""`ma-sft init` on rows that do not say what they are: asked, told, or said what is not used."""

from pathlib import Path

import pytest
from helpers import assistant, user, write_rows

from ma_sft import Recipe
from ma_sft.errors import MaSftError
from ma_sft.tools.init import init


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def rows(here):
    write_rows(here / "rows.jsonl", ({"Demande": f"Combien font {i} + 1 ?", "Retour": str(i + 1)} for i in range(12)))


def made(model, data, task="exact", **more):
    recipe, _ = init(str(model), data, "cpu", task, None, **more)
    return Recipe.load(recipe).settings


def refused(model, data, message, task="exact", hardware="cpu", **more):
    with pytest.raises(MaSftError, match=message):
        init(str(model), data, hardware, task, None, **more)


MEANS = {"Demande": "question", "Retour": "answer"}


def test_columns_are_told_or_the_flag_is_named(rows, tiny_bpe):
    refused(tiny_bpe, "rows.jsonl", "--columns THEIRS=question,THEIRS=answer")  # with nobody to ask
    refused(tiny_bpe, "rows.jsonl", "there is no column 'Q', there are Demande, Retour", columns="Q=question")
    settings = made(tiny_bpe, "rows.jsonl", columns="Demande=question,Retour=answer")
    assert settings["datasets"] == [{"path": "rows.jsonl", "columns": MEANS}]


def test_columns_are_asked_for(rows, tiny_bpe, monkeypatch, capsys):
    answers = iter(["", "Question", "Demande", "Retour"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda text: next(answers))
    assert made(tiny_bpe, "rows.jsonl")["datasets"] == [{"path": "rows.jsonl", "columns": MEANS}]
    said = capsys.readouterr().out
    assert "Demande: Combien font 0 + 1 ?" in said and "one of Demande, Retour" in said


def test_a_folder_of_texts_is_a_row_each(here, tiny_bpe):
    for name in ("texts", "empty"):
        (here / name).mkdir()
    for number in range(4):
        (here / "texts" / f"{number}.txt").write_text(f"Chapter {number}.\n\nOnce upon a time.\n")
    settings = made(tiny_bpe, "texts", task="text")
    assert settings["datasets"] == [{"path": "texts/*.txt", "sample_by": "document"}]
    refused(tiny_bpe, "empty", r"empty holds no files that end in \.jsonl", "text")


def test_of_preferences_it_says_what_is_not_used(here, tiny_bpe, capsys):
    pairs = ({"prompt": f"{i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(12))
    made(tiny_bpe, write_rows(here / "pairs.jsonl", pairs))
    assert "the better answer is trained, `rejected` is not used" in capsys.readouterr().out
    assert "`rejected` is not used" in (here / "pairs.py").read_text()


def test_tools_and_a_template_without_them(here, tiny_bpe):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    row = {"messages": [user("?"), assistant("", tool_calls=[call])], "tools": [tool]}
    refused(tiny_bpe, write_rows(here / "calls.jsonl", [row] * 12), "use a template that knows tools", "tools")


@pytest.mark.parametrize("hardware", ["a GPU", "0x24GB", "24GB", "1xlarge", "2x"])
def test_hardware_that_is_none_is_refused_before_anything_is_read(hardware, here):
    refused("demo", "nothing.jsonl", "cpu, or GPUs as 1x24GB expected", None, hardware)


def test_a_recipe_that_no_command_would_read_is_not_written(here):
    with pytest.raises(MaSftError, match=r"a recipe is a \.py or \.yaml file, found mine\.txt"):
        init("demo", "nothing.jsonl", "cpu", "chat", Path("mine.txt"))
