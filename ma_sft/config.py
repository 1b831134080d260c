"""A recipe and its settings: one name as keyword, YAML key and flag; each does what it says, or is refused in one line.

The settings are those of TRL's `SFTConfig` and `ModelConfig` plus our dataclasses below, one a stage: who knows
`trl sft` knows our flags. Later wins: TRL's default, ours, the recipe, `--config file.yaml`, flags. `RULES` is the one
table of what goes together; a field that a new TRL brings is passed on by itself.
"""

import argparse
import copy
import difflib
import json
import math
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import date, datetime
from enum import Enum
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from ma_sft.errors import RecipeError, failed_in, one_line
from ma_sft.utils import cache_dir, not_there, parse_yaml, read_json, write_whole
from ma_sft.version import __version__

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

Values = Mapping[str, Any]


def setting(default: Any, help: str, choices: Sequence[str] = ()) -> Any:
    """A dataclass field with its default, its text in `ma-sft settings` and, if it is not free, its choices."""
    metadata = {"help": help, **({"choices": list(choices)} if choices else {})}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RowsConfig:
    """Where the rows come from, and which of them are used."""

    dataset_name: str | None = setting(None, "One source: a hub id, a file, a glob, or a folder. See docs/formats.md.")
    datasets: list[str] = setting(
        [], "Several sources: each a path or hub id, or a mapping with path, format, weight, ..."
    )
    eval_dataset: list[str] = setting([], "Held-out rows: sources like those of datasets, measured one by one.")
    test_size: float | None = setting(
        None, "Hold out this share (below 1) or number of rows; duplicates stay together."
    )
    test_near_duplicates: float | None = setting(
        None, "Similarity from which near duplicates stay on one side of the split."
    )
    filters: dict[str, Any] | str | None = setting(
        None, "Rows to leave out, e.g. '{\"exact_duplicates\": true}'. See docs/formats.md."
    )
    stopping_strategy: str = setting(
        "first_exhausted",
        "For sources with weights: stop when one runs dry, repeat its rows until all were seen, or go on without it.",
        ["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"],
    )
    dataset_streaming: bool = setting(False, "Read rows while training; needs max_steps.")
    dataset_config: str | None = setting(None, "Configuration of a hub data set, for sources that name none.")
    dataset_train_split: str = setting("train", "Split of a hub data set to train on.")
    dataset_test_split: str = setting("test", "Split of eval_dataset, if it has several.")
    dataset_format: str | None = setting(None, "Format of the rows, where detection by columns is not wanted.")
    on_error: str = setting("raise", "What to do with a broken row: stop, or count and skip it.", ["raise", "skip"])
    system_prompt: str | None = setting(None, "System message for conversations that have none.")
    merge_turns: bool = setting(False, "Join neighbouring turns of one role, which most chat templates refuse.")


@dataclass
class LabelsConfig:
    """How rows become token ids and labels, and that these are proven."""

    template: str | None = setting(
        None, "Chat template: the tokenizer's own (default), chatml, question-answer, role-tags, a .jinja file."
    )
    template_kwargs: dict[str, Any] | str | None = setting(
        None, "Variables for the chat template, e.g. '{\"enable_thinking\": false}'."
    )
    template_now: str | None = setting(
        None,
        "ISO date or date-time that a chat template which reads the clock takes for now; by default the day on which "
        "the run was first prepared.",
    )
    train_on: str = setting("all", "Train every assistant turn, or the last one.", ["all", "last"])
    history: str = setting(
        "split",
        "A turn that the template rewrites in history is trained in a sequence of its own, or masked.",
        ["split", "mask"],
    )
    response_template: str | None = setting(
        None, "Find labels by this text with DataCollatorForCompletionOnlyLM; needs formatting_func."
    )
    instruction_template: str | None = setting(
        None, "Text that begins a user turn, for multi-turn rows with response_template."
    )
    formatting_func: str | None = setting(
        None, "Function row -> text for the classic path: module:function, or question-answer."
    )
    overflow: str | None = setting(
        None,
        "A sequence longer than max_length: cut its end (default; bfd_split and wrapped split) or its beginning "
        "(keep_end), split it, drop it, or keep_answer: the oldest turns go first.",
        ["cut", "split", "drop", "keep_answer", "keep_end"],
    )
    add_eos: bool = setting(
        False, "Put the EOS token behind each turn, for a chat template that writes no end of turn."
    )
    check: bool = setting(True, "Prove the labels before training; wrong ones stop the run.")

    def __post_init__(self) -> None:
        try:
            datetime.fromisoformat(self.template_now or "2026-11-25")
        except ValueError:
            found = f"found {self.template_now!r}"
            raise RecipeError(f"template_now: a date as 2026-11-25 or 2026-11-25T09:30 expected, {found}") from None


@dataclass
class AdapterConfig:
    """What of the model is trained, beside the `lora_*` settings of TRL's `ModelConfig`."""

    adapter_name_or_path: str | None = setting(
        None, "Go on with this adapter (a run's folder, or an adapter's); its own settings, no lora_* ones."
    )
    lora_preset: str = setting(
        "all-linear",
        "Modules that LoRA adapts, unless lora_target_modules is set.",
        ["mini", "attention", "all-linear"],
    )
    lora_config: dict[str, Any] | str | None = setting(
        None, 'Any field of peft.LoraConfig by name, e.g. \'{"init_lora_weights": "pissa"}\'.'
    )
    loraplus_lr_ratio: float | None = setting(None, "LoRA+: the learning rate of every B is this many times that of A.")
    freeze: list[str] = setting(
        [], "Full fine-tuning: parameters whose name one of these regular expressions finds stay as is."
    )
    full_learning_rate: float | None = setting(
        None, "Learning rate for full fine-tuning, where the recipe's learning_rate is meant for adapters."
    )
    merge: bool = setting(True, "Merge the adapter into the base model when training is done.")


@dataclass
class ExamConfig:
    """What held-out rows are asked before and after training."""

    generate_eval: int = setting(0, "Held-out answers to generate before and after training (-1: all).")
    metric: str = setting(
        "exact-match",
        "How answers are graded: exact-match, or module:function, (answer, reference) -> a number or bool.",
    )
    max_new_tokens: int = setting(128, "Longest answer to generate, in tokens.")


@dataclass
class RunConfig:
    """The run and its folder."""

    name: str | None = setting(None, "Name of the run; its folder is runs/<name>.")
    overwrite_output_dir: bool = setting(False, "Delete what an earlier run left in the output folder.")
    resume: str = setting(
        "auto",
        "Go on with an unfinished run of the same recipe from its newest whole checkpoint, or start anew.",
        ["auto", "never"],
    )
    rehearse: bool = setting(True, "Try the whole run on a tiny twin of the model before a row is read.")


STAGES = {"rows": RowsConfig, "labels": LabelsConfig, "adapter": AdapterConfig, "exam": ExamConfig, "run": RunConfig}

# Fields of TRL's that ma_sft does something of its own with, and what
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
    "dataset_num_proc": "Processes that convert, tokenise and verify; all cores by default if there are many rows.",
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


@dataclass(frozen=True)
class Fixed:
    """A setting of TRL's that ma_sft decides: a contrary value is refused, the first is the default."""

    names: str
    accepted: tuple[Any, ...]  # none: only TRL's default
    words: str


@dataclass(frozen=True)
class Excludes:
    """Two ways to say one thing: a later layer replaces the other way, in one layer they are refused."""

    names: str
    words: str = "say the same in two ways; leave one of them out"


@dataclass(frozen=True)
class Needs:
    """Settings that would do nothing unless one of `switches` is on, or, where that is not all, `holds` is true.

    One that a later layer made useless (`--use_peft false` on an adapter's recipe) is left alone.
    """

    names: str
    switches: str
    words: str = ""
    condition: Callable[[Values], bool] | None = None

    def holds(self, values: Values) -> bool:
        return self.condition(values) if self.condition else any(is_on(values[name]) for name in self.switches.split())

    @property
    def reason(self) -> str:
        return self.words or f"does nothing without {' or '.join(self.switches.split())}; set it"


# The one table of what goes together. Of TRL's settings only those stand here that would contradict what ma_sft does,
# or would train something else without a word.
RULES: tuple[Fixed | Excludes | Needs, ...] = (
    Fixed(
        "assistant_only_loss",
        (True, False),
        "what the assistant says is trained either way; to train on the whole row set completion_only_loss=false",
    ),
    Fixed("shuffle_dataset", (True, False), "rows are always shuffled, by seed"),
    Fixed("remove_unused_columns", (False, True), "the trainer gets token ids and labels alone"),
    Fixed(
        "dataset_kwargs", (None, {}, {"skip_prepare_dataset": True}), "rows are prepared before the trainer sees them"
    ),
    Fixed("do_train", (True, False), "ma-sft train always trains"),
    Fixed("do_eval", (False, True), "held-out rows are always measured; while training: set eval_strategy"),
    Fixed("lora_task_type", ("CAUSAL_LM",), "ma_sft trains causal language models alone"),
    Fixed("hub_strategy", ("end", "every_save"), "push_to_hub uploads once, at the end"),
    Fixed("hub_always_push", (), "push_to_hub uploads once, at the end; leave it out"),
    Fixed("do_predict", (), "nothing is predicted; held-out answers are written with generate_eval"),
    Fixed("enable_jit_checkpoint", (), "a run that is asked to stop saves by itself; leave it out"),
    Fixed("local_rank", (), "the launcher says it; leave it out"),
    Excludes("dataset_name datasets"),
    Excludes("eval_dataset test_size"),
    Excludes("template chat_template_path"),
    Excludes("bf16 fp16"),
    Excludes("load_in_4bit load_in_8bit"),
    Excludes("activation_checkpointing gradient_checkpointing"),
    Excludes("activation_checkpointing_kwargs gradient_checkpointing_kwargs"),
    Needs(
        "load_in_4bit load_in_8bit adapter_name_or_path loraplus_lr_ratio lora_preset lora_config lora_r lora_alpha "
        "lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save use_rslora use_dora",
        "use_peft",
        "trains an adapter and use_peft is false; set use_peft",
    ),
    Needs("use_bnb_nested_quant", "load_in_4bit"),
    Needs("generate_eval eval_strategy eval_on_start eval_packing load_best_model_at_end", "eval_dataset test_size"),
    Needs("metric max_new_tokens", "generate_eval"),
    Needs("test_near_duplicates", "test_size"),
    Needs("dataset_test_split", "eval_dataset"),
    Needs(
        "model_revision",
        "model_name_or_path",
        "is for a model on a hub, and model_name_or_path is a folder; give its id",
        lambda values: not Path(values["model_name_or_path"]).expanduser().is_dir(),
    ),
    Needs(
        "stopping_strategy",
        "datasets",
        "is for sources with weights; give each of datasets a weight",
        lambda values: any(isinstance(source, dict) and "weight" in source for source in values["datasets"]),
    ),
    Needs("packing", "max_length", "needs max_length, the length of a pack in tokens; set it"),
    Needs(
        "dataset_streaming",
        "max_steps",
        "needs max_steps, as a stream's length is not known; set it",
        lambda values: values["max_steps"] > 0,
    ),
    Needs("packing_strategy", "packing eval_packing"),
    Needs("overflow", "max_length"),
    Needs(
        "truncation_mode",
        "packing packing_strategy overflow",
        "says what is left of a row that is cut, and here overflow or packing_strategy does; set overflow",
        lambda values: (
            not (values["packing"] and values["packing_strategy"] != "bfd")
            and values["overflow"] in (None, values["truncation_mode"])
        ),
    ),
    Needs(
        "response_template",
        "formatting_func",
        "finds labels in the text of formatting_func; set it (a chat template needs no response_template)",
    ),
    Needs("instruction_template", "response_template"),
    Needs(
        "system_prompt merge_turns train_on history template_kwargs template_now add_eos dataset_format on_error "
        "dataset_text_field",
        "formatting_func",
        "is for conversations, and formatting_func makes the whole text; leave one of them out",
        lambda values: not values["formatting_func"],
    ),
    Needs(
        "completion_only_loss",
        "formatting_func",
        "needs response_template, which finds what is trained in the text of formatting_func; set it",
        lambda values: not values["formatting_func"] or values["response_template"] is not None,
    ),
    Needs(
        "assistant_only_loss response_template",
        "completion_only_loss",
        "trains a part of each row, and completion_only_loss=false all of it; leave one of them out",
        lambda values: values["completion_only_loss"] is not False,
    ),
    Needs(
        "label_smoothing_factor",
        "loss_type",
        "smooths the labels of loss_type=nll, and another loss leaves it unused; leave one of them out",
        lambda values: values["loss_type"] == "nll",
    ),
    Needs(
        "router_aux_loss_coef",
        "label_smoothing_factor",
        "is left out of the loss where label_smoothing_factor is set; leave one of them out",
        lambda values: not (values["router_aux_loss_coef"] and values["label_smoothing_factor"]),
    ),
    Needs("hub_model_id hub_private_repo hub_revision", "push_to_hub"),
    Needs(
        "warmup_steps",
        "lr_scheduler_type",
        "does nothing with lr_scheduler_type=constant; set constant_with_warmup",
        lambda values: values["lr_scheduler_type"] != "constant",
    ),
)
FIXED = {rule.names: rule for rule in RULES if isinstance(rule, Fixed)}
EXCLUSIVE = [tuple(rule.names.split()) for rule in RULES if isinstance(rule, Excludes)]

LIMITS: tuple[tuple[Callable[[float], bool], str, str], ...] = (
    (
        lambda value: value > 0,
        "a number above 0",
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_train_epochs "
        "max_length max_new_tokens lora_r lora_alpha save_steps eval_steps test_size loraplus_lr_ratio "
        "save_total_limit dataset_num_proc",
    ),
    (lambda value: value >= 0, "0 or more", "learning_rate full_learning_rate weight_decay max_grad_norm warmup_steps"),
    (lambda value: 0 <= value < 2**32, "a whole number from 0 to below 2**32", "seed data_seed"),
    (lambda value: value == -1 or value >= 1, "a whole number from 1, or -1 for no limit", "max_steps"),
    (lambda value: value >= -1, "a number of rows, or -1 for all", "generate_eval"),
    (lambda value: 0 <= value < 1, "a number from 0 to below 1", "lora_dropout label_smoothing_factor"),
    (lambda value: 0 < value <= 1, "a number above 0 and up to 1", "test_near_duplicates"),
)
PATHS = set(
    "dataset_name datasets eval_dataset model_name_or_path output_dir template chat_template_path deepspeed "
    "fsdp_config adapter_name_or_path resume_from_checkpoint accelerator_config".split()
)
CONFIG_FILES = {"deepspeed", "fsdp_config", "accelerator_config"}  # a mapping, its JSON, or the path of a file
OF_THE_MACHINE = ("bf16", "use_cpu", "report_to", "ddp_backend")  # settings whose default depends on it

# What `from_pretrained` takes of a model and a setting says of all that is loaded
INIT_KWARGS = {
    **{"dtype": "dtype", "torch_dtype": "dtype", "attn_implementation": "attn_implementation"},
    **{"revision": "model_revision", "trust_remote_code": "trust_remote_code"},
}
# What plug-ins add to the choices of a setting
ADDED_CHOICES: dict[str, list[str]] = {"include_num_input_tokens_seen": ["all", "non_padding", "no"]}
# What other tools call a setting that no likeness of letters leads to
OTHER_NAMES = {
    **dict.fromkeys(("lr", "lora_learning_rate"), "learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs"), "num_train_epochs"),
    **dict.fromkeys(
        ("batch_size", "per_device_batch_size", "micro_batch_size", "train_batch_size"), "per_device_train_batch_size"
    ),
    **dict.fromkeys(("max_seq_length", "seq_length", "sequence_len", "cutoff_len"), "max_length"),
    **dict.fromkeys(("model", "base_model", "model_name"), "model_name_or_path"),
    **dict.fromkeys(("data", "dataset", "train_file"), "dataset_name"),
    **{"grad_accum": "gradient_accumulation_steps", "warmup_ratio": "warmup_steps", "lora_rank": "lora_r"},
}


def is_on(value: Any) -> bool:
    """Whether a value sets something: neither null, false, 0, nor empty."""
    return value is not None and value is not False and not (isinstance(value, int | list | dict) and not value)


@dataclass(frozen=True)
class Setting:
    """One setting: the types it takes, the stricter first (text is anything), its choices and its own default."""

    name: str
    stage: str
    kinds: tuple[str, ...]
    nullable: bool
    choices: tuple[str, ...]
    default: Any
    help: str

    @property
    def kind(self) -> str:
        """Its class: done by ma_sft (`ours`), passed on (`trainer`), decided (`preset`), or its default alone."""
        if rule := FIXED.get(self.name):
            return "preset" if rule.accepted else "refused"
        return "ours" if self.stage not in ("training", "model") or self.name in OURS else "trainer"

    def take(self, value: Any) -> Any:
        """A value from Python, YAML or the command line as this setting's own type.

        Raises:
            RecipeError: null where none is meant, another type, no choice, out of range, broken JSON.
        """
        value = _plain(value)
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and "str" not in self.kinds):
            if not self.nullable:
                raise RecipeError(f"{self.name}: a value is missing (null); give one, or leave the line out")
            return None
        if value is False and "no" in self.choices:  # YAML reads a bare `no` so
            value = "no"
        error: Exception | None = None
        for kind in self.kinds:
            try:
                taken = self._take_as(kind, value)
                break
            except (ValueError, TypeError) as failure:
                error = failure
        else:
            raise RecipeError(f"{self.name}: {error}")
        self._check(taken)
        return taken

    def _take_as(self, kind: str, value: Any) -> Any:
        shown_value = "a secret" if is_secret(self.name) else repr(value)
        if kind == "list":
            if isinstance(value, str) and "str" in self.kinds:
                raise ValueError("text is taken as it is")
            items = value if isinstance(value, list) else [value]
            return [self._path(dict(item) if type(item) is dict else item) for item in items]
        if kind == "dict":
            return self._mapping(value, shown_value)
        if kind == "str":
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError(f"str expected, found {shown_value}")
            if "int" in self.kinds and value != self.default:  # a word that stands for a number
                raise ValueError(f"a whole number or {self.default!r} expected, found {value!r}")
            return self._path(str(value))
        if kind == "bool":
            return _bool(value, strict="str" in self.kinds)
        if kind in ("int", "float"):
            return _number({"int": int, "float": float}[kind], value)
        if kind not in (base.__name__ for base in type(value).__mro__):
            raise ValueError(f"{kind} expected, found {shown_value}")
        return value

    def _mapping(self, value: Any, shown_value: str) -> Any:
        if isinstance(value, dict):
            return copy.deepcopy(value)
        if isinstance(value, str) and self.name in CONFIG_FILES and not value.lstrip().startswith("{"):
            path = self._path(value)
            read_json(Path(path))
            return path
        with suppress(TypeError, ValueError):
            if isinstance(parsed := json.loads(value), dict):
                return parsed
        raise ValueError(f"a JSON object expected, found {shown_value}")

    def _path(self, value: Any) -> Any:
        """`~` is the home of the user where a path is meant."""
        if self.name not in PATHS:
            return value
        if isinstance(value, dict) and isinstance(value.get("path"), str | PathLike):
            return {**value, "path": self._path(fspath(value["path"]))}
        return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value

    def _check(self, value: Any) -> None:
        choices = dict.fromkeys((*self.choices, *ADDED_CHOICES.get(self.name, ())))
        if choices and isinstance(value, str) and value not in choices:
            near = nearest(value, choices, "")
            raise RecipeError(f"{self.name}: invalid choice: {value!r}{near}; one of {', '.join(choices)}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            for fits, words, names in LIMITS:
                if self.name in names.split() and not fits(value):
                    raise RecipeError(f"{self.name}: {words} expected, found {value}")
        rule = FIXED.get(self.name)
        if rule and value not in (rule.accepted or (self.default,)):
            raise RecipeError(f"{self.name}{f'={value}' if rule.accepted else ''}: {rule.words}")


def settings_of(stages: Mapping[str, type]) -> dict[str, Setting]:
    """Every field of the stages' dataclasses as a setting, by name."""
    found = {}
    for stage, kind in stages.items():
        hints = get_type_hints(kind)
        for item in (item for item in fields(kind) if item.init):
            hint = hints[item.name]
            parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
            words = [entry.value for part in parts if _is_enum(part) for entry in part]
            words += [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
            default = item.default if item.default_factory is MISSING else item.default_factory()
            found[item.name] = Setting(
                name=item.name,
                stage=stage,
                kinds=_kinds(parts),
                nullable=type(None) in parts,
                choices=(*(item.metadata.get("choices") or words), *ADDED_CHOICES.get(item.name, ())),
                default=_plain(default),
                help=" ".join((OURS.get(item.name) or item.metadata.get("help", "")).replace("%%", "%").split()),
            )
    return found


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _kinds(parts: Sequence[Any]) -> tuple[str, ...]:
    kinds = set()
    for part in parts:
        if get_origin(part) is Literal:
            kinds |= {type(value).__name__ for value in get_args(part)}
        elif part is not type(None):
            kinds.add("str" if _is_enum(part) else getattr(get_origin(part) or part, "__name__", str(part)))
    if "dict" in kinds:
        kinds.discard("str")  # text is JSON
    order = ("dict", "list", "bool", "int", "float", "str")
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


def _bool(value: Any, *, strict: bool) -> bool:
    true, false = (
        (("true",), ("false",)) if strict else (("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0"))
    )
    if isinstance(value, bool | int | str) and (word := str(value).lower()) in (*true, *false):
        return word in true
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


def _stages() -> dict[str, type]:
    from trl import ModelConfig, SFTConfig

    return {**STAGES, "training": SFTConfig, "model": ModelConfig}


@cache
def known_settings() -> dict[str, Setting]:
    """Every setting of a recipe by name, from a table in the cache folder: making it imports torch.

    The table is made anew where a version of what it is made from is another, or where it cannot be read.
    """
    made_from = {name: version(name) for name in ("trl", "transformers")}
    made_from |= {"ma_sft": __version__, "config.py": str(Path(__file__).stat().st_mtime_ns)}
    path = cache_dir() / f"settings-{made_from['trl']}-{made_from['transformers']}-{__version__}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["made_from"] == made_from:
            tuples = [{**row, "kinds": tuple(row["kinds"]), "choices": tuple(row["choices"])} for row in kept["rows"]]
            return {row["name"]: Setting(**row) for row in tuples}
    found = settings_of(_stages())
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"made_from": made_from, "rows": [asdict(row) for row in found.values()]}))
    return found


def all_settings() -> dict[str, dict[str, Any]]:
    """Every setting of a recipe: name -> `stage`, `class`, `help`, `default` (null: by machine), and `choices`."""
    known = known_settings()
    defaults = with_defaults(Overrides(known)) | dict.fromkeys(OF_THE_MACHINE)
    return {
        name: {
            "stage": what.stage,
            "class": what.kind,
            "help": what.help,
            "default": defaults.get(name, what.default),
            "choices": list(what.choices) or None,
        }
        for name, what in known.items()
    }


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a YAML recipe, for editors."""
    types_of = {"dict": "object", "list": "array", "bool": "boolean", "int": "integer", "float": "number"}
    properties: dict[str, Any] = {"allow_code": False}
    for name, about in all_settings().items():
        what = known_settings()[name]
        kinds = [types_of.get(kind, "string") for kind in what.kinds]
        kinds += ["string"] if {"dict", "list"} & set(what.kinds) else []  # JSON, or one item
        kinds += ["object"] if name == "dataset_name" else []
        kinds += ["null"] if what.nullable else []
        entry = {"description": what.help, "type": list(dict.fromkeys(kinds)), "default": about["default"]}
        if what.choices and set(what.kinds) == {"str"}:
            entry["enum"] = [*what.choices, *([None] if what.nullable else [])]
        properties[name] = entry
    draft = "http://json-schema.org/draft-07/schema#"
    return {"$schema": draft, "title": "A recipe of ma_sft", "type": "object", "additionalProperties": False,
            "properties": properties}  # fmt: skip


class Overrides:
    """What the recipe, YAML files and flags set, as one mapping: later layers win."""

    def __init__(self, known: Mapping[str, Setting]) -> None:
        self.known = known
        self.values: dict[str, Any] = {}
        self.layer: dict[str, int] = {}
        self.last_layer = 0

    def add(self, layer: int, settings: Values) -> None:
        """Put a layer on top.

        Raises:
            RecipeError: an unknown name (with the nearest right one), a wrong value, one thing said in two ways.
        """
        self.last_layer = layer
        for name, value in settings.items():
            if name == "dataset_name" and not isinstance(value, str | PathLike | None):
                name, value = "datasets", value  # rows that are handed over, or a mapping
            if name not in self.known:
                raise RecipeError(f"unknown setting {name!r}{nearest(name, self.known)}")
            taken = self.known[name].take(value)
            for pair in (pair for pair in EXCLUSIVE if name in pair and is_on(taken)):
                other = pair[pair[0] == name]
                if self.layer.get(other, layer) < layer:
                    self.values.pop(other, None)
                    self.layer[other] = layer  # where it was turned off
            if name == "model_init_kwargs":
                own = {INIT_KWARGS[key]: value for key, value in (taken or {}).items() if key in INIT_KWARGS}
                for key in own.keys() & settings.keys():
                    raise RecipeError(f"{key} and model_init_kwargs say the same in two ways; leave one of them out")
                self.add(layer, own)
                taken = {key: value for key, value in (taken or {}).items() if key not in INIT_KWARGS} or None
            self.values[name], self.layer[name] = taken, layer

    def check_rules(self, values: Values) -> None:
        """Hold what was set, and all settings' values, against `RULES`.

        Raises:
            RecipeError: a setting that would do nothing, or two that say one thing.
        """
        for rule in RULES:
            if isinstance(rule, Excludes) and all(is_on(self.values.get(name)) for name in rule.names.split()):
                raise RecipeError(f"{' and '.join(rule.names.split())} {rule.words}")
            if not isinstance(rule, Needs) or rule.holds(values):
                continue
            switched = max((self.layer.get(name, -1) for name in rule.switches.split()), default=-1)
            for name in rule.names.split():
                is_set = name in self.values and self.layer[name] >= switched
                if is_set and is_on(self.values[name]) and self.values[name] not in (self.known[name].default, "no"):
                    raise RecipeError(f"{name} {rule.reason}, or remove {name}")


def with_defaults(overrides: Overrides) -> dict[str, Any]:
    """What was set, over those of our defaults that differ from TRL's and do not depend on the machine.

    Where we have a default of our own, null stands for it.
    """
    given = overrides.values.get
    name = given("name") or "sft"
    no_folder = name in (".", "..") or "/" in name or "\\" in name or name != name.encode(errors="ignore").decode()
    if not given("output_dir") and no_folder:
        raise RecipeError(f"name: found {name!r}, no name of a folder in runs/; set output_dir for another place")
    lora, quantised = given("use_peft"), given("load_in_4bit") or given("load_in_8bit")
    ours: dict[str, Any] = {
        **{rule.names: rule.accepted[0] for rule in FIXED.values() if rule.accepted},
        "output_dir": f"runs/{name}",
        "run_name": name,
        "report_to": ["tensorboard"] if find_spec("tensorboard") else [],
        "bf16": None,
        "use_cpu": None,
        "ddp_backend": None,
        "dtype": "float32",
        "ddp_find_unused_parameters": False,  # every parameter takes part, and looking for others costs a pass
        "logging_nan_inf_filter": False,  # it would hide the steps that ruin a model
        # A tenth for full fine-tuning: https://thinkingmachines.ai/blog/lora
        "learning_rate": 2e-4 if lora else 2e-5,
        # QLoRA, https://arxiv.org/abs/2305.14314: double quantisation, 8-bit optimiser states that can leave the GPU
        **({"use_bnb_nested_quant": bool(given("load_in_4bit")), "optim": "paged_adamw_8bit"} if quantised else {}),
    }
    values = ours | {key: value for key, value in overrides.values.items() if value is not None or key not in ours}
    full = given("full_learning_rate")
    if full is not None and not lora and overrides.layer.get("learning_rate", 0) < overrides.last_layer:
        values["learning_rate"] = full
    return values


def _set_machine_defaults(values: dict[str, Any], dtype_is_set: bool) -> None:
    import torch

    from ma_sft.launcher import cpu_deepspeed, wants_gpu

    use_cpu = values["use_cpu"]
    if use_cpu is None:
        values["use_cpu"] = not torch.accelerator.is_available() and not wants_gpu()
    if values["bf16"] is None and not values.get("fp16"):
        if torch.cuda.is_available() and not use_cpu:
            values["bf16"] = torch.cuda.is_bf16_supported()
        else:  # transformers takes bf16 on a CPU only with use_cpu
            values["bf16"] = torch.cpu._is_avx512_bf16_supported() and not wants_gpu() and use_cpu is not False
    values["bf16"] = bool(values["bf16"])
    if values["ddp_backend"] is None and cpu_deepspeed():
        values["ddp_backend"] = "gloo"
    if values["bf16"] and values.get("use_peft") and not dtype_is_set:
        values["dtype"] = "bfloat16"  # the frozen base of an adapter needs no float32 master weights


@dataclass
class Settings:
    """A resolved recipe: the settings of each stage, TRL's own, and the values that were set by hand."""

    rows: RowsConfig
    labels: LabelsConfig
    adapter: AdapterConfig
    exam: ExamConfig
    run: RunConfig
    training: "SFTConfig"
    model: "ModelConfig"
    chosen: dict[str, Any]

    @property
    def quantised(self) -> bool:
        """Whether bitsandbytes holds the base's weights."""
        return bool(self.model.load_in_4bit or self.model.load_in_8bit)


class Recipe:
    """A fine-tune as data: `Recipe(model_name_or_path=..., dataset_name=..., packing=True, ...)`.

    Any field of our dataclasses, TRL's `SFTConfig` or TRL's `ModelConfig` is a keyword. Sources may be paths,
    mappings or `datasets` objects. Nothing heavy is imported and nothing is checked until `resolve`.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.file: Path | None = None  # where settings of others may come from: YAML or JSON

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """The recipe of a Python module (its variable `recipe`) or of a YAML file.

        Raises:
            RecipeError: no such file, no recipe in it.
        """
        path = Path(path)
        if not path.is_file():
            raise RecipeError(f"the recipe {not_there(path)}")
        if path.suffix in (".yaml", ".yml", ".json"):
            found = cls(**{"name": path.stem, **read_yaml(path)})
            found.file = path
            return found
        if path.suffix != ".py":
            raise RecipeError(f"{path} is no recipe; give a .py or .yaml file (ma-sft init --data {path} writes one)")
        import runpy

        try:
            recipe = runpy.run_path(str(path)).get("recipe")
        except (Exception, SystemExit) as error:
            raise RecipeError(failed_in(path, error)) from error
        if not isinstance(recipe, cls):
            raise RecipeError(f"{path} has no variable `recipe = Recipe(...)`")
        recipe.settings.setdefault("name", path.stem)
        return recipe

    def merge(self, args: Sequence[str] = ()) -> tuple[Overrides, dict[str, Any]]:
        """What the recipe, `--config` files and flags set, and that over our defaults; all that needs no torch.

        Raises:
            RecipeError: an unknown key (with the nearest right one), a wrong value, no model, no data, or code that a
                file names.
        """
        known = known_settings()
        flags = read_flags(args, known)
        files = {file: read_yaml(Path(file)) for file in flags.pop("config", [])}
        if flags.pop("allow_code", "false") != "true":
            for file, content in {**({str(self.file): self.settings} if self.file else {}), **files}.items():
                refuse_code(content, file)
        overrides = Overrides(known)
        for layer, settings in enumerate([self.settings, *files.values(), flags]):
            overrides.add(layer, settings)
        values = with_defaults(overrides)
        if not values.get("model_name_or_path"):
            raise RecipeError("no model: set model_name_or_path to a hub id, a folder, or 'demo'")
        if not (values.get("dataset_name") or values.get("datasets")):
            raise RecipeError("no data: set dataset_name (one source) or datasets (several)")
        return overrides, values

    def resolve(self, args: Sequence[str] = ()) -> Settings:
        """The settings of each stage, from the recipe, `--config` files and flags.

        Raises:
            RecipeError: as `merge`; a setting that would do nothing, or that needs a package which is not installed.
            RunError: the launcher asks for what this machine has not.
        """
        overrides, values = self.merge(args)
        from trl import TrlParser

        from ma_sft.launcher import check_installed, check_launch

        _set_machine_defaults(values, overrides.values.get("dtype") is not None)
        check_launch(values["use_cpu"])
        try:
            parsed = TrlParser(tuple(_stages().values())).parse_dict(values)
        except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
            raise RecipeError(one_line(error)) from error
        overrides.check_rules({name: what.default for name, what in overrides.known.items()} | values)
        settings = Settings(*parsed, chosen=overrides.values)  # type: ignore[misc]  # the unpacked ones are all but one
        _check_trackers(settings.training.report_to)
        check_installed(settings.training, settings.model, overrides.values)
        return settings


def read_flags(args: Sequence[str], known: Mapping[str, Setting]) -> dict[str, Any]:
    """Split a command line into settings: name -> text, or a list of texts. Dashes do for underscores; the last wins.

    Raises:
        RecipeError: an unknown flag (with the nearest right one), or one without its value.
    """

    class Flags(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise RecipeError(message.removeprefix("argument "))

    parser = Flags(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", action="append", metavar="FILE", help="a YAML file of settings")
    yes, how = "run Python files that a YAML or JSON file names", ("--allow_code", "--allow-code")
    parser.add_argument(*how, nargs="?", const="true", choices=("true", "false"), help=yes)
    for name, what in known.items():
        both = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        help = f"{what.help} (default: {what.default})".replace("%", "%%")
        if "bool" in what.kinds:
            parser.add_argument(*both, dest=name, nargs="?", const="true", help=help)
            no = (f"--no_{name}", f"--no-{name.replace('_', '-')}")
            parser.add_argument(*no, dest=name, action="store_const", const="false", help=argparse.SUPPRESS)
        else:
            parser.add_argument(*both, dest=name, nargs="+" if "list" in what.kinds else None, help=help)
    found, unknown = parser.parse_known_args(list(args))
    if unknown:
        flag = unknown[0].split("=")[0]
        raise RecipeError(f"unknown setting {flag!r}{nearest(flag.lstrip('-').replace('-', '_'), known)}")
    flags = vars(found)
    flags.pop("local_rank", None)  # the DeepSpeed launcher adds it
    for name, value in flags.items():
        if name in known and "str" in known[name].kinds and isinstance(value, list) and len(value) == 1:
            flags[name] = value[0]  # text may mean more than a list of it: optim_target_modules=all-linear
    return flags


def _check_trackers(report_to: Sequence[str]) -> None:
    """Stop where a tracker is not installed; keep wandb on this machine where the hub is not to be asked either."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from transformers.integrations.integration_utils import (
        get_available_reporting_integrations,
        get_reporting_integration_callbacks,
    )

    for name in report_to:
        try:
            get_reporting_integration_callbacks([name])
        except ValueError:
            raise RecipeError(f"report_to: {name!r} does not exist; tensorboard, trackio, wandb, none, ...") from None
        ours = name in ("tensorboard", "trackio", "wandb")
        if find_spec(name) is None if ours else name not in get_available_reporting_integrations():
            package = "'ma-sft[trackers]'" if ours else name
            raise RecipeError(f"report_to: {name} is not installed; pip install {package}, or --report_to none")
    if "wandb" in report_to and HF_HUB_OFFLINE:
        os.environ.setdefault("WANDB_MODE", "offline")


def refuse_code(said: Any, file: str | Path, name: str = "") -> None:
    """Stop where the settings of a file, which may be a stranger's, name a Python file that would run.

    Raises:
        RecipeError: the first such setting.
    """
    if isinstance(said, dict | list):
        for key, value in said.items() if isinstance(said, dict) else enumerate(said):
            refuse_code(value, file, f"{name}.{key}" if name else str(key))
    elif isinstance(said, str) and re.fullmatch(r".+\.py:\w+", said):
        raise RecipeError(f"{file}: {name} names code, {said}; read it, and if it may run pass --allow_code true")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of a YAML or JSON file.

    Raises:
        RecipeError: no such file, not valid, no mapping, or a key that is no text.
    """
    path = path.expanduser()
    if not path.is_file():
        raise RecipeError(f"the file {not_there(path)}")
    content = parse_yaml(path)
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold a mapping of settings, found {type(content).__name__}")
    for key in content:
        if not isinstance(key, str):  # YAML reads `on`, `1` and `null` as other than text
            raise RecipeError(f"{path}: {key!r} is no name of a setting; a name is text")
    return content


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
        named_secret = bool(flag) and is_secret(flag.lstrip("-").replace("-", "_"))
        if secret or (equals and named_secret):
            value = "***"
        elif value.startswith("{"):  # a mapping in JSON
            try:
                value = json.dumps(shown(json.loads(value)))
            except ValueError:
                value = "***"
        secret = named_secret and not equals
        hidden.append(f"{flag}{equals}{value}")
    return hidden


def nearest(key: str, known: Any, otherwise: str = "; `ma-sft settings` lists them all") -> str:
    """A question for what may have been meant by `key`, to end an error with."""
    if (meant := OTHER_NAMES.get(key)) in known:
        return f"; did you mean {meant!r}?"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else otherwise
