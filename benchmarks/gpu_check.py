"""Speed and memory on this machine's GPU, side by side with plain TRL, in one process and one run of at most 8 minutes.

python benchmarks/gpu_check.py [--model FOLDER] [--steps 20] [--max_length 1024] [--minutes 8] [--device cpu]

Each case trains the same rows with the same settings twice: by a recipe, and by `trl.SFTTrainer` alone. Ratios are ours
to TRL; the peak of allocated memory is held against the forecast that a run prints before its first step, too. Without
`--model` it is a Qwen3 of 0.6 billion random parameters with a tokenizer made of this repository's texts, so that
nothing is downloaded. The table is kept in benchmarks/results/gpu.md. `--device cpu` is for a look at the logic.
"""

import argparse
import gc
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from ma_sft import Recipe
from ma_sft.labels.templates import load_tokenizer
from ma_sft.tools.memory import forecast
from ma_sft.training.distributed import available_attention
from ma_sft.training.prepare import prepare
from ma_sft.training.trainer import build_trainer

ROOT = Path(__file__).parents[1]
HEADS = ("", "ours: tokens/s", "TRL: tokens/s", "ratio", "peak memory, ours to TRL", "forecast to measured peak")
LORA = {"use_peft": True, "lora_target_modules": "all-linear", "lora_r": 16}
PACKED = {**LORA, "packing": True}
SELECTIVE = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}}
NONE = {"gradient_checkpointing": False}
CASES: dict[str, dict[str, Any]] = {
    "LoRA": LORA,
    "LoRA, packed": PACKED,
    "LoRA, packed, selective checkpointing": {**PACKED, **SELECTIVE},
    "LoRA, packed, no checkpointing": {**PACKED, **NONE},
    "full, packed": {"packing": True},
    "full, packed, selective checkpointing": {"packing": True, **SELECTIVE},
    "QLoRA, packed": {**PACKED, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "LoRA, packed, FlashAttention 2": {**PACKED, "attn_implementation": "flash_attention_2"},
    "LoRA, packed, FlashAttention 3": {**PACKED, "attn_implementation": "flash_attention_3"},
    "LoRA, packed, flex attention": {**PACKED, "attn_implementation": "flex_attention"},
    "LoRA, packed, Liger": {**PACKED, "use_liger_kernel": True},
    "LoRA, packed, torch.compile": {**PACKED, **NONE, "torch_compile": True},
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


def save_model(folder: Path, tiny: bool) -> str:
    """A Qwen3 of random weights, in the shape of the 0.6B or tiny, with a tokenizer made of this repository's texts."""
    bpe = ByteLevelBPETokenizer()
    texts = [str(path) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))]
    bpe.train(
        texts, vocab_size=8_000, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (files("trl") / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": True}  # fmt: skip
    if tiny:
        shape |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 8_000}  # fmt: skip
    Qwen3ForCausalLM(Qwen3Config(**shape, dtype="bfloat16")).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def measure(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(case, what both sides measured) or (case, why it was not measured)."""
    gpu = options.device == "gpu"
    rows = scratch / "rows.jsonl"
    write_rows(rows, options.batch_size * options.steps * 8, options.max_length)
    model = options.model or save_model(scratch / "model", tiny=not gpu)
    end = time.monotonic() + 60 * options.minutes
    for name, case in CASES.items():
        wanted = case.get("attn_implementation")
        if time.monotonic() > end:
            yield name, f"the {options.minutes:g} minutes were over"
        elif available_attention(wanted) != wanted:
            yield name, f"{wanted} is not installed for this machine"
        elif not gpu and (wanted == "flex_attention" or case.get("torch_compile")):
            yield name, "it compiles for minutes on a CPU"
        else:
            settings = {
                "model_name_or_path": model,
                "dataset_name": str(rows),
                "output_dir": str(scratch / "run"),
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
            yield name, {"ours": attempt(ours, settings, warm_up), "trl": attempt(theirs, settings, warm_up)}


def attempt(side: Callable[..., dict[str, float]], settings: dict[str, Any], warm_up: int) -> dict[str, float] | str:
    """What a side measured, or why not: one kernel that this GPU lacks must not cost the other cases."""
    try:
        return side(settings, warm_up)
    except Exception as error:
        return f"not measured: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"


def cells(found: dict[str, Any] | str) -> list[str]:
    if isinstance(found, str):
        return [f"not measured: {found}", *[""] * (len(HEADS) - 2)]
    if any(isinstance(side, str) for side in found.values()):
        shown = [side if isinstance(side, str) else f"{side['tokens_per_second']:,.0f}" for side in found.values()]
        return [*shown, *[""] * (len(HEADS) - 3)]
    speeds = [found[side]["tokens_per_second"] for side in ("ours", "trl")]
    peaks = [found[side]["peak_bytes"] for side in ("ours", "trl")]
    memory = [peaks[0] / peaks[1], found["ours"]["forecast_peak_bytes"] / peaks[0]] if all(peaks) else []
    ratios = [f"{ratio:.2f}" for ratio in (speeds[0] / speeds[1], *memory)]
    return [*(f"{speed:,.0f}" for speed in speeds), *ratios, *["not measured"] * (3 - len(ratios))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a hub id; without it, one of random weights")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=8, help="no case begins after so many")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.device == "gpu" and not torch.accelerator.is_available():
        sys.exit("no GPU on this machine: nothing was measured (--device cpu tries the logic)")
    device = torch.cuda.get_device_name() if options.device == "gpu" and torch.cuda.is_available() else options.device
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "ma-sft")
    )
    lines = [
        f"`{' '.join(['python benchmarks/gpu_check.py', *sys.argv[1:]])}`\n",
        f"{date.today()}, {device}, {versions}. {options.steps} steps of {options.batch_size} x {options.max_length} "
        "tokens at most, the same rows and settings on both sides.\n",
        f"| {' | '.join(HEADS)} |",
        f"|{' --- |' * len(HEADS)}",
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, found in measure(options, Path(scratch)):
            lines.append(f"| {' | '.join([name, *cells(found)])} |")
            print(lines[-1], flush=True)
            (options.out / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"kept as {options.out / 'gpu.md'}")


if __name__ == "__main__":
    main()
