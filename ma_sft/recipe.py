"""What a fine-tune is made of: data and settings. Every setting is a keyword, a flag and a YAML key alike.

The settings are those of TRL's `SFTConfig` and `ModelConfig` plus the dataclasses below, one a stage,
parsed by TRL's `TrlParser`: who knows `trl sft` knows our flags. Later wins: TRL's default, ours, the
recipe, `--config file.yaml`, flags.
"""

import argparse
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ma_sft.errors import RecipeError

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig


@dataclass
class RowsConfig:
    """Where the rows come from, and which of them are used."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "One source: a hub id, a file, a glob, or a folder. See docs/formats.md."}
    )
    datasets: list[str] = field(
        default_factory=list,
        metadata={"help": "Several sources: each a path or hub id, or a mapping with path, format, weight, ..."},
    )
    eval_dataset: list[str] = field(
        default_factory=list, metadata={"help": "Held-out rows: sources like those of datasets, measured one by one."}
    )
    test_size: float | None = field(
        default=None, metadata={"help": "Hold out this share (below 1) or number of rows; duplicates stay together."}
    )
    test_near_duplicates: float | None = field(
        default=None, metadata={"help": "Similarity from which near duplicates stay on one side of the split."}
    )
    filters: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Rows to leave out, e.g. '{\"exact_duplicates\": true}'. See docs/formats.md."}
    )
    stopping_strategy: str = field(
        default="first_exhausted",
        metadata={
            "help": "For sources with weights: stop when one runs dry, or repeat rows until all were seen.",
            "choices": ["first_exhausted", "all_exhausted"],
        },
    )
    dataset_streaming: bool = field(default=False, metadata={"help": "Read rows while training; needs max_steps."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a hub data set to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split of eval_dataset, if it has several."})
    dataset_format: str | None = field(
        default=None, metadata={"help": "Format of the rows, where detection by columns is not wanted."}
    )
    on_error: str = field(
        default="raise",
        metadata={"help": "What to do with a broken row: stop, or count and skip it.", "choices": ["raise", "skip"]},
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message for conversations that have none."}
    )


@dataclass
class LabelsConfig:
    """How rows become token ids and labels, and that these are proven."""

    template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template: the tokenizer's own (default), chatml, question-answer, role-tags, a .jinja file."
        },
    )
    template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Variables for the chat template, e.g. '{\"enable_thinking\": false}'."}
    )
    train_on: str = field(
        default="all", metadata={"help": "Train every assistant turn, or the last one.", "choices": ["all", "last"]}
    )
    history: str = field(
        default="split",
        metadata={
            "help": "A turn that the template rewrites in history is trained in a sequence of its own, or masked.",
            "choices": ["split", "mask"],
        },
    )
    response_template: str | None = field(
        default=None,
        metadata={"help": "Find labels by this text with DataCollatorForCompletionOnlyLM; needs formatting_func."},
    )
    instruction_template: str | None = field(
        default=None, metadata={"help": "Text that begins a user turn, for multi-turn rows with response_template."}
    )
    formatting_func: str | None = field(
        default=None,
        metadata={"help": "Function row -> text for the classic path: module:function, or question-answer."},
    )
    overflow: str | None = field(
        default=None,
        metadata={
            "help": "A sequence longer than max_length: cut its end (default; bfd_split and wrapped split) or its "
            "beginning (keep_end), split it, drop it, or keep_answer: the oldest turns go first.",
            "choices": ["cut", "split", "drop", "keep_answer", "keep_end"],
        },
    )
    check: bool = field(default=True, metadata={"help": "Prove the labels before training; wrong ones stop the run."})


@dataclass
class AdapterConfig:
    """What of the model is trained, beside the `lora_*` settings of TRL's `ModelConfig`."""

    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Go on with this adapter (a run's folder, or an adapter's); its own settings, no lora_* ones."
        },
    )
    lora_preset: str = field(
        default="all-linear",
        metadata={
            "help": "Modules that LoRA adapts, unless lora_target_modules is set.",
            "choices": ["mini", "attention", "all-linear"],
        },
    )
    lora_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Any field of peft.LoraConfig by name, e.g. \'{"init_lora_weights": "pissa"}\'.'},
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: the learning rate of every B is this many times that of A."}
    )
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "Full fine-tuning: parameters whose name one of these regular expressions finds stay as is."},
    )
    full_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate for full fine-tuning, where the recipe's learning_rate is meant for adapters."
        },
    )
    merge: bool = field(default=True, metadata={"help": "Merge the adapter into the base model when training is done."})


@dataclass
class ExamConfig:
    """What held-out rows are asked before and after training."""

    generate_eval: int = field(
        default=0, metadata={"help": "Held-out answers to generate before and after training (-1: all)."}
    )
    metric: str = field(
        default="exact-match",
        metadata={
            "help": "How answers are graded: exact-match, or module:function, (answer, reference) -> a number or bool."
        },
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer to generate, in tokens."})


@dataclass
class RunConfig:
    """The run and its folder."""

    name: str | None = field(default=None, metadata={"help": "Name of the run; its folder is runs/<name>."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete what an earlier run left in the output folder."}
    )
    resume: str = field(
        default="auto",
        metadata={
            "help": "Go on with an unfinished run of the same recipe from its newest whole checkpoint, or start anew.",
            "choices": ["auto", "never"],
        },
    )


STAGES = (RowsConfig, LabelsConfig, AdapterConfig, ExamConfig, RunConfig)


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


class Recipe:
    """A fine-tune as data: `Recipe(model_name_or_path=..., dataset_name=..., packing=True, ...)`.

    Any field of the dataclasses above, TRL's `SFTConfig` or TRL's `ModelConfig` is a keyword. Nothing heavy is
    imported and nothing is checked until `resolve`.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """The recipe of a Python module (its variable `recipe`) or of a YAML file.

        Raises:
            RecipeError: no such file, no recipe in it.
        """
        path = Path(path)
        if not path.is_file():
            raise RecipeError(f"the recipe {str(path)!r} does not exist")
        if path.suffix in (".yaml", ".yml", ".json"):
            return cls(**{"name": path.stem, **read_yaml(path)})
        if path.suffix != ".py":
            raise RecipeError(f"{path} is no recipe; give a .py or .yaml file (ma-sft init --data {path} writes one)")
        import runpy

        recipe = runpy.run_path(str(path)).get("recipe")
        if not isinstance(recipe, cls):
            raise RecipeError(f"{path} has no variable `recipe = Recipe(...)`")
        recipe.settings.setdefault("name", path.stem)
        return recipe

    def resolve(self, args: Sequence[str] = ()) -> Settings:
        """Merge the recipe, `--config file.yaml` and flags into TRL's dataclasses.

        Raises:
            RecipeError: an unknown key (with the nearest right one) or a wrong value.
        """
        from trl import ModelConfig, SFTConfig, TrlParser

        from ma_sft.launcher import check_launch

        args = [a for a in args if not a.startswith("--local_rank")]  # the DeepSpeed launcher adds it
        chosen = dict(self.settings)
        if "--config" in args:
            at = list(args).index("--config")
            if at + 1 == len(args):
                raise RecipeError("--config needs a YAML file")
            chosen |= read_yaml(Path(args[at + 1]))
            args = [*args[:at], *args[at + 2 :]]

        class Parser(TrlParser):  # type: ignore[misc]
            def error(self, message: str) -> NoReturn:
                raise RecipeError(message.removeprefix("argument "))

        parser = Parser((*STAGES, SFTConfig, ModelConfig), allow_abbrev=False)
        actions = {action.dest: action for action in parser._actions}
        for key, value in chosen.items():
            if key not in actions:
                raise RecipeError(f"unknown setting {key!r}{nearest(key, actions)}")
            _check_value(key, value, actions[key])
        parser.set_defaults_with_config(**{**_our_defaults(chosen, args), **chosen})
        values, unknown = parser.parse_known_args(list(args))
        if unknown:
            key = unknown[0].lstrip("-").split("=")[0]
            raise RecipeError(f"unknown setting {unknown[0]!r}{nearest(key, actions)}")
        check_launch(values.use_cpu)
        try:
            parsed = parser.parse_args_into_dataclasses(args=list(args))
        except (ValueError, TypeError) as error:
            raise RecipeError(" ".join(str(error).split())) from error
        rows, labels, adapter, exam, run, training, model = parsed
        _check_trackers(training.report_to)
        flags = {a.removeprefix("--").split("=")[0] for a in args if a.startswith("--")}
        for key in flags & set(actions):
            chosen[key] = next(getattr(c, key) for c in parsed if hasattr(c, key))
        if adapter.full_learning_rate is not None and not model.use_peft and "learning_rate" not in flags:
            training.learning_rate = adapter.full_learning_rate
        if not model.model_name_or_path:
            raise RecipeError("no model: set model_name_or_path to a hub id, a folder, or 'demo'")
        if not (rows.dataset_name or rows.datasets):
            raise RecipeError("no data: set dataset_name (one source) or datasets (several)")
        if rows.dataset_name and rows.datasets and "dataset_name" in flags:
            rows.datasets = []  # a flag replaces the recipe's sources
        return Settings(rows, labels, adapter, exam, run, training, model, chosen)


def all_settings() -> dict[str, dict[str, Any]]:
    """Every setting of a recipe: name -> `help`, `default` and `choices` (None if it is free)."""
    from trl import ModelConfig, SFTConfig, TrlParser

    parser = TrlParser((*STAGES, SFTConfig, ModelConfig), allow_abbrev=False)
    parser.set_defaults_with_config(**_our_defaults({}, []))
    return {
        action.dest: {
            "help": " ".join((action.help or "").split()),
            "default": action.default,
            "choices": list(action.choices) if action.choices else None,
        }
        for action in parser._actions
        if action.dest not in ("help", "config")
    }


def _our_defaults(chosen: dict[str, Any], args: Sequence[str]) -> dict[str, Any]:
    """Defaults that depend on the machine or differ from TRL's."""
    import torch

    from ma_sft.launcher import cpu_deepspeed, wants_gpu

    def given(key: str) -> Any:
        """What the recipe or, before it, a flag says; flags are still text here."""
        for at, arg in enumerate(args):
            if arg == f"--{key}":
                value = args[at + 1] if at + 1 < len(args) else ""
                return value if value and not value.startswith("--") else "true"
            if arg.startswith(f"--{key}="):
                return arg.partition("=")[2]
        return chosen.get(key)

    def on(key: str) -> bool:
        return str(given(key)).lower() in ("true", "1", "yes", "y", "t")

    name = given("name") or "sft"
    if given("bf16") is not None:
        bf16 = on("bf16")
    elif torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported() and not on("fp16")
    else:
        bf16 = torch.cpu._is_avx512_bf16_supported() and not on("fp16") and not wants_gpu()
    lora, quantised = on("use_peft"), on("load_in_4bit") or on("load_in_8bit")
    return {
        "output_dir": f"runs/{name}",
        "bf16": bool(bf16),
        "use_cpu": not torch.accelerator.is_available() and not wants_gpu(),
        "ddp_backend": "gloo" if cpu_deepspeed() else None,
        "ddp_find_unused_parameters": False,  # every parameter takes part, and looking for others costs a pass
        "logging_nan_inf_filter": False,  # it would hide the steps that ruin a model
        # The frozen base of an adapter needs no float32 master weights.
        "dtype": "bfloat16" if bf16 and lora else "float32",
        "run_name": name,
        "report_to": ["tensorboard"] if find_spec("tensorboard") else [],
        "save_strategy": "steps",
        # A tenth for full fine-tuning: https://thinkingmachines.ai/blog/lora
        "learning_rate": 2e-4 if lora else 2e-5,
        # QLoRA, https://arxiv.org/abs/2305.14314: double quantisation, 8-bit optimiser states that can leave the GPU
        **({"use_bnb_nested_quant": on("load_in_4bit"), "optim": "paged_adamw_8bit"} if quantised else {}),
    }


def _check_trackers(report_to: Sequence[str]) -> None:
    """Stop where a tracker is not installed; keep wandb on this machine where the hub is not to be asked either."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    for name in {"tensorboard", "trackio", "wandb"}.intersection(report_to):
        if find_spec(name) is None:
            raise RecipeError(
                f"report_to: {name} is not installed; pip install 'ma-sft[trackers]', or --report_to none"
            )
    if "wandb" in report_to and HF_HUB_OFFLINE:
        os.environ.setdefault("WANDB_MODE", "offline")


def read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise RecipeError(f"the config file {str(path)!r} does not exist")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold a mapping of settings, found {type(content).__name__}")
    return content


def nearest(key: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "; `ma-sft settings` lists them all"


def _check_value(key: str, value: Any, action: argparse.Action) -> None:
    """argparse checks neither the choices of a default nor, unless it is text, its type."""
    if value is None:
        return
    if action.choices is not None and value not in action.choices:
        raise RecipeError(f"{key}: one of {list(action.choices)} expected, found {value!r}")
    if action.type in (int, float) and action.nargs is None and not isinstance(value, str):
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not ok or (action.type is int and value != int(value)):
            raise RecipeError(f"{key}: {action.type.__name__} expected, found {value!r}")
