"""Rows, a model and a trainer for the tests of packing."""

from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTTrainer

from ma_sft.packing.pack import IGNORED


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


def flat(lists: Any) -> list[int]:
    return list(chain.from_iterable(lists))


def tiny_model(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=400, **sizes, attn_implementation=attention)
    return LlamaForCausalLM(config).float()


def trainer_settings(folder: Path) -> dict[str, Any]:
    """Of TRL's trainer for rows that are ready."""
    return {
        **{"output_dir": str(folder), "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}},
        **{"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False},
        **{"save_strategy": "no", "disable_tqdm": True},
    }


class Recorder(SFTTrainer):
    """SFTTrainer that keeps the inputs and loss of its last step, and the gradients of its first before clipping."""

    gradients: dict[str, torch.Tensor] | None = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.seen = inputs
        self.loss = super().training_step(model, inputs, num_items_in_batch)
        if self.gradients is None and self.accelerator.sync_gradients:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        return self.loss
