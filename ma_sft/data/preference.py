"""Raw preference rows -> `prompt`, `chosen`, `rejected` in messages, as TRL's `RewardTrainer` and `DPOTrainer` take it.

| format | columns |
| --- | --- |
| `preference` | `prompt, chosen, rejected`: text or messages; CValues, Chinese-dpo-pairs, UltraFeedback |
| `hh-rlhf` | `chosen, rejected`: two dialogues that differ in their last answer |
| `pku-saferlhf` | `prompt, response_0, response_1, is_response_0_safe, is_response_1_safe, better_response_id` |
"""

from typing import Any

from ma_sft.data.formats import (
    Message,
    Row,
    check_order,
    completion,
    conversation,
    hh_turns,
    load_function,
    system_message,
)
from ma_sft.errors import FormatError

# Other names for the same three columns: CValues' first release, Intel's orca_dpo_pairs, Alpaca-like sets.
ALIASES = {
    "prompt": ("prompt", "question", "instruction"),
    "chosen": ("chosen", "pos_resp", "chosen_response"),
    "rejected": ("rejected", "neg_resp", "rejected_response"),
}


PKU = ("response_0", "response_1", "is_response_0_safe", "is_response_1_safe", "better_response_id")


Preference = dict[str, list[Message]]


def to_preference(row: Row, format: str | None = None) -> Preference | None:
    """One raw row as `{"prompt": messages, "chosen": messages, "rejected": messages}`.

    `prompt` ends with the user's (or a tool's) turn; `chosen` and `rejected` are the two answers.

    Args:
        row: column -> value; null columns count as missing.
        format: `preference`, `hh-rlhf`, `pku-saferlhf` or a function of the user's that returns the three columns, as
            `module:function` or `file.py:function`; None to go by the columns.

    Returns:
        None where the row says that neither answer should be learned: PKU-SafeRLHF's rows with two unsafe responses.
        There, a safe response beats an unsafe one, and `better_response_id` decides between two safe ones
        (https://arxiv.org/abs/2406.15513). Leave such rows out and count them.

    Raises:
        FormatError: an unknown format, a missing or wrong field, an empty answer, or two equal answers.
    """
    row = {key: value for key, value in row.items() if value is not None}
    name = format or detect_preference(row)
    if name == "pku-saferlhf":
        found = _pku(row)
        if found is None:
            return None
    elif name == "hh-rlhf":
        found = _hh_rlhf(row)
    elif name == "preference":
        columns = {column: next((a for a in ALIASES[column] if a in row), column) for column in ALIASES}
        found = _plain(row, columns["prompt"], columns["chosen"], columns["rejected"])
    else:
        found = load_function(name)(row)
        if found is None:
            return None
        found = _plain(found, "prompt", "chosen", "rejected")
    for side in ("chosen", "rejected"):
        check_order(found["prompt"] + found[side], f"prompt, {side}")
        if not any(m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls")) for m in found[side]):
            raise FormatError(f"field {side!r}: the answer is empty, so there is nothing to compare")
    if found["chosen"] == found["rejected"]:
        raise FormatError("fields 'chosen' and 'rejected': the two answers are the same, so neither is better")
    return found


def detect_preference(row: Row) -> str:
    """The format of a preference row, by its columns.

    Raises:
        FormatError: it has none; the message lists the columns.
    """
    if "prompt" in row and any(column in row for column in PKU):
        return "pku-saferlhf"
    has = {column: any(alias in row for alias in aliases) for column, aliases in ALIASES.items()}
    if has["chosen"] and has["rejected"]:
        return "preference" if has["prompt"] or not isinstance(row.get("chosen"), str) else "hh-rlhf"
    missing = [column for column, there in has.items() if not there]
    raise FormatError(
        f"unknown preference format: columns {sorted(row)}; nearest: preference (misses {', '.join(missing)}); "
        "known formats: preference, hh-rlhf, pku-saferlhf; rename columns, or pass format"
    )


def _plain(row: Row, prompt: str, chosen: str, rejected: str) -> Preference:
    sides = {}
    for name, field in (("chosen", chosen), ("rejected", rejected)):
        if row.get(field) is None:
            raise FormatError(f"field {field!r} is missing or null; format 'preference' needs it")
        sides[name] = row[field]
    if row.get(prompt) is None:  # TRL's implicit prompt: what two lists of messages begin with
        return _shared_prompt(*(conversation(sides[name], name, "assistant") for name in sides))
    text = row[prompt]
    if prompt == "instruction" and row.get("input"):
        text = "\n\n".join(conversation(row[f], f)[0]["content"] for f in ("instruction", "input"))
    messages = conversation(text, prompt)
    if isinstance(text, str) and text.lstrip("\n").startswith("Human:"):  # hh-rlhf, cut before the answer
        messages = [m for m in hh_turns(text, prompt) if m["content"]]
        sides = {name: side.strip() if isinstance(side, str) else side for name, side in sides.items()}
    if not messages or messages[0]["role"] != "system":
        messages = system_message(row) + messages
    return {"prompt": messages, **{name: completion(messages, side, name) for name, side in sides.items()}}


def _hh_rlhf(row: Row) -> Preference:
    for field in ("chosen", "rejected"):
        if field not in row:
            raise FormatError(f"field {field!r} is missing or null; format 'hh-rlhf' needs it")
    return _shared_prompt(hh_turns(row["chosen"], "chosen"), hh_turns(row["rejected"], "rejected"))


def _shared_prompt(chosen: list[Message], rejected: list[Message]) -> Preference:
    """Two dialogues cut where they part; an answer is everything behind it."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    at = min(at, len(chosen) - 1, len(rejected) - 1)
    sides = (chosen[at]["role"], rejected[at]["role"])
    if at == 0 or sides != ("assistant", "assistant"):
        raise FormatError(
            "fields 'chosen' and 'rejected': two dialogues that first differ in an answer expected; "
            f"they differ at turn {at + 1} ({sides[0]} and {sides[1]})"
        )
    return {"prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}


def _pku(row: Row) -> Preference | None:
    for field in ("prompt", *PKU):
        if field not in row:
            raise FormatError(f"field {field!r} is missing or null; format 'pku-saferlhf' needs it")
    for field in PKU[2:4]:
        if not isinstance(row[field], bool):
            raise FormatError(f"field {field!r}: true or false expected, found {row[field]!r}")
    better: Any = row["better_response_id"]
    if better not in (0, 1) or isinstance(better, bool):
        raise FormatError(f"field 'better_response_id': 0 or 1 expected, found {better!r}")
    safe = [row["is_response_0_safe"], row["is_response_1_safe"]]
    if not any(safe):
        return None
    best = int(better) if all(safe) else safe.index(True)
    return _plain(row, "prompt", f"response_{best}", f"response_{1 - best}")
