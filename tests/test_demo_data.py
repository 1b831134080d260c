"""The demo's data: seeded, big enough, and with nothing of the held-out rows in the training rows."""

import json

import demo_data
from helpers import read_rows

FIELDS = ["intent", "product", "quantity", "urgency", "order_id"]


def test_files_are_seeded_and_disjoint(tmp_path):
    demo_data.write(tmp_path / "a")
    demo_data.write(tmp_path / "b")
    demo_data.write(tmp_path / "c", seed=1)
    names = ["train.jsonl", "train_multi_turn.jsonl", "heldout.jsonl"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert all((tmp_path / "a" / n).read_bytes() != (tmp_path / "c" / n).read_bytes() for n in names)

    train, multi_turn, held_out = (read_rows(tmp_path / "a" / n) for n in names)
    assert len(train) >= 2000 and len(multi_turn) >= 300 and len(held_out) >= 100
    assert len({row["input"] for row in train}) == len(train)
    seen = [json.loads(row["output"]) for row in train]
    seen += [json.loads(turn["value"]) for row in multi_turn for turn in row["conversations"][1::2]]
    asked = [json.loads(row["output"]) for row in held_out]
    assert all(list(order) == FIELDS for order in seen + asked)
    for key in ("product", "order_id"):
        assert not {o[key] for o in seen if o[key]} & {o[key] for o in asked}
    assert any("一" <= c <= "鿿" for row in held_out for c in row["input"])


def test_the_two_sides_share_no_word_list_entry():
    for language in ("en", "zh"):
        for key, words in demo_data.WORDS["heldout"][language].items():
            assert not set(words) - {""} & set(demo_data.WORDS["train"][language][key]), (language, key)
