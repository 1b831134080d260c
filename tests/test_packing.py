"""Packing: no token lost, labels and borders kept, no document sees another."""

import numpy as np
import pytest
import torch
from conftest import load_tokenizer
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer, pack_dataset

from ma_sft import ConstantLengthDataset, LabelError, pack
from ma_sft.packing import best_fit_decreasing


def labelled(lengths, seed=0):
    """Rows of random ids with labels on their second half."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in lengths:
        ids = rng.integers(3, 60, n).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (n // 2) + ids[n // 2 :]})
    return Dataset.from_list(rows)


def documents(packed):
    """The documents of a packed data set as (ids, labels) pairs."""
    found = []
    for row in packed:
        at = 0
        for n in row["seq_lengths"]:
            found.append((tuple(row["input_ids"][at : at + n]), tuple(row["labels"][at : at + n])))
            at += n
        assert at == len(row["input_ids"]) == len(row["labels"])
    return found


def test_bfd_keeps_every_document_and_its_labels():
    rows = labelled(np.random.default_rng(1).integers(1, 64, 3000))
    packed = pack(rows, 64)
    assert sorted(documents(packed)) == sorted((tuple(r["input_ids"]), tuple(r["labels"])) for r in rows)
    assert max(len(row["input_ids"]) for row in packed) <= 64


def test_bfd_is_dense_and_never_below_trl():
    lengths = np.minimum(np.random.default_rng(0).lognormal(np.log(200), 0.8, 20_000).astype(int) + 1, 2048)
    packs = best_fit_decreasing(lengths, 2048)
    density = lengths.sum() / (len(packs) * 2048)
    rows = Dataset.from_dict({"input_ids": [[0] * n for n in lengths]})
    trl = lengths.sum() / (len(pack_dataset(rows, 2048, "bfd")) * 2048)
    assert density >= 0.999 and density >= trl
    assert sorted(d for p in packs for d in p) == list(range(len(lengths)))


def test_best_fit_takes_the_fullest_pack_with_room():
    assert best_fit_decreasing(np.array([6, 5, 4, 3]), 10) == [[0, 2], [1, 3]]
    assert best_fit_decreasing(np.array([0, 10, 10]), 10) == [[1], [2]]


def test_long_document():
    rows = labelled([5, 30, 7])
    with pytest.raises(LabelError, match="row 1 has 30 tokens"):
        pack(rows, 16)
    split = pack(rows, 16, "bfd_split")
    assert sorted(i for row in split for i in row["input_ids"]) == sorted(i for row in rows for i in row["input_ids"])


def test_wrapped_and_none():
    rows = labelled([20] * 10)
    wrapped = pack(rows, 16, "wrapped")
    assert {len(row["input_ids"]) for row in wrapped} == {16} and len(wrapped) == 200 // 16
    assert "seq_lengths" not in wrapped.column_names
    assert pack(rows, 16, "none")[:] == rows[:]


def tiny_model(attention):
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config)


def loss_and_gradients(tmp_path, dataset, attention, batch_size, **settings):
    """Loss and gradients of one batch of the whole data set, through SFTTrainer."""
    args = SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=batch_size,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        **settings,
    )
    trainer = SFTTrainer(tiny_model(attention), args, train_dataset=dataset, processing_class=load_tokenizer("smollm2"))
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_no_document_sees_another(tmp_path, attention, batch_size):
    rows = labelled([14, 9, 12, 7, 11, 8])
    packed = pack(rows, 61 if batch_size == 1 else 33)
    assert len(packed) == batch_size
    alone = loss_and_gradients(tmp_path, rows, attention, len(rows))
    together = loss_and_gradients(tmp_path, packed, attention, batch_size, padding_free=True)
    assert together[0] == pytest.approx(alone[0], rel=1e-5)
    torch.testing.assert_close(together[1], alone[1], rtol=1e-4, atol=1e-6)
    borderless = packed.map(lambda row: {"seq_lengths": [len(row["input_ids"])]})
    assert loss_and_gradients(tmp_path, borderless, attention, batch_size, padding_free=True)[0] != pytest.approx(
        alone[0], rel=1e-4
    )


def test_constant_length_keeps_labels_and_order():
    rows = labelled([20, 9, 31])
    stream = ConstantLengthDataset(None, rows, seq_length=8, shuffle=False)
    pieces = list(stream)
    ids, labels = ([i for row in rows for i in row[key]] for key in ("input_ids", "labels"))
    assert torch.cat([p["input_ids"] for p in pieces]).tolist() == ids[:56]
    assert torch.cat([p["labels"] for p in pieces]).tolist() == labels[:56]
    assert stream.dropped_tokens == 4
    assert {tuple(p["input_ids"].shape) for p in pieces} == {(8,)}


def test_constant_length_from_text_joins_with_the_end_token():
    tokenizer = load_tokenizer("qwen3")
    rows = [{"text": f"Row {i} <|im_end|>"} for i in range(50)]
    whole = ConstantLengthDataset(tokenizer, rows, "text", seq_length=16, shuffle=False)
    ids = torch.cat([piece["input_ids"] for piece in whole]).tolist()
    text = tokenizer.decode(ids)
    assert text.startswith("Row 0 <|im_end|><|im_end|>Row 1 ")
    # one end token a row: the one in the text stays text
    assert ids.count(tokenizer.eos_token_id) in (text.count("<|im_end|>") // 2, text.count("<|im_end|>") // 2 + 1)
    small_buffers = ConstantLengthDataset(tokenizer, rows, "text", seq_length=16, num_of_sequences=1, shuffle=False)
    assert torch.cat([piece["input_ids"] for piece in small_buffers]).tolist() == ids


def test_constant_length_is_seeded_and_shared_by_workers():
    rows = labelled([20] * 40)

    def pieces(workers, seed=0):
        stream = ConstantLengthDataset(None, rows, seq_length=8, seed=seed)
        loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
        return [tuple(piece["input_ids"].tolist()) for piece in loader]

    assert pieces(0) == pieces(0) and pieces(0) != pieces(0, seed=1)
    assert sorted(pieces(2)) == sorted(pieces(0))
