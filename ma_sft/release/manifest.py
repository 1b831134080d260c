"""`sft_manifest.json`: what the next stage (reward model, DPO, PPO) must agree with; saving and checking a model."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ma_sft.config import Settings, shown
from ma_sft.errors import MaSftError, RecipeError, first_line
from ma_sft.hub import generation_config, load_pretrained, model_folder, refuse_pickles, saved_folder, weight_files
from ma_sft.labels.encoder import ChatEncoder, end_ids
from ma_sft.labels.tokenize import describe_tokenizer, make_encoder
from ma_sft.utils import read_json, write_whole

if TYPE_CHECKING:
    from trl import SFTTrainer

    from ma_sft.training.prepare import Prepared

NAME = "sft_manifest.json"


def make_manifest(settings: Settings, tokenizer: PreTrainedTokenizerBase, data: "Prepared") -> dict[str, Any]:
    """The manifest of a run, but for what saving and evaluation add: `kind`, `end_of_turn_ids` and `metrics`."""
    model, training, labels = settings.model, settings.training, settings.labels
    nested = ", double" if model.use_bnb_nested_quant else ""
    bits4 = f"4-bit {model.bnb_4bit_quant_type}{nested}" if model.load_in_4bit else None
    other: Any = settings.adapter.quantization_config
    base = model_folder(str(model.model_name_or_path), model.model_revision, weights=True)
    return {
        "format": 1,
        "base_model": {
            "name_or_path": model.model_name_or_path,
            "revision": model.model_revision,
            "weights": read_weights(base).digest,
            "quantization": bits4 or ("8-bit" if model.load_in_8bit else other and other.get("quant_method", "bits")),
        },
        **describe_tokenizer(tokenizer, make_encoder(settings, tokenizer) if tokenizer.chat_template else None),
        "template_kwargs": labels.template_kwargs,
        "template_now": labels.template_now,
        "add_eos": labels.add_eos,
        "system_prompt": settings.rows.system_prompt,
        "mask_policy": {
            key: getattr(labels, key) for key in ("train_on", "history", "response_template", "instruction_template")
        },
        "data": {
            "digest": data.digest,
            "sources": shown(settings.rows.datasets or [settings.rows.dataset_name]),
            "packing": data.packing is not None,
            **asdict(data.counts),
        },
        "seed": training.seed,
        "versions": {
            name: version(name) for name in ("ma-sft", "torch", "transformers", "trl", "peft", "datasets", "tokenizers")
        },
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into a model's or adapter's folder, whole or not at all."""
    write_whole(folder / NAME, json.dumps(manifest, indent=2, ensure_ascii=False, default=str))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, None if it has none.

    Raises:
        RecipeError: a manifest that is broken or of a later format.
    """
    manifest = read_json(folder / NAME, None)
    if manifest is None:
        return None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != 1:
        raise RecipeError(
            f"{folder / NAME} has format {found}; a newer ma_sft wrote it (pip install -U ma-sft), or it is broken"
        )
    return dict(manifest)


def trained_encoder(tokenizer: PreTrainedTokenizerBase, manifest: dict[str, Any]) -> ChatEncoder:
    """The encoder with the template's variables and date that training had; a manifest may be empty."""
    options: Any = {key: manifest[key] for key in ("template_kwargs", "template_now", "add_eos") if key in manifest}
    return ChatEncoder(tokenizer, **options)


def save(trainer: "SFTTrainer", tokenizer: PreTrainedTokenizerBase, folder: Path, manifest: dict[str, Any]) -> None:
    """Save adapter or model with its manifest, under another name first; every process must call it."""
    from ma_sft.training.adapters import name_base

    model = trainer.accelerator.unwrap_model(trainer.model)
    model.generation_config.eos_token_id = manifest["end_of_turn_ids"] = end_ids(model.generation_config, tokenizer)
    manifest["kind"] = folder.name
    scratch = folder.with_name(f".{folder.name}")
    trainer.save_model(str(scratch))
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    if folder.name == "adapter":
        name_base(scratch, manifest["base_model"]["name_or_path"], manifest["base_model"]["revision"])
    else:
        copy_processor(Path(model.name_or_path), scratch)
    (scratch / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.json says the same
    write_manifest(scratch, manifest)
    set_modes(scratch)
    if folder.exists():  # the run was stopped between saving this and its end
        shutil.rmtree(folder)
    scratch.rename(folder)


def copy_processor(source: Path, target: Path) -> None:
    """Take along what a model of text and images needs beside its tokenizer."""
    for file in source.glob("*processor_config.json"):
        shutil.copyfile(file, target / file.name)


@dataclass(frozen=True)
class Weights:
    """The tensors of a model folder.

    Args:
        folder: where they lie.
        tensors: by name; mapped from their files, so that only what is looked at is read.
        digest: of names, shapes, dtypes and the first 4 KiB of every tensor: any fine-tune of a model differs.
    """

    folder: Path
    tensors: dict[str, Tensor]
    digest: str


def read_weights(folder: Path) -> Weights:
    """The weights of a folder, as they lie there; nothing is loaded.

    Raises:
        RecipeError: no safetensors, a shard that is missing, or a file that is cut off or broken.
    """
    names = weight_files(folder)
    if missing := [name for name in names if not (folder / name).is_file()]:
        refuse_pickles(str(folder), names, [path.name for path in folder.iterdir()])
        raise RecipeError(f"{folder} lacks {len(missing)} of {len(names)} files: {missing[0]}; get the whole model")
    tensors: dict[str, Tensor] = {}
    content = hashlib.sha256()
    for name in names:
        try:
            with safe_open(folder / name, "pt") as file:  # which holds the header against the file's length
                for key in sorted(file.keys()):
                    tensor = tensors[key] = file.get_tensor(key)
                    content.update(f"{key} {file.get_slice(key).get_dtype()} {[*tensor.shape]}".encode())
                    content.update(tensor.flatten().view(torch.uint8)[:4096].numpy())
        except SafetensorError as error:
            raise RecipeError(
                f"{folder / name} is no whole safetensors file: {first_line(error)}; get it again"
            ) from None
    return Weights(folder, tensors, content.hexdigest()[:32])


def set_modes(folder: Path) -> None:
    """Give weights, which safetensors writes for their owner alone, the mode that all other files have."""
    mode = next(path for path in folder.iterdir() if path.suffix == ".json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def find_base(
    adapter: Path, base: str | None = None, *, code: bool = False
) -> tuple[Weights, PreTrainedConfig, PreTrainedTokenizerBase]:
    """The base of an adapter, fit for it: weights, configuration, and the adapter's tokenizer.

    Raises:
        RecipeError: the base is missing, incomplete, quantised, or not the one that the adapter was trained on; the
            tokenizer has tokens without an embedding row.
    """
    from ma_sft.training.adapters import read_adapter_config

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


@dataclass(frozen=True)
class Finding:
    """One point of the check: what was compared, whether it agrees, and what was found."""

    what: str
    ok: bool
    text: str


def check_handoff(folder: Path, *, code: bool = False) -> list[Finding]:
    """Compare a saved model or adapter with its manifest, point by point; no weights are loaded.

    Raises:
        RecipeError: no model, or one without a manifest.
    """
    folder = saved_folder(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise RecipeError(f"{folder} has no {NAME}; models saved by `ma-sft train` and `ma-sft merge` have one")
    try:
        tokenizer = load_pretrained(AutoTokenizer, str(folder), code=code)
        encoder = trained_encoder(tokenizer, manifest) if tokenizer.chat_template else None
        described = describe_tokenizer(tokenizer, encoder)
    except ValueError as error:
        return [Finding("tokenizer", False, str(error))]
    ids = described.pop("probe")
    findings = [_compare(what.replace("_", " "), found, manifest[what]) for what, found in described.items()]
    text = f"{len(ids or [])} as when it was trained"
    if ids != manifest["probe"]:
        pairs = enumerate(zip(ids, manifest["probe"], strict=False))
        text = f"not those of training from id {next((i for i, (a, b) in pairs if a != b), 'the end')} on"
    findings.append(Finding("ids of a test conversation", ids == manifest["probe"], text))
    try:
        if manifest["kind"] == "adapter":
            weights, config, _ = find_base(folder, code=code)
            findings.append(Finding("base model", True, f"{weights.folder}, {weights.digest}"))
        else:
            weights, config = read_weights(folder), load_pretrained(AutoConfig, str(folder), code=code)
            nbytes = sum(tensor.nbytes for tensor in weights.tensors.values())
            found = f"{len(weights.tensors)} tensors, {nbytes / 1e9:.2f} GB"
            findings.append(Finding("weights", True, found))
        rows = config.get_text_config().vocab_size
        findings.append(Finding("embedding rows", rows >= len(tokenizer), f"{rows} for {len(tokenizer)} tokens"))
    except (MaSftError, OSError) as error:
        findings.append(Finding("weights", False, first_line(error)))
    if manifest["kind"] == "model":
        stops = end_ids(generation_config(str(folder)) or GenerationConfig(), tokenizer)
        findings.append(_compare("end-of-turn ids", sorted(stops), sorted(manifest["end_of_turn_ids"])))
    return findings


def _compare(what: str, found: Any, expected: Any) -> Finding:
    ok, shown = found == expected, _words(found)
    return Finding(what, ok, shown if ok else f"found {shown}, the manifest says {_words(expected)}")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
