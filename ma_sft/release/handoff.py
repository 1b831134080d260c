"""A saved model held against its manifest, before the next stage builds on it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ma_sft.errors import MaSftError, RecipeError, first_line
from ma_sft.hub import load_pretrained
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.labels.fingerprint import describe_tokenizer
from ma_sft.release.manifest import NAME, model_folder, read_manifest
from ma_sft.release.weights import read_weights


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
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from ma_sft.release.merge import find_base
    from ma_sft.training.exam import end_ids

    folder = model_folder(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise RecipeError(f"{folder} has no {NAME}; models saved by `ma-sft train` and `ma-sft merge` have one")
    findings: list[Finding] = []

    def compare(what: str, found: Any, expected: Any) -> None:
        ok = found == expected
        findings.append(Finding(what, ok, f"{found}" if ok else f"found {found}, the manifest says {expected}"))

    try:
        tokenizer = load_pretrained(AutoTokenizer, str(folder), code=code)
        kwargs = manifest["template_kwargs"]
        kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
        now, templated = manifest.get("template_now"), tokenizer.chat_template
        encoder = ChatEncoder(tokenizer, template_kwargs=kwargs, template_now=now) if templated else None
        for what, found in describe_tokenizer(tokenizer, encoder).items():
            if what != "probe":
                compare(what.replace("_", " "), found, manifest[what])
            elif found == manifest[what]:
                findings.append(
                    Finding("ids of a test conversation", True, f"{len(found or [])} as when it was trained")
                )
            else:
                at = next((i for i, (a, b) in enumerate(zip(found, manifest[what], strict=False)) if a != b), "the end")
                findings.append(Finding("ids of a test conversation", False, f"not those of training from id {at} on"))
    except ValueError as error:
        findings.append(Finding("tokenizer", False, str(error)))
        return findings
    rows = None
    try:
        if manifest["kind"] == "adapter":
            weights, config, _ = find_base(folder, code=code)
            findings.append(Finding("base model", True, f"{weights.folder}, {weights.digest}"))
        else:
            read = read_weights(folder)
            findings.append(Finding("weights", True, f"{len(read.files)} tensors, {read.nbytes / 1e9:.2f} GB"))
            config = load_pretrained(AutoConfig, str(folder), code=code)
        rows = config.get_text_config().vocab_size
    except (MaSftError, OSError) as error:
        findings.append(Finding("weights", False, first_line(error)))
    if rows is not None:
        enough = rows >= len(tokenizer)
        findings.append(Finding("embedding rows", enough, f"{rows} for {len(tokenizer)} tokens"))
    if manifest["kind"] == "model":
        stops = end_ids(GenerationConfig.from_pretrained(folder), tokenizer)
        compare("end-of-turn ids", sorted(stops), sorted(manifest["end_of_turn_ids"]))
    return findings
