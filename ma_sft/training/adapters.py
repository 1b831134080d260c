"""What is trained: LoRA and its kin through PEFT, or the model itself with layers frozen."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import peft
from accelerate import init_empty_weights
from peft import LoraConfig, PeftConfig, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from trl import get_peft_config

from ma_sft.config import Settings
from ma_sft.errors import RecipeError, first_line, one_line
from ma_sft.hub import explain, load_pretrained, model_class, refuse_pickles, saved_folder
from ma_sft.training.distributed import outside_zero3
from ma_sft.utils import write_whole

# `mini` is MA-RLHF's choice; LoRA (https://arxiv.org/abs/2106.09685) adapts attention;
# QLoRA (https://arxiv.org/abs/2305.14314) found that adapting every linear layer matters most.
PRESETS: dict[str, dict[str, Any]] = {
    "mini": {"lora_target_modules": ["q_proj", "v_proj"], "lora_r": 32, "lora_alpha": 8},
    "attention": {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "all-linear": {"lora_target_modules": "all-linear"},
}
# Initialisations for which PEFT wants calls of its own: a pass over data before training, or a conversion of what is
# saved, as they take a part of the base's weights into the adapter
NEED_CALLS = ("eva", "corda", "lora_ga", "pissa", "olora")


def lora_config(settings: Settings) -> PeftConfig | None:
    """The `peft.LoraConfig` of a recipe, None without `use_peft`; a field of `lora_config` wins, then the recipe's
    own keys, then the preset's. Of an adapter that is trained further, its own; of a `peft_config`, what it says.

    Raises:
        RecipeError: an unknown or wrong PEFT field.
    """
    model, adapter, chosen = settings.model, settings.adapter, settings.chosen
    if not model.use_peft:
        return None
    if adapter.adapter_name_or_path:
        if own := next((key for key in chosen if key.startswith(("lora_", "use_dora", "use_rslora"))), None):
            raise RecipeError(f"{own}: an adapter that is trained further has its own settings; remove it")
        saved = read_adapter_config(saved_folder(Path(adapter.adapter_name_or_path), adapter=True))
        saved.inference_mode = False
        return saved
    preset = {key: value for key, value in PRESETS[adapter.lora_preset].items() if chosen.get(key) is None}
    config = get_peft_config(replace(model, **preset))
    # TRL's parser makes a list of one name a text, which PEFT takes for a regular expression over full names
    if isinstance(config.target_modules, str) and re.fullmatch(r"[\w.]+", config.target_modules):
        config.target_modules = {config.target_modules}
    given, setting = cast(dict[str, Any], adapter.peft_config or adapter.lora_config or {}), "lora_config"
    base = {"peft_type": "LORA", **{f.name: getattr(config, f.name) for f in fields(config) if f.init}}
    if adapter.peft_config:
        setting, base = "peft_config", {"task_type": "CAUSAL_LM"}
        given = {**given, "peft_type": str(given.get("peft_type")).upper()}
    try:
        found: PeftConfig = peft.get_peft_config({**base, **given})
    except (TypeError, ValueError, ImportError, KeyError) as error:  # the last is an unknown peft_type
        raise RecipeError(f"{setting}: {type(error).__name__}: {one_line(error)}") from None
    if (init := str(getattr(found, "init_lora_weights", None))).startswith(NEED_CALLS):
        raise RecipeError(f"{setting}: init_lora_weights={init!r} needs calls of PEFT's own before or after training")
    return found


def parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those inside of it, such as a vision tower's."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from parts(value)


def from_config(config: PreTrainedConfig, *, code: bool = False, **kwargs: Any) -> Any:
    """The model of a configuration with random weights, of its `model_class`."""
    kind = model_class(config)
    if not hasattr(kind, "_from_config"):  # an auto class
        return kind.from_config(config, trust_remote_code=code, **kwargs)
    # Of a model of text and images, the class may be that of its text alone
    own = next((part for part in parts(config) if type(part) is kind.config_class), config)
    return kind._from_config(own, **kwargs)


def skeleton(
    config: PreTrainedConfig, dtype: Any = None, attn_implementation: str | None = None, *, code: bool = False
) -> Any:
    """The model of a configuration on the meta device: names, shapes and dtypes without a byte of weights."""
    with outside_zero3(), init_empty_weights():
        model = from_config(config, code=code, dtype=dtype, attn_implementation=attn_implementation)
    model.tie_weights()
    return model


def model_skeleton(settings: Settings) -> Any:
    """The skeleton of the recipe's model.

    Raises:
        RecipeError: no configuration there, or one that transformers does not know.
    """
    model, code = settings.model, settings.training.trust_remote_code
    config = load_pretrained(AutoConfig, str(model.model_name_or_path), model.model_revision, code=code)
    # Other attention comes from packages that this machine may lack; without weights it makes no difference
    attention = model.attn_implementation if model.attn_implementation in ("eager", "sdpa") else None
    try:
        return skeleton(config, config.dtype if model.dtype == "auto" else model.dtype, attention, code=code)
    except Exception as error:
        raise RecipeError(explain(error, str(model.model_name_or_path))) from None


def fitting_adapter(
    settings: Settings, model: PreTrainedModel | None = None, config: PeftConfig | None = None
) -> PeftConfig | None:
    """The recipe's adapter (or `config`) for a model, or for the recipe's; None without one. PEFT checks the rest.

    PEFT cannot drop out on fused experts of a mixture of experts: where the default adapter is on some, dropout is 0.

    Raises:
        RecipeError: as `lora_config`; a name that matches nothing in the model.
    """
    by_hand = config is not None or bool(settings.adapter.peft_config)
    by_hand = by_hand or "lora_dropout" in [*settings.chosen, *(settings.adapter.lora_config or ())]
    off = [name for name in ("packing", "padding_free", "eval_packing") if getattr(settings.training, name)]
    off += ["merge"] if settings.adapter.merge and config is None else []
    config = config or lora_config(settings)
    if config is None:
        return None
    if off and config.is_prompt_learning:
        what = f"{config.peft_type.value} trains tokens before a sequence: in no document of a pack, in no weight"
        raise RecipeError(f"peft_config: {what}; set {', '.join(f'{name}=false' for name in off)}")
    model = model if model is not None else model_skeleton(settings)
    if getattr(config, "target_modules", None) == "all-linear" and not config.exclude_modules:
        config.exclude_modules = _unfit(model, config)
    if config.base_model_name_or_path is None:  # else it was saved, with names that PEFT made
        _check_names(model, config)
    if isinstance(config, LoraConfig) and not by_hand:
        convert_peft_config_for_transformers(config, model, None)  # which names the experts, as PEFT will
        config.lora_dropout = 0.0 if config.target_parameters else config.lora_dropout
    return config


def _unfit(model: PreTrainedModel, config: PeftConfig) -> str | None:
    """A regular expression of what "all-linear" means and PEFT should leave alone, None without such.

    Routers and grouped projections are linear layers that compute something else than a product, which PEFT does not
    see; of Mamba's, whose kernels take the bare weight, it refuses some by name; and towers are never trained.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    special = {name.rpartition(".")[2] for name, layer in linear.items() if not _is_product(layer)}
    for name in {name.rpartition(".")[2] for name in linear}:
        try:
            _check_lora_target_modules_mamba(config, model, name)
        except ValueError:
            special.add(name)
    found = [rf".*\.{re.escape(name)}" for name in sorted(special)]
    found += [rf"{re.escape(tower)}(\..*)?" for tower in towers(model)]
    return "|".join(found) or None


def _is_product(layer: nn.Linear) -> bool:
    if type(layer).forward is nn.Linear.forward or not layer.weight.is_floating_point():  # the latter is quantised
        return True
    try:
        return bool(layer(layer.weight.new_empty(2, layer.in_features)).shape == (2, layer.out_features))
    except Exception:  # a class of its own that takes or gives something else
        return False


def towers(model: PreTrainedModel) -> list[str]:
    """The parts of a model of text and images through which no text goes: what is not trained there would stop DDP."""
    if model.config.get_text_config() is model.config:
        return []
    text = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    outside = (name for name, parameter in model.named_parameters() if id(parameter) not in text)
    return sorted({".".join(name.split(".")[:2]) for name in outside})


def _check_names(model: PreTrainedModel, config: PeftConfig) -> None:
    """Check that each name of a layer is one of the model's: where others match, PEFT leaves it out without a word.

    Raises:
        RecipeError: a name that matches nothing, with those that there are.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for key in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
        there, names = parameters if key == "target_parameters" else modules, getattr(config, key, None) or []
        for name in [] if isinstance(names, str) else sorted(names):
            if not any(found == name or found.endswith(f".{name}") for found in there):
                linear = {n.rpartition(".")[2] for n, each in modules.items() if isinstance(each, nn.Linear | Conv1D)}
                raise RecipeError(
                    f"{key}: {name!r} matches nothing in {type(model).__name__}; the linear layers are "
                    f"{', '.join(sorted(linear))}"
                )


def adapted_layers(model: nn.Module) -> str:
    """What the adapter is on: how many layers of each name, e.g. `28 x q_proj, 28 x experts.down_proj`."""
    counts: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            last = name.replace(".base_layer", "").rpartition(".")[2]
            parameter = getattr(module, "parameter_name", None)  # of a block of fused experts
            counts[f"{last}.{parameter}" if parameter else last] += 1
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Stop training the parameters whose name one of the regular expressions finds (`re.search`).

    Raises:
        RecipeError: a pattern that finds nothing.
    """
    names = dict(model.named_parameters())
    for pattern in patterns:
        found = [name for name in names if re.search(pattern, name)]
        if not found:
            shown = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in names})
            raise RecipeError(f"freeze: {pattern!r} finds no parameter; there are {', '.join(shown)}")
        for name in found:
            names[name].requires_grad_(False)


def continue_adapter(model: Any, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put a saved adapter's weights into the fresh one of the same configuration.

    Raises:
        RecipeError: the adapter does not fit the model, or was trained with another chat template.
    """
    adapter = saved_folder(folder, adapter=True)
    template, told = adapter / "chat_template.jinja", f"adapter_name_or_path: {adapter} was"
    if template.is_file() and template.read_text(encoding="utf-8") != tokenizer.chat_template:
        raise RecipeError(f"{told} trained with another chat template; set template: {template}")
    try:
        result = set_peft_model_state_dict(model, load_peft_weights(str(adapter), device="cpu"))
    except (RuntimeError, ValueError) as error:
        raise RecipeError(f"{told} made for another model: {first_line(error)}") from None
    # Beside layers' own weights, PEFT saves copies of the embedding and the head, which it never reads
    if unexpected := [key for key in result.unexpected_keys if "lora_" in key]:
        raise RecipeError(f"{told} made for another model, which has {unexpected[0]}")


def with_new_tokens(
    model: PreTrainedModel, added: list[str], tokenizer: PreTrainedTokenizerBase, peft: Any
) -> PreTrainedModel:
    """The model with embedding rows for new tokens, the mean of the old ones, which an adapter then trains.

    Only these rows are trained, not the whole matrix, unless the adapter saves it; a separate `lm_head` has to learn to
    write the tokens too, and TRL can only train it whole.

    Raises:
        RecipeError: an adapter that cannot train rows.
    """
    embedding: Any = model.get_input_embeddings()
    if len(tokenizer) > embedding.num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    if peft is not None:
        if not hasattr(peft, "trainable_token_indices"):
            raise RecipeError(
                f"the template adds the tokens {added}, which {peft.peft_type.value} cannot train; take LORA"
            )
        name = next(name for name, module in model.named_modules() if module is embedding).rpartition(".")[2]
        whole, tied = peft.modules_to_save or [], model.config.tie_word_embeddings
        if name not in whole:
            own = peft.trainable_token_indices or {}
            own = own if isinstance(own, dict) else {name: own}
            rows = {*own.get(name, ()), *map(tokenizer.convert_tokens_to_ids, added)}
            peft.trainable_token_indices = {**own, name: sorted(rows)}
        elif tied:
            peft.ensure_weight_tying = True
        if not tied and "lm_head" not in whole:
            peft.modules_to_save = [*whole, "lm_head"]
    return model


def name_base(adapter: Path, name: str, revision: str) -> None:
    """Let a saved adapter say where others find its base: id and commit on the hub, not this machine's cache."""
    path = adapter / "adapter_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["base_model_name_or_path"] != name:
        write_whole(path, json.dumps({**saved, "base_model_name_or_path": name, "revision": revision}, indent=2))


def read_adapter_config(adapter: Path) -> PeftConfig:
    """The configuration of a saved adapter.

    Raises:
        RecipeError: broken, with weights that are a pickle, or with fields that the installed PEFT does not know and
            would ignore.
    """
    path = adapter / "adapter_config.json"
    refuse_pickles(str(adapter), ["adapter_model.safetensors"], [file.name for file in adapter.iterdir()])
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[saved["peft_type"]])}
    except (ValueError, KeyError) as error:
        raise RecipeError(f"{path} is no adapter's configuration: {error!r}") from None
    if unknown := sorted(set(saved) - known):
        raise RecipeError(
            f"{adapter} was made by PEFT {saved.get('peft_version') or '(newer)'} and sets {', '.join(unknown)}, which "
            f"the installed PEFT {peft.__version__} does not know; pip install -U peft"
        )
    return peft.PeftConfig.from_pretrained(adapter)
