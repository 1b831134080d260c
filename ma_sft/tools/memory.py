"""Forecast of the memory that a recipe's training needs, and the first launcher that fits: `ma-sft plan RECIPE`.

Weights, gradients and optimiser states are arithmetic. Activations are measured without memory: one step of the real
model runs on fake tensors (`torch._subclasses.FakeTensorMode`: shapes and dtypes, no data), and every tensor's birth
and death is counted. So any architecture, attention implementation, checkpointing and TRL's tiled logits are in it.
"""

import copy
import resource
import shlex
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import transformers.utils
from accelerate.utils import convert_file_size_to_int
from peft import get_peft_model
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.trainer_pt_utils import get_model_param_count
from trl.models import enable_selective_activation_checkpointing
from trl.trainer.utils import add_fused_lm_head

from ma_sft.config import Recipe, Settings
from ma_sft.errors import RecipeError
from ma_sft.training.adapters import adapted_layers, fitting_adapter, freeze, model_skeleton
from ma_sft.training.quantized import quantization
from ma_sft.utils import console

# What is no tensor. On a GPU: the context with its libraries, and the share of the rest that the caching allocator
# cannot use. On the CPU: what the trainer still imports, and the share of activations that the C allocator keeps when
# they are freed; benchmarks/memory.py measures both.
CUDA_BYTES, CUDA_SHARE = 0.8e9, 0.05
CPU_BYTES, CPU_SHARE = 0.1e9, 0.3


@dataclass(frozen=True)
class Forecast:
    """Bytes of one process that trains the whole model, and how they come about."""

    total: int  # parameters
    trainable: int  # of them
    weights: int
    gradients: int
    optimizer: int
    kept: int  # by the forward pass for the backward pass
    activations: int  # highest sum of all other tensors at any moment of the step, gradients not among them
    activations16: int  # the same where the launcher trains in 16 bits: no 16-bit copies of float32 weights
    overlap: int  # less than `gradients + activations` is needed, as the one grows while the other shrinks
    layer: int  # the largest block of layers in 16 bits: what a sharded model has to gather at a time
    reserve: int  # on the CPU, what the process holds before there is a model and what its allocator keeps
    length: int  # tokens of the longest row
    lines: list[str]  # the arithmetic in words

    @property
    def peak(self) -> int:
        """Bytes at the highest moment of training in one process on one device."""
        return self.reserve + self.static + self.activations - self.overlap

    @property
    def static(self) -> int:
        """Bytes that are there whatever the batch."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Launcher:
    """What a launcher of `accelerate_configs/` shares out among the GPUs."""

    name: str
    stage: int = 0  # ZeRO's: from 1 on the optimiser's states, from 2 on gradients, at 3 the weights
    offload: bool = False
    deepspeed: bool = False
    many: bool = True
    sequence: bool = False  # each GPU computes a part of each row


# From the fastest to the one that needs least memory.
LAUNCHERS = (
    Launcher("single_gpu", many=False),
    Launcher("ddp"),
    Launcher("zero1", 1, deepspeed=True),
    Launcher("zero2", 2, deepspeed=True),
    Launcher("fsdp2", 3),
    Launcher("zero3", 3, deepspeed=True),
    Launcher("cp", 3, sequence=True),
    Launcher("sp", 3, sequence=True, deepspeed=True),
    Launcher("zero3_offload", 3, offload=True, deepspeed=True),
)
CPU = Launcher("cpu", many=False)


def forecast(settings: Settings, longest: int | None = None) -> Forecast:
    """Forecast the peak memory of a recipe's training step.

    Args:
        settings: the resolved recipe.
        longest: tokens of the longest row; None takes `max_length`.

    Raises:
        RecipeError: the model is not there, a target that it has not, or neither `longest` nor `max_length`.
    """
    training, rows = settings.training, settings.training.per_device_train_batch_size
    length = min(filter(None, (longest, training.max_length)), default=None)
    if length is None:
        raise RecipeError("the plan needs max_length, the longest row in tokens")
    model, linear = _skeleton(settings)
    by_kind, largest = _stored(settings, model, linear)
    trained = [p for p in model.parameters() if p.requires_grad]
    blocks = [block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m]
    trainable, gradients = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
    optimizer = round(sum(_optimizer_bytes(settings.optimizer, p) for p in trained))
    kept, *peaks = simulate(model, settings, rows, length)
    activations, both = (peak + largest for peak in peaks)
    in16 = (training.bf16 or training.fp16) and not settings.model.use_peft
    mixed = in16 and any(p.dtype == torch.float32 for p in trained)
    overlap = gradients + activations - max(both, gradients) if training.gradient_accumulation_steps == 1 else 0
    lines = [
        *(f"weights: {count:,} parameters ({kind}) = {_gb(size)}" for kind, (count, size) in by_kind.items()),
        f"gradients: {trainable:,} trained parameters = {_gb(gradients)}",
        f"optimiser: {settings.optimizer}, {optimizer / trainable:.2f} bytes a trained parameter = {_gb(optimizer)}",
        f"activations: one step of {rows} x {length} tokens keeps {_gb(kept)} for the backward pass and reaches "
        f"{_gb(activations)} with its temporaries, tiles of logits among them"
        + (f", {_gb(largest)} for the largest layer in 16 bits too" if largest else "")
        + ("; layers are computed again (gradient_checkpointing)" if training.gradient_checkpointing else ""),
        *([f"not at the same time: activations go as gradients come = -{_gb(overlap)}"] if overlap else []),
    ]
    reserve = 0
    if training.use_cpu:
        resident = psutil.Process().memory_info().rss
        reserve = resident + round(CPU_BYTES) + round(CPU_SHARE * (activations - overlap))
        lines.append(
            f"the process: {_gb(resident)} now, {_gb(CPU_BYTES)} for the trainer, and of the activations the "
            f"{CPU_SHARE:.0%} that the C allocator keeps when they are freed = {_gb(reserve)}"
        )
    return Forecast(
        total=sum(count for count, _ in by_kind.values()),
        trainable=trainable,
        weights=round(sum(size for _, size in by_kind.values())),
        gradients=gradients,
        optimizer=optimizer,
        kept=kept,
        activations=activations,
        activations16=simulate(model, settings, rows, length, half=True)[1] if mixed else activations,
        overlap=overlap,
        layer=max((2 * sum(p.numel() for p in block.parameters()) for block in blocks), default=0),
        reserve=reserve,
        length=length,
        lines=lines,
    )


def _skeleton(settings: Settings) -> tuple[Any, set[int]]:
    """The model as it is trained, without memory, and its linear layers' weights, by id."""
    model = model_skeleton(settings)
    head = model.get_output_embeddings()
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    config = fitting_adapter(settings, model)
    if config is None:
        freeze(model, settings.adapter.freeze)
        return model, linear
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(model, config, low_cpu_mem_usage=True)
    for name, parameter in model.named_parameters():
        # PEFT keeps adapters in float32; TRL makes them bfloat16 on a quantised base
        kind = torch.bfloat16 if settings.quantised and "magnitude" not in name else torch.float32
        parameter.data = parameter.data.to(kind if parameter.requires_grad else parameter.dtype)
    return model, linear


def _stored(settings: Settings, model: nn.Module, linear: set[int]) -> tuple[dict[str, tuple[int, float]], int]:
    """Parameters and bytes by how they are stored, and the largest quantised layer's bytes in 16 bits."""
    by_kind: dict[str, tuple[int, float]] = {}
    largest, of = 0, settings.model
    scales, each = ("8 bits", 1 + 4 / 256) if of.use_bnb_nested_quant else ("float32", 4)  # of a block of 64
    for parameter in model.parameters():
        count, kind, nbytes = parameter.numel(), str(parameter.dtype).removeprefix("torch."), float(parameter.nbytes)
        if settings.quantised and id(parameter) in linear and not parameter.requires_grad:
            largest = max(largest, count * 2)
            kind, nbytes = f"4-bit {of.bnb_4bit_quant_type}, scales in {scales}", count / 2 + count / 64 * each
            if of.load_in_8bit:
                kind, nbytes = "8-bit, scales in float32", count + 4 * parameter.shape[0]
            if given := cast(dict[str, Any], settings.adapter.quantization_config):
                size = AutoHfQuantizer.from_config(quantization(settings), pre_quantized=False).quantized_element_size
                kind = str(given.get("quant_method", "bitsandbytes"))
                nbytes = count * (given.get("bits", 16) / 8 if size is None else size)
        kind = f"{kind}, trained" if parameter.requires_grad else kind
        known, size = by_kind.get(kind, (0, 0.0))
        by_kind[kind] = known + count, size + nbytes
    return by_kind, largest


def _optimizer_bytes(name: str, parameter: nn.Parameter) -> float:
    """Bytes of an optimiser's states for one parameter."""
    name = name.rsplit(".", 1)[-1].lower()
    if "8bit" in name and parameter.numel() < 4096:  # bitsandbytes keeps small tensors in 32 bits
        return 8 * parameter.numel()
    if "sgd" in name:
        return 0
    if "adafactor" in name:
        return 4 * sum(parameter.shape)
    one = parameter.numel() * (1 + 4 / 256) if "8bit" in name else parameter.nbytes
    return (1 if "lion" in name or (name == "muon" and parameter.ndim == 2) else 2) * one


def simulate(model: Any, settings: Settings, rows: int, length: int, *, half: bool = False) -> tuple[int, int, int]:
    """Run one training step of a skeleton on fake tensors, with float32 weights in 16 bits if `half`.

    Returns:
        Bytes alive after the forward pass, at the highest moment without gradients, and with them.
    """
    training: Any = settings.training
    dtype = torch.bfloat16 if training.bf16 else torch.float16
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes: dict[int, Any] = {id(each): torch.empty(each.shape, dtype=each.dtype) for each in model.buffers()}
        for parameter in model.parameters():
            empty = torch.empty(parameter.shape, dtype=dtype if half else parameter.dtype)
            fakes[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    tracked = _Tracked({tensor.untyped_storage()._cdata for tensor in fakes.values()})
    model = copy.deepcopy(model, fakes)  # with them in the place of all weights and buffers
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    with warnings.catch_warnings(action="ignore"):
        add_fused_lm_head(causal, outputs=("log_probs", "entropy", "is_top1"))
        causal.train()
        if training.gradient_checkpointing:
            options = {"use_reentrant": False, **(training.gradient_checkpointing_kwargs or {})}  # TRL's default
            if options.pop("selective", False):  # TRL's own
                enable_selective_activation_checkpointing(causal)
            causal.gradient_checkpointing_enable(options)
            if settings.model.use_peft:
                causal.enable_input_require_grads()
    with mode:
        shape = (1, rows * length) if training.packing or training.padding_free else (rows, length)
        ids = torch.zeros(shape, dtype=torch.long)
        positions, mask = torch.arange(ids.numel())[None], torch.ones_like(ids)
        more = {"position_ids": positions} if shape[0] == 1 else {"attention_mask": mask}
        with tracked:
            with torch.autocast("cpu", dtype, enabled=training.bf16 or training.fp16):
                out = model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True, **more)
                loss = -out.log_probs.sum()
            after_forward = len(tracked.events)
            loss.backward()
        gradients = {p.grad.untyped_storage()._cdata for p in model.parameters() if p.grad is not None}
    # A storage's number may be used again; the last one with a gradient's number is the gradient.
    last = {number: at for at, (number, size) in enumerate(tracked.events) if number in gradients and size > 0}
    others = [0 if last.get(number) == at else size for at, (number, size) in enumerate(tracked.events)]
    alive = [*accumulate(size for _, size in tracked.events)]
    return alive[after_forward - 1], max(accumulate(others)), max(alive)


class _Tracked(TorchDispatchMode):
    """Records (storage, +bytes or -bytes) of each tensor made and freed inside; `own` storages do not count."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = own
        self.events: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # Fused experts: PyTorch knows the result's shape in 16 bits alone
            in16 = [arg.bfloat16() if arg is not None and arg.is_floating_point() else arg for arg in args[:4]]
            out = func(*in16).to(args[0].dtype)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.events.append((storage._cdata, storage.nbytes()))
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, number: int, size: int) -> None:
        self.known.discard(number)
        self.events.append((number, -size))


def peak_memory() -> int:
    """Bytes at the highest moment so far: of the GPU's tensors, without a GPU of the process (resident set size)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "linux":  # where ru_maxrss begins at the peak of the process that started this one
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_table(settings: Settings, model: nn.Module, found: Forecast | None) -> list[tuple[str, str]]:
    """What a run prints of its memory before the first step, as (what, how much) lines."""
    training = settings.training
    count = get_model_param_count(model, trainable_only=True)  # knows of ZeRO-3's empty ones
    total = found.total if found else get_model_param_count(model)
    lines = [("trained parameters", f"{count:,} of {total:,} ({count / total:.2%})")]
    if settings.model.use_peft:
        lines.insert(0, ("the adapter is on", adapted_layers(model)))
    if found:
        before = f"{_gb(2 * total)} in 16 bits before, " if settings.quantised else ""
        shorter = training.max_length and found.length < training.max_length
        basis = f"{found.length:,} tokens, the longest row" if shorter else f"rows of {found.length:,} tokens"
        differs = f" (`ma-sft plan` takes max_length, {training.max_length:,})" if shorter else ""
        lines += [
            ("weights", f"{before}{_gb(found.weights)}{' quantised' if before else ''}"),
            ("gradients", _gb(found.gradients)),
            (f"states of {settings.optimizer}", _gb(found.optimizer)),
            ("peak of memory", f"{_gb(found.peak)} forecast for one process at {basis}{differs}"),
        ]
    if settings.quantised and training.use_cpu:
        how = "nothing is paged, optimiser states stay in memory; each product unpacks its weights first"
        lines.append(("bitsandbytes on the CPU", how))
    return lines


def on_device(found: Forecast, launcher: Launcher, gpus: int, memory: float) -> dict[str, float]:
    """Bytes on each of `gpus` GPUs by part, in the machine's memory (`host`) if it offloads; whether it `fits`.

    DDP adds a bucket copy of the gradients. DeepSpeed trains in 16 bits with a float32 copy beside the optimiser's
    states. A sharded model gathers two blocks of layers at a time, the current and the next.
    """
    trainable, deepspeed = found.trainable, launcher.deepspeed
    frozen = found.weights - found.gradients  # the trainable weights have their gradients' dtype
    terms = {"weights": found.weights, "gradients": found.gradients, "optimizer": found.optimizer}
    if deepspeed:
        states = max(found.optimizer, 8 * trainable) + 4 * trainable
        terms = {"weights": frozen + 2 * trainable, "gradients": 2 * trainable, "optimizer": states}
    shares = {"weights": launcher.stage == 3, "gradients": launcher.stage >= 2, "optimizer": launcher.stage >= 1}
    parts = {name: 0.0 if launcher.offload else size / (gpus if shares[name] else 1) for name, size in terms.items()}
    parts["gradients"] *= 2 if launcher.name == "ddp" else 1
    parts["weights"] += 2 * found.layer if launcher.stage == 3 else 0
    overlap = 0 if launcher.many else found.overlap
    parts["activations"] = float(found.activations16 if launcher.stage else found.activations - overlap)
    parts["activations"] /= gpus if launcher.sequence else 1
    used = sum(parts.values())
    reserve = found.reserve or CUDA_BYTES + CUDA_SHARE * used
    host = float(sum(terms.values())) if launcher.offload else 0.0  # of all GPUs of the machine
    return {**parts, "reserve": reserve, "total": used + reserve, "host": host, "fits": used + reserve <= memory}


def bytes_of(text: str) -> int:
    """`"80GB"`, `"24 GiB"`, `"16g"` in bytes.

    Raises:
        RecipeError: not such a text.
    """
    size = text.replace(" ", "").upper()
    try:
        return int(convert_file_size_to_int(size if size.endswith("B") else f"{size}B"))
    except ValueError:
        raise RecipeError(f"--gpu_memory: a size like 80GB or 24GiB expected, found {text!r}") from None


def plan(settings: Settings, gpus: int | None = None, gpu_memory: str | None = None) -> dict[str, Any]:
    """The forecast for each launcher, and the first that fits.

    Before the launcher that offloads, smaller batches with accumulation, checkpointing and a 4-bit base are tried.

    Args:
        settings: the resolved recipe.
        gpus: how many there will be; None takes this machine's, 0 plans for the CPU.
        gpu_memory: of each, e.g. `"80GB"`; None takes this machine's.

    Returns:
        `forecast` (fields of `Forecast`, with `peak`), `gpus`, `memory` of each in bytes, `launchers` (name -> bytes by
        part with `total` and `fits`), and the `choice` (None if nothing fits) with the `changes` of settings that it
        needs and the `total` that it then takes.
    """
    here = torch.cuda.device_count()
    gpus = here if gpus is None else gpus
    if gpus and not (gpu_memory or here):
        raise RecipeError("this machine has no GPU to measure: say how large one is with --gpu_memory, e.g. 80GB")
    if gpu_memory:
        memory = bytes_of(gpu_memory)
    else:
        memory = torch.cuda.get_device_properties(0).total_memory if gpus else psutil.virtual_memory().total
    asked: Any = None  # what the settings as they are need, on each launcher
    for changes in ({}, *_smaller(settings)):
        if asked and "load_in_4bit" not in changes and asked[0].static > memory * max(gpus, 1):
            continue  # smaller activations would not do
        changed = _changed(settings, gpus, **changes)
        found, candidates = forecast(changed), _candidates(changed, gpus)
        launchers = {one.name: on_device(found, one, max(gpus, 1), memory) for one in candidates}
        if any(launchers[one.name]["fits"] for one in candidates if not (one.sequence or one.offload)):
            launchers = {one.name: launchers[one.name] for one in candidates if not one.sequence}
        asked = asked or (found, launchers)
        choice = next((name for name, parts in launchers.items() if parts["fits"] and not parts["host"]), None)
        if choice:
            break
    else:
        changes, launchers = {}, asked[1]
        choice = next((name for name, parts in launchers.items() if parts["fits"]), None)  # with offload
    return {
        "forecast": {**asdict(asked[0]), "peak": asked[0].peak},
        "gpus": gpus,
        "memory": memory,
        "launchers": asked[1],
        "choice": choice,
        "changes": changes,
        "total": launchers[choice]["total"] if choice else None,
    }


def _candidates(settings: Settings, gpus: int) -> list[Launcher]:
    """The launchers for so many GPUs; of them, ZeRO-3 cannot share out bitsandbytes' weights, FSDP can if stored so.

    Rows are split over GPUs only where a batch is one row already, and is no pack.
    """
    training = settings.training
    names = {"fsdp2"} if settings.model.bnb_4bit_quant_storage is not None else set()
    fitting = [one for one in LAUNCHERS if one.many == (gpus > 1) or one.offload]
    if training.packing or training.per_device_train_batch_size > 1:
        fitting = [one for one in fitting if not one.sequence]
    shared = [one for one in fitting if not (settings.quantised and one.stage == 3) or one.name in names]
    return shared if gpus else [CPU]


def _smaller(settings: Settings) -> Iterator[dict[str, Any]]:
    """Changes of the settings, each with those before it, that need less memory and learn the same, or nearly."""
    training, changes = settings.training, {}
    rows, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    for fewer in (fewer for fewer in range(rows - 1, 0, -1) if rows % fewer == 0):
        changes = {"per_device_train_batch_size": fewer, "gradient_accumulation_steps": steps * rows // fewer}
        yield changes
    if not training.gradient_checkpointing:
        changes = {**changes, "gradient_checkpointing": True}
        yield changes
    if settings.model.use_peft and not settings.quantised:
        yield {**changes, "load_in_4bit": True}


def _changed(settings: Settings, gpus: int, **changes: Any) -> Settings:
    """The recipe with other settings, for so many GPUs; what is given stays as it is."""
    changed = Recipe(**{**settings.chosen, **changes}).resolve()
    training = copy.copy(changed.training)
    training.use_cpu = gpus == 0
    return replace(changed, training=training)


def advice(settings: Settings, found: dict[str, Any]) -> list[str]:
    """Settings that make the plan's choice faster and change nothing of what is learned, a line each."""
    gpus, training, lines = found["gpus"], settings.training, []
    launcher = next((one for one in LAUNCHERS if one.name == found["choice"]), CPU)
    options = training.gradient_checkpointing_kwargs or {}
    cheaper: dict[str, dict[str, Any]] = {}
    if training.gradient_checkpointing and not options.get("selective"):
        cheaper["gradient_checkpointing=false"] = {"gradient_checkpointing": False}
        if not (launcher.deepspeed and settings.model.use_peft):  # TRL refuses the two together
            selective = {"gradient_checkpointing_kwargs": {**options, "selective": True, "use_reentrant": False}}
            cheaper["gradient_checkpointing_kwargs='{\"selective\": true}'"] = selective
    for words, changes in cheaper.items():
        parts = on_device(forecast(_changed(settings, gpus, **changes)), launcher, max(gpus, 1), found["memory"])
        if parts["fits"]:
            lines.append(f"{words} fits too ({_gb(parts['total'])}): less is computed again")
            break
    if gpus and settings.model.attn_implementation in (None, "sdpa", "eager"):
        installed = [n for n in (3, 2) if getattr(transformers.utils, f"is_flash_attn_{n}_available")()]
        lines += [f"attn_implementation=flash_attention_{n} is installed: faster in long packs" for n in installed[:1]]
    return lines


def start_command(choice: str, gpus: int, words: Sequence[str]) -> str:
    """The command that trains a recipe, if one is among the words, with a launcher; it runs as it stands."""
    launcher = [] if choice in ("cpu", "single_gpu") else ["--launcher", choice, "--gpus", str(gpus)]
    return shlex.join(["ma-sft", "train", *words, *launcher])


def show_plan(settings: Settings, found: dict[str, Any], words: Sequence[str]) -> None:
    """Print a plan: the arithmetic, a table of launchers, and the command that runs the recipe with its flags."""
    screen = console()
    gpus, choice = found["gpus"], found["choice"]
    for line in found["forecast"]["lines"]:
        screen.print(line, soft_wrap=True)
    where = f"on each GPU, which has {_gb(found['memory'])}" if gpus else f"of this machine's {_gb(found['memory'])}"
    table = Table("", *found["launchers"], title=f"GB {where}")
    names = {"reserve": "CUDA, allocator" if gpus else "process", "total": "total", "host": "in host memory"}
    for part in ("weights", "gradients", "optimizer", "activations", *names):
        cells = [f"{parts[part] / 1e9:.2f}" for parts in found["launchers"].values()]
        table.add_row(names.get(part, part), *cells, end_section=part in ("reserve", "total"))
    table.add_row("fits", *("yes" if parts["fits"] else "no" for parts in found["launchers"].values()))
    screen.print(table)
    if choice is None:
        adapter = "" if settings.model.use_peft else "use_peft=true with load_in_4bit=true, "
        screen.print(f"nothing fits, not even one row at a time; try {adapter}a shorter max_length, or more GPUs")
        return
    changes = {key: str(value).lower() for key, value in found["changes"].items()}
    if changes:
        needed = " ".join(f"{key}={value}" for key, value in changes.items())
        screen.print(f"too large as it is; {choice} fits with {needed}: {_gb(found['total'])}", soft_wrap=True)
    for line in advice(settings, found) if not changes else ():
        screen.print(f"faster: {line}", soft_wrap=True)
    more = [word for key, value in changes.items() for word in (f"--{key}", value)]
    screen.print(start_command(choice, gpus, [*words, *more]), soft_wrap=True)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
