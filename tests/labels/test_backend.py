"""The faster tokenizer gives the standard one's ids, or is left."""

import functools
import logging
import pickle
from array import array

import pytest
from datasets import Dataset
from helpers import ROOT, TOKENIZERS, assistant, load_tokenizer, user

from ma_sft.labels.backend import EVERY, HARD, Backend, DifferentResultError
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.labels.tokenize import tokenize

TEXTS = [
    *HARD,
    *(part for file in sorted((ROOT / "docs").glob("*.md")) for part in file.read_text(encoding="utf-8").split("\n\n")),
    "<|im_start|>user\nhi<|im_end|>\n<|start_header_id|>x<|eot_id|><start_of_turn>y<end_of_turn><|channel|>",
]


@functools.cache
def built(name: str) -> Backend:
    """The faster tokenizer takes a second to build."""
    backend = Backend(load_tokenizer(name), from_characters=0)
    backend(["Hi"])
    return backend


SLOW = ("llama3", "gptoss")  # which are cut up as Qwen3's texts are


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in TOKENIZERS])
def test_same_ids_as_the_standard_backend(name):
    backend, standard = built(name), Backend(load_tokenizer(name), fast=False)
    assert backend(TEXTS) == standard(TEXTS)
    assert backend([]) == []


def test_takes_the_faster_one_where_it_can():
    qwen3, llama2 = built("qwen3"), built("llama2")
    assert qwen3.wanted == llama2.wanted and qwen3.wanted.startswith("fastokens ")
    assert qwen3._fast is not None and llama2._fast is None  # it knows no Metaspace


def test_a_few_texts_do_not_wait_for_the_faster_one():
    tokenizer = load_tokenizer("smollm2")
    backend, ids = Backend(tokenizer, from_characters=20), array("i", tokenizer("Hi there")["input_ids"]).tobytes()
    assert [backend(["Hi there"]) for _ in range(3)] == [[ids]] * 3
    assert backend._fast is not None
    few = Backend(tokenizer)
    assert few(["Hi there"]) == [ids] and few._fast is None


def test_truncation_of_an_earlier_call_does_not_count():
    tokenizer = load_tokenizer("smollm2")
    tokenizer(["one two three"], truncation=True, max_length=1, padding="max_length")
    for fast in (True, False):
        assert len(Backend(tokenizer, fast=fast, from_characters=0)(["one two three"])[0]) == 3 * 4


def test_goes_to_other_processes():
    backend = built("smollm2")
    again = pickle.loads(pickle.dumps(backend))
    assert again.wanted == backend.wanted and again(["Hi"]) == backend(["Hi"])


def other_ids() -> Backend:
    """A faster tokenizer of another vocabulary, as one with a fault would be."""
    backend = Backend(load_tokenizer("smollm2"), from_characters=0)
    backend(["Hi"])
    backend._fast = built("qwen3")._fast
    return backend


def test_one_text_of_many_is_held_against_the_standard_one():
    with pytest.raises(DifferentResultError, match="你好"):
        other_ids()(["你好"] * EVERY)


def test_rows_are_tokenised_again_after_a_difference(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MA_SFT_CACHE", str(tmp_path))
    chats = [[user(f"q{n}"), assistant(f"你好{n}")] for n in range(100)]
    rows, tokenizer = (
        Dataset.from_list([{"messages": turns, "tools": None} for turns in chats]),
        load_tokenizer("smollm2"),
    )
    expected = tokenizer.apply_chat_template(chats[0], return_dict=False)
    encoder = ChatEncoder(tokenizer)
    encoder.backend = other_ids()
    with caplog.at_level(logging.WARNING):
        assert tokenize(rows, encoder)["input_ids"][0] == expected
    assert "tokenising again, by transformers and tokenizers alone: fastokens gives other ids" in caplog.text
    assert encoder.backend.wanted.startswith("tokenizers")
