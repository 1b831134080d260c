"""Packing: tokens, labels and borders survive, no document sees another, and every loss is counted."""

from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import load_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer, pack_dataset

from ma_sft import FormatError, LabelError, RecipeError, pack
from ma_sft.packing.plan import best_fit_decreasing
from ma_sft.packing.tokens import IGNORED
from ma_sft.packing.view import flatten, pack_with_report

datasets.disable_progress_bars()
LENGTHS = st.lists(st.integers(1, 40), max_size=60)


def make_rows(lengths: list[int], seed: int = 0, prompt: int = 1) -> datasets.Dataset:
    """Rows of distinct tokens, so that a token says where it comes from; the first `prompt` have no label."""
    ids, labels, next_id = [], [], 10
    for length in lengths:
        row = list(range(next_id, next_id + length))
        next_id += length
        ids.append(row)
        labels.append([IGNORED if i < prompt else token for i, token in enumerate(row)])
    features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "labels")})
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}, features=features)


def documents(packed: Any) -> list[tuple[list[int], list[int]]]:
    found = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"])
        at = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][at : at + length], row["labels"][at : at + length]))
            at += length
    return sorted(found)


def flat(lists: Any) -> list[int]:
    return list(chain.from_iterable(lists))


def pairs(dataset: datasets.Dataset) -> list[tuple[list[int], list[int]]]:
    return sorted((row["input_ids"], row["labels"]) for row in dataset if row["input_ids"])


def one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing in its textbook form: the spaces of the bins that it ends with."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else capacity) - length)
    return sorted(spaces)


@given(LENGTHS)
def test_best_fit_on_the_histogram_equals_best_fit_item_by_item(lengths: list[int]) -> None:
    bins = best_fit_decreasing(np.array(lengths, dtype=np.int64), 40)
    filled = np.bincount(bins, weights=np.array(lengths)) if lengths else np.zeros(0)
    assert sorted((40 - filled).astype(int).tolist()) == one_by_one(lengths, 40)


@given(LENGTHS, st.sampled_from(["bfd", "bfd_split", "none"]), st.integers(0, 3))
def test_every_document_comes_back_with_its_labels(lengths: list[int], strategy: Any, seed: int) -> None:
    rows = make_rows([*lengths, 0])
    packed, report = pack_with_report(rows, 40, strategy, seed=seed)
    assert documents(packed) == pairs(rows)
    assert report.rows_empty == 1 and report.cut_tokens == 0 and report.tokens == sum(lengths)
    assert all(len(row["input_ids"]) <= 40 for row in packed)


def test_a_shuffled_and_filtered_data_set_packs_the_rows_it_shows(tmp_path: Path) -> None:
    make_rows(list(range(1, 60))).save_to_disk(tmp_path)
    rows = datasets.load_from_disk(tmp_path).shuffle(seed=1).filter(lambda row: len(row["input_ids"]) % 2)
    packed = flatten(pack(rows, 64))
    assert documents(packed) == documents(pack(rows, 64)) == pairs(rows)
    assert packed.cache_files, "a data set on disk must not move into memory"
    assert packed.features["input_ids"] == rows.features["input_ids"]
    assert pack(rows, 64)[:] == packed[:]


def test_the_seed_decides_the_packs() -> None:
    rows = make_rows([3, 5, 7] * 40)
    assert pack(rows, 16, seed=1)[:] == pack(rows, 16, seed=1)[:]
    assert pack(rows, 16, seed=1)[:] != pack(rows, 16, seed=2)[:]


def test_denser_than_trl_and_999_permille_on_log_normal_lengths() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(200), 1, 20_000).astype(int), 1, 2048)
    packs = best_fit_decreasing(lengths, 2048).max() + 1
    rows = datasets.Dataset.from_dict({"input_ids": [np.zeros(n, np.int32) for n in lengths]})
    assert packs <= len(pack_dataset(rows, 2048))
    assert lengths.sum() / packs / 2048 >= 0.999


def test_wrapped_is_the_stream_cut_every_seq_length_and_says_that_it_crosses_borders() -> None:
    rows = make_rows([5, 9, 1, 30, 2])
    packed, report = pack_with_report(rows, 8, "wrapped")
    assert flat(packed["input_ids"]) == flat(rows["input_ids"])
    assert flat(packed["labels"]) == flat(rows["labels"])
    assert packed["seq_lengths"][:] == [[8], [8], [8], [8], [8], [7]]
    assert "cross document borders" in str(report)
    assert not pack_with_report(rows, 8, "bfd")[1].warnings[0].startswith("'wrapped'")


def test_cut_is_counted_with_what_it_takes_away() -> None:
    rows = make_rows([4, 8, 12], prompt=2)
    rows = rows.add_item({"input_ids": list(range(900, 910)), "labels": [IGNORED] * 9 + [909]})
    packed, report = pack_with_report(rows, 8)
    assert (report.rows_cut, report.cut_tokens, report.labels_lost) == (2, 6, 5)
    assert (report.rows_unlabelled, report.rows_unfinished) == (1, 1)
    assert "1 cut rows have no label left" in str(report)
    assert (rows[2]["input_ids"][:8], rows[2]["labels"][:8]) in documents(packed)


def test_an_answer_that_ends_at_the_cut_is_finished() -> None:
    rows = make_rows([8, 12])
    end = rows[1]["input_ids"][7]
    assert pack_with_report(rows, 8, end_token_ids=[end])[1].rows_unfinished == 0
    assert pack_with_report(rows, 8, end_token_ids=[end + 1])[1].rows_unfinished == 1


def test_split_keeps_every_token_and_counts_labels_without_context() -> None:
    rows = make_rows([4, 20])
    packed, report = pack_with_report(rows, 8, "bfd_split")
    assert sorted(flat(packed["input_ids"])) == sorted(flat(rows["input_ids"]))
    assert (report.rows_split, report.documents, report.cut_tokens, report.labels_lost) == (1, 4, 0, 2)


def test_drop_leaves_long_rows_out_and_counts_them() -> None:
    rows = make_rows([4, 20, 8])
    packed, report = pack_with_report(rows, 8, overflow="drop")
    assert documents(packed) == pairs(rows.select([0, 2]))
    assert (report.rows_dropped, report.cut_tokens, report.labels_lost) == (1, 20, 19)
    assert "1 rows longer than 8 tokens were dropped" in str(report)


def test_the_report_gives_density_padding_and_steps() -> None:
    report = pack_with_report(make_rows([8, 2, 4, 2]), 8, batch_size=4)[1]
    assert (report.packs, report.density, report.padded_tokens) == (2, 1.0, 32)
    assert (report.padding_saved, report.speed_up, report.steps(1, epochs=3)) == (16, 2.0, 6)


@pytest.mark.parametrize(
    ("columns", "error", "words"),
    [
        ({"text": ["a"]}, FormatError, "no column 'input_ids'"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, LabelError, "row 0: 2 input_ids but 1 labels"),
        ({"input_ids": [[1], None]}, FormatError, "row 1: 'input_ids' is null"),
        ({"input_ids": [[1]], "assistant_masks": [[1]]}, LabelError, "assistant_masks"),
        ({"input_ids": ["text"]}, FormatError, "'input_ids'"),
    ],
)
def test_rows_that_cannot_be_packed_are_named(columns: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pack(datasets.Dataset.from_dict(columns), 8)


def test_settings_that_contradict_each_other_are_refused() -> None:
    rows = make_rows([4])
    for wrong in ({"strategy": "ffd"}, {"overflow": "keep"}, {"strategy": "bfd_split", "overflow": "cut"}):
        with pytest.raises(RecipeError):
            pack(rows, 8, **wrong)


def test_a_stream_packs_in_a_bounded_buffer() -> None:
    rows = make_rows([3, 5, 2, 6] * 25)
    read = 0

    def watch(row: Any) -> Any:
        nonlocal read
        read += 1
        return {**row, "source": "x"}

    packed = pack(rows.to_iterable_dataset().map(watch), 8, buffer_size=20)
    first = next(iter(packed))
    assert set(first) == {"input_ids", "labels", "seq_lengths"}
    assert read <= 60, "the stream was read far beyond its buffer"
    assert documents(packed) == pairs(rows)


def tiny_model(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=400, **sizes, attn_implementation=attention)
    return LlamaForCausalLM(config).float()


class Recorder(SFTTrainer):
    """SFTTrainer that keeps the gradients and the loss of its one step."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.seen = inputs
        self.loss = super().training_step(model, inputs, num_items_in_batch)
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        return self.loss


def one_step(rows: datasets.Dataset, attention: str, batch_size: int, folder: Path) -> Recorder:
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=1,
        packing=False,
        padding_free=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Recorder(
        model=tiny_model(attention), args=args, train_dataset=rows, processing_class=load_tokenizer("smollm2")
    )
    trainer.train()
    return trainer


def alone(rows: datasets.Dataset) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss per label and gradients of the documents run one by one, in plain PyTorch."""
    model = tiny_model("eager").train()
    total, labels = 0.0, sum(sum(label != IGNORED for label in row["labels"][1:]) for row in rows)
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits, torch.tensor(row["labels"][1:]), ignore_index=IGNORED, reduction="sum"
        )
        (loss / labels).backward()
        total += loss.item()
    return total / labels, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("packs", [1, 2])
def test_a_packed_batch_trains_like_its_documents_one_by_one(attention: str, packs: int, tmp_path: Path) -> None:
    rows = make_rows([18, 9, 3, 16, 11, 5] if packs == 2 else [20, 9, 3], prompt=0)
    packed = pack(rows, 32)
    assert len(packed) == packs and max(map(len, packed["seq_lengths"])) > 1
    loss, gradients = alone(rows)

    trainer = one_step(packed, attention, packs, tmp_path)
    assert "attention_mask" not in trainer.seen and trainer.seen["input_ids"].shape[0] == 1
    assert trainer.loss.item() == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(trainer.gradients[name], gradient, rtol=1e-4, atol=1e-6)

    # The same tokens and labels without the borders must be another loss, or this test proves nothing.
    blind = packed.map(lambda row: {"seq_lengths": [len(row["input_ids"])]})
    trainer = one_step(blind, attention, packs, tmp_path)
    assert abs(trainer.loss.item() - loss) > 1e-4
    assert not torch.allclose(trainer.gradients["lm_head.weight"], gradients["lm_head.weight"], rtol=1e-3, atol=1e-5)
