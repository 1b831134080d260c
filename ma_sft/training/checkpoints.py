"""A run survives: whole checkpoints, a stop that saves first, and the same command that goes on from there.

The checkpoints are transformers' own. `complete.json`, written last and after every process, makes one whole; a
folder without it was cut off while it was written, and is removed at the next start.
"""

import json
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints
from trl import SFTTrainer

from ma_sft.errors import Interrupted, RecipeError, RunError
from ma_sft.files import write_whole
from ma_sft.terminal import say
from ma_sft.training.processes import largest, once

if TYPE_CHECKING:
    from ma_sft.recipe import Settings
    from ma_sft.training.streams import Order


COMPLETE = "complete.json"


# Settings that may differ between two starts of the same run.
_NOT_THE_RUN = set(
    "name output_dir overwrite_output_dir resume resume_from_checkpoint save_total_limit report_to disable_tqdm "
    "use_cpu ddp_backend ddp_timeout dataset_num_proc dataloader_num_workers".split()
)


@contextmanager
def claimed(settings: "Settings") -> Iterator[Path | None]:
    """Own the output folder for a run; yields the checkpoint to go on from, None to start with step one.

    Raises:
        RecipeError: the folder holds a finished run, another recipe's run, or something else.
        RunError: another process trains in it.
        Interrupted: a signal stopped the block; the message says how to go on.
    """
    out = Path(settings.training.output_dir)
    lock = FileLock(out / ".lock", blocking=False)
    try:
        yield once(lambda: _claim(out, settings, lock))
    except KeyboardInterrupt as stop:
        last = newest(out)
        at = f"; the same command goes on from {last}" if last else " before the first checkpoint"
        raise Interrupted(f"stopped{at}", getattr(stop, "exit_code", 130)) from None
    finally:
        if lock.is_locked:
            _remove_cut_off(out)  # what a full disk or Ctrl-C left
        lock.release()


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint in a run's folder."""
    return next((p for p in map(Path, reversed(sort_checkpoints(str(out)))) if (p / COMPLETE).exists()), None)


def _remove_cut_off(out: Path) -> None:
    for folder in map(Path, sort_checkpoints(str(out))):
        if not (folder / COMPLETE).exists():
            shutil.rmtree(folder)


def _claim(out: Path, settings: "Settings", lock: FileLock) -> Path | None:
    recipe = json.loads(json.dumps({k: v for k, v in settings.chosen.items() if k not in _NOT_THE_RUN}, default=str))
    way_out = "pass --overwrite_output_dir true to delete it, or another --name or --output_dir"
    known = (out / "recipe.json").exists() or (out / "summary.json").exists()
    if out.exists() and not known and (not out.is_dir() or any(p.name != ".lock" for p in out.iterdir())):
        raise RecipeError(f"{out} holds something that is not a run; pass another --name or --output_dir")
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"another process is training in {out}; stop it first, or pass another --name") from None
    if known and settings.run.overwrite_output_dir:
        _empty(out)
    elif (out / "summary.json").exists():
        raise RecipeError(f"{out} holds a finished run; {way_out}")
    elif known and json.loads((out / "recipe.json").read_text(encoding="utf-8")) != recipe:
        raise RecipeError(f"{out} holds an unfinished run of another recipe; {way_out}")
    elif settings.run.resume == "never":
        _empty(out)
    write_whole(out / "recipe.json", json.dumps(recipe, indent=2, ensure_ascii=False))
    _remove_cut_off(out)
    if chosen := settings.training.resume_from_checkpoint:
        if not Path(chosen).is_dir():
            raise RecipeError(f"resume_from_checkpoint: the checkpoint {chosen!r} does not exist")
        return Path(chosen)
    return newest(out)


def _empty(out: Path) -> None:
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def check_same_data(checkpoint: Path, digest: str, order: "Order | None" = None) -> None:
    """Compare the data, and of a stream what its order depends on, with what the checkpoint was trained on.

    Raises:
        RecipeError: they differ, so that going on would train some rows twice and others never.
    """
    if not (checkpoint / COMPLETE).exists():
        return
    known = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    for name, value in asdict(order).items() if order and known.get("stream") else ():
        if (before := known["stream"][name]) != value:
            raise RecipeError(
                f"{checkpoint} was trained with {name}={before}, on which a stream's order depends, and not {value}: "
                f"bring {before} back, or start anew with --resume never"
            )
    if known["data"] != digest:
        raise RecipeError(
            f"the data is not what {checkpoint} was trained on; bring the old rows back, or start anew with "
            "--resume never"
        )


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

    def asked(self) -> bool:
        """Whether any process was asked to stop, by a signal or by the end of `accelerate launch`; all ask together."""
        if self._parent is not None and os.getppid() != self._parent:
            self.signal = self.signal or signal.SIGTERM
        self.signal = largest(self.signal)
        return bool(self.signal)


class Survival(TrainerCallback):
    """Marks checkpoints as whole, saves before a stop, and ends a run whose loss is no number before it is saved."""

    def __init__(self, trainer: SFTTrainer, stop: Stop, digest: str, order: "Order | None" = None) -> None:
        self.trainer, self.stop, self.digest, self.order = trainer, stop, digest, order
        # An older checkpoint goes when the newer one is whole, which transformers cannot know.
        self.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        self.tokens_before = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop.training = True
        self.tokens_before = int(
            next((log["num_tokens"] for log in reversed(state.log_history) if "num_tokens" in log), 0)
        )
        self.trainer._total_train_tokens = self.tokens_before

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stop.asked():
            control.should_save = control.should_training_stop = True
        # What is summed up for the next log is not in a checkpoint: log first, and the curve goes on as if never cut.
        control.should_log |= control.should_save or control.should_evaluate or state.global_step >= state.max_steps

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_log |= control.should_save or control.should_evaluate

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for key in ("loss",) if args.fp16 else ("loss", "grad_norm"):  # a scaler of fp16 skips steps that overflow
            if not math.isfinite((logs or {}).get(key, 0.0)):
                raise RunError(
                    f"{key} is {(logs or {})[key]} at step {state.global_step}: nothing after the last checkpoint is "
                    "kept; lower learning_rate or max_grad_norm, raise warmup_steps, or train in bf16 or float32"
                )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        marker = {"step": state.global_step, "data": self.digest, "stream": self.order and asdict(self.order)}
        write_whole(folder / COMPLETE, json.dumps(marker))
        rotate_checkpoints(str(args.output_dir), self.limit, state.best_model_checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop.training = False


class ResumableTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, which takes no step more when resumed after its last one, and names a full disk as such."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError:  # torch.save loses what the system said; ask it again
            with tempfile.TemporaryFile(dir=self.args.output_dir) as file:
                file.write(bytes(1 << 20))
                file.flush()
            raise
