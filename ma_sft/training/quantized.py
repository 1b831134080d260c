"""A quantised base; and bitsandbytes' inside: its names that are not documented stand here alone, each with a test."""

import copy
import logging
from importlib.util import find_spec
from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from trl import get_quantization_config

from ma_sft.config import Settings
from ma_sft.errors import RecipeError, one_line

# It warns once a layer and step of how the input of an 8-bit layer is cast, with no setting against it.
NOISY_LOGGER = "bitsandbytes.autograd._functions"

# Whether a 4-bit layer is repacked for inference at its next forward pass without gradients.
REPACKS = "support_avx512bf16_for_cpu"


def quantization(settings: Settings, saved: Any = None) -> Any:
    """The recipe's quantisation as `from_pretrained` takes it, None without one; what it needs is here.

    Args:
        saved: what the model's own `config.json` says of it, if its weights are quantised already.

    Raises:
        RecipeError: a method that transformers does not know, a package or a device that is missing.
    """
    given: Any = settings.adapter.quantization_config
    if settings.model.load_in_4bit or settings.model.load_in_8bit:
        if find_spec("bitsandbytes") is None:
            raise RecipeError("4-bit and 8-bit weights need bitsandbytes: pip install 'ma-sft[quant]'")
        logging.getLogger(NOISY_LOGGER).setLevel(logging.ERROR)  # at each step
        return get_quantization_config(settings.model)
    try:
        found = AutoQuantizationConfig.from_dict(copy.deepcopy(given)) if given else None
        if given or saved:
            quantizer = AutoHfQuantizer.from_config(found or copy.deepcopy(saved), pre_quantized=bool(saved))
            quantizer.validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # of many packages
        why = f"pip install {error.name}: " if isinstance(error, ModuleNotFoundError) else ""
        why += f"{type(error).__name__}: " if isinstance(error, KeyError) else ""
        raise RecipeError(f"quantization_config: {why}{one_line(error)}") from None
    return found


def keep_gradients(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference on a CPU.

    With AVX-512 BF16, the first forward pass in evaluation mode repacks them for a kernel without a backward pass, and
    they stay so when training goes on: after any evaluation, no gradient would go through a layer (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, False)
