"""What tests of several folders share: the root, real tokenizers, a tiny model, a command as a user runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from real_tokenizers import TOKENIZERS, load_tokenizer
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
    TrainerState,
    set_seed,
)

from ma_sft import RunError
from ma_sft.cli import main

__all__ = ["FUZZ", "QUICK", "ROOT", "TOKENIZERS", "assistant", "load_tokenizer", "read_rows", "refusal", "save_tiny"]
__all__ += ["Die", "start", "system", "user", "write_rows"]

ROOT = Path(__file__).parents[1]

# `make fuzz` asks for many more examples, and other ones each time.
FUZZ = int(os.environ.get("MA_SFT_FUZZ", "0"))

# Settings of a training of seconds
QUICK = {
    **{"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True},
    **{"learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_checkpointing": False},
    **{"bf16": False, "dtype": "float32", "rehearse": False},
}


class Die(TrainerCallback):
    """Ends a run like a crash before its step `at`."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if state.global_step == self.at:
            raise RunError("killed")


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": content, **more}


def system(content: object) -> dict[str, object]:
    return {"role": "system", "content": content}


def save_tiny(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: type[PreTrainedConfig] = Qwen3Config,
    model: type[PreTrainedModel] = Qwen3ForCausalLM,
    hidden_size: int = 32,
) -> Path:
    """Save a two-layer model of random weights with its tokenizer."""
    set_seed(0)
    model(
        config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=hidden_size // 2,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[dict[str, object] | str]) -> str:
    """Write rows, or lines as they are, to a JSON Lines file; the path as text."""
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def read_rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line in which the command ends with exit code 2."""
    assert main([str(word) for word in words]) == 2, words
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in error
    return line


def start(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a command from the project's root as a user would."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
