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
from ma_sft.version import __version__

if TYPE_CHECKING:
    from ma_sft.cli import launch
    from ma_sft.config import Recipe
    from ma_sft.data.formats import to_messages, to_messages_batch
    from ma_sft.data.preference import to_preference
    from ma_sft.labels.audit import audit
    from ma_sft.labels.collator import DataCollatorForCompletionOnlyLM
    from ma_sft.labels.encoder import tokenize_conversation
    from ma_sft.packing.constant_length import ConstantLengthDataset
    from ma_sft.packing.pack import pack
    from ma_sft.sft import run
    from ma_sft.training.compat import SFTConfig, SFTTrainer
    from ma_sft.training.trainer import make_trainer

# TRL and PEFT import DeepSpeed where it is installed; on a machine without a GPU it says so on stdout.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")

_LAZY = {
    "audit": "ma_sft.labels.audit",
    "DataCollatorForCompletionOnlyLM": "ma_sft.labels.collator",
    "launch": "ma_sft.cli",
    "to_messages": "ma_sft.data.formats",
    "to_messages_batch": "ma_sft.data.formats",
    "ConstantLengthDataset": "ma_sft.packing.constant_length",
    "pack": "ma_sft.packing.pack",
    "to_preference": "ma_sft.data.preference",
    "Recipe": "ma_sft.config",
    "tokenize_conversation": "ma_sft.labels.encoder",
    "run": "ma_sft.sft",
    "make_trainer": "ma_sft.training.trainer",
    "SFTConfig": "ma_sft.training.compat",
    "SFTTrainer": "ma_sft.training.compat",
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
    "SFTConfig",
    "SFTTrainer",
    "TemplateError",
    "__version__",
    "audit",
    "launch",
    "make_trainer",
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
