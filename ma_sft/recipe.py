"""What a fine-tune is made of: data and settings. Every setting is a keyword, a flag and a YAML key alike.

The settings are those of TRL's `SFTConfig` and `ModelConfig` plus the dataclasses of `ma_sft.configs`, one a stage:
who knows `trl sft` knows our flags. Later wins: TRL's default, ours, the recipe, `--config file.yaml`, flags.
`ma_sft.settings` says what each accepts.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ma_sft.configs import STAGES, AdapterConfig, ExamConfig, LabelsConfig, RowsConfig, RunConfig
from ma_sft.errors import RecipeError, failed_in, one_line
from ma_sft.files import not_there, parse_yaml
from ma_sft.settings import PRESET, Chosen, Setting, nearest, settings_of

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig


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

    Any field of `ma_sft.configs`, TRL's `SFTConfig` or TRL's `ModelConfig` is a keyword. Sources may be paths,
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

    def resolve(self, args: Sequence[str] = ()) -> Settings:
        """Merge the recipe, `--config` files and flags into one mapping, and that into the stages' dataclasses.

        Raises:
            RecipeError: an unknown key (with the nearest right one), a wrong value, or a setting that would do
                nothing; also a package that a setting needs and this machine lacks.
            RunError: the launcher asks for what this machine has not.
        """
        from trl import TrlParser

        from ma_sft.launcher import check_installed, check_launch

        known = known_settings()
        flags = read_flags(args, known)
        files = {file: read_yaml(Path(file)) for file in flags.pop("config", [])}
        if flags.pop("allow_code", "false") != "true":
            for file, said in {**({str(self.file): self.settings} if self.file else {}), **files}.items():
                refuse_code(said, file)
        chosen = Chosen(known)
        for layer, said in enumerate([self.settings, *files.values(), flags]):
            chosen.add(layer, said)
        values = with_defaults(chosen, known)
        if not values["model_name_or_path"]:
            raise RecipeError("no model: set model_name_or_path to a hub id, a folder, or 'demo'")
        if not (values["dataset_name"] or values["datasets"]):
            raise RecipeError("no data: set dataset_name (one source) or datasets (several)")
        check_launch(values["use_cpu"])
        try:
            parsed = TrlParser(tuple(_stages().values())).parse_dict(values)
        except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
            raise RecipeError(one_line(error)) from error
        chosen.refuse_what_does_nothing(values)
        settings = Settings(*parsed, chosen=chosen.values)  # type: ignore[misc]  # mypy counts the unpacked ones as all
        _check_trackers(settings.training.report_to)
        check_installed(settings.training, settings.model, chosen.values)
        return settings


def _stages() -> dict[str, type]:
    from trl import ModelConfig, SFTConfig

    return {**STAGES, "training": SFTConfig, "model": ModelConfig}


def known_settings() -> dict[str, Setting]:
    """Every setting of a recipe by name: the fields of our dataclasses, and of TRL's."""
    return settings_of(_stages())


def all_settings() -> dict[str, dict[str, Any]]:
    """Every setting of a recipe: name -> `stage`, `class`, `help`, the `default` that holds here, and `choices`."""
    known = known_settings()
    defaults = with_defaults(Chosen(known), known)
    return {
        name: {
            "stage": what.stage,
            "class": what.kind,
            "help": what.help,
            "default": defaults[name],
            "choices": list(what.choices) or None,
        }
        for name, what in known.items()
    }


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
        if bool in what.kinds:
            parser.add_argument(*both, dest=name, nargs="?", const="true", help=help)
            no = (f"--no_{name}", f"--no-{name.replace('_', '-')}")
            parser.add_argument(*no, dest=name, action="store_const", const="false", help=argparse.SUPPRESS)
        else:
            parser.add_argument(*both, dest=name, nargs="+" if list in what.kinds else None, help=help)
    found, unknown = parser.parse_known_args(list(args))
    if unknown:
        flag = unknown[0].split("=")[0]
        raise RecipeError(f"unknown setting {flag!r}{nearest(flag.lstrip('-').replace('-', '_'), known)}")
    flags = vars(found)
    flags.pop("local_rank", None)  # the DeepSpeed launcher adds it
    for name, value in flags.items():
        if name in known and str in known[name].kinds and isinstance(value, list) and len(value) == 1:
            flags[name] = value[0]  # text may mean more than a list of it: optim_target_modules=all-linear
    return flags


def with_defaults(chosen: Chosen, known: Mapping[str, Setting]) -> dict[str, Any]:
    """All settings' values: TRL's default, ours (which may depend on the machine and on what was chosen), the chosen.

    Where we have a default of our own, null stands for it.
    """
    import torch

    from ma_sft.launcher import cpu_deepspeed, wants_gpu

    given = chosen.values.get
    name = given("name") or "sft"
    no_folder = name in (".", "..") or "/" in name or "\\" in name or name != name.encode(errors="ignore").decode()
    if not given("output_dir") and no_folder:
        raise RecipeError(f"name: found {name!r}, no name of a folder in runs/; set output_dir for another place")
    lora, quantised = given("use_peft"), given("load_in_4bit") or given("load_in_8bit")
    bf16 = given("bf16")
    if bf16 is None and not given("fp16"):
        if torch.cuda.is_available() and not given("use_cpu"):
            bf16 = torch.cuda.is_bf16_supported()
        else:  # transformers takes bf16 on a CPU only with use_cpu
            bf16 = torch.cpu._is_avx512_bf16_supported() and not wants_gpu() and given("use_cpu") is not False
    ours: dict[str, Any] = {
        **{key: accepted[0] for key, (accepted, _) in PRESET.items()},
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
        **({"use_bnb_nested_quant": bool(given("load_in_4bit")), "optim": "paged_adamw_8bit"} if quantised else {}),
    }
    set_by_hand = {key: value for key, value in chosen.values.items() if value is not None or key not in ours}
    values = {key: what.default for key, what in known.items()} | ours | set_by_hand
    full = values["full_learning_rate"]
    if full is not None and not lora and chosen.layer.get("learning_rate", 0) < chosen.flags:
        values["learning_rate"] = full
    return values


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
