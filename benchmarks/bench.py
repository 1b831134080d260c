"""Preparation and packing side by side with plain TRL, in one process and one run; ratios are ours to TRL.

python benchmarks/bench.py [--lengths 200000] [--conversations 20000] [--steps 8]
"""

import argparse
import json
import logging
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from rich.console import Console
from rich.table import Table

# Both sides start cold: nothing prepared earlier may be found again.
SCRATCH = tempfile.TemporaryDirectory()


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def in_turn(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int = 3) -> tuple[Any, float, Any, float]:
    """The last result and the best time of each side; they take turns, so that neither alone warms the memory."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        our_result, seconds = timed(ours)
        times[0].append(seconds)
        their_result, seconds = timed(theirs)
        times[1].append(seconds)
    return our_result, min(times[0]), their_result, min(times[1])


def log_normal_rows(count: int, seq_length: int) -> Dataset:
    """Rows of random tokens, in memory; lengths are log-normal with median 200, clipped at `seq_length`."""
    rng = np.random.default_rng()
    lengths = np.clip(rng.lognormal(np.log(200), 0.8, count).astype(int), 1, seq_length)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = pa.array(rng.integers(0, 50_000, offsets[-1], dtype=np.int32))
    column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
    return Dataset(pa.table({"input_ids": column, "labels": column}), fingerprint=f"{rng.integers(1 << 60):x}")


def packing(count: int, seq_length: int = 2048) -> list[tuple[str, float, float]]:
    """Density and rows/s of best-fit packing.

    Both sides move the same tokens and labels: from memory to memory, from disk to disk, and in memory once more for
    five times as many rows, to see whether the time grows with the rows alone.
    """
    from trl import pack_dataset

    from ma_sft import pack

    def theirs(source: Dataset) -> Dataset:
        return pack_dataset(source, seq_length, "bfd", map_kwargs={"load_from_cache_file": False})

    small, many = log_normal_rows(count, seq_length), 5 * count
    ours, our_seconds, trl, their_seconds = in_turn(partial(pack, small, seq_length), partial(theirs, small))
    packs = len(small.data.column("input_ids").combine_chunks().values) / seq_length
    measures = [
        (f"packing {count:,} rows in memory: rows/s", count / our_seconds, count / their_seconds),
        ("packing: density", packs / len(ours), packs / len(trl)),
    ]
    small.save_to_disk(f"{SCRATCH.name}/lengths")
    stored = datasets.load_from_disk(f"{SCRATCH.name}/lengths")
    to_file = partial(pack, stored, seq_length, cache_file_name=f"{SCRATCH.name}/packed.arrow")
    _, our_seconds, _, their_seconds = in_turn(to_file, partial(theirs, stored))
    measures.append((f"packing {count:,} rows on disk: rows/s", count / our_seconds, count / their_seconds))
    large = log_normal_rows(many, seq_length)
    _, our_seconds, _, their_seconds = in_turn(partial(pack, large, seq_length), partial(theirs, large), rounds=1)
    measures.append((f"packing {many:,} rows in memory: rows/s", many / our_seconds, many / their_seconds))
    return measures


def preparation(count: int) -> list[tuple[str, float, float]]:
    """Conversations/s from JSON Lines on disk to packed, labelled sequences, assistant turns only, one process."""
    from fetch_tokenizers import fetch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    from ma_sft import pack
    from ma_sft.data.mixture import load_mixture
    from ma_sft.labels.encoder import ChatEncoder
    from ma_sft.labels.tokenize import tokenize

    rng = random.Random()
    words = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8").split()  # English prose
    path = Path(SCRATCH.name) / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns = [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(rng.choice([2, 2, 4]))]
            messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
            file.write(json.dumps({"messages": messages}) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(fetch("qwen3"))
    # TRL can mask assistant turns only of templates that it knows to the letter
    tokenizer.chat_template = (files("trl") / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")

    def ours() -> Any:
        rows = load_mixture([str(path)], num_proc=1).train
        return pack(tokenize(rows, ChatEncoder(tokenizer), num_proc=1), 4096)

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16, **small))

    def theirs() -> Any:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=f"{SCRATCH.name}/trl")
        settings = {"assistant_only_loss": True, "packing": True, "max_length": 4096}
        args = SFTConfig(SCRATCH.name, use_cpu=True, bf16=False, report_to="none", **settings)
        return SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train_dataset

    _, our_seconds = timed(ours)
    _, their_seconds = timed(theirs)
    return [(f"preparing {count:,} conversations: rows/s", count / our_seconds, count / their_seconds)]


def training(steps: int) -> list[tuple[str, float, float]]:
    """SmolLM2 on the demo's rows: step time on the same packs, and trained tokens/s against padded rows.

    TRL's own loop trains both sides. Plain TRL gets the rows as prompt and completion, in batches of four, which hold
    about as many tokens as one pack.
    """
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from ma_sft.labels.templates import load_tokenizer
    from ma_sft.labels.tokenize import label
    from ma_sft.recipe import Recipe
    from ma_sft.training.adapters import lora_config
    from ma_sft.training.prepare import prepare
    from ma_sft.training.trainer import make_trainer

    recipe = Recipe.load(Path(__file__).parents[1] / "recipes" / "demo.py")
    flags = ["--output_dir", f"{SCRATCH.name}/run", "--max_steps", "-1", "--num_train_epochs", "1"]
    settings = recipe.resolve([*flags, "--report_to", "none", "--disable_tqdm", "true"])
    tokenizer, _ = load_tokenizer(settings)
    packs = prepare(settings, tokenizer).dataset.select(range(steps))
    chats = label(settings, tokenizer).conversations.select(range(4 * steps))
    pairs = [{"prompt": m[:-1], "completion": m[-1:]} for m in chats["messages"]]

    def plain(rows: Dataset, **options: Any) -> SFTTrainer:
        kept = ("learning_rate", "lr_scheduler_type", "bf16", "use_cpu", "logging_steps", "gradient_checkpointing")
        same = {name: getattr(settings.training, name) for name in kept} | {
            "num_train_epochs": 1,
            "save_strategy": "no",
        }
        args = SFTConfig(f"{SCRATCH.name}/plain", report_to="none", disable_tqdm=True, **same, **options)
        model = AutoModelForCausalLM.from_pretrained(
            settings.model.model_name_or_path, dtype=settings.model.dtype, attn_implementation="eager"
        )
        return SFTTrainer(
            model, args, train_dataset=rows, processing_class=tokenizer, peft_config=lora_config(settings)
        )

    ours = make_trainer(settings, tokenizer, [], packs, None)
    theirs = plain(packs, per_device_train_batch_size=1, padding_free=True, max_length=None)
    _, our_seconds, _, their_seconds = in_turn(ours.train, theirs.train, rounds=5)
    padded = plain(Dataset.from_list(pairs), per_device_train_batch_size=4, completion_only_loss=True)
    trained = {name: sum(t != -100 for row in rows["labels"] for t in row) for name, rows in
               (("ours", packs), ("TRL", padded.train_dataset))}  # fmt: skip
    _, packed_seconds, _, padded_seconds = in_turn(ours.train, padded.train)
    return [
        ("training on the same packs: steps/s", steps / our_seconds, steps / their_seconds),
        ("training on the demo: trained tokens/s", trained["ours"] / packed_seconds, trained["TRL"] / padded_seconds),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, default=200_000)
    parser.add_argument("--conversations", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    table = Table("", "ours", "TRL", "ratio")
    for name, ours, trl in packing(options.lengths) + preparation(options.conversations) + training(options.steps):
        table.add_row(name, f"{ours:,.4g}", f"{trl:,.4g}", f"{ours / trl:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
