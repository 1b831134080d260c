"""Raw preference rows -> `prompt`, `chosen`, `rejected` in messages, as TRL's `RewardTrainer`, `DPOTrainer` take it."""

from typing import Any

from ma_sft.data.messages import (
    BadAnswer,
    Message,
    Row,
    TrackedRow,
    conversation,
    expected,
    list_of_turns,
    spoken,
    text_of,
    truth,
    turns_in_text,
    with_context,
)
from ma_sft.errors import FormatError

# The names of the three columns: TRL's, CValues', Intel's orca_dpo_pairs', Alpaca-like sets', LLaMA-Factory's ranking,
# ms-swift's, OpenAI's.
ALIASES = {
    "prompt": ("prompt", "question", "instruction", "query", "input", "conversations", "conversation", "messages"),
    "chosen": ("chosen", "pos_resp", "chosen_response", "chosen_messages", "preferred_output"),
    "rejected": ("rejected", "neg_resp", "rejected_response", "rejected_messages", "non_preferred_output"),
}
PKU = ("response_0", "response_1", "is_response_0_safe", "is_response_1_safe", "better_response_id")
Preference = dict[str, list[Message]]


def spread(row: TrackedRow) -> TrackedRow:
    """The row with three columns, where one column holds two of them."""
    output, request, messages = (dict.get(row, column) for column in ("output", "input", "messages"))
    chosen, rejected = (row.first(ALIASES[side]) for side in ("chosen", "rejected"))
    parted: Row = {}
    if isinstance(output, list) and len(output) == 2 and not chosen:  # Alpaca's ranking: the good answer, the bad one
        parted = {"output": None, "chosen": output[0], "rejected": output[1]}
    elif isinstance(request, dict) and "messages" in request and chosen:  # OpenAI's
        parted = {"input": None, **request}
    elif rejected and not chosen and isinstance(messages, list) and len(messages) > 1:  # ms-swift's
        parted = {"messages": messages[:-1], "chosen": messages[-1]}
        if rejected == "rejected_messages":
            parted = {"messages": None, "chosen": messages}
    if not parted:
        return row
    row.used |= {key for key, value in parted.items() if value is None}
    found = TrackedRow({**row, **parted})
    found.used = row.used  # what is read of the one is read of the other
    return found


def _plain(row: TrackedRow) -> Preference:
    row = spread(row)
    prompt, chosen, rejected = (row.first(ALIASES[column]) or column for column in ALIASES)
    sides = {"chosen": row[chosen], "rejected": row[rejected]}
    if row.get(prompt) in (None, sides["chosen"]):  # TRL's implicit prompt: what two dialogues begin with
        return _shared_prompt(row, *(conversation(list_of_turns(sides[name], name), name) for name in sides))
    text = row[prompt]
    if prompt == "instruction" and row.get("input"):
        text = f"{text_of(row, prompt)}\n\n{text_of(row, 'input')}"
    messages = with_context(row, prompt_turns(text, prompt))
    return {"prompt": messages, **{name: completion(messages, side, name, text) for name, side in sides.items()}}


def prompt_turns(value: Any, field: str) -> list[Message]:
    """The turns that ask: a text, also one of hh-rlhf that is cut before the answer; or a list of turns."""
    if spoken(value) == "Human":
        return [m for m in conversation(list_of_turns(value, field), field) if m["content"]]
    return conversation(turns_in_text(value), field)


def completion(prompt: list[Message], value: Any, field: str, asked: Any = None) -> list[Message]:
    """The messages that answer `prompt`: a text, or a list of messages, which may begin with the prompt itself."""
    # What follows hh-rlhf's `Assistant:` begins with a space that is none of the answer's.
    value = value.strip() if isinstance(value, str) and spoken(asked) == "Human" else value
    messages = conversation(turns_in_text(value), field, "assistant")
    for start in (prompt, [m for m in prompt if m["role"] != "system"]):
        if start and messages[: len(start)] == start:
            return messages[len(start) :]
    return messages


def _shared_prompt(row: TrackedRow, chosen: list[Message], rejected: list[Message]) -> Preference:
    """Two dialogues cut where they part; an answer is everything behind it."""
    last = min(len(chosen), len(rejected)) - 1
    at = next((i for i in range(last) if chosen[i] != rejected[i]), last)
    sides = (chosen[at]["role"], rejected[at]["role"])
    if at == 0 or sides != ("assistant", "assistant"):
        raise FormatError(
            "fields 'chosen' and 'rejected': two dialogues that first differ in an answer expected; "
            f"they differ at turn {at + 1} ({sides[0]} and {sides[1]})"
        )
    return {"prompt": with_context(row, chosen[:at]), "chosen": chosen[at:], "rejected": rejected[at:]}


def _pku(row: TrackedRow) -> Preference:
    *answers, first, second, better = (row[field] for field in PKU)
    marks = dict(zip(PKU[2:], map(truth, (first, second, better)), strict=True))
    if unclear := [field for field, mark in marks.items() if mark is None]:
        raise expected("true or false, 1 or 0", unclear[0], row[unclear[0]])
    *safe, second_is_better = marks.values()
    if not any(safe):
        raise BadAnswer("neither answer is a good one")
    best = int(bool(second_is_better)) if all(safe) else safe.index(True)
    return _plain(TrackedRow({"prompt": row["prompt"], "chosen": answers[best], "rejected": answers[1 - best]}))


SIDES = {"preference": _plain, "hh-rlhf": _plain, "pku-saferlhf": _pku}
