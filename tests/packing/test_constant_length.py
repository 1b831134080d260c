"""`ConstantLengthDataset`: rows of one length, no token lost, each epoch in another order."""

from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers import load_tokenizer
from packed_rows import Recorder, flat, make_rows, tiny_model, trainer_settings
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer

from ma_sft import ConstantLengthDataset, FormatError
from ma_sft.packing.pack import IGNORED


def trainer(folder: Path, rows: ConstantLengthDataset, kind: type[SFTTrainer] = Recorder, **settings: Any) -> Any:
    args = SFTConfig(**trainer_settings(folder), per_device_train_batch_size=2, **settings)
    data, tokenizer = rows.to_iterable_dataset(), load_tokenizer("smollm2")
    return kind(model=tiny_model("sdpa"), args=args, train_dataset=data, processing_class=tokenizer)


def stream(rows: Any, **settings: Any) -> ConstantLengthDataset:
    settings = {"seq_length": 8, "num_of_sequences": 4, "append_concat_token": False, **settings}
    return ConstantLengthDataset(load_tokenizer("smollm2"), rows, **settings)


def trained(items: Any) -> list[int]:
    return sorted(int(token) for item in items for token in item["labels"].flatten() if token != IGNORED)


def labels_of(rows: datasets.Dataset) -> list[int]:
    return sorted(token for row in rows for token in row["labels"] if token != IGNORED)


def test_constant_length_rows_have_one_length_and_keep_their_labels() -> None:
    rows = make_rows([5, 9, 1, 30, 2, 11, 17])
    items = list(stream(rows))
    assert len(items) == len(stream(rows))
    for item in items:
        assert item["input_ids"].shape == item["labels"].shape == (8,) and item["labels"].dtype == torch.int64
        assert all(label in (IGNORED, token) for token, label in zip(item["input_ids"], item["labels"], strict=True))
    assert trained(items) == labels_of(rows)


def test_texts_become_the_joined_tokens_of_trl_0x() -> None:
    tokenizer = load_tokenizer("smollm2")
    rows = [{"text": "The sky is blue."}, {"text": "Grass is green, and so are trees."}] * 4
    expected = flat([*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id] for row in rows)
    for source in ({"dataset_text_field": "text"}, {"formatting_func": lambda row: row["text"]}):
        items = list(stream(rows, shuffle=False, append_concat_token=True, **source))
        ids = torch.cat([item["input_ids"] for item in items]).tolist()
        labels = torch.cat([item["labels"] for item in items]).tolist()
        assert ids[: len(expected)] == labels[: len(expected)] == expected
        assert set(labels[len(expected) :]) <= {IGNORED}
    with pytest.raises(FormatError, match="no 'prompt'"):
        next(iter(stream(rows, dataset_text_field="prompt")))


def test_the_concat_token_of_a_labelled_row_is_not_trained() -> None:
    items = list(stream(make_rows([5, 3]), append_concat_token=True, shuffle=False))
    end = load_tokenizer("smollm2").eos_token_id
    assert items[0]["input_ids"].tolist() == [10, 11, 12, 13, 14, end, 15, 16]
    assert items[0]["labels"].tolist() == [IGNORED, 11, 12, 13, 14, IGNORED, IGNORED, 16]


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_share_the_rows(streaming: bool) -> None:
    rows = make_rows([5, 9, 1, 30, 2, 11, 17, 4, 4, 12])
    source = rows.to_iterable_dataset() if streaming else rows
    assert trained(DataLoader(stream(source), batch_size=1, num_workers=2)) == labels_of(rows)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    rows = make_rows([7] * 60)

    def order(data: Any) -> list[int]:
        return [int(item["input_ids"][0]) for item in data]

    data, again = stream(rows, seed=1), stream(rows, seed=1).to_iterable_dataset()
    epochs = [order(data) for _ in range(3)]  # each in another order by itself
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for number, epoch in enumerate(epochs):
        again.set_epoch(number)
        assert order(again) == epoch
    assert order(stream(rows, seed=2)) != epochs[0]
    assert trained(stream(rows, seed=1)) == trained(stream(rows, seed=2)) == labels_of(rows)


def test_sft_trainer_takes_the_stream_and_counts_the_steps_of_its_epochs_by_the_length(tmp_path: Path) -> None:
    mine = trainer(tmp_path, stream(make_rows([30] * 6), shuffle=False), max_steps=2)
    assert mine.train().global_step == 2
    assert mine.seen["input_ids"].tolist() == [list(range(26, 34)), list(range(34, 42))]
    assert mine.seen["labels"].tolist()[1][6] == IGNORED
    # 180 tokens are 23 rows of 8: 12 batches an epoch
    assert trainer(tmp_path, stream(make_rows([30] * 6)), num_train_epochs=2).train().global_step == 24
    with pytest.raises(TypeError, match="set max_steps"):
        len(stream(make_rows([30]), infinite=True).to_iterable_dataset())


def test_each_epoch_comes_in_another_order_through_the_trainer(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    class Watched(Recorder):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            seen.append(inputs["input_ids"][:, 0].tolist())
            return super().training_step(model, inputs, num_items_in_batch)

    trainer(tmp_path, stream(make_rows([8] * 4)), Watched, num_train_epochs=3, max_steps=6).train()
    in_epochs = [flat(seen[at : at + 2]) for at in (0, 2, 4)]
    assert all(sorted(epoch) == [10, 18, 26, 34] for epoch in in_epochs)
    assert len({tuple(epoch) for epoch in in_epochs}) > 1


def test_documents_are_shuffled_before_they_are_joined() -> None:
    rows = make_rows([5, 9, 1, 30, 2, 11, 17, 4, 4, 12])
    whole, plain = (
        flat(item["input_ids"].tolist() for item in stream(rows, seq_length=95, shuffle=shuffle))
        for shuffle in (True, False)
    )
    assert plain == flat(rows["input_ids"]) == sorted(whole) != whole


def test_a_function_or_a_field_that_gives_ids_and_a_field_of_text_that_wins_over_ids() -> None:
    rows = [{"tokens": [1, 2, 3]}, {"tokens": [4, 5]}]
    end = load_tokenizer("smollm2").eos_token_id
    for how in ({"formatting_func": lambda row: row["tokens"]}, {"dataset_text_field": "tokens"}):
        data = stream(rows, seq_length=7, shuffle=False, append_concat_token=True, **how)
        assert not data.pretokenized
        (item,) = data
        assert item["input_ids"].tolist() == item["labels"].tolist() == [1, 2, 3, end, 4, 5, end]
        assert data.current_size == 1
    rows = datasets.Dataset.from_list([{"input_ids": [1, 2], "text": "The sky is blue."}])
    data = stream(rows, dataset_text_field="text", seq_length=4)
    assert data.pretokenized
    assert next(iter(data))["input_ids"].tolist() == load_tokenizer("smollm2")("The sky is blue.")["input_ids"][:4]
    with pytest.raises(FormatError, match=r"\['text'\] has no 'input_ids'; set dataset_text_field or formatting_func"):
        len(stream([{"text": "a"}]))


@pytest.mark.parametrize("rows", [[], [{"input_ids": []}], [{"input_ids": []}] * 50])
def test_an_infinite_stream_without_a_token_ends_with_an_error(rows: Any) -> None:
    with pytest.raises(FormatError, match="without a token"):
        next(iter(stream(rows, infinite=True)))


def test_an_infinite_stream_goes_round_its_rows() -> None:
    rows = make_rows([3] * 8, prompt=0)
    ids = flat(item["input_ids"].tolist() for item in islice(stream(rows, infinite=True), 9))
    assert len(ids) == 72
    assert all(sorted(ids[at : at + 24]) == sorted(flat(rows["input_ids"])) for at in (0, 24, 48))
