"""A saved model held against its manifest, before the next stage builds on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from ma_sft.errors import MaSftError, RecipeError, first_line
from ma_sft.hub import generation_config, load_pretrained, saved_folder
from ma_sft.labels.fingerprint import describe_tokenizer
from ma_sft.release.manifest import NAME, read_manifest, trained_encoder
from ma_sft.release.merge import find_base
from ma_sft.release.weights import read_weights
from ma_sft.training.evaluation import end_ids


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
        findings = _tokenizer(tokenizer, manifest)
    except ValueError as error:
        return [Finding("tokenizer", False, str(error))]
    findings += _weights(folder, manifest, len(tokenizer), code)
    if manifest["kind"] == "model":
        stops = end_ids(generation_config(str(folder)) or GenerationConfig(), tokenizer)
        findings.append(_compare("end-of-turn ids", sorted(stops), sorted(manifest["end_of_turn_ids"])))
    return findings


def _compare(what: str, found: Any, expected: Any) -> Finding:
    ok = found == expected
    return Finding(what, ok, f"{found}" if ok else f"found {found}, the manifest says {expected}")


def _tokenizer(tokenizer: Any, manifest: dict[str, Any]) -> list[Finding]:
    encoder = trained_encoder(tokenizer, manifest) if tokenizer.chat_template else None
    described = describe_tokenizer(tokenizer, encoder)
    ids, expected = described.pop("probe"), manifest["probe"]
    findings = [_compare(what.replace("_", " "), found, manifest[what]) for what, found in described.items()]
    text = f"{len(ids or [])} as when it was trained"
    if ids != expected:
        at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), "the end")
        text = f"not those of training from id {at} on"
    return [*findings, Finding("ids of a test conversation", ids == expected, text)]


def _weights(folder: Path, manifest: dict[str, Any], tokens: int, code: bool) -> list[Finding]:
    try:
        if manifest["kind"] == "adapter":
            weights, config, _ = find_base(folder, code=code)
            found = Finding("base model", True, f"{weights.folder}, {weights.digest}")
        else:
            weights = read_weights(folder)
            found = Finding("weights", True, f"{len(weights.files)} tensors, {weights.nbytes / 1e9:.2f} GB")
            config = load_pretrained(AutoConfig, str(folder), code=code)
    except (MaSftError, OSError) as error:
        return [Finding("weights", False, first_line(error))]
    rows = config.get_text_config().vocab_size
    return [found, Finding("embedding rows", rows >= tokens, f"{rows} for {tokens} tokens")]
