"""A recipe and its settings: one name as keyword, YAML key and flag; each does what it says, or is refused in one line.

The settings are those of TRL's `SFTConfig` and `ModelConfig` plus our dataclasses below, one a stage: who knows
`trl sft` knows our flags. Later wins: TRL's default, ours, the recipe, `--config file.yaml`, flags. `PRESETS`,
`EXCLUSIVE` and `NEEDS` say what goes together; a field that a new TRL brings is passed on by itself. Whatever is wrong
is a `RecipeError` of one line that names the setting, and its file and line.
"""

import argparse
import copy
import difflib
import json
import math
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import date, datetime
from enum import Enum
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from inspect import Parameter, Signature
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Union, get_args, get_origin, get_type_hints

from ma_sft.errors import RecipeError, failed_in, one_line
from ma_sft.utils import cache_dir, not_there, read_json, write_whole
from ma_sft.version import __version__

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

Values = Mapping[str, Any]
Keywords = ParamSpec("Keywords")
Mapped = dict[str, Any] | str  # a mapping, or its JSON


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its default and its text in `ma-sft settings`."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RowsConfig:
    """Where the rows come from, and which of them are used."""

    dataset_name: str | None = setting(None, "One source: a hub id, a file, a glob, or a folder. See docs/formats.md.")
    datasets: list[str] = setting([], "Several sources: each a path or hub id, or a mapping with path, weight, ...")
    eval_dataset: list[str] = setting([], "Held-out rows: sources like those of datasets, measured one by one.")
    test_size: float | None = setting(None, "Hold out this share (below 1) or number of rows, duplicates on one side.")
    test_near_duplicates: float | None = setting(None, "Similarity from which near duplicates stay on one side.")
    filters: Mapped | None = setting(None, "Rows to leave out, e.g. '{\"exact_duplicates\": true}'.")
    stopping_strategy: Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"] = setting(
        "first_exhausted", "Of weighted sources: stop when one runs dry, repeat its rows, or go on without it."
    )
    dataset_streaming: bool = setting(False, "Read rows while training; needs max_steps.")
    dataset_config: str | None = setting(None, "Configuration of a hub data set, for sources that name none.")
    dataset_train_split: str = setting("train", "Split of a hub data set to train on.")
    dataset_test_split: str = setting("test", "Split of eval_dataset, if it has several.")
    dataset_format: str | None = setting(None, "Format of the rows, where detection by columns is not wanted.")
    on_error: Literal["raise", "skip"] = setting("raise", "A broken row stops the run, or is counted and skipped.")
    system_prompt: str | None = setting(None, "System message for conversations that have none.")
    merge_turns: bool = setting(False, "Join neighbouring turns of one role, which most chat templates refuse.")


@dataclass(frozen=True)
class LabelsConfig:
    """How rows become token ids and labels, and that these are proven."""

    template: str | None = setting(None, "Chat template: chatml, question-answer, role-tags, a file; else the model's.")
    template_kwargs: Mapped | None = setting(None, "Variables of it, e.g. '{\"enable_thinking\": false}'.")
    template_now: str | None = setting(None, "Date or time (ISO) for a template's clock; else the first day.")
    train_on: Literal["all", "last"] = setting("all", "Train every assistant turn, or the last one.")
    history: Literal["split", "mask"] = setting(
        "split", "A turn that the template rewrites in history is trained in a sequence of its own, or masked."
    )
    response_template: str | None = setting(None, "Find labels by this text in the text of formatting_func.")
    instruction_template: str | None = setting(None, "Text that begins a user turn, for rows of several turns.")
    formatting_func: str | None = setting(None, "Row -> text, the classic path: module:function, or question-answer.")
    overflow: Literal["cut", "split", "drop", "keep_answer", "keep_end"] | None = setting(
        None, "A sequence beyond max_length: cut its end (default) or beginning, split or drop it, drop oldest turns."
    )
    add_eos: bool = setting(False, "Put the EOS token behind each turn, for a template that writes no end of turn.")
    check: bool = setting(True, "Prove the labels before training; wrong ones stop the run.")

    def __post_init__(self) -> None:
        try:
            datetime.fromisoformat(self.template_now or "2026-11-25")
        except ValueError:
            found = f"found {self.template_now!r}"
            raise RecipeError(f"template_now: a date as 2026-11-25 or 2026-11-25T09:30 expected, {found}") from None


@dataclass(frozen=True)
class AdapterConfig:
    """What of the model is trained, beside the `lora_*` settings of TRL's `ModelConfig`."""

    adapter_name_or_path: str | None = setting(None, "Go on with this adapter and its own settings, no lora_* ones.")
    lora_preset: Literal["mini", "attention", "all-linear"] = setting(
        "all-linear", "Modules that LoRA adapts, unless lora_target_modules is set."
    )
    lora_config: Mapped | None = setting(None, "Any field of peft.LoraConfig, e.g. '{\"r\": 8}'.")
    peft_config: Mapped | None = setting(None, 'Any method of PEFT in LoRA\'s place, e.g. \'{"peft_type": "LOHA"}\'.')
    quantization_config: Mapped | None = setting(
        None, 'Any quantisation of transformers for the base, e.g. \'{"quant_method": "torchao", ...}\'.'
    )
    loraplus_lr_ratio: float | None = setting(None, "LoRA+: the learning rate of every B is this many times that of A.")
    freeze: list[str] = setting([], "Parameters whose name one of these regular expressions finds are not trained.")
    full_learning_rate: float | None = setting(None, "Of full fine-tuning, where learning_rate is meant for adapters.")
    merge: bool = setting(True, "Merge the adapter into the base model when training is done.")


@dataclass(frozen=True)
class EvaluationConfig:
    """What held-out rows are asked before and after training."""

    generate_eval: int = setting(0, "Held-out answers to generate before and after training (-1: all).")
    metric: str = setting(
        "exact-match", "Grades answers: exact-match, or module:function (answer, reference) -> number."
    )
    max_new_tokens: int = setting(128, "Longest answer to generate, in tokens.")
    predict_with_generate: bool = setting(
        False, "Generate and grade them at each evaluation, too; always so where they choose the best model."
    )
    early_stopping_patience: int | None = setting(
        None, "Stop after so many evaluations without a better metric_for_best_model."
    )


@dataclass(frozen=True)
class RunConfig:
    """The run and its folder."""

    name: str | None = setting(None, "Name of the run; its folder is runs/<name>.")
    overwrite_output_dir: bool = setting(False, "Delete what an earlier run left in the output folder.")
    resume: Literal["auto", "never"] = setting("auto", "Go on from an unfinished run's last checkpoint, or start anew.")
    rehearse: bool = setting(True, "Try the whole run on a tiny twin of the model before a row is read.")


STAGES = {
    "rows": RowsConfig,
    "labels": LabelsConfig,
    "adapter": AdapterConfig,
    "evaluation": EvaluationConfig,
    "run": RunConfig,
}

if TYPE_CHECKING:

    @dataclass
    class RecipeSettings(RowsConfig, LabelsConfig, AdapterConfig, EvaluationConfig, RunConfig, SFTConfig, ModelConfig):  # type: ignore[misc]
        """Every setting of a recipe; `ma-sft settings` and docs/settings.md say what each does."""

        # What is taken beside what their fields hold
        dataset_name: Any = None
        datasets: Any = None
        eval_dataset: Any = None
        model_name_or_path: str | PathLike[str] | None = None
        output_dir: str | PathLike[str] | None = None
        template: str | PathLike[str] | None = None  # type: ignore[assignment]
        lora_target_modules: list[str] | str | None = None

else:
    RecipeSettings = dict[str, Any]  # nothing of TRL is imported for it

# Fields of TRL's that ma_sft does something of its own with, and what
OURS = {
    "output_dir": "Where the run is written; runs/NAME by default.",
    "learning_rate": "2e-4 for adapters, 2e-5 for all weights; see full_learning_rate.",
    "optim": "AdamW, with a quantised base in 8 bits and paged; muon; any other of transformers; or module:Class.",
    "fsdp": "true, with fsdp_config; or the launcher says it. Older spellings are taken, too.",
    "parallelism_config": "A mapping such as {cp_size: 2} for accelerate's ParallelismConfig; or the launcher says it.",
    "bf16": "On where this machine has it.",
    "logging_nan_inf_filter": "Off: it would hide the step that ruins a model, at which the run stops.",
    "disable_tqdm": "True: no bar. Else a terminal has one below the lines of the run.",
    "report_to": "TensorBoard where it is installed; another tracker that is missing is refused.",
    "save_strategy": "Checkpoints are marked as whole once they are.",
    "save_total_limit": "Counted in whole checkpoints: the older one goes when the newer one is whole.",
    "save_only_model": "No run goes on from such a checkpoint: one that was stopped is refused until --resume never.",
    "push_to_hub": "Upload the result once, at the end: model or adapter, tokenizer, card and report.",
    "use_cpu": "True where there is no accelerator and the launcher asks for none.",
    "ddp_find_unused_parameters": "False: every parameter takes part, and looking for others costs a pass.",
    "ddp_backend": "gloo where DeepSpeed runs on the CPU.",
    "dataloader_drop_last": "True: rows that fill no batch of all processes are left out of an epoch, and counted.",
    "model_init_kwargs": "Passed to `from_pretrained`; a dtype or revision in it is the setting of that name.",
    "chat_template_path": "Chat template: a .jinja file, or the template and tokens of another tokenizer.",
    "dataset_num_proc": "Processes that convert, tokenise and verify; all cores by default if there are many rows.",
    "max_length": "Longest sequence, or the length of a pack, in tokens; null: no limit.",
    "truncation_mode": "What is kept of a sequence that is too long; rows with nothing left to train are counted.",
    "packing": "Several documents in a sequence, with attention inside each.",
    "packing_strategy": "bfd, bfd_split, or wrapped (documents see those before them).",
    "eval_packing": "Pack the rows that the trainer evaluates while it trains.",
    "completion_only_loss": "True: what the assistant says is trained, as always. False: the whole row is.",
    "model_name_or_path": "A hub id or a folder, or demo.",
    "model_revision": "Of the model, the tokenizer and the merge.",
    "dtype": "Of the loaded weights; bfloat16 for the frozen base of an adapter where bf16 is on, else float32.",
    "attn_implementation": "SDPA, which gives the same, where the FlashAttention that is asked for is not installed.",
    "lora_dropout": "0 where an adapter is on fused experts, which PEFT cannot drop out.",
    "lora_target_modules": "Checked against the model before it is loaded; see lora_preset.",
    "use_bnb_nested_quant": "On with load_in_4bit, as in QLoRA.",
    "resume_from_checkpoint": "Go on from this checkpoint instead of the newest whole one.",
    "pad_token": "Padding token of the tokenizer.",
    "padding_free": "Batches without padding also without packing: one sequence, with attention inside each document.",
    # In TRL's words:
    **dict.fromkeys("run_name seed eos_token use_peft dataset_text_field lora_target_parameters".split(), ""),
}


# Settings of TRL's that ma_sft decides -> (accepted values, the first is the default; none: only TRL's own), why
PRESETS: dict[str, tuple[tuple[Any, ...], str]] = {
    "assistant_only_loss": ((True, False), "it is so; to train on the whole row set completion_only_loss=false"),
    "shuffle_dataset": ((True, False), "rows are always shuffled, by seed"),
    "remove_unused_columns": ((False, True), "the trainer gets token ids and labels alone"),
    "dataset_kwargs": ((None, {}, {"skip_prepare_dataset": True}), "rows are prepared before the trainer sees them"),
    "do_train": ((True, False), "ma-sft train always trains"),
    "do_eval": ((False, True), "held-out rows are always measured; while training: set eval_strategy"),
    "lora_task_type": (("CAUSAL_LM",), "ma_sft trains causal language models alone"),
    "hub_strategy": (("end", "every_save"), "push_to_hub uploads once, at the end"),
    "hub_always_push": ((), "push_to_hub uploads once, at the end; leave it out"),
    "do_predict": ((), "nothing is predicted; held-out answers are written with generate_eval"),
    "enable_jit_checkpoint": ((), "a run that is asked to stop saves by itself; leave it out"),
    "local_rank": ((), "the launcher says it; leave it out"),
}
# Two ways to say one thing: a later layer replaces the other way, in one layer they are refused
EXCLUSIVE = [
    ("dataset_name", "datasets"),
    ("eval_dataset", "test_size"),
    ("template", "chat_template_path"),
    ("bf16", "fp16"),
    ("load_in_4bit", "load_in_8bit"),
    ("load_in_4bit", "quantization_config"),
    ("load_in_8bit", "quantization_config"),
    ("activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
]
TWO_WAYS = "say the same in two ways; leave one of them out"
LORA = (
    "adapter_name_or_path loraplus_lr_ratio lora_preset lora_config lora_r lora_alpha lora_dropout lora_target_modules "
    "lora_target_parameters lora_modules_to_save use_rslora use_dora"
)
# (settings that do nothing, or something else, unless one word of this condition is true, why). A word is `name` (it is
# on), `!name` (it is off), `name=value`, `name!=value` or `name:fact`. Of TRL's settings only those stand here that
# would contradict what ma_sft does, or would train something else without a word.
NEEDS = (
    (f"load_in_4bit load_in_8bit peft_config {LORA}", "use_peft", "trains an adapter and use_peft is false; set it"),
    (LORA, "!peft_config", "describes an adapter, and peft_config does; leave one of them out"),
    ("freeze", "!use_peft", "is for full fine-tuning, an adapter freezes the whole model; set lora_target_modules"),
    ("use_bnb_nested_quant", "load_in_4bit", ""),
    ("generate_eval eval_strategy eval_on_start eval_packing load_best_model_at_end", "eval_dataset test_size", ""),
    ("metric max_new_tokens predict_with_generate", "generate_eval", ""),
    ("early_stopping_patience", "load_best_model_at_end", ""),
    (
        "packing eval_packing",
        "parallelism_config:whole_sequences",
        "keeps documents apart by a mask, which context parallelism drops; set it false",
    ),
    ("test_near_duplicates", "test_size", ""),
    ("dataset_test_split", "eval_dataset", ""),
    ("model_revision", "model_name_or_path:on_a_hub", "is for a model on a hub, and here is a folder; give its id"),
    ("stopping_strategy", "datasets:weighted", "is for sources with weights; give each of datasets a weight"),
    ("packing", "max_length", "needs max_length, the length of a pack in tokens; set it"),
    ("dataset_streaming", "max_steps!=-1", "needs max_steps, as a stream's length is not known; set it"),
    ("packing_strategy", "packing eval_packing", ""),
    ("overflow", "max_length", ""),
    ("truncation_mode", "!packing packing_strategy=bfd", "cuts rows, and here packing_strategy does; set overflow"),
    ("truncation_mode", "!overflow overflow=keep_end", "cuts rows, and here overflow does; leave one of them out"),
    ("response_template", "formatting_func", "finds labels in the text of formatting_func; set it"),
    ("instruction_template", "response_template", ""),
    (
        "system_prompt merge_turns train_on history template_kwargs template_now add_eos dataset_format on_error "
        "dataset_text_field",
        "!formatting_func",
        "is for conversations, and formatting_func makes the whole text; leave one of them out",
    ),
    ("completion_only_loss", "!formatting_func response_template", "needs response_template too; set it"),
    (
        "assistant_only_loss response_template",
        "completion_only_loss!=false",
        "trains a part of each row, and completion_only_loss=false all of it; leave one of them out",
    ),
    ("label_smoothing_factor", "loss_type=nll", "smooths loss_type=nll alone; leave one of them out"),
    ("router_aux_loss_coef", "!label_smoothing_factor", "is unused with label_smoothing_factor; leave one of them out"),
    ("hub_model_id hub_private_repo hub_revision", "push_to_hub", ""),
    ("warmup_steps", "lr_scheduler_type!=constant", "does nothing at a constant rate; set constant_with_warmup"),
)


def _whole_sequences(config: Any) -> bool:
    """Whether nothing splits rows over GPUs: by a mapping, accelerate's class of it, or the launcher."""
    size = config.get("cp_size") if isinstance(config, dict) else getattr(config, "cp_size", None)
    return int(size or os.environ.get("PARALLELISM_CONFIG_CP_SIZE") or 1) == 1


FACTS: dict[str, Callable[[Any], bool]] = {
    "on_a_hub": lambda path: not Path(path).expanduser().is_dir(),
    "whole_sequences": _whole_sequences,
    "weighted": lambda sources: any(isinstance(source, dict) and "weight" in source for source in sources),
}


def is_on(value: Any) -> bool:
    """Whether a value sets something: neither null, false, 0, nor empty."""
    return value is not None and value is not False and not (isinstance(value, int | float | list | dict) and not value)


def _is_true(word: str, values: Values) -> bool:
    name, sign, wanted = (*re.split("([=:])", word), "", "")[:3]
    if sign == ":":
        return FACTS[wanted](values[name])
    if sign:
        return (str(values[name.rstrip("!")]).lower() == wanted) is not name.endswith("!")
    return is_on(values[name.lstrip("!")]) is not name.startswith("!")


def reason(condition: str, words: str) -> str:
    """A rule of `NEEDS` in words, as they follow its settings' names."""
    return words or f"does nothing without {' or '.join(condition.split())}; set it"


# What libraries would take, and then train nothing or fail late: (what fits, settings, in words)
LIMITS: tuple[tuple[Callable[[float], bool], str, str], ...] = (
    (
        lambda value: value > 0,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_train_epochs max_length"
        " max_new_tokens lora_r lora_alpha save_steps eval_steps test_size loraplus_lr_ratio save_total_limit "
        "dataset_num_proc early_stopping_patience",
        "a number above 0",
    ),
    (lambda value: value >= 0, "learning_rate full_learning_rate weight_decay max_grad_norm warmup_steps", "0 or more"),
    (lambda value: 0 <= value < 2**32, "seed data_seed", "a whole number from 0 to below 2**32"),
    (lambda value: value == -1 or value >= 1, "max_steps", "a whole number from 1, or -1 for no limit"),
    (lambda value: value >= -1, "generate_eval", "a number of rows, or -1 for all"),
    (lambda value: 0 <= value < 1, "lora_dropout label_smoothing_factor", "a number from 0 to below 1"),
    (lambda value: 0 < value <= 1, "test_near_duplicates", "a number above 0 and up to 1"),
)
PATHS = (
    "dataset_name datasets eval_dataset model_name_or_path output_dir template chat_template_path deepspeed "
    "fsdp_config adapter_name_or_path resume_from_checkpoint accelerator_config"
).split()
CHANGED = Path(__file__).stat().st_mtime_ns  # of what is imported here, not of what may be written later
SOURCES = ("dataset_name", "datasets", "eval_dataset")  # paths, mappings, or rows themselves
ROWS_FILE = re.compile(r"[^*?\[:]+\.(jsonl?|csv|tsv|txt|parquet|arrow)(\.gz|\.zst)?")
CONFIG_FILES = ("deepspeed", "fsdp_config", "accelerator_config")  # a mapping, its JSON, or the path of a file
OF_THE_MACHINE = ("bf16", "use_cpu", "report_to", "ddp_backend")  # settings whose default depends on it
# What `from_pretrained` takes of a model and a setting says of all that is loaded
INIT_KWARGS = {
    **{name: name for name in ("dtype", "attn_implementation", "trust_remote_code")},
    **{"torch_dtype": "dtype", "revision": "model_revision"},
}
# What plug-ins add to the choices of a setting
ADDED_CHOICES: dict[str, list[str]] = {
    "include_num_input_tokens_seen": ["all", "non_padding", "no"],
    "optim": ["muon"],
}
# Types that a setting takes beside those of its field
ADDED_KINDS: dict[str, set[str]] = {"fsdp": {"bool", "list"}, "parallelism_config": {"dict"}}
# What other tools call a setting, where no likeness of letters leads to it
OTHER_NAMES = {
    "learning_rate": "lr lora_learning_rate",
    "num_train_epochs": "epochs num_epochs n_epochs",
    "per_device_train_batch_size": "batch_size per_device_batch_size micro_batch_size train_batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "max_length": "max_seq_length seq_length sequence_len cutoff_len",
    "model_name_or_path": "model base_model model_name",
    "dataset_name": "data dataset train_file",
    "warmup_steps": "warmup_ratio",
    "lora_r": "lora_rank",
    "dtype": "torch_dtype",
}


@dataclass(frozen=True)
class Setting:
    """One setting: the types it takes, the stricter first (text is nearly anything), its choices and default."""

    name: str
    stage: str
    kinds: list[str]
    nullable: bool
    choices: list[str]
    default: Any
    help: str

    @property
    def kind(self) -> str:
        """Its class: done by ma_sft (`ours`), passed on (`trainer`), decided (`preset`), or its default alone."""
        if self.name in PRESETS:
            return "preset" if PRESETS[self.name][0] else "refused"
        return "ours" if self.stage not in ("training", "model") or self.name in OURS else "trainer"

    def take(self, value: Any) -> Any:
        """A value from Python, YAML or the command line as this setting's own type."""
        value = _plain(value)
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and "str" not in self.kinds):
            if not self.nullable:
                raise RecipeError(f"{self.name}: a value is missing (null); give one, or leave the line out")
            return None
        if value is False and "no" in self.choices:  # YAML reads a bare `no` so
            value = "no"
        for kind in self.kinds:
            try:
                taken = self._read(kind, value)
                break
            except RecipeError as error:  # of a file that it names
                raise RecipeError(f"{self.name}: {error}") from None
            except (ValueError, TypeError, OverflowError):
                continue
        else:
            kinds = " or ".join("a JSON object" if kind == "dict" else kind for kind in self.kinds)
            found = "a secret" if is_secret(self.name) else repr(value)
            raise RecipeError(f"{self.name}: {kinds} expected, found {found}")
        self._check(taken)
        return taken

    def _read(self, kind: str, value: Any) -> Any:
        """The value as this type; ValueError or TypeError where it is none."""
        match kind:
            case "list":
                items = value if isinstance(value, list) else [value]
                return [self._path(json.loads(x) if isinstance(x, str) and x.startswith('{"') else x) for x in items]
            case "dict":
                if self.name in CONFIG_FILES and isinstance(value, str) and not value.lstrip().startswith("{"):
                    value = read_json(Path(self._path(value)))
                return copy.deepcopy(value) if isinstance(value, dict) else dict(json.loads(value))
            case "bool":
                words = "true false" if "str" in self.kinds else "true false yes no t f y n 1 0"
                return words.split().index(str(value).lower()) % 2 == 0
            case "int" | "float":
                number = int(value) if kind == "int" else float(value)
                if (
                    isinstance(value, bool)
                    or not math.isfinite(number)
                    or (isinstance(value, float) and number != value)
                ):
                    raise ValueError
                return number
            case "str":
                no_word = "int" in self.kinds and value != self.default  # one that stands for a number
                if no_word or isinstance(value, bool) or not isinstance(value, str | int | float):
                    raise TypeError
                return self._path(str(value))
        if kind not in (base.__name__ for base in type(value).__mro__):
            raise TypeError
        return value

    def _path(self, value: Any) -> Any:
        """`~` is the user's home where a path, or a source with a path, is meant."""
        if isinstance(value, dict) and isinstance(value.get("path"), str | PathLike):
            return {**value, "path": self._path(fspath(value["path"]))}
        is_path = self.name in PATHS and isinstance(value, str) and value.startswith("~")
        return str(Path(value).expanduser()) if is_path else value

    def _check(self, value: Any) -> None:
        is_class = self.name == "optim" and ":" in str(value)
        if self.choices and isinstance(value, str) and value not in self.choices and not is_class:
            near = nearest(value, self.choices, "")
            raise RecipeError(f"{self.name}: invalid choice: {value!r}{near}; one of {', '.join(self.choices)}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            for fits, names, words in LIMITS:
                if self.name in names.split() and not fits(value):
                    raise RecipeError(f"{self.name}: {words} expected, found {value}")
        accepted, why = PRESETS.get(self.name, ((value,), ""))
        if value not in (accepted or (self.default,)):
            raise RecipeError(f"{self.name}{f'={value}' if accepted else ''}: {why}")


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
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):  # whose mappings may be rows
        return [item if isinstance(item, dict) else _plain(item) for item in value]
    return value


def settings_of(stages: Mapping[str, type]) -> dict[str, Setting]:
    """Every field of the stages' dataclasses as a setting, by name."""
    order = ("dict", "bool", "int", "float", "str", "list")  # the stricter first; behind a class of a library's own
    found = {}
    for stage, kind in stages.items():
        hints = get_type_hints(kind)
        for item in (item for item in fields(kind) if item.init):
            hint = hints[item.name]
            parts = [*get_args(hint)] if get_origin(hint) in (Union, types.UnionType) else [hint]
            enums = [part for part in parts if isinstance(part, type) and issubclass(part, Enum)]
            words = [entry.value for enum in enums for entry in enum]
            words += [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
            named = {type(word) for word in words} | {part for part in parts if part not in (*enums, type(None))}
            kinds = {getattr(get_origin(part) or part, "__name__", str(part)) for part in named} - {"Literal"}
            kinds |= ADDED_KINDS.get(item.name, set())
            if "dict" in kinds:
                kinds.discard("str")  # text is JSON
            default = item.default if item.default_factory is MISSING else item.default_factory()
            found[item.name] = Setting(
                name=item.name,
                stage=stage,
                kinds=sorted(kinds, key=lambda kind: order.index(kind) if kind in order else -1),
                nullable=type(None) in parts,
                choices=[*(item.metadata.get("choices") or words), *ADDED_CHOICES.get(item.name, ())],
                default=_plain(default),
                help=" ".join(str(OURS.get(item.name) or item.metadata.get("help", "")).replace("%%", "%").split()),
            )
    return found


def _stages() -> dict[str, type]:
    from trl import ModelConfig, SFTConfig

    return {**STAGES, "training": SFTConfig, "model": ModelConfig}


@cache
def known_settings() -> dict[str, Setting]:
    """Every setting of a recipe by name, from a table in the cache folder, as making it imports torch."""
    made_from = version("trl"), version("transformers"), __version__, CHANGED
    path = cache_dir() / f"settings-{'-'.join(map(str, made_from))}.json"
    with suppress(OSError, ValueError, TypeError):
        return {row["name"]: Setting(**row) for row in json.loads(path.read_text(encoding="utf-8"))}
    found = settings_of(_stages())
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps([asdict(row) for row in found.values()]))
    return found


def all_settings() -> dict[str, dict[str, Any]]:
    """Every setting of a recipe: name -> `stage`, `class`, `help`, `default` (null: by machine), and `choices`."""
    known = known_settings()
    defaults = with_defaults(Overrides()) | dict.fromkeys(OF_THE_MACHINE)
    return {
        name: {
            "stage": what.stage,
            "class": what.kind,
            "help": what.help,
            "default": defaults.get(name, what.default),
            "choices": what.choices or None,
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
        kinds += ["string"] if {"dict", "list"} & {*what.kinds} else []  # JSON, or one item
        kinds += ["object"] if name in SOURCES else []
        kinds += ["null"] if what.nullable else []
        properties[name] = {"description": what.help, "type": [*dict.fromkeys(kinds)], "default": about["default"]}
        if what.choices and what.kinds == ["str"]:
            properties[name]["enum"] = [*what.choices, *([None] if what.nullable else [])]
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "A recipe of ma_sft", "type": "object"}
    return {**schema, "additionalProperties": False, "properties": properties}


@dataclass
class Overrides:
    """What the recipe, YAML files and flags set: `values`, and the `layer` that set each; later layers win."""

    values: dict[str, Any] = field(default_factory=dict)
    layer: dict[str, int] = field(default_factory=dict)
    last_layer: int = 0

    def add(self, layer: int, settings: Values, file: Path | None = None) -> None:
        """Put a layer on top; errors name the line of `file`, where it comes from one."""
        self.last_layer, known = layer, known_settings()
        for name, value in settings.items():
            name = name.replace("-", "_")
            if name == "dataset_name" and not isinstance(value, str | PathLike | None):
                name, value = "datasets", [value] if _is_rows(value) else value  # rows in memory, or a mapping
            try:
                if name not in known:
                    raise RecipeError(f"unknown setting {name!r}{nearest(name, known)}")
                taken = known[name].take(value)
            except RecipeError as error:
                raise RecipeError(f"{_place(file, name)}{error}") from None
            for pair in (pair for pair in EXCLUSIVE if name in pair and is_on(taken)):
                other = pair[pair[0] == name]
                if self.layer.get(other, layer) < layer:
                    self.values.pop(other, None)
                    self.layer[other] = layer  # where it was turned off
            if name == "model_init_kwargs":
                own = {INIT_KWARGS[key]: value for key, value in (taken or {}).items() if key in INIT_KWARGS}
                for key in own.keys() & settings.keys():
                    raise RecipeError(f"{key} and model_init_kwargs say the same in two ways; leave one of them out")
                self.add(layer, own, file)
                taken = {key: value for key, value in (taken or {}).items() if key not in INIT_KWARGS} or None
            self.values[name], self.layer[name] = taken, layer

    def check_rules(self, values: dict[str, Any]) -> None:
        """Hold what was set, and the values with which TRL is called, against `EXCLUSIVE` and `NEEDS`."""
        known = known_settings()
        values = {name: what.default for name, what in known.items()} | values
        for pair in EXCLUSIVE:
            if all(is_on(self.values.get(name)) for name in pair):
                raise RecipeError(f"{' and '.join(pair)} {TWO_WAYS}")
        for names, condition, words in NEEDS:
            if not any(_is_true(word, values) for word in condition.split()):
                switched = max(self.layer.get(name, -1) for name in re.findall(r"\w+", condition))
                for name in (name for name in names.split() if self.layer.get(name, -2) >= switched):
                    if is_on(value := self.values.get(name)) and value not in (known[name].default, "no"):
                        raise RecipeError(f"{name} {reason(condition, words)}, or remove {name}")


def _place(file: Path | None, name: str) -> str:
    """Where a YAML or JSON file sets it, to begin an error with."""
    if file is None:
        return ""
    key = re.compile(rf"(\s*\"|'?){re.escape(name).replace('_', '[-_]')}[\"']?\s*:")
    lines = enumerate(file.expanduser().read_text(encoding="utf-8").splitlines(), start=1)
    return f"{file}{next((f', line {number}' for number, line in lines if key.match(line)), '')}: "


def with_defaults(overrides: Overrides) -> dict[str, Any]:
    """What was set, over those of our defaults that differ from TRL's and do not depend on the machine.

    Where we have a default of our own, null stands for it.
    """
    given = overrides.values.get
    name = given("name") or Path(given("output_dir") or "sft").name or "sft"
    if not given("output_dir") and not re.fullmatch(r"(?!\.\.?$)[^/\\\ud800-\udfff]+", name):
        raise RecipeError(f"name: found {name!r}, no name of a folder in runs/; set output_dir for another place")
    lora, quantised = given("use_peft"), given("load_in_4bit") or given("load_in_8bit")
    ours: dict[str, Any] = {
        **{name: accepted[0] for name, (accepted, _) in PRESETS.items() if accepted},
        "name": name,
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
    if values["bf16"] is None and not values.get("fp16"):  # transformers takes bf16 on a CPU only with use_cpu
        on_cpu = torch.cpu._is_avx512_bf16_supported() and not wants_gpu() and use_cpu is not False
        fp8 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8"  # the launcher's, in which bf16 is contained
        on_gpu = torch.cuda.is_available() and not use_cpu and not fp8
        values["bf16"] = torch.cuda.is_bf16_supported() if on_gpu else on_cpu
    values["bf16"] = bool(values["bf16"])
    if values["ddp_backend"] is None and cpu_deepspeed():
        values["ddp_backend"] = "gloo"
    if values["bf16"] and values.get("use_peft") and not dtype_is_set:
        values["dtype"] = "bfloat16"  # the frozen base of an adapter needs no float32 master weights


def transformers_optim(name: str | None) -> str:
    """The name of an optimiser that transformers knows, AdamW's where it does not: `muon`, `module:Class`."""
    return "adamw_torch" if name == "muon" or ":" in (name or "") else name or "adamw_torch_fused"


@dataclass(frozen=True)
class Settings:
    """A resolved recipe: the settings of each stage, TRL's own, and the values that were set by hand."""

    rows: RowsConfig
    labels: LabelsConfig
    adapter: AdapterConfig
    evaluation: EvaluationConfig
    run: RunConfig
    training: "SFTConfig"
    model: "ModelConfig"
    chosen: dict[str, Any]

    @property
    def quantised(self) -> bool:
        """Whether the base's weights are quantised when they are loaded."""
        return bool(self.model.load_in_4bit or self.model.load_in_8bit or self.adapter.quantization_config)

    @property
    def optimizer(self) -> str:
        """The optimiser that was asked for, which may be one that transformers does not know."""
        return str(self.chosen.get("optim") or self.training.optim.value)


def _with_keywords_of(
    kind: Callable[Keywords, Any],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, Keywords], None]]:
    """Tell type checkers that a method takes what makes a `kind`."""
    return lambda method: method


class _Signature:
    """What help() and completion show in the place of `**settings`."""

    def __get__(self, *_: object) -> Signature:
        kind = Parameter.KEYWORD_ONLY
        settings = known_settings().values()
        return Signature(
            [Parameter(s.name, kind, default=s.default, annotation=s.choices or s.kinds) for s in settings]
        )


class Recipe:
    """A fine-tune as data: `Recipe(model_name_or_path=..., dataset_name=..., packing=True, ...)`.

    Any field of our dataclasses, TRL's `SFTConfig` or TRL's `ModelConfig` is a keyword. Sources may be paths,
    mappings or `datasets` objects. Nothing heavy is imported and nothing is checked until `resolve`.
    """

    __signature__ = _Signature()

    @_with_keywords_of(RecipeSettings)
    def __init__(self, **settings: Any) -> None:
        self.settings: dict[str, Any] = {**settings}
        self.file: Path | None = None  # where settings of others may come from: YAML or JSON

    def __repr__(self) -> str:
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in shown(self.settings).items())})"

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
            RecipeError: an unknown key (with the nearest right one), a wrong value, no model, no data, code that a file
                names, or a setting that would do nothing.
        """
        overrides = Overrides()
        flags = read_flags(args)
        files = [(read_yaml(Path(file)), Path(file)) for file in flags.pop("config", [])]
        layers = [(self.settings, self.file), *files, (flags, None)]
        if flags.pop("allow_code", "false") != "true":
            for settings, file in layers:
                if file is not None:
                    refuse_code(settings, file)
        for layer, (settings, file) in enumerate(layers):
            overrides.add(layer, settings, file)
        values = with_defaults(overrides)
        if not values.get("model_name_or_path"):
            raise RecipeError("no model: set model_name_or_path to a hub id, a folder, or 'demo'")
        if not (values.get("dataset_name") or values.get("datasets")):
            raise RecipeError("no data: set dataset_name (one source) or datasets (several)")
        overrides.check_rules(values)
        return overrides, values

    def check_early(self, args: Sequence[str] = (), *, reads_rows: bool = True) -> None:
        """What can be told before torch is imported.

        Raises:
            RecipeError: as `merge`; a folder of the model, or a file of rows, where they are read, that is not there.
        """
        _, values = self.merge(args)
        model = str(values["model_name_or_path"])
        if model[:1] in "./~" and not Path(model).expanduser().is_dir():
            raise RecipeError(f"the model {not_there(model)}")
        sources = [values.get("dataset_name"), *values.get("datasets", ()), *values.get("eval_dataset", ())]
        for source in sources if reads_rows else ():
            path = source.get("path") if isinstance(source, dict) else source
            if isinstance(path, str) and ROWS_FILE.fullmatch(path) and not Path(path).exists():
                raise RecipeError(f"the file {not_there(path)}")

    def resolve(self, args: Sequence[str] = ()) -> Settings:
        """The settings of each stage, from the recipe, `--config` files and flags.

        Raises:
            RecipeError: as `merge`; what TRL refuses, or a setting that needs a package which is not installed.
            RunError: the launcher asks for what this machine has not.
        """
        overrides, values = self.merge(args)
        from ma_sft.demo import demo_model
        from ma_sft.launcher import check_installed, check_launch

        _set_machine_defaults(values, overrides.values.get("dtype") is not None)
        check_launch(values["use_cpu"])
        if values["model_name_or_path"] == "demo":
            values["model_name_or_path"] = str(demo_model())
        from trl import TrlParser  # what can be told without it comes before

        values["optim"] = transformers_optim(values.get("optim"))
        try:
            if isinstance(values.get("parallelism_config"), dict):
                from accelerate.parallelism_config import ParallelismConfig

                values["parallelism_config"] = ParallelismConfig(**values["parallelism_config"])
            parsed = TrlParser(tuple(_stages().values())).parse_dict(values)
        except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
            raise RecipeError(one_line(error)) from error
        settings = Settings(*parsed, chosen=overrides.values)  # type: ignore[misc]  # the unpacked ones are all but one
        check_installed(settings.training)
        return settings


def read_flags(args: Sequence[str]) -> dict[str, Any]:
    """Split a command line into name -> text, or a list of texts. Dashes do for underscores; the last wins."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False, exit_on_error=False
    )
    known = known_settings()
    parser.add_argument("--config", action="append")
    parser.add_argument("--allow_code", "--allow-code", nargs="?", const="true", choices=("true", "false"))
    for name, what in known.items():
        dashed = name.replace("_", "-")
        number: dict[str, Any] = {"nargs": "+"} if "list" in what.kinds else {}
        if "bool" in what.kinds:
            number = {"nargs": "?", "const": "true"}
            parser.add_argument(f"--no_{name}", f"--no-{dashed}", dest=name, action="store_const", const="false")
        parser.add_argument(f"--{name}", f"--{dashed}", dest=name, **number)
    try:
        found, unknown = parser.parse_known_args(list(args))
    except argparse.ArgumentError as error:
        raise RecipeError(str(error).removeprefix("argument ")) from None
    if unknown:
        flag = unknown[0].split("=")[0]
        raise RecipeError(f"unknown setting {flag!r}{nearest(flag.lstrip('-').replace('-', '_'), known)}")
    flags = vars(found)
    flags.pop("local_rank", None)  # the DeepSpeed launcher adds it
    for name, value in flags.items():
        if isinstance(value, list) and len(value) == 1 and name in known and "str" in known[name].kinds:
            flags[name] = value[0]  # text may mean more than a list of it: optim_target_modules=all-linear
    return flags


def refuse_code(said: Any, file: str | Path, name: str = "") -> None:
    """Stop where the settings of a file, which may be a stranger's, name a Python file that would run."""
    if isinstance(said, dict | list):
        for key, value in said.items() if isinstance(said, dict) else enumerate(said):
            refuse_code(value, file, f"{name}.{key}" if name else str(key))
    elif isinstance(said, str) and re.fullmatch(r".+\.py:\w+", said):
        raise RecipeError(f"{file}: {name} names code, {said}; read it, and if it may run pass --allow_code true")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of a YAML or JSON file; what YAML would quietly drop is refused."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise RecipeError(f"{path}, line {node.start_mark.line + 1}: {twice[0]!r} stands twice; keep one")
            return super().construct_mapping(node, deep)

    path = path.expanduser()
    if not path.is_file():
        raise RecipeError(f"the file {not_there(path)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold a mapping of settings, found {type(content).__name__}")
    return {str(key): value for key, value in content.items()}  # YAML reads `on` and `1` as other than text


def is_secret(name: str) -> bool:
    """Whether a setting holds what nobody else may read. (The tokenizer's tokens are no secret.)"""
    return bool(re.search(r"(token|key|secret|password)$", name.lower())) and name not in ("eos_token", "pad_token")


def _is_rows(value: Any) -> bool:
    """Whether a list holds rows, not sources."""
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) and "path" not in x for x in value)


def shown(value: Any, of_rows: bool = False) -> Any:
    """Settings as they may be shown and written down: without secrets at any depth, in what JSON can hold."""
    if hasattr(value, "num_rows") or hasattr(value, "iloc") or (of_rows and _is_rows(value)):  # rows handed over
        return f"{type(value).__name__} with {getattr(value, 'num_rows', None) or len(value)} rows"
    if isinstance(value, Mapping):
        return {str(key): shown(item, key in SOURCES) for key, item in value.items() if not is_secret(str(key))}
    if isinstance(value, list | tuple):
        return [shown(item, of_rows) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def shown_command(args: Sequence[str]) -> list[str]:
    """A command line as it may be shown: three stars for each secret."""
    hidden, secret = [], False
    for arg in args:
        flag, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
        named = is_secret(flag.lstrip("-").replace("-", "_"))
        mapping = value.startswith("{") and re.search(r"(token|key|secret|password)\W*:", value, re.IGNORECASE)
        hidden.append(f"{flag}{equals}{'***' if secret or mapping or (equals and named) else value}")
        secret = named and not equals
    return hidden


def nearest(key: str, known: Iterable[str], otherwise: str = "; `ma-sft settings` lists them all") -> str:
    """A question for what may have been meant by `key`, to end an error with."""
    meant = [name for name, others in OTHER_NAMES.items() if key in others.split() and name in known]
    meant = meant or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {meant[0]!r}?" if meant else otherwise
