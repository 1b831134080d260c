"""A trained adapter on its base model, and both merged into one model."""

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from ma_sft.errors import RecipeError, RunError, first_line
from ma_sft.hub import generation_config, load_pretrained, saved_folder
from ma_sft.labels.encoder import end_ids
from ma_sft.release.manifest import (
    Weights,
    copy_processor,
    find_base,
    read_manifest,
    read_weights,
    set_modes,
    write_manifest,
)
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
    # To be merged; over several devices, where one chats, a weight may be elsewhere
    both = (model.get_input_embeddings(), model.get_output_embeddings()) if device_map is None else ()
    layers = {id(layer.weight): layer for layer in both if layer is not None}
    own = [layer.weight.detach().clone() for layer in layers.values()]
    try:
        rows = config.get_text_config().vocab_size
        if rows > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(rows, mean_resizing=False)  # the adapter has the new ones
        adapted = PeftModel.from_pretrained(model, adapter).eval()
        # PEFT saves an embedding that has grown or is adapted as it was trained beside, rounded to the training's dtype
        for layer, weight in zip(layers.values(), own, strict=True):
            layer.weight.data[: len(weight)] = weight
        return adapted
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{adapter} does not fit {weights.folder}: {first_line(error)}") from None


@dataclass(frozen=True)
class Merged:
    """What a merge gave.

    Args:
        how: the dtype in which both ran, or why they were not compared.
        difference: largest absolute difference of a logit to the adapter model's; None if they were not compared.
        largest: largest absolute logit of the adapter model, to judge the difference by.
        agreement: share of positions at which both models choose the same token.
        note: what else the user should know, or "".
    """

    how: str
    difference: float | None = None
    largest: float = 0.0
    agreement: float = 0.0
    note: str = ""

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
        RecipeError: as `find_base`; no adapter in `run`, `out` exists, or an adapter that does not fit.
        RunError: the merged model does not say what the adapter says; nothing is left of it.
    """
    must_be_new(out)
    adapter = saved_folder(run, adapter=True)
    weights, config, tokenizer = find_base(adapter, base, code=code)
    kind: torch.dtype | None = getattr(torch, dtype) if dtype else None
    manifest = read_manifest(adapter)
    notes = []
    if manifest and (quantised := manifest["base_model"]["quantization"]):
        notes.append(f"trained on the base in {quantised}, merged into it as it was before")
    peft: Any = read_adapter_config(adapter)
    if peft.is_prompt_learning:
        raise RecipeError(f"{adapter}: {peft.peft_type.value} trains tokens before a sequence, and no weight has them")
    # Biases and raw parameters are PEFT's to merge, as are tensors that transformers makes of several as it loads them
    by_layer = peft.peft_type == "LORA" and peft.bias == "none" and not (peft.lora_bias or peft.target_parameters)
    updates = _layer_updates(adapter, peft, config, code, weights.tensors) if by_layer else {}
    with atomic_dir(out) as target:
        if updates and updates.keys() <= weights.tensors.keys():
            write_weights(weights.tensors, updates, kind, target)
        else:
            notes.append("merged with the whole model in memory, not layer by layer")
            whole = _merged_in_memory(load_adapter(adapter, base, code=code), kind)
            embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
            if head is not None and not torch.equal(embedding.weight, head.weight):
                _untie(config)
                _untie(whole.config)
            whole.tie_weights()
            whole.to(kind or whole.dtype)
            whole.save_pretrained(target)
        config.dtype = kind or config.dtype
        save_configs(config, weights.folder, tokenizer, target)
        if manifest:
            write_manifest(target, {**manifest, "kind": "model"})
        return replace(_compare(adapter, base, weights, target, tokenizer, code), note="; ".join(notes))


def _layer_updates(
    adapter: Path, peft: PeftConfig, config: PreTrainedConfig, code: bool, tensors: dict[str, Tensor]
) -> dict[str, Update]:
    """What the adapter makes of the base's tensors, by their names in its files.

    Where it parts a head from the embedding that it was tied to, the head is among `tensors`, and `config` is untied.

    Raises:
        RecipeError: the adapter has layers that the model has not, or of other shapes.
    """
    bare = skeleton(copy.deepcopy(config), code=code)  # which enters its own dtype
    in_files = _saved_names(bare, tensors)
    embedding = bare.get_input_embeddings().weight
    tied = [name for name, parameter in bare.named_parameters(remove_duplicate=False) if parameter is embedding]
    # On the CPU, where PEFT then puts the adapter, too; each is one number, whatever its shape
    weights: dict[int, Any] = {id(p): torch.nn.Parameter(torch.zeros(()).expand(p.shape)) for p in bare.parameters()}
    try:
        model: Any = PeftModel(copy.deepcopy(bare, weights), peft, low_cpu_mem_usage=True)
        saved = {name: value.float() for name, value in load_peft_weights(str(adapter), device="cpu").items()}
        unknown = set_peft_model_state_dict(model, saved, low_cpu_mem_usage=True).unexpected_keys
        # PEFT saves copies of a resized embedding, too, and never reads them
        if unknown := [key for key in unknown if "lora_" in key]:
            raise ValueError(f"{unknown[0]} has no place in {config.model_type}")
    except (KeyError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[-1].strip()
        raise RecipeError(
            f"{adapter} was trained on another model: {why}; pass the right base model with --base"
        ) from None
    updates: dict[str, Update] = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for part, value in module.modules_to_save["default"].named_parameters():
                updates[f"{name}.{part}"] = lambda _, value=value: value.data  # type: ignore[misc]
        elif getattr(module, "tied_adapter", None):  # one matrix still, with rows trained in both places
            tied = []
        elif isinstance(module, BaseTunerLayer):
            updates[f"{name.removesuffix('.token_adapter')}.weight"] = partial(_merged_layer, module)
    if len(tied) > 1 and updates.keys() & tied:
        places = [in_files.get(name, name) for name in tied]
        tensors |= dict.fromkeys(places, next(tensors[place] for place in places if place in tensors))
        _untie(config)
    return {in_files.get(name, name): update for name, update in updates.items()}


def _saved_names(model: Any, files: Iterable[str]) -> dict[str, str]:
    """Name in the model -> name in its files, of the tensors that transformers renames when it loads them."""
    transforms, there = get_model_conversion_mapping(model), model.state_dict()
    kinds: tuple[list[Any], list[Any]] = ([], [])
    for transform in transforms:
        kinds[isinstance(transform, WeightConverter)].append(transform)
    found = {name: rename_source_key(name, *kinds, model.base_model_prefix, there) for name in files}
    return {new: name for name, (new, converter) in found.items() if converter is None}


def _untie(config: PreTrainedConfig) -> None:
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def _merged_layer(module: Any, weight: Tensor) -> Tensor:
    """The base's weight, with rows for new tokens where the layer has more, and what the adapter adds."""
    layer = module.get_base_layer()
    placeholder, more = layer.weight, layer.weight.shape[0] - len(weight)
    if more > 0:
        weight = torch.cat([weight, weight.mean(0, keepdim=True).expand(more, -1)])
    layer.weight = torch.nn.Parameter(weight)
    module.merge(safe_merge=True)
    merged: Tensor = layer.weight.data
    layer.weight = placeholder
    return merged


def write_weights(
    tensors: dict[str, Tensor], updates: dict[str, Update], kind: torch.dtype | None, folder: Path
) -> None:
    """Write tensors, changed by their updates, in their own dtype or `kind`; one shard of `SHARD_BYTES` is held."""
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.numel() * (kind or tensor.dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    total = 0
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            tensor = tensors[name]
            dtype = kind if kind and tensor.is_floating_point() else tensor.dtype
            with torch.no_grad():
                merged = updates[name](tensor.float()) if name in updates else tensor
            shard[name] = merged.to(dtype).contiguous()
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


@torch.no_grad()
def _merged_in_memory(model: Any, kind: torch.dtype | None = None) -> Any:
    """PEFT's model with the adapter in its weights: each layer is merged in float32, and then of `kind`, or its own.

    What is tied to a layer and has no adapter of its own (a head, mostly) stays as it was.
    """
    with warnings.catch_warnings(action="ignore"):  # PEFT finds the layers merged already
        wrappers: dict[Any, list[Any]] = {}  # of each layer: of fused experts one for each parameter
        for wrapper in model.modules():
            if isinstance(wrapper, BaseTunerLayer):
                wrappers.setdefault(wrapper.get_base_layer(), []).append(wrapper)
        for layer in wrappers:
            own = next(layer.parameters()).dtype
            for name, parameter in [*layer.named_parameters(recurse=False)]:
                setattr(layer, name, torch.nn.Parameter(parameter.to(torch.float32, copy=True)))
            for wrapper in wrappers[layer]:
                wrapper.merge(safe_merge=True)
            layer.to(kind or own)
        return model.merge_and_unload(safe_merge=True)


@torch.no_grad()
def _compare(
    adapter: Path, base: str | None, weights: Weights, out: Path, tokenizer: PreTrainedTokenizerBase, code: bool
) -> Merged:
    """Hold the files of a merged model against the adapter model.

    PEFT merges the adapter once more, in memory, and in float32 the logits before and after it are the same; each
    weight in the files is then the one in memory, rounded once to the files' dtype. Logits of the files' weights would
    prove less: rounding may send a token to another expert, and hides a small adapter. Where memory is short the model
    in memory has the base's dtype, whose arithmetic hides what merging changes: then weights alone are compared.
    """
    files, free = [*read_weights(out).tensors.values()], psutil.virtual_memory().available
    count, nbytes = sum(tensor.numel() for tensor in files), sum(tensor.nbytes for tensor in files)
    own = sum(tensor.nbytes for tensor in weights.tensors.values())
    sizes: dict[Any, float] = {torch.float32: 1.2 * (4 * count + nbytes), "auto": 1.2 * (own + nbytes)}
    kind = next((kind for kind, size in sizes.items() if size < free), None)
    if kind is None:
        return Merged(f"needs {sizes['auto'] / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free")
    text = tokenizer("The merged model must say the same. 合并后的模型必须说同样的话。")["input_ids"]
    ids = torch.tensor([[*text, *range(len(tokenizer) - 4, len(tokenizer))]])  # new tokens are the last ones
    model = load_adapter(adapter, base, dtype=kind, code=code)
    ours = model(ids).logits.float()
    largest = ours.abs().max().item()
    model = _merged_in_memory(model)
    apart = (model(ids).logits.float() - ours).abs().max().item()
    merged = load_pretrained(AutoModelForCausalLM, str(out), code=code, dtype="auto")
    kinds = {tensor.dtype for tensor in (*files, *model.parameters()) if tensor.is_floating_point()}
    eps = max(torch.finfo(each).eps for each in kinds)
    there = model.state_dict()
    wrong = [
        f"{name} in its files"
        for name, value in merged.state_dict().items()
        if name not in there or not _is_rounded(value, there[name], eps)
    ]
    if kind == torch.float32 and not apart <= 1e-3 * largest:
        wrong = [f"PEFT's merge changes logits by {apart:.2g} of {largest:.3g}"]
    if wrong:
        raise RunError(f"the merged model is not what the adapter says, which is more than rounding: {wrong[0]}")
    theirs = merged.to(model.dtype)(ids).logits.float()
    return Merged(
        str(model.dtype).removeprefix("torch."),
        difference=(theirs - ours).abs().max().item(),
        largest=largest,
        agreement=(theirs.argmax(-1) == ours.argmax(-1)).float().mean().item(),
    )


def _is_rounded(value: Tensor, exact: Tensor, eps: float) -> bool:
    """Whether a tensor is another one, rounded once to a dtype of this precision; both come from float32."""
    if value.shape != exact.shape:
        return False
    exact = exact.float()
    arithmetic, size = 8 * torch.finfo(torch.float32).eps, exact.norm() / exact.numel() ** 0.5
    smallest = 6e-8  # step of float16 near 0
    allowed = exact.abs().mul_(eps + arithmetic).add_(arithmetic * size + smallest)
    return bool((value.float().sub(exact).abs_() <= allowed).all())


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
