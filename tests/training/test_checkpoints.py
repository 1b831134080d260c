"""Killed, stopped, out of disk: the same command goes on, and what comes out is what an uncut run gives, to the bit."""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import QUICK, assistant, user, write_rows
from patience import patience
from processes import Run

from ma_sft.training.checkpoints import COMPLETE, newest

SO = [" ".join(["so"] * (1 + i % 7 * 3)) + f" {i}." for i in range(64)]
ROWS = [{"messages": [user(f"What is {i}?"), assistant(answer)]} for i, answer in enumerate(SO)]
KINDS = {
    "rows": {},
    "packed": {"packing": True, "max_length": 96},
    "lora": {"use_peft": True, "merge": False, "lora_dropout": 0.1},
    "stream": {"dataset_streaming": True},
    "packed stream": {"dataset_streaming": True, "packing": True, "max_length": 96},
}


@pytest.fixture
def settings(tiny_bpe, tmp_path):
    """Of a run of 30 steps with ten checkpoints and 2.5 epochs."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    return {
        **QUICK,
        **{"name": "r", "model_name_or_path": str(tiny_bpe), "dataset_name": rows, "max_length": 64},
        **{"max_steps": 30, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "logging_steps": 2},
        **{"per_device_train_batch_size": 5, "output_dir": str(tmp_path / "run")},
    }


def outcome(out: Path) -> tuple[list, bytes, float]:
    """(the loss curve, the final weights, the mean loss) of a finished run."""
    state = json.loads((newest(out) / "trainer_state.json").read_text())
    curve = [{k: v for k, v in log.items() if "runtime" not in k and "second" not in k} for log in state["log_history"]]
    (weights,) = [*out.glob("model/model.safetensors"), *out.glob("adapter/adapter_model.safetensors")]
    return curve, weights.read_bytes(), json.loads((out / "summary.json").read_text())["train_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_points(settings, kind, tmp_path):
    """Four times or more while starting, training and saving; some runs are killed more than once."""
    settings |= KINDS[kind]
    expected = outcome(Run(settings).done().out)
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    kills = 0
    while kills < 4:
        run = Run({**settings, "output_dir": str(tmp_path / f"run-{kills}")})
        for _ in range(draw.choice([1, 1, 2])):
            step = draw.randrange(0, 30, 3)
            run.wait_for_step(step)
            time.sleep(draw.uniform(0, 0.05 if step else 2))
            run.kill()
            if run.finish() == 0:
                break
            kills += 1
            run = Run(run.settings)
        assert run.finish() == 0, f"seed {seed}: {run.text}"
        assert outcome(run.out) == expected, f"seed {seed}, kill {kills}"


@pytest.mark.parametrize(
    ("number", "when"),
    [
        *((signal.SIGINT, "training"), (signal.SIGINT, "before")),
        *(pytest.param(signal.SIGTERM, when, marks=pytest.mark.slow) for when in ("training", "before")),
    ],
)
def test_signal_saves_and_says_how_to_go_on(settings, number, when):
    run = Run({**settings, "save_strategy": "no", "max_steps": 1000})
    run.wait_for("recipe.json")
    while when == "training" and ": loss " not in run.text:
        time.sleep(0.01)
    started = time.monotonic()
    run.signal(number)
    assert run.finish() == (130 if number == signal.SIGINT else 0), run.text
    assert time.monotonic() - started < 30 * patience()
    assert "Traceback" not in run.text and not (run.out / "summary.json").exists()
    if when == "before":
        assert "stopped before the first checkpoint" in run.text
        return
    (checkpoint,) = run.out.glob("checkpoint-*")
    assert (checkpoint / COMPLETE).exists()
    assert f"stopped; the same command goes on from {checkpoint}" in run.text


def test_full_disk_keeps_the_last_whole_checkpoint(settings, tmp_path):
    """On a file system of 4 MB: checkpoints of 0.6 MB fit a few times."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True)
    assert mounted.returncode == 0, mounted.stderr
    try:
        run = Run({**settings, "output_dir": str(disk / "run"), "save_total_limit": 100})
        code = run.finish()
        assert code == 2, run.text
        assert "error: the disk is full" in run.text
        kept = sorted(p.name for p in run.out.glob("checkpoint-*"))
        assert kept and all((run.out / name / COMPLETE).exists() for name in kept)
        last = max(int(name.split("-")[1]) for name in kept)
        for name in kept:
            if name != f"checkpoint-{last}":
                shutil.rmtree(run.out / name)
        run = Run({**run.settings, "save_total_limit": 1}).done()
        assert f"going on from {run.out}/checkpoint-{last}" in run.text
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 150_000))
        run = Run({**settings, "output_dir": str(disk / "unsaved"), "save_strategy": "no"})
        assert run.finish() == 2 and "error: the disk is full" in run.text and "step 30 of 30" in run.text
        assert not (run.out / ".model").exists()
    finally:
        subprocess.run(["umount", disk], check=True)
