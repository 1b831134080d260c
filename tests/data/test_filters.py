"""Each filter removes what its name says, counts it, shows it, and leaves the rest."""

import numpy as np
import pytest
from datasets import Dataset
from helpers import assistant, load_tokenizer, user, write_rows

from ma_sft.data import filters
from ma_sft.data.filters import hashes_of, near_duplicates, split_held_out
from ma_sft.data.mixture import load_mixture

LONG = "The museum opens at nine in the morning and closes at six in the evening on every day but Monday"


def write(path, pairs):
    return write_rows(path, ({"question": question, "answer": answer} for question, answer in pairs))


def rows_of(pairs):
    columns = [[user(q), assistant(a)] for q, a in pairs]
    return Dataset.from_list([{"messages": messages, **hashes_of({"messages": messages})} for messages in columns])


GOOD = [
    ("How are you?", "Fine, thanks."),
    ("你好吗？", "我很好，谢谢。"),
    ("2 + 2?", "4"),
    ("Sorry?", "I meant Tuesday."),
]


@pytest.mark.parametrize(
    ("filters", "bad", "found"),
    [
        ({"max_chars": 60}, [("Hi", "x" * 59)], "61 characters"),
        ({"min_chars": 6}, [("a", "b")], "2 characters"),
        ({"max_tokens": 40, "tokenizer": "demo"}, [("Hi", "one two three " * 20)], "tokens"),
        ({"min_tokens": 3, "tokenizer": "demo"}, [("a", "b")], "2 tokens"),
        ({"min_response_chars": 2}, [("2 + 2?", "4")], "an answer of 1 characters"),
    ],
)
def test_row_filters(tmp_path, filters, bad, found):
    good = [pair for pair in GOOD if pair not in bad]
    mixture = load_mixture([write(tmp_path / "a.jsonl", [*good, *bad])], filters=filters)
    assert sorted(m[0]["content"] for m in mixture.train["messages"]) == sorted(question for question, _ in good)
    (name,) = (key for key in filters if key != "tokenizer")
    assert mixture.report.filtered == ({name: len(bad)} if bad else {})
    examples = [e for stage in mixture.report.stages for e in stage.examples.get(name, [])]
    assert len(examples) == min(5, len(bad))
    assert all(f"a.jsonl:{len(good) + 1 + i}: " in example and found in example for i, example in enumerate(examples))


def test_another_tokenizer_in_the_same_folder_counts_anew(tmp_path):
    path = write(tmp_path / "a.jsonl", [("你好吗？" * 9, "我很好。"), ("Hi", "Yo")])
    for name, left in (("smollm2", 1), ("qwen3", 2)):
        load_tokenizer(name).save_pretrained(tmp_path / "model")
        filters.load_tokenizer.cache_clear()  # as of a new process
        limits = {"max_tokens": 50, "tokenizer": str(tmp_path / "model")}
        assert len(load_mixture([path], filters=limits).train) == left


def test_own_function(tmp_path):
    code = tmp_path / "mine.py"
    code.write_text("def polite(messages):\n    return 'please' in messages[0]['content'].lower()\n")
    path = write(tmp_path / "a.jsonl", [("Please sing.", "La"), ("Sing!", "No")])
    mixture = load_mixture([{"path": path, "filters": {"function": f"{code}:polite"}}])
    assert [m[0]["content"] for m in mixture.train["messages"]] == ["Please sing."]
    assert mixture.report.filtered == {"function": 1}


def test_exact_duplicates_across_sources_keep_the_first(tmp_path):
    one = write(tmp_path / "1.jsonl", [("a?", "x"), ("b?", "y"), ("a?", "x")])
    two = write(tmp_path / "2.jsonl", [("b?", "y"), ("b?", "other")])
    mixture = load_mixture([one, two], filters={"exact_duplicates": True})
    kept = sorted(origin.rsplit("/")[-1] for origin in mixture.train["origin"])
    assert kept == ["1.jsonl:1", "1.jsonl:2", "2.jsonl:2"]
    (stage,) = (s for s in mixture.report.stages if s.removed)
    assert stage.removed == {"exact_duplicates": 2} and "like " in stage.examples["exact_duplicates"][0]


def phrases(text):
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def test_near_duplicates_agree_with_the_similarity_itself():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(500)]
    texts = []
    for _ in range(60):
        text = rng.choice(words, 60).tolist()
        texts.append(text)
        for changes in (1, 4, 12):
            copy = list(text)
            for at in rng.choice(60, changes, replace=False):
                copy[at] = rng.choice(words)
            texts.append(copy)
    texts = [" ".join(text) for text in texts]
    pairs = {tuple(sorted(pair)) for pair in near_duplicates(rows_of([("", text) for text in texts]), 0.7).tolist()}
    sets = [phrases(text) for text in texts]
    similar = {(i, j): len(a & sets[j]) / len(a | sets[j]) for i, a in enumerate(sets) for j in range(i)}
    sure = {(j, i) for (i, j), value in similar.items() if value > 0.85}
    assert len(sure) == 60  # one changed word of sixty leaves 55 of 61 phrases
    assert sure <= pairs
    assert all(similar[max(pair), min(pair)] > 0.5 for pair in pairs)


def test_near_duplicates_keep_the_first_of_a_group(tmp_path):
    answers = (("When?", f"{LONG}."), ("When?", f"{LONG}!!"), ("when", LONG.upper()), ("Why?", "No idea."))
    path = write(tmp_path / "a.jsonl", [*answers, ("When?", "Never.")])
    mixture = load_mixture([path], filters={"near_duplicates": 0.8})
    assert sorted(origin[-1] for origin in mixture.train["origin"]) == ["1", "4", "5"]
    wall = "长城是中国古代的伟大工程，绵延万里，气势磅礴"
    chinese = [("介绍长城", f"{wall}。"), ("介绍长城", f"{wall}！"), ("介绍长江", "长江很长。")]
    assert len(load_mixture([write(tmp_path / "b.jsonl", chinese)], filters={"near_duplicates": 0.8}).train) == 2


def test_filters_of_one_source_leave_the_others(tmp_path):
    one, two = (write(tmp_path / f"{i}.jsonl", [("Hi", "."), ("Hi", f"Hello {i}")]) for i in (1, 2))
    mixture = load_mixture([{"path": one, "filters": {"min_response_chars": 2}}, two])
    assert sorted(m[-1]["content"] for m in mixture.train["messages"]) == [".", "Hello 1", "Hello 2"]


def test_preferences_are_filtered_by_their_chosen_side(tmp_path):
    sides = ("Hello!", "I can not help with that.")
    rows = [{"prompt": "Hi", "chosen": one, "rejected": other} for one, other in (sides, sides[::-1])]
    filters = {"max_chars": 10, "exact_duplicates": True}
    mixture = load_mixture([write_rows(tmp_path / "a.jsonl", rows * 2)], kind="preference", filters=filters)
    assert [row["chosen"][0]["content"] for row in mixture.train] == ["Hello!"]
    assert mixture.report.filtered == {"max_chars": 2, "exact_duplicates": 1}


def test_split_keeps_relatives_on_one_side():
    rng = np.random.default_rng(1)
    pairs = [(f"What is {n}?", f"It is {n}, said {i}.") for i, n in enumerate(rng.integers(0, 100, 400))]
    pairs += [(f"WHAT is {n}", "Again.") for n in range(100)]  # case and marks aside, the same question
    rows = rows_of(pairs)
    train, test = split_held_out(rows, 0.1, seed=0)
    assert sorted([*train, *test]) == list(range(500)) and 40 <= len(test) <= 50
    numbers = [{int(pairs[i][0].split()[-1].rstrip("?")) for i in side} for side in (train, test)]
    assert not numbers[0] & numbers[1]
    again, other = split_held_out(rows, 0.1, seed=0)[1], split_held_out(rows, 0.1, seed=1)[1]
    assert list(again) == list(test) != list(other)


def test_split_keeps_near_duplicates_and_groups_on_one_side():
    pairs = [(f"Question {i} about topic {i}?", f"{LONG} and then {i // 2} people come.") for i in range(40)]
    rows = rows_of([(q, a.replace("museum", f"m{i // 2} n{i // 2} o{i // 2}")) for i, (q, a) in enumerate(pairs)])
    apart = split_held_out(rows, 0.5, seed=0)[1]
    assert any((i ^ 1) not in apart for i in apart)  # without asking for it, pairs are parted
    rows_with_groups = rows.add_column("group", [str(i // 2) for i in range(40)])
    for test in (split_held_out(rows, 0.5, seed=0, near=0.5)[1], split_held_out(rows_with_groups, 0.5, seed=0)[1]):
        assert 0 < len(test) <= 20
        assert all((i ^ 1) in test for i in test)
