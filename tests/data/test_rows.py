"""A row means what it says: nothing that it states is lost, nothing that it forbids is trained, no column unsaid."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, DatasetDict
from helpers import ROOT, assistant, system, user, write_rows

from ma_sft import FormatError, Recipe, RecipeError, to_messages, to_preference
from ma_sft.cli import main
from ma_sft.data.formats import detect_format, read_row
from ma_sft.data.functions import formatting_func
from ma_sft.data.load import Source
from ma_sft.data.messages import BadAnswer, to_tools
from ma_sft.data.mixture import load_mixture
from ma_sft.data.stages import unused_columns
from ma_sft.labels.templates import load_tokenizer
from ma_sft.labels.tokenize import label

CASES = ROOT / "tests/files/rows"


def call(name, arguments="{}", **more):
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(content, **more):
    return {"role": "tool", "content": content, **more}


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


CALLED = [
    user("q"),
    assistant("", tool_calls=[call("f")]),
    {"role": "tool", "name": "f", "content": "1"},
    assistant("x"),
]
FENCED = [[user(f"问{i}"), assistant(f"答{i}\n```py\n  x = 1\n```\n ")] for i in range(3)]
HALF = [user("a"), assistant("WRONG", train=False), user("b"), assistant("right")]


@pytest.mark.parametrize(
    ("name", "conversations"),
    [
        ("ceval.jsonl", [[user("Which is a prime?\nA. 4\nB. 6\nC. 7\nD. 9"), assistant("C. 7")]]),
        ("history.jsonl", [[user("2+2?"), assistant("4"), user("And 3+3?"), assistant("6")]]),
        ("context.jsonl", [[user("In 1998 France beat Brazil.\n\nWho won?"), assistant("France")]]),
        ("system_column.jsonl", [[system("Answer only in French."), user("Hello"), assistant("Bonjour")]]),
        ("system_prompt_column.jsonl", [[system("S"), user("q"), assistant("r")], [user("q2"), assistant("r2")]]),
        *((name, [HALF]) for name in ("loss_false.jsonl", "train_false.jsonl")),
        ("text_parts_loss_weight.jsonl", [[user("hi"), assistant("yo")]]),
        ("glm4_tools.jsonl", [[user("q"), assistant('{"name": "f"}')]]),
        ("openai_functions.jsonl", [CALLED]),
        (
            "parallel_calls.jsonl",
            [[user("q"), assistant("", tool_calls=[call("f"), call("g")]), tool("1"), tool("2"), assistant("x")]],
        ),
        ("trl_implicit_prompt.jsonl", [[user("q"), assistant("good")]]),
        ("human_assistant_list.jsonl", [[user("q"), assistant("a")]]),
        ("pretty_object.json", [[user("a"), assistant("b")]]),
        *((name, FENCED) for name in ("list_named.jsonl", "wrapped.json", "alpaca.ndjson")),
    ],
)
def test_cases(name, conversations):
    assert [row["messages"] for row in load(CASES / name)[0]] == conversations


def test_tools_of_a_system_turn_and_of_old_are_the_rows_tools():
    for name in ("glm4_tools.jsonl", "openai_functions.jsonl"):
        ((row,), _) = load(CASES / name)
        assert json.loads(row["tools"]) == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    tool = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
    expected = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert json.loads(to_tools({"tools": [tool]})) == [{"type": "function", "function": expected}]
    assert to_tools({"tools": ['{"name": "f"}']}) == '[{"name": "f"}]'  # When2Call's


def test_images_are_refused():
    with pytest.raises(FormatError, match=r"images\.jsonl, line 1: field 'images': only text can be trained on"):
        load(CASES / "images.jsonl")
    # where the user says that they do not matter, the text is trained
    assert len(load(CASES / "images.jsonl", ignore=["images"])[0]) == 1
    assert to_messages({"messages": [user("<image>?"), assistant("x")], "images": [], "audio": None})


@pytest.mark.parametrize("name", ["rejected", "is_correct", "is_safe", "weight", "train", "kto_tag", "label"])
def test_marks_of_a_row_are_followed(name):
    for bad in {"rejected": (True,), "is_safe": ("False",), "label": ("False",), "weight": (0,)}.get(name, (False, 0)):
        for row, form in (({"question": "q", "answer": "a"}, None), ({"text": "x"}, "text")):
            if name == "label" and (bad == 0 or form):  # which may be a class of a text
                continue
            with pytest.raises(BadAnswer, match="marks a bad answer"):
                to_messages({**row, name: bad}, form)
    good = {"question": "q", "answer": "a", name: name != "rejected"}
    assert read_row(good)["unused"] == {}


def test_bad_answers_are_counted_and_never_trained(tmp_path):
    good = {"prompt": "Capital of France?", "completion": "Paris", "label": True}
    bad = json.loads((CASES / "kto.jsonl").read_text())
    rows, report = load(write_rows(tmp_path / "kto.jsonl", [good, bad]))
    assert [row["messages"][1]["content"] for row in rows] == ["Paris"]
    assert report.skipped == 1 and report.stages[1].removed == {"bad answers": 1}
    assert "line 2: field 'label': bool false marks a bad answer" in report.stages[1].examples["bad answers"][0]
    assert unused_columns(report.stages) == {}
    with pytest.raises(FormatError, match="every row was skipped"):
        load(CASES / "kto.jsonl")
    assert read_row({"question": "q", "answer": "a", "label": "positive"})["unused"] == {
        "label": 'is not used (str "positive")'
    }
    for mark in ({"deleted": True}, {"is_correct": False}, {"trainable": False}):
        row = {"messages": [user("a"), assistant("b", **mark), user("c"), assistant("d")]}
        assert to_messages(row) == [user("a"), assistant("b", train=False), user("c"), assistant("d")]
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert to_preference({**pair, "label": 0})  # which says nothing of a pair
    path = write_rows(tmp_path / "pairs.jsonl", [pair, {**pair, "is_valid": False}])
    assert load_mixture([path], kind="preference").report.stages[1].removed == {"bad answers": 1}
    # the marks in a table are text
    (tmp_path / "a.csv").write_text("question,answer,is_correct\nq,a,True\nr,b,False\n")
    rows, report = load(tmp_path / "a.csv")
    assert [row["messages"][1]["content"] for row in rows] == ["a"] and report.skipped == 1


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
    path = CASES / "tool_calls_mixed.parquet"
    if kind == "saved":
        Dataset(table).save_to_disk(str(path := tmp_path / "saved"))
    elif kind == "jsonl":
        path = write_rows(tmp_path / "a.jsonl", (present(row) for row in table.to_pylist()))
    rows, _ = load(path)
    calls = [c["function"] for row in rows for m in row["messages"] for c in m.get("tool_calls", [])]
    assert [c["arguments"] for c in calls] == ['{"city": "Paris"}', '{"n": 3, "opts": {"deep": true}}', "{}"]
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    number = {"type": "object", "properties": {"n": {"type": "integer"}, "opts": {"type": "object"}}}
    assert [json.loads(row["tools"])[0]["function"] for row in rows[:2]] == [
        {"name": "f", "description": "d", "parameters": city},
        {"name": "g", "parameters": number},
    ]
    assert all("tools" not in row for row in rows[2:])


def test_bytes_are_text_or_refused(tmp_path):
    columns = {"instruction": [b"a", "ü".encode()], "output": [b"b", b"\xff"]}
    pq.write_table(pa.table({k: pa.array(v, pa.binary()) for k, v in columns.items()}), tmp_path / "a.parquet")
    rows = load_mixture([str(tmp_path / "a.parquet")], on_error="skip")
    assert [m["content"] for m in rows.train[0]["messages"]] == ["a", "b"]
    with pytest.raises(FormatError, match=r"a\.parquet, row 2: field 'output': text expected, found dict .*no UTF-8"):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize("mark", ["weight", "loss", "loss_scale", "loss_weight", "train", "training"])
def test_turns_marked_not_to_be_trained(mark):
    human, gpt = ({"from": name, "value": text} for name, text in (("human", "a"), ("gpt", "b")))
    last = [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d", mark: 1.0}]
    for row in (
        {"messages": [user("a"), assistant("b", **{mark: 0}), user("c"), assistant("d")]},
        {"conversations": [human, {**gpt, mark: False}, *last]},
        {"conversation": [{"input": "a", "output": "b", mark: 0}, {"input": "c", "output": "d"}]},
    ):
        assert to_messages(row) == [user("a"), assistant("b", train=False), user("c"), assistant("d")]
    for nothing in (None, ""):  # an empty cell of a CSV file
        assert to_messages({"messages": [user("a"), assistant("b", **{mark: nothing})]}) == [user("a"), assistant("b")]
        assert to_messages({"question": "a", "answer": "b", mark: nothing}) == [user("a"), assistant("b")]
    for wrong in (0.5, "maybe", 2):
        with pytest.raises(FormatError, match="a turn is trained"):
            to_messages({"messages": [user("a"), assistant("b", **{mark: wrong})]})
    other = "train" if mark == "loss" else "loss"
    with pytest.raises(FormatError, match="loss, .*: a turn is trained" if mark != "loss" else "loss, train'"):
        to_messages({"messages": [user("a"), assistant("b", **{mark: 0, other: 1})]})


THINKING = [
    {"type": "thinking", "thinking": "hm", "signature": "s"},
    {"type": "text", "text": "Let me see."},
    {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
    {"type": "tool_use", "id": "c2", "name": "g", "input": {}},
]
BROUGHT = [
    {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "1"}]},
    {"type": "tool_result", "tool_use_id": "c2", "content": "2"},
    {"type": "text", "text": "Well?"},
]


def old_call(arguments):
    return assistant(None, tool_calls=[{"function": {"name": "f", "arguments": arguments}}])


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"question": "And?", "answer": "6", "history": [user("2+2?"), assistant("4")], "system": "S"},
         [system("S"), user("2+2?"), assistant("4"), user("And?"), assistant("6")]),
        ({"prompt": "And?", "completion": "6", "history": '[["2+2?", "4"]]'},
         [user("2+2?"), assistant("4"), user("And?"), assistant("6")]),
        ({"system": "S", "messages": [system("S"), user("q"), assistant("a")]},
         [system("S"), user("q"), assistant("a")]),
        ({"question": "q", "answer": "a", "knowledge": ["k1", "k2"]}, [user("k1\n\nk2\n\nq"), assistant("a")]),
        ({"passage": "p", "question": "q", "options": ["x", "y"], "answer": "B"},
         [user("p\n\nq\nA. x\nB. y"), assistant("B. y")]),
        ({"question": "q", "options": {"A": "x", "B": "y"}, "answer": "y"}, [user("q\nA. x\nB. y"), assistant("B. y")]),
        ({"question": "q", "choices": ["3", "4"], "answer": "4"}, [user("q\nA. 3\nB. 4"), assistant("B. 4")]),
        ({"question": "q", "options": ["x", "y"], "answer": "A", "answer_index": 0},
         [user("q\nA. x\nB. y"), assistant("A. x")]),
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, [user("q"), assistant("a")]),
        ({"conversation": [{"system": "S", "input": "q", "output": "a"}]}, [system("S"), user("q"), assistant("a")]),
        ({"messages": [user([{"type": "text", "text": "q"}]), assistant(THINKING), user(BROUGHT),
                       assistant([{"type": "text", "text": "x"}])]},
         [user("q"), assistant("Let me see.", reasoning_content="hm",
                               tool_calls=[call("f", '{"a": 1}', id="c1"), call("g", id="c2")]),
          tool("1", tool_call_id="c1"), tool("2", tool_call_id="c2"), user("Well?"), assistant("x")]),
        ({"messages": [user("q"), old_call(""), tool({"rain": None}), old_call('"{\\"a\\": 1}"'), tool(None),
                       assistant("x")]},
         [user("q"), assistant("", tool_calls=[call("f")]), tool('{"rain": null}'),
          assistant("", tool_calls=[call("f", '{"a": 1}')]), tool(""), assistant("x")]),
        ({"messages": [user("q"), old_call({"n": None})]},  # a null that was written
         [user("q"), assistant("", tool_calls=[call("f", '{"n": null}')])]),
        ({"messages": [user("q"), assistant("I look."), {"role": "tool_call", "content": '{"name": "f"}'}]},
         [user("q"), assistant("I look.", tool_calls=[call("f")])]),
        ({"messages": [{**user(None), "text": "q"}, assistant(None, text="a", value=None)]},
         [user("q"), assistant("a")]),
        ({"chat": {f"turn_{i}": {"Human": f"q{i}", "MOSS": f"a{i}"} for i in (1, 10, 2)}},
         [turn for i in (1, 2, 10) for turn in (user(f"q{i}"), assistant(f"a{i}"))]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value":
                            '<think>\nhm\n</think>\n\n{"name": "f", "arguments": {}}'}]},
         [user("q"), assistant("", tool_calls=[call("f")], reasoning_content="hm")]),
        ({"prompt": "q", "completions": ["a", "b"], "labels": None, "step_separator": " "},
         [user("q"), assistant("a b")]),
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
    assert told.issuperset(read_row(row)["unused"])


def test_an_ambiguous_format_names_only_formats_that_work():
    both = {"messages": [user("q"), assistant("a")], "question": "q", "answer": "a"}
    assert read_row(both)["unused"] == {}
    assert detect_format(both) == detect_format({**both, "answer": ["a"]}) == "messages"
    assert detect_format({**both, "messages": "see attachment"}) == "question-answer"
    with pytest.raises(FormatError, match="fit question-answer and question-response; say which"):
        detect_format({"question": "q", "answer": "a", "response": "a"})


def test_template_variables_of_a_row(tmp_path):
    plain = {"question": "q", "answer": "a"}
    path = write_rows(tmp_path / "a.jsonl", [{**plain, "chat_template_kwargs": {"enable_thinking": False}}, plain])
    rows, _ = load(path)
    assert [row.get("chat_template_kwargs") for row in rows] == ['{"enable_thinking": false}', None]
    assert "chat_template_kwargs" not in load(write_rows(tmp_path / "b.jsonl", [plain]))[0][0]


def test_turns_are_merged_where_asked(tmp_path):
    row = {"messages": [user("a"), user("b"), assistant("c"), assistant("d")]}
    rows, _ = load(write_rows(tmp_path / "a.jsonl", [row]), merge_turns=True)
    assert rows[0]["messages"] == [user("a\n\nb"), assistant("c\n\nd")]
    row["messages"][2]["train"] = False  # what must not be trained is not joined with what must
    with pytest.raises(FormatError, match="message 3 is 'assistant', which cannot come after 'assistant'"):
        load(write_rows(tmp_path / "b.jsonl", [row]), merge_turns=True)
    pair = {"prompt": [user("a"), user("b")], "chosen": "c", "rejected": "d"}
    path = write_rows(tmp_path / "c.jsonl", [pair])
    found = present(load_mixture([path], kind="preference", merge_turns=True).train[0])
    assert (found["prompt"], found["chosen"]) == ([user("a\n\nb")], [assistant("c")])


GOOD, BAD = [user("q"), assistant("good")], [user("q"), assistant("bad")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (json.loads((CASES / "trl_implicit_prompt.jsonl").read_text()), GOOD[:1]),
        ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
          "rejected": {"from": "gpt", "value": "bad"}}, GOOD[:1]),
        ({"messages": GOOD, "rejected_response": "bad"}, GOOD[:1]),
        ({"messages": GOOD, "rejected_messages": BAD}, GOOD[:1]),
        ({"chosen_messages": GOOD, "rejected_messages": BAD}, GOOD[:1]),
        ({"input": {"messages": GOOD[:1], "tools": []}, "preferred_output": GOOD[1:], "non_preferred_output": BAD[1:]},
         GOOD[:1]),
        ({"instruction": "q", "input": "i", "output": ["good", "bad"]}, [user("q\n\ni")]),
        ({"instruction": "q", "chosen-response": "good", "rejected-response": "bad"}, [user("q")]),
        ({"system": "S", "history": [["a", "b"]], "question": "q", "chosen": "good", "rejected": "bad"},
         [system("S"), user("a"), assistant("b"), user("q")]),
    ],
)  # fmt: skip
def test_preferences_of_every_shape(row, prompt):
    assert to_preference(row) == {"prompt": prompt, "chosen": GOOD[1:], "rejected": BAD[1:]}
    if "output" not in row and "input" not in row:
        assert to_messages(row) == [*prompt, GOOD[1]]


def test_columns_that_are_not_used_are_told(tmp_path, caplog):
    rows = [{"id": i, "question": "q", "answer": f"a{i}", "url": "u", "rationale": None} for i in range(3000)]
    rows[1500]["rationale"] = "because"
    messages = {"messages": [{**user("q"), "citations": ["c"]}, assistant("a")], "split": "train"}
    sources = [(write_rows(tmp_path / "a.jsonl", [*rows])), (write_rows(tmp_path / "b.jsonl", [messages]))]
    report = load_mixture(sources).report
    because = {"rationale": 'is not used (str "because")'}
    assert unused_columns(report.stages) == {
        sources[0]: because,
        sources[1]: {"messages[].citations": 'is not used (list ["c"])'},
    }
    assert [record.getMessage() for record in caplog.records if "not used" in record.getMessage()] == [
        f'{sources[0]}: rationale is not used (str "because")',
        f'{sources[1]}: messages[].citations is not used (list ["c"])',
    ]
    caplog.clear()
    for streaming in (False, True):
        mixture = load_mixture([{"path": sources[0], "ignore": ["rationale"]}], streaming=streaming)
        assert len(list(mixture.train)) == 3000 and unused_columns(mixture.report.stages) == {}
    stream = load_mixture([sources[0]], streaming=True)
    assert len(list(stream.train)) == 3000 and list(unused_columns(stream.report.stages).values()) == [because]
    assert caplog.text.count("not used") == 1


def test_compact_lists_name_the_row():
    with pytest.raises(FormatError, match=r"compact_list\.json, row 51: "):
        load(CASES / "compact_list.json")


PAIR = '{"instruction": "a", "output": "b"}'
TURNS = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'


@pytest.mark.parametrize(
    ("name", "content", "source"),
    [
        ("a.json", f'{{"version": 1, "data": [{PAIR}]}}', {}),
        ("a.json", f'{{"x": [{{"a": 1}}], "y": [{PAIR}]}}', {"field": "y"}),
        ("a.json", PAIR.replace(", ", ",\n"), {}),
        ("a.jsonl", f"[{PAIR}]", {}),
        ("a.jsonl", f"{TURNS}\n", {}),
        ("a.json", f"[{TURNS}]", {}),
        ("a.json", f'{{"data": [\n{PAIR}\n]}}', {}),
        ("a.jsonl", b"\xef\xbb\xbf\n\n" + PAIR.encode() + b"\r\n" + b" " * 40 + b"\n", {}),
        ("a.jsonl.gz", gzip.compress(b"\xef\xbb\xbf\n" + PAIR.encode() + b"\r\n"), {}),
        ("rows", f"{PAIR}\n", {}),
        ("a.csv", "instruction;output\na;b\n", {"delimiter": ";"}),
        ("a.jsonl", f"{PAIR}\n".encode("utf-16"), {"encoding": "utf-16"}),
        ("a.csv", "instruction,output\na,b\n".encode("utf-16-le"), {"encoding": "utf-16-le"}),
        ("a.csv", 'messages\n"{}"\n'.format(TURNS.replace('"', '""')), {}),
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
    for end in ("\n", "\r\n"):
        (tmp_path / "a.txt").write_text("a\nb\n\nc\n", newline=end)
        rows, _ = load(tmp_path / "a.txt", sample_by=sample_by)
        assert [row["messages"] for row in rows] == [[assistant(text)] for text in texts]


@pytest.mark.parametrize(
    ("name", "encoding"),
    [("a.csv", "gb18030"), *(("a.jsonl", name) for name in ("gb18030", "utf-16-le", "utf-16-be", "utf-32"))],
)
def test_text_in_another_encoding(tmp_path, name, encoding):
    text = '{"instruction": "你好", "output": "好"}\n' if name == "a.jsonl" else "instruction,output\n你好,好\n"
    (tmp_path / name).write_text(text if encoding == "gb18030" else text.replace("你", "ab "), encoding=encoding)
    with pytest.raises(FormatError, match=f"name its encoding: .*{encoding}"):
        load(tmp_path / name)
    ((row,), _) = load(tmp_path / name, encoding=encoding)
    assert row["messages"] == [user("你好" if encoding == "gb18030" else "ab 好"), assistant("好")]


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ";"), ("a.csv", "|"), ("a.csv", "\t"), ("a.tsv", ",")])
def test_delimiter_as_the_message_gives_it(tmp_path, name, mark):
    (tmp_path / name).write_text(f'instruction{mark}output\n"a, b"{mark}c\n')
    with pytest.raises(FormatError, match="one column") as error:
        load(tmp_path / name)
    advice = re.search(r"(delimiter: \S+?)\}", str(error.value))[1]
    ((row,), _) = load(tmp_path / name, **yaml.safe_load(advice))
    assert row["messages"] == [user("a, b"), assistant("c")]


def test_column_maps(tmp_path):
    row = {"answer": "q", "question": "a"}
    path = write_rows(tmp_path / "a.jsonl", [{**row, "ctx": "c"}, row])
    swapped, _ = load(path, columns={"answer": "question", "question": "answer", "ctx": "context"})
    assert [row["messages"] for row in swapped] == [[user("c\n\nq"), assistant("a")], [user("q"), assistant("a")]]
    with pytest.raises(FormatError, match=r"the column map would write 'ctx' over 'answer'; ignore: \[answer\]"):
        load(path, columns={"ctx": "answer"})
    with pytest.raises(RecipeError, match=r"Field 'ignore'"):
        load(path, ignore="ctx")


def test_data_sets_and_paths_are_sources(tmp_path):
    rows = Dataset.from_list([{"question": "q", "answer": str(i)} for i in range(5)])
    path = write_rows(tmp_path / "a.jsonl", [*rows])
    for source in (rows, DatasetDict({"train": rows}), {"path": rows, "limit": 5}, path, {"path": path}):
        assert sorted(m[1]["content"] for m in load_mixture([source]).train["messages"]) == list("01234")
    with pytest.raises(RecipeError, match="has no split 'test', it has train"):
        load_mixture([DatasetDict({"train": rows})], split="test")


def test_check_tells_columns_that_are_not_used_and_roles_of_another_name_once(tmp_path, capsys, caplog):
    path = write_rows(tmp_path / "a.jsonl", ({"question": f"{i}?", "answer": f"{i}", "why": "so"} for i in range(4)))
    turns = [{"role": "user", "content": "Why?"}, {"role": "Bot", "content": "So."}]
    bot = write_rows(tmp_path / "b.jsonl", [{"messages": turns}])
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model_name_or_path: demo\ndatasets: [{path}, {bot}]\nreport_to: none\n")
    found = {path: {"why": 'is not used (str "so")'}, bot: {"role Bot": "is read as assistant"}}
    for more in (["--json"], []):  # the second one of the cache
        caplog.clear()
        main(["check", str(recipe), *more])
        out = capsys.readouterr().out
        assert caplog.text.count("role Bot is read as assistant") == caplog.text.count("why is not used") == 1
        assert json.loads(out)["unused_columns"] == found if more else "Bot" not in out


def test_a_formatting_func_that_makes_no_text_is_refused(tmp_path):
    for example in ({"instruction": "a", "output": None}, {"instruction": ["a"], "output": [None]}):
        with pytest.raises(FormatError, match="text expected, found NoneType null"):
            formatting_func(example)
    (tmp_path / "mine.py").write_text("def text(example):\n    return [None for _ in example['question']]\n")
    path = write_rows(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    function = f"{tmp_path}/mine.py:text"
    settings = Recipe(model_name_or_path="demo", dataset_name=path, formatting_func=function).resolve()
    with pytest.raises(FormatError, match=r"field 'row 1 by .*mine\.py:text': text expected, found NoneType null"):
        label(settings, load_tokenizer(settings)[0])


def test_preview_shows_what_is_left_after_max_length(tmp_path, capsys):
    row = {"question": "How are you?", "answer": "I am very " + "very " * 60 + "well."}
    path, recipe = write_rows(tmp_path / "a.jsonl", [row]), tmp_path / "r.yaml"
    recipe.write_text(f"model_name_or_path: demo\ndataset_name: {path}\nreport_to: none\nmax_length: 40\n")
    main(["preview", str(recipe)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "a.jsonl:1: 40 tokens" in shown and "cut by max_length: tokens 1 to 40 of" in shown
    assert "well." not in shown and "✂ max_length" in shown
    main(["preview", str(recipe), "--max_length", "400"])
    assert "✂" not in (shown := capsys.readouterr().out) and "well." in shown


def test_the_tool_that_a_turn_of_chatglm_calls_is_told():
    row = {"messages": [user("q"), {**assistant("{}"), "metadata": "f"}, {"role": "tool", "content": "r"}]}
    assert read_row(row)["unused"] == {"messages[].metadata": 'is not used (str "f")'}
    row["messages"][1]["metadata"] = {"tokens": 3}
    assert read_row(row)["unused"] == {}


def test_lists_of_messages_in_cells_of_text():
    prompt, good, bad = (json.dumps([turn]) for turn in (user("q"), assistant("a"), assistant("b")))
    assert to_messages({"prompt": prompt, "completion": good}) == [user("q"), assistant("a")]
    sides = {"prompt": prompt, "chosen": good, "rejected": bad}
    assert to_preference(sides) == {key: json.loads(text) for key, text in sides.items()}
    for text in ("[1, 2]", "[{", '[{"name": "f"}]'):  # which are texts
        assert to_messages({"prompt": text, "completion": text}) == [user(text), assistant(text)]


def test_columns_of_one_name_or_none(tmp_path):
    (tmp_path / "a.csv").write_text(",question,answer,,\n0,q,a,more,\n")
    assert unused_columns(load(tmp_path / "a.csv")[1].stages) == {
        str(tmp_path / "a.csv"): {"column 4": 'is not used (str "more")'}
    }
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
