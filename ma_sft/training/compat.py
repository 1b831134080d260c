"""`SFTTrainer` and `SFTConfig` as scripts of TRL 0.x call them: thin subclasses of today's that take the old names.

Each old name is said once, with today's. Nothing else of TRL is changed; docs/migrating.md has old and new side by
side.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import trl
from datasets import Dataset

from ma_sft.errors import RecipeError
from ma_sft.packing.constant_length import ConstantLengthDataset

# TRL 0.x's name of a setting -> today's, of `SFTConfig` and of the arguments that `SFTTrainer` took itself
CONFIG = {"max_seq_length": "max_length", "evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu"}
TRAINER = (
    *("dataset_text_field", "max_seq_length", "packing", "dataset_num_proc", "dataset_kwargs", "eval_packing"),
    *("neftune_noise_alpha", "model_init_kwargs"),
)
GONE = {
    "dataset_batch_size": "rows are read in batches of TRL's own size",
    "num_of_sequences": "rows are packed as a whole; pass a ConstantLengthDataset to keep it",
    "chars_per_token": "rows are packed as a whole; pass a ConstantLengthDataset to keep it",
    "infinite": "set max_steps, or pass a ConstantLengthDataset",
}


@cache
def _say(old: str, new: str) -> None:
    warnings.warn(f"{old} is TRL 0.x's: {new}", FutureWarning, stacklevel=4)


def _today(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings under today's names, without those that are gone."""
    found = {}
    for key, value in settings.items():
        if key in GONE:
            _say(key, GONE[key])
            continue
        if key in CONFIG:
            _say(key, f"today it is {CONFIG[key]}")
        found[CONFIG.get(key, key)] = value
    return found


class SFTConfig(trl.SFTConfig):  # type: ignore[misc]
    """TRL's `SFTConfig`, which takes `max_seq_length` and other names of TRL 0.x too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_today(kwargs))


class SFTTrainer(trl.SFTTrainer):  # type: ignore[misc]
    """TRL's `SFTTrainer` for calls of TRL 0.x.

    Takes `tokenizer`, the settings that moved to `SFTConfig`, a `formatting_func` that gives one text for a row or a
    list of texts for a batch, a collator that finds labels itself, and `ConstantLengthDataset` as a data set.

    Raises:
        RecipeError: an argument that neither TRL knows.
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
        sets = []
        for rows in (train_dataset, eval_dataset):
            if isinstance(rows, ConstantLengthDataset):
                rows = rows.to_iterable_dataset()
                args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
            elif formatting_func is not None and isinstance(rows, Dataset):
                rows = _formatted(rows, formatting_func, args.dataset_text_field)
            sets.append(rows)
        try:
            super().__init__(model, args, data_collator, *sets, *positional, **kwargs)
        except TypeError as error:
            if "unexpected keyword argument" in str(error):
                raise RecipeError(f"SFTTrainer: {error}; docs/migrating.md lists what TRL 0.x's became") from None
            raise


def _config(args: Any, more: dict[str, Any]) -> Any:
    """The trainer's arguments as an `SFTConfig`, with the settings that were the trainer's own in TRL 0.x."""
    for key in more:
        if key not in GONE and key not in CONFIG:
            _say(f"SFTTrainer({key}=...)", f"today it is SFTConfig({key}=...)")
    more = {key: value for key, value in _today(more).items() if value is not None}
    if args is None:
        return trl.SFTConfig("tmp_trainer", **more)
    if not isinstance(args, trl.SFTConfig):
        _say("TrainingArguments", "today SFTTrainer takes an SFTConfig")
        given = {key: value for key, value in args.to_dict().items() if args.__dataclass_fields__[key].init}
        args = trl.SFTConfig(**given)
    for key, value in more.items():
        setattr(args, key, value)
    return args


def _formatted(rows: Dataset, function: Callable[..., Any], field: str) -> Dataset:
    """The rows as text: `function` of a row gives one text, of a batch a list of texts, as TRL 0.x allowed both."""

    def one_by_one(batch: dict[str, list[Any]]) -> list[Any]:
        return [function(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]

    first = rows[:1]
    try:
        batched = isinstance(function(first), list)
    except (TypeError, ValueError, AttributeError, KeyError):
        batched = False

    def texts(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {field: function(batch) if batched else one_by_one(batch)}

    return rows.map(texts, batched=True, remove_columns=rows.column_names, desc="formatting")
