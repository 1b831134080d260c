"""Preference rows of every common source become what TRL's trainers take as it is: `release/test_handoff.py` trains."""

import json

import pytest
from helpers import ROOT, read_rows

from ma_sft import FormatError, to_preference
from ma_sft.data.mixture import load_mixture

FIXTURES = sorted((ROOT / "tests/files/preference").glob("*.jsonl"))
PKU = {
    **{"prompt": "p", "response_0": "zero", "response_1": "one", "better_response_id": 1, "safer_response_id": 0},
    **{"is_response_0_safe": True, "is_response_1_safe": True},
}


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_golden(path):
    golden = json.loads(path.with_suffix(".golden.json").read_text(encoding="utf-8"))
    assert [to_preference(row) for row in read_rows(path)] == golden


@pytest.mark.parametrize(
    ("safe", "better", "sides"),
    [
        ((True, True), 0, ("zero", "one")),
        ((True, True), 1, ("one", "zero")),
        ((True, False), 1, ("zero", "one")),  # safety comes before quality
        ((False, True), 0, ("one", "zero")),
        ((False, False), 1, None),
    ],
)
def test_safety_rule(safe, better, sides):
    row = {**PKU, "is_response_0_safe": safe[0], "is_response_1_safe": safe[1], "better_response_id": better}
    for given in (row, {key: str(value) for key, value in row.items()}):  # as JSON and as CSV have it
        found = to_preference(given)
        assert (found and (found["chosen"][0]["content"], found["rejected"][0]["content"])) == sides


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "answer": "a"}, "unknown format: columns ['answer', 'prompt']"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "misses rejected"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "the two answers are the same"),
        ({"prompt": "p", "chosen": " ", "rejected": "a"}, "the response is empty"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "field 'prompt': text expected, found int 5"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: y"}, "differ at turn 1"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a\n\nAssistant: y"}, "differ at turn 1"),
        ({**PKU, "is_response_0_safe": "so"}, "field 'is_response_0_safe': true or false, 1 or 0 expected, found str"),
        ({**PKU, "better_response_id": 2}, "field 'better_response_id': true or false, 1 or 0 expected, found int 2"),
        ({**PKU, "response_1": None}, "nearest: pku-saferlhf (misses response_1)"),
    ],
)
def test_refused(row, message):
    with pytest.raises(FormatError) as error:
        to_preference(row)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_own_function(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def sides(row):\n"
        "    if row['a'] == row['b']:\n        return None\n"
        "    best, other = ('x', 'y') if row['a'] > row['b'] else ('y', 'x')\n"
        "    return {'prompt': 'Which?', 'chosen': best, 'rejected': other}\n"
    )
    assert to_preference({"a": 1, "b": 2}, f"{path}:sides")["chosen"][0]["content"] == "y"
    assert to_preference({"a": 1, "b": 1}, f"{path}:sides") is None


def test_mixture_counts_what_has_no_better_side():
    mixture = load_mixture([str(path) for path in FIXTURES], kind="preference", system_prompt="Be kind.")
    assert len(mixture.train) == sum(len(read_rows(path)) for path in FIXTURES) - 1
    assert mixture.report.skipped == 1
    (stage,) = [s for s in mixture.report.stages if s.removed]
    assert stage.name.endswith("convert from pku-saferlhf") and stage.removed == {"bad answers": 1}
    assert all(row["prompt"][0]["role"] == "system" for row in mixture.train)
