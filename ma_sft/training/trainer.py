"""Labelled rows -> TRL's `SFTTrainer`, and all that ma_sft knows of the inside of TRL and transformers.

Each use of a name that they do not document stands here with the reason for it; `tests/training/test_assumptions.py`
holds every one by name, so that a new release fails with the name of what changed. (`quantized.py` is the same for
bitsandbytes.)
"""

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import RandomSampler
from transformers import (
    AutoConfig,
    EarlyStoppingCallback,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    set_seed,
)
from trl import SFTConfig, SFTTrainer
from trl.models import enable_selective_activation_checkpointing
from trl.trainer import utils as trl_utils

from ma_sft.config import Recipe, Settings
from ma_sft.data.functions import load_function
from ma_sft.data.load import Source
from ma_sft.errors import RecipeError, one_line
from ma_sft.hub import explain, load_pretrained, model_folder
from ma_sft.labels.templates import load_tokenizer
from ma_sft.packing.pack import as_arrays
from ma_sft.training import adapters, quantized
from ma_sft.training.checkpoints import JsonlLogger, StopEvaluation, tokens_before, with_date
from ma_sft.training.distributed import PaddedSampler, available_attention, fill_up, gather
from ma_sft.training.optimizers import own_optimizer
from ma_sft.training.prepare import prepare_once

MEASURED = ("loss", "mean_token_accuracy", "entropy")  # of held-out rows, each over all of their labels


def make_trainer(recipe: Recipe, args: Sequence[str] = (), **sft_trainer_arguments: Any) -> SFTTrainer:
    """TRL's trainer as the recipe says, with the recipe's rows labelled, proven and packed; call its `train`.

    Args:
        recipe: data and settings. What `sft_trainer_arguments` give need not be in it.
        args: flags that win over the recipe.
        **sft_trainer_arguments: `SFTTrainer`'s own, such as `callbacks`, `compute_metrics`, `compute_loss_func`,
            `optimizers`, `data_collator`. `model` is a model or a name, `peft_config` takes the place of the recipe's
            adapter, `processing_class` of its tokenizer. `train_dataset` and `eval_dataset` hold rows of any format
            that a source may have, or `input_ids` and `labels`, which are cut and packed as they are; a mapping of
            held-out data sets keeps its names (`eval_NAME_loss`).

    Raises:
        MaSftError: anything wrong with settings, data or labels.
        ValueError: TRL's, of arguments that do not go together.
    """
    given = sft_trainer_arguments
    rows, test, tokenizer = (given.pop(name, None) for name in ("train_dataset", "eval_dataset", "processing_class"))
    settings = _settings_for(recipe, args, given, rows, test)
    settings = replace(settings, evaluation=replace(settings.evaluation, generate_eval=0))  # answers are `run`'s
    added_tokens: list[str] = []
    if tokenizer is None:
        tokenizer, added_tokens = load_tokenizer(settings)
    settings = with_date(settings, tokenizer)
    parts = test if isinstance(test, dict) else {"held-out": test}
    labelled = parts if all(map(_is_labelled, parts.values())) else None
    data, held_out = prepare_once(settings, tokenizer, rows if _is_labelled(rows) else None, labelled)
    tests = held_out.by_source([*test] if isinstance(test, dict) else None) if held_out else None
    trainer = build_trainer(settings, tokenizer, added_tokens, data.dataset, tests, **given)
    for callback in (JsonlLogger(), *early_stopping(settings)):
        trainer.add_callback(callback)
    return trainer


def early_stopping(settings: Settings) -> list[TrainerCallback]:
    """What stops the run by its evaluations, to be added behind what measures them."""
    patience = settings.evaluation.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(patience)]


def _settings_for(recipe: Recipe, args: Sequence[str], given: dict[str, Any], rows: Any, test: Any) -> Settings:
    """The recipe resolved, with what is given as objects in the place of its model and sources."""
    own = dict(recipe.settings)
    if rows is not None:
        own |= {"dataset_name": None, "datasets": [rows], "dataset_streaming": isinstance(rows, IterableDataset)}
    if test is not None:
        sources = [Source(name, rows=part) for name, part in test.items()] if isinstance(test, dict) else [test]
        own |= {"eval_dataset": sources, "test_size": None}
    if isinstance(given.get("model"), str):
        own["model_name_or_path"] = given.pop("model")
    elif given.get("model") is not None:
        own["model_name_or_path"] = given["model"].name_or_path or "model"
    return Recipe(**own).resolve(args)


def _is_labelled(rows: Any) -> bool:
    return isinstance(rows, Dataset) and {"input_ids", "labels"} <= set(rows.column_names)


def check_early(settings: Settings) -> None:
    """Find, before any row is read, what would end the run once all are prepared, and what no rehearsal can find.

    Raises:
        RecipeError: a model that does not write text, a quantisation or a metric that cannot be.
    """
    name, code = str(settings.model.model_name_or_path), settings.training.trust_remote_code
    folder = str(model_folder(name, settings.model.model_revision, code=code))
    config = load_pretrained(AutoConfig, folder, code=code)
    quantized.quantization(settings, getattr(config, "quantization_config", None))
    architecture = next(iter(config.architectures or []), None)
    kind = getattr(transformers, str(architecture), None)  # None of code of its own
    if architecture is None or (kind is not None and not kind.can_generate()):
        raise RecipeError(f"{name!r} is no model that writes text: config.json gives the architecture {architecture}")
    if settings.evaluation.metric != "exact-match":
        load_function(settings.evaluation.metric)
    # The first evaluation tells which figures there are of each data set
    best, known = settings.training.metric_for_best_model or "loss", (*MEASURED, "objective", "exact_match", "score")
    if not best.endswith(known):
        raise RecipeError(f"metric_for_best_model: {best!r} is not measured; one of {', '.join(known)}")


def build_trainer(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    added_tokens: list[str],
    train: Dataset | IterableDataset,
    held_out: Dataset | IterableDataset | dict[str, Dataset] | None,
    **given: Any,
) -> "ResumableTrainer":
    """TRL's trainer on data that is labelled, cut and packed already: nothing is left for it to prepare.

    Packed rows carry `seq_lengths`; TRL's padding-free collator turns them into position ids that restart at each
    document, from which transformers keeps attention inside the documents. Progress is shown by `JsonlLogger` alone,
    which is not among its callbacks yet.

    Args:
        held_out: rows, or the rows of each source by name.
        given: arguments of `SFTTrainer` that win over the settings.

    Raises:
        RecipeError: a model that cannot be had, an adapter that does not fit it, settings that contradict each other.
    """
    args = trl_arguments(settings)
    model, peft = given.pop("model", None), given.pop("peft_config", None)
    own_model = model is not None
    if not hasattr(model, "peft_config"):  # TRL refuses a second adapter
        peft = adapters.fitting_adapter(settings, model, peft)
    if model is None:
        model = load_model(settings, args, frugal=not added_tokens)
    if added_tokens:
        model = adapters.with_new_tokens(model, added_tokens, tokenizer, peft)
    if (args.gradient_checkpointing_kwargs or {}).get("selective"):
        # TRL does so to the adapter's model, whose base alone transformers then asks to checkpoint
        enable_selective_activation_checkpointing(model)
    if optimizer := own_optimizer(settings):
        given.setdefault("optimizer_cls_and_kwargs", optimizer)
    trainer = ResumableTrainer(
        model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft,
        **given,
    )
    if peft is not None and added_tokens and not own_model:
        # All that an embedding has gained is trained, and PEFT would save the whole of it, and of the head, beside that
        trainer.model.save_pretrained = functools.partial(trainer.model.save_pretrained, save_embedding_layers=False)
    _finish_model(trainer, settings, tokenizer, peft)
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    return trainer


def trl_arguments(settings: Settings) -> SFTConfig:
    """A copy of the recipe's `SFTConfig` that tells TRL of rows which are packed and cut already.

    `packing` stays: TRL prepares nothing, but refuses what packs do not go with, such as context parallelism.
    """
    args = copy.copy(settings.training)
    packs = (args.packing or args.eval_packing) and args.packing_strategy != "wrapped"
    args.padding_free = args.padding_free or bool(packs)
    args.max_length = args.chat_template_path = args.model_init_kwargs = None
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    args.assistant_only_loss = args.shuffle_dataset = False  # labels and order are made
    args.restore_callback_states_from_checkpoint = True  # early stopping keeps its patience
    # The trainer would upload each checkpoint, and pickle the token into it; `release.publish` uploads once
    args.push_to_hub, args.hub_token = False, None
    return args


def load_model(settings: Settings, args: SFTConfig, *, frugal: bool) -> Any:
    """The recipe's model with its weights, as TRL loads it.

    Args:
        frugal: whether it may be spread over devices while it is loaded; one that will grow must be whole.

    Raises:
        RecipeError: weights that cannot be had or read, or options of its class that it does not take.
    """
    model, code = settings.model, settings.training.trust_remote_code
    folder = str(model_folder(str(model.model_name_or_path), model.model_revision, weights=True, code=code))
    own = settings.training.model_init_kwargs or {}
    kwargs: dict[str, Any] = {"use_safetensors": True, "dtype": model.dtype, "trust_remote_code": code}
    kwargs |= {"attn_implementation": available_attention(model.attn_implementation), **own}
    if (quantization := quantized.quantization(settings)) is not None:
        kwargs["quantization_config"] = quantization
    if not frugal or args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    set_seed(args.seed)
    try:
        loaded = trl_utils.create_model_from_path(folder, **kwargs)
        loaded.config.validate()  # as saving does, with what model_init_kwargs changed
    except Exception as error:
        if own and not isinstance(error, OSError):
            raise RecipeError(f"model_init_kwargs: {one_line(error)}") from error
        raise RecipeError(explain(error, str(model.model_name_or_path))) from error
    return loaded


def _finish_model(
    trainer: SFTTrainer, settings: Settings, tokenizer: PreTrainedTokenizerBase, peft: PeftConfig | None
) -> None:
    """What of the recipe concerns the model and its fresh adapter once TRL has made them."""
    model, adapter = trainer.model, settings.adapter
    _score_whole_head(model.get_base_model() if hasattr(model, "peft_config") else model)
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):  # PEFT's wrapper of a tied head with trained rows, whose bias TRL's loss asks for
        head.bias = None
    if peft is None:
        for tower in adapters.towers(model):
            model.get_submodule(tower).requires_grad_(False)
        adapters.freeze(model, adapter.freeze)
    quantized.keep_gradients(model)
    if adapter.adapter_name_or_path:
        adapters.continue_adapter(model, Path(adapter.adapter_name_or_path), tokenizer)


def _score_whole_head(model: Any) -> None:
    """Where a model's head is more than one matrix, let TRL's fused head score the model's own logits.

    BERT, ModernBERT's decoder and their kin transform the hidden states before that matrix. TRL leaves this out, and
    would train another model than the one that is saved.
    """
    known = {id(p) for part in (model.base_model, model.get_output_embeddings()) for p in part.parameters()}
    if all(id(parameter) in known for parameter in model.parameters()):
        return
    plain = model.forward

    @functools.wraps(type(model).forward)  # as TRL's own: accelerate takes it off again by that
    def forward(_: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return plain(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        log_probs = plain(*args, **kwargs).logits[:, :-1].float().log_softmax(-1)
        labels = labels[:, 1:]
        mask = labels != -100
        found = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * mask
        return trl_utils.FusedCausalLMOutput(
            log_probs=found,
            entropy=-(log_probs.exp() * log_probs).sum(-1) * mask,
            is_top1=(log_probs.argmax(-1) == labels) & mask,
            label_mask=mask,
        )

    model.forward = MethodType(forward, model)


def as_it_was(generation: GenerationConfig) -> None:
    """Let it be saved with what greedy decoding does not read (a temperature, a length penalty), as the base has it.

    transformers saves a configuration of which it says so only if nothing in it changed, and ours gets other end ids.
    """
    generation._original_object_hash = hash(generation)


@contextmanager
def labelled_positions_alone() -> Iterator[None]:
    """Let TRL's head score the labelled positions alone on a CPU and on Apple's GPUs too, as it does where Triton runs.

    It asks for the device once a batch, by a name of its module that its kernels do not read. Elsewhere TRL decides.
    """
    by_triton = trl_utils._use_triton
    trl_utils._use_triton = lambda device: device.type in ("cpu", "mps") or by_triton(device)
    try:
        yield
    finally:
        trl_utils._use_triton = by_triton


class ResumableTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with one measure of held-out rows, that goes on from a checkpoint as if it had never stopped.

    `eval_loss` and its kin weigh every label the same, whatever batch, pack, process or source it is in and whatever
    loss is trained: before, during and after training. The training loss' own kind, if it is another (`loss_type`,
    label smoothing, a loss of the caller's), is `eval_objective`, averaged over batches as transformers does.

    Attributes:
        totals: `label_sums` over all rows of the last evaluation, by prefix (`eval`, `eval_NAME`).
    """

    control: TrainerControl

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.totals: dict[str, list[float]] = {}
        if self.padding_free and self.args.neftune_noise_alpha is not None:
            self.neftune_noise_alpha: float | None = None  # transformers' own would take the batch for one document
            self.model.get_input_embeddings().register_forward_hook(self._add_noise)

    def label_sums(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Of a batch: the summed loss of its labels, how many are the model's first choice, their summed entropy, and
        how many labels there are, as float64 on the CPU.

        They come from the head that TRL puts into the model, which never holds the logits of a whole batch.
        """
        with labelled_positions_alone():
            out = model(**inputs, use_cache=False, fused_lm_head=True)
        parts = (-out.log_probs, out.is_top1, out.entropy, out.label_mask)
        return torch.stack([part.detach().float().cpu().double().sum() for part in parts])

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._positions: Any = inputs.get("position_ids")
        with labelled_positions_alone():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _add_noise(self, embedding: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        """NEFTune in a batch without padding: its noise shrinks with the length of each document."""
        if not embedding.training:
            return output
        document = self._positions.eq(0).cumsum(-1) - 1
        length = torch.bincount(document.flatten())[document]
        scale: torch.Tensor = self.args.neftune_noise_alpha / (length * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * scale[..., None].to(output.dtype)

    def _get_dataloader(self, dataset: Any, *args: Any, batch_size: int, is_training: bool = False, **more: Any) -> Any:
        """Rows without a label fill up the last batch of several processes, which would read some rows twice else.

        Held-out rows are all read, also where `dataloader_drop_last` leaves out some of those that are trained.
        """
        drop_last, world = self.args.dataloader_drop_last, self.args.world_size
        self.args.dataloader_drop_last = drop_last and is_training
        counted = is_training or self.compute_metrics is None
        if world > 1 and counted and not self.args.dataloader_drop_last:
            dataset = fill_up(dataset, world * batch_size, self.processing_class.pad_token_id)
        more |= {"batch_size": batch_size, "is_training": is_training}
        try:
            return super()._get_dataloader(as_arrays(dataset), *args, **more)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        rows = len(self.train_dataset) if isinstance(sampler, RandomSampler) else 0
        if not rows or len(sampler) == rows:
            return sampler
        return PaddedSampler(rows, len(sampler) - rows, self.args.data_seed)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            self._counted += self.label_sums(model, inputs)
        if prediction_loss_only and not self._has_own_objective:
            return None, None, None
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    @property
    def _has_own_objective(self) -> bool:
        own = self.compute_loss_func is not None or self.label_smoother is not None
        return own or self.args.loss_type != "nll"

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._counted = torch.zeros(4, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._metrics["eval"].clear()  # TRL's means over batches of what is measured here
        self.totals[metric_key_prefix] = [sum(parts) for parts in zip(*gather(self._counted.tolist()), strict=True)]
        objective = output.metrics.pop(f"{metric_key_prefix}_loss", None)
        if objective is not None and self._has_own_objective:
            output.metrics[f"{metric_key_prefix}_objective"] = objective
        output.metrics.update(self._means(metric_key_prefix))
        return output

    def _means(self, prefix: str) -> dict[str, float]:
        *sums, count = self.totals[prefix]
        return {f"{prefix}_{name}": value / max(count, 1) for name, value in zip(MEASURED, sums, strict=False)}

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """TRL's `evaluate`; of several data sets, `eval_NAME_loss` of each and `eval_loss` of all, as one log."""
        parts = self.eval_dataset if eval_dataset is None else eval_dataset
        self.totals = {}
        if not isinstance(parts, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        for name, rows in parts.items():
            loader = self.get_eval_dataloader(name if eval_dataset is None else rows)
            how = ("Evaluation", True if self.compute_metrics is None else None, ignore_keys)
            metrics |= self.evaluation_loop(loader, *how, metric_key_prefix=f"{metric_key_prefix}_{name}").metrics
        self.totals[metric_key_prefix] = [sum(values) for values in zip(*self.totals.values(), strict=True)]
        metrics |= self._means(metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except StopEvaluation:  # the step is whole: save it without the rest of the evaluation
            self.model.train()
            self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._total_train_tokens = tokens_before(self.state)  # TRL begins to count at 0
        scheduler = self.lr_scheduler
        if checkpoint and type(scheduler) is LambdaLR:  # the rate of the next step by the schedule of this run
            pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            scheduler._last_lr = [base * factor(scheduler.last_epoch) for base, factor in pairs]
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers begins another epoch, and takes its first step, when a run is resumed after its last step
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _save(self, *args: Any, **kwargs: Any) -> None:
        as_it_was(self.accelerator.unwrap_model(self.model).generation_config)
        super()._save(*args, **kwargs)
