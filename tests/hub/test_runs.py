"""Whole runs as users start them: `make sft-qwen3`, two processes, two runs at once, one cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, load_tokenizer, save_tiny
from hub.conftest import chats, parquet
from patience import PATIENCE
from processes import free_port

pytestmark = pytest.mark.slow
RECIPE = [sys.executable, "recipes/qwen3.py", "--max_steps", "2", "--output_dir"]


@pytest.fixture
def qwen3(hub, tmp_path):
    """A tiny Qwen3 with the real tokenizer, and rows as Capybara's, under the names of the real ones."""
    hub.add("datasets", "trl-lib/Capybara", {f"data/{s}-0.parquet": parquet(chats(40)) for s in ("train", "test")})
    return hub.add("models", "Qwen/Qwen3-0.6B", save_tiny(tmp_path / "tiny", load_tokenizer("qwen3")))


def environment(hub, home, **more):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, **hub.env(home), **{key: str(value) for key, value in more.items()}}


def together(hub, folder, *commands):
    """Run commands at once, each with variables of its own, on one cache; what each printed."""
    logs = [folder / f"{number}.log" for number in range(len(commands))]
    started = []
    for (words, variables), log in zip(commands, logs, strict=True):
        with log.open("w") as out:
            env = environment(hub, folder / "home", **variables)
            started.append(subprocess.Popen(words, cwd=ROOT, env=env, stdout=out, stderr=out))
    for process, log in zip(started, logs, strict=True):
        assert process.wait(500 * PATIENCE) == 0, log.read_text()
    return [log.read_text() for log in logs]


def fetched_once(hub):
    """Each file came once, however many processes asked for it."""
    files = hub.fetched("/resolve/")
    assert files and len(files) == len(set(files)), sorted(files)


def test_make_sft_qwen3_as_it_stands(hub, qwen3, tmp_path):
    """The recipe of `make sft-qwen3 MAX_STEPS=4`: what the target runs after the environment is made."""
    dry = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "sft-qwen3", "MAX_STEPS=4", f"ARGS=--output_dir {tmp_path}/run"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    command = dry.stdout.strip().splitlines()[-1]
    assert "recipes/qwen3.py" in command and "--max_steps 4" in command
    command = command.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    (text,) = together(hub, tmp_path, (command.split(), {}))
    assert "Traceback" not in text
    fetched_once(hub)
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 4
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["revision"] == qwen3


def test_two_processes_of_one_run(hub, qwen3, tmp_path):
    ranks = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [*RECIPE, tmp_path / "run"]
    variables = ({**ranks, "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"} for rank in range(2))
    together(hub, tmp_path, *((command, own) for own in variables))
    fetched_once(hub)
    assert (tmp_path / "run/merged/model.safetensors").is_file()


def test_two_runs_at_once(hub, qwen3, tmp_path):
    together(hub, tmp_path, *(([*RECIPE, tmp_path / name], {}) for name in "ab"))
    assert all((tmp_path / name / "merged/model.safetensors").is_file() for name in "ab")
    fetched_once(hub)
