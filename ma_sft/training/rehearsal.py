"""The whole run on a tiny twin of the model, in two seconds, before a row is read.

A twin is a model of the same class with few narrow layers and random weights; it goes through the run's own functions.
What holds of packing, adapters, losses, saving and merging for this class with these settings shows on it.
"""

import copy
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig

from ma_sft.config import (
    AdapterConfig,
    EvaluationConfig,
    LabelsConfig,
    RowsConfig,
    RunConfig,
    Settings,
    transformers_optim,
)
from ma_sft.errors import RecipeError, first_line
from ma_sft.hub import load_pretrained, saved_folder
from ma_sft.release.manifest import save
from ma_sft.release.merge import load_adapter, merge
from ma_sft.training.adapters import lora_config, read_adapter_config
from ma_sft.training.distributed import once
from ma_sft.training.trainer import build_trainer
from ma_sft.training.twin import POSITION_NAMES, POSITIONS, make_twin, small_tokenizer
from ma_sft.utils import cache_dir, timed, write_whole
from ma_sft.version import versions

EXACT = 1e-3  # of the largest value: two ways to compute the same in float32
ROUNDED = 5e-2  # in 16 bits, which is all that some attention kernels take
PACKED = ["packing", "padding_free", "eval_packing"]
# What may be turned off to make a run possible, in the order in which it is tried
CHANGEABLE = """loss_type label_smoothing_factor router_aux_loss_coef use_liger_kernel activation_offloading
    gradient_checkpointing use_dora use_rslora lora_modules_to_save lora_target_parameters lora_target_modules
    attn_implementation loraplus_lr_ratio freeze lora_config peft_config merge lora_dropout""".split()
# What else a rehearsal depends on
OTHERS = """max_length packing_strategy pad_to_multiple_of liger_kernel_config gradient_checkpointing_kwargs optim
    optim_args optim_target_modules weight_decay neftune_noise_alpha bf16 fp16 use_cpu model_init_kwargs dtype use_peft
    trust_remote_code lora_r lora_alpha lora_task_type lora_preset adapter_name_or_path""".split()
# Two steps of which nothing is logged or kept, and that change something
STEPS = {
    **{"max_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0},
    **{"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"},
}
KINDS: Any = (SFTConfig, ModelConfig, AdapterConfig)
LAUNCHER = r"(RANK|WORLD_SIZE|LOCAL_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|ACCELERATE_.*|FSDP_.*)"
Values = dict[str, Any]  # settings by name


def rehearse(settings: Settings, tokenizer: PreTrainedTokenizerBase, added_tokens: list[str]) -> str:
    """Rehearse a run; one line of what was rehearsed, what not, and why. The first process does it for all.

    Raises:
        RecipeError: the run would fail, or train or save something else than the settings say: what, by how much, and
            which setting to change.
    """
    with timed("rehearsal"):
        return once(lambda: _rehearse_or_recall(settings, len(tokenizer), added_tokens))


def _rehearse_or_recall(settings: Settings, tokens: int, added_tokens: list[str]) -> str:
    if not settings.run.rehearse:
        return "not rehearsed: rehearse=false"
    model = [str(settings.model.model_name_or_path), settings.model.model_revision]
    try:
        config = load_pretrained(AutoConfig, *model, code=settings.training.trust_remote_code)
    except RecipeError as error:
        return f"not rehearsed: {error}"
    job = [*model, *_relevant(settings), tokens, added_tokens]
    if saved := settings.adapter.adapter_name_or_path:
        saved = read_adapter_config(saved_folder(Path(saved), adapter=True)).to_dict()
    facts = json.dumps([job, config.to_dict(), saved, versions()], sort_keys=True, default=str)
    path = cache_dir() / "rehearsals" / sha256(facts.encode()).hexdigest()[:32]
    if path.is_file():
        return path.read_text(encoding="utf-8")
    several = settings.training.world_size > 1 or settings.training.deepspeed or settings.training.fsdp
    line = _in_a_child(job) if several else rehearse_here(settings, config, tokens, added_tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, line)
    return line


def _in_a_child(job: list[Any]) -> str:
    """Rehearse in a process that no launcher started, where others wait for this one."""
    env = {name: value for name, value in os.environ.items() if not re.fullmatch(LAUNCHER, name)}
    env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    given = json.dumps(job, default=str)
    done = subprocess.run([sys.executable, "-m", __name__], input=given, capture_output=True, text=True, env=env)
    line, error = json.loads((done.stdout.splitlines() or ["[null, null]"])[-1])
    if error:
        raise RecipeError(error)
    return str(line or f"not rehearsed: {(done.stderr.splitlines() or ['no word'])[-1]}")


def _relevant(settings: Settings) -> tuple[Values, list[str]]:
    """The settings on which a rehearsal depends, and which of them were set by hand. 4 bits become 32."""
    parts = {item.name: part for part in (settings.training, settings.model, settings.adapter) for item in fields(part)}
    values = {name: getattr(parts[name], name) for name in [*PACKED, *CHANGEABLE, *OTHERS]}
    values["optim"] = "adamw_torch" if settings.quantised else settings.optimizer
    return values, sorted(settings.chosen.keys() & values.keys())


def _settings(values: Values, chosen: list[str]) -> Settings:
    """Settings that are as they are by default but for `values`."""
    own = {**values, "optim": transformers_optim(values["optim"])}
    training, model, adapter = (
        kind(**{item.name: own[item.name] for item in fields(kind) if item.name in own}) for kind in KINDS
    )
    by_hand = {name: values[name] for name in chosen if name in values}
    return Settings(RowsConfig(), LabelsConfig(), adapter, EvaluationConfig(), RunConfig(), training, model, by_hand)


def rehearse_here(settings: Settings, config: PreTrainedConfig, tokens: int, added_tokens: list[str]) -> str:
    """Rehearse in this process, on a twin of the model of `config` and for a tokenizer of `tokens` tokens.

    Raises:
        RecipeError: as `rehearse`.
    """
    values, chosen = _relevant(settings)
    spare = int(config.get_text_config().vocab_size) - (tokens - len(added_tokens))
    failed: Exception | None = None
    with _quietly(), tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch, "base")
        try:
            count = make_twin(settings, config, max(0, min(16, spare)), base)
        except Exception as error:
            return f"not rehearsed, as there is no twin of {config.model_type}: {first_line(error)}"
        way_out, done = "", []
        for words, changed in _ways_out(values):
            folder = Path(tempfile.mkdtemp(dir=scratch))
            try:
                way_out, done = words, Rehearsal(changed, chosen, base, added_tokens, folder).run(config)
                break
            except Exception as error:
                failed = failed or error
    packs = re.search("packed sequences|documents of a pack", str(failed))
    if packs and not done:  # whatever else is wrong with the twin
        way_out = f"set {', '.join(f'{name}=false' for name in PACKED if values[name])}; "
    if failed is None:
        return f"rehearsed on a twin of {count / 1e6:.1f} million parameters: {', '.join(done)}"
    ours = isinstance(failed, RecipeError) and scratch not in str(failed)  # else it speaks of the twin itself
    why = f"rehearsed on a twin: {'' if ours else f'{type(failed).__name__}: '}{first_line(failed)}"
    if ours or way_out:
        raise RecipeError(f"{way_out}{why}") from failed
    return f"not {why}"  # a library cannot do with the twin, which may be the twin's fault


def _ways_out(values: Values) -> Iterator[tuple[str, Values]]:
    """The settings as they are, and with one of them turned off, after what there is to say if that is possible."""
    yield "", values
    defaults = {item.name: [] if item.default is MISSING else item.default for kind in KINDS for item in fields(kind)}
    defaults |= {"router_aux_loss_coef": 0.0, "lora_dropout": 0.0}  # None is the model's own
    for name in PACKED + CHANGEABLE:
        value, off = values[name], False if values[name] is True else defaults[name]
        if name in ("lora_config", "peft_config"):
            for key in value or ():
                fewer = {other: value[other] for other in value if other != key}
                yield f"{name}: {key} cannot be: leave it out; ", {**values, name: fewer}
        elif value != off:
            cannot = "" if value is None else f"{name}={value} cannot be: "
            yield f"{cannot}set {name}={json.dumps(off)}; ", {**values, name: off}


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave random numbers, warnings and the libraries' own words as they were."""
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), torch.random.fork_rng():
            yield
    finally:
        logging.disable(logging.NOTSET)
        if bars:
            transformers.logging.enable_progress_bar()


class Rehearsal:
    """One attempt in the folder `out`. Each step tells in words what holds, or raises what does not."""

    def __init__(self, values: Values, chosen: list[str], base: Path, added_tokens: list[str], out: Path) -> None:
        self.values, self.chosen, self.base, self.added_tokens, self.out = values, chosen, base, added_tokens, out
        self.code, self.tokenizer = values["trust_remote_code"], small_tokenizer(added_tokens)
        self.exact = values["attn_implementation"] in (None, "eager", "sdpa", "flex_attention")
        numbers = torch.Generator().manual_seed(0)
        self.documents = [torch.randint(4, len(self.tokenizer), (n,), generator=numbers).tolist() for n in (9, 11)]
        new = [self.tokenizer.get_vocab()[token] for token in added_tokens[:4]]
        self.documents[0][4 : 4 + len(new)] = new
        self.rows = [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in self.documents]
        if values["packing"] and values["packing_strategy"] != "wrapped":
            first, second = self.rows
            self.rows = [{name: first[name] + second[name] for name in first} | {"seq_lengths": [9, 11]}]

    def run(self, config: PreTrainedConfig) -> list[str]:
        saved = self.values["adapter_name_or_path"]  # whose configuration a fresh adapter of the twin gets
        given = {"peft_config": lora_config(_settings(self.values, self.chosen))} if saved else {}
        self.trainer = self.build(given, adapter_name_or_path=None)
        steps = [self.documents_apart, lambda: self.positions(config), self.loss, self.train, self.save]
        if self.values["use_peft"]:
            steps += [self.go_on, self.merge]
        return [words for step in steps if (words := step())]

    def build(self, given: dict[str, Any], **changes: Any) -> Any:
        """The run's trainer for the twin."""
        values = {**self.values, **STEPS, "per_device_train_batch_size": len(self.rows), "output_dir": str(self.out)}
        values |= {"model_name_or_path": str(self.base), **({"dtype": "float32"} if self.exact else {}), **changes}
        settings = _settings({name: value for name, value in values.items() if value is not ...}, self.chosen)
        rows = Dataset.from_list(self.rows)
        return build_trainer(settings, self.tokenizer, self.added_tokens, rows, None, **given)

    def compare(self, what: str, found: torch.Tensor, expected: torch.Tensor) -> str:
        """The largest difference, relative to the largest value; more than rounding is an error."""
        found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
        difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
        if not difference <= (EXACT if self.exact else ROUNDED) * max(largest, 1e-2):
            raise RecipeError(f"{what} by {difference:.2g} of {largest:.2g}")
        return f"{difference / max(largest, 1e-9):.0e}"

    def batch(self, *, labels: bool = True) -> dict[str, Any]:
        batch, device = self.trainer.data_collator(copy.deepcopy(self.rows)), self.trainer.model.device
        batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        return batch if labels else {name: batch[name] for name in batch if name != "labels"} | {"use_cache": False}

    def logits(self, model: Any) -> torch.Tensor:
        """Of each document by itself, one after the other."""
        ids = [torch.tensor([ids], device=model.device) for ids in self.documents]
        outputs = [model.eval()(input_ids=one, use_cache=False).logits[0].float() for one in ids]
        # Behind those of virtual tokens, which prompt tuning puts before them
        return torch.cat([logits[-one.shape[1] :] for logits, one in zip(outputs, ids, strict=True)])

    def documents_apart(self) -> str:
        """The documents of a batch give the logits that they give alone."""
        model, batch = self.trainer.model.eval(), self.batch(labels=False)
        packed = "position_ids" in batch
        what = "documents of a pack see each other: logits" if packed else "a row's logits depend on its batch: they"
        logits = model(**batch).logits[:, -batch["input_ids"].shape[1] :]
        lengths = [9, 11] if len(logits) == 2 else [20]
        found = torch.cat([row[:length] for row, length in zip(logits, lengths, strict=True)])
        apart = self.compare(f"{what} differ from those of the document alone", found, self.logits(model))
        return f"{'packing keeps documents apart' if packed else 'rows of a batch are apart'} to {apart}"

    def positions(self, config: PreTrainedConfig) -> str:
        """The model can go beyond its positions, where rows may."""
        text, limit, model = config.get_text_config(), self.values["max_length"], self.trainer.model
        known = [getattr(text, name) for name in POSITION_NAMES if isinstance(getattr(text, name, None), int)]
        if not known or (limit is not None and limit <= known[0]):
            return ""
        try:
            model(input_ids=torch.full((1, POSITIONS + 8), 5, device=model.device), use_cache=False)
        except (IndexError, RuntimeError):
            told = f"max_length={limit}: the model has {known[0]} positions; set max_length={known[0]}"
            raise RecipeError(told) from None
        return f"max_length={limit} goes beyond the {known[0]} positions that the model was made for" if limit else ""

    def loss(self) -> None:
        """The trainer's loss is the one that the settings name, with the gradients of the documents alone."""
        trainer, model, args = self.trainer, self.trainer.model.eval(), self.trainer.args
        found = trainer.compute_loss(model, self.batch())
        labels = torch.tensor([label for ids in self.documents for label in [-100, -100, *ids[3:], -100]])
        log_probs = self.logits(model).cpu()[labels != -100].log_softmax(-1)
        nll = -log_probs.gather(1, labels[labels != -100][:, None])[:, 0]
        expected = (nll * (-nll).exp().detach() if args.loss_type == "dft" else nll).mean()
        if smooth := args.label_smoothing_factor:
            expected = (1 - smooth) * expected - smooth * log_probs.mean()
        if trainer.aux_loss_enabled and (args.router_aux_loss_coef or not smooth):
            aux = model(**self.batch(labels=False), output_router_logits=True).aux_loss
            expected = expected + trainer.router_aux_loss_coef * aux.float().cpu()
        self.compare("the loss is not the one that the settings name, it differs", found, expected)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        both = [torch.autograd.grad(loss, trained, materialize_grads=True) for loss in (found, expected)]
        gradients = [torch.cat([gradient.flatten() for gradient in each]) for each in both]
        self.compare("gradients of a batch differ from those of its documents", *gradients)

    def train(self) -> str:
        """Two steps are finite, and move what is trained and nothing else."""
        trainer = self.trainer
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        loss = trainer.train().training_loss
        trainer.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        self.trained = self.logits(trainer.model)
        kinds: dict[str, bool] = {}  # of what is trained, in whatever layer: whether it moved
        for name, parameter in trainer.model.named_parameters():
            if not parameter.isfinite().all():
                raise RecipeError(f"a step of training gives numbers that are none: loss {loss}")
            moved, kind = not parameter.equal(before[name]), re.sub(r"\.\d+\.", ".N.", name)
            if parameter.requires_grad:
                kinds[kind] = kinds.get(kind, False) or moved
            elif moved:
                raise RecipeError(f"a step of training moves what is frozen: {name}")
        still = [kind.removeprefix("base_model.model.") for kind, moved in kinds.items() if not moved]
        by_hand = {"lora_target_modules", "lora_target_parameters", "lora_config", "lora_modules_to_save"}
        if len(still) == len(kinds) or (still and by_hand & set(self.chosen)):
            raise RecipeError(f"{still[0]} would never be trained")
        return f"a step moves all that is trained but {still[0]}" if still else "a step moves what is trained"

    def save(self) -> str:
        """What is saved gives the same when it is loaded."""
        kind = "adapter" if self.values["use_peft"] else "model"
        base = {"name_or_path": str(self.base), "revision": None, "quantization": None, "weights": None}
        save(self.trainer, self.tokenizer, self.out / kind, {"format": 1, "base_model": base})
        loaded = (
            load_adapter(self.out / kind, dtype=torch.float32, code=self.code) if kind == "adapter" else self.load(kind)
        )
        return f"the {kind} loads to {self.compare(f'the saved {kind} differs', self.logits(loaded), self.trained)}"

    def load(self, name: str) -> Any:
        return load_pretrained(AutoModelForCausalLM, str(self.out / name), code=self.code, dtype=torch.float32)

    def go_on(self) -> str:
        """A saved adapter is trained further from where it was, by its own settings."""
        own: Values = {name: ... for name in self.values if name.startswith(("lora_", "use_dora", "use_rslora"))}
        logits = self.logits(self.build({}, **own, adapter_name_or_path=str(self.out / "adapter")).model)
        return f"goes on to {self.compare('adapter_name_or_path: it goes on otherwise,', logits, self.trained)}"

    def merge(self) -> str:
        """The merged model gives the same."""
        if not self.values["merge"]:
            return "is not merged (merge=false)"
        merge(self.out, self.out / "merged", dtype="float32", code=self.code)
        return f"merges to {self.compare('the merged model differs', self.logits(self.load('merged')), self.trained)}"


if __name__ == "__main__":
    name, revision, values, chosen, tokens, added_tokens = json.load(sys.stdin)
    try:
        config = load_pretrained(AutoConfig, name, revision, code=values["trust_remote_code"])
        answer = [rehearse_here(_settings(values, chosen), config, tokens, added_tokens), None]
    except RecipeError as failed:
        answer = [None, str(failed)]
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
