"""Supervised fine-tuning with proven labels: a thin wrapper around TRL's `SFTTrainer`.

The names below are the public API. They are imported when first used, so that `import ma_sft` and
`ma-sft --help` do not wait for torch.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from ma_sft.errors import FormatError as FormatError
from ma_sft.errors import LabelError as LabelError
from ma_sft.errors import MaSftError as MaSftError
from ma_sft.errors import RecipeError as RecipeError
from ma_sft.errors import ResponseTemplateError as ResponseTemplateError
from ma_sft.errors import RunError as RunError
from ma_sft.errors import TemplateError as TemplateError
from ma_sft.version import __version__ as __version__

if TYPE_CHECKING:
    from ma_sft.cli import launch as launch
    from ma_sft.config import Recipe as Recipe
    from ma_sft.config import RecipeSettings as RecipeSettings
    from ma_sft.data.formats import to_messages as to_messages
    from ma_sft.data.formats import to_messages_batch as to_messages_batch
    from ma_sft.data.formats import to_preference as to_preference
    from ma_sft.labels.audit import audit as audit
    from ma_sft.labels.collator import DataCollatorForCompletionOnlyLM as DataCollatorForCompletionOnlyLM
    from ma_sft.labels.encoder import tokenize_conversation as tokenize_conversation
    from ma_sft.look import check as check
    from ma_sft.look import preview as preview
    from ma_sft.packing.constant_length import ConstantLengthDataset as ConstantLengthDataset
    from ma_sft.packing.pack import pack as pack
    from ma_sft.release.chat import chat as chat
    from ma_sft.sft import run as run
    from ma_sft.training.compat import SFTConfig as SFTConfig
    from ma_sft.training.compat import SFTTrainer as SFTTrainer
    from ma_sft.training.trainer import make_trainer as make_trainer

# TRL and PEFT import DeepSpeed where it is installed; on a machine without a GPU it says so on stdout.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")

_LAZY = {
    "cli": "launch",
    "config": "Recipe RecipeSettings",
    "data.formats": "to_messages to_messages_batch to_preference",
    "labels.audit": "audit",
    "labels.collator": "DataCollatorForCompletionOnlyLM",
    "labels.encoder": "tokenize_conversation",
    "look": "check preview",
    "packing.constant_length": "ConstantLengthDataset",
    "packing.pack": "pack",
    "release.chat": "chat",
    "sft": "run",
    "training.compat": "SFTConfig SFTTrainer",
    "training.trainer": "make_trainer",
}
_MODULES = {name: f"ma_sft.{module}" for module, names in _LAZY.items() for name in names.split()}
_ERRORS = "FormatError LabelError MaSftError RecipeError ResponseTemplateError RunError TemplateError"
__all__ = sorted([*_MODULES, *_ERRORS.split(), "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
