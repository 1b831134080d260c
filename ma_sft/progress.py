"""The training bar: step, time left, loss, token accuracy and tokens per second in one line."""

import time
from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingBar(ProgressCallback):
    """transformers' own progress bar with the figures of the last log beside it instead of a dict per log."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        self._start = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        speed = float(logs.get("num_tokens", 0)) / (time.monotonic() - self._start)
        self.training_bar.set_postfix_str(
            f"loss {float(logs['loss']):.3f}, token accuracy {float(logs.get('mean_token_accuracy', 0)):.1%}, "
            f"{speed:,.0f} tokens/s"
        )
