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


@pytest.fixture(scope="module")
def base(tiny_bpe, tmp_path_factory):
    """Settings of a run of 30 steps with ten checkpoints and 2.5 epochs."""
    rows = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)
    return {
        **QUICK,
        **{"name": "r", "model_name_or_path": str(tiny_bpe), "dataset_name": rows, "max_length": 64},
        **{"max_steps": 30, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "logging_steps": 2},
        **{"per_device_train_batch_size": 5},
    }


def outcome(out: Path) -> tuple[list, bytes, float]:
    """(the loss curve, the final weights, the mean loss) of a finished run."""
    state = json.loads((newest(out) / "trainer_state.json").read_text())
    curve = [{k: v for k, v in log.items() if "runtime" not in k and "second" not in k} for log in state["log_history"]]
    (weights,) = [*out.glob("model/model.safetensors"), *out.glob("adapter/adapter_model.safetensors")]
    return curve, weights.read_bytes(), json.loads((out / "summary.json").read_text())["train_loss"]


@pytest.fixture(scope="module", params=KINDS)
def uncut(request, base, tmp_path_factory):
    """(settings, outcome) of a run that nothing cut off."""
    settings = {**base, **KINDS[request.param], "output_dir": str(tmp_path_factory.mktemp("uncut") / "run")}
    run = Run(settings).done()
    return settings, outcome(run.out)


@pytest.mark.slow
def test_killed_at_random_points(uncut, tmp_path):
    """Four times or more while starting, training and saving; some runs are killed more than once."""
    settings, expected = uncut
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


@pytest.fixture
def settings(base, tmp_path):
    return {**base, "output_dir": str(tmp_path / "run")}


def killed_at(settings, path):
    run = Run(settings)
    run.wait_for(path)
    run.kill()
    run.finish()
    return run


@pytest.mark.parametrize("uncut", ["rows", pytest.param("stream", marks=pytest.mark.slow)], indirect=True)
def test_killed_after_the_last_step_trains_no_more(uncut, tmp_path):
    settings, expected = uncut
    out = tmp_path / "run"
    shutil.copytree(settings["output_dir"], out)
    for path in (out / "summary.json", out / "report.html"):
        path.unlink()
    for folder in [*out.glob("model"), *out.glob("adapter")]:
        shutil.rmtree(folder)
    run = Run({**settings, "output_dir": str(out)}).done()
    assert "going on from" in run.text and "checkpoint-30" in run.text
    assert outcome(out) == expected


def test_cut_off_checkpoint_is_skipped(settings):
    long = {**settings, "max_steps": 1000, "save_total_limit": 10}
    run = killed_at(long, f"checkpoint-9/{COMPLETE}")
    whole = sorted(p.parent for p in run.out.glob(f"checkpoint-*/{COMPLETE}"))
    newest = max(whole, key=lambda p: int(p.name.split("-")[1]))
    (newest / COMPLETE).unlink()
    (newest / "model.safetensors").write_bytes(b"half")
    run = killed_at(long, f"{newest.name}/{COMPLETE}")  # made again
    assert f"going on from {whole[-2] if whole[-1] == newest else whole[-1]}" in run.text


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


def test_stopped_run_goes_on_to_the_same_weights(base, tmp_path):
    settings = {**base, "max_steps": 140, "save_steps": 20, "logging_steps": 10}
    uncut = Run({**settings, "output_dir": str(tmp_path / "uncut")})
    run = Run({**settings, "output_dir": str(tmp_path / "run")})
    run.wait_for("checkpoint-20")
    run.signal(signal.SIGTERM)
    assert run.finish() == uncut.finish() == 0
    assert not (run.out / "summary.json").exists()
    run = Run(run.settings).done()
    (curve, weights, _), (found, found_weights, _) = outcome(uncut.out), outcome(run.out)
    assert found_weights == weights
    assert {log["num_tokens"] for log in curve} <= {log["num_tokens"] for log in found}


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


def test_changed_data_is_refused(settings, tmp_path):
    rows = tmp_path / "rows.jsonl"
    shutil.copy(settings["dataset_name"], rows)
    run = killed_at({**settings, "dataset_name": str(rows)}, f"checkpoint-3/{COMPLETE}")
    rows.write_text(rows.read_text().replace("so", "no"))
    run = Run(run.settings)
    assert run.finish() == 2
    assert "error: the data is not what" in run.text and "--resume never" in run.text
    run = Run(run.settings, "--resume", "never").done()
    assert "going on from" not in run.text


def test_two_runs_in_one_folder(settings):
    first = Run(settings, "--max_steps", "100000")
    first.wait_for("checkpoint-3")
    second = Run(settings, "--max_steps", "100000")
    assert second.finish() == 2
    assert "another process is training in" in second.text
    first.kill()
    first.finish()


def test_loss_that_is_no_number_ends_the_run_before_it_is_saved(settings):
    run = Run(settings, "--learning_rate", "1e38", "--max_grad_norm", "0")
    assert run.finish() == 2
    (line,) = [line for line in run.text.splitlines() if line.startswith("error: ")]
    assert "is nan at step" in line or "is inf at step" in line
    assert "Traceback" not in run.text
    assert not list(run.out.glob("checkpoint-*"))
