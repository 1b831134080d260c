"""Every setting that a recipe takes: who does what it says, which values it accepts, and what is refused in one line.

A setting is a field of our dataclasses or of TRL's `SFTConfig` and `ModelConfig`. Its class is

- `ours`: done by ma_sft; every field of our own dataclasses, and those of TRL's in `OURS`;
- `trainer`: passed on to TRL's trainer, PEFT and transformers as it is;
- `preset`: decided by ma_sft, and a contrary value is refused;
- `refused`: any value but the default is refused, with what to set instead.
"""

import copy
import difflib
import json
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from datetime import date
from enum import Enum
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ma_sft.errors import RecipeError
from ma_sft.files import read_json

TRAINER = set(
    """
    per_device_train_batch_size num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps
    max_grad_norm average_tokens_across_devices label_smoothing_factor fp16 bf16_full_eval fp16_full_eval tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache
    neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps logging_first_step
    log_on_each_node include_num_input_tokens_seen log_level log_level_replica project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    include_for_metrics batch_eval_metrics save_steps save_on_each_node hub_private_repo hub_model_id hub_revision
    hub_token load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism data_seed accelerator_config parallelism_config
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order label_names train_sampling_strategy length_column_name
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_timeout fsdp fsdp_config deepspeed debug
    skip_memory_metrics trust_remote_code router_aux_loss_coef pad_to_multiple_of loss_type activation_offloading
    lora_r lora_alpha lora_modules_to_save use_rslora use_dora load_in_8bit load_in_4bit bnb_4bit_quant_type
    bnb_4bit_quant_storage
    """.split()
)

OURS = {
    "output_dir": "Where the run is written; runs/NAME by default.",
    "learning_rate": "2e-4 for adapters, 2e-5 for all weights; see full_learning_rate.",
    "optim": "AdamW; with a quantised base its paged 8-bit form.",
    "bf16": "On where this machine has it.",
    "logging_nan_inf_filter": "Off: it would hide the step that ruins a model, at which the run stops.",
    "disable_tqdm": "True: no bar. Else a bar of the run's own, with tokens a second.",
    "report_to": "TensorBoard where it is installed; another tracker that is missing is refused.",
    "run_name": "The run's name.",
    "save_strategy": "Checkpoints are marked as whole once they are.",
    "save_total_limit": "Counted in whole checkpoints: the older one goes when the newer one is whole.",
    "save_only_model": "No run goes on from such a checkpoint: one that was stopped is refused until --resume never.",
    "push_to_hub": "Upload the result once, at the end: model or adapter, tokenizer, card and report.",
    "seed": "Also of the order, the draws and the split of the rows.",
    "use_cpu": "True where there is no accelerator and the launcher asks for none.",
    "ddp_find_unused_parameters": "False: every parameter takes part, and looking for others costs a pass.",
    "ddp_backend": "gloo where DeepSpeed runs on the CPU.",
    "dataloader_drop_last": "True: rows that fill no batch of all processes are left out of an epoch, and counted.",
    "resume_from_checkpoint": "Go on from this checkpoint instead of the newest whole one.",
    "model_init_kwargs": "Passed to `from_pretrained`; a dtype or revision in it is the setting of that name.",
    "chat_template_path": "Chat template: a .jinja file, or the template and tokens of another tokenizer.",
    "dataset_text_field": "Column of plain text to train on, whatever its name.",
    "dataset_num_proc": "Processes that convert, tokenise and judge; all cores by default if there are many rows.",
    "eos_token": "End token of the tokenizer; refused where the chat template ends a turn with another one.",
    "pad_token": "Padding token of the tokenizer.",
    "max_length": "Longest sequence, or the length of a pack, in tokens; null: no limit.",
    "truncation_mode": "What is kept of a sequence that is too long; rows with nothing left to train are counted.",
    "packing": "Several documents in a sequence, with attention inside each.",
    "packing_strategy": "bfd, bfd_split, or wrapped (documents see those before them).",
    "padding_free": "Batches without padding also without packing: one sequence, with attention inside each document.",
    "eval_packing": "Pack the rows that the trainer evaluates while it trains.",
    "completion_only_loss": "True: what the assistant says is trained, as always. False: the whole row is.",
    "model_name_or_path": "A hub id or a folder, or demo.",
    "model_revision": "Of the model, the tokenizer and the merge.",
    "dtype": "Of the loaded weights; bfloat16 for the frozen base of an adapter where bf16 is on, else float32.",
    "attn_implementation": "SDPA, which gives the same, where the FlashAttention that is asked for is not installed.",
    "use_peft": "Train an adapter.",
    "lora_dropout": "0 where an adapter is on fused experts, which PEFT cannot drop out.",
    "lora_target_modules": "Checked against the model before it is loaded; see lora_preset.",
    "lora_target_parameters": "Checked against the model before it is loaded.",
    "use_bnb_nested_quant": "On with load_in_4bit, as in QLoRA.",
}

# Values that mean what ma_sft does anyway, the first of them shown as the default; all others are refused.
PRESET: dict[str, tuple[tuple[Any, ...], str]] = {
    "assistant_only_loss": (
        (True, False),
        "what the assistant says is trained either way; to train on the whole row set completion_only_loss=false",
    ),
    "shuffle_dataset": ((True, False), "rows are always shuffled, by seed"),
    "remove_unused_columns": ((False, True), "the trainer gets token ids and labels alone"),
    "dataset_kwargs": ((None, {}, {"skip_prepare_dataset": True}), "rows are prepared before the trainer sees them"),
    "do_train": ((True, False), "ma-sft train always trains"),
    "do_eval": ((False, True), "held-out rows are always measured; while training: set eval_strategy"),
    "lora_task_type": (("CAUSAL_LM",), "ma_sft trains causal language models alone"),
    "hub_strategy": (("end", "every_save"), "push_to_hub uploads once, at the end"),
}

REFUSED = {
    "do_predict": "nothing is predicted; held-out answers are written with generate_eval",
    "enable_jit_checkpoint": "a run that is asked to stop saves by itself; leave it out",
    "hub_always_push": "push_to_hub uploads once, at the end; leave it out",
    "local_rank": "the launcher says it; leave it out",
}

PATHS = set(
    "dataset_name datasets eval_dataset model_name_or_path output_dir template chat_template_path deepspeed "
    "fsdp_config adapter_name_or_path resume_from_checkpoint accelerator_config".split()
)
CONFIG_FILES = {"deepspeed", "fsdp_config", "accelerator_config"}  # a mapping, its JSON, or the path of a file

LIMITS: tuple[tuple[Callable[[float], bool], str, str], ...] = (
    (
        lambda value: value > 0,
        "a number above 0",
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_train_epochs "
        "max_length max_new_tokens lora_r lora_alpha save_steps eval_steps ddp_timeout test_size loraplus_lr_ratio "
        "save_total_limit dataset_num_proc eval_accumulation_steps adam_epsilon torch_empty_cache_steps "
        "pad_to_multiple_of dataloader_prefetch_factor ddp_bucket_cap_mb",
    ),
    (
        lambda value: value >= 0,
        "0 or more",
        "learning_rate full_learning_rate weight_decay max_grad_norm warmup_steps eval_delay "
        "dataloader_num_workers neftune_noise_alpha router_aux_loss_coef logging_steps",
    ),
    (lambda value: 0 <= value < 2**32, "a whole number from 0 to below 2**32", "seed data_seed"),
    (lambda value: value == -1 or value >= 1, "a whole number from 1, or -1 for no limit", "max_steps"),
    (lambda value: value >= -1, "a number of rows, or -1 for all", "generate_eval"),
    (
        lambda value: 0 <= value < 1,
        "a number from 0 to below 1",
        "lora_dropout label_smoothing_factor adam_beta1 adam_beta2",
    ),
    (lambda value: 0 < value <= 1, "a number above 0 and up to 1", "test_near_duplicates"),
)

# Two ways to say one thing: where a later layer (YAML, flags) says it one way, it replaces the other.
RIVALS = (
    ("dataset_name", "datasets"),
    ("eval_dataset", "test_size"),
    ("template", "chat_template_path"),
    ("bf16", "fp16"),
    ("load_in_4bit", "load_in_8bit"),
    ("activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
)


# What `from_pretrained` takes of a model and a setting says of all that is loaded.
INIT_KWARGS = {
    **{"dtype": "dtype", "torch_dtype": "dtype", "attn_implementation": "attn_implementation"},
    **{"revision": "model_revision", "trust_remote_code": "trust_remote_code"},
}


@dataclass(frozen=True)
class Need:
    """Settings (`names`) that do nothing unless one of `switches` is on, or, where that is not all, `met` holds."""

    names: str
    switches: str
    words: str = ""
    met: Callable[[Mapping[str, Any]], bool] | None = None

    def holds(self, values: Mapping[str, Any]) -> bool:
        return self.met(values) if self.met else any(_given(values[name]) for name in self.switches.split())

    @property
    def why(self) -> str:
        return self.words or f"does nothing without {' or '.join(self.switches.split())}; set it"


NEEDS = (
    Need(
        "load_in_4bit load_in_8bit adapter_name_or_path loraplus_lr_ratio lora_preset lora_config lora_r lora_alpha "
        "lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save use_rslora use_dora",
        "use_peft",
        "trains an adapter and use_peft is false; set use_peft",
    ),
    Need("bnb_4bit_quant_type bnb_4bit_quant_storage use_bnb_nested_quant", "load_in_4bit"),
    Need("generate_eval eval_strategy eval_on_start eval_packing load_best_model_at_end", "eval_dataset test_size"),
    Need("metric max_new_tokens", "generate_eval"),
    Need("eval_steps", "eval_strategy", "needs eval_strategy=steps", lambda values: values["eval_strategy"] == "steps"),
    Need(
        "metric_for_best_model greater_is_better",
        "load_best_model_at_end save_strategy lr_scheduler_type",
        "is for the best checkpoint; set load_best_model_at_end",
        lambda values: (
            values["load_best_model_at_end"]
            or values["save_strategy"] == "best"
            or values["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy")
        ),
    ),
    Need("test_near_duplicates", "test_size"),
    Need("dataset_test_split", "eval_dataset"),
    Need(
        "model_revision",
        "model_name_or_path",
        "is for a model on a hub, and model_name_or_path is a folder; give its id",
        lambda values: not Path(values["model_name_or_path"]).expanduser().is_dir(),
    ),
    Need(
        "stopping_strategy",
        "datasets",
        "is for sources with weights; give each of datasets a weight",
        lambda values: any(isinstance(source, dict) and "weight" in source for source in values["datasets"]),
    ),
    Need("packing", "max_length", "needs max_length, the length of a pack in tokens; set it"),
    Need(
        "dataset_streaming",
        "max_steps",
        "needs max_steps, as a stream's length is not known; set it",
        lambda values: values["max_steps"] > 0,
    ),
    Need(
        "optim_args optim_target_modules",
        "optim",
        "is not read by this optim; set one that takes it",
        lambda values: not values["optim"].startswith(("adamw_torch", "adafactor")),
    ),
    Need("packing_strategy", "packing eval_packing"),
    Need("overflow", "max_length"),
    Need(
        "truncation_mode",
        "packing packing_strategy overflow",
        "says what is left of a row that is cut, and here overflow or packing_strategy does; set overflow",
        lambda values: (
            not (values["packing"] and values["packing_strategy"] != "bfd")
            and values["overflow"] in (None, values["truncation_mode"])
        ),
    ),
    Need(
        "response_template",
        "formatting_func",
        "finds labels in the text of formatting_func; set it (a chat template needs no response_template)",
    ),
    Need("instruction_template", "response_template"),
    Need(
        "system_prompt merge_turns train_on history template_kwargs template_now add_eos dataset_format on_error "
        "dataset_text_field",
        "formatting_func",
        "is for conversations, and formatting_func makes the whole text; leave one of them out",
        lambda values: not values["formatting_func"],
    ),
    Need(
        "completion_only_loss",
        "formatting_func",
        "needs response_template, which finds what is trained in the text of formatting_func; set it",
        lambda values: not values["formatting_func"] or values["response_template"] is not None,
    ),
    Need(
        "assistant_only_loss response_template",
        "completion_only_loss",
        "trains a part of each row, and completion_only_loss=false all of it; leave one of them out",
        lambda values: values["completion_only_loss"] is not False,
    ),
    Need("hub_model_id hub_private_repo hub_revision", "push_to_hub"),
    Need("liger_kernel_config", "use_liger_kernel"),
    Need("fsdp_config", "fsdp"),
    Need("dataloader_persistent_workers dataloader_prefetch_factor", "dataloader_num_workers"),
    Need(
        "warmup_steps",
        "lr_scheduler_type",
        "does nothing with lr_scheduler_type=constant; set constant_with_warmup",
        lambda values: values["lr_scheduler_type"] != "constant",
    ),
)


@dataclass(frozen=True)
class Setting:
    """One setting: the types it takes, the stricter first (text is anything), its choices and its own default."""

    name: str
    stage: str
    kinds: tuple[type, ...]
    nullable: bool
    choices: tuple[str, ...]
    default: Any
    help: str

    @property
    def kind(self) -> str:
        """Its class: `ours`, `trainer`, `preset` or `refused`.

        Raises:
            KeyError: a field of TRL's that stands in no table here.
        """
        if self.stage not in ("training", "model"):
            return "ours"
        tables = {"ours": OURS, "trainer": TRAINER, "preset": PRESET, "refused": REFUSED}
        return {name: kind for kind, names in tables.items() for name in names}[self.name]

    def take(self, value: Any) -> Any:
        """A value from Python, YAML or the command line as this setting's own type.

        Raises:
            RecipeError: null where none is meant, another type, no choice, out of range, broken JSON.
        """
        value = _plain(value)
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and str not in self.kinds):
            if not self.nullable:
                raise RecipeError(f"{self.name}: a value is missing (null); give one, or leave the line out")
            return None
        if value is False and "no" in self.choices:  # YAML reads a bare `no` so
            value = "no"
        errors = []
        for kind in self.kinds:
            try:
                taken = self._take_as(kind, value)
                break
            except (ValueError, TypeError) as error:
                errors.append(error)
        else:
            raise RecipeError(f"{self.name}: {errors[-1]}")
        self._check(taken)
        return taken

    def _take_as(self, kind: type, value: Any) -> Any:
        if kind is list:
            if isinstance(value, str) and str in self.kinds:
                raise ValueError("text is taken as it is")
            items = value if isinstance(value, list) else [value]
            return [self._path(dict(item) if type(item) is dict else item) for item in items]
        if kind is dict:
            return self._mapping(value)
        if kind is str:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError(f"str expected, found {self._seen(value)}")
            if int in self.kinds and value != self.default:  # a word that stands for a number
                raise ValueError(f"a whole number or {self.default!r} expected, found {value!r}")
            return self._path(str(value))
        if kind is bool:
            return _bool(value, words=("true", "false") if str in self.kinds else ())
        if kind in (int, float):
            return _number(kind, value)
        if not isinstance(value, kind):
            raise ValueError(f"{kind.__name__} expected, found {self._seen(value)}")
        return value

    def _mapping(self, value: Any) -> Any:
        if isinstance(value, dict):
            return copy.deepcopy(value)
        if isinstance(value, str) and self.name in CONFIG_FILES and not value.lstrip().startswith("{"):
            path = self._path(value)
            read_json(Path(path))
            return path
        try:
            found = json.loads(value)
        except (TypeError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"a JSON object expected, found {self._seen(value)}")
        return found

    def _path(self, value: Any) -> Any:
        """`~` is the home of the user where a path is meant."""
        if self.name not in PATHS:
            return value
        if isinstance(value, dict) and isinstance(value.get("path"), str | PathLike):
            return {**value, "path": self._path(fspath(value["path"]))}
        return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value

    def _check(self, value: Any) -> None:
        if self.choices and isinstance(value, str) and value not in self.choices:
            raise RecipeError(
                f"{self.name}: invalid choice: {value!r}{nearest(str(value), self.choices, '')}; "
                f"one of {', '.join(self.choices)}"
            )
        if isinstance(value, int | float) and not isinstance(value, bool):
            for fits, words, names in LIMITS:
                if self.name in names.split() and not fits(value):
                    raise RecipeError(f"{self.name}: {words} expected, found {value}")
        if self.name in REFUSED and value != self.default:
            raise RecipeError(f"{self.name}: {REFUSED[self.name]}")
        if self.name in PRESET and value not in PRESET[self.name][0]:
            raise RecipeError(f"{self.name}={value}: {PRESET[self.name][1]}")

    def _seen(self, value: Any) -> str:
        return "a secret" if is_secret(self.name) else repr(value)


# What plug-ins add to the choices of a setting, and what the help of one names.
ADDED_CHOICES: dict[str, list[str]] = {"include_num_input_tokens_seen": ["all", "non_padding", "no"]}


def settings_of(stages: Mapping[str, type]) -> dict[str, Setting]:
    """Every field of the stages' dataclasses as a setting, by name."""
    found = {}
    for stage, kind in stages.items():
        hints = get_type_hints(kind)
        for field in (field for field in fields(kind) if field.init):
            hint = hints[field.name]
            parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
            names = [item.value for part in parts if isinstance(part, type) and issubclass(part, Enum) for item in part]
            names += [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
            default = field.default if field.default_factory is MISSING else field.default_factory()
            found[field.name] = Setting(
                name=field.name,
                stage=stage,
                kinds=_kinds(parts),
                nullable=type(None) in parts,
                choices=(*(field.metadata.get("choices") or names), *ADDED_CHOICES.get(field.name, ())),
                default=_plain(default),
                help=" ".join((OURS.get(field.name) or field.metadata.get("help", "")).replace("%%", "%").split()),
            )
    return found


def _kinds(parts: Sequence[Any]) -> tuple[type, ...]:
    kinds = set()
    for part in parts:
        origin = get_origin(part)
        if origin is Literal:
            kinds |= {type(value) for value in get_args(part)}
        elif part is not type(None):
            kinds.add(str if isinstance(part, type) and issubclass(part, Enum) else origin or part)
    if dict in kinds:
        kinds.discard(str)  # text is JSON
    order = (dict, list, bool, int, float, str)
    return tuple(sorted(kinds, key=lambda kind: order.index(kind) if kind in order else -1))


def _plain(value: Any) -> Any:
    """Paths, enums, dates, dtypes, NumPy's numbers, tuples and sets as what YAML would have said."""
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, date):  # YAML reads 2026-11-25 so
        return value.isoformat()
    if type(value).__name__ == "dtype":  # torch's, which need not be imported for this
        return str(value).removeprefix("torch.")
    if hasattr(value, "dtype") and hasattr(value, "item") and not getattr(value, "shape", ()):
        return value.item()
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    return value


def _bool(value: Any, words: Sequence[str]) -> bool:
    known = {"true": True, "yes": True, "t": True, "y": True, "1": True}
    known |= {"false": False, "no": False, "f": False, "n": False, "0": False}
    if isinstance(value, bool | int | str) and str(value).lower() in (words or known):
        return known[str(value).lower()]
    raise ValueError(f"true or false expected, found {value!r}")


def _number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{kind.__name__} expected, found {value!r}")
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        raise ValueError(f"invalid {kind.__name__} value: {value!r}") from None
    if not math.isfinite(number) or (isinstance(value, float) and number != value):
        raise ValueError(f"{kind.__name__} expected, found {value!r}")
    return number


OF_THE_MACHINE = ("bf16", "use_cpu", "report_to", "ddp_backend")  # settings whose default depends on it


def settings_page(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """`docs/settings.md`: what `ma_sft.recipe.all_settings` gives, as one table a stage."""
    lines = [
        "# Settings",
        "",
        "Every setting is a keyword of `Recipe(...)`, a YAML key and a flag. Later wins: TRL's default, ours, the",
        "recipe, `--config` files, flags. Dashes do for underscores. `ma-sft settings WORD` shows those with a word.",
        "",
        "**ours** is done by ma_sft; **trainer** is passed on to TRL, transformers or PEFT as it is; **preset** is",
        "decided by ma_sft, and a contrary value is refused; **refused** takes its default alone.",
    ]
    for stage in dict.fromkeys(about["stage"] for about in settings.values()):
        lines += ["", f"## {stage}", "", "| setting | class | default | what it does |", "| --- | --- | --- | --- |"]
        for name, about in settings.items():
            if about["stage"] == stage:
                help = about["help"].replace("|", "\\|").replace("<", "&lt;")
                default = "by machine" if name in OF_THE_MACHINE else f"`{json.dumps(about['default'])}`"
                lines.append(f"| `{name}` | {about['class']} | {default} | {help} |")
    return "\n".join(lines) + "\n"


def is_secret(name: str) -> bool:
    """Whether a setting holds what nobody else may read. (The tokenizer's tokens are no secret.)"""
    return bool(re.search(r"(token|key|secret|password)$", name.lower())) and name not in ("eos_token", "pad_token")


def shown(value: Any) -> Any:
    """Settings as they may be shown and written down: without secrets at any depth, in what JSON can hold."""
    if isinstance(value, Mapping) and not hasattr(value, "num_rows"):
        return {str(key): shown(item) for key, item in value.items() if not is_secret(str(key))}
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    if hasattr(value, "num_rows"):  # rows that were handed over
        return f"{type(value).__name__} with {value.num_rows} rows"
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def shown_command(args: Sequence[str]) -> list[str]:
    """A command line as it may be shown: three stars for each secret."""
    hidden, secret = [], False
    for arg in args:
        flag, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
        if secret or (equals and is_secret(flag.lstrip("-").replace("-", "_"))):
            value = "***"
        elif value.startswith("{"):  # a mapping in JSON
            try:
                value = json.dumps(shown(json.loads(value)))
            except ValueError:
                value = "***"
        secret = bool(flag) and not equals and is_secret(flag.lstrip("-").replace("-", "_"))
        hidden.append(f"{flag}{equals}{value}")
    return hidden


def nearest(key: str, known: Any, otherwise: str = "; `ma-sft settings` lists them all") -> str:
    """A question for what may have been meant by `key`, to end an error with."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else otherwise


class Chosen:
    """What the recipe, YAML files and flags say, as one mapping: later layers win."""

    def __init__(self, known: Mapping[str, Setting]) -> None:
        self.known = known
        self.values: dict[str, Any] = {}
        self.layer: dict[str, int] = {}
        self.flags = 0  # the last layer

    def add(self, layer: int, settings: Mapping[str, Any]) -> None:
        """Put a layer on top.

        Raises:
            RecipeError: an unknown name (with the nearest right one), a wrong value, one thing said in two ways.
        """
        self.flags = layer
        for name, value in settings.items():
            if name == "dataset_name" and not isinstance(value, str | PathLike | None):
                name, value = "datasets", value  # rows that are handed over, or a mapping
            if name not in self.known:
                raise RecipeError(f"unknown setting {name!r}{nearest(name, self.known)}")
            taken = self.known[name].take(value)
            for pair in (pair for pair in RIVALS if name in pair and _given(taken)):
                other = pair[pair[0] == name]
                if self.layer.get(other, layer) < layer:
                    self.values.pop(other, None)
                    self.layer[other] = layer  # where it was turned off
            if name == "model_init_kwargs":
                taken = self._without_own(layer, taken or {}, settings)
            self.values[name], self.layer[name] = taken, layer

    def _without_own(self, layer: int, kwargs: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """What is left of `model_init_kwargs` when each that is a setting, too, has become that setting."""
        own = {INIT_KWARGS[key]: value for key, value in kwargs.items() if key in INIT_KWARGS}
        for key in own.keys() & settings.keys():
            raise RecipeError(f"{key} and model_init_kwargs say the same in two ways; leave one of them out")
        self.add(layer, own)
        return {key: value for key, value in kwargs.items() if key not in INIT_KWARGS} or None

    def refuse_what_does_nothing(self, values: Mapping[str, Any]) -> None:
        """Compare what was chosen with all settings' values.

        A setting that a later layer made useless (`--use_peft false` on an adapter's recipe) is left alone.

        Raises:
            RecipeError: a setting that would do nothing, or two that say one thing.
        """
        for pair in RIVALS[:3]:
            if all(_given(values.get(name)) for name in pair):
                raise RecipeError(f"{pair[0]} and {pair[1]} say the same in two ways; leave one of them out")
        for need in NEEDS:
            if need.holds(values):
                continue
            switched = max((self.layer.get(name, -1) for name in need.switches.split()), default=-1)
            for name in need.names.split():
                told = name in self.values and self.layer[name] >= switched
                if told and _given(self.values[name]) and self.values[name] not in (self.known[name].default, "no"):
                    raise RecipeError(f"{name} {need.why}, or remove {name}")


def _given(value: Any) -> bool:
    return value is not None and value is not False and not (isinstance(value, int | list | dict) and not value)
