"""A row means what it says: nothing that it states is lost, nothing that it forbids is trained, no column unsaid."""

import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, DatasetDict
from helpers import ROOT, assistant, system, user
from rich.console import Console

from ma_sft import FormatError, RecipeError, to_messages, to_preference
from ma_sft.data.formats import detect_format, read_row
from ma_sft.data.functions import formatting_func
from ma_sft.data.load import Source
from ma_sft.data.messages import BadAnswer, to_tools
from ma_sft.data.mixture import load_mixture

CASES = ROOT / "tests/files/rows"


def call(name, arguments="{}", **more):
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


def present(value):
    """Without the nulls of Arrow."""
    if isinstance(value, dict):
        return {key: present(item) for key, item in value.items() if item is not None}
    return [present(item) for item in value] if isinstance(value, list) else value


def load(path, **source):
    """All rows of a file, in its order, as they go to the encoder; and the report."""
    mixture = load_mixture([{"path": str(path), **source}])
    rows = sorted(mixture.train, key=lambda row: int(row["origin"].rpartition(":")[2]))
    return [present(row) for row in rows], mixture.report


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "conversations"),
    [
        ("ceval.jsonl", [[user("Which is a prime?\nA. 4\nB. 6\nC. 7\nD. 9"), assistant("C. 7")]]),
        ("history.jsonl", [[user("2+2?"), assistant("4"), user("And 3+3?"), assistant("6")]]),
        ("context.jsonl", [[user("In 1998 France beat Brazil.\n\nWho won?"), assistant("France")]]),
        ("system_column.jsonl", [[system("Answer only in French."), user("Hello"), assistant("Bonjour")]]),
        ("system_prompt_column.jsonl", [[system("S"), user("q"), assistant("r")], [user("q2"), assistant("r2")]]),
        ("loss_false.jsonl", [[user("a"), assistant("WRONG", train=False), user("b"), assistant("right")]]),
        ("train_false.jsonl", [[user("a"), assistant("WRONG", train=False), user("b"), assistant("right")]]),
        ("text_parts_loss_weight.jsonl", [[user("hi"), assistant("yo")]]),
        ("glm4_tools.jsonl", [[user("q"), assistant('{"name": "f"}')]]),
        (
            "openai_functions.jsonl",
            [
                [
                    user("q"),
                    assistant("", tool_calls=[call("f")]),
                    {"role": "tool", "name": "f", "content": "1"},
                    assistant("x"),
                ]
            ],
        ),
        (
            "parallel_calls.jsonl",
            [
                [
                    user("q"),
                    assistant("", tool_calls=[call("f"), call("g")]),
                    {"role": "tool", "content": "1"},
                    {"role": "tool", "content": "2"},
                    assistant("x"),
                ]
            ],
        ),
        ("trl_implicit_prompt.jsonl", [[user("q"), assistant("good")]]),
        ("human_assistant_list.jsonl", [[user("q"), assistant("a")]]),
        ("pretty_object.json", [[user("a"), assistant("b")]]),
        *(
            (name, [[user(f"问{i}"), assistant(f"答{i}\n```py\n  x = 1\n```\n ")] for i in range(3)])
            for name in ("list_named.jsonl", "wrapped.json", "alpaca.ndjson")
        ),
    ],
)
def test_cases(name, conversations):
    assert [row["messages"] for row in load(CASES / name)[0]] == conversations


def test_tools_of_a_system_turn_and_of_old_are_the_rows_tools():
    for name, parameters in (("glm4_tools.jsonl", {}), ("openai_functions.jsonl", {})):
        ((row,), _) = load(CASES / name)
        schema = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        assert json.loads(row["tools"]) == [schema]
    tool = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
    expected = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert json.loads(to_tools({"tools": [tool]})) == [{"type": "function", "function": expected}]
    assert to_tools({"tools": ['{"name": "f"}']}) == '[{"name": "f"}]'  # When2Call's
    with pytest.raises(FormatError, match="two different lists of tools, in tools and functions"):
        to_tools({"tools": [{"name": "f"}], "functions": [{"name": "g"}]})


def test_images_are_refused():
    with pytest.raises(FormatError, match=r"images\.jsonl, line 1: field 'images': only text can be trained on"):
        load(CASES / "images.jsonl")
    with pytest.raises(FormatError, match=r"'image': only .*; TRL's examples/scripts/sft_vlm.py trains on images; if"):
        to_messages({"messages": [user("?"), assistant("x")], "image": {"bytes": b"x"}})
    # where the user says that they do not matter, the text is trained
    assert len(load(CASES / "images.jsonl", ignore=["images"])[0]) == 1
    assert to_messages({"messages": [user("<image>?"), assistant("x")], "images": [], "audio": None})
    with pytest.raises(FormatError, match=r"field 'messages\[0\].images'"):
        to_messages({"messages": [{**user("x"), "images": ["1.jpg"]}, assistant("x")]})


def test_bad_answers_are_counted_and_never_trained(tmp_path):
    good = {"prompt": "Capital of France?", "completion": "Paris", "label": True}
    bad = json.loads((CASES / "kto.jsonl").read_text())
    rows, report = load(write(tmp_path / "kto.jsonl", good, bad))
    assert [row["messages"][1]["content"] for row in rows] == ["Paris"]
    assert report.skipped == 1 and report.stages[1].removed == {"bad answers": 1}
    assert "line 2: field 'label': bool false marks a bad answer" in report.stages[1].examples["bad answers"][0]
    assert report.unused == {}
    with pytest.raises(FormatError, match="every row was skipped"):
        load(CASES / "kto.jsonl")
    for mark in ({"kto_tag": False}, {"kto_tag": 0}, {"label": "False"}):
        with pytest.raises(BadAnswer):
            to_messages({"messages": [user("q"), assistant("x")], **mark})
    for label in (0, 1):
        with pytest.raises(FormatError, match="write true or false"):
            to_messages({"question": "q", "answer": "a", "label": label})
    assert read_row({"question": "q", "answer": "a", "label": "positive"}).unused == {"label": 'str "positive"'}


def test_columns_that_change_the_meaning_are_never_left_out():
    plain = {"question": "q", "answer": "a"}
    for column in ("options", "choice_a", "optionB", "A", "image_path", "videos", "distractor1"):
        row = {**plain, column: ["x", "y"] if column == "options" else "x"}
        with pytest.raises(FormatError, match=f"field '{column}': .*no place for"):
            to_messages(row, "question-answer")
        assert to_messages({**plain, column: None}) == [user("q"), assistant("a")]


def test_a_bare_text_is_not_a_part_of_something_else():
    for row in ({"text": "x", "label": 1}, {"text": "x", "role": "prompter", "parent_id": None, "message_id": "1"}):
        with pytest.raises(FormatError, match="trained only where asked: format: text"):
            to_messages(row)
        assert to_messages(row, "text") == [assistant("x")]
    assert to_messages({"text": "x", "url": "https://a"}) == [assistant("x")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_nulls_that_arrow_adds_are_not_learned(tmp_path, kind):
    """The same rows as text, in a file of Parquet and in a saved folder are the same conversations."""
    table = pq.read_table(CASES / "tool_calls_mixed.parquet")
    if kind == "parquet":
        path = CASES / "tool_calls_mixed.parquet"
    elif kind == "saved":
        Dataset(table).save_to_disk(str(path := tmp_path / "saved"))
    else:
        path = write(tmp_path / "a.jsonl", *(present(row) for row in table.to_pylist()))
    rows, _ = load(path)
    calls = [c["function"] for row in rows for m in row["messages"] for c in m.get("tool_calls", [])]
    assert [c["arguments"] for c in calls] == ['{"city": "Paris"}', '{"n": 3, "opts": {"deep": true}}', "{}"]
    assert [json.loads(row["tools"])[0]["function"] for row in rows[:2]] == [
        {
            "name": "f",
            "description": "d",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
        {
            "name": "g",
            "parameters": {"type": "object", "properties": {"n": {"type": "integer"}, "opts": {"type": "object"}}},
        },
    ]
    assert all("tools" not in row for row in rows[2:])


def test_a_null_that_was_written_stays():
    message = assistant(None, tool_calls=[{"function": {"name": "f", "arguments": {"n": None}}}])
    assert to_messages({"messages": [user("q"), message]})[1]["tool_calls"] == [call("f", '{"n": null}')]


def test_bytes_are_text_or_refused(tmp_path):
    columns = {"instruction": [b"a", "ü".encode()], "output": [b"b", b"\xff"]}
    pq.write_table(pa.table({k: pa.array(v, pa.binary()) for k, v in columns.items()}), tmp_path / "a.parquet")
    rows = load_mixture([str(tmp_path / "a.parquet")], on_error="skip")
    assert [m["content"] for m in rows.train[0]["messages"]] == ["a", "b"]
    with pytest.raises(FormatError, match=r"a\.parquet, row 2: field 'output': text expected, found dict .*no UTF-8"):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "mark", [{key: 0} for key in ("weight", "loss", "loss_scale", "loss_weight", "train", "training")]
)
def test_turns_marked_not_to_be_trained(mark):
    for row in (
        {"messages": [user("a"), {**assistant("b"), **mark}, user("c"), assistant("d")]},
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b", **dict.fromkeys(mark, False)},
                {"from": "human", "value": "c"},
                {"from": "gpt", "value": "d", **dict.fromkeys(mark, 1.0)},
            ]
        },
        {"conversation": [{"input": "a", "output": "b", **mark}, {"input": "c", "output": "d"}]},
    ):
        assert to_messages(row) == [user("a"), assistant("b", train=False), user("c"), assistant("d")]
    for nothing in (None, ""):  # an empty cell of a CSV file
        said = dict.fromkeys(mark, nothing)
        assert to_messages({"messages": [user("a"), {**assistant("b"), **said}]}) == [user("a"), assistant("b")]
        assert to_messages({"question": "a", "answer": "b", **said}) == [user("a"), assistant("b")]
    for wrong in (0.5, "maybe", 2):
        with pytest.raises(FormatError, match="a turn is trained"):
            to_messages({"messages": [user("a"), {**assistant("b"), **dict.fromkeys(mark, wrong)}]})


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (
            {"question": "And?", "answer": "6", "history": [user("2+2?"), assistant("4")], "system": "S"},
            [system("S"), user("2+2?"), assistant("4"), user("And?"), assistant("6")],
        ),
        (
            {"prompt": "And?", "completion": "6", "history": '[["2+2?", "4"]]'},
            [user("2+2?"), assistant("4"), user("And?"), assistant("6")],
        ),
        (
            {"system": "S", "messages": [system("S"), user("q"), assistant("a")]},
            [system("S"), user("q"), assistant("a")],
        ),
        ({"question": "q", "answer": "a", "knowledge": ["k1", "k2"]}, [user("k1\n\nk2\n\nq"), assistant("a")]),
        (
            {"passage": "p", "question": "q", "options": ["x", "y"], "answer": "B"},
            [user("p\n\nq\nA. x\nB. y"), assistant("B. y")],
        ),
        ({"question": "q", "options": {"A": "x", "B": "y"}, "answer": "y"}, [user("q\nA. x\nB. y"), assistant("B. y")]),
        ({"question": "q", "choices": ["3", "4"], "answer": "4"}, [user("q\nA. 3\nB. 4"), assistant("B. 4")]),
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, [user("q"), assistant("a")]),
        ({"conversation": [{"system": "S", "input": "q", "output": "a"}]}, [system("S"), user("q"), assistant("a")]),
        (
            {
                "messages": [
                    user([{"type": "text", "text": "q"}]),
                    assistant(
                        [
                            {"type": "thinking", "thinking": "hm", "signature": "s"},
                            {"type": "text", "text": "Let me see."},
                            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
                            {"type": "tool_use", "id": "c2", "name": "g", "input": {}},
                        ]
                    ),
                    user(
                        [
                            {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "1"}]},
                            {"type": "tool_result", "tool_use_id": "c2", "content": "2"},
                            {"type": "text", "text": "Well?"},
                        ]
                    ),
                    assistant([{"type": "text", "text": "x"}]),
                ]
            },
            [
                user("q"),
                assistant(
                    "Let me see.",
                    reasoning_content="hm",
                    tool_calls=[call("f", '{"a": 1}', id="c1"), call("g", id="c2")],
                ),
                {"role": "tool", "content": "1", "tool_call_id": "c1"},
                {"role": "tool", "content": "2", "tool_call_id": "c2"},
                user("Well?"),
                assistant("x"),
            ],
        ),
        (
            {
                "messages": [
                    user("q"),
                    assistant(None, tool_calls=[{"function": {"name": "f", "arguments": ""}}]),
                    {"role": "tool", "content": {"rain": None}},
                    assistant(None, tool_calls=[{"function": {"name": "f", "arguments": '"{\\"a\\": 1}"'}}]),
                    {"role": "tool", "content": None},
                    assistant("x"),
                ]
            },
            [
                user("q"),
                assistant("", tool_calls=[call("f")]),
                {"role": "tool", "content": '{"rain": null}'},
                assistant("", tool_calls=[call("f", '{"a": 1}')]),
                {"role": "tool", "content": ""},
                assistant("x"),
            ],
        ),
        (
            {"messages": [user("q"), assistant("I look."), {"role": "tool_call", "content": '{"name": "f"}'}]},
            [user("q"), assistant("I look.", tool_calls=[call("f")])],
        ),
        (
            {"system": "S", "chat": "USER: q\n\n\nASSISTANT: <functioncall> {} <|endoftext|>\n\n\n"
             "FUNCTION RESPONSE: 1\n\n\nASSISTANT: x <|endoftext|>\n\n\n"},
            [system("S"), user("q"), assistant("<functioncall> {}"), {"role": "tool", "content": "1"}, assistant("x")],
        ),
        ({"input": [user("q")], "output": "a", "system_prompt": "S", "reasoning": "on"},
         [system("S"), user("q"), assistant("a")]),
        ({"system": "S", "input": "q", "chosen": "a", "rejected": "b"}, [system("S"), user("q"), assistant("a")]),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "completion": " a"}, [user("q"), assistant("a")]),
        ({"messages": [user("q")], "reasoning": "t", "answer": "a"},
         [user("q"), assistant("a", reasoning_content="t")]),
        ({"developer_content": "S", "messages": [user("q"), assistant("a", thinking="t")]},
         [system("S"), user("q"), assistant("a", reasoning_content="t")]),
        *(
            (row, [user("q"), assistant("a")])
            for row in (
                {"problem": "q", "solution": "b", "messages": [user("q"), assistant("a")]},  # OpenR1-Math, NuminaMath
                {"instruction": "q", "response": "a", "conversations": [user("q"), assistant("a")]},  # Magpie
                {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")],
                 "messages": [user("q"), assistant("a")]},  # UltraFeedback
                {"instruction": "q", "input": "", "output": "a", "prompt": "### q\n### a"},
                {"question": "q", "solution": "a", "answer": "4"},  # LIMO
                {"problem": "q", "generated_solution": "a", "expected_answer": "4"},  # OpenMathInstruct
                {"kind": "NLI", "input": "q", "target": "a"},  # Firefly
                {"inputs": [1], "inputs_pretokenized": "q", "targets": [2], "targets_pretokenized": "a"},  # P3
                {"inputs": "q", "targets": "a"},  # FLAN, xP3, Aya
                {"query": "q", "answer": "a"},  # CodeFeedback
                {"instruction": "q", "generation": "a"},  # distilabel
                {"user": "q", "assistant": "a"},
                {"conversations": ["q", "a"]},  # LIMA
                {"conversation": [["q", "a"]]},
                {"question": "q", "answers": {"text": ["a"], "answer_start": [0]}},  # SQuAD
            )
        ),
        ({"definition": "D", "inputs": "q", "targets": "a"}, [user("D\n\nq"), assistant("a")]),
        ({"sql_prompt": "q", "sql_context": "T", "sql": "a"}, [user("T\n\nq"), assistant("a")]),
        ({"ctx": "q", "endings": ["x", "y"], "label": "1"}, [user("q\nA. x\nB. y"), assistant("B. y")]),
        ({"question_stem": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
         [user("q\nA. x\nB. y"), assistant("B. y")]),
    ],
)  # fmt: skip
def test_what_a_row_says(row, messages):
    assert to_messages(row) == messages
    # what is the same once more in another form, or a part of what is trained
    told = {"reasoning", "solution", "prompt", "answer", "expected_answer", "inputs", "targets"}
    assert told.issuperset(read_row(row).unused)


def test_an_ambiguous_format_names_only_formats_that_work():
    both = {"messages": [user("q"), assistant("a")], "question": "q", "answer": "a"}
    assert read_row(both).unused == {}
    assert detect_format(both) == detect_format({**both, "answer": ["a"]}) == "messages"
    assert detect_format({**both, "messages": "see attachment"}) == "question-answer"
    with pytest.raises(FormatError, match="fit question-answer and question-response; say which"):
        detect_format({"question": "q", "answer": "a", "response": "a"})


def test_template_variables_of_a_row(tmp_path):
    plain = {"question": "q", "answer": "a"}
    path = write(tmp_path / "a.jsonl", {**plain, "chat_template_kwargs": {"enable_thinking": False}}, plain)
    rows, _ = load(path)
    assert [row.get("chat_template_kwargs") for row in rows] == ['{"enable_thinking": false}', None]
    assert "chat_template_kwargs" not in load(write(tmp_path / "b.jsonl", plain))[0][0]


def test_turns_are_merged_where_asked(tmp_path):
    row = {"messages": [user("a"), user("b"), assistant("c"), assistant("d")]}
    rows, _ = load(write(tmp_path / "a.jsonl", row), merge_turns=True)
    assert rows[0]["messages"] == [user("a\n\nb"), assistant("c\n\nd")]
    row["messages"][2]["train"] = False  # what must not be trained is not joined with what must
    with pytest.raises(FormatError, match="message 3 is 'assistant', which cannot come after 'assistant'"):
        load(write(tmp_path / "b.jsonl", row), merge_turns=True)


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        (json.loads((CASES / "trl_implicit_prompt.jsonl").read_text()), [user("q")], "good"),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            [user("q")],
            "good",
        ),
        ({"messages": [user("q"), assistant("good")], "rejected_response": "bad"}, [user("q")], "good"),
        (
            {"messages": [user("q"), assistant("good")], "rejected_messages": [user("q"), assistant("bad")]},
            [user("q")],
            "good",
        ),
        (
            {"chosen_messages": [user("q"), assistant("good")], "rejected_messages": [user("q"), assistant("bad")]},
            [user("q")],
            "good",
        ),
        (
            {
                "input": {"messages": [user("q")], "tools": []},
                "preferred_output": [assistant("good")],
                "non_preferred_output": [assistant("bad")],
            },
            [user("q")],
            "good",
        ),
        ({"instruction": "q", "input": "i", "output": ["good", "bad"]}, [user("q\n\ni")], "good"),
        ({"instruction": "q", "chosen-response": "good", "rejected-response": "bad"}, [user("q")], "good"),
        ({"system": "S", "history": [["a", "b"]], "question": "q", "chosen": "good", "rejected": "bad"},
         [system("S"), user("a"), assistant("b"), user("q")], "good"),
    ],
)  # fmt: skip
def test_preferences_of_every_shape(row, prompt, chosen):
    rejected = [assistant("bad")]
    assert to_preference(row) == {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": rejected}
    if "output" not in row and "input" not in row:
        assert to_messages(row) == [*prompt, assistant(chosen)]


def test_columns_that_are_not_used_are_told(tmp_path, caplog):
    rows = [{"id": i, "question": "q", "answer": f"a{i}", "url": "u", "rationale": None} for i in range(3000)]
    rows[1500]["rationale"] = "because"
    messages = {"messages": [{**user("q"), "citations": ["c"]}, assistant("a")], "split": "train"}
    sources = [str(write(tmp_path / "a.jsonl", *rows)), str(write(tmp_path / "b.jsonl", messages))]
    report = load_mixture(sources).report
    expected = {sources[0]: {"rationale": 'str "because"'}, sources[1]: {"messages[].citations": 'list ["c"]'}}
    assert report.unused == expected
    assert [record.getMessage() for record in caplog.records if "not used" in record.getMessage()] == [
        f'{sources[0]}: columns that are not used: rationale (str "because")',
        f'{sources[1]}: columns that are not used: messages[].citations (list ["c"])',
    ]
    console = Console(width=300, file=io.StringIO())
    console.print(report)
    assert "columns that are not used: rationale" in console.file.getvalue()
    caplog.clear()
    for streaming in (False, True):
        mixture = load_mixture([{"path": sources[0], "ignore": ["rationale"]}], streaming=streaming)
        assert len(list(mixture.train)) == 3000 and mixture.report.unused == {}
    stream = load_mixture([sources[0]], streaming=True)
    assert len(list(stream.train)) == 3000 and list(stream.report.unused.values()) == [{"rationale": 'str "because"'}]
    assert caplog.text.count("not used") == 1


def test_compact_lists_name_the_row():
    with pytest.raises(FormatError, match=r"compact_list\.json, row 51: "):
        load(CASES / "compact_list.json")


@pytest.mark.parametrize(
    ("name", "content", "source"),
    [
        ("a.json", '{"version": 1, "data": [{"instruction": "a", "output": "b"}]}', {}),
        ("a.json", '{"x": [{"a": 1}], "y": [{"instruction": "a", "output": "b"}]}', {"field": "y"}),
        ("a.json", '{\n  "instruction": "a",\n  "output": "b"\n}\n', {}),
        ("a.jsonl", '[{"instruction": "a", "output": "b"}]', {}),
        ("a.jsonl", '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]\n', {}),
        ("a.json", '[[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]', {}),
        ("rows", '{"instruction": "a", "output": "b"}\n', {}),
        ("a.csv", "instruction;output\na;b\n", {"delimiter": ";"}),
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n'.encode("utf-16"), {"encoding": "utf-16"}),
        ("a.csv", "instruction,output\na,b\n".encode("utf-16-le"), {"encoding": "utf-16-le"}),
        (
            "a.csv",
            'messages\n"[{""role"": ""user"", ""content"": ""a""}, {""role"": ""assistant"", ""content"": ""b""}]"\n',
            {},
        ),
    ],
)
def test_containers(tmp_path, name, content, source):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert [row["messages"] for row in load(tmp_path / name, **source)[0]] == [[user("a"), assistant("b")]]


def test_files_of_arrow(tmp_path):
    rows = Dataset.from_list([{"instruction": "a", "output": "b"}] * 3)
    rows.save_to_disk(str(tmp_path / "saved"))
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, rows.data.schema) as writer:
        writer.write_table(rows.data.table)
    for path in (next((tmp_path / "saved").glob("*.arrow")), tmp_path / "file.arrow"):
        assert [row["messages"] for row in load(path)[0]] == [[user("a"), assistant("b")]] * 3


@pytest.mark.parametrize(
    ("sample_by", "texts"), [("line", ["a", "b", "c"]), ("paragraph", ["a\nb", "c"]), ("document", ["a\nb\n\nc\n"])]
)
def test_plain_text(tmp_path, sample_by, texts):
    (tmp_path / "a.txt").write_text("a\nb\n\nc\n")
    assert [row["messages"] for row in load(tmp_path / "a.txt", sample_by=sample_by)[0]] == [
        [assistant(t)] for t in texts
    ]


def test_text_in_another_encoding(tmp_path):
    line = json.dumps({"instruction": "你好", "output": "好"}, ensure_ascii=False) + "\n"
    (tmp_path / "a.jsonl").write_text(line, encoding="gb18030")
    (tmp_path / "a.csv").write_text("instruction,output\n你好,好\n", encoding="gb18030")
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(FormatError, match=r"not UTF-8 text: .* set encoding: \(such as gb18030"):
            load(tmp_path / name)
        rows, _ = load(tmp_path / name, encoding="gb18030")
        assert rows[0]["messages"] == [user("你好"), assistant("好")]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
def test_text_with_nulls_for_letters(tmp_path, encoding):
    line = json.dumps({"instruction": "a", "output": "b"}) + "\n"
    (tmp_path / "a.jsonl").write_text(line, encoding=encoding)
    with pytest.raises(FormatError, match=f"set encoding: .such as .*{encoding}"):
        load(tmp_path / "a.jsonl")
    assert load(tmp_path / "a.jsonl", encoding=encoding)[0][0]["messages"] == [user("a"), assistant("b")]


@pytest.mark.parametrize("mark", [";", "|", "\t"])
def test_delimiter_as_the_message_gives_it(tmp_path, mark):
    (tmp_path / "a.csv").write_text(f"instruction{mark}output\na{mark}b\n")
    with pytest.raises(FormatError, match="parts its cells") as error:
        load(tmp_path / "a.csv")
    advice = re.search(r"set (delimiter: \S+) in its entry", str(error.value))[1]
    rows, _ = load(tmp_path / "a.csv", **yaml.safe_load(advice))
    assert rows[0]["messages"] == [user("a"), assistant("b")]


def test_column_maps(tmp_path):
    path = write(tmp_path / "a.jsonl", {"answer": "q", "question": "a", "ctx": "c"}, {"answer": "q", "question": "a"})
    swapped, _ = load(path, columns={"answer": "question", "question": "answer", "ctx": "context"})
    assert [row["messages"] for row in swapped] == [[user("c\n\nq"), assistant("a")], [user("q"), assistant("a")]]
    with pytest.raises(FormatError, match=r"the column map would write 'ctx' over 'answer'; ignore: \[answer\]"):
        load(path, columns={"ctx": "answer"})
    with pytest.raises(RecipeError, match=r"Field 'ignore'"):
        load(path, ignore="ctx")


def test_data_sets_and_paths_are_sources(tmp_path):
    rows = Dataset.from_list([{"question": "q", "answer": str(i)} for i in range(5)])
    path = write(tmp_path / "a.jsonl", *rows)
    streams = rows.to_iterable_dataset()
    for source in (rows, DatasetDict({"train": rows}), {"path": rows, "limit": 5}, path, {"path": path}):
        assert sorted(m[1]["content"] for m in load_mixture([source]).train["messages"]) == list("01234")
    for source in (rows, streams):
        assert len(list(load_mixture([source], streaming=True).train)) == 5
    with pytest.raises(RecipeError, match=r"IterableDataset .* is a stream: set dataset_streaming"):
        load_mixture([streams])
    with pytest.raises(RecipeError, match="has no split 'test', it has train"):
        load_mixture([DatasetDict({"train": rows})], split="test")


def test_missing_paths_say_what_they_count_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=rf"the file 'no\.jsonl' does not exist \(counted from {tmp_path}\)"):
        load_mixture(["no.jsonl"])


def test_formatting_func_never_trains_none():
    for example in (
        {"instruction": "a", "output": None},
        {"instruction": ["a"], "output": [None]},
        {"instruction": None},
    ):
        with pytest.raises(FormatError, match="text expected, found NoneType null"):
            formatting_func(example)


def test_check_tells_columns_that_are_not_used_and_roles_of_another_name(tmp_path, capsys):
    from ma_sft.cli import main

    rows = [{"question": f"{i}?", "answer": f"{i}", "rationale": "because"} for i in range(4)]
    path = write(tmp_path / "a.jsonl", *rows)
    recipe = tmp_path / "r.yaml"
    turns = [{"role": "user", "content": "Why?"}, {"role": "Bot", "content": "So."}]
    bot = write(tmp_path / "b.jsonl", {"messages": turns})
    recipe.write_text(f"model_name_or_path: demo\ndatasets: [{path}, {bot}]\nreport_to: none\n")
    found = {str(path): {"rationale": 'str "because"'}, str(bot): {"role Bot": "read as assistant"}}
    main(["check", str(recipe), "--json"])
    assert json.loads(capsys.readouterr().out)["unused_columns"] == found
    main(["check", str(recipe)])  # of the cache
    said = " ".join(capsys.readouterr().out.replace("\n", "").split())
    assert "b.jsonl: role Bot is read as assistant" in said and "rationale (str" in said


def test_a_formatting_func_that_makes_no_text_is_refused(tmp_path):
    from ma_sft import Recipe
    from ma_sft.labels.templates import load_tokenizer
    from ma_sft.labels.tokenize import label

    (tmp_path / "mine.py").write_text("def text(example):\n    return [None for _ in example['question']]\n")
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
    function = f"{tmp_path}/mine.py:text"
    settings = Recipe(model_name_or_path="demo", dataset_name=str(path), formatting_func=function).resolve()
    with pytest.raises(FormatError, match=r"field 'row 1 by .*mine\.py:text': text expected, found NoneType null"):
        label(settings, load_tokenizer(settings)[0])


def test_preview_shows_what_is_left_after_max_length(tmp_path, capsys):
    from ma_sft.cli import main

    path = write(tmp_path / "a.jsonl", {"question": "How are you?", "answer": "I am very " + "very " * 60 + "well."})
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model_name_or_path: demo\ndataset_name: {path}\nreport_to: none\nmax_length: 40\n")
    main(["preview", str(recipe)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "a.jsonl:1: 40 tokens" in shown and "cut by max_length: tokens 1 to 40 of" in shown
    assert "well." not in shown and "✂ max_length" in shown
    main(["preview", str(recipe), "--max_length", "400"])
    assert "✂" not in (shown := capsys.readouterr().out) and "well." in shown


def test_marks_of_a_row_are_followed(tmp_path):
    plain = {"question": "q", "answer": "a"}
    for bad in ({"rejected": True}, {"is_correct": False}, {"is_safe": "False"}, {"weight": 0}, {"train": "no"}):
        with pytest.raises(BadAnswer, match="marks a bad answer"):
            to_messages({**plain, **bad})
        with pytest.raises(BadAnswer):
            to_messages({"text": "x", **bad}, "text")
        good = {key: value in (False, 0, "False", "no") for key, value in bad.items()}
        assert read_row({**plain, **good}).unused == {}
    for other in ({"loss_mask": [0, 1]}, {"weight": 0.5}):
        with pytest.raises(FormatError, match=rf"leave it out \(ignore: \[{next(iter(other))}\]\)"):
            to_messages({**plain, **other})
    for mark in ({"deleted": True}, {"is_correct": False}, {"trainable": False}):
        row = {"messages": [user("a"), {**assistant("b"), **mark}, user("c"), assistant("d")]}
        assert to_messages(row) == [user("a"), assistant("b", train=False), user("c"), assistant("d")]
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "pairs.jsonl", pair, {**pair, "is_valid": False})
    assert load_mixture([str(path)], kind="preference").report.stages[1].removed == {"bad answers": 1}
    # the marks in a table are text
    (tmp_path / "a.csv").write_text("question,answer,is_correct\nq,a,True\nr,b,False\n")
    rows, report = load(tmp_path / "a.csv")
    assert [row["messages"][1]["content"] for row in rows] == ["a"] and report.skipped == 1


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (assistant([{"type": "text", "text": "no", "weight": 0}, {"type": "text", "text": "yes"}]), "a whole with"),
        (assistant([{"type": "text", "text": "see", "image": "x.png"}]), "messages[1].content[0].image': only text"),
        (assistant("a", value="b"), "content and value hold different texts"),
        (assistant("", tool_calls=[call("f", 0)]), "a JSON object expected, found int 0"),
        (assistant("", tool_calls=[call("f", '{"a": NaN}')]), "a number that JSON does not have"),
        (assistant("", tool_calls=[call("f", '{"a": 1e999}')]), "a number that JSON does not have"),
        (assistant("", tool_calls=[call("f", '{"a": 1, "a": 2}')]), "the key 'a' stands twice in one object"),
        (assistant(" \n"), "the response is empty"),
    ],
)
def test_turns_that_say_two_things_or_nothing(turn, message):
    with pytest.raises(FormatError) as error:
        to_messages({"messages": [user("q"), turn]})
    assert message in str(error.value)


def test_a_content_under_another_key_where_the_first_is_null():
    row = {"messages": [{**user(None), "text": "q"}, {**assistant(None), "text": "a", "value": None}]}
    assert to_messages(row) == [user("q"), assistant("a")]


def test_two_answers_of_a_choice_must_agree():
    row = {"question": "q", "options": ["x", "y"], "answer": "A"}
    assert to_messages({**row, "answer_index": 0})[1] == assistant("A. x")
    with pytest.raises(FormatError, match="'answer_index' and 'answer' mean different choices: 1, 'A'"):
        to_messages({**row, "answer_index": 1})


def test_the_turns_of_moss_come_by_number():
    turns = {f"turn_{i}": {"Human": f"q{i}", "MOSS": f"a{i}"} for i in (1, 10, 2)}
    assert [m["content"] for m in to_messages({"chat": turns})] == ["q1", "a1", "q2", "a2", "q10", "a10"]


def test_the_tool_that_a_turn_of_chatglm_calls_is_told():
    row = {"messages": [user("q"), {**assistant("{}"), "metadata": "f"}, {"role": "tool", "content": "r"}]}
    assert read_row(row).unused == {"messages[].metadata": 'str "f"'}


def test_lists_of_messages_in_cells_of_text():
    prompt, good, bad = (json.dumps([turn]) for turn in (user("q"), assistant("a"), assistant("b")))
    assert to_messages({"prompt": prompt, "completion": good}) == [user("q"), assistant("a")]
    sides = {"prompt": prompt, "chosen": good, "rejected": bad}
    assert to_preference(sides) == {key: json.loads(text) for key, text in sides.items()}
    for text in ("[1, 2]", "[{", '[{"name": "f"}]'):  # which are texts
        assert to_messages({"prompt": text, "completion": text}) == [user(text), assistant(text)]


def test_columns_of_one_name_or_none(tmp_path):
    (tmp_path / "a.csv").write_text(",question,answer,,\n0,q,a,more,\n")
    assert load(tmp_path / "a.csv")[1].unused == {str(tmp_path / "a.csv"): {"column 4": 'str "more"'}}
    pq.write_table(pa.table([["q"], ["a"], ["b"]], names=["question", "answer", "answer"]), tmp_path / "a.parquet")
    with pytest.raises(FormatError, match=r"a\.parquet: cannot be read as parquet: Multiple matches for .*answer"):
        load(tmp_path / "a.parquet")


def test_results_stand_in_the_order_of_their_calls():
    """Where a template writes no ids, a model would take the one for the other's."""
    calls = assistant("", tool_calls=[call("f", id="c1"), call("g", id="c2")])
    one, two = ({"role": "tool", "content": text, "tool_call_id": f"c{text}"} for text in "12")
    right = [user("q"), calls, one, two, assistant("x")]
    assert to_messages({"messages": [user("q"), calls, two, one, assistant("x")]}) == right
    for results in ([one, two], [one, one], [two]):  # only where each is a call's
        row = [user("q"), calls, *results, assistant("x")]
        assert to_messages({"messages": row}) == row


@pytest.mark.parametrize(
    ("name", "more", "what"),
    [
        ("a.jsonl", {"split": "dev"}, "split says nothing of a .jsonl file"),
        ("a.jsonl", {"delimiter": ";"}, "delimiter says nothing of a .jsonl file"),
        ("a.csv.gz", {"field": "rows"}, "field says nothing of a .csv file"),
        ("a.parquet", {"encoding": "utf-8"}, "encoding says nothing of a .parquet file"),
        ("a.txt", {"revision": "v1"}, "revision says nothing of a .txt file"),
        ("owner/name", {"encoding": "utf-16"}, "encoding says nothing of a hub data set"),
        (Dataset.from_list([{"text": "a"}]), {"name": "x"}, "name says nothing of a data set in memory"),
    ],
    ids=str,
)
def test_what_says_nothing_of_a_source_is_refused(name, more, what):
    with pytest.raises(RecipeError, match=f"{what}; remove it"):
        Source.of({"path": name, **more})


def test_thoughts_before_a_call():
    call_text = '<think>\nhm\n</think>\n\n{"name": "f", "arguments": {}}'
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": call_text}]
    assert to_messages({"conversations": turns}) == [
        user("q"),
        assistant("", tool_calls=[call("f")], reasoning_content="hm"),
    ]


def test_steps_are_one_answer():
    row = {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}
    with pytest.raises(BadAnswer, match=r"field 'labels\[1\]': bool false marks a wrong step"):
        to_messages(row)
    with pytest.raises(FormatError, match="field 'labels': one for each of 2 completions"):
        to_messages({**row, "labels": [True]})
    with pytest.raises(FormatError, match=r"field 'completions\[1\]': text expected"):
        to_messages({**row, "completions": ["a", 2]})
    assert to_messages({**row, "labels": None, "step_separator": " "}) == [user("q"), assistant("a b")]
