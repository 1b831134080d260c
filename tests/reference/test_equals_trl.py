"""Same weights, same data: the reference's loss, gradients, curve and weights are those of TRL's SFTTrainer."""

import pytest
import torch
from datasets import Dataset
from helpers import load_tokenizer
from packed_rows import Recorder, trainer_settings
from reference.models import PAD, as_decoder, examples, tiny, trl_rows
from trl import SFTConfig

from ma_sft.reference import train

STEPS = 10


def run_trl(theirs, rows, settings, folder, padding_free):
    columns = trl_rows(rows)
    if not padding_free:
        del columns["seq_lengths"]
    same = "per_device_train_batch_size gradient_accumulation_steps max_steps learning_rate warmup_steps weight_decay"
    config = SFTConfig(
        **{**trainer_settings(folder / "trl"), "dataset_kwargs": None},
        **{name: getattr(settings, name) for name in f"{same} max_grad_norm".split()},
        **{"lr_scheduler_type": "cosine", "train_sampling_strategy": "sequential", "logging_steps": 1},
        padding_free=padding_free,
    )
    tokenizer = load_tokenizer("smollm2")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)
    trainer = Recorder(theirs, config, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.gradients


@pytest.mark.parametrize(
    ("kind", "micro", "accumulation", "packed"),
    [
        pytest.param("qwen3", 4, 1, False, id="qwen3-padded"),
        pytest.param("llama", 2, 3, False, id="llama-padded-accumulated"),
        pytest.param("qwen3", 2, 2, True, id="qwen3-packed-accumulated"),
    ],
)
def test_ten_steps_are_those_of_sft_trainer(kind, micro, accumulation, packed, tmp_path):
    settings = train.Settings(
        max_steps=STEPS,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=3e-3,
        warmup_steps=3,
        weight_decay=0.1,
        max_grad_norm=1.0,
        shuffle=False,
    )
    count = STEPS * micro * accumulation
    rows = [[e] for e in examples(count)]
    if packed:
        rows = [examples(2 + 2 * (i % 3), (4, 14), seed=i) for i in range(count)]
    theirs = tiny(kind)
    ours = as_decoder(theirs, tmp_path / "start")
    micro_batches = train.micro_batches(rows, 0, settings, PAD)
    # what a mean of means would get wrong: the micro-batches have unequal numbers of labels
    assert accumulation == 1 or len({train.label_count([batch]) for batch in micro_batches}) > 1

    first_loss = train.backward(ours, micro_batches)
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    losses = train.train(ours, rows, settings, PAD)
    their_losses, their_gradients = run_trl(theirs, rows, settings, tmp_path, packed)

    assert first_loss == losses[0] == pytest.approx(their_losses[0], abs=1e-5)
    assert gradients.keys() == their_gradients.keys()
    for name, theirs_first in their_gradients.items():
        torch.testing.assert_close(
            gradients[name], theirs_first, rtol=1e-4, atol=1e-4 * theirs_first.abs().max().item()
        )
    assert losses == pytest.approx(their_losses, abs=1e-4)
    # learning happened, and the last steps were not all clipped away
    assert min(losses) < losses[0] - 0.1
    start = dict(as_decoder(tiny(kind), tmp_path / "again").named_parameters())
    final = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, final[name], rtol=0, atol=1e-4)
        assert (weight - start[name]).abs().max() > 1e-3, f"{name} did not move"
