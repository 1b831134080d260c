"""A hub on loopback for the whole session, and commands that know no other."""

import io
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
from processes import CONTEXT, command


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
    hub = Hub()
    yield hub
    hub.stop()


@pytest.fixture
def hub(running_hub: Hub) -> Hub:
    """The hub without repositories, faults or memories."""
    running_hub.repos.clear()
    running_hub.faults.clear()
    running_hub.log.clear()
    return running_hub


@pytest.fixture
def ma_sft(hub: Hub, tmp_path: Path) -> Callable[..., Done]:
    """`ma_sft("train", "recipe.yaml", token=..., home=...)`: what the command line would do, in `tmp_path`."""

    def run(*words: object, token: str | None = None, home: Path | None = None, **env: str) -> Done:
        out, err = tmp_path / "stdout", tmp_path / "stderr"
        for file in (out, err):
            file.write_text("")
        variables = {**hub.env(home or tmp_path / "home", token), "CUDA_VISIBLE_DEVICES": "", **env}
        arguments = ([str(word) for word in words], str(tmp_path), str(out), str(err), variables)
        begin = time.monotonic()
        process = CONTEXT.Process(target=command, args=arguments)
        process.start()
        process.join()
        return Done(process.exitcode, out.read_text(), err.read_text(), time.monotonic() - begin)

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
