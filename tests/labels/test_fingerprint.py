"""A change of what decides ids and labels is noticed, however it comes about; what decides nothing is not."""

import os
import runpy
import shutil
import sys
from functools import partial
from importlib import import_module

import datasets
import pytest
from helpers import write_rows

from ma_sft import Recipe
from ma_sft.data.functions import code_of
from ma_sft.data.mixture import load_mixture
from ma_sft.labels.templates import load_tokenizer as load
from ma_sft.labels.tokenize import check, label
from ma_sft.labels.verify import Verifier

ROWS = [{"question": f"q{n}?", "answer": f"a{n}"} for n in range(6)]
BRACKETS = (
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return tmp_path


def texts(model, **settings) -> list[str]:
    """What is trained in each row, prepared anew as a new process would."""
    found = Recipe(model_name_or_path=str(model), dataset_name="rows.jsonl", use_cpu=True, **settings).resolve()
    tokenizer, _ = load(found)
    labelled = label(found, tokenizer).dataset
    return sorted(tokenizer.decode([i for i in row if i != -100]) for row in labelled["labels"])


def edit(path, old: str, new: str) -> None:
    assert old in path.read_text()
    later = path.stat().st_mtime + 2  # Python tells its bytecode's file by size and second
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, (later, later))


def forget(*modules: str) -> None:
    """A new process has imported nothing."""
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def m(rows, tiny_bpe):
    """A model's folder that a test may change, with a template that writes the tokenizer's EOS."""
    shutil.copytree(tiny_bpe, rows / "m")
    (rows / "m" / "chat_template.jinja").write_text(BRACKETS)
    return rows / "m"


def test_end_token_of_the_tokenizer_and_template_variables(m):
    assert all(text.endswith("<|im_end|>") for text in texts(m))
    edit(m / "tokenizer_config.json", '"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"')
    assert all(text.endswith("<|endoftext|>") for text in texts(m))
    edit(m / "chat_template.jinja", "eos_token }}", "(mood or '') + eos_token }}")
    for mood in "!?":
        assert texts(m, template_kwargs={"mood": mood})[0] == f"a0{mood}<|endoftext|>"


def test_formatting_func_of_a_module(rows, tiny_bpe):
    (rows / "form.py").write_text(
        'def text(batch):\n    return ["###Question: " + q + "\\n###Answer: " + a '
        'for q, a in zip(batch["question"], batch["answer"])]\n'
    )
    settings = {"formatting_func": "form:text", "response_template": "###Answer:"}
    assert texts(tiny_bpe, **settings)[0] == " a0<|im_end|>"
    edit(rows / "form.py", '"\\n###Answer: " + a', '"\\n###Answer: " + a.upper() + "!"')
    forget("form")
    assert texts(tiny_bpe, **settings)[0] == " A0!<|im_end|>"


@pytest.mark.parametrize("name", ["conv:chat", "conv.py:chat"])
def test_helper_that_a_format_function_imports(rows, tiny_bpe, name):
    (rows / "deep").mkdir()
    for path, code in {
        "deep/__init__.py": "",
        "deep/words.py": "SUFFIX = ' one'\n",
        "helper.py": "from deep import words\n\ndef answer(row):\n    return row['answer'] + words.SUFFIX\n",
        "conv.py": "def chat(row):\n    from helper import answer as say\n    question = row['question']\n"
        "    return [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': say(row)}]\n",
    }.items():
        (rows / path).write_text(code)
    for word, next_word in (("one", "two"), ("two", "six")):
        forget("conv", "helper", "deep", "deep.words")
        assert f"a0 {word}" in texts(tiny_bpe, dataset_format=name)[0]
        edit(rows / "deep" / "words.py", word, next_word)


def test_code_of_a_function_is_its_own_and_not_the_libraries(rows):
    (rows / "alone.py").write_text(
        "import json\nimport numpy\nfrom ma_sft import Recipe\n\n\ndef f(row):\n    return row\n"
    )
    assert code_of("alone:f") == code_of("alone.py:f") == (rows / "alone.py").read_text()
    assert code_of("alpaca") == code_of(None) == ""


@pytest.mark.parametrize("where", ["imported", "of a recipe", "partial", "object"])
def test_a_function_itself_is_run_again_where_it_or_what_it_imports_changed(rows, where):
    """`datasets` hashes a function that can be imported by its name."""
    words = rows / "words.py"
    (rows / "turns.py").write_text(
        "from words import word\n\n\ndef turns(row, more=''):\n    return [{'role': 'user', 'content': 'q'}, "
        "{'role': 'assistant', 'content': word + 'red' + more}]\n\n\n"
        "class Turns:\n    def __call__(self, row):\n        return turns(row)\n"
    )

    def answer():
        forget("turns", "words")
        found = runpy.run_path(str(rows / "turns.py")) if where == "of a recipe" else vars(import_module("turns"))
        function = {"partial": partial(found["turns"], more=""), "object": found["Turns"]()}.get(where, found["turns"])
        (row,) = load_mixture([{"path": [{"q": "a"}], "format": function}]).train
        return row["messages"][1]["content"]

    words.write_text("word = 'one '\n")
    assert answer() == "one red"
    edit(words, "one", "two")
    assert answer() == "two red"
    edit(rows / "turns.py", "red", "sad")
    assert answer() == "two sad"


def test_what_decides_nothing_is_found_again(rows, tiny_bpe, monkeypatch):
    from ma_sft.labels import encoder

    first = texts(tiny_bpe, learning_rate=1e-3)
    monkeypatch.setattr(encoder.ChatEncoder, "tokenize_batch", None)  # nothing may be tokenised again
    assert texts(tiny_bpe, learning_rate=1e-4, logging_steps=3) == first


def test_tokens_are_written_once(rows, tiny_bpe, monkeypatch):
    """One copy of ids and labels on the disk, whoever keeps it."""
    monkeypatch.setenv("MA_SFT_CACHE", str(rows / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", rows / "datasets")
    texts(tiny_bpe)
    found = [path for name in ("cache", "datasets") for path in (rows / name).rglob("*.arrow")]
    columns = [set(datasets.Dataset.from_file(str(path)).column_names) for path in found]
    assert sum("input_ids" in names for names in columns) == 1


def test_report_without_errors_is_kept_with_what_was_verified(rows, tiny_bpe, monkeypatch):
    """All is verified again where rows, stop tokens, the sample or a byte of the cache is another."""
    monkeypatch.setenv("MA_SFT_CACHE", str(rows / "cache"))
    shutil.copytree(tiny_bpe, rows / "m")
    verified = []
    real = Verifier.verify_batch

    def counted(self, conversations):
        conversations = list(conversations)
        verified.extend(conversations)
        return real(self, conversations)

    monkeypatch.setattr(Verifier, "verify_batch", counted)

    def report(every_row=False):
        verified.clear()
        found = Recipe(model_name_or_path="m", dataset_name="rows.jsonl", use_cpu=True).resolve()
        tokenizer, _ = load(found)
        return check(found, tokenizer, label(found, tokenizer), every_row=every_row), len(verified)

    first, count = report()
    assert count == len(ROWS) and first.proven
    assert report() == (first, 0)
    assert report(every_row=True)[1] == len(ROWS)

    (rows / "m" / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    assert report()[1] == len(ROWS)

    [arrow] = (rows / "cache" / "tokenized").rglob("rows.arrow")
    with arrow.open("ab") as file:
        file.write(b"\0")  # after the end of the stream: the rows read the same
    assert report()[1] == len(ROWS) and report()[1] == 0

    with (rows / "rows.jsonl").open("a") as file:
        file.write('\n{"question": "one more?", "answer": "yes"}')
    longer, count = report()
    assert count == len(ROWS) + 1 and longer.rows == len(ROWS) + 1
