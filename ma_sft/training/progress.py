"""What is told while training: the bar in the terminal, and `log.jsonl`, from which the report's curves are drawn."""

import json
import time
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from trl import SFTTrainer


def add_callbacks(trainer: SFTTrainer, *callbacks: TrainerCallback) -> None:
    """Add callbacks before the bar, which begins when the first step does."""
    bar = trainer.pop_callback(TrainingBar)
    for callback in (*callbacks, *([bar] if bar else [])):
        trainer.add_callback(callback)


def tokens_before(state: TrainerState) -> float:
    """The tokens that a resumed run has seen, by its last log."""
    return next((log["num_tokens"] for log in reversed(state.log_history) if "num_tokens" in log), 0.0)


class TrainingBar(ProgressCallback):
    """transformers' own progress bar with the figures of the last log beside it instead of a dict per log."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        self._start = time.monotonic()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        speed = float(logs.get("num_tokens", 0)) / (time.monotonic() - self._start)
        self.training_bar.set_postfix_str(
            f"loss {float(logs['loss']):.3f}, token accuracy {float(logs.get('mean_token_accuracy', 0)):.1%}, "
            f"{speed:,.0f} tokens/s"
        )


class Journal(TrainerCallback):
    """Appends each log to a file, one JSON object a line, with the time and the speed since the last one.

    A line `{"start": step, "max_steps": ...}` begins each start of the run: a resumed one trains again what came after
    `step`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry | {"time": time.time()}) + "\n")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.tokens = tokens_before(state)
        self.since = time.monotonic()
        if state.is_world_process_zero:
            self.write({"start": state.global_step, "max_steps": state.max_steps})

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        now, entry = time.monotonic(), {"step": state.global_step, **(logs or {})}
        if "loss" in entry and "num_tokens" in entry:
            entry["tokens_per_second"] = (entry["num_tokens"] - self.tokens) / (now - self.since)
            self.tokens = entry["num_tokens"]
        self.since = now  # an evaluation between two logs is not training
        if state.is_world_process_zero:
            self.write(entry)
