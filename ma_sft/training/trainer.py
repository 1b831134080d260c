"""Labelled rows -> TRL's `SFTTrainer`."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ma_sft.errors import RecipeError
from ma_sft.recipe import Settings

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase
    from trl import SFTTrainer


def make_trainer(
    settings: Settings,
    tokenizer: "PreTrainedTokenizerBase",
    added_tokens: list[str],
    train: "Dataset | IterableDataset",
    held_out: "Dataset | IterableDataset | None",
) -> "SFTTrainer":
    """TRL's trainer on data that is labelled, cut and packed already: nothing is left for it to prepare.

    Packed rows carry `seq_lengths`; TRL's padding-free collator turns them into position ids that restart at each
    document, from which transformers keeps attention inside the documents.
    """
    from safetensors import SafetensorError
    from transformers import ProgressCallback
    from trl import get_quantization_config

    from ma_sft.hub import explain, model_folder
    from ma_sft.packing.view import as_arrays
    from ma_sft.training.adapters import (
        CHANGE_BASE,
        add_loraplus,
        check_targets,
        continue_adapter,
        freeze,
        keep_gradients,
        keep_initial,
        lora_config,
        model_skeleton,
        with_new_tokens,
    )
    from ma_sft.training.checkpoints import ResumableTrainer
    from ma_sft.training.processes import available_attention, fill_up
    from ma_sft.training.progress import TrainingBar

    training, model = settings.training, settings.model
    model.attn_implementation = available_attention(model.attn_implementation)
    packs = (training.packing or training.eval_packing) and training.packing_strategy != "wrapped"
    training.padding_free = training.padding_free or bool(packs)
    training.packing, training.max_length, training.chat_template_path = False, None, None
    training.dataset_kwargs = {**(training.dataset_kwargs or {}), "skip_prepare_dataset": True}
    training.assistant_only_loss = training.shuffle_dataset = False  # labels and order are made
    training.model_init_kwargs = {
        "use_safetensors": True,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    peft, quantization = lora_config(settings), get_quantization_config(model)
    if peft is not None:
        check_targets(model_skeleton(settings), peft)
    if quantization is not None and find_spec("bitsandbytes") is None:
        raise RecipeError("4-bit and 8-bit weights need bitsandbytes: pip install 'ma-sft[quant]'")
    if model.load_in_8bit:  # one line a layer and step on how its input is cast
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if not training.dataloader_drop_last:
        batch = training.world_size * training.per_device_train_batch_size
        train = fill_up(train, batch, tokenizer.pad_token_id)
    name, revision = str(model.model_name_or_path), model.model_revision
    folder = model_folder(name, revision, weights=True, code=training.trust_remote_code)
    try:
        trainer = ResumableTrainer(
            with_new_tokens(settings, added_tokens, tokenizer, peft) if added_tokens else str(folder),
            args=training,
            train_dataset=as_arrays(train),
            eval_dataset=as_arrays(held_out) if held_out else None,
            processing_class=tokenizer,
            quantization_config=None if added_tokens else quantization,
            peft_config=peft,
        )
    except (OSError, SafetensorError) as error:
        raise RecipeError(explain(error, name)) from None
    head = trainer.model.get_output_embeddings()
    if not hasattr(head, "bias"):  # PEFT's wrapper of a tied head with trained rows, whose bias TRL's loss asks for
        head.bias = None
    freeze(trainer.model, settings.adapter.freeze)
    keep_gradients(trainer.model)
    if settings.adapter.adapter_name_or_path:
        continue_adapter(trainer.model, Path(settings.adapter.adapter_name_or_path), tokenizer)
    if settings.adapter.loraplus_lr_ratio is not None:
        add_loraplus(trainer, settings.adapter.loraplus_lr_ratio)
    if peft is not None and str(peft.init_lora_weights).startswith(CHANGE_BASE) and training.process_index == 0:
        keep_initial(trainer.model, Path(training.output_dir) / "initial_adapter")
    if not training.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TrainingBar)
    return trainer
