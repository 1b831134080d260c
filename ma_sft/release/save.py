"""A trained model or adapter -> a folder of the run that is whole or not there."""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from ma_sft.release.manifest import write_manifest
from ma_sft.training.adapters import name_base, save_converted
from ma_sft.training.evaluation import end_ids


def save(trainer: SFTTrainer, tokenizer: PreTrainedTokenizerBase, folder: Path, manifest: dict[str, Any]) -> None:
    """Save adapter or model with its manifest, under another name first; every process must call it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.generation_config.eos_token_id = manifest["end_of_turn_ids"] = end_ids(model.generation_config, tokenizer)
    manifest["kind"] = folder.name
    scratch = folder.with_name(f".{folder.name}")
    trainer.save_model(str(scratch))
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    save_converted(model, scratch, folder.with_name("initial_adapter"))
    if folder.name == "adapter":
        name_base(scratch, manifest["base_model"]["name_or_path"], manifest["base_model"]["revision"])
    (scratch / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.json says the same
    write_manifest(scratch, manifest)
    if folder.exists():  # the run was stopped between saving this and its end
        shutil.rmtree(folder)
    scratch.rename(folder)
