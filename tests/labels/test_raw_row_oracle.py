"""Conversations against an oracle that reads raw rows otherwise than the conversion: what a row says, as values.

Rows of turns are compared turn by turn: who speaks, each text, each name and argument of a call, what must not be
trained. Of flat rows, every text must stand in a message of the right side. It reads rows in no way that the
conversion does, so that both are wrong together only where a row means what neither thinks.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest
from helpers import ROOT, assistant, user
from hypothesis import given
from hypothesis import strategies as st

from ma_sft import to_messages
from ma_sft.data.messages import to_tools

Message = dict[str, Any]
SIDES = {
    **dict.fromkeys("assistant gpt model bot chatgpt bard claude chatbot function_call tool_call".split(), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys("tool function observation ipython function_response tool_response".split(), "tool"),
}
SAID = ("content", "value", "text", "reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
SYSTEM = ("system", "system_prompt", "system_message")
ASKED = "instruction input question query problem prompt context choices options A B C D".split()
ANSWERED = "output response answer solution completion chosen answers".split()
BY_LETTER = {"choices", "options", "A"}  # columns beside which an answer is a letter or a number
WEIGHTS = "train training trainable train_on_turn loss loss_weight loss_scale loss_mask weight output_with_loss".split()
GOOD = "good correct accepted valid safe is_good is_correct is_accepted is_valid is_safe".split()
BAD = "rejected deleted is_rejected is_deleted is_bad is_wrong".split()
# Keys that say how a value is wrapped, not what it is
WRAPPING = set("function name arguments parameters tool_call tool_calls think content text label tools".split())
MARKS = {"type", "id", "index", "tool_call_id"}


def compare_with_raw_row(
    row: dict[str, Any], messages: list[Message], tools: list[Any] | None
) -> tuple[list[str], str]:
    """What the conversation says otherwise than the row, and why it could not be compared, if so.

    Args:
        row: the raw row, column -> value.
        messages, tools: the conversation that was made of it.
    """
    turns = _turns(row)
    if turns is None:
        return [], _unplaced(row, messages)
    said_tools = [row.get("tools"), row.get("functions"), *(turn.get("tools") for turn in turns)]
    wrong = [] if _same(said_tools, tools) else ["the tools are others than the row's"]
    system = [turn for turn in turns if _side(turn) == "system"] or [{"content": row.get(key)} for key in SYSTEM]
    told = [message for message in messages if message["role"] == "system"]
    if any(_leaves(_said(turn)) for turn in system) and not _same(list(map(_said, system)), list(map(_said, told))):
        wrong.append("the system message is another than the row's")
    theirs, ours = (
        [(side, list(group)) for side, group in groupby(each, _side) if side != "system"] for each in (turns, messages)
    )
    if [side for side, _ in theirs] != [side for side, _ in ours]:
        return [*wrong, f"the row's turns are {[s for s, _ in theirs]}, the conversation's {[s for s, _ in ours]}"], ""
    for n, ((side, raw), (_, made)) in enumerate(zip(theirs, ours, strict=True)):
        if not _same(list(map(_said, raw)), list(map(_said, made))):
            wrong.append(f"turn {n} ({side}) says {_show(made)}, the row {_show(raw)}")
        if side == "assistant" and any(map(_forbidden, raw)) and all(message.get("train", True) for message in made):
            wrong.append(f"turn {n} ({side}) must not be trained, says the row")
    return wrong, ""


def _turns(row: dict[str, Any]) -> list[Message] | None:
    """The row's turns; None if it has none, but texts in columns."""
    for value in (row.get("messages"), row.get("conversations")):
        if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
            return value
    answer, prompt = (_turns_in_text(value) for value in (row.get("completion", row.get("chosen")), row.get("prompt")))
    prompt = prompt or []
    if not isinstance(answer, list) or not isinstance(prompt, list | str):
        return None
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return answer if answer[: len(prompt)] == prompt else prompt + answer


def _turns_in_text(value: Any) -> Any:
    """A cell of CSV holds a list of turns as JSON."""
    parsed = _parsed(value) if isinstance(value, str) else None
    turns = isinstance(parsed, list) and parsed and all(isinstance(turn, dict) and "role" in turn for turn in parsed)
    return parsed if turns else value


def _side(turn: Message) -> str:
    return SIDES.get(str(turn.get("role") or turn.get("from")).lower(), "user")


def _said(turn: Message) -> list[Any]:
    said = [turn.get(key) for key in SAID]
    if isinstance(said[0], list):  # text in parts is one text
        said[0] = "".join(
            str(part.get("text", part.get("value", "")) if isinstance(part, dict) else part) for part in said[0]
        )
    return said


def _forbidden(turn: Message) -> bool:
    return any(turn.get(key) == 0 for key in (*WEIGHTS, *GOOD)) or any(turn.get(key) == 1 for key in BAD)


def _same(one: Any, other: Any) -> bool:
    """Whether both say the same values; where one has a text that the other has taken apart, the same words."""
    return Counter(_leaves(one)) == Counter(_leaves(other)) or _words(one) == _words(other)


def _words(value: Any) -> Counter[str]:
    words = Counter(word for leaf in _leaves(value) for word in re.findall(r"\w+", leaf))
    return Counter({word: n for word, n in words.items() if word not in WRAPPING | MARKS})


def _leaves(value: Any) -> list[str]:
    """Every text and number inside a value; JSON text is read, its keys count as texts."""
    return list(_walk(value))


def _walk(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        parsed = _parsed(value)
        if parsed is not None:
            yield from _walk(parsed)
        elif value.strip():
            yield "".join(value.split())
    elif isinstance(value, dict):
        for key, item in value.items():
            if item is not None and key not in MARKS:
                yield from () if key in WRAPPING else (key,)
                yield from _walk(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _walk(item)
    elif value is not None:
        yield json.dumps(value, default=str)


def _parsed(text: str) -> Any:
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _unplaced(row: dict[str, Any], messages: list[Message]) -> str:
    """Why a row without turns is not proven to be the conversation; empty if it is."""
    columns = {name.removesuffix("_zh"): _leaves(value) for name, value in row.items() if value is not None}
    everything, answers = (
        "".join(_leaves([_said(m) for m in messages if side in (None, _side(m))])) for side in (None, "assistant")
    )
    if "chosen" in columns and "prompt" not in columns:  # hh-rlhf: one text with both sides
        speakers = Counter({name: 10**6 for name in ("Human", "Assistant")})
        both = (_words(each) - speakers for each in (row["chosen"], [_said(m) for m in messages]))
        return "" if next(both) == next(both) else "the words of column 'chosen' are not those of the conversation"
    by_letter = BY_LETTER & {*columns}
    answered = [name for name in ANSWERED if name in columns] or [name for name in ("text",) if name in columns]
    if not answered and not by_letter:
        return "rows in a form that only the conversion reads"
    for name in (name for name in ASKED if name in columns):
        if not all(text in everything for text in columns[name]):
            return f"column {name!r} stands in no message"
    for name in [] if by_letter else answered:
        if not all(text in answers for text in columns[name]):
            return f"column {name!r} stands in no answer"
    return ""


def _show(turns: list[Message]) -> str:
    text = " ".join(_leaves([_said(turn) for turn in turns]))
    return repr(text if len(text) < 60 else text[:60] + "...")


CONVERSATION = [user("q"), assistant("a")]


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"messages": CONVERSATION}, ""),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ""),
        ({"conversations": [{"from": "gpt", "value": "q"}, {"from": "human", "value": "a"}]}, "the row's turns are"),
        ({"messages": [user("q"), assistant("b")]}, "says"),
        ({"messages": CONVERSATION, "system": "Be brief."}, "system message"),
        ({"messages": CONVERSATION, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": [*CONVERSATION, user("r")]}, "the row's turns are"),
        ({"messages": [user("q"), assistant("a", reasoning="why")]}, "says"),
        *(
            ({"messages": [user("q"), assistant("a", **mark)]}, "must not be trained")
            for mark in ({"weight": 0}, {"is_correct": False}, {"rejected": True})
        ),
        ({"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]}, ""),
        ({"prompt": json.dumps(CONVERSATION[:1]), "completion": json.dumps(CONVERSATION[1:])}, ""),
        ({"prompt": "q", "completion": json.dumps([assistant("b")])}, "says"),
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
