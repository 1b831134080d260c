"""A trained adapter on its base model, and both merged into one model."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import split_state_dict_into_shards_factory
from peft import PeftModel, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from ma_sft.errors import RecipeError, RunError, first_line
from ma_sft.hub import generation_config, load_pretrained, saved_folder
from ma_sft.labels.encoder import end_ids
from ma_sft.release.manifest import Weights, copy_processor, find_base, read_manifest, set_modes, write_manifest
from ma_sft.training.adapters import read_adapter_config, skeleton
from ma_sft.training.trainer import as_it_was
from ma_sft.utils import atomic_dir, must_be_new

SHARD_BYTES = 4 * 2**30
Update = Callable[[Tensor], Tensor]


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
        rounding: what rounding every merged weight once more changes a logit by, at most.
        agreement: share of positions at which both models choose the same token.
        how: the dtype in which both ran, or why they were not compared.
        note: what else the user should know, or "".
    """

    difference: float | None
    largest: float
    rounding: float
    agreement: float
    how: str
    note: str = ""

    @property
    def wrong(self) -> bool:
        """Whether the models differ by more than rounding, of the weights or of the arithmetic, can explain."""
        return self.difference is not None and not self.difference <= 8 * self.rounding + 1e-3 * self.largest

    def __str__(self) -> str:
        text = f"not compared with the adapter model: {self.how}"
        if self.difference is not None:
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
        RunError: the merged model does not say what the adapter says; nothing is left of it.
    """
    must_be_new(out)
    adapter = saved_folder(run, adapter=True)
    weights, config, tokenizer = find_base(adapter, base, code=code)
    kind: torch.dtype | None = getattr(torch, dtype) if dtype else None
    check_space(out, weights.size * kind.itemsize if kind else weights.nbytes)
    manifest = read_manifest(adapter)
    notes = []
    if manifest and (quantised := manifest["base_model"]["quantization"]):
        notes.append(f"trained on the base in {quantised}, merged into it as it was before")
    peft: Any = read_adapter_config(adapter)
    if peft.is_prompt_learning:
        raise RecipeError(f"{adapter}: {peft.peft_type.value} trains tokens before a sequence, and no weight has them")
    # Biases and raw parameters are PEFT's to merge, as are tensors that transformers makes of several as it loads them
    by_layer = peft.peft_type == "LORA" and peft.bias == "none" and not (peft.lora_bias or peft.target_parameters)
    updates = _layer_updates(adapter, config, code, weights) if by_layer else {}
    with atomic_dir(out) as target:
        if updates and {source for source, _ in updates.values()} <= set(weights.files):
            write_weights(weights, updates, kind, target)
        else:
            notes.append("merged with the whole model in memory, not layer by layer")
            whole = load_adapter(adapter, base, dtype=kind or "auto", code=code).merge_and_unload(safe_merge=True)
            ends = (whole.get_input_embeddings(), whole.get_output_embeddings())
            if ends[1] is not None and ends[0].weight.data_ptr() != ends[1].weight.data_ptr():
                _untie(config)
                _untie(whole.config)
            whole.save_pretrained(target)
        config.dtype = kind or config.dtype
        save_configs(config, weights.folder, tokenizer, target)
        if manifest:
            write_manifest(target, {**manifest, "kind": "model"})
        merged = _compare(adapter, base, target, tokenizer, weights.size, "; ".join(notes), code)
        if merged.wrong:
            raise RunError(f"the merged model is not what the adapter says, which is more than rounding: {merged}")
        return merged


# Tensor of the merged model -> the base's tensor that it is made of, and how.
Updates = dict[str, tuple[str, Update]]


def _layer_updates(adapter: Path, config: PreTrainedConfig, code: bool, weights: Weights) -> Updates:
    """What the adapter changes, by the names in the base's files. Where it parts a head from the embedding that it was
    tied to, `config` is untied.

    Raises:
        RecipeError: the adapter has layers that the model has not, or of other shapes.
    """
    found: dict[str, Update] = {}
    model, embedding, head, saved = _without_base(adapter, config, code, weights)
    tied_rows = False
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for part, value in module.modules_to_save["default"].named_parameters():
                found[f"{name}.{part}"] = lambda _, value=value: value.data  # type: ignore[misc]
        elif isinstance(module, TrainableTokensWrapper):
            if module.token_adapter.tied_adapter is None:
                found[f"{name}.weight"] = partial(_with_trained_rows, module.token_adapter)
            else:
                tied_rows = True
        elif isinstance(module, BaseTunerLayer) and not name.endswith(".token_adapter"):
            found[f"{name}.weight"] = partial(_merged_layer, adapter, module)
    updates = {name: (name, update) for name, update in found.items()}
    if config.tie_word_embeddings and head and not tied_rows and (embedding in found or head in found):
        for name in (embedding, head):  # both are made of the one matrix that the base has
            updates[name] = (embedding, found.get(name, lambda weight: weight))
        _untie(config)
    return {saved.get(name, name): (saved.get(source, source), update) for name, (source, update) in updates.items()}


def _saved_names(model: Any, weights: Weights) -> dict[str, str]:
    """Name in the model -> name in its files, of the tensors that transformers renames when it loads them."""
    transforms, there = get_model_conversion_mapping(model), model.state_dict()
    kinds: tuple[list[Any], list[Any]] = ([], [])
    for transform in transforms:
        kinds[isinstance(transform, WeightConverter)].append(transform)
    found = {name: rename_source_key(name, *kinds, model.base_model_prefix, there) for name in weights.files}
    return {new: name for name, (new, converter) in found.items() if converter is None}


def _untie(config: PreTrainedConfig) -> None:
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def _without_base(
    adapter: Path, config: PreTrainedConfig, code: bool, weights: Weights
) -> tuple[Any, str, str | None, dict[str, str]]:
    """The model with the adapter's weights in float32 and the base's on the meta device, where PEFT would put both;
    the names of the embedding's and the head's weight; and `_saved_names`."""
    other = f"{adapter} was trained on another model"
    saved = load_peft_weights(str(adapter), device="cpu")
    bare = skeleton(copy.deepcopy(config), code=code)  # which enters its own dtype
    names = {id(module): f"{name}.weight" for name, module in bare.named_modules()}
    embedding, head = names[id(bare.get_input_embeddings())], names.get(id(bare.get_output_embeddings()))
    in_files = _saved_names(bare, weights)
    # PEFT saves copies of a resized embedding, too, and never reads them
    left = {key for key in saved if "lora_" in key}
    try:
        model: Any = PeftModel(bare, read_adapter_config(adapter), low_cpu_mem_usage=True)
    except ValueError as error:
        raise RecipeError(f"{other}: {first_line(error)}") from None
    # PEFT's own loader would move them to where their layers are
    for name, empty in [*model.named_parameters(remove_duplicate=False)]:
        key = name.replace(".default", "").replace(".modules_to_save", "")
        key = key if key in saved else key.removesuffix(".weight")
        if key not in saved or ".base_layer." in name or ".original_module." in name:
            continue
        if saved[key].shape != empty.shape:
            raise RecipeError(
                f"{other}: {key} is {list(saved[key].shape)}, this base needs {list(empty.shape)}; "
                "pass the right base model with --base"
            )
        left.discard(key)
        set_module_tensor_to_device(model, name, "cpu", value=saved[key].float())
    if left:
        raise RecipeError(f"{other}: {min(left)} has no place in {config.model_type}")
    return model.base_model.model, embedding, head, in_files


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


def write_weights(weights: Weights, updates: Updates, kind: torch.dtype | None, folder: Path) -> None:
    """Write the base's tensors, merged where the adapter changes them, in their own dtype or `kind`.

    What is held at a time is one shard of at most `SHARD_BYTES`, and one tensor.
    """
    sources = {name: name for name in weights.files} | {name: source for name, (source, _) in updates.items()}
    opened = cache(lambda file: safe_open(weights.folder / file, framework="pt"))

    def made(name: str) -> Tensor:
        tensor: Tensor = opened(weights.files[sources[name]]).get_tensor(sources[name])  # type: ignore[no-untyped-call]
        dtype = kind if kind and tensor.is_floating_point() else tensor.dtype
        with torch.no_grad():
            return (updates[name][1](tensor.float()) if name in updates else tensor).to(dtype).contiguous()

    def nbytes(source: str) -> int:
        start, stop = weights.tensors[source].data_offsets
        return int(weights.tensors[source].parameter_count * kind.itemsize if kind else stop - start)

    split = split_state_dict_into_shards_factory(
        {name: nbytes(source) for name, source in sources.items()},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    total = 0
    for file, names in split.filename_to_tensors.items():
        shard = {name: made(name) for name in names}
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


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
        return Merged(None, 0, 0, 0, f"needs {size * 2.6 / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free", note)
    text = tokenizer("The merged model must say the same. 合并后的模型必须说同样的话。")["input_ids"]
    ids = torch.tensor([[*text, *range(len(tokenizer) - 4, len(tokenizer))]])  # new tokens are the last ones
    with torch.no_grad():
        ours = load_adapter(adapter, base, dtype=kind, code=code)(ids).logits.float()
        model = load_pretrained(AutoModelForCausalLM, str(merged), code=code, dtype=kind)
        theirs = model(ids).logits.float()
        saved = load_pretrained(AutoConfig, str(merged), code=code).dtype or torch.float32
        # An adapter may keep whole layers, as rounded as they were trained
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            kinds = {saved, kind, *(file.get_tensor(name).dtype for name in file.offset_keys())}
        eps = max(torch.finfo(each).eps for each in kinds if each.is_floating_point)
        for parameter in model.parameters():
            parameter.mul_(1 + (torch.rand_like(parameter) - 0.5) * eps)
        rounded = model(ids).logits.float()
    return Merged(
        (theirs - ours).abs().max().item(),
        ours.abs().max().item(),
        (rounded - theirs).abs().max().item(),
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
    copy_processor(source, target)
    config.save_pretrained(target)
    as_it_was(generation)
    generation.save_pretrained(target)
    tokenizer.save_pretrained(target)
    set_modes(target)


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
