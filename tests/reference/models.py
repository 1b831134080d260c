"""Tiny random checkpoints, and the same weights as a transformers model and as the reference's decoder."""

import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from ma_sft.reference import model
from ma_sft.reference.template import Encoded

VOCAB = 97
PAD = 0


def tiny(kind: str, **changes: object) -> PreTrainedModel:
    """A random float32 model: two layers, four query heads on two key/value heads, an RoPE base that is no default."""
    torch.manual_seed(0)
    settings = {
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "tie_word_embeddings": kind == "llama"},
        # large weights: attention and logits far from uniform, so that a mistake shows
        **{"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD, **changes},
    }
    if kind == "qwen3":
        found: PreTrainedModel = Qwen3ForCausalLM(Qwen3Config(**settings))
        for name, weight in found.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                torch.nn.init.uniform_(weight.data, 0.5, 1.5)
        return found
    return LlamaForCausalLM(LlamaConfig(**settings))


def as_decoder(theirs: PreTrainedModel, folder: Path, **save_settings: object) -> model.Decoder:
    """Save the transformers model and load the folder with the reference."""
    theirs.save_pretrained(folder, **save_settings)
    return model.load(folder)


def examples(count: int, lengths: tuple[int, int] = (5, 30), seed: int = 0) -> list[Encoded]:
    """Random conversations of unequal lengths with two learned spans each, the last one up to the end."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        size = rng.randint(*lengths)
        marks = [False] * size
        for start, stop in ((size // 4, size // 3), (rng.randint(size // 2, size - 1), size)):
            marks[start:stop] = [True] * (stop - start)
        found.append(Encoded([rng.randrange(3, VOCAB) for _ in range(size)], marks))
    return found


def trl_rows(rows: list[list[Encoded]]) -> dict[str, list[list[int]]]:
    """The columns that TRL takes as they are: labels are not shifted, the model shifts."""
    joined = [([t for e in row for t in e.input_ids], [m for e in row for m in e.is_label]) for row in rows]
    return {
        "input_ids": [ids for ids, _ in joined],
        "labels": [[t if m else -100 for t, m in zip(ids, marks, strict=True)] for ids, marks in joined],
        "seq_lengths": [[len(e.input_ids) for e in row] for row in rows],
    }
