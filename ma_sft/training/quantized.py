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


def _fits_kernel(layer: Any) -> bool:
    """Whether bitsandbytes' blocks of 32 x 64 weights fit a layer on the CPU; others stay as they are."""
    state: Any = getattr(layer.weight, "quant_state", None) if hasattr(layer, REPACKS) else None
    if state is None or layer.weight.device.type != "cpu":
        return False
    return bool(state.shape[0] % 32 == 0 and state.shape[1] % 64 == 0)


@contextmanager
def repacked(model: Any) -> Iterator[None]:
    """Let bitsandbytes repack 4-bit weights on a CPU while answers are generated, many times as fast.

    Afterwards the layers have the very weights and scales that they had: bitsandbytes' own way back rounds the scales.
    """
    layers = [layer for layer in model.modules() if _fits_kernel(layer)]
    kept = [(layer.weight.data, copy.copy(layer.weight.quant_state), getattr(layer, REPACKS)) for layer in layers]
    if layers:
        from bitsandbytes.functional import has_avx512bf16

        for layer in layers:
            setattr(layer, REPACKS, has_avx512bf16())
    try:
        yield
    finally:
        for layer, (data, state, repacks) in zip(layers, kept, strict=True):
            layer.weight.data, layer.weight.quant_state = data, state
            setattr(layer, REPACKS, repacks)
