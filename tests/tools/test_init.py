"""`ma-sft init` on rows that do not say what they are: asked, told, or said what is not used."""

import json

import pytest

from ma_sft import Recipe
from ma_sft.errors import MaSftError
from ma_sft.tools.init import init


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def made(model, data, task="exact", **more):
    recipe, _ = init(str(model), data, "cpu", task, None, **more)
    return Recipe.load(recipe).settings


FRENCH = [{"Demande": f"Combien font {i} + 1 ?", "Retour": str(i + 1)} for i in range(12)]
MEANS = {"Demande": "question", "Retour": "answer"}


def test_columns_are_told(here, tiny_bpe):
    write(here / "rows.jsonl", FRENCH)
    settings = made(tiny_bpe, "rows.jsonl", columns="Demande=question,Retour=answer")
    assert settings["datasets"] == [{"path": "rows.jsonl", "columns": MEANS}]


def test_columns_are_asked_for(here, tiny_bpe, monkeypatch, capsys):
    write(here / "rows.jsonl", FRENCH)
    answers = iter(["", "Question", "Demande", "Retour"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda text: next(answers))
    assert made(tiny_bpe, "rows.jsonl")["datasets"] == [{"path": "rows.jsonl", "columns": MEANS}]
    said = capsys.readouterr().out
    assert "Demande: Combien font 0 + 1 ?" in said and "one of Demande, Retour" in said


def test_nobody_to_ask_names_the_flag(here, tiny_bpe):
    write(here / "rows.jsonl", FRENCH)
    with pytest.raises(MaSftError, match="--columns THEIRS=question,THEIRS=answer"):
        init(str(tiny_bpe), "rows.jsonl", "cpu", "exact", None)
    with pytest.raises(MaSftError, match="there is no column 'Q', there are Demande, Retour"):
        init(str(tiny_bpe), "rows.jsonl", "cpu", "exact", None, columns="Q=question")


def test_a_folder_of_texts_is_a_row_each(here, tiny_bpe):
    (here / "texts").mkdir()
    for number in range(4):
        (here / "texts" / f"{number}.txt").write_text(f"Chapter {number}.\n\nOnce upon a time.\n")
    settings = made(tiny_bpe, "texts", task="text")
    assert settings["datasets"] == [{"path": "texts/*.txt", "sample_by": "document"}]
    (here / "empty").mkdir()
    with pytest.raises(MaSftError, match=r"empty holds no files that end in \.jsonl"):
        init(str(tiny_bpe), "empty", "cpu", "text", None)


def test_of_preferences_it_says_what_is_not_used(here, tiny_bpe, capsys):
    write(here / "pairs.jsonl", [{"prompt": f"{i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(12)])
    made(tiny_bpe, "pairs.jsonl")
    assert "the better answer is trained, `rejected` is not used" in capsys.readouterr().out
    assert "`rejected` is not used" in (here / "pairs.py").read_text()


def test_tools_and_a_template_without_them(here, tiny_bpe):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    write(here / "calls.jsonl", [{"messages": messages, "tools": [tool]}] * 12)
    with pytest.raises(MaSftError, match="tools: choose another model, or train with chat_template_path: Qwen/Qwen3"):
        init(str(tiny_bpe), "calls.jsonl", "cpu", "tools", None)


def test_a_wrong_flag_is_refused_before_anything_is_read(here):
    with pytest.raises(MaSftError, match="cpu, or GPUs as 1x24GB"):
        init("demo", "nothing.jsonl", "a GPU", None, None)


@pytest.mark.parametrize("hardware", ["0x24GB", "24GB", "1xlarge", "2x"])
def test_hardware_that_is_none(hardware, here):
    with pytest.raises(MaSftError, match="cpu, or GPUs as 1x24GB expected"):
        init("demo", "nothing.jsonl", hardware, None, None)
