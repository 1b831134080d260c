"""Generated conversations, written as rows of each form, become exactly the conversations that they were made from.

What a row must become is known by construction, so no rule of the conversion decides what is right; the formats of
real data sets, each with its right messages, are in `tests/files/formats`.
"""

import json

from helpers import assistant, system, user
from hypothesis import given
from hypothesis import strategies as st

from ma_sft import to_messages

WORDS = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=8)
ANSWER = st.builds(
    lambda content, more: assistant(content, **more),
    WORDS,
    st.fixed_dictionaries({}, optional={"reasoning_content": WORDS, "train": st.just(False)}),
)
CHAT = (
    st.lists(st.tuples(WORDS.map(user), ANSWER), min_size=1, max_size=3)
    .map(lambda turns: [message for pair in turns for message in pair])
    .filter(lambda chat: not all("train" in message for message in chat[1::2]))  # else nothing is to be trained
)
NAMES = {"user": "human", "assistant": "gpt"}


def turn(message, forbids):
    """The message as a row has it: what must not be trained is marked by a weight or a verdict."""
    marks = {"weight": 0} if forbids == "weight" else {forbids: forbids == "rejected"}
    forbidden = message.get("train") is False
    return {key: value for key, value in message.items() if key != "train"} | (marks if forbidden else {})


def sharegpt(chat):
    return [{"from": NAMES[m["role"]], "value": m["content"]} for m in chat]


def plain(chat):
    return [{"role": message["role"], "content": message["content"]} for message in chat]


@given(CHAT, WORDS, st.sampled_from(["weight", "is_correct", "rejected"]))
def test_turns_become_the_conversation_that_they_state(chat, told, forbids):
    turns = [turn(message, forbids) for message in chat]
    said, last = plain(chat), plain(chat)[-1:]
    assert to_messages({"messages": turns}) == chat
    assert to_messages({"messages": turns, "system": told}) == [system(told), *chat]
    assert to_messages({"conversations": sharegpt(chat)}) == said
    for write in (lambda turns: turns, json.dumps):  # a cell of CSV holds turns as JSON
        assert to_messages({"prompt": write(said[:-1]), "completion": write(last)}) == said


@given(WORDS, WORDS, WORDS)
def test_columns_become_a_question_and_its_answer(question, more, answer):
    assert to_messages({"question": question, "answer": answer}) == [user(question), assistant(answer)]
    row = {"instruction": question, "input": more, "output": answer}
    assert to_messages(row) == [user(f"{question}\n\n{more}"), assistant(answer)]
