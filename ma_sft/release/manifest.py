"""`sft_manifest.json`: what the next stage (reward model, DPO, PPO) must agree with; checking a folder against it."""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ma_sft.config import Settings, shown
from ma_sft.errors import RecipeError
from ma_sft.hub import model_folder
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.labels.fingerprint import describe_tokenizer
from ma_sft.labels.tokenize import make_encoder
from ma_sft.release.weights import read_weights
from ma_sft.training.prepare import Prepared
from ma_sft.utils import write_whole

NAME = "sft_manifest.json"


def make_manifest(settings: Settings, tokenizer: PreTrainedTokenizerBase, data: Prepared) -> dict[str, Any]:
    """The manifest of a run, but for what saving and evaluation add: `kind`, `end_of_turn_ids` and `metrics`."""
    model, training, labels = settings.model, settings.training, settings.labels
    quantization = None
    if model.load_in_4bit:
        quantization = f"4-bit {model.bnb_4bit_quant_type}" + (", double" if model.use_bnb_nested_quant else "")
    elif model.load_in_8bit:
        quantization = "8-bit"
    base = model_folder(str(model.model_name_or_path), model.model_revision, weights=True)
    return {
        "format": 1,
        "base_model": {
            "name_or_path": model.model_name_or_path,
            "revision": model.model_revision,
            "weights": read_weights(base).digest,
            "quantization": quantization,
        },
        **describe_tokenizer(tokenizer, make_encoder(settings, tokenizer) if tokenizer.chat_template else None),
        "template_kwargs": labels.template_kwargs,
        "template_now": labels.template_now,
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
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] == 1:
            return dict(manifest)
    except (ValueError, KeyError, TypeError):
        raise RecipeError(f"{path} is broken; train or merge again") from None
    raise RecipeError(f"{path} has format {manifest['format']}, written by a newer ma_sft; pip install -U ma-sft")


def trained_encoder(tokenizer: PreTrainedTokenizerBase, manifest: dict[str, Any]) -> ChatEncoder:
    """The encoder with the template's variables and date that training had; a manifest may be empty."""
    kwargs = manifest.get("template_kwargs")
    kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
    return ChatEncoder(tokenizer, template_kwargs=kwargs, template_now=manifest.get("template_now"))
