"""Sources of every kind, drawn by weight, held out and streamed: the same rows each time, and none lost unseen."""

import csv
import gzip
import io
import json
import re
from collections import Counter

import pytest
import zstandard
from datasets import Dataset, DatasetDict, IterableDataset
from helpers import ROOT, assistant, system, user, write_rows
from rich.console import Console

from ma_sft import FormatError, MaSftError, RecipeError
from ma_sft.data.mixture import load_mixture, read_mixture

ROWS = [{"instruction": f"What is {i} + {i}?", "input": "", "output": f"It is {2 * i}."} for i in range(40)]


def questions(rows):
    return [row["messages"][-2]["content"] for row in rows]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same forty rows in every kind of file and folder."""
    tmp_path = tmp_path_factory.mktemp("files")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    rows = Dataset.from_list(ROWS)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n\n").encode())
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "list.json.zst").write_bytes(zstandard.compress(json.dumps(ROWS).encode()))
    rows.to_parquet(tmp_path / "rows.parquet")
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with (tmp_path / f"rows{suffix}").open("w", newline="") as file:
            table = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(ROWS)
    rows.save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"train": rows.select([0]), "all": rows}).save_to_disk(str(tmp_path / "splits"))
    for part in range(4):
        write_rows(tmp_path / f"part[{part}].jsonl", ROWS[10 * part : 10 * part + 10])
    return tmp_path


# Where the thirteenth row stands, if not in line or row 13.
THIRTEENTH = dict.fromkeys("rows.jsonl lines.json list.json rows.jsonl.gz rows.jsonl.zst list.json.zst".split())
THIRTEENTH |= dict.fromkeys("rows.parquet saved splits".split())
THIRTEENTH |= {"bom.jsonl": "bom.jsonl:25", "rows.csv": "rows.csv:14", "rows.tsv": "rows.tsv:14"}
THIRTEENTH |= {"part*.jsonl": "part[1].jsonl:3"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", THIRTEENTH)
def test_sources(files, name, streaming):
    source = {"path": str(files / name), "split": "all" if name == "splits" else "train"}
    rows = list(load_mixture([source], streaming=streaming).train)
    assert sorted(questions(rows)) == sorted(row["instruction"] for row in ROWS)
    place = next(row["origin"] for row in rows if questions([row]) == ["What is 12 + 12?"])
    assert place.endswith(f"/{THIRTEENTH[name] or f'{name}:13'}")


def test_a_changed_file_is_read_again(tmp_path):
    for count in (3, 5):
        assert len(load_mixture([write_rows(tmp_path / "a.jsonl", ROWS[:count])]).train) == count


def test_an_edited_function_is_run_again(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"q": "x", "a": "y"}])
    code = tmp_path / "mine.py"
    sources = [{"path": path, "format": f"{code}:turns"}]
    for answer, found in (("a", "y"), ("q", "x")):
        code.write_text(
            "def turns(row):\n    return [{'role': 'user', 'content': row['q']}, "
            f"{{'role': 'assistant', 'content': row[{answer!r}]}}]\n\ndef keep(messages):\n    return {answer == 'a'}\n"
        )
        assert load_mixture(sources).train[0]["messages"][1]["content"] == found
        if answer == "a":
            load_mixture(sources, filters={"function": f"{code}:keep"})
    with pytest.raises(FormatError, match="every row was filtered"):
        load_mixture(sources, filters={"function": f"{code}:keep"})


def test_csv_cells_stay_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\n\nquestion,answer\n"How many?\nSay a number.",007\n\nAny left?,None\nWhich?,"NA"\n')
    rows = load_mixture([str(path)]).train
    found = {row["origin"].rpartition(":")[2]: row["messages"][-1]["content"] for row in rows}
    assert found == {"4": "007", "7": "None", "8": "NA"}  # blank lines are no rows, and are counted


LINE = b'{"instruction": "x", "output": "y"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINE + b'{"instruction": "x", "outp', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", LINE + b"\n7\n", "a.jsonl, line 3: a JSON object expected, found int"),
        ("a.jsonl", LINE + b'{"messages": []}\n', "line 2: field 'instruction' is missing"),
        ("a.jsonl", LINE + b'{"instruction": "x"}\n', "line 2: field 'output' is missing"),
        ("a.jsonl", LINE.replace(b'"y"', b'["y", "z"]'), "a.jsonl, line 1: field 'output': text expected, found list"),
        ("a.jsonl", LINE.replace(b"y", b"\\ud800"), "line 1: field 'output' holds a lone surrogate"),
        ("a.jsonl", LINE.replace(b'"x"', b'"\\u0000"'), "line 1: field 'instruction' holds a NUL"),
        ("a.jsonl", LINE * 2 + LINE.replace(b"}", b', "output": "b"}'),
         "a.jsonl, line 3: not valid JSON: the key 'output' stands twice"),
        ("a.jsonl", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not valid JSON: maximum recursion depth"),
        ("a.jsonl", b"PK\x03\x04 no text at all", "a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", "ä".encode("latin-1"), "a.jsonl, line 1: not UTF-8 text"),
        ("a.json", b"[" + LINE.strip() + b',\n {"instr', "a.json, line 2: not valid JSON"),
        ("a.json", b"[" + LINE.strip() + b"] 7", "line 1: not valid JSON: Extra data"),
        ("a.json", b'{"data": [\n1}', "a.json, line 2: not valid JSON"),
        ("a.json", b'{\n "a": 1,\n "b" 2}', "a.json, line 3: not valid JSON"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.json", b'{"data": [' + LINE.replace(b"}", b', "output": "b"}') + b"]}", "the key 'output' stands twice"),
        ("a.json", b'{"x": [{"a": 1}], "y": [{"b": 1}]}', "rows may be in ['x', 'y']; say which: field"),
        ("a.jsonl.gz", LINE, "a.jsonl.gz: cannot be read as jsonl: Not a gzipped file"),
        ("a.parquet", LINE, "a.parquet: cannot be read as parquet"),
        ("a.xlsx", b"PK\x03\x04", "exists, but it is none of .jsonl"),
        ("a.csv", b"instruction,output\nx,y,z\n", "a.csv, line 2: more cells than the 2 columns"),
        ("a.csv", b'instruction,output\nx,"y', "a.csv, line 2: not valid CSV"),
        ("a.csv", b"instruction,output\nx\n", "line 2: unknown format: columns ['instruction']; nearest: alpaca"),
        ("a.csv", b"instruction,reply\nx,y\n", "line 2: unknown format: columns ['instruction', 'reply']"),
        ("a.csv", "instruction\toutput\na\tb\n".encode("utf-16"), "a.csv, line 1: not UTF-8 text: save it as UTF-8"),
        ("a.csv", b"q,a,q\n1,2,3\n", "line 1: column 'q' stands twice"),
        ("a.csv", b"question,answer\nq,a\nquestion,answer\n", "a.csv, line 3: the names of the columns once more"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for streaming in (False, True):
        with pytest.raises(FormatError) as error:
            list(load_mixture([str(tmp_path / name)], streaming=streaming).train)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_the_right_file_of_several(tmp_path):
    write_rows(tmp_path / "1.jsonl", ROWS[:5])
    write_rows(tmp_path / "2.jsonl", [*ROWS[5:8], {"instruction": "x", "output": None}])
    with pytest.raises(FormatError, match=r"/2\.jsonl, line 4: field 'output' is missing or null"):
        load_mixture([str(tmp_path / "*.jsonl")])


@pytest.mark.parametrize("second", ["3", "[", '{"instruction": "y",', '{"instruction": "y"}'])
def test_a_first_line_that_is_cut_off_is_one_broken_row(tmp_path, second):
    path = write_rows(tmp_path / "a.jsonl", ['{"instruction": "x",', second, *ROWS[:3]])
    with pytest.raises(FormatError, match=r"a\.jsonl, line 1: not valid JSON"):
        load_mixture([path])
    found = load_mixture([path], on_error="skip")
    assert len(found.train) == 3 and found.report.skipped == 2


def test_skipped_rows_are_counted(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ["{broken", *ROWS[:3], {**ROWS[0], "output": ""}, {"messages": []}])
    report = load_mixture([path], on_error="skip").report
    convert = next(stage for stage in report.stages if "convert" in stage.name)
    assert (convert.rows_in, convert.rows_out, report.skipped) == (6, 3, 3)
    lines = [re.search(r"line \d", example)[0] for example in convert.examples["broken rows"]]
    assert lines == ["line 1", "line 5", "line 6"]


def test_a_drawn_row_keeps_its_number(tmp_path):
    Dataset.from_list([*ROWS[:30], {**ROWS[30], "output": ""}]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(FormatError, match=r"saved, row 31: the response is empty"):
        load_mixture([{"path": str(tmp_path / "saved"), "limit": 30}], seed=3)
    numbers = {row["instruction"]: number for number, row in enumerate(ROWS, 1)}
    for row in load_mixture([{"path": str(tmp_path / "saved"), "limit": 7}], seed=1).train:
        assert row["origin"].endswith(f"saved:{numbers[questions([row])[0]]}")


def test_columns_limit_system_prompt_and_group(tmp_path):
    rows = [{"q": row["instruction"], "a": row["output"], "talk": i // 4} for i, row in enumerate(ROWS)]
    source = {"path": write_rows(tmp_path / "a.jsonl", rows), "columns": {"q": "question", "a": "answer"}, "limit": 20}
    source |= {"system_prompt": "Be brief.", "group_by": "talk"}
    mixture = load_mixture([source], test_size=0.2)
    assert len(mixture.train) + len(mixture.test) == 20
    assert mixture.train[0]["messages"][0] == system("Be brief.")
    assert not set(mixture.train["group"]) & set(mixture.test["group"])
    missing = r"line 1: field 'query' of the column map is missing; found \['a', 'q', 'talk'\]"
    with pytest.raises(FormatError, match=missing):
        load_mixture([{**source, "columns": {"query": "question"}}])
    with pytest.raises(FormatError, match="field 'user' is missing or null; group_by needs it"):
        load_mixture([{**source, "group_by": "user"}])


def test_seed_decides(tmp_path):
    one, two = write_rows(tmp_path / "1.jsonl", ROWS[:20]), write_rows(tmp_path / "2.jsonl", ROWS[20:])
    sources = [{"path": one, "weight": 1, "limit": 15}, {"path": two, "weight": 2}]
    first, again, other = (questions(load_mixture(sources, seed=seed).train) for seed in (1, 1, 2))
    assert first == again != other


def test_weights_without_and_with_repetition(tmp_path):
    many = [{"instruction": f"Many {i}?", "output": "x"} for i in range(600)]
    one, two = write_rows(tmp_path / "1.jsonl", ROWS), write_rows(tmp_path / "2.jsonl", many)
    sources = [{"path": one, "weight": 1}, {"path": two, "weight": 3}]
    mixture = load_mixture(sources)
    found = Counter(questions(mixture.train))
    assert set(found.values()) == {1}
    small = sum(question.startswith("What") for question in found)
    assert small == 40 and 80 < len(found) - small < 160  # three to one, until the small source is used up
    assert [s["used"] for s in mixture.report.sources] == [small, len(found) - small]

    repeated = Counter(questions(load_mixture(sources, stopping_strategy="all_exhausted").train))
    assert sum(n for question, n in repeated.items() if question.startswith("Many")) == 600
    assert min(repeated.values()) >= 1 and len(repeated) == 640
    assert 4 <= sum(n for q, n in repeated.items() if q.startswith("What")) / 40 <= 6
    whole = Counter(questions(load_mixture(sources, stopping_strategy="all_exhausted_without_replacement").train))
    assert len(whole) == 640 and set(whole.values()) == {1}
    with pytest.raises(RecipeError, match="weight: all sources need one"):
        load_mixture([{"path": one, "weight": 1}, two])


def test_rows_held_out_are_never_repeated_in_training(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    sources = [{"path": path, "weight": 1}, {"path": path, "weight": 2, "system_prompt": "Be brief."}]
    mixture = load_mixture(sources, test_size=0.25, stopping_strategy="all_exhausted", seed=4)
    assert len(mixture.test) == 20
    assert not set(questions(mixture.test)) & set(questions(mixture.train))


def test_sources_of_different_shape_go_together(tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    result = {"role": "tool", "content": "2", "tool_call_id": "c1"}
    messages = [user("Add."), assistant(None, tool_calls=[call]), result, assistant("Two.")]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    rich = write_rows(tmp_path / "1.jsonl", [{"messages": messages, "tools": tools}])
    rows = load_mixture([write_rows(tmp_path / "2.jsonl", ROWS), rich]).train
    row = next(row for row in rows if row["tools"])
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert json.loads(row["tools"]) == tools


def test_stream(tmp_path, caplog):
    many = [{"instruction": f"Many {i}?", "output": "x" * i} for i in range(300)]
    one, two = write_rows(tmp_path / "1.jsonl", [*ROWS, "{broken"]), write_rows(tmp_path / "2.jsonl", many)
    sources = [{"path": one, "weight": 1, "limit": 41}, {"path": two, "weight": 1, "filters": {"max_chars": 50}}]
    stream = load_mixture(sources, on_error="skip", streaming=True, stopping_strategy="all_exhausted").train
    assert isinstance(stream, IterableDataset)
    rows = questions(stream)
    assert rows == questions(stream) and rows != sorted(rows)
    assert {row["instruction"] for row in ROWS} <= set(rows)
    assert all(int(re.search(r"\d+", row)[0]) <= 50 for row in rows if row.startswith("Many"))
    assert "line 41: not valid JSON" in caplog.text and "max_chars" in caplog.text
    for settings, message in (
        ({"test_size": 0.1}, "cannot hold out rows"),
        ({"filters": {"exact_duplicates": True}}, "need to see all rows"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_mixture(sources, streaming=True, **settings)
    with pytest.raises(RecipeError, match="several streams need a weight each"):
        load_mixture([one, two], streaming=True)


def test_many_processes_give_the_same_rows(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [*ROWS, *ROWS[:5]])
    filters = {"exact_duplicates": True, "near_duplicates": 0.95}
    alone, together = (load_mixture([path], filters=filters, num_proc=n, test_size=5) for n in (1, 2))
    assert questions(alone.train) == questions(together.train) and len(alone.test) == 5
    (tmp_path / "b.jsonl").write_bytes(b"\xff" * 10)
    with pytest.raises(FormatError, match=r"b\.jsonl, line 1: not UTF-8 text"):
        load_mixture([str(tmp_path / "*.jsonl")], num_proc=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"datasets": []}, "datasets: a list of sources expected"),
        ({"datasets": ["rows/*"]}, "the file 'rows/*' does not exist"),
        ({"datasets": [{"file": "x"}]}, "unexpected keyword argument 'file'; keys are path, name"),
        ({"datasets": [{"path": "x.jsonl", "limit": "ten"}]}, "Field 'limit' with value 'ten'"),
        ({"datasets": [{"path": "x.jsonl", "columns": ["a"]}]}, "Field 'columns' expected a dict"),
        ({"kind": "chat"}, "kind: conversation or preference"),
        ({"filters": {"max_char": 5}}, "unexpected keyword argument 'max_char'"),
        ({"filters": {"max_chars": "5"}}, "Field 'max_chars'"),
        ({"filters": {"max_tokens": 5}}, "set tokenizer"),
        ({"filters": {"max_chars": 1}}, "every row was filtered: 40 by max_chars"),
        ({"test_size": 40}, "leaves nothing to train on"),
        ({"test_size": 0.001}, "leaves nothing to hold out"),
    ],
)
def test_wrong_settings(tmp_path, settings, message):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(MaSftError) as error:
        load_mixture(**{"datasets": [path], **settings})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_mixture_of_the_documentation(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/formats.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "chats").mkdir()
    (tmp_path / "mixture.yaml").write_text(text.replace("Qwen/Qwen3-0.6B", "demo").replace("0.02", "0.2"))
    lines = "".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[0], {"instruction": 5}])
    (tmp_path / "chats" / "1.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    sums = [{"task": f"{i} - 1 is what?", "result": f"{i - 1} is left, says the book."} for i in range(30)]
    Dataset.from_list(sums).to_parquet(tmp_path / "maths.parquet")
    settings = read_mixture(tmp_path / "mixture.yaml")
    for source in settings["datasets"]:
        source["path"] = str(tmp_path / source["path"])
    mixture = load_mixture(**settings)
    assert mixture.report.skipped == 1 and mixture.report.filtered["exact_duplicates"] == 1
    assert len(mixture.test) and {s["license"] for s in mixture.report.sources} == {"cc-by-4.0", "mit"}


def test_report_is_a_table(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [*ROWS, ROWS[0]])
    report = load_mixture([path], filters={"exact_duplicates": True}).report
    console = Console(width=200, file=io.StringIO())
    console.print(report)
    text = console.file.getvalue()
    assert "exact_duplicates" in text and "a.jsonl:41: like" in text and "rows/s" in text
