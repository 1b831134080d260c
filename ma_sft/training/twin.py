"""A twin of a model: the same class from its configuration, with few narrow layers and random weights."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from ma_sft.config import Settings
from ma_sft.training.adapters import from_config, parts
from ma_sft.training.distributed import available_attention

POSITIONS = 128
POSITION_NAMES = "max_position_embeddings n_positions max_seq_len max_target_positions".split()
LAYER_NAMES = "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers".split()
HEAD_NAMES = "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads".split()
KV_NAMES = "num_key_value_heads num_global_key_value_heads num_kv_heads kv_n_heads".split()
# How large a twin is, by the names that configurations give their sizes.
SIZES: dict[int, str] = {
    POSITIONS: f"mamba_d_ssm attention_hidden_size {' '.join(POSITION_NAMES)}",
    64: "hidden_size n_embd d_model word_embed_proj_dim lru_width emb_dim embedding_size embedding_dim index_topk "
    "indexer_budget intermediate_size intermediate_size_mlp n_inner d_inner ffn_dim ffn_hidden_size ff_dim "
    "dense_intermediate_size mamba_headdim",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size sliding_window qk_head_dim "
    "attention_window_size attention_head_dim",
    16: "head_dim global_head_dim d_head qk_nope_head_dim qk_rope_head_dim v_head_dim q_lora_rank kv_lora_rank "
    "o_lora_rank mamba_d_head mamba_head_dim mamba_d_state ssm_state_size state_size chunk_size linear_key_head_dim "
    "linear_value_head_dim linear_head_dim indexer_head_dim hidden_size_per_layer_input query_pre_attn_scalar "
    "rotary_dim laurel_rank index_head_dim",
    8: "mamba_n_heads mamba_num_heads time_step_rank mamba_dt_rank adapter_rank",
    4: "num_local_experts num_experts n_routed_experts moe_num_experts linear_num_value_heads linear_num_heads "
    f"{' '.join(HEAD_NAMES)}",
    2: "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts n_mamba_heads mamba_n_groups n_groups "
    "expand mamba_expand linear_num_key_heads",
    1: "n_group num_expert_group topk_group num_mem_blocks",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
SPECIAL = "pad_token_id bos_token_id eos_token_id sep_token_id".split()
TEMPLATE = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"


def shrink(config: PreTrainedConfig, vocabulary: int, *, all_layers: bool = False) -> PreTrainedConfig:
    """The configuration with every kind of layer once or twice, narrow, and with `vocabulary` tokens."""
    config = copy.deepcopy(config)
    for part in parts(config):
        known = part.to_dict()
        numbers = {name: value for name, value in known.items() if isinstance(value, int)}
        heads = next((numbers[name] for name in HEAD_NAMES if name in numbers), 0)
        values = _narrow(known, heads)
        if {"expand", "num_heads"} <= numbers.keys():  # heads of a state-space model share its expanded width
            values["num_heads"] = 8
        if "first_k_dense_replace" in numbers:
            values["first_k_dense_replace"] = min(1, numbers["first_k_dense_replace"])
        values |= {} if all_layers else _layers(known, numbers)
        for name in numbers:
            if re.fullmatch(r"vocab_size\w*", name) and numbers[name]:
                values[name] = vocabulary
            elif re.search(r"_token_(id|index)s?$", name):
                values[name] = vocabulary - 1
        values |= {name: index for index, name in enumerate(SPECIAL) if name in known}
        if rope := known.get("rope_parameters"):
            values["rope_parameters"] = {name: _of_a_head(name, value, rope) for name, value in rope.items()}
        if own := known.get("per_layer_config"):  # what layers have otherwise, by number
            last = values.get("num_hidden_layers", part.num_hidden_layers)
            values["per_layer_config"] = {n: {**own[n], **_narrow(own[n], heads)} for n in own if int(n) < last}
        for name in values.keys() - getattr(part, "attribute_map", {}).keys():
            setattr(part, name, values[name])
    return config


def _narrow(known: dict[str, Any], heads: int) -> dict[str, Any]:
    """The sizes among the values of a configuration, or of one of its layers, as a twin has them."""
    numbers = {name: value for name, value in known.items() if isinstance(value, int)}
    values: dict[str, Any] = {name: SIZE_OF[name] for name in numbers.keys() & SIZE_OF}
    values |= {name: min(2, numbers[name]) for name in values if values[name] == 2}
    for name in known.keys() & set(KV_NAMES):  # in groups, as the model has them
        values[name] = 4 if (numbers.get(name) or heads) == heads else min(2, numbers[name])
    return values | ({"head_dim": 16} if "head_dim" in known else {})  # None in some default configurations


def _of_a_head(name: str, value: Any, rope: dict[str, Any]) -> Any:
    """A rotary parameter for heads of 16: those that say something of each frequency are lists."""
    if name == "mrope_section":
        return [2, 3, 3]
    return value[: int(8 * rope.get("partial_rotary_factor", 1))] if isinstance(value, list) else value


def _layers(known: dict[str, Any], numbers: dict[str, int]) -> dict[str, Any]:
    """As many layers as it takes for each kind to stand once, two at least, and one that shares another's keys."""
    total = next((numbers[name] for name in LAYER_NAMES if name in numbers), 0)
    lists = {
        name: [json.dumps(item, default=str) for item in value]
        for name, value in known.items()
        if isinstance(value, list) and len(value) == total > 1 and not name.endswith("token_ids")
    }
    periods = ("full_attn_mod", "attn_layer_period", "expert_layer_period", "full_attention_interval")
    firsts = [kinds.index(kind) + 1 for kinds in lists.values() for kind in set(kinds)]
    shared = {name: min(1, numbers[name]) for name in numbers.keys() & {"num_kv_shared_layers"}}
    keep = max(2, *firsts, *(numbers.get(name, 0) for name in periods)) + numbers.get("attn_layer_offset", 0) % 4
    keep = min(keep + sum(shared.values()), max(total, 2))
    cut = {name: [SIZE_OF[name]] * keep if name in SIZE_OF else known[name][:keep] for name in lists}
    return dict.fromkeys(numbers.keys() & set(LAYER_NAMES), keep) | cut | shared


def small_tokenizer(added_tokens: list[str]) -> PreTrainedTokenizerFast:
    """Words that no text has, four special ones, and those that were added."""
    vocabulary = {name: index for index, name in enumerate(["<pad>", "<bos>", "<eos>", "<sep>", *map(chr, range(256))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<sep>")),
        **{"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE},
    )
    tokenizer.add_tokens(added_tokens)
    return tokenizer


def make_twin(settings: Settings, config: PreTrainedConfig, spare: int, folder: Path) -> int:
    """Save the twin of the model of `config` with its small tokenizer; the number of its parameters.

    Its embedding has `spare` rows more than its tokenizer has tokens. If layers are named by number, all are kept.
    """
    named = str([settings.adapter.lora_config, settings.adapter.freeze, settings.model.lora_target_modules])
    by_number = re.search(r"(layers|h|blocks)\W+\d|layers_to_transform|layer_replication|\.\d+\\?\.", named)
    tokenizer, attention = small_tokenizer([]), available_attention(settings.model.attn_implementation)
    small = shrink(config, len(tokenizer) + spare, all_layers=bool(by_number))
    torch.manual_seed(0)
    model = from_config(small, attn_implementation=attention, code=settings.training.trust_remote_code)
    with torch.no_grad():
        for parameter in model.float().parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
