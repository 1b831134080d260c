"""bitsandbytes' inside: the names of it that are not documented stand here alone, each held by a test."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from ma_sft.errors import RecipeError

# It warns once a layer and step of how the input of an 8-bit layer is cast, with no setting against it.
NOISY_LOGGER = "bitsandbytes.autograd._functions"

# Whether a 4-bit layer is repacked for inference at its next forward pass without gradients.
REPACKS = "support_avx512bf16_for_cpu"


def check_installed() -> None:
    """Stop where 4-bit or 8-bit weights are wanted and bitsandbytes is missing; silence what it says at each step.

    Raises:
        RecipeError: not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise RecipeError("4-bit and 8-bit weights need bitsandbytes: pip install 'ma-sft[quant]'")
    logging.getLogger(NOISY_LOGGER).setLevel(logging.ERROR)


def keep_gradients(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference on a CPU.

    With AVX-512 BF16, the first forward pass in evaluation mode repacks them for a kernel without a backward pass, and
    they stay so when training goes on: after any evaluation, no gradient would go through a layer (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, False)


@contextmanager
def repacked(model: Any) -> Iterator[None]:
    """Let bitsandbytes repack 4-bit weights on a CPU while answers are generated, many times as fast.

    Afterwards the layers have the very weights and scales that they had: bitsandbytes' own way back rounds the scales.
    """
    layers = [
        module
        for module in model.modules()
        if hasattr(module, REPACKS)
        and module.weight.device.type == "cpu"
        and getattr(module.weight, "quant_state", None) is not None
        and module.weight.quant_state.shape[0] % 32 == 0
        and module.weight.quant_state.shape[1] % 64 == 0  # the kernel's blocks; other layers stay as they are
    ]
    kept = [
        (layer.weight.data, copy.copy(layer.weight.quant_state), layer.support_avx512bf16_for_cpu) for layer in layers
    ]
    if layers:
        from bitsandbytes.functional import has_avx512bf16

        for layer in layers:
            layer.support_avx512bf16_for_cpu = has_avx512bf16()
    try:
        yield
    finally:
        for layer, (data, state, fast) in zip(layers, kept, strict=True):
            layer.weight.data, layer.weight.quant_state, layer.support_avx512bf16_for_cpu = data, state, fast
