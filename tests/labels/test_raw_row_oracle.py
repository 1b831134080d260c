"""Conversations against an oracle that reads raw rows otherwise than the conversion: values, wherever they stand."""

import json

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from raw_row_oracle import compare_with_raw_row

from ma_sft import to_messages
from ma_sft.data.messages import to_tools

CONVERSATION = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"messages": CONVERSATION}, ""),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ""),
        ({"conversations": [{"from": "gpt", "value": "q"}, {"from": "human", "value": "a"}]}, "the row's turns are"),
        ({"messages": [CONVERSATION[0], {"role": "assistant", "content": "b"}]}, "says"),
        ({"messages": CONVERSATION, "system": "Be brief."}, "system message"),
        ({"messages": CONVERSATION, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": [*CONVERSATION, {"role": "user", "content": "r"}]}, "the row's turns are"),
        ({"messages": [CONVERSATION[0], {**CONVERSATION[1], "weight": 0}]}, "must not be trained"),
        ({"messages": [CONVERSATION[0], {**CONVERSATION[1], "reasoning": "why"}]}, "says"),
        ({"messages": [CONVERSATION[0], {**CONVERSATION[1], "is_correct": False}]}, "must not be trained"),
        ({"messages": [CONVERSATION[0], {**CONVERSATION[1], "rejected": True}]}, "must not be trained"),
        ({"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]}, ""),
        ({"prompt": json.dumps(CONVERSATION[:1]), "completion": json.dumps(CONVERSATION[1:])}, ""),
        ({"prompt": "q", "completion": json.dumps([{"role": "assistant", "content": "b"}])}, "says"),
    ],
)
def test_the_oracle_compares_turns(row, wrong):
    found, unread = compare_with_raw_row(row, CONVERSATION, None)
    assert unread == "" and bool(found) is bool(wrong) and wrong in " ".join(found)


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, ""),
        ({"question": "q", "context": "z", "answer": "a"}, "'context'"),
        ({"question": "q", "answer": "b"}, "'answer'"),
        ({"this": "q", "that": "a"}, "only the conversion"),
    ],
)
def test_the_oracle_finds_a_flat_rows_columns(row, unread):
    found, why = compare_with_raw_row(row, CONVERSATION, None)
    assert found == [] and bool(why) is bool(unread) and unread in why


WORDS = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=8)
ANSWER = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": WORDS},
    optional={"reasoning_content": WORDS, "weight": st.sampled_from([0, 1])},
)
QUESTION = st.fixed_dictionaries({"role": st.just("user"), "content": WORDS})
CHAT = (
    st.lists(st.tuples(QUESTION, ANSWER), min_size=1, max_size=3)
    .map(lambda turns: [message for pair in turns for message in pair])
    .filter(lambda chat: any(message.get("weight") != 0 for message in chat[1::2]))  # else nothing is to be trained
)


def sharegpt(chat):
    names = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[message["role"]], "value": message["content"]} for message in chat]}


ROWS = st.one_of(
    st.fixed_dictionaries({"messages": CHAT}, optional={"system": WORDS}),
    CHAT.map(sharegpt),
    CHAT.map(lambda chat: {"prompt": chat[:-1], "completion": [{**chat[-1], "weight": 1}]}),
    st.fixed_dictionaries({"instruction": WORDS, "input": WORDS, "output": WORDS}),
    st.fixed_dictionaries({"question": WORDS, "answer": WORDS}),
)


@given(ROWS)
def test_a_conversation_is_what_its_row_states(row):
    assert compare_with_raw_row(row, to_messages(row), None) == ([], "")


@given(CHAT, st.data())
def test_another_value_is_found(chat, data):
    at = data.draw(st.integers(0, len(chat) - 1))
    other = [{**message, "content": message["content"] + "x" * (n == at)} for n, message in enumerate(chat)]
    wrong, _ = compare_with_raw_row({"messages": other}, to_messages({"messages": chat}), None)
    assert wrong


# Formats whose rows are no conversations by themselves (a preference, a choice by letter, text)
FILES = sorted((ROOT / "tests/files/formats").glob("*.jsonl"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rows_of_every_format_are_what_they_state(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages = to_messages(row)
        wrong, _ = compare_with_raw_row(row, messages, to_tools(row))
        assert wrong == [], row
