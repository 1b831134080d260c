"""A trained adapter on its base model, and both merged into one model."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import set_module_tensor_to_device
from peft import PeftModel, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ma_sft.errors import RecipeError, first_line
from ma_sft.hub import generation_config, load_pretrained, model_folder, saved_folder
from ma_sft.release.manifest import read_manifest, write_manifest
from ma_sft.release.weights import Weights, read_tensors, read_weights, write_shards
from ma_sft.training.adapters import read_adapter_config, skeleton
from ma_sft.training.evaluation import end_ids
from ma_sft.training.trainer import as_it_was
from ma_sft.utils import atomic_dir, must_be_new


def find_base(
    adapter: Path, base: str | None = None, *, code: bool = False
) -> tuple[Weights, PreTrainedConfig, PreTrainedTokenizerBase]:
    """The base of an adapter, fit for it: weights, configuration, and the adapter's tokenizer.

    Raises:
        RecipeError: the base is missing, incomplete, quantised, or not the one that the adapter was trained on; the
            tokenizer has tokens without an embedding row.
    """
    peft = read_adapter_config(adapter)
    name = base or str(peft.base_model_name_or_path)
    revision = peft.revision if name == peft.base_model_name_or_path else None
    weights = read_weights(model_folder(name, revision, weights=True, code=code))
    config = load_pretrained(AutoConfig, name, revision, code=code)
    tokenizer = load_pretrained(AutoTokenizer, str(adapter), code=code)
    if quantised := getattr(config, "quantization_config", None):
        raise RecipeError(
            f"{weights.folder} is quantised ({quantised.get('quant_method', 'unknown method')}), and an adapter cannot "
            "be merged into it without loss; pass the 16-bit model that it was made from with --base"
        )
    manifest = read_manifest(adapter)
    if manifest and manifest["base_model"]["weights"] not in (None, weights.digest):
        raise RecipeError(
            f"{adapter} was trained on {manifest['base_model']['name_or_path']}, and {weights.folder} holds other "
            "weights; pass the right base model with --base"
        )
    if (more := len(tokenizer) - config.get_text_config().vocab_size) > 0:
        trained = getattr(peft, "trainable_token_indices", None) or getattr(peft, "modules_to_save", None)
        if not trained:
            raise RecipeError(
                f"the tokenizer of {adapter} has {more} tokens more than the embedding of {weights.folder} has rows, "
                "and the adapter did not train them; this is another model's tokenizer"
            )
        config.get_text_config().vocab_size = len(tokenizer)
    return weights, config, tokenizer


def load_adapter(
    adapter: Path, base: str | None = None, *, dtype: Any = "auto", device_map: Any = None, code: bool = False
) -> Any:
    """The adapter on its base model, in evaluation mode; errors as `find_base`'s."""
    weights, config, _ = find_base(adapter, base, code=code)
    model = load_pretrained(AutoModelForCausalLM, str(weights.folder), code=code, dtype=dtype, device_map=device_map)
    try:
        rows = config.get_text_config().vocab_size
        if rows > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(rows)
        return PeftModel.from_pretrained(model, adapter).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{adapter} does not fit {weights.folder}: {first_line(error)}") from None


@dataclass(frozen=True)
class Merged:
    """What a merge gave.

    Args:
        difference: largest absolute difference of a logit to the adapter model's; None if they were not compared.
        largest: largest absolute logit of the adapter model, to judge the difference by.
        agreement: share of positions at which both models choose the same token.
        how: the dtype in which both ran, or why they were not compared.
        note: what else the user should know, or "".
    """

    difference: float | None
    largest: float
    agreement: float
    how: str
    note: str = ""

    def __str__(self) -> str:
        if self.difference is None:
            text = f"not compared with the adapter model: {self.how}"
        else:
            text = (
                f"its logits differ from the adapter model's by at most {self.difference:.2g} of {self.largest:.3g}, "
                f"with the same first choice at {self.agreement:.1%} of positions, both in {self.how}"
            )
        return f"{text}; {self.note}" if self.note else text


def merge(run: Path, out: Path, *, base: str | None = None, dtype: str | None = None, code: bool = False) -> Merged:
    """Merge the adapter of `run` into its base model and save the whole model to `out`, without ever holding it whole.

    PEFT merges each layer by itself, in float32, on its way from the base's shards to the new ones. The tokenizer, its
    chat template, a generation config with the right end-of-turn ids and the manifest go along. An adapter that was
    trained on a quantised base is merged into the 16-bit base that it came from.

    Args:
        run: a run's folder, or an adapter's.
        out: appears whole or not at all.
        base: folder or hub id of the base model; None takes the one that the adapter names.
        dtype: of the merged weights (float32, bfloat16, float16); None keeps each of the base's.
        code: whether the base's own Python code may run.

    Raises:
        RecipeError: as `find_base`; no adapter in `run`, `out` exists, no space, or an adapter that does not fit.
    """
    must_be_new(out)
    adapter = saved_folder(run, adapter=True)
    weights, config, tokenizer = find_base(adapter, base, code=code)
    kind: torch.dtype | None = getattr(torch, dtype) if dtype else None
    check_space(out, sum(weights.sizes.values()) * kind.itemsize if kind else weights.nbytes)
    manifest = read_manifest(adapter)
    notes = []
    if manifest and manifest["base_model"]["quantization"]:
        notes.append(
            f"trained on the base in {manifest['base_model']['quantization']}, merged into it as it was before"
        )
    peft: Any = read_adapter_config(adapter)
    # Biases and raw parameters are PEFT's to merge, as are tensors that transformers renames when it loads them
    by_layer = peft.peft_type == "LORA" and peft.bias == "none" and not (peft.lora_bias or peft.target_parameters)
    updates = _layer_updates(adapter, config, code) if by_layer else {}
    with atomic_dir(out) as target:
        if updates and set(updates) <= set(weights.files):
            write_shards(merged_tensors(weights, updates, kind), target)
        else:
            notes.append("merged with the whole model in memory, not layer by layer")
            whole = load_adapter(adapter, base, dtype=kind or "auto", code=code).merge_and_unload(safe_merge=True)
            whole.save_pretrained(target)
        config.dtype = kind or config.dtype
        save_configs(config, weights.folder, tokenizer, target)
        if manifest:
            write_manifest(target, {**manifest, "kind": "model"})
        return _compare(adapter, base, target, tokenizer, sum(weights.sizes.values()), "; ".join(notes), code)


Update = Callable[[Tensor], Tensor]


def _layer_updates(adapter: Path, config: PreTrainedConfig, code: bool) -> dict[str, Update]:
    """For each tensor of the base that the adapter changes: its name, and the function that gives it merged.

    Raises:
        RecipeError: the adapter has layers that the model has not, or of other shapes.
    """
    updates: dict[str, Update] = {}
    for name, module in _without_base(adapter, config, code).named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for part, value in module.modules_to_save["default"].named_parameters():
                updates[f"{name}.{part}"] = lambda _, value=value: value.data  # type: ignore[misc]
        elif isinstance(module, TrainableTokensWrapper):
            if module.token_adapter.tied_adapter is None:
                updates[f"{name}.weight"] = partial(_with_trained_rows, module.token_adapter)
        elif isinstance(module, BaseTunerLayer) and not name.endswith(".token_adapter"):
            updates[f"{name}.weight"] = partial(_merged_layer, adapter, module)
    return updates


def _without_base(adapter: Path, config: PreTrainedConfig, code: bool) -> Any:
    """The model with the adapter's weights in float32, and the base's on the meta device, where PEFT would put both."""
    other = f"{adapter} was trained on another model"
    saved = load_peft_weights(str(adapter), device="cpu")
    left = dict.fromkeys(saved)
    try:
        model: Any = PeftModel(skeleton(config, code=code), read_adapter_config(adapter), low_cpu_mem_usage=True)
    except ValueError as error:
        raise RecipeError(f"{other}: {first_line(error)}") from None
    for name, empty in [*model.named_parameters(remove_duplicate=False)]:
        key = name.replace(".default", "").replace(".modules_to_save", "")
        key = key if key in saved else key.removesuffix(".weight")
        if key not in saved:
            continue
        if saved[key].shape != empty.shape:
            raise RecipeError(
                f"{other}: {key} is {list(saved[key].shape)}, this base needs {list(empty.shape)}; "
                "pass the right base model with --base"
            )
        left.pop(key, None)
        set_module_tensor_to_device(model, name, "cpu", value=saved[key].float())
    if left:
        raise RecipeError(f"{other}: {next(iter(left))} has no place in {config.model_type}")
    return model.base_model.model


def _merged_layer(adapter: Path, module: Any, weight: Tensor) -> Tensor:
    layer = module.get_base_layer()
    set_module_tensor_to_device(layer, "weight", "cpu", value=weight)
    try:
        module.merge(safe_merge=True)
    except ValueError as error:
        raise RecipeError(f"{adapter} cannot be merged: {first_line(error)}") from None
    merged: Tensor = layer.weight.data
    layer.weight = torch.nn.Parameter(merged.to("meta"))
    return merged


def _with_trained_rows(layer: Any, weight: Tensor) -> Tensor:
    more = layer.base_layer.weight.shape[0] - len(weight)
    weight = torch.cat([weight, weight.mean(0, keepdim=True).expand(max(more, 0), -1)])
    weight[layer.token_indices["default"]] = layer.trainable_tokens_delta["default"]
    return weight


def merged_tensors(weights: Weights, updates: dict[str, Update], dtype: Any) -> Iterator[tuple[str, Tensor]]:
    """The base's tensors one after the other, merged where the adapter changes them, in their own dtype or `dtype`."""
    with torch.no_grad():
        for name, tensor in read_tensors(weights):
            kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
            yield name, (updates[name](tensor.float()) if name in updates else tensor).to(kind)


def _compare(
    adapter: Path,
    base: str | None,
    merged: Path,
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    note: str,
    code: bool,
) -> Merged:
    """Run both models one after the other on the same text, in float32 if memory allows, else in their own dtype."""
    free = psutil.virtual_memory().available
    kind = next((kind for kind in (torch.float32, torch.bfloat16) if size * kind.itemsize * 1.3 < free), None)
    if kind is None:
        return Merged(None, 0, 0, f"needs {size * 2.6 / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free", note)
    ids = torch.tensor([tokenizer("The merged model must say the same. 合并后的模型必须说同样的话。")["input_ids"]])
    with torch.no_grad():
        ours = load_adapter(adapter, base, dtype=kind, code=code)(ids).logits.float()
        theirs = load_pretrained(AutoModelForCausalLM, str(merged), code=code, dtype=kind)(ids).logits.float()
    return Merged(
        (theirs - ours).abs().max().item(),
        ours.abs().max().item(),
        (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item(),
        str(kind).removeprefix("torch."),
        note,
    )


def save_configs(config: PreTrainedConfig, source: Path, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Save what belongs to a model beside its weights: configuration, tokenizer with chat template, end-of-turn ids."""
    generation = generation_config(str(source)) or GenerationConfig.from_model_config(config)
    generation.eos_token_id = end_ids(generation, tokenizer)
    generation.pad_token_id = tokenizer.pad_token_id
    for file in source.glob("*.py") if getattr(config, "auto_map", None) else []:  # the model's own code goes with it
        shutil.copyfile(file, target / file.name)
    config.save_pretrained(target)
    as_it_was(generation)
    generation.save_pretrained(target)
    tokenizer.save_pretrained(target)


def check_space(out: Path, nbytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        RecipeError: fewer than `nbytes` free bytes where `out` will be.
    """
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(there).free) < nbytes:
        raise RecipeError(
            f"{out} needs {nbytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; nothing written"
        )
