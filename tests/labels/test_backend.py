"""The faster tokenizer gives the standard one's ids, or is left."""

import logging
import pickle
from array import array

import pytest
from datasets import Dataset
from helpers import ROOT, load_tokenizer

from ma_sft.labels.backend import EVERY, HARD, Backend, DifferentIdsError
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.labels.tokenize import tokenize

TEXTS = [
    *HARD,
    *(part for file in sorted((ROOT / "docs").glob("*.md")) for part in file.read_text(encoding="utf-8").split("\n\n")),
    "<|im_start|>user\nhi<|im_end|>\n<|start_header_id|>x<|eot_id|><start_of_turn>y<end_of_turn><|channel|>",
]


def test_same_ids_as_the_standard_backend(tokenizer):
    backend, standard = Backend(tokenizer, from_characters=0), Backend(tokenizer, fast=False)
    assert backend(TEXTS) == standard(TEXTS)
    assert backend([]) == []


def test_takes_the_faster_one_where_it_can_and_says_where_not():
    qwen3, llama2 = (Backend(load_tokenizer(name), from_characters=0) for name in ("qwen3", "llama2"))
    assert qwen3.wanted == llama2.wanted and qwen3.wanted.startswith("fastokens ")
    qwen3(["Hi"]), llama2(["Hi"])
    assert qwen3.name == qwen3.wanted and not qwen3.reason
    assert llama2.name.startswith("tokenizers ") and "Metaspace" in llama2.reason


def test_a_few_texts_do_not_wait_for_the_faster_one():
    backend = Backend(load_tokenizer("qwen3"), from_characters=20)
    assert [backend(["Hi there"]) for _ in range(3)] == [[array("i", (13048, 1052)).tobytes()]] * 3
    assert backend._fast is not None and Backend(load_tokenizer("qwen3"))(["Hi"]) == [array("i", [13048]).tobytes()]


def test_truncation_of_an_earlier_call_does_not_count():
    tokenizer = load_tokenizer("qwen3")
    tokenizer(["one two three"], truncation=True, max_length=1, padding="max_length")
    for fast in (True, False):
        assert len(Backend(tokenizer, fast=fast, from_characters=0)(["one two three"])[0]) == 3 * 4


def test_goes_to_other_processes():
    backend = Backend(load_tokenizer("smollm2"), from_characters=0)
    backend(["Hi"])
    again = pickle.loads(pickle.dumps(backend))
    assert again.name == backend.name and again(["Hi"]) == backend(["Hi"])


def other_ids(backend: Backend) -> Backend:
    """A faster tokenizer of another vocabulary, as one with a fault would be."""
    other = Backend(load_tokenizer("smollm2"), from_characters=0)
    backend(["Hi"]), other(["Hi"])
    backend._fast = other._fast
    return backend


def test_one_text_of_many_is_held_against_the_standard_one():
    backend = other_ids(Backend(load_tokenizer("qwen3"), from_characters=0))
    with pytest.raises(DifferentIdsError, match="你好"):
        backend(["你好"] * EVERY)


def test_rows_are_tokenised_again_after_a_difference(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MA_SFT_CACHE", str(tmp_path))
    chats = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"你好{n}"}] for n in range(100)]
    turns, rows = chats[0], Dataset.from_list([{"messages": turns, "tools": None} for turns in chats])
    tokenizer = load_tokenizer("qwen3")
    expected = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    encoder = ChatEncoder(tokenizer)
    encoder.backend = other_ids(Backend(tokenizer, from_characters=0))
    with caplog.at_level(logging.WARNING):
        assert tokenize(rows, encoder)["input_ids"][0] == expected
    assert "tokenising again, not by fastokens" in caplog.text and encoder.backend.name.startswith("tokenizers")
