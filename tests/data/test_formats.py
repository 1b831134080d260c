"""Every format becomes the same messages, and what is no conversation is refused by name."""

import json
import re

import pytest
from datasets import Dataset
from helpers import ROOT, assistant, read_rows, system, user

from ma_sft import FormatError, to_messages, to_messages_batch
from ma_sft.data.formats import FORMATS, BadAnswer, detect_format, message_features
from ma_sft.data.functions import formatting_func
from ma_sft.data.messages import to_tools
from ma_sft.data.mixture import load_mixture

FIXTURES = ROOT / "tests/files/formats"

USER = user("What is 2+2?")
ASSISTANT = assistant("4")
SYSTEM = system("Be brief.")
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
PARTS = [{"type": "text", "text": "no", "weight": 0}, {"type": "text", "text": "yes"}]


def calling(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [user("q"), assistant("", tool_calls=[call])]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"foo": "x"}, "columns ['foo']; known are a question and its answer, messages, text; map columns to these "
         "names (datasets: [{path: ..., columns: {theirs: ours}}])"),
        ({"instruction": "x", "result": "y"}, "alpaca (misses output)"),
        ({"instruction": "x", "output": None}, "alpaca (misses output)"),
        ({"instruction": "x", "output": ""}, "the response is empty"),
        ({"instruction": 5, "output": "y"}, "field 'instruction': text expected, found int 5"),
        ({"messages": []}, "field 'messages': a list of turns expected"),
        ({"messages": [USER]}, "no response to train on: roles are ['user']"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "field 'messages[0].role'"),
        ({"messages": [USER, assistant(None)]}, "field 'messages[1].content': text expected"),
        ({"conversations": [{"from": "human", "value": 3}]}, "field 'conversations[0].value'"),
        ({"chosen": "no turns here", "rejected": "x"}, "field 'chosen'"),
        ({"question": "x", "answer": "y", "response": "z"},
         "ambiguous format: columns ['answer', 'question', 'response'] fit question-answer and question-resp"),
        ({"instruction": "x", "output": "y", "instruction_zh": "x", "output_zh": "y"}, "fit alpaca and alpaca-zh"),
        ({"text": "Buy milk", "instruction": "Summarise"}, "unknown format"),
        ({"text": " "}, "the response is empty"),
        ({"messages": [ASSISTANT, USER]}, "field 'messages': roles out of order: message 1 is 'assistant'"),
        ({"messages": [SYSTEM, ASSISTANT]}, "after 'system'; what is trained answers something: put that before it"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "message 2 is 'system', which cannot come after 'user'"),
        ({"messages": [USER, USER, ASSISTANT]}, "message 2 is 'user', which cannot come after 'user'"),
        ({"messages": [SYSTEM, {"role": "developer", "content": "x"}, USER, ASSISTANT]}, "merge_turns: true joins"),
        ({"messages": [USER, {**ASSISTANT, "channel": "analysis"}, ASSISTANT]}, "messages[1].channel': a turn of its"),
        ({"messages": str([USER, ASSISTANT])}, "lists that Python printed are no JSON: save the rows as JSON Lines"),
        ({"messages": [USER, ASSISTANT], "context": "c"}, "field 'context': a text to answer from has no place"),
        ({"question": "q", "solution": "4", "thinking_trajectories": ["t"]}, "'thinking_trajectories': only text"),
        ({"dialog": ["Hi", "Hello"], "speakers": ["A", "B"]}, "leave it out (ignore: [speakers])"),
        ({"question": "q", "answers": {"text": ["a", "b"]}}, "function of yours can make one of it (format: file.py"),
        ({"text": "Add two numbers.", "code": "a + b"}, "beside ['code'] is trained only where asked: format: text"),
        ({"messages": [USER, {"role": "tool", "content": "4"}, ASSISTANT]}, "message 2 is 'tool'"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "field 'messages[1].weight': a turn is"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "every answer is marked not to be trained"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": "add"}]}, "field 'messages[1].tool_calls': not valid JSON"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "not valid"),
        ({"messages": [USER, {**ASSISTANT, "reasoning_content": 5}]}, "field 'messages[1].reasoning_content'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ASSISTANT]}, "only text parts"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f()"}]},
         "not valid JSON"),
        ({"question": "q", "choices": {"text": ["a"], "label": ["A", "B"]}, "answerKey": "A"}, "equally many texts"),
        ({"instruction": "x", "output": "y", "history": [["a", "b", "c"]]},
         "field 'history': a list of turns expected"),
        ({"question": "q", "choices": ["a", "b"], "answerKey": "Z"}, "field 'answerKey': one of ['A', 'B'] expected"),
        ({"instruction": "a\0b", "output": "y"}, "field 'instruction' holds a NUL character"),
        ({"instruction": "a\ud800", "output": "y"}, "lone surrogate at character 1"),
        ({"system": "S", "messages": [system("T"), user("q"), assistant("a")]}, "two different system messages"),
        ({"system": "S", "system_prompt": "T", "question": "q", "answer": "a"}, "two different system messages"),
        ({"context": "c", "messages": [user("q"), assistant("a"), user("r"), assistant("b")]},
         "field 'context': a text"),
        ({"question": "q", "options": ["1", "2"], "answer": "1 or 2"}, "field 'answer': one of ['A', 'B'] expected"),
        ({"question": "q", "A": "x", "B": "y", "answer": "x y"}, "field 'answer': one of ['A', 'B'] expected"),
        ({"messages": [user("q"), {**assistant("a"), "masked": True}]}, "field 'messages[1].masked': only whole turns"),
        ({"messages": [{**user("q"), "tool_calls": [CALL]}, assistant("a")]}, "only an assistant calls tools"),
        ({"messages": [user("q"), user("r"), assistant("a")]}, "merge_turns: true joins neighbours of one role"),
        ({"conversation": [{"input": "a", "question": "b", "output": "c"}]}, "roles out of order: message 2 is 'user'"),
        ({"chat": {"turn_1": {"Human": "q", "MOSS": "a", "Commands": "Search(x)"}}}, "MOSS' tools cannot be trained"),
        ({"question": "q", "answer": "a", "chat_template_kwargs": "on"}, "'chat_template_kwargs': not valid JSON"),
        ({"messages": [user("q"), assistant(PARTS)]}, "a whole with"),
        ({"messages": [user([{"type": ["text"], "text_": "q"}]), ASSISTANT]}, "only text parts can be trained on"),
        ({"messages": [user("q"), assistant([{**PARTS[1], "image": "x"}])]}, "messages[1].content[0].image': only"),
        ({"messages": [user("q"), assistant("a", value="b")]}, "content and value hold different texts"),
        ({"messages": [user("q"), {"role": "assistant", "from": "human", "content": "a"}]},
         'role str "assistant" and from str "human"'),
        (calling(0), "a JSON object expected, found int 0"),
        (calling('{"a": NaN}'), "a number that JSON does not have"),
        (calling('{"a": 1e999}'), "a number that JSON does not have"),
        (calling('{"a": 1, "a": 2}'), "the key 'a' stands twice in one object"),
        ({"messages": [user("q"), assistant("\u200b\ufeff ")]}, "the response is empty"),
        ({"messages": [user("q"), assistant(" \n")]}, "the response is empty"),
        ({"question": "q", "options": ["x", "y"], "answer": "A", "answer_index": 1},
         "'answer_index' and 'answer' mean different choices: 1, 'A'"),
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, "'labels[1]': bool false marks a wrong"),
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True]}, "field 'labels': one for each of 2 completions"),
        ({"prompt": "q", "completions": ["a", 2]}, "field 'completions[1]': text expected"),
        ({"messages": [user("q"), ASSISTANT], "image": {"bytes": b"x"}}, "field 'image': only text can be trained on"),
        ({"messages": [{**user("x"), "images": ["1.jpg"]}, ASSISTANT]}, "field 'messages[0].images'"),
        *(({"question": "q", "answer": "a", "label": number}, "write true or false") for number in (0, 1)),
        *(({"question": "q", "answer": "a", **mark}, f"leave it out (ignore: [{name}])")
          for name, mark in (("loss_mask", {"loss_mask": [0, 1]}), ("weight", {"weight": 0.5}))),
        ({"x" * i: "y" for i in range(1, 60)}, "and 39 more"),
    ],
)  # fmt: skip
def test_refused(row, message):
    with pytest.raises(FormatError) as error:
        to_messages(row)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, BadAnswer) == ("marks a wrong" in message)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"Question": "What is 2+2?", "Answer": "4"}, "question-answer"),
        ({" QUESTION ": "What is 2+2?", "answer": "4", "Id": "7"}, "question-answer"),
        ({"问题": "What is 2+2?", "答案": "4"}, "question-answer"),
        ({"指令": "What is 2+2?", "输入": "", "输出": "4"}, "alpaca"),
        ({"Prompt": "What is 2+2?", "Completion": "4"}, "prompt-completion"),
    ],
)
def test_headers_in_other_cases_and_in_chinese(row, format, tmp_path):
    assert detect_format(row) == format
    assert to_messages(row) == to_messages(row, format) == [USER, ASSISTANT]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(",".join(cells) for cells in (row, row.values())))
    assert [m["content"] for m in load_mixture([path]).train["messages"][0]] == ["What is 2+2?", "4"]


def test_explicit_format_wins_over_the_columns():
    row = {"messages": [USER, ASSISTANT], "question": "q", "answer": "a"}
    assert to_messages(row, "question-answer")[0]["content"] == "q"
    with pytest.raises(FormatError, match="field 'instruction' is missing or null; format 'alpaca' needs it"):
        to_messages(row, "alpaca")


def test_formatting_func_on_rows_and_batches():
    said = formatting_func({"instruction": "Add", "input": "2+2", "output": "4"})
    assert said == "###Question: Add 2+2\n###Answer: 4"
    batch = formatting_func({"instruction": ["Add", "Hi"], "input": ["2+2", ""], "output": ["4", "Yo"]})
    assert batch == [said, "###Question: Hi\n###Answer: Yo"]


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.jsonl")), ids=lambda path: path.stem)
def test_golden(path):
    golden = json.loads(path.with_suffix(".golden.json").read_text(encoding="utf-8"))
    for row, expected in zip(read_rows(path), golden, strict=True):
        format = detect_format(row)
        assert to_messages(row) == to_messages(row, format) == expected["messages"]
        assert format == path.stem or path.stem not in FORMATS
        tools = to_tools(row)
        assert (json.loads(tools) if tools else None) == expected.get("tools")


def test_the_table_of_the_documentation():
    lines = (ROOT / "docs/formats.md").read_text(encoding="utf-8").splitlines()
    rows = [re.fullmatch(r"\| `([a-z-]+)`.*? \| `(\{.*\})` \| (.*) \|", line) for line in lines]
    rows = [row for row in rows if row]
    assert {row[1] for row in rows} == set(FORMATS)
    for row in rows:
        turns = (f"{m['role']}: {m['content']}" for m in to_messages(json.loads(row[2])))
        assert "<br>".join(turns).replace("\n", "\\n") == row[3]
        assert detect_format(json.loads(row[2])) == row[1]
        assert to_messages(json.loads(row[2]), row[1]) == to_messages(json.loads(row[2]))


def test_batches_for_map():
    rows = read_rows(FIXTURES / "messages.jsonl")
    plain = [{"messages": json.dumps(row["messages"]), "tools": json.dumps(row.get("tools"))} for row in rows]

    def convert(batch, indices):
        return to_messages_batch({name: [json.loads(v) for v in values] for name, values in batch.items()}, indices)

    # one row at a time: the first row must not decide which keys the messages of later rows may have
    settings = {"batched": True, "batch_size": 1, "with_indices": True, "features": message_features()}
    settings |= {"new_fingerprint": "mapped"}  # else `datasets` pickles all that the function can reach
    mapped = Dataset.from_list(plain).map(convert, **settings)
    for row, raw in zip(mapped, rows, strict=True):
        found = [{k: v for k, v in m.items() if v is not None and k != "tool_calls"} for m in row["messages"]]
        assert found == [{k: v for k, v in m.items() if k != "tool_calls"} for m in to_messages(raw)]
    assert json.loads(mapped[3]["messages"][2]["tool_calls"][0]["function"]["arguments"])["people"] == 2

    alpaca = {"instruction": ["x", "x"], "output": ["y", None]}
    assert len(to_messages_batch({"instruction": ["x"], "output": ["y"]})["messages"]) == 1
    with pytest.raises(FormatError, match="row 8: field 'output' is missing or null; format 'alpaca' needs it"):
        to_messages_batch(alpaca, [6, 7], format="alpaca")


def test_every_format_has_a_fixture_and_none_is_hidden_by_an_earlier_one():
    assert set(FORMATS) <= {path.stem for path in FIXTURES.glob("*.jsonl")}
    for name, known in FORMATS.items():
        assert detect_format({names[0]: ["x"] for names in known.needs}) == name
