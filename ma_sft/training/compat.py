"""`SFTTrainer` and `SFTConfig` as scripts of TRL 0.x call them: thin subclasses of today's that take the old names.

Each old name is said once, with today's. Nothing else of TRL is changed; docs/migrating.md has old and new side by
side.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset

from ma_sft.packing.constant_length import ConstantLengthDataset

# TRL 0.x's name of a setting -> today's, of `SFTConfig` and of the arguments that `SFTTrainer` took itself
CONFIG = {"max_seq_length": "max_length", "evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu"}
TRAINER = (
    *("dataset_text_field", "max_seq_length", "packing", "dataset_num_proc", "dataset_kwargs", "eval_packing"),
    *("neftune_noise_alpha", "model_init_kwargs"),
)
GONE = ("dataset_batch_size", "num_of_sequences", "chars_per_token", "infinite")


@cache
def _say(old: str, new: str) -> None:
    warnings.warn(f"{old} is TRL 0.x's: {new}", FutureWarning, stacklevel=4)


def _today(settings: dict[str, Any], form: str = "{}") -> dict[str, Any]:
    """The settings under today's names, without those that are gone; `form` is how each is said to be given today."""
    found = {}
    for key, value in settings.items():
        name = CONFIG.get(key, key)
        if key in GONE:
            _say(key, "today it does nothing; set max_steps for a stream without end, or pass a ConstantLengthDataset")
            continue
        if form.format(name) != key:
            _say(key, f"today it is {form.format(name)}")
        found[name] = value
    return found


class SFTConfig(trl.SFTConfig):  # type: ignore[misc]
    """TRL's `SFTConfig`, which takes `max_seq_length` and other names of TRL 0.x too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_today(kwargs))


class SFTTrainer(trl.SFTTrainer):  # type: ignore[misc]
    """TRL's `SFTTrainer` for calls of TRL 0.x.

    Takes `tokenizer`, the settings that moved to `SFTConfig`, a `formatting_func` that gives one text for a row or a
    list of texts for a batch, a collator that finds labels itself, and `ConstantLengthDataset` as a data set.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *positional: Any,
        tokenizer: Any = None,
        formatting_func: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None:
            _say("tokenizer", "today it is processing_class")
            kwargs.setdefault("processing_class", tokenizer)
        args = _config(args, {key: kwargs.pop(key) for key in [*kwargs] if key in (*TRAINER, *GONE)})
        if data_collator is not None:
            args.packing = False  # its labels are found in rows, and TRL 1.x packs before it

        def ready(rows: Any) -> Any:
            if isinstance(rows, dict):
                return {name: ready(part) for name, part in rows.items()}
            if isinstance(rows, ConstantLengthDataset):
                args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
                return rows.to_iterable_dataset()
            if formatting_func is not None and isinstance(rows, Dataset | IterableDataset):
                return _formatted(rows, formatting_func, args.dataset_text_field)
            return rows

        super().__init__(model, args, data_collator, ready(train_dataset), ready(eval_dataset), *positional, **kwargs)


def _config(args: Any, more: dict[str, Any]) -> Any:
    """The trainer's arguments as an `SFTConfig`, with the settings that were the trainer's own in TRL 0.x."""
    more = {key: value for key, value in _today(more, "SFTConfig({}=...)").items() if value is not None}
    if args is None:
        # As in TRL 0.x, which asked for no bfloat16 where a machine has none
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return trl.SFTConfig("tmp_trainer", **{"bf16": bf16, **more})
    if not isinstance(args, trl.SFTConfig):
        _say("TrainingArguments", "today SFTTrainer takes an SFTConfig")
        given = {key: value for key, value in args.to_dict().items() if args.__dataclass_fields__[key].init}
        args = trl.SFTConfig(**given)
    for key, value in more.items():
        setattr(args, key, value)
    return args


def _formatted(rows: Any, function: Callable[..., Any], field: str) -> Any:
    """The rows as text: `function` of a row gives one text, of a batch a list of texts, as TRL 0.x allowed both."""
    first: dict[str, Any] = next(iter(rows), {})
    try:
        batched = isinstance(function({name: [value] for name, value in first.items()}), list)
    except (TypeError, ValueError, AttributeError, KeyError):
        batched = False
    return rows.map(lambda each: {field: function(each)}, batched=batched, remove_columns=[*first])
