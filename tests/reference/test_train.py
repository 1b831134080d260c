"""The loop itself: packing and padding change nothing, resuming is exact, the demo runs from its command."""

import pytest
import torch
from helpers import write_rows
from reference.models import PAD, as_decoder, examples, tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ma_sft.reference import InputError, collate, lora, train

SETTINGS = train.Settings(
    max_steps=6, per_device_train_batch_size=2, learning_rate=3e-3, warmup_steps=2, weight_decay=0.1, save_steps=2
)


def test_rows_of_several_documents():
    conversations = examples(50)
    rows = collate.first_fit(conversations, 40)
    assert sorted(e.input_ids for row in rows for e in row) == sorted(e.input_ids for e in conversations)
    assert all(sum(len(e.input_ids) for e in row) <= 40 for row in rows) and len(rows) < len(conversations)
    batch = collate.pack([[examples(1)[0]._replace(input_ids=[5, 6, 7], is_label=[False, True, True])] * 2], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 5, 6, 7]]
    assert batch["labels"].tolist() == [[6, 7, -100, 6, 7, -100]]  # shifted within each document
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 2, 2, 2]]


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_a_stopped_run_goes_on_exactly(tmp_path, adapted):
    rows = [[e] for e in examples(5)]

    def fresh():
        ours = as_decoder(tiny("llama"), tmp_path / "start")
        if adapted:
            torch.manual_seed(3)
            lora.inject(ours, "_proj$", r=2, alpha=4)
        return ours

    whole = fresh()
    losses = train.train(whole, rows, SETTINGS, PAD)
    first = train.train(fresh(), rows, SETTINGS, PAD, tmp_path / "checkpoint", stop_at=3)
    second = fresh()
    assert first == losses[:3]
    assert train.train(second, rows, SETTINGS, PAD, tmp_path / "checkpoint") == losses
    for name, weight in second.named_parameters():
        assert torch.equal(weight, dict(whole.named_parameters())[name])


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    rows = [[e] for e in examples(5)]
    ours = as_decoder(tiny("llama"), tmp_path / "start")
    train.train(ours, rows, SETTINGS, PAD, tmp_path / "checkpoint", stop_at=2)
    other = train.Settings(**{**vars(SETTINGS), "learning_rate": 1e-5})
    with pytest.raises(InputError, match=r"learning_rate was 0.003 and is 1e-05"):
        train.train(ours, rows, other, PAD, tmp_path / "checkpoint")


def test_every_row_is_seen_once_an_epoch_in_another_order():
    rows = [[e] for e in examples(8)]
    epochs = []
    for epoch in range(2):
        steps = range(epoch * 2, epoch * 2 + 2)
        batches = [b for step in steps for b in train.micro_batches(rows, step, SETTINGS, PAD)]
        epochs.append([[t for t in ids if t != PAD] for b in batches for ids in b["input_ids"].tolist()])
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(row[0].input_ids for row in rows)
    assert epochs[0] != epochs[1]


def test_bf16_is_close_and_leaves_the_weights_in_float32(tmp_path):
    ours = as_decoder(tiny("qwen3"), tmp_path)
    batch = collate.collate(examples(4), PAD)
    exact = train.loss_sum(ours, batch).item()
    rounded = train.loss_sum(ours, batch, bf16=True)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact, rel=2e-2)
    assert rounded.item() != exact
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


def test_what_cannot_be_trained_is_an_error(tmp_path):
    example = examples(1)[0]
    with pytest.raises(InputError, match="no label"):
        collate.collate([example._replace(is_label=[True] + [False] * (len(example.input_ids) - 1))], PAD)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "input": "b", "output": "c"}\n{"instruction": "a"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl, line 2: no text in field 'output'"):
        train.read_alpaca(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("rank", [pytest.param(0, id="full", marks=pytest.mark.slow), pytest.param(4, id="lora")])
def test_the_command_trains_writes_and_samples(tmp_path, rank, tiny_bpe, capsys):
    """What it writes loads elsewhere."""
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(20)]
    files = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name in ("train", "heldout")}
    places = {**files, "model": tiny_bpe, "output_dir": tmp_path / "out", "lora_r": rank}
    flags = "--packing --max_length=64 --max_steps=8 --learning_rate=0.02 --warmup_steps=1 --device=cpu".split()
    train.main([*(f"--{name}={value}" for name, value in places.items()), *flags])
    printed = capsys.readouterr().out
    before, after = (float(v) for v in printed.split("held-out loss ")[1].split("\n")[0].split(" -> "))
    assert after < before - (0.1 if rank else 0.5)
    assert "Say 0." in printed
    if rank:
        assert len(load_file(tmp_path / "out/adapter/adapter_model.safetensors")) == 2 * 2 * 7
    else:
        before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_bpe, tmp_path / "out/final"))
        assert not torch.equal(after.model.norm.weight, before.model.norm.weight)
