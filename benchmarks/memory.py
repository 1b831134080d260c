"""Forecast of peak memory against the measured peak, one process per case: `make bench-memory`.

On a GPU the peak is that of the GPU's tensors, on the CPU the largest resident set of the process.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

BASE = {"max_length": 512, "per_device_train_batch_size": 1, "gradient_checkpointing": False}
CASES = {
    "LoRA": {"use_peft": True},
    "LoRA, eager attention": {"use_peft": True, "attn_implementation": "eager"},
    "LoRA, layers computed again": {"use_peft": True, "gradient_checkpointing": True},
    "LoRA, 1,024 tokens": {"use_peft": True, "max_length": 1024},
    "LoRA, batches of 4, padded": {"use_peft": True, "packing": False, "per_device_train_batch_size": 4},
    "DoRA": {"use_peft": True, "use_dora": True},
    "QLoRA, 4 bits": {"use_peft": True, "load_in_4bit": True},
    "QLoRA, 8 bits": {"use_peft": True, "load_in_8bit": True},
    "full": {"use_peft": False},
    "full, 2 steps accumulated": {"use_peft": False, "gradient_accumulation_steps": 2},
    "full, AdamW in 8 bits": {"use_peft": False, "optim": "adamw_8bit"},
    "full, embedding frozen": {"use_peft": False, "freeze": ["embed_tokens"]},
}


def measure(settings: dict[str, object]) -> tuple[float, float]:
    """Forecast and measured peak in bytes of a run of three steps in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        rows, recipe = Path(folder) / "rows.jsonl", Path(folder) / "case.yaml"
        row = {"prompt": "Count.", "completion": " ".join(str(n) for n in range(2000))}
        rows.write_text((json.dumps(row) + "\n") * 40)
        always = {"model_name_or_path": "demo", "dataset_name": str(rows), "packing": True, "merge": False}
        out = Path(folder) / "run"
        run = {
            **always,
            **BASE,
            **settings,
            "output_dir": str(out),
            "max_steps": 3,
            "save_strategy": "no",
            "check": False,
        }
        recipe.write_text(json.dumps(run))
        code = "import sys; from ma_sft.cli import main; sys.exit(main(['train', sys.argv[1]]))"
        done = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        summary = json.loads((out / "summary.json").read_text())
    return summary["forecast_peak_memory"], summary["peak_memory"]


if __name__ == "__main__":
    wanted = sys.argv[1:]
    print(f"{'':<30}{'forecast':>10}{'measured':>10}{'ratio':>8}")
    for name, settings in CASES.items():
        if not wanted or any(word in name for word in wanted):
            forecast, measured = measure(settings)
            print(
                f"{name:<30}{forecast / 1e9:>7.2f} GB{measured / 1e9:>7.2f} GB{forecast / measured:>8.2f}", flush=True
            )
