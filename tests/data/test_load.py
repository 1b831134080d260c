"""A source means the same in every container; what is taken for granted of `datasets`; what worker processes have."""

import json
import os
import pickle
import threading
from itertools import product

import multiprocess
import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from helpers import assistant, user, write_rows

from ma_sft import FormatError, RecipeError
from ma_sft.data.functions import TextFunction
from ma_sft.data.load import Inherited, fingerprint_of, pklregister, processes, table_rows
from ma_sft.data.mixture import load_mixture

CALLS = [
    {
        "messages": [
            user("4"),
            assistant(None, tool_calls=[{"function": {"name": "f", "arguments": arguments}}]),
            {"role": "tool", "content": '{"n": 1.0}'},
            assistant("2024-01-02"),
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}],
    }
    for arguments, properties in (
        ({"q": "x", "lang": None}, {"q": {"type": "string"}, "lang": {"default": None}}),
        ({"n": 3.25, "big": 12345678901234567890}, {"n": {"type": "number"}}),
    )
]


class Indexed:
    """Any object with a length whose items are rows."""

    def __len__(self):
        return len(CALLS)

    def __getitem__(self, at):
        return CALLS[at]


KINDS = "jsonl list parquet arrow saved dataset transformed stream rows indexed iterator frame function".split()


# `datasets` waits 5 s at each end of a stream of Parquet files, of which `test_mixture.py` reads one.
@pytest.mark.parametrize(
    ("kind", "streaming"),
    [
        pytest.param(*each, marks=[pytest.mark.slow] * (each == ("parquet", True)))
        for each in product(KINDS, (False, True))
    ],
)
def test_a_source_means_the_same_in_every_container(tmp_path, kind, streaming):
    rows = Dataset.from_list(CALLS, on_mixed_types="use_json")
    stream = IterableDataset.from_generator(lambda: ({"id": 1, **row} for row in CALLS))
    if kind == "stream" and not streaming:
        with pytest.raises(RecipeError, match="is a stream: set dataset_streaming"):
            load_mixture([stream])
        return
    source = {
        "jsonl": lambda: write_rows(tmp_path / "rows.jsonl", CALLS),
        "list": lambda: (tmp_path / "a.json").write_text(json.dumps(CALLS, indent=1)) and tmp_path / "a.json",
        "parquet": lambda: rows.to_parquet(tmp_path / "a.parquet") and tmp_path / "a.parquet",
        "arrow": lambda: rows.save_to_disk(tmp_path / "s") or next((tmp_path / "s").glob("*.arrow")),
        "saved": lambda: rows.save_to_disk(tmp_path / "s") or tmp_path / "s",
        "dataset": lambda: rows,
        "transformed": lambda: Dataset.from_dict({"at": [0, 1]}).with_transform(
            lambda batch: {key: [CALLS[at][key] for at in batch["at"]] for key in CALLS[0]}
        ),
        "stream": lambda: stream,
        "rows": lambda: CALLS,
        "indexed": Indexed,
        "iterator": lambda: (row for row in CALLS),
        "frame": lambda: pd.DataFrame(CALLS),
        "function": lambda: lambda: iter(CALLS),
    }[kind]()
    found = sorted(load_mixture([{"path": source}], streaming=streaming).train, key=lambda row: "big" in str(row))
    assert [m["content"] for m in found[0]["messages"]] == ["4", "", '{"n": 1.0}', "2024-01-02"]
    arguments = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in found]
    assert arguments == ['{"q": "x", "lang": null}', '{"n": 3.25, "big": 12345678901234567890}']
    assert [json.loads(row["tools"]) for row in found] == [row["tools"] for row in CALLS]


@pytest.mark.parametrize("make", [list, pd.DataFrame, Dataset.from_list])
def test_bytes_are_their_text_in_every_container(make):
    source = make([{"instruction": "Why?", "input": b"", "output": "So: ä".encode()}])
    (row,) = load_mixture([{"path": source}]).train
    assert [message["content"] for message in row["messages"]] == ["Why?", "So: ä"]


def test_pandas_reads_a_file_of_arrow_with_its_nulls_and_without_rows(tmp_path):
    rows = [
        {"messages": [user("q"), assistant("", tool_calls=[call])]}
        for call in (
            {"function": {"name": "f", "arguments": {"a": "1"}}},
            {"function": {"name": "f", "arguments": {"b": [2]}}},
        )
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "1.parquet")
    pq.write_table(pq.read_table(tmp_path / "1.parquet").slice(0, 0), tmp_path / "2.parquet")
    for source in (str(tmp_path / "*.parquet"), pd.read_parquet(tmp_path / "1.parquet")):
        found = load_mixture([{"path": source}]).train
        arguments = {row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in found}
        assert arguments == {'{"a": "1"}', '{"b": [2]}'}
    for path in ("2.parquet", Dataset.from_dict({"question": [], "answer": []})):
        with pytest.raises(FormatError, match=r"the data set is empty"):
            load_mixture([{"path": tmp_path / path if isinstance(path, str) else path}], streaming=True)


@pytest.mark.parametrize("name", ["_row", "_place", "_start", "_number", "_error", "row", "source", "origin", "error"])
def test_a_column_may_have_any_name(name):
    for rows in (
        [{"question": "q", "answer": "a", name: 1}],
        Dataset.from_dict({"question": ["q"], "answer": ["a"], name: [1]}),
    ):
        (row,) = load_mixture([{"path": rows}]).train
        assert [m["content"] for m in row["messages"]] == ["q", "a"]


def test_a_table_of_pandas_and_a_function_as_format():
    frame = pd.DataFrame({"Q": ["2+2?", "3+3?"], "A": ["4", None], "n": [1, 2]})

    def chat(row):
        return [user(f"{row['n']}: {row['Q']}"), assistant(row["A"] or "?")]

    for streaming in (False, True):
        rows = load_mixture([{"path": frame, "format": chat}], streaming=streaming).train
        found = sorted([m["content"] for m in row["messages"]] for row in rows)
        assert found == [["1: 2+2?", "4"], ["2: 3+3?", "?"]]
    with pytest.raises(FormatError, match=r"row 1: chat failed at .*KeyError: .n."):
        load_mixture([{"path": frame.drop(columns="n"), "format": chat}])
    with pytest.raises(FormatError, match=r"row 2: field .answer. is missing or null"):
        load_mixture([{"path": frame, "columns": {"Q": "question", "A": "answer"}}])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_both_forms_of_formatting_func(count):
    rows = [{"q": f"Red {i}?"} for i in range(count)]
    for function in (
        lambda row: f"{row['q']}!",
        lambda row: [f"{row['q']}!"],  # as `formatting_func` of a row was written
        lambda batch: [f"{text}!" for text in batch["q"]],
    ):
        assert TextFunction(function)(rows) == [f"Red {i}?!" for i in range(count)]
    assert TextFunction("question-answer")([{"instruction": "a", "output": "b"}]) == ["###Question: a\n###Answer: b"]
    with pytest.raises(FormatError, match="a list of 3 texts for 3 rows expected, found list"):
        TextFunction(lambda batch: batch["q"][:2])([{"q": "x"}] * 3)


ROWS = Dataset.from_dict({"n": range(9)})


def test_datasets_keeps_what_decides_the_rows_in_fingerprint_and_their_order_in_indices():
    mapped = ROWS.map(lambda row: {"n": row["n"] + 1}, new_fingerprint="mine")
    assert fingerprint_of(mapped) == "mine" and fingerprint_of(ROWS) not in ("mine", fingerprint_of(ROWS.select([1])))
    assert table_rows(ROWS) is None
    shuffled = ROWS.shuffle(seed=3)
    rows = table_rows(shuffled)
    assert shuffled.data is ROWS.data or shuffled.data.equals(ROWS.data)
    assert rows.dtype == "int64" and rows.tolist() == shuffled["n"][:] != list(range(9))


def test_datasets_hashes_what_pklregister_says_of_a_class():
    class Held:
        """Of a class that only this test registers."""

        text = "one"

    @pklregister(Held)
    def _hash(pickler, held):
        pickler.save_reduce(str, (held.text,), obj=held)

    one, other = Held(), Held()
    other.unlike = "what is not said"
    assert Hasher.hash(one) == Hasher.hash(other)
    other.text = "other"
    assert Hasher.hash(one) != Hasher.hash(other)


def double(batch):
    return {"n": [2 * n for n in batch["n"]]}


@pytest.mark.skipif(multiprocess.get_start_method() != "fork", reason="workers are not forked on this system")
def test_forked_workers_have_what_cannot_be_pickled():
    lock = threading.Lock()

    def locked(batch):
        with lock:
            return double(batch)

    function = Inherited(locked)
    rows = Dataset.from_dict({"n": range(10)})
    found = rows.map(function, batched=True, num_proc=2, new_fingerprint="doubled")
    assert found["n"][:] == list(range(0, 20, 2))


def test_is_pickled_for_workers_that_are_started_anew(monkeypatch):
    monkeypatch.setattr(multiprocess, "get_start_method", lambda: "spawn")
    assert pickle.loads(pickle.dumps(Inherited(double)))({"n": [3]}) == {"n": [6]}


def test_each_process_has_rows_enough(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert [processes(None, rows) for rows in (100, 20_000, 100_000, 10**6)] == [None, 4, 20, 64]
    assert processes(1, 10**6) is None and processes(3, 5) == 3


def test_what_fails_while_rows_are_made_names_their_source():
    def rows():
        yield {"question": "q", "answer": "a"}
        raise OSError("gone")

    for source, message in (
        (rows, "function in memory: its rows cannot be read: OSError: gone"),
        (3, "int in memory: its rows cannot be read: TypeError: 'int' object is not iterable"),
        ({"q": ["a"], "a": ["b"]}, "dict in memory: its rows cannot be read: KeyError: 0"),
    ):
        for streaming in (False, True):
            with pytest.raises(FormatError, match=message):
                list(load_mixture([{"path": source}], streaming=streaming).train)
