"""A hub on loopback for the whole session, and commands that know no other, forked from a process that is warm."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers import assistant, user
from hub.server import Hub

# Imports everything once; each line of stdin is a command that a fork of it runs, with its own cache and token.
WARM = """
import gc, json, os, sys
import ma_sft, datasets, deepspeed, torch, transformers, trl, peft.tuners.lora, huggingface_hub.constants as constants
import datasets.packaged_modules.json.json, transformers.models.qwen3.modeling_qwen3
import ma_sft.cli, ma_sft.sft, ma_sft.hub, ma_sft.release.merge, ma_sft.tools.memory, ma_sft.training.checkpoints
import ma_sft.training.prepare, ma_sft.pages.report, ma_sft.data.mixture
ma_sft.config.known_settings()
torch.set_num_threads(1)
gc.freeze()
for line in sys.stdin:
    command = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.environ.update(command["env"])
        if not os.environ["HF_TOKEN"]:
            del os.environ["HF_TOKEN"]
        home = os.environ["HF_HOME"]
        constants.HF_HUB_CACHE = home + "/hub"
        constants.HF_XET_CACHE = home + "/xet"
        datasets.config.HF_DATASETS_CACHE = home + "/datasets"
        os.chdir(command["cwd"])
        for number, name in ((0, os.devnull), (1, command["out"]), (2, command["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        sys.stdin = open(0, closefd=False)
        code = ma_sft.cli.main(command["args"])
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Done:
    """A finished command."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def error(self) -> str:
        """The one line that a command which failed must say, and nothing foreign beside it."""
        assert self.code == 2, self.out + self.err
        assert "Traceback" not in self.out + self.err, self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return line


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def chats(count: int, word: str = "sum") -> list[dict[str, Any]]:
    """Rows as Capybara's."""
    return [
        {"messages": [user(f"The {word} of {n} and 1?"), assistant(f"It is {n + 1}.")], "source": "x", "num_turns": 1}
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="session")
def warm(running_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    env = {**os.environ, **running_hub.env(tmp_path_factory.mktemp("warm")), "CUDA_VISIBLE_DEVICES": ""}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WARM], env=env, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def hub(running_hub: Hub) -> Hub:
    """The hub without repositories, faults or memories."""
    running_hub.repos.clear()
    running_hub.faults.clear()
    running_hub.log.clear()
    return running_hub


@pytest.fixture
def ma_sft(hub: Hub, warm: subprocess.Popen[str], tmp_path: Path) -> Callable[..., Done]:
    """`ma_sft("train", "recipe.yaml", token=..., home=...)`: what the command line would do, in `tmp_path`."""

    def run(*args: object, token: str | None = None, home: Path | None = None, **env: str) -> Done:
        out, err = tmp_path / "stdout", tmp_path / "stderr"
        command = {
            "args": [str(arg) for arg in args],
            "env": {**hub.env(home or tmp_path / "home", token), **env},
            "cwd": str(tmp_path),
            "out": str(out),
            "err": str(err),
        }
        start = time.monotonic()
        warm.stdin.write(json.dumps(command) + "\n")
        warm.stdin.flush()
        code = int(warm.stdout.readline())
        return Done(code, out.read_text(), err.read_text(), time.monotonic() - start)

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """A recipe of a few quick steps as YAML; a setting of None is left out."""

    def write(name: str = "recipe", **settings: Any) -> Path:
        quick = {
            **{"model_name_or_path": "tiny/model", "dataset_name": "tiny/chats", "output_dir": str(tmp_path / "run")},
            **{"max_steps": 2, "max_length": 128, "per_device_train_batch_size": 1, "report_to": "none"},
            **{"use_peft": True, "lora_preset": "mini", "bf16": False, "save_strategy": "no", "rehearse": False},
        }
        path = tmp_path / f"{name}.yaml"
        given = {key: value for key, value in {**quick, **settings}.items() if value is not None}
        path.write_text(yaml.safe_dump(given))
        return path

    return write


@pytest.fixture
def model(hub: Hub, tiny_bpe: Path) -> str:
    """The commit of `tiny/model`."""
    return hub.add("models", "tiny/model", tiny_bpe)


@pytest.fixture
def data(hub: Hub) -> str:
    """The commit of `tiny/chats`, which has a split for training and one for tests."""
    return hub.add("datasets", "tiny/chats", {f"data/{s}-0.parquet": parquet(chats(8)) for s in ("train", "test")})
