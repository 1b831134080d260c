"""How much rank does a fine-tune need? One full run, one LoRA run per rank, the same data, order and steps.

    python benchmarks/lora_rank.py --train data/demo/train.jsonl --heldout data/demo/heldout.jsonl --out runs/lora-rank

Left picture: the singular values of the full run's update W_after - W_before, divided by the largest, as the median
over the layers for each kind of matrix. Right picture: the training loss of the full run and of each rank.
`lora_rank.json` holds the numbers, and the share of the update's squared norm that its best approximation of rank r
keeps (Eckart & Young 1936). Data is any Alpaca-form JSON Lines file, the model any that the reference decoder loads.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ma_sft.demo import demo_model
from ma_sft.reference import lora, model, template, train

PATTERN = r"\.(q|k|v|o|gate|up|down)_proj$"


def spectra(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Singular values of each kind of matrix's update, largest first and divided by it, median over the layers."""
    by_kind: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, start in before.items():
        values = torch.linalg.svdvals(after[name] - start)
        by_kind[name.removesuffix(".weight").rpartition(".")[2]].append(values / values[0])
    return {kind: torch.stack(found).median(dim=0).values.tolist() for kind, found in by_kind.items()}


def kept_share(spectrum: Sequence[float], rank: int) -> float:
    """sum of the first `rank` squared singular values / sum of all."""
    squares = [value**2 for value in spectrum]
    return sum(squares[:rank]) / sum(squares)


def one_run(args: argparse.Namespace, rows: Any, heldout: Any, pad_id: int, rank: int) -> dict[str, Any]:
    """Train with LoRA of `rank`, or all weights at rank 0: losses, held-out loss, seconds; the full run's spectra."""
    torch.manual_seed(args.seed)
    decoder = model.load(args.model).to(args.device)
    if rank:
        lora.inject(decoder, PATTERN, r=rank, alpha=args.lora_alpha)
    settings = train.Settings(
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=1,
        learning_rate=args.lora_learning_rate if rank else args.full_learning_rate,
        warmup_steps=max(1, args.max_steps // 10),
        seed=args.seed,
    )
    matrices = {n: p for n, p in decoder.named_parameters() if n.endswith("_proj.weight")}
    before = {} if rank else {name: weight.detach().clone() for name, weight in matrices.items()}
    started = time.perf_counter()
    losses = train.train(decoder, rows, settings, pad_id)
    found = {
        "losses": losses,
        "seconds": round(time.perf_counter() - started, 1),
        "heldout_loss": train.evaluate(decoder, heldout, pad_id),
        "trained_weights": sum(p.numel() for p in decoder.parameters() if p.requires_grad),
    }
    if not rank:
        found["spectra"] = spectra(before, {name: weight.detach() for name, weight in matrices.items()})
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Both pictures into one file; the ending (.png, .svg) chooses the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for kind, values in results["full"]["spectra"].items():
        left.semilogy(range(1, len(values)), values[: len(values) - 1], label=kind)
    left.set(title="update of full fine-tuning", xlabel="index of singular value", ylabel="value / largest value")
    left.legend(fontsize=8)
    right.plot(range(1, len(results["full"]["losses"]) + 1), results["full"]["losses"], "k", lw=2, label="full")
    for rank, run in results["lora"].items():
        right.plot(range(1, len(run["losses"]) + 1), run["losses"], label=f"r = {rank}")
    right.set(title="training loss", xlabel="step", ylabel="loss per label token", yscale="log")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="checkpoint folder; without it, the demo model")
    parser.add_argument("--train", type=Path, default=Path("data/demo/train.jsonl"))
    parser.add_argument("--heldout", type=Path, default=Path("data/demo/heldout.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/lora-rank"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--heldout_rows", type=int, default=32)
    parser.add_argument("--lora_alpha", type=float, default=16)
    parser.add_argument("--lora_learning_rate", type=float, default=1e-3)
    parser.add_argument("--full_learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    args.model = args.model or str(demo_model())

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows, heldout = (
        [[template.encode(c, tokenizer, "chatml")] for c in train.read_alpaca(path)]
        for path in (args.train, args.heldout)
    )
    heldout = heldout[: args.heldout_rows]
    results: dict[str, Any] = {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}}
    del results["settings"]["model"]
    results["full"] = one_run(args, rows, heldout, pad_id, rank=0)
    results["kept_share"] = {
        kind: {rank: kept_share(values, rank) for rank in args.ranks}
        for kind, values in results["full"]["spectra"].items()
    }
    results["lora"] = {rank: one_run(args, rows, heldout, pad_id, rank) for rank in args.ranks}

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "lora_rank.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for ending in ("png", "svg"):
        draw(results, args.out / f"lora_rank.{ending}")
    print(f"{'rank':>6} {'weights':>12} {'last loss':>10} {'held-out':>9} {'seconds':>8}")
    for name, run in {"full": results["full"], **results["lora"]}.items():
        numbers = f"{run['trained_weights']:>12,} {run['losses'][-1]:>10.4f} {run['heldout_loss']:>9.4f}"
        print(f"{name:>6} {numbers} {run['seconds']:>8.1f}")
    print("share of the full update that its best approximation of rank r keeps, mean over the kinds of matrices:")
    for rank in args.ranks:
        shares = [shares[rank] for shares in results["kept_share"].values()]
        print(f"  r = {rank:<4} {sum(shares) / len(shares):.3f}")
    print(f"pictures and numbers: {args.out}")


if __name__ == "__main__":
    main()
