"""Labelled rows -> TRL's `SFTTrainer`, and all that ma_sft knows of the inside of TRL and transformers.

Each use of a name that they do not document stands here with the reason for it; `tests/training/test_assumptions.py`
holds every one by name, so that a new release fails with the name of what changed. (`quantized.py` is the same for
bitsandbytes.)
"""

import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase, ProgressCallback
from trl import SFTTrainer, get_quantization_config

from ma_sft.data.functions import load_function
from ma_sft.errors import RecipeError, one_line
from ma_sft.hub import explain, generation_config, load_pretrained, model_folder
from ma_sft.labels.template_date import set_clock
from ma_sft.labels.templates import load_tokenizer
from ma_sft.packing.packs import as_arrays
from ma_sft.recipe import Recipe, Settings
from ma_sft.settings import shown
from ma_sft.terminal import no_bar_for_weights
from ma_sft.training import adapters, quantized
from ma_sft.training.prepare import prepare_once
from ma_sft.training.processes import available_attention, fill_up, once
from ma_sft.training.progress import TrainingBar

TRL_METRICS = ("loss", "mean_token_accuracy", "entropy", "num_tokens", "runtime")  # of an evaluation


def make_trainer(recipe: Recipe, args: Sequence[str] = (), **sft_trainer_arguments: Any) -> SFTTrainer:
    """TRL's trainer as the recipe says, with the recipe's rows labelled, proven and packed; call its `train`.

    Args:
        recipe: data and settings. What `sft_trainer_arguments` give need not be in it.
        args: flags that win over the recipe.
        **sft_trainer_arguments: `SFTTrainer`'s own, such as `callbacks`, `compute_metrics`, `compute_loss_func`,
            `optimizers`, `data_collator`. `model` is a model or a name, `peft_config` takes the place of the recipe's
            adapter, `processing_class` of its tokenizer. `train_dataset` and `eval_dataset` hold rows of any format
            that a source may have, or `input_ids` and `labels`, which are cut and packed as they are.

    Raises:
        MaSftError: anything wrong with settings, data or labels.
    """
    given = sft_trainer_arguments
    rows, test, tokenizer = (given.pop(name, None) for name in ("train_dataset", "eval_dataset", "processing_class"))
    settings = _settings_for(recipe, args, given, rows, test)
    added_tokens: list[str] = []
    if tokenizer is None:
        tokenizer, added_tokens = load_tokenizer(settings)
    else:
        set_clock(settings, tokenizer)
    settings.labels.template_now = once(lambda: settings.labels.template_now)
    data, held_out = prepare_once(settings, tokenizer, *(part if _is_labelled(part) else None for part in (rows, test)))
    return build_trainer(
        settings, tokenizer, added_tokens, data.dataset, held_out.dataset if held_out else None, **given
    )


def check_early(settings: Settings) -> None:
    """Find, before any row is read, what would end the run once all are prepared.

    Raises:
        RecipeError: an adapter, frozen layers or a quantisation that cannot be; a metric that does not exist.
    """
    if get_quantization_config(settings.model) is not None:
        quantized.check_installed()
    _check_model(settings)
    adapters.fitting_adapter(settings)
    if settings.adapter.freeze:
        adapters.freeze(adapters.model_skeleton(settings), settings.adapter.freeze)
    if settings.exam.metric != "exact-match":
        load_function(settings.exam.metric)
    best = (settings.training.metric_for_best_model or "loss").removeprefix("eval_")
    if best not in TRL_METRICS and not best.endswith("_loss"):
        raise RecipeError(f"metric_for_best_model: {best!r} is not measured; one of {', '.join(TRL_METRICS)}")


def _settings_for(recipe: Recipe, args: Sequence[str], given: dict[str, Any], rows: Any, test: Any) -> Settings:
    """The recipe resolved, with what is given as objects in the place of its model and sources."""
    own = dict(recipe.settings)
    if rows is not None:
        own |= {"dataset_name": None, "datasets": [rows], "dataset_streaming": isinstance(rows, IterableDataset)}
    if test is not None:
        own |= {"eval_dataset": [*test.values()] if isinstance(test, dict) else [test], "test_size": None}
    if isinstance(given.get("model"), str):
        own["model_name_or_path"] = given.pop("model")
    elif given.get("model") is not None:
        own["model_name_or_path"] = given["model"].name_or_path or "model"
    return Recipe(**own).resolve(args)


def _is_labelled(rows: Any) -> bool:
    return isinstance(rows, Dataset) and {"input_ids", "labels"} <= set(rows.column_names)


def build_trainer(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    added_tokens: list[str],
    train: Dataset | IterableDataset,
    held_out: Dataset | IterableDataset | None,
    **given: Any,
) -> "ResumableTrainer":
    """TRL's trainer on data that is labelled, cut and packed already: nothing is left for it to prepare.

    Packed rows carry `seq_lengths`; TRL's padding-free collator turns them into position ids that restart at each
    document, from which transformers keeps attention inside the documents.

    Args:
        given: arguments of `SFTTrainer` that win over the settings.

    Raises:
        RecipeError: a model that cannot be had, an adapter that does not fit it, settings that contradict each other.
    """
    training = settings.training
    _leave_nothing_to_prepare(settings)
    if given.get("data_collator") is not None and training.padding_free:
        raise RecipeError("data_collator: packed rows need TRL's own; leave one of packing and data_collator out")
    model, peft, quantization = _model(settings, given)
    if not training.dataloader_drop_last:
        batch = training.world_size * training.per_device_train_batch_size
        train = fill_up(train, batch, tokenizer.pad_token_id)
    try:
        if added_tokens:
            model = adapters.with_new_tokens(model, settings, added_tokens, tokenizer, peft)
            quantization = None
        with no_bar_for_weights():
            trainer = ResumableTrainer(
                model,
                args=training,
                train_dataset=as_arrays(train),
                eval_dataset=as_arrays(held_out) if held_out else None,
                processing_class=tokenizer,
                quantization_config=quantization,
                peft_config=peft,
                **given,
            )
        trainer.model.config.validate()  # as saving does, with what model_init_kwargs changed
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and not _of_the_model(error):
            raise
        if settings.chosen.get("model_init_kwargs") and not isinstance(error, OSError):
            raise RecipeError(f"model_init_kwargs: {one_line(error)}") from error
        raise RecipeError(explain(error, str(settings.model.model_name_or_path))) from error
    training.model_init_kwargs = shown(training.model_init_kwargs)  # trackers write down all arguments
    _finish_model(trainer, settings, tokenizer, peft)
    if settings.adapter.loraplus_lr_ratio is not None:
        if trainer.optimizer is not None:
            raise RecipeError("loraplus_lr_ratio makes an optimizer of its own; leave one of it and optimizers out")
        adapters.add_loraplus(trainer, settings.adapter.loraplus_lr_ratio)
    if not training.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TrainingBar)
    return trainer


def _check_model(settings: Settings) -> None:
    """See that the model writes text, and that its generation config can be read.

    Raises:
        RecipeError: it does not, or it cannot.
    """
    name, code = str(settings.model.model_name_or_path), settings.training.trust_remote_code
    folder = str(model_folder(name, settings.model.model_revision, code=code))
    generation_config(folder)
    config = load_pretrained(AutoConfig, folder, code=code)
    said = next(iter(config.architectures or []), None)
    kind = getattr(transformers, str(said), None)  # None of code of its own
    if said is None or (kind is not None and not kind.can_generate()):
        raise RecipeError(f"the model {name!r} is none that writes text: config.json gives {said} as its architecture")


def _of_the_model(error: BaseException) -> bool:
    """Whether an error was raised where TRL makes the model of its folder, or where its own config is looked at."""
    places = {"create_model_from_path", "validate_quantization_for_training", "validate"}
    return not isinstance(error, torch.OutOfMemoryError) and any(
        frame.name in places for frame in traceback.extract_tb(error.__traceback__)
    )


def _leave_nothing_to_prepare(settings: Settings) -> None:
    """Tell TRL of rows that are packed and cut already, and how the model is to be loaded."""
    training, model = settings.training, settings.model
    model.attn_implementation = available_attention(model.attn_implementation)
    packs = (training.packing or training.eval_packing) and training.packing_strategy != "wrapped"
    training.padding_free = training.padding_free or bool(packs)
    training.packing, training.max_length, training.chat_template_path = False, None, None
    training.dataset_kwargs = {**(training.dataset_kwargs or {}), "skip_prepare_dataset": True}
    training.assistant_only_loss = training.shuffle_dataset = False  # labels and order are made
    # The trainer would upload each checkpoint, and pickle the token into it; `release.publish` uploads once
    training.push_to_hub, training.hub_token = False, None
    training.model_init_kwargs = {
        "use_safetensors": True,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }


def _model(settings: Settings, given: dict[str, Any]) -> tuple[Any, PeftConfig | None, Any]:
    """(the model or its folder, the adapter's configuration, the quantisation), checked against each other."""
    own, peft = given.pop("model", None), given.pop("peft_config", None)
    quantization = get_quantization_config(settings.model)
    if quantization is not None:
        quantized.check_installed()
    if own is not None and hasattr(own, "peft_config"):  # an adapter of its own
        return own, None, None
    peft = adapters.fitting_adapter(settings, own, peft)
    if own is not None:
        settings.training.model_init_kwargs = None
        return own, peft, None
    name, revision = str(settings.model.model_name_or_path), settings.model.model_revision
    return str(model_folder(name, revision, weights=True, code=settings.training.trust_remote_code)), peft, quantization


def _finish_model(
    trainer: SFTTrainer, settings: Settings, tokenizer: PreTrainedTokenizerBase, peft: PeftConfig | None
) -> None:
    """What of the recipe concerns the model and its fresh adapter once TRL has made them."""
    model, adapter, training = trainer.model, settings.adapter, settings.training
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):  # PEFT's wrapper of a tied head with trained rows, whose bias TRL's loss asks for
        head.bias = None
    adapters.freeze(model, adapter.freeze)
    quantized.keep_gradients(model)
    if adapter.adapter_name_or_path:
        adapters.continue_adapter(model, Path(adapter.adapter_name_or_path), tokenizer)
    changes_base = str(getattr(peft, "init_lora_weights", "")).startswith(adapters.CHANGE_BASE)
    if changes_base and training.process_index == 0:
        adapters.keep_initial(model, Path(training.output_dir) / "initial_adapter")


def as_it_was(generation: GenerationConfig) -> None:
    """Let it be saved with what greedy decoding does not read (a temperature, a length penalty), as the base has it.

    transformers saves a configuration of which it says so only if nothing in it changed, and ours gets other end ids.
    """
    generation._original_object_hash = hash(generation)


class ResumableTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, which takes no step more when resumed after its last one, and names a full disk as such."""

    @property
    def tokens_seen(self) -> int:
        """The tokens computed so far, by TRL's own count (`num_tokens` of its logs), which a resume sets back to 0."""
        return int(self._total_train_tokens)

    @tokens_seen.setter
    def tokens_seen(self, count: int) -> None:
        self._total_train_tokens = count

    def label_sums(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Of a batch: the summed loss of its labels, how many are the model's first choice, and how many there are.

        They come from the head that TRL puts into the model, which never holds the logits of a whole batch.
        """
        out = model(**inputs, use_cache=False, fused_lm_head=True)
        return torch.stack([part.double().sum() for part in (-out.log_probs, out.is_top1, out.label_mask)])

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "labels" in inputs:  # rows keep them in 32 bits, and torch's losses take 64 alone
            inputs["labels"] = inputs["labels"].long()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers begins another epoch, and takes its first step, when a run is resumed after its last step
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _save(self, *args: Any, **kwargs: Any) -> None:
        as_it_was(self.accelerator.unwrap_model(self.model).generation_config)
        super()._save(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError:  # torch.save loses what the system said; ask it again
            with tempfile.TemporaryFile(dir=self.args.output_dir) as file:
                file.write(bytes(1 << 20))
                file.flush()
            raise
