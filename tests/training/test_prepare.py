"""What a run trains on: cut and packed as its settings say, and counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUICK, assistant, user, write_rows

from ma_sft import LabelError, Recipe, make_trainer
from ma_sft.labels.templates import load_tokenizer
from ma_sft.training.prepare import Prepared, prepare

FAR = 10_000  # tokens


@pytest.fixture
def recipe(tmp_path: Path, tiny_bpe: Path) -> Any:
    """Makes a recipe of twelve conversations of two turns that grow, and eight held-out ones of two sources."""

    def write(name: str, rows: list[Any]) -> str:
        return write_rows(tmp_path / name, ({"messages": row} for row in rows))

    def turn(text: str, answer: str) -> list[dict[str, object]]:
        return [user(text), assistant(answer)]

    rows = [[*turn("so " * 5 * n, f"It is {n}."), *turn("and " * n, f"Then {n}.")] for n in range(12)]
    tests = [write(f"{name}.jsonl", [turn(f"{name}{n}?", "ab" * n + ".") for n in range(4)]) for name in "pq"]
    places = {"model_name_or_path": str(tiny_bpe), "output_dir": str(tmp_path / "run"), "eval_dataset": tests}
    given = {**QUICK, **places, "dataset_name": write("rows.jsonl", rows), "check": False}
    return lambda **settings: Recipe(**{**given, **settings})


def prepared(recipe: Recipe, held_out: bool = False) -> Prepared:
    settings = recipe.resolve()
    return prepare(settings, load_tokenizer(settings)[0], held_out=held_out)


def whole(recipe: Any) -> list[tuple[list[int], list[int]]]:
    rows = prepared(recipe(max_length=FAR)).dataset
    return [(row["input_ids"], row["labels"]) for row in rows]


def read(data: Prepared) -> list[tuple[list[int], list[int]]]:
    return [(row["input_ids"], row["labels"]) for row in data.dataset]


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_cut_is_counted_in_the_report_too(recipe: Any, packing: bool) -> None:
    rows, limit = whole(recipe), 40
    long = [ids for ids, _ in rows if len(ids) > limit]
    none = [labels for _, labels in rows if all(label == -100 for label in labels[:limit])]
    assert long and none
    data = prepared(recipe(max_length=limit, packing=packing))
    assert data.counts.cut_sequences == len(long) and data.counts.dropped_sequences == len(none)
    assert data.counts.sequences == len(rows) - len(none)
    kept = [(ids[:limit], labels[:limit]) for ids, labels in rows if labels not in none]
    assert data.counts.tokens == sum(len(ids) for ids, _ in kept)
    assert data.counts.trained_tokens == sum(label != -100 for _, labels in kept for label in labels)
    if packing:
        assert (data.packing.rows_cut, data.packing.rows_unlabelled) == (len(long), len(none))
        assert f"{len(long)} cut" in str(data.packing)
    else:
        assert data.packing is None and read(data) == kept


def test_overflow_is_a_setting(recipe: Any) -> None:
    rows, limit = whole(recipe), 40
    for packing in (False, True):
        kept = prepared(recipe(max_length=limit, packing=packing, overflow="drop"))
        short = [ids for ids, _ in rows if len(ids) <= limit]
        assert kept.counts.tokens == sum(map(len, short))
        parts = prepared(recipe(max_length=limit, packing=packing, overflow="split"))
        assert parts.counts.tokens == sum(len(ids) for ids, _ in rows) and parts.counts.dropped_sequences == 0
        answers = prepared(recipe(max_length=limit, packing=packing, overflow="keep_answer"))
        assert answers.counts.dropped_sequences == 0
        last = [labels[-1 - next(n for n, label in enumerate(reversed(labels)) if label != -100)] for _, labels in rows]
        ends = [ids for pack in answers.dataset for ids in pack["labels"] if ids == last[0]]
        assert len(set(last)) == 1 and len(ends) >= len(rows), "each row keeps the end of its last answer"


def test_keep_end_is_trls_truncation_mode(recipe: Any) -> None:
    with pytest.warns(FutureWarning, match="keep_end"):
        data = prepared(recipe(max_length=40, truncation_mode="keep_end"))
    assert read(data) == [(ids[-40:], labels[-40:]) for ids, labels in whole(recipe)]


def test_nothing_left_says_what_to_do(recipe: Any) -> None:
    with pytest.raises(LabelError, match="no row has anything to train on within max_length=2: raise it"):
        prepared(recipe(max_length=2))


def test_held_out_rows_are_packed_if_asked_but_not_across_sources(recipe: Any) -> None:
    alone = prepared(recipe(max_length=FAR), held_out=True)
    packed = prepared(recipe(max_length=200, eval_packing=True), held_out=True)
    assert len(alone.dataset) == 8 and len(packed.dataset) < 8 and len(packed.sources) == len(packed.dataset)
    for source in set(alone.sources):
        rows = [row for row, name in zip(read(alone), alone.sources, strict=True) if name == source]
        packs = [row for row, name in zip(read(packed), packed.sources, strict=True) if name == source]
        assert sorted(token for ids, _ in rows for token in ids) == sorted(token for ids, _ in packs for token in ids)
    assert len(prepared(recipe(max_length=200, packing=True), held_out=True).dataset) == 8


@pytest.mark.parametrize(
    "settings", [{"padding_free": True}, {"packing": True}, {"packing": True, "eval_packing": True}]
)
def test_the_trainer_gets_batches_without_padding(recipe: Any, settings: dict[str, Any]) -> None:
    trainer = make_trainer(recipe(max_length=200, per_device_train_batch_size=2, **settings))
    for loader in (trainer.get_train_dataloader(), *map(trainer.get_eval_dataloader, "pq")):
        batch = next(iter(loader))
        assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
        (starts,) = torch.nonzero(batch["position_ids"][0] == 0, as_tuple=True)
        assert len(starts) > 1 and (batch["labels"][0][starts] == -100).all()


@pytest.mark.parametrize("drop", [False, True])
def test_drop_last_leaves_rows_out_and_counts_them(recipe: Any, drop: bool) -> None:
    recipe = recipe(max_length=FAR, per_device_train_batch_size=5, dataloader_drop_last=drop, padding_free=True)
    batches = list(make_trainer(recipe).get_train_dataloader())
    assert len(batches) == (2 if drop else 3)
    assert prepared(recipe).counts.left_out_of_each_epoch == (2 if drop else 0)
