"""Chat: several turns, where each answer stopped and why, and an answer alone for scripts."""

import re
import string

import pytest

from ma_sft import RecipeError
from ma_sft.cli import main
from ma_sft.release.chat import HELP, chat, load, reply


def talk(folder, lines, monkeypatch, capsys, **more):
    lines = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat(folder, **more)
    return capsys.readouterr().out


@pytest.fixture
def lively(tiny_bpe, monkeypatch):
    """The tiny model with weights large enough that its answers depend on what was said before."""
    model, encoder, _ = load(tiny_bpe)
    for parameter in model.parameters():
        parameter.data *= 8
    monkeypatch.setattr("ma_sft.release.chat.load", lambda folder, base, code: (model, encoder, None))
    return model


def test_conversation(lively, monkeypatch, capsys):
    lines = ["Hi", "And?", "/new", "Hi", "/reset", "Hi", "/help", "/exit", "Hi"]
    out = talk("", lines, monkeypatch, capsys, max_new_tokens=4, system="Be kind.")
    assert "System message: Be kind." in out
    first, second, *again = re.split(r"\[4 tokens, stopped by limit of 4 tokens, not by itself\]\n", out)
    assert [first.split("Be kind.\n")[1]] * 2 == again[:2], "/new begins again, and so does /reset"
    assert second != again[0]
    assert again[2:] == [f"{HELP}\n"], "/help, and nothing after /exit"


def test_answer_that_ends_by_itself_says_with_which_token(lively, monkeypatch, capsys):
    lively.generation_config.eos_token_id = list(range(lively.config.vocab_size))
    out = talk("", ["Hi", ""], monkeypatch, capsys)
    assert re.search(r"\[1 tokens, stopped by [^\n]+\]", out) and "limit" not in out


def test_answer_that_a_stop_string_ends(lively, monkeypatch, capsys):
    lively.generation_config.stop_strings = list(string.printable)
    out = talk("", ["Hi", ""], monkeypatch, capsys)
    assert re.search(r"\[\d tokens, stopped by a stop string\]", out)


def test_context_that_is_full(tiny_bpe):
    model, encoder, _ = load(tiny_bpe)
    model.config.max_position_embeddings = 10
    with pytest.raises(RecipeError, match="the model's context holds 10"):
        reply(model, encoder, [{"role": "user", "content": "word " * 20}], max_new_tokens=3, stream=False)


def test_one_answer_is_all_that_a_script_gets(tiny_bpe, capfd):
    """What other libraries print as they are imported is seen in `e2e/test_demo.py`, in a process of its own."""
    assert main(["chat", str(tiny_bpe), "--prompt", "Hi", "--max_new_tokens", "3"]) == 0
    answer = capfd.readouterr().out
    model, encoder, _ = load(tiny_bpe)
    expected = reply(model, encoder, [{"role": "user", "content": "Hi"}], max_new_tokens=3, stream=False)
    assert answer == expected + "\n"
