"""Every format becomes the same messages, and what is no conversation is refused by name."""

import pytest

from ma_sft import FormatError, to_messages
from ma_sft.formats import FORMATS, detect_format, formatting_func

USER = {"role": "user", "content": "What is 2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


@pytest.mark.parametrize(
    ("row", "format", "messages"),
    [
        ({"messages": [SYSTEM, USER, ASSISTANT]}, "messages", [SYSTEM, USER, ASSISTANT]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is 2+2?"}]}, ASSISTANT]},
            "messages",
            [USER, ASSISTANT],
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            "messages",
            [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
        (
            {"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "4"}]},
            "sharegpt",
            [USER, ASSISTANT],
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "user", "value": "x"}, {"from": "chatgpt", "value": "y"}],
            },
            "sharegpt",
            [SYSTEM, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        ),
        ({"instruction": "What is 2+2?", "output": "4"}, "alpaca", [USER, ASSISTANT]),
        ({"instruction": "What is 2+2?", "input": "", "output": "4"}, "alpaca", [USER, ASSISTANT]),
        (
            {"instruction": "Add", "input": "2+2", "output": "4"},
            "alpaca",
            [{"role": "user", "content": "Add\n\n2+2"}, ASSISTANT],
        ),
        (
            {"instruction": "And 3+3?", "output": "6", "history": [["What is 2+2?", "4"]]},
            "alpaca",
            [USER, ASSISTANT, {"role": "user", "content": "And 3+3?"}, {"role": "assistant", "content": "6"}],
        ),
        (
            {"instruction_zh": "二加二？", "input_zh": "", "output_zh": "四"},
            "alpaca-zh",
            [{"role": "user", "content": "二加二？"}, {"role": "assistant", "content": "四"}],
        ),
        ({"prompt": "What is 2+2?", "completion": "4"}, "prompt-completion", [USER, ASSISTANT]),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, "prompt-completion", [SYSTEM, USER, ASSISTANT]),
        (
            {"chosen": "\n\nHuman: What is 2+2?\n\nAssistant: 4\n\nHuman: Sure?\n\nAssistant: Yes", "rejected": "x"},
            "hh-rlhf",
            [USER, ASSISTANT, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}],
        ),
        (
            {"question": "Sky?", "choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answerKey": "2"},
            "multiple-choice",
            [{"role": "user", "content": "Sky?\n1. red\n2. blue"}, {"role": "assistant", "content": "2. blue"}],
        ),
        (
            {"question": "Sky?", "choices": ["red", "blue"], "answer": 1},
            "mmlu",
            [{"role": "user", "content": "Sky?\nA. red\nB. blue"}, {"role": "assistant", "content": "B. blue"}],
        ),
        ({"question": "What is 2+2?", "answer": "4"}, "question-answer", [USER, ASSISTANT]),
        ({"query": "What is 2+2?", "response": "4"}, "query-response", [USER, ASSISTANT]),
        ({"problem": "What is 2+2?", "solution": "4"}, "problem-solution", [USER, ASSISTANT]),
    ],
)
def test_to_messages(row, format, messages):
    assert detect_format(row) == format
    assert to_messages(row) == messages
    assert to_messages(row, format) == messages


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"foo": "x"}, "unknown format: columns ['foo']; known formats: "),
        ({"instruction": "x", "answer": "y"}, "alpaca (misses output)"),
        ({"instruction": "x", "output": None}, "alpaca (misses output)"),
        ({"instruction": "x", "output": ""}, "the response is empty"),
        ({"instruction": 5, "output": "y"}, "field 'instruction': text expected, found int 5"),
        ({"messages": []}, "field 'messages': a list of turns expected"),
        ({"messages": [USER]}, "no response to train on: roles are ['user']"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "field 'messages[0].role'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "field 'messages[1].content': text expected"),
        ({"conversations": [{"from": "human", "value": 3}]}, "field 'conversations[0].value'"),
        ({"chosen": "no turns here", "rejected": "x"}, "field 'chosen'"),
        ({"question": "q", "choices": ["a", "b"], "answerKey": "Z"}, "field 'answerKey': one of ['A', 'B'] expected"),
        ({"instruction": "a\0b", "output": "y"}, "field 'instruction' holds a NUL character"),
        ({"instruction": "a\ud800", "output": "y"}, "lone surrogate at character 1"),
    ],
)
def test_refused(row, message):
    with pytest.raises(FormatError) as error:
        to_messages(row)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_explicit_format_wins_over_the_columns():
    row = {"messages": [USER, ASSISTANT], "question": "q", "answer": "a"}
    assert to_messages(row, "question-answer")[0]["content"] == "q"
    with pytest.raises(FormatError, match="field 'instruction' is missing or null; format 'alpaca' needs it"):
        to_messages(row, "alpaca")


def test_own_function_by_name(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def turns(row):\n"
        "    return [{'role': 'user', 'content': row['q']}, {'role': 'assistant', 'content': row['a']}]\n"
    )
    assert to_messages({"q": "What is 2+2?", "a": "4"}, f"{path}:turns") == [USER, ASSISTANT]


def test_formatting_func_on_rows_and_batches():
    assert (
        formatting_func({"instruction": "Add", "input": "2+2", "output": "4"}) == "###Question: Add 2+2\n###Answer: 4"
    )
    assert formatting_func({"instruction": ["Add", "Hi"], "input": ["2+2", ""], "output": ["4", "Yo"]}) == [
        "###Question: Add 2+2\n###Answer: 4",
        "###Question: Hi\n###Answer: Yo",
    ]


def test_no_format_is_hidden_by_an_earlier_one():
    for name, known in FORMATS.items():
        assert detect_format(known.columns) == name
