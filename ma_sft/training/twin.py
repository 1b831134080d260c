"""A twin of a model: the same class from its configuration, with few narrow layers and random weights."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from ma_sft.config import Settings
from ma_sft.training.distributed import available_attention

POSITIONS = 128
TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role + ':' + m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
)
HIDDEN, HEADS = 64, 4
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width", "attention_hidden_size"), 64
    ),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "ff_dim", "dense_intermediate_size"), 64
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **{"n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "o_lora_rank": 16, "index_topk": 64},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "head_dim": 16, "global_head_dim": 16},
    **{"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 16, "mamba_head_dim": 16},
    **{"n_mamba_heads": 2, "mamba_n_groups": 2, "n_groups": 2, "mamba_d_state": 16, "ssm_state_size": 16},
    **{"state_size": 16, "time_step_rank": 8, "mamba_dt_rank": 8, "expand": 2, "mamba_expand": 2, "chunk_size": 16},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"vocab_size_per_layer_input": None, "hidden_size_per_layer_input": 16, "query_pre_attn_scalar": 16},
    **{
        "sliding_window": 32,
        "attention_window_size": 32,
        "adapter_rank": 8,
        "rotary_dim": 16,
        "num_mem_blocks": 1,
        "emb_dim": 64,
    },
}
POSITION_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
LAYER_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
HEAD_NAMES = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
)


def parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those inside of it, such as a vision tower's."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from parts(value)


def shrink(config: PreTrainedConfig, vocabulary: int, *, all_layers: bool = False) -> PreTrainedConfig:
    """The configuration with every kind of layer once or twice, narrow, and with a small vocabulary."""
    config = copy.deepcopy(config)
    for part in parts(config):
        known = part.to_dict()
        values = {name: small for name, small in SMALL.items() if isinstance(known.get(name), int) and small}
        values |= {name: vocabulary for name in known if re.fullmatch(r"vocab_size\w*", name) and known[name]}
        values |= {name: POSITIONS for name in POSITION_NAMES if isinstance(known.get(name), int)}
        values |= _heads(known)
        if not all_layers:
            values |= _layers(known)
        values |= {
            name: number
            for number, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"))
            if name in known
        }
        for name, value in known.items():
            if re.search(r"_token_(id|index)s?$", name) and name not in values and isinstance(value, int):
                values[name] = vocabulary - 1
        for name, value in values.items():
            if name not in getattr(part, "attribute_map", {}):
                setattr(part, name, value)
    return config


def _heads(known: dict[str, Any]) -> dict[str, int]:
    """Few heads, in groups as the model has them."""
    heads = next((known[name] for name in HEAD_NAMES if isinstance(known.get(name), int)), None)
    kv = known.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or not isinstance(kv, int):
        return {}
    small = HEADS if kv == heads else 1 if kv == 1 else 2
    found = {name: HEADS for name in HEAD_NAMES if isinstance(known.get(name), int)}
    for name in ("num_key_value_heads", "num_global_key_value_heads", "num_kv_heads"):
        if isinstance(known.get(name), int):
            found[name] = small
    return found


def _layers(known: dict[str, Any]) -> dict[str, Any]:
    """As many layers as it takes for each kind to stand once, two at least."""
    found: dict[str, Any] = {}
    total = next((known[name] for name in LAYER_NAMES if isinstance(known.get(name), int)), 0)
    lists = {
        name: value
        for name, value in known.items()
        if isinstance(value, list) and len(value) == total and total > 1 and not name.endswith("token_ids")
    }
    keep = 2
    for value in lists.values():
        keys = [json.dumps(item, default=str) for item in value]
        keep = max(keep, *(keys.index(kind) + 1 for kind in set(keys)))
    for name in ("full_attn_mod", "attn_layer_period", "expert_layer_period", "full_attention_interval"):
        if isinstance(known.get(name), int):
            keep = max(keep, known[name])
    keep = min(keep + (known.get("attn_layer_offset") or 0) % 4, max(total, 2)) if total else keep
    if isinstance(known.get("first_k_dense_replace"), int):
        found["first_k_dense_replace"] = min(1, known["first_k_dense_replace"])
    for name in LAYER_NAMES:
        if isinstance(known.get(name), int):
            found[name] = keep
    return found | {name: value[:keep] for name, value in lists.items()}


def small_tokenizer(added_tokens: list[str]) -> PreTrainedTokenizerFast:
    """Bytes as tokens, three special ones, and those that were added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", "<sep>", *alphabet])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE
    )
    tokenizer.add_tokens(added_tokens)
    return tokenizer


def make_twin(
    settings: Settings, config: PreTrainedConfig, tokens: int, added_tokens: list[str], folder: Path
) -> tuple[Path, int]:
    """Save the twin of a model with its small tokenizer; the folder, and how many parameters it has.

    The twin's embedding has as many rows more than its tokenizer has tokens as the model's. If layers are named by
    their number, all are kept.

    Args:
        settings: of the run, whose attention and whose named layers the twin has.
        config: the model's configuration.
        tokens: of the run's tokenizer, with what was added.
        added_tokens: what the template added to it.
    """
    tokenizer = small_tokenizer([])
    spare = max(-8, min(16, int(config.get_text_config().vocab_size) - (tokens - len(added_tokens))))
    named = [settings.adapter.lora_config, settings.adapter.freeze, settings.model.lora_target_modules]
    all_layers = bool(re.search(r"(layers|h|blocks)\W+\d|layers_to_transform|layer_replication|\.\d+\\?\.", str(named)))
    small = shrink(config, len(tokenizer) + max(0, spare), all_layers=all_layers)
    kind = getattr(transformers, next(iter(config.architectures or []), ""), None)
    attention = available_attention(settings.model.attn_implementation)
    code = settings.training.trust_remote_code
    torch.manual_seed(0)
    make = kind._from_config if kind is not None and hasattr(kind, "_from_config") else None
    model: Any = (
        make(small, attn_implementation=attention)
        if make
        else AutoModelForCausalLM.from_config(small, attn_implementation=attention, trust_remote_code=code)
    ).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, sum(p.numel() for p in model.parameters())
