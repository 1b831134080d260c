"""Speed and memory on this machine's GPU, side by side with plain TRL, in one process and one run.

python benchmarks/gpu_check.py [--model demo] [--steps 30] [--max_length 1024] [--device cpu]

Each case trains the same rows with the same settings twice: by a recipe, and by `trl.SFTTrainer` alone. Ratios are ours
to TRL; the peak of allocated memory is held against the forecast that a run prints before its first step, too. The
result is kept as JSON, with the device's name and the date. `--device cpu` is for a look at the logic.
"""

import argparse
import gc
import json
import logging
import random
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from ma_sft import Recipe
from ma_sft.labels.templates import load_tokenizer
from ma_sft.tools.memory import forecast
from ma_sft.training.distributed import available_attention
from ma_sft.training.prepare import prepare
from ma_sft.training.trainer import build_trainer

LORA = {"use_peft": True, "lora_target_modules": "all-linear", "lora_r": 16}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": LORA,
    "QLoRA": {**LORA, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "LoRA, packed, SDPA": {**LORA, "packing": True},
    "LoRA, packed, flex attention": {**LORA, "packing": True, "attn_implementation": "flex_attention"},
    "LoRA, packed, FlashAttention 2": {**LORA, "packing": True, "attn_implementation": "flash_attention_2"},
}


class Meter(TrainerCallback):
    """Tokens per second after the first steps, which compile and allocate, and the peak of allocated memory."""

    def __init__(self, trainer: SFTTrainer, warm_up: int) -> None:
        self.trainer, self.warm_up = trainer, warm_up
        self.marks: list[tuple[float, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.warm_up, state.max_steps):
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            self.marks.append((time.perf_counter(), self.trainer._total_train_tokens))

    def result(self) -> dict[str, float]:
        (start, before), (end, after) = self.marks
        peak = torch.accelerator.max_memory_allocated() if torch.accelerator.is_available() else 0
        return {"tokens_per_second": (after - before) / (end - start), "peak_bytes": peak}


def train(trainer: SFTTrainer, warm_up: int) -> dict[str, float]:
    meter = Meter(trainer, warm_up)
    trainer.add_callback(meter)
    trainer.train()
    return meter.result()


def fresh() -> None:
    """Nothing of an earlier trainer may count as this one's memory."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()


def ours(settings: dict[str, Any], warm_up: int) -> dict[str, float]:
    fresh()
    resolved = Recipe(name="gpu-check", check=False, **settings).resolve()
    tokenizer, added = load_tokenizer(resolved)
    data: Any = prepare(resolved, tokenizer).dataset
    expected = forecast(resolved, max(map(len, data["input_ids"]))).peak
    found = train(build_trainer(resolved, tokenizer, added, data, None), warm_up)
    return {**found, "forecast_peak_bytes": expected}


def theirs(settings: dict[str, Any], warm_up: int) -> dict[str, float]:
    """The same settings and rows, as TRL's own documentation puts them together."""
    fresh()
    resolved = Recipe(name="gpu-check", **settings).resolve()
    load_tokenizer(resolved)  # for the folder of the model "demo"
    rows = datasets.load_dataset("json", data_files=settings["dataset_name"], split="train")
    model: ModelConfig = resolved.model
    args: SFTConfig = resolved.training
    args.assistant_only_loss = False  # these are prompts and completions: TRL trains the completions by itself
    args.model_init_kwargs = {"attn_implementation": model.attn_implementation, "dtype": model.dtype}
    trainer = SFTTrainer(
        model.model_name_or_path,
        args,
        train_dataset=rows,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    return train(trainer, warm_up)


def write_rows(path: Path, count: int, max_length: int) -> None:
    """Questions with answers whose lengths are log-normal, as chat data's are: many short ones and a long tail."""
    draw = random.Random(0)
    words = Path(__file__).read_text(encoding="utf-8").split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            length = min(int(draw.lognormvariate(4, 1)) + 2, max_length // 4)
            texts = (" ".join(draw.choices(words, k=n)) for n in (draw.randint(5, 15), length))
            row = {
                key: [{"role": role, "content": text}]
                for key, role, text in zip(("prompt", "completion"), ("user", "assistant"), texts, strict=True)
            }
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.device == "gpu" and not torch.accelerator.is_available():
        sys.exit("no GPU on this machine: nothing was measured (--device cpu tries the logic)")
    gpu = options.device == "gpu"
    device = torch.cuda.get_device_name() if gpu and torch.cuda.is_available() else options.device
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    results: dict[str, Any] = {}
    table = Table(
        *("", "ours: tokens/s", "TRL: tokens/s", "ratio", "peak memory, ours to TRL", "forecast to measured peak"),
        title=device,
    )
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        write_rows(rows, options.batch_size * options.steps * 8, options.max_length)
        for name, case in CASES.items():
            wanted = case.get("attn_implementation")
            if available_attention(wanted) != wanted or (wanted == "flex_attention" and not gpu):
                print(f"not measured: {name} ({wanted} does not train on this machine)")
                continue
            settings = {
                "model_name_or_path": options.model,
                "dataset_name": str(rows),
                "output_dir": f"{scratch}/run",
                "max_length": options.max_length,
                "max_steps": options.steps,
                "per_device_train_batch_size": options.batch_size,
                "bf16": gpu,
                "dtype": "bfloat16" if gpu else "float32",
                "use_cpu": not gpu,
                "report_to": "none",
                "save_strategy": "no",
                "disable_tqdm": True,
                **case,
            }
            warm_up = max(1, options.steps // 3)
            found = {"ours": ours(settings, warm_up), "trl": theirs(settings, warm_up)}
            results[name] = found
            speeds = [found[side]["tokens_per_second"] for side in ("ours", "trl")]
            peaks = [found[side]["peak_bytes"] for side in ("ours", "trl")]
            table.add_row(
                name,
                *(f"{speed:,.0f}" for speed in speeds),
                f"{speeds[0] / speeds[1]:.2f}",
                f"{peaks[0] / peaks[1]:.2f}" if peaks[1] else "not measured",
                f"{found['ours']['forecast_peak_bytes'] / peaks[0]:.2f}" if peaks[0] else "not measured",
            )
    Console().print(table)
    for side in ("ours", "trl"):
        packed, loose = (results[name][side]["tokens_per_second"] for name in ("LoRA, packed, SDPA", "LoRA"))
        print(f"packed to unpacked, {side}: {packed / loose:.2f} in tokens/s")
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "ma-sft")}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu-check-{'-'.join(device.lower().split())}-{date.today()}.json"
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    content = {"device": device, "date": str(date.today()), "settings": settings, "versions": versions}
    path.write_text(json.dumps({**content, "cases": results}, indent=2) + "\n", encoding="utf-8")
    print(f"kept as {path}")


if __name__ == "__main__":
    main()
