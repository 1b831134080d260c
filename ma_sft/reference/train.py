"""The loss and the training loop.

    python -m ma_sft.reference.train [--max_steps 100] [--lora_r 16] [--train data/demo/train.jsonl] [--model FOLDER]

**Loss.** With y the shifted labels and K the positions where y_k is not -100, a step minimises

    L = -1/|K| * sum over k in K of log softmax(z_k)[y_k]            z: logits (B, T, V), float32

**Gradient accumulation.** A step's batch may come in several micro-batches. The gradient of a sum is the sum of the
gradients, so each micro-batch adds the gradient of its *sum* divided by the |K| of the *whole* step. The mean of the
micro-batches' means is something else: it gives a token in a short answer more weight than one in a long answer.

**AdamW** (Loshchilov & Hutter 2019), with g the clipped gradient, t the step from 1, per weight:

    m <- b1 m + (1-b1) g;   v <- b2 v + (1-b2) g^2
    w <- w - lr (m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + decay * w)         (decay on matrices, not on norms)

**Learning rate** at step s of N, W of them warm-up:  s/W for s < W, then (1 + cos(pi (s-W)/(N-W))) / 2, times the peak.

**Clipping.** The gradients of all weights together are one vector g; if |g| > c, it is scaled to length c.
"""

import argparse
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ma_sft.reference import InputError, collate, generate, lora, model, template

Row = Sequence[template.Encoded]


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run; names and meanings as in TRL's `SFTConfig`."""

    max_steps: int = 60
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 2
    learning_rate: float = 1e-4
    warmup_steps: int = 5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = False
    shuffle: bool = True
    seed: int = 42
    save_steps: int = 50


def loss_sum(decoder: nn.Module, batch: collate.Batch, bf16: bool = False) -> Tensor:
    """Sum of -log p(label) over the batch's label tokens; a scalar in float32.

    With `bf16`, matrix products run in bfloat16 while weights, norms, softmax and loss stay in float32.
    """
    device = next(decoder.parameters()).device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        logits = decoder(batch["input_ids"].to(device), batch["attention_mask"].to(device))
    labels = batch["labels"].to(device)
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=collate.IGNORE_INDEX, reduction="sum"
    )


def label_count(batches: Sequence[collate.Batch]) -> int:
    """|K|: the label tokens of all micro-batches of a step."""
    return sum(int((batch["labels"] != collate.IGNORE_INDEX).sum()) for batch in batches)


def backward(decoder: nn.Module, batches: Sequence[collate.Batch], bf16: bool = False) -> float:
    """Add the gradient of a step's loss to `.grad`, micro-batch by micro-batch, and return the loss."""
    tokens = label_count(batches)
    total = 0.0
    for batch in batches:
        loss = loss_sum(decoder, batch, bf16) / tokens
        loss.backward()
        total += loss.item()
    return total


def clip(parameters: Sequence[Tensor], limit: float) -> float:
    """Scale all gradients together to a length of at most `limit`; return their length before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    length = math.sqrt(sum(grad.pow(2).sum().item() for grad in grads))
    for grad in grads:
        grad.mul_(min(1.0, limit / (length + 1e-6)))
    return length


def learning_rate(step: int, settings: Settings) -> float:
    """The rate of step 0 .. max_steps - 1: linear warm-up, then half a cosine down towards zero."""
    if step < settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
    return settings.learning_rate * (1 + math.cos(math.pi * done)) / 2


@lru_cache(maxsize=2)
def _order(rows: int, epoch: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(rows, generator=generator).tolist()


def micro_batches(rows: Sequence[Row], step: int, settings: Settings, pad_id: int) -> list[collate.Batch]:
    """The micro-batches of one step. They follow from the step's number alone, so resuming needs no other state."""
    size = settings.per_device_train_batch_size
    first = step * size * settings.gradient_accumulation_steps

    def row(position: int) -> Row:
        epoch, index = divmod(position, len(rows))
        return rows[_order(len(rows), epoch, settings.seed)[index] if settings.shuffle else index]

    starts = range(first, first + size * settings.gradient_accumulation_steps, size)
    return [collate.pack([row(p) for p in range(start, start + size)], pad_id) for start in starts]


def make_optimizer(decoder: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW over the weights that are not frozen; matrices decay, norm weights do not."""
    trainable = [p for p in decoder.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.learning_rate)


def train(
    decoder: nn.Module,
    rows: Sequence[Row],
    settings: Settings,
    pad_id: int,
    checkpoint: Path | None = None,
    stop_at: int | None = None,
) -> list[float]:
    """Train `decoder` in place and return the loss of each step.

    Args:
        rows: each a list of encoded conversations that share one row of the batch; one per row means no packing.
        checkpoint: folder that is written every `save_steps` and at the end. If it exists, the run goes on from it
            exactly: weights, moments and the order of the data are those of a run that was never stopped.
        stop_at: stop before this step; the schedule still runs to `max_steps`.

    Raises:
        InputError: no rows, or the loss is no longer a finite number.
        InputError: the checkpoint is of a run with other settings, rows or weights.
    """
    if not rows:
        raise InputError("there are no rows to train on")
    decoder.train()
    optimizer = make_optimizer(decoder, settings)
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    run = {
        **dataclasses.asdict(settings),
        "rows": len(rows),
        "weights": [len(parameters), sum(p.numel() for p in parameters)],
    }
    losses = _resume(checkpoint, decoder, optimizer, run) if checkpoint and checkpoint.is_dir() else []
    stop = min(settings.max_steps, stop_at or settings.max_steps)
    with Progress() as progress:
        bar = progress.add_task("training", total=settings.max_steps, completed=len(losses))
        for step in range(len(losses), stop):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            losses.append(backward(decoder, micro_batches(rows, step, settings, pad_id), settings.bf16))
            if not math.isfinite(losses[-1]):
                raise InputError(f"step {step}: the loss is {losses[-1]}; lower the learning rate")
            clip(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(bar, advance=1, description=f"loss {losses[-1]:.4f}")
            if checkpoint and (len(losses) % settings.save_steps == 0 or len(losses) == stop):
                _save(checkpoint, decoder, optimizer, {**run, "losses": losses})
    return losses


def _named_state(decoder: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in decoder.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield name, key, value


def _save(folder: Path, decoder: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]) -> None:
    """Weights that are trained, both moments of each, settings and losses; the old one goes when the new is whole."""
    new = folder.with_name(folder.name + ".new")
    new.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().contiguous() for n, p in decoder.named_parameters() if p.requires_grad}
    save_file(weights, new / "weights.safetensors")
    state = {f"{key}/{name}": value for name, key, value in _named_state(decoder, optimizer)}
    save_file(state, new / "optimizer.safetensors")
    (new / "run.json").write_text(json.dumps(run), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def _resume(folder: Path, decoder: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]) -> list[float]:
    saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    losses: list[float] = saved.pop("losses")
    for key, value in saved.items():
        if value != run[key]:
            raise InputError(f"{folder}: {key} was {value} and is {run[key]}; delete the folder to start anew")
    weights = load_file(folder / "weights.safetensors")
    state = load_file(folder / "optimizer.safetensors")
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(weights[name])
            keys = ("step", "exp_avg", "exp_avg_sq")
            # AdamW counts its steps on the CPU
            optimizer.state[parameter] = {
                key: state[f"{key}/{name}"].to("cpu" if key == "step" else parameter.device) for key in keys
            }
    return losses


@torch.no_grad()
def evaluate(decoder: nn.Module, rows: Sequence[Row], pad_id: int, batch_size: int = 8) -> float:
    """Mean loss per label token over all rows."""
    decoder.eval()
    batches = [collate.pack(rows[i : i + batch_size], pad_id) for i in range(0, len(rows), batch_size)]
    return sum(loss_sum(decoder, batch).item() for batch in batches) / label_count(batches)


def read_alpaca(path: str | Path) -> list[list[template.Message]]:
    """A JSON Lines file with `instruction`, `input` (may be missing or empty) and `output` -> conversations.

    Raises:
        InputError: naming file, line and field.
    """
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from None
        for field in ("instruction", "output"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise InputError(f"{path}, line {number}: no text in field {field!r}")
        asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        found.append([{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The demo task with the reference alone: data, training, held-out loss, samples, a checkpoint folder."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description="Fine-tune a Llama or Qwen3 checkpoint with the reference loop.")
    parser.add_argument("--model", required=True, help="checkpoint folder; `python -m ma_sft.demo` prints the demo's")
    parser.add_argument("--train", type=Path, default=Path("data/demo/train.jsonl"), help="Alpaca-form JSON Lines")
    parser.add_argument("--heldout", type=Path, default=Path("data/demo/heldout.jsonl"))
    parser.add_argument("--heldout_rows", type=int, default=64, help="how many of them, from the first")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/scratch"))
    parser.add_argument("--template", default="chatml", choices=["chatml", "role-tags"])
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--packing", action="store_true", help="several conversations in a row of max_length")
    parser.add_argument("--lora_r", type=int, default=0, help="rank of the update; 0 trains all weights")
    parser.add_argument("--lora_alpha", type=float, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in dataclasses.fields(Settings):
        kind = type(field.default)
        action = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(f"--{field.name}", default=field.default, **action)
    args = parser.parse_args(arguments)
    for path in (args.train, args.heldout):
        if not path.is_file():
            parser.error(f"{path} does not exist; `python recipes/demo_data.py` writes the demo's data")
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    conversations = read_alpaca(args.train)
    encoded = [template.encode(c, tokenizer, args.template) for c in conversations]
    kept = [e for e in encoded if len(e.input_ids) <= args.max_length]
    print(f"{args.train}: {len(encoded)} rows, {len(encoded) - len(kept)} longer than {args.max_length} left out")
    rows: list[list[template.Encoded]] = [[e] for e in kept]
    if args.packing:
        rows = collate.first_fit(kept, args.max_length)
        print(f"packed into {len(rows)} rows of at most {args.max_length} tokens")
    tests = read_alpaca(args.heldout)[: args.heldout_rows]
    heldout = [[template.encode(c, tokenizer, args.template)] for c in tests]

    torch.manual_seed(settings.seed)
    decoder = model.load(args.model).to(args.device)
    if args.lora_r:
        lora.inject(decoder, r"(q|k|v|o|gate|up|down)_proj$", r=args.lora_r, alpha=args.lora_alpha)
    before = evaluate(decoder, heldout, pad_id)
    started = time.perf_counter()
    losses = train(decoder, rows, settings, pad_id, checkpoint=args.output_dir / "checkpoint")
    seconds = time.perf_counter() - started
    after = evaluate(decoder, heldout, pad_id)
    print(f"{len(losses)} steps, {seconds:.0f} s; held-out loss {before:.4f} -> {after:.4f}")

    ends = [template.special_id(tokenizer, "<|im_end|>" if args.template == "chatml" else tokenizer.eos_token)]
    prompts = [template.encode_prompt(c[:-1], tokenizer, args.template) for c in tests[:3]]
    answers = generate.generate(decoder, prompts, max_new_tokens=80, eos_ids=ends, pad_id=pad_id)
    for conversation, answer in zip(tests, answers, strict=False):
        print(f"\n{conversation[0]['content']}\n  -> {tokenizer.decode(answer, skip_special_tokens=True)}")
    if args.lora_r:
        lora.save_adapter(decoder, args.output_dir / "adapter", base_model=args.model)
    else:
        model.save(decoder, args.output_dir / "final")
        shutil.copy(Path(args.model) / "config.json", args.output_dir / "final")
        tokenizer.save_pretrained(args.output_dir / "final")


if __name__ == "__main__":
    main()
