"""One side of a comparison, as a process of its own: what `bench.py` starts and times.

python benchmarks/sides.py WHAT [ARGUMENTS]; the last line of its output is JSON.
"""

import json
import logging
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

MAX_LENGTH = 4096


def trl_imports() -> dict[str, Any]:
    """What both sides import before they read a row."""
    import datasets  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    return {}


def our_imports() -> dict[str, Any]:
    """The same as `ma-sft` imports it."""
    import ma_sft.cli

    with ma_sft.cli.frozen():
        return trl_imports()


def our_rows(path: str, model: str, num_proc: str, check: str = "true", backend: str = "fast") -> dict[str, Any]:
    """Rows of a file -> labelled, proven packs, as `ma-sft train` prepares them."""
    our_imports()
    from ma_sft import Recipe
    from ma_sft.labels import backend as tokenizers
    from ma_sft.labels.templates import load_tokenizer
    from ma_sft.training.prepare import prepare

    if backend == "standard":
        tokenizers.find_spec = lambda name: None  # as where fastokens is not installed
    start = time.perf_counter()
    settings = Recipe(
        model_name_or_path=model, dataset_name=path, packing=True, max_length=MAX_LENGTH, use_cpu=True, bf16=False,
        report_to="none", dataset_num_proc=int(num_proc), check=check == "true", output_dir="unused",
    ).resolve()  # fmt: skip
    tokenizer, _ = load_tokenizer(settings)
    prepared = prepare(settings, tokenizer)
    return {"seconds": time.perf_counter() - start, "packs": len(prepared.dataset), "tokens": prepared.counts.tokens}


def trl_rows(path: str, model: str, num_proc: str) -> dict[str, Any]:
    """The same by TRL: `assistant_only_loss=True, packing=True`."""
    trl_imports()
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    start = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=path, split="train")
    args = SFTConfig(
        "unused", use_cpu=True, bf16=False, report_to="none", assistant_only_loss=True, packing=True,
        max_length=MAX_LENGTH, dataset_num_proc=int(num_proc),
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model), args, train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    return {"seconds": time.perf_counter() - start, "packs": len(trainer.train_dataset)}


def log_normal_rows(count: int, seq_length: int) -> Any:
    """Rows of random tokens, in memory; lengths are log-normal with median 200, clipped at `seq_length`."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(200), 0.8, count).astype(int), 1, seq_length)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = pa.array(rng.integers(0, 50_000, offsets[-1], dtype=np.int32))
    column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
    return Dataset(pa.table({"input_ids": column, "labels": column}), fingerprint=f"{count:x}")


def pack_rows(side: str, count: str, where: str, seq_length: int = 2048) -> dict[str, Any]:
    """Rows/s and density of best-fit packing, of rows in memory or of a saved data set."""
    import datasets

    rows = log_normal_rows(int(count), seq_length)
    if where != "memory":
        rows.save_to_disk(where)
        rows = datasets.load_from_disk(where)
    tokens = sum(chunk.values.__len__() for chunk in rows.data.column("input_ids").chunks)
    if side == "ours":
        from ma_sft import pack

        start = time.perf_counter()
        packs = pack(rows, seq_length)
    else:
        from trl import pack_dataset

        start = time.perf_counter()
        packs = pack_dataset(rows, seq_length, "bfd", map_kwargs={"load_from_cache_file": False})
    seconds = time.perf_counter() - start
    return {"rows_per_second": int(count) / seconds, "density": tokens / seq_length / len(packs)}


def read_packs(side: str, count: str, folder: str, seq_length: int = 2048, batches: int = 400) -> dict[str, Any]:
    """Batches/s of random packs through TRL's collator: indices, or packs that TRL wrote to files."""
    import datasets
    import numpy as np
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from ma_sft import pack
    from ma_sft.packing.pack import as_arrays

    log_normal_rows(int(count), seq_length).save_to_disk(folder)
    rows = datasets.load_from_disk(folder)
    # as a run reads them
    packs = as_arrays(pack(rows, seq_length)) if side == "ours" else pack_dataset(rows, seq_length, "bfd")
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    order = np.random.default_rng(0).permutation(len(packs))[:batches].tolist()
    start = time.perf_counter()
    for index in order:
        collate(packs.__getitems__([index]) if hasattr(packs, "__getitems__") else [packs[index]])
    return {"batches_per_second": len(order) / (time.perf_counter() - start)}


def long_conversation(turns: str, model: str) -> dict[str, Any]:
    """Seconds to label one conversation of so many turns, the best of three."""
    from transformers import AutoTokenizer

    from ma_sft.labels.encoder import ChatEncoder

    encoder = ChatEncoder(AutoTokenizer.from_pretrained(model))
    best = float("inf")
    for attempt in range(4):
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": f"What is {i} + {attempt}? " * 8}
            for i in range(int(turns))
        ]
        start = time.perf_counter()
        encoder.encode([messages])
        best = min(best, time.perf_counter() - start)
    return {"seconds": best}


def save_model(folder: str) -> dict[str, Any]:
    """A Qwen3 of one small layer with the real tokenizer, and the template that TRL can mask, for both sides alike."""
    from fetch_tokenizers import fetch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(fetch("qwen3"))
    # TRL can mask assistant turns only of templates that it knows to the letter
    tokenizer.chat_template = (files("trl") / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16, **small)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"folder": str(Path(folder).resolve())}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    result = globals()[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(result))
