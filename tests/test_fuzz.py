"""Good files are broken at random: ma_sft answers with its own errors or with counts, and never with a wrong label."""

import gzip
import json
import random
import re
import string

import pytest
import zstandard
from breaking import mutate, spoil
from datasets import Dataset
from helpers import ROOT, load_tokenizer, read_rows

from ma_sft import FormatError, MaSftError, to_messages, to_preference
from ma_sft.data.mixture import load_mixture
from ma_sft.labels.encoder import ChatEncoder

FORMATS = sorted((ROOT / "tests/files/formats").glob("*.jsonl"))
PREFERENCES = sorted((ROOT / "tests/files/preference").glob("*.jsonl"))


def strings(value):
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(item)


def check_messages(messages, row):
    """What any result must be: known roles in an order that templates know, and texts that stand in the row."""
    assert messages
    roles = [m["role"] for m in messages]
    assert "assistant" in roles and set(roles) <= {"system", "user", "assistant", "tool"}
    assert "system" not in roles[1:]
    given = "\0".join(strings(row)) + "".join(s for s in strings(row) if s != "text") + json.dumps(row)
    for message in messages:
        assert isinstance(message["content"], str) and "\0" not in message["content"]
        message["content"].encode()
        for call in message.get("tool_calls") or []:
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
        if message["content"].strip() not in given:  # it is put together from several fields
            assert set(re.findall(r"\w+", message["content"])) <= {*string.ascii_uppercase, *re.findall(r"\w+", given)}


def conversations(row, path, rng):
    """What a row becomes: a conversation, or the two of a preference, or none where neither answer is safe."""
    if path in FORMATS:
        return [to_messages(row, rng.choice([None, path.stem if path.stem != "ruozhiba" else "alpaca"]))]
    sides = to_preference(row)
    if sides is None:
        assert {row["is_response_0_safe"], row["is_response_1_safe"]} == {False}  # or 0
        return []
    assert sides["chosen"] != sides["rejected"]
    assert sides["chosen"][0]["role"] == sides["rejected"][0]["role"] == "assistant"
    return [sides["prompt"] + sides["chosen"], sides["prompt"] + sides["rejected"]]


@pytest.mark.parametrize("path", [*FORMATS, *PREFERENCES], ids=lambda path: f"{path.parent.stem}-{path.stem}")
def test_rows(path):
    rng = random.Random(path.stem)
    rows, kept = read_rows(path), 0
    for _ in range(1500):
        row = mutate(rng.choice(rows), rng)
        try:
            found = conversations(row, path, rng)
        except FormatError as error:
            assert "\n" not in str(error)
            str(error).encode()
            continue
        kept += bool(found)
        for messages in found:
            check_messages(messages, row)
    assert kept > 20


def break_line(row, rng):
    """The row as a line of a file, broken as JSON, as a row, or both."""
    if rng.random() < 0.5:
        return json.dumps(mutate(row, rng)).encode()
    return spoil(json.dumps(row, ensure_ascii=False).encode(), rng).replace(b"\n", b"")


@pytest.mark.parametrize("path", FORMATS, ids=lambda path: path.stem)
def test_files(path, tmp_path):
    rng = random.Random(path.stem)
    rows = read_rows(path)
    format = "alpaca" if path.stem == "ruozhiba" else path.stem
    encoder = ChatEncoder(load_tokenizer("smollm2"))
    for number in range(5):
        lines, good = [], {}
        for at in range(1, 13):
            row = rng.choice(rows)
            if rng.random() < 0.5 or at == 2:  # which tells that a first line is cut off
                good[at] = to_messages(row)
            lines.append(json.dumps(row).encode() if at in good else break_line(row, rng))
        file = tmp_path / f"{number}.jsonl"
        file.write_bytes(b"\n".join(lines))
        mixture = load_mixture([{"path": str(file), "format": format}], on_error="skip")
        assert len(mixture.train) + mixture.report.skipped == sum(bool(line.strip()) for line in lines)
        for stage in mixture.report.stages:
            assert stage.rows_in - sum(stage.removed.values()) == stage.rows_out
        seen = set()
        for row in mixture.train:
            at = int(row["origin"].rpartition(":")[2])
            messages = [{key: value for key, value in m.items() if value is not None} for m in row["messages"]]
            for call in (call for m in messages for call in m.get("tool_calls") or []):
                if call["id"] is None:
                    del call["id"]
            if at in good:
                seen.add(at)
                assert messages == good[at]
            check_messages(messages, json.loads(lines[at - 1]))
            if all(m.keys() == {"role", "content"} for m in messages) and messages[0]["role"] != "assistant":
                ((example,),) = encoder.encode([messages])
                answers = [m["content"] for m in messages if m["role"] == "assistant"]
                ids = [example.input_ids[turn.start : turn.end] for turn in example.turns]
                assert encoder.tokenizer.batch_decode(ids) == [f"{answer}<|im_end|>" for answer in answers]
                assert sum(label != -100 for label in example.labels) == sum(map(len, ids))
        assert seen == set(good)
        broken = next((at for at in range(1, 13) if at not in good), None)
        if mixture.report.skipped:
            with pytest.raises(MaSftError, match=rf"{number}\.jsonl, line \d+: ") as error:
                load_mixture([{"path": str(file), "format": format}])
            assert int(re.search(r"line (\d+)", str(error.value))[1]) >= broken


@pytest.mark.parametrize("kind", [".json", ".csv", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_broken_containers(kind, tmp_path):
    rng = random.Random(kind)
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(50)]
    whole = Dataset.from_list(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    whole.to_parquet(tmp_path / "rows.parquet")
    whole.to_csv(tmp_path / "rows.csv")
    content = {
        ".json": json.dumps(rows, indent=1).encode(),
        ".csv": (tmp_path / "rows.csv").read_bytes(),
        ".jsonl.gz": gzip.compress(lines),
        ".jsonl.zst": zstandard.compress(lines),
        ".parquet": (tmp_path / "rows.parquet").read_bytes(),
    }[kind]
    outcomes = set()
    for number in range(20):
        file = tmp_path / f"{number}{kind}"
        file.write_bytes(spoil(content, rng) if number else content)
        try:
            mixture = load_mixture([{"path": str(file), "format": "alpaca"}], on_error="skip")
        except MaSftError as error:
            assert f"{number}{kind}" in str(error) and "\n" not in str(error)
            outcomes.add("error")
            continue
        outcomes.add("rows")
        for row in mixture.train:
            question, answer = (m["content"] for m in row["messages"])
            if number == 0:
                assert answer == f"It is {re.search(r'[0-9]+', question)[0]}."
        assert number or len(mixture.train) == 50
    assert outcomes == {"error", "rows"}
