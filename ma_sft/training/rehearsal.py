"""The whole run on a tiny twin of the model, in two seconds, before a row is read.

A twin is a model of the same class with few narrow layers and random weights; it goes through the run's own functions.
What holds of packing, adapters, losses, saving and merging for this class with these settings shows on it.
"""

import copy
import json
import logging
import random
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from ma_sft.config import Recipe, Settings, shown
from ma_sft.errors import RecipeError, first_line
from ma_sft.hub import load_pretrained, saved_folder
from ma_sft.training.distributed import once
from ma_sft.training.twin import POSITION_NAMES as POSITIONS_OF
from ma_sft.training.twin import POSITIONS, make_twin, small_tokenizer
from ma_sft.utils import cache_dir, write_whole
from ma_sft.version import versions

EXACT = 1e-3  # of the largest value: two ways to compute the same in float32
ROUNDED = 5e-2  # in 16 bits, which is all that some attention kernels take

# What may be changed to make a run possible, by the stage that has it, and the value that turns it off.
CHANGES: dict[str, dict[str, Any]] = {
    "training": {
        **{"packing": False, "padding_free": False, "eval_packing": False, "loss_type": "nll"},
        **{"label_smoothing_factor": 0.0, "router_aux_loss_coef": None, "use_liger_kernel": False},
        **{"activation_offloading": False, "gradient_checkpointing": False},
    },
    "model": {
        **{"use_dora": False, "use_rslora": False, "lora_modules_to_save": None, "lora_target_parameters": None},
        **{"lora_target_modules": None, "attn_implementation": None},
    },
    "adapter": {"loraplus_lr_ratio": None, "freeze": []},
}
# What else of `SFTConfig` a rehearsal depends on.
TRAINING = "packing_strategy bf16 fp16 use_cpu model_init_kwargs optim_args neftune_noise_alpha pad_to_multiple_of"
PACKED = ("packing", "padding_free", "eval_packing")
LAUNCH = ("deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config")


def rehearse(settings: Settings, tokenizer: PreTrainedTokenizerBase, added_tokens: list[str]) -> str:
    """Rehearse a run; one line of what was rehearsed, what not, and why. The first process does it for all.

    Raises:
        RecipeError: the run would fail, or train or save something else than the settings say: what, by how much, and
            which setting to change.
    """
    return once(lambda: _rehearse_or_recall(settings, tokenizer, added_tokens))


def _rehearse_or_recall(settings: Settings, tokenizer: PreTrainedTokenizerBase, added_tokens: list[str]) -> str:
    if not settings.run.rehearse:
        return "not rehearsed: rehearse=false"
    name, code = str(settings.model.model_name_or_path), settings.training.trust_remote_code
    try:
        config = load_pretrained(AutoConfig, name, settings.model.model_revision, code=code)
    except RecipeError as error:
        return f"not rehearsed: {error}"
    model = {key: value for key, value in asdict(settings.model).items() if not key.startswith("model_")}
    training = {key: getattr(settings.training, key) for key in [*CHANGES["training"], *TRAINING.split(), "max_length"]}
    adapter = asdict(settings.adapter)
    if settings.adapter.adapter_name_or_path:
        folder = saved_folder(Path(settings.adapter.adapter_name_or_path), adapter=True)
        adapter["saved"] = (folder / "adapter_config.json").read_text(encoding="utf-8")
    facts = [config.to_dict(), model, training, adapter, len(tokenizer), added_tokens, versions()]
    key = sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    path = cache_dir() / "rehearsals" / key[:32]
    if path.is_file():
        return path.read_text(encoding="utf-8")
    several = settings.training.world_size > 1 or any(getattr(settings.training, name) for name in LAUNCH[:2])
    line = (_in_a_child if several else rehearse_here)(settings, config, len(tokenizer), added_tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, line)
    return line


def _in_a_child(settings: Settings, config: Any, tokens: int, added_tokens: list[str]) -> str:
    """Rehearse in a process that no launcher started, where others wait for this one."""
    import os

    left_out = (*LAUNCH, "datasets", "eval_dataset")
    chosen = {key: value for key, value in shown(settings.chosen).items() if key not in left_out}
    chosen |= {"dataset_name": "none", "test_size": 0.5, "report_to": "none"}
    launcher = r"(RANK|WORLD_SIZE|LOCAL_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|ACCELERATE_.*|FSDP_.*)"
    env = {key: value for key, value in os.environ.items() if not re.fullmatch(launcher, key)}
    env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    job = json.dumps({"settings": chosen, "tokens": tokens, "added_tokens": added_tokens})
    done = subprocess.run([sys.executable, "-m", __name__], input=job, capture_output=True, text=True, env=env)
    found = json.loads((done.stdout.splitlines() or ["{}"])[-1])
    if "error" in found:
        raise RecipeError(found["error"])
    return str(found.get("line") or f"not rehearsed: {(done.stderr.splitlines() or ['no word'])[-1]}")


def rehearse_here(settings: Settings, config: Any, tokens: int, added_tokens: list[str]) -> str:
    """Rehearse in this process, on a twin of the model of `config` and for a tokenizer of `tokens` tokens.

    Raises:
        RecipeError: as `rehearse`.
    """
    with _quietly(), tempfile.TemporaryDirectory() as scratch:
        try:
            base, count = make_twin(settings, config, tokens, added_tokens, Path(scratch) / "base")
        except Exception as error:
            return f"not rehearsed, as there is no twin of {config.model_type}: {first_line(error)}"
        attempts = iter(range(100))

        def attempt(changed: Settings) -> list[str]:
            folder = Path(scratch) / str(next(attempts))
            return Rehearsal(changed, base, added_tokens, folder).run(config)

        try:
            held = attempt(settings)
        except Exception as error:
            ours = isinstance(error, RecipeError)
            why = f"rehearsed on a twin: {'' if ours else f'{type(error).__name__}: '}{first_line(error)}"
            way_out = _way_out(settings, attempt)
            if not ours and not way_out:  # a library cannot do with the twin, which may be the twin's fault
                return f"not {why}"
            raise RecipeError(f"{way_out}{why}") from error
    return f"rehearsed on a twin of {count / 1e6:.1f} million parameters: {', '.join(held)}"


def _way_out(settings: Settings, attempt: Callable[[Settings], Any]) -> str:
    """Which one setting of those that were chosen is to be changed, found by trying."""

    def works(changed: Settings) -> bool:
        try:
            attempt(changed)
        except Exception:
            return False
        return True

    for stage, names in CHANGES.items():
        part = getattr(settings, stage)
        for name, off in names.items():
            if getattr(part, name) != off:
                changed = copy.copy(part)
                setattr(changed, name, off)
                if works(replace(settings, **{stage: changed})):
                    return f"{name}={getattr(part, name)} cannot be: set {name}={json.dumps(off)}; "
    more: Any = settings.adapter.lora_config or {}
    for name in more:
        fewer = {key: value for key, value in more.items() if key != name}
        if works(replace(settings, adapter=replace(settings.adapter, lora_config=fewer))):
            return f"lora_config: {name} cannot be: leave it out; "
    if settings.adapter.merge and works(replace(settings, adapter=replace(settings.adapter, merge=False))):
        return "merge=true cannot be: set merge=false; "
    return ""


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave random numbers, warnings and the libraries' own words as they were."""
    state, numbers, bars = random.getstate(), np.random.get_state(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        if bars:
            transformers.logging.enable_progress_bar()
        random.setstate(state)
        np.random.set_state(numbers)


class Rehearsal:
    """One attempt: the run's functions on the twin in `base`; what holds is told in words by `run`.

    Args:
        settings: of the run, as they are or with one of them changed.
        base: folder of the twin.
        added_tokens: what the template adds to the tokenizer.
        out: the folder of the rehearsed run.
    """

    def __init__(self, settings: Settings, base: Path, added_tokens: list[str], out: Path) -> None:
        self.base, self.added_tokens, self.out = base, added_tokens, out
        self.tokenizer = small_tokenizer(added_tokens)
        attention = settings.model.attn_implementation
        self.exact = attention in (None, "eager", "sdpa", "flex_attention")
        self.limit = settings.training.max_length
        self.on = [name for name in PACKED if getattr(settings.training, name)]
        self.settings = self._small(settings)
        numbers = torch.Generator().manual_seed(0)
        self.documents = [torch.randint(4, len(self.tokenizer), (n,), generator=numbers).tolist() for n in (9, 11)]
        for at, token in enumerate(added_tokens[:4], start=4):
            self.documents[0][at] = self.tokenizer.get_vocab()[token]
        rows = self._alone()
        training = self.settings.training
        if training.packing and training.packing_strategy != "wrapped":
            both: dict[str, list[int]] = {key: rows[0][key] + rows[1][key] for key in rows[0]}
            rows = [both | {"seq_lengths": [9, 11]}]
        self.rows = rows
        training.per_device_train_batch_size = len(rows)

    def _small(self, settings: Settings) -> Settings:
        """The run's settings for the twin: two steps, nothing logged, and numbers that can be compared."""
        training, model = copy.copy(settings.training), copy.copy(settings.model)
        for name, value in {
            **{"output_dir": str(self.out), "max_steps": 2, "gradient_accumulation_steps": 1, "warmup_steps": 0},
            **{
                "learning_rate": 1e-2,
                "lr_scheduler_type": SchedulerType.CONSTANT,
                "report_to": [],
                "disable_tqdm": True,
            },
            **{"save_strategy": SaveStrategy.NO, "eval_strategy": IntervalStrategy.NO, "eval_on_start": False},
            **{"logging_strategy": IntervalStrategy.NO, "load_best_model_at_end": False, "dataloader_num_workers": 0},
            **{
                "dataloader_persistent_workers": False,
                "dataloader_prefetch_factor": None,
                "resume_from_checkpoint": None,
            },
            **{"pad_token": None, "eos_token": None, "torch_compile": False, "auto_find_batch_size": False},
            **{"push_to_hub": False, "lr_scheduler_kwargs": None, "max_grad_norm": 0.0},
        }.items():
            setattr(training, name, value)
        model.model_name_or_path, model.model_revision = str(self.base), None
        model.load_in_4bit = model.load_in_8bit = False
        if self.exact:
            model.dtype = "float32"
        if settings.quantised:
            training.optim = type(training.optim)("adamw_torch")
        adapter = settings.adapter
        if adapter.adapter_name_or_path:
            adapter = replace(adapter, adapter_name_or_path=str(self._saved_twin(adapter.adapter_name_or_path)))
        chosen = {**settings.chosen, "model_name_or_path": str(self.base)}
        return replace(settings, training=training, model=model, adapter=adapter, chosen=chosen)

    def _saved_twin(self, folder: str) -> Path:
        """A saved adapter of the twin with the configuration of the run's."""
        from ma_sft.training.adapters import read_adapter_config

        config = read_adapter_config(saved_folder(Path(folder), adapter=True))
        model = AutoModelForCausalLM.from_pretrained(self.base)
        if self.added_tokens:
            model.resize_token_embeddings(len(self.tokenizer))
        get_peft_model(model, config).save_pretrained(self.out / "before")
        return self.out / "before"

    def run(self, config: Any) -> list[str]:
        """Go through it all.

        Raises:
            RecipeError: something is not what the settings say.
            Exception: what a library says of the twin.
        """
        from ma_sft.training.trainer import build_trainer

        trainer = build_trainer(self.settings, self.tokenizer, self.added_tokens, self._dataset(), None)
        trainer.remove_callback(PrinterCallback)
        held = [self._documents_apart(trainer), *self._positions(trainer, config)]
        self._loss(trainer)
        held.append(self._steps(trainer))
        held.append(self._saved(trainer))
        return held

    def _dataset(self) -> Dataset:
        return Dataset.from_list(self.rows)

    def _alike(self, what: str, found: torch.Tensor, expected: torch.Tensor) -> float:
        """The largest difference, relative to the largest value; more than rounding is an error."""
        difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
        if not difference <= (EXACT if self.exact else ROUNDED) * max(largest, 1e-2):
            raise RecipeError(f"{what} by {difference:.2g} of {largest:.2g}")
        return difference / max(largest, 1e-9)

    def _batch(self, trainer: Any, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        batch = trainer.data_collator(copy.deepcopy(rows))
        return {k: v.to(trainer.model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    def _alone(self) -> list[dict[str, list[int]]]:
        return [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in self.documents]

    def _logits(self, model: Any) -> torch.Tensor:
        """Of each document alone."""
        with torch.no_grad():
            ids = [torch.tensor([ids], device=model.device) for ids in self.documents]
            return torch.cat([model.eval()(input_ids=i, use_cache=False).logits[0].float().cpu() for i in ids])

    def _documents_apart(self, trainer: Any) -> str:
        """The documents of a batch give the logits and gradients that they give alone."""
        model, batch = trainer.model.eval(), self._batch(trainer, self.rows)
        packed = "position_ids" in batch
        what = f"documents of a pack see each other (set {'=false, '.join(self.on)}=false): logits"
        what = what if packed else "a row's logits depend on its batch: they"
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits.float().cpu()
        rows = [row[: len(ids)] for row, ids in zip(logits, self.documents, strict=False)]
        found = logits[0] if len(logits) == 1 else torch.cat(rows)
        apart = self._alike(f"{what} differ from those of the document alone", found[:20], self._logits(model))
        count = sum(label != -100 for row in self._alone() for label in row["labels"])
        enabled, trainer.aux_loss_enabled = trainer.aux_loss_enabled, False  # of a batch, by its nature
        together, alone = (
            self._gradients(trainer, rows, count) for rows in ([self.rows], [[row] for row in self._alone()])
        )
        trainer.aux_loss_enabled = enabled
        self._alike("gradients of a batch differ from those of its documents", together, alone)
        return f"{'packing keeps documents apart' if packed else 'rows of a batch are apart'} to {apart:.0e}"

    def _gradients(self, trainer: Any, batches: list[list[dict[str, list[int]]]], count: int) -> torch.Tensor:
        model = trainer.model.eval()
        for rows in batches:
            trainer.compute_loss(model, self._batch(trainer, rows), num_items_in_batch=torch.tensor(count)).backward()
        gradients = torch.cat([p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return gradients

    def _positions(self, trainer: Any, config: Any) -> list[str]:
        """Whether the model can go beyond its positions, where rows may."""
        text = config.get_text_config()
        most = next((getattr(text, name) for name in POSITIONS_OF if isinstance(getattr(text, name, None), int)), None)
        limit = self.limit
        if most is None or (limit is not None and limit <= most):
            return []
        ids = torch.full((1, POSITIONS + 8), 5, device=trainer.model.device)
        try:
            with torch.no_grad():
                trainer.model(input_ids=ids, use_cache=False)
        except (IndexError, RuntimeError):
            raise RecipeError(f"max_length={limit}: the model has {most} positions; set max_length={most}") from None
        return (
            []
            if limit is None
            else [f"max_length={limit} goes beyond the {most} positions that the model was made for"]
        )

    def _loss(self, trainer: Any) -> None:
        """The trainer's loss is the one that the settings name."""
        training, model = trainer.args, trainer.model.eval()
        batch = self._batch(trainer, self.rows)
        labels = torch.tensor([label for row in self._alone() for label in [*row["labels"][1:], -100]])
        log_probs = self._logits(model).log_softmax(-1)[labels != -100]
        nll = -log_probs.gather(1, labels[labels != -100][:, None])[:, 0]
        loss = nll * (-nll).exp() if training.loss_type == "dft" else nll
        if smooth := training.label_smoothing_factor:
            loss = (1 - smooth) * loss + smooth * -log_probs.mean(-1)
        expected = loss.mean()
        with torch.no_grad():
            if trainer.aux_loss_enabled and (training.router_aux_loss_coef or not smooth):
                inputs = {k: v for k, v in batch.items() if k != "labels"}
                aux = model(**inputs, use_cache=False, output_router_logits=True).aux_loss
                expected = expected + trainer.router_aux_loss_coef * aux.float().cpu()
            found = trainer.compute_loss(model, batch).float().cpu()
        self._alike("the loss is not the one that the settings name, it differs", found, expected)

    def _steps(self, trainer: Any) -> str:
        """Two steps are finite, and move what is trained and nothing else."""
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        loss = trainer.train().training_loss
        trainer.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        moved = {name: not p.equal(before[name]) for name, p in trainer.model.named_parameters()}
        trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        if not np.isfinite(loss) or not all(p.isfinite().all() for p in trainer.model.parameters()):
            raise RecipeError(f"a step of training gives numbers that are none: loss {loss}")
        if wrong := [name for name in moved if moved[name] and name not in trained]:
            raise RecipeError(f"a step of training moves what is frozen: {wrong[0]}")
        kinds = {re.sub(r"\.\d+\.", ".N.", name): False for name in trained}
        for name in trained:
            kinds[re.sub(r"\.\d+\.", ".N.", name)] |= moved[name]
        still = [name.removeprefix("base_model.model.") for name, moves in kinds.items() if not moves]
        by_hand = {"lora_target_modules", "lora_target_parameters", "lora_config", "lora_modules_to_save"}
        if len(still) == len(kinds) or (still and by_hand & set(self.settings.chosen)):
            raise RecipeError(f"{still[0]} would never be trained")
        return f"a step moves all that is trained but {still[0]}" if still else "a step moves what is trained"

    def _saved(self, trainer: Any) -> str:
        """What is saved gives the same when it is loaded, merged, and trained further."""
        from ma_sft.release.manifest import read_weights, save
        from ma_sft.release.merge import load_adapter, merge
        from ma_sft.training.trainer import build_trainer

        expected, peft, code = (
            self._logits(trainer.model),
            self.settings.model.use_peft,
            self.settings.training.trust_remote_code,
        )
        saved = self.out / ("adapter" if peft else "model")
        base = {"name_or_path": str(self.base), "revision": None, "quantization": None}
        save(
            trainer,
            self.tokenizer,
            saved,
            {"format": 1, "base_model": {**base, "weights": read_weights(self.base).digest}},
        )
        if not peft:
            loaded = load_pretrained(AutoModelForCausalLM, str(saved), code=code, dtype=torch.float32)
            return f"the model loads to {self._alike('the saved model differs', self._logits(loaded), expected):.0e}"
        loaded = load_adapter(saved, dtype=torch.float32, code=code)
        apart = self._alike("the saved adapter's logits differ", self._logits(loaded), expected)
        done = f"the adapter saves and loads to {apart:.0e}"
        if not str(getattr(trainer.model.peft_config["default"], "init_lora_weights", "")).startswith(
            ("pissa", "olora")
        ):
            on = replace(self.settings, adapter=replace(self.settings.adapter, adapter_name_or_path=str(saved)))
            on.chosen = {k: v for k, v in on.chosen.items() if not k.startswith(("lora_", "use_dora", "use_rslora"))}
            on.training = copy.copy(on.training)
            further = build_trainer(on, self.tokenizer, self.added_tokens, self._dataset(), None).model
            self._alike(
                "adapter_name_or_path: the adapter goes on differently, logits differ", self._logits(further), expected
            )
            done += " and goes on"
        if not self.settings.adapter.merge:
            return f"{done}, not merged (merge=false)"
        merge(self.out, self.out / "merged", dtype="float32", code=code)
        merged = load_pretrained(AutoModelForCausalLM, str(self.out / "merged"), code=code, dtype=torch.float32)
        return f"{done}, merges to {self._alike('the merged model differs', self._logits(merged), expected):.0e}"


if __name__ == "__main__":
    job = json.load(sys.stdin)
    try:
        own = Recipe(**job["settings"]).resolve()
        made = load_pretrained(
            AutoConfig, str(own.model.model_name_or_path), own.model.model_revision, code=own.training.trust_remote_code
        )
        found = {"line": rehearse_here(own, made, job["tokens"], job["added_tokens"])}
    except RecipeError as failed:
        found = {"error": str(failed)}
    sys.stdout.write(f"\n{json.dumps(found)}\n")
