"""Optimisers that transformers does not know by name: Muon, LoRA+, and any class that is named as `module:Class`."""

import json
from contextlib import suppress
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import Trainer

from ma_sft.config import Settings, transformers_optim
from ma_sft.data.functions import load_object
from ma_sft.errors import RecipeError


def own_optimizer(settings: Settings) -> tuple[Any, dict[str, Any]] | None:
    """`SFTTrainer`'s `optimizer_cls_and_kwargs` of the recipe, None where transformers makes the optimiser.

    Raises:
        RecipeError: no such class, or one of these for LoRA+.
    """
    training, name, ratio = settings.training, settings.optimizer, settings.adapter.loraplus_lr_ratio
    is_ours = transformers_optim(name) != name
    if ratio is not None:  # https://arxiv.org/abs/2402.12354
        if is_ours:
            raise RecipeError("loraplus_lr_ratio makes an optimizer of its own; leave one of it and optim out")
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(training)
        ours = {"loraplus_lr_ratio": ratio, "loraplus_weight_decay": training.weight_decay}
        return (lambda: create_loraplus_optimizer), {"optimizer_cls": kind, **kwargs, **ours}
    if not is_ours:
        return None
    pairs = [pair.split("=", 1) for pair in (training.optim_args or "").replace(" ", "").split(",") if "=" in pair]
    kwargs = {"lr": training.learning_rate} | {key: _number(value) for key, value in pairs}
    if name != "muon":
        return load_object(name), kwargs
    kwargs["betas"] = (training.adam_beta1, training.adam_beta2)
    return (lambda: MuonWithAdamW), kwargs | {"eps": training.adam_epsilon, "weight_decay": training.weight_decay}


def _number(text: str) -> Any:
    with suppress(ValueError):
        return json.loads(text.lower())
    return text


class MuonWithAdamW(Optimizer):
    """PyTorch's Muon (https://kellerjordan.github.io/posts/muon) for the matrices between embedding and head, AdamW for
    all else: embeddings, head, norms, biases, fused experts.

    Muon's step is scaled to the size of AdamW's (https://arxiv.org/abs/2502.16982): one learning rate fits both.
    """

    def __init__(
        self, model: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, **muon: Any
    ) -> None:
        apart = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        apart += [head] if (head := model.get_output_embeddings()) is not None else []
        ends = {id(parameter) for module in apart for parameter in module.parameters()}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [p for p in trained if p.ndim == 2 and id(p) not in ends]
        others = [p for p in trained if p.ndim != 2 or id(p) in ends]
        decayed = [{"params": [p for p in others if p.ndim > 1]}]
        plain = [{"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0}]
        muon = {"adjust_lr_fn": "match_rms_adamw", **muon}
        self.parts: list[Optimizer] = [
            Muon([{"params": matrices}], lr=lr, weight_decay=weight_decay, **muon),
            AdamW(decayed + plain, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay),
        ]
        groups = [{**group, "part": at} for at, part in enumerate(self.parts) for group in part.param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both, on this optimiser's own groups and states, which are what is saved and scheduled."""
        for at, part in enumerate(self.parts):
            part.param_groups = [group for group in self.param_groups if group["part"] == at]
            part.state = self.state
            part.step()
