"""A run survives: whole checkpoints, and a stop that saves first.

The checkpoints are transformers' own. `complete.json`, written last and after every process, makes one whole; a
folder without it was cut off while it was written, and is removed at the next start.
"""

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from ma_sft.errors import Interrupted, RunError
from ma_sft.training.folder import COMPLETE, enter
from ma_sft.training.processes import largest
from ma_sft.training.progress import tokens_before
from ma_sft.training.trainer import ResumableTrainer
from ma_sft.utils import say, write_whole


class Stop:
    """SIGTERM and Ctrl-C: at once while nothing would be lost, after saving while training.

    A second Ctrl-C stops at once in any case. (Launchers pass on the Ctrl-C that the terminal sent to all already:
    what follows within two seconds is the same one.)
    """

    def __init__(self) -> None:
        self.signal = 0
        self.training = False
        self._since = 0.0
        self._process = os.getpid()
        self._parent = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # One dead process makes the launcher end all others: the first must still say what happened.
        last_words = error is not None and os.environ.get("LOCAL_RANK") == "0"
        for number, handler in getattr(self, "_old", {}).items():
            signal.signal(number, signal.SIG_IGN if last_words else handler)

    def _handle(self, number: int, _: object) -> None:
        if os.getpid() != self._process:  # a worker that was forked to tokenise or to load
            os._exit(128 + number)
        again = bool(self.signal) and time.monotonic() - self._since > 2
        if not self.signal:
            self.signal, self._since = number, time.monotonic()
            if self.training and PartialState().is_main_process:
                say("\nstopping: saving after this step (Ctrl-C again: at once)", error=True)
        if not self.training or (again and number == signal.SIGINT):
            self.now()

    def now(self) -> None:
        """Raise what ends the run: exit code 0 for SIGTERM, as a stop on request is no failure; 130 for Ctrl-C."""
        raise Interrupted("stopped", 0 if self.signal == signal.SIGTERM else 130)

    def end(self) -> None:
        """End a run whose training was stopped."""
        if self.signal:
            self.now()

    def asked(self) -> bool:
        """Whether any process was asked to stop, by a signal or by the end of `accelerate launch`; all ask together."""
        if self._parent is not None and os.getppid() != self._parent:
            self.signal = self.signal or signal.SIGTERM
        self.signal = largest(self.signal)
        return bool(self.signal)


class Survival(TrainerCallback):
    """Marks checkpoints as whole, saves before a stop, and ends a run whose loss is no number before it is saved."""

    def __init__(self, trainer: ResumableTrainer, stop: Stop, content: dict[str, Any]) -> None:
        self.trainer, self.stop, self.content = trainer, stop, content
        # An older checkpoint goes when the newer one is whole, which transformers cannot know.
        self.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        self.tokens_before, self.started, self.seconds = 0, 0.0, 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stop.training = True
        self.started = time.monotonic()
        self.trainer.tokens_seen = self.tokens_before = int(tokens_before(state))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stop.asked():
            control.should_save = control.should_training_stop = True
        # What is summed up for the next log is not in a checkpoint: log first, and the curve goes on as if never cut.
        control.should_log |= control.should_save or control.should_evaluate or state.global_step >= state.max_steps

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= control.should_save or control.should_evaluate

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for key in ("loss",) if args.fp16 else ("loss", "grad_norm"):  # a scaler of fp16 skips steps that overflow
            if not math.isfinite((logs or {}).get(key, 0.0)):
                raise RunError(
                    f"{key} is {(logs or {})[key]} at step {state.global_step}: nothing after the last checkpoint is "
                    "kept; lower learning_rate or max_grad_norm, raise warmup_steps, or train in bf16 or float32"
                )

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, with the hub's token in it
        enter(folder.parent, folder.name, folder)
        write_whole(folder / COMPLETE, json.dumps({"step": state.global_step, **self.content}))
        rotate_checkpoints(str(args.output_dir), self.limit, state.best_model_checkpoint)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stop.training = False
        self.seconds = time.monotonic() - self.started

    def figures(self) -> dict[str, Any]:
        """Steps, tokens and time of a training that has ended; the speed is that since its last start."""
        tokens = self.trainer.tokens_seen
        return {
            "tokens": tokens,
            "steps": self.trainer.state.global_step,
            "train_seconds": round(self.seconds, 1),
            "tokens_per_second": round((tokens - self.tokens_before) / self.seconds, 1),
        }
