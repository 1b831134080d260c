"""A small decoder in plain PyTorch that runs Llama's and Qwen3's weights.

    h_0 = E[x]                                                       (B, T, H)
    h  <- h + Attention(RMSNorm(h));  h <- h + SwiGLU(RMSNorm(h))    for each layer
    logits = RMSNorm(h) W_head^T                                     (B, T, V)

Letters: B batch, T new tokens, S all tokens with the cached ones (S = T without a cache), H hidden size, N query
heads, G key/value heads (N a multiple of G), D head size, V vocabulary. Modules are named as in the checkpoints, so
`state_dict()` keys are the keys of the safetensors files.

Vaswani et al. 2017 (attention), Zhang & Sennrich 2019 (RMSNorm), Su et al. 2021 (RoPE), Shazeer 2020 (SwiGLU),
Ainslie et al. 2023 (grouped-query attention).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ma_sft.reference import InputError

INIT_STD = 0.02


@dataclass(frozen=True)
class Config:
    """The numbers of a checkpoint's `config.json` that the decoder needs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qk_norm: bool

    @classmethod
    def read(cls, folder: str | Path) -> "Config":
        """From `folder/config.json`.

        Raises:
            InputError: an architecture or a setting that this decoder does not compute.
        """
        raw = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        wanted = {
            "model_type": (raw["model_type"], ("llama", "qwen3")),
            "hidden_act": (raw.get("hidden_act", "silu"), ("silu",)),
            "attention_bias": (raw.get("attention_bias", False), (False,)),
            "mlp_bias": (raw.get("mlp_bias", False), (False,)),
            "use_sliding_window": (raw.get("use_sliding_window", False), (False,)),
            "rope_type": (rope.get("rope_type", rope.get("type", "default")), ("default",)),
        }
        for key, (value, known) in wanted.items():
            if value not in known:
                raise InputError(f"{folder}/config.json: {key} is {value!r}, the reference decoder knows {known}")
        heads = raw["num_attention_heads"]
        return cls(
            **{key: raw[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            qk_norm=raw["model_type"] == "qwen3",
        )


class Cache:
    """Keys and values of the tokens seen so far, so that a new token costs one position and not the whole text.

    `keys[l]` and `values[l]` have shape (B, G, capacity, D), one pair per layer; the first `length` positions hold
    tokens. The memory is taken once and filled from left to right.
    """

    def __init__(self, config: Config, batch: int, capacity: int, like: Tensor) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, G, T, D) after the tokens seen so far; return all keys and values, (B, G, S, D)."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def attention_pattern(mask: Tensor, new: int) -> Tensor:
    """(B, S) document numbers -> (B, 1, T, S) bool: which of all tokens may each of the last T = `new` ones see?

    Token q sees token k if k <= q and both are of one document. Padding is document 0: no real token sees it.
    """
    total = mask.shape[1]
    causal = torch.ones(total, total, dtype=torch.bool, device=mask.device).tril()
    same = mask[:, :, None] == mask[:, None, :]
    return (causal & same)[:, None, total - new :, :]


def positions(mask: Tensor) -> Tensor:
    """(B, S) document numbers -> (B, S) positions that count from 0 in each document; padding counts as one too."""
    index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    starts = torch.ones_like(mask, dtype=torch.bool)
    starts[:, 1:] = mask[:, 1:] != mask[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def rotation(config: Config, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles position * theta^(-2i/D), each (B, 1, T, D), the D/2 angles written twice."""
    exponent = torch.arange(0, config.head_dim, 2, device=position.device).float() / config.head_dim
    angle = position[:, None, :, None].float() / config.rope_theta**exponent
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn the pairs (x_i, x_{i+D/2}) by their angle, so that q·k depends on the distance of two tokens only."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D) + mask) v; each of the G key/value heads serves N/G query heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, head = config.hidden_size, config.head_dim
        self.head_dim = head
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head, hidden, bias=False)
        self.q_norm = RMSNorm(head, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, cache: Cache | None, layer: int) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:-1], -1, self.head_dim)

        query = rotate(self.q_norm(heads(self.q_proj(x))).transpose(1, 2), cos, sin)  # (B, N, T, D)
        key = rotate(self.k_norm(heads(self.k_proj(x))).transpose(1, 2), cos, sin)  # (B, G, T, D)
        value = heads(self.v_proj(x)).transpose(1, 2)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)  # (B, N, S, D)
        scores = query @ key.transpose(-1, -2) / self.head_dim**0.5  # (B, N, T, S)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32).to(value.dtype)
        return self.o_proj((weights @ value).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and SwiGLU, each added to what it reads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, cache: Cache | None, layer: int) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, visible, cache, layer)
        return h + self.mlp(self.post_attention_layernorm(h))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """The whole model; `Decoder(config)` has random weights, `load(folder)` has a checkpoint's."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=INIT_STD)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight  # type: ignore[assignment]

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T) ids and (B, S) document numbers -> (B, T, H); with a cache, the T ids follow those in it."""
        h = self.model["embed_tokens"](input_ids)
        new = input_ids.shape[1]
        visible = attention_pattern(attention_mask, new)
        cos, sin = rotation(self.config, positions(attention_mask)[:, -new:], h.dtype)
        for number, layer in enumerate(self.model["layers"].children()):
            h = layer(h, cos, sin, visible, cache, number)
        if cache is not None:
            cache.length += new
        return self.model["norm"](h)  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V); arguments as for `hidden`."""
        return self.lm_head(self.hidden(input_ids, attention_mask, cache))  # type: ignore[no-any-return]


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """A checkpoint folder (`config.json`, `model.safetensors` or its shards and index) -> a decoder in `dtype`.

    Raises:
        InputError: an architecture this decoder does not compute, or weights that are missing or left over.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    weights = {key: tensor.to(dtype) for name in names for key, tensor in load_file(folder / name).items()}
    config = Config.read(folder)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = Decoder(config)
    differing = sorted(set(model.state_dict()) ^ set(weights))
    if differing:
        raise InputError(f"{folder}: {len(differing)} weights do not fit the architecture, the first: {differing[0]}")
    model.load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight  # type: ignore[assignment]
    return model


def save(model: Decoder, folder: str | Path) -> None:
    """Write `folder/model.safetensors`; a tied output matrix is stored once, as the input matrix."""
    weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
