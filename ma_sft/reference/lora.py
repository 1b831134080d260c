"""LoRA: freeze a weight and learn a low-rank update of it (Hu et al. 2021).

    h = x W^T + s * (x A^T) B^T        W (out, in) frozen;  A (r, in), B (out, r) learned;  s = alpha / r

The update s*B*A has rank at most r and r*(in + out) numbers instead of in*out. Dividing alpha by r keeps the update's
size about the same when r changes; the teaching form `h = x W^T + alpha * B(A(x))` is `normalise=False`.

**Why B = 0 at the start, and A not.** The first output must be the base model's, so B*A = 0. With u = dL/dh:

    dL/dA = s * B^T u^T x          dL/dB = s * u^T (x A^T)

    A = 0, B = 0:  both gradients are zero for ever; nothing is learned.
    A random, B = 0:  dL/dB != 0 at once, dL/dA from the second step on. The usual choice.
    A = 0, B random:  the mirror image; it learns as well.
"""

import json
import math
import re
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ma_sft.reference import InputError

Init = Literal["B=0", "A=0", "A=B=0"]


class LoRALinear(nn.Module):
    """A linear layer (..., in) -> (..., out) with a low-rank update; `weight` and `bias` are the base layer's, frozen.

    Args:
        base: the layer to adapt.
        r: rank.
        alpha: scale of the update.
        normalise: divide alpha by r.
        init: which of the two factors starts at zero; the other is drawn uniformly from +-1/sqrt(columns).
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, *, normalise: bool = True, init: Init = "B=0") -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach(), requires_grad=False)
        self.r = r
        self.scale = alpha / r if normalise else alpha
        self.lora_A = nn.Parameter(self.weight.new_zeros(r, base.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(base.out_features, r))
        self.merged = False
        if init == "B=0":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        elif init == "A=0":
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        elif init != "A=B=0":
            raise InputError(f"init is {init!r}; choose 'B=0', 'A=0' or 'A=B=0'")

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(x, self.weight, self.bias)
        if self.merged:
            return h
        return h + self.scale * (x @ self.lora_A.T) @ self.lora_B.T

    def update(self) -> Tensor:
        """s*B*A, (out, in): what the adapter adds to the weight."""
        return self.scale * self.lora_B @ self.lora_A

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + s*B*A: the same outputs without the extra products."""
        if not self.merged:
            self.weight.data.add_(self.update())
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the update out of the weight again."""
        if self.merged:
            self.weight.data.sub_(self.update())
            self.merged = False


def inject(
    module: nn.Module, pattern: str, r: int, alpha: float, *, normalise: bool = True, init: Init = "B=0"
) -> list[str]:
    """Freeze `module` and replace each `nn.Linear` whose full name the regular expression finds; return the names.

    Raises:
        InputError: the pattern finds no linear layer.
    """
    found = [
        name for name, child in module.named_modules() if isinstance(child, nn.Linear) and re.search(pattern, name)
    ]
    if not found:
        raise InputError(f"the pattern {pattern!r} finds no linear layer; names look like model.layers.0.mlp.up_proj")
    module.requires_grad_(False)
    for name in found:
        parent, _, child = name.rpartition(".")
        base = module.get_submodule(name)
        assert isinstance(base, nn.Linear)
        adapted = LoRALinear(base, r, alpha, normalise=normalise, init=init)
        setattr(module.get_submodule(parent), child, adapted)
    return found


def adapters(module: nn.Module) -> dict[str, LoRALinear]:
    """Full name -> layer of every adapted layer."""
    return {name: child for name, child in module.named_modules() if isinstance(child, LoRALinear)}


def merge(module: nn.Module) -> None:
    """Merge every adapter and put plain linear layers back: the model is an ordinary one again."""
    for name, layer in adapters(module).items():
        layer.merge()
        with torch.device("meta"):
            plain = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=layer.bias is not None)
        plain.weight, plain.bias = layer.weight, layer.bias
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, plain)


def save_adapter(module: nn.Module, folder: str | Path, base_model: str = "") -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them.

    PEFT always divides by r, so an alpha that is not normalised is stored as alpha * r.

    Raises:
        InputError: there is no adapter, or adapters of different ranks or scales.
    """
    found = adapters(module)
    kinds = {(layer.r, layer.scale) for layer in found.values()}
    if len(kinds) != 1:
        raise InputError(f"one rank and scale are needed to save an adapter, found {sorted(kinds) or 'no adapter'}")
    ((r, scale),) = kinds
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": scale * r,
        "target_modules": sorted(found),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for name, layer in found.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.detach().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(module: nn.Module, folder: str | Path) -> list[str]:
    """Inject the LoRA adapter that PEFT (or `save_adapter`) wrote; return the adapted layers' names.

    Raises:
        InputError: an adapter with something beyond plain LoRA (DoRA, ranks per layer, trained biases, ...).
    """
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias"):
        if config.get(key):
            raise InputError(f"{folder}/adapter_config.json: {key} is {config[key]!r}, the reference knows plain LoRA")
    tensors = load_file(folder / "adapter_model.safetensors")
    ending = ".lora_A.weight"
    names = [key.removeprefix("base_model.model.").removesuffix(ending) for key in tensors if key.endswith(ending)]
    if config["peft_type"] != "LORA" or 2 * len(names) != len(tensors):
        raise InputError(f"{folder}: {config['peft_type']} adapter with {len(tensors)} tensors is not plain LoRA")
    alpha = config["lora_alpha"] * (math.sqrt(config["r"]) if config.get("use_rslora") else 1)
    inject(module, "^(" + "|".join(map(re.escape, names)) + ")$", r=config["r"], alpha=alpha)
    for name, layer in adapters(module).items():
        layer.lora_A.data.copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
        layer.lora_B.data.copy_(tensors[f"base_model.model.{name}.lora_B.weight"])
    return names
