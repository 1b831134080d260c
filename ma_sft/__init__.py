"""Supervised fine-tuning with proven labels: a thin wrapper around TRL's `SFTTrainer`.

The names below are the public API. They are imported when first used, so that `import ma_sft` and
`ma-sft --help` do not wait for torch.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from ma_sft.errors import (
    FormatError,
    LabelError,
    MaSftError,
    RecipeError,
    ResponseTemplateError,
    RunError,
    TemplateError,
)

if TYPE_CHECKING:
    from ma_sft.cli import launch
    from ma_sft.collator import DataCollatorForCompletionOnlyLM
    from ma_sft.formats import to_messages, to_messages_batch
    from ma_sft.packing import ConstantLengthDataset, pack
    from ma_sft.preference import to_preference
    from ma_sft.recipe import Recipe
    from ma_sft.template import tokenize_conversation
    from ma_sft.train import run

__version__ = "0.1.0"

# TRL and PEFT import DeepSpeed where it is installed; on a machine without a GPU it says so on stdout.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")

_LAZY = {
    "DataCollatorForCompletionOnlyLM": "ma_sft.collator",
    "launch": "ma_sft.cli",
    "to_messages": "ma_sft.formats",
    "to_messages_batch": "ma_sft.formats",
    "ConstantLengthDataset": "ma_sft.packing",
    "pack": "ma_sft.packing",
    "to_preference": "ma_sft.preference",
    "Recipe": "ma_sft.recipe",
    "tokenize_conversation": "ma_sft.template",
    "run": "ma_sft.train",
}

__all__ = [
    "ConstantLengthDataset",
    "DataCollatorForCompletionOnlyLM",
    "FormatError",
    "LabelError",
    "MaSftError",
    "Recipe",
    "RecipeError",
    "ResponseTemplateError",
    "RunError",
    "TemplateError",
    "launch",
    "pack",
    "run",
    "to_messages",
    "to_messages_batch",
    "to_preference",
    "tokenize_conversation",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
