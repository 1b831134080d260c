"""A run survives: its folder, whole checkpoints in it, a stop that saves first, and the log of its steps.

The checkpoints are transformers' own. `complete.json`, written last and after every process, makes one whole; a
folder without it was cut off while it was written, and is removed at the next start.
"""

import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from ma_sft.config import Settings, shown
from ma_sft.errors import Interrupted, RecipeError, RunError
from ma_sft.hub import commits, recall
from ma_sft.labels.template_date import recall_clock
from ma_sft.training.distributed import largest, once
from ma_sft.utils import not_there, say, write_whole

if TYPE_CHECKING:
    from trl import SFTTrainer

COMPLETE = "complete.json"  # in a checkpoint, written last and after every process: what makes it whole
REVISIONS = "revisions.json"  # the commits of the run's model and data, for when it is resumed

# All that a run writes into its folder, and so what a run that takes its place removes.
_WRITTEN = re.compile(
    r"(recipe|run|before|answers|summary|revisions)\.json|log\.jsonl|report\.html|README\.md|runs|initial_adapter"
    r"|adapter|merged|model|checkpoint-\d+|\.(adapter|model|merged|recipe|run|before|answers|summary|report|revisions)"
    r"\b.*"
)

# Settings that may differ between two starts of the same run, and those of which more lets it go on.
_NOT_THE_RUN = set(
    "name output_dir overwrite_output_dir resume resume_from_checkpoint save_total_limit report_to disable_tqdm "
    "use_cpu ddp_backend ddp_timeout dataset_num_proc dataloader_num_workers".split()
)
_LENGTH = ("max_steps", "num_train_epochs")
_NOT_TRAINED = ("save_steps", "save_strategy", "save_only_model", "eval_steps", "logging_steps", "merge")


@contextmanager
def claimed(settings: Settings) -> "Iterator[RunFolder]":
    """Own the output folder while a run lasts; nothing in it changes until the run's `begin`.

    Raises:
        RecipeError: the folder holds a finished run, another recipe's run, or something that no run wrote.
        RunError: another process trains in it.
        Interrupted: a signal stopped the block; the message says how to go on.
    """
    folder = RunFolder(settings)
    try:
        folder.checkpoint = once(folder.claim)
        yield folder
    except KeyboardInterrupt as stop:
        last = newest(folder.out)
        at = f"; the same command goes on from {last}" if last else " before the first checkpoint"
        if last and not _is_resumable(last):
            at = f"; {last} holds a model alone (save_only_model)"
        raise Interrupted(f"stopped{at}", getattr(stop, "exit_code", 130)) from None
    finally:
        if folder.lock.is_locked:
            _remove_cut_off(folder.out)  # what a full disk or Ctrl-C left
        folder.lock.release()


class RunFolder:
    """A run's output folder; `checkpoint` is the one to go on from, None to start with step one."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.out = Path(settings.training.output_dir)
        self.lock = FileLock(self.out / ".lock", blocking=False)
        self.checkpoint: Path | None = None
        self.anew = False

    def claim(self) -> Path | None:
        """Lock the folder and decide whether the run goes on, starts anew, or may not; gives the checkpoint."""
        out, run = self.out, self.settings.run
        way_out = "pass --overwrite_output_dir true to delete it, or another --name or --output_dir"
        known = (out / "recipe.json").exists() or (out / "summary.json").exists()
        if out.exists() and not known and (not out.is_dir() or any(p.name != ".lock" for p in out.iterdir())):
            raise RecipeError(f"{out} holds something that is not a run; pass another --name or --output_dir")
        out.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except Timeout:
            raise RunError(f"another process is training in {out}; stop it first, or pass another --name") from None
        self.anew = known and (run.overwrite_output_dir or run.resume == "never")
        if not run.overwrite_output_dir:
            if (out / "summary.json").exists():
                raise RecipeError(f"{out} holds a finished run; {way_out}")
            recall_clock(self.settings)
            if known and newest(out) and (changes := self._changes(_read(out / "recipe.json"))):
                raise RecipeError(f"{out} holds an unfinished run of another recipe ({changes}); {way_out}")
        if self.anew:
            self._check_removable()
        else:
            self._write_recipe()
            _remove_cut_off(out)
        return self._checkpoint_to_resume()

    def restore_revisions(self) -> None:
        """Let a run that goes on use the very commits of model and data that it began with."""
        if self.checkpoint and (self.out / REVISIONS).is_file():
            recall(_read(self.out / REVISIONS) or {})

    def begin(self, content: dict[str, Any], settings: Settings) -> str | None:
        """Now that the data has been read: remove the old run if a new one is asked for; gives the checkpoint.

        Args:
            content: `data`, a digest of all rows, and of a stream (`stream`) what its order depends on.
            settings: the run's, with the date of its template.

        Raises:
            RecipeError: the content is not what the checkpoint was trained on, so that going on would train some rows
                twice and others never.
        """
        self.settings = settings
        once(lambda: self._begin(content))
        return str(self.checkpoint) if self.checkpoint else None

    def _begin(self, content: dict[str, Any]) -> None:
        if self.anew:
            self._check_removable()  # once more: reading the data may have taken hours
        for path in self.out.iterdir():
            # A start that failed before its first checkpoint leaves a log, to which nothing may be appended
            if (self.anew and _WRITTEN.fullmatch(path.name)) or (path.name == "log.jsonl" and not newest(self.out)):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        if self.checkpoint:
            _check_same(self.checkpoint, content)
        self._write_recipe()  # now with the date of its template
        write_whole(self.out / REVISIONS, json.dumps(commits(), indent=2))

    def _write_recipe(self) -> None:
        write_whole(self.out / "recipe.json", json.dumps(self.recipe(), indent=2, ensure_ascii=False))

    def recipe(self) -> Any:
        """The settings that were set by hand and say what is trained."""
        return shown({key: value for key, value in self.settings.chosen.items() if key not in _NOT_THE_RUN})

    def _changes(self, before: Any) -> str:
        """What differs from the recipe of the run to go on with, but for a longer training: `key old -> new, ...`."""
        now, before = json.loads(json.dumps(self.recipe())), before if isinstance(before, dict) else {}
        differing = {key for key in {*before, *now}.difference(_NOT_TRAINED) if before.get(key) != now.get(key)}
        if "template_now" not in now:  # a day that is not settled yet; the digest of the data tells
            differing.discard("template_now")
        for key in _LENGTH:
            old, new = before.get(key), now.get(key)
            if isinstance(old, int | float) and isinstance(new, int | float) and new > old:
                differing.discard(key)
        return ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in sorted(differing))

    def _checkpoint_to_resume(self) -> Path | None:
        chosen = self.settings.training.resume_from_checkpoint
        if chosen and not Path(chosen).is_dir():
            raise RecipeError(f"resume_from_checkpoint: the checkpoint {not_there(chosen)}")
        checkpoint = Path(chosen) if chosen else None if self.anew else newest(self.out)
        if checkpoint and not _is_resumable(checkpoint):
            raise RecipeError(
                f"{checkpoint} holds a model alone (save_only_model), from which no run goes on; pass --resume never "
                "to delete it and start anew, or another --name"
            )
        trained = (_read(checkpoint / COMPLETE) or {}).get("recipe") if checkpoint else None
        if trained and (changes := self._changes(trained)):
            raise RecipeError(
                f"resume_from_checkpoint: {checkpoint} is of another recipe ({changes}); bring the old values back, or "
                "start anew from its model with model_name_or_path or adapter_name_or_path"
            )
        return checkpoint

    def _check_removable(self) -> None:
        """Refuse to remove what is no run, or what this one is about to read."""
        out = self.out
        if not isinstance(recipe := _read(out / "recipe.json"), dict) or "model_name_or_path" not in recipe:
            raise RecipeError(f"{out} holds something that is not a run; pass another --name or --output_dir")
        model, training = self.settings.model, self.settings.training
        for key, used in (
            ("model_name_or_path", model.model_name_or_path),
            ("adapter_name_or_path", self.settings.adapter.adapter_name_or_path),
            ("resume_from_checkpoint", training.resume_from_checkpoint),
        ):
            if used and Path(used).resolve().is_relative_to(out.resolve()):
                raise RecipeError(f"{key}: {used} would be removed with {out}; pass another --name or --output_dir")


def _check_same(checkpoint: Path, content: dict[str, Any]) -> None:
    known = _read(checkpoint / COMPLETE)
    if not known:
        return
    for name, value in (content["stream"] or {}).items() if known.get("stream") else ():
        if (before := known["stream"][name]) != value:
            raise RecipeError(
                f"{checkpoint} was trained with {name}={before}, on which a stream's order depends, and not {value}: "
                f"bring {before} back, or start anew with --resume never"
            )
    if known["data"] != content["data"]:
        raise RecipeError(
            f"the data is not what {checkpoint} was trained on; bring the old rows back, or start anew with "
            "--resume never"
        )


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint in a run's folder."""
    return next((p for p in map(Path, reversed(sort_checkpoints(str(out)))) if (p / COMPLETE).exists()), None)


def _is_resumable(checkpoint: Path) -> bool:
    """Whether it holds more than a model, with which transformers would begin a new schedule in the middle."""
    return any(checkpoint.glob("rng_state*.pth"))


def _remove_cut_off(out: Path) -> None:
    for path in out.iterdir():
        cut_off = re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir() and not (path / COMPLETE).exists()
        if cut_off and not path.is_symlink():
            shutil.rmtree(path)


def _read(path: Path) -> Any:
    """What a JSON file of the folder holds; None without one, or if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class SignalHandler:
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

    def __enter__(self) -> "SignalHandler":
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
            self.stop()

    def stop(self) -> None:
        """Raise what ends the run: exit code 0 for SIGTERM, as a stop on request is no failure; 130 for Ctrl-C."""
        raise Interrupted("stopped", 0 if self.signal == signal.SIGTERM else 130)

    def stop_if_asked(self) -> None:
        """End a run whose training was stopped."""
        if self.signal:
            self.stop()

    def asked(self) -> bool:
        """Whether any process was asked to stop, by a signal or by the end of `accelerate launch`; all ask together."""
        if self._parent is not None and os.getppid() != self._parent:
            self.signal = self.signal or signal.SIGTERM
        self.signal = largest(self.signal)
        return bool(self.signal)


class StopEvaluation(Exception):
    """Raised between two batches of an evaluation during training: the trainer saves and stops."""


class CheckpointCallback(TrainerCallback):
    """Marks checkpoints as whole, saves before a stop, and ends a run whose loss is no number before it is saved."""

    def __init__(self, trainer: Any, signals: SignalHandler, content: dict[str, Any]) -> None:
        self.trainer, self.signals, self.content = trainer, signals, content
        # An older checkpoint goes when the newer one is whole, which transformers cannot know.
        self.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        self.tokens_before, self.started, self.seconds = 0, 0.0, 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.signals.training = True
        self.started = time.monotonic()
        self.trainer.tokens_seen = self.tokens_before = int(tokens_before(state))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.signals.asked():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        # What is summed up for the next log is not in a checkpoint: log first, and the curve goes on as if never cut.
        control.should_log |= control.should_save or control.should_evaluate or state.global_step >= state.max_steps

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= control.should_save or control.should_evaluate

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.signals.training and self.signals.asked():
            raise StopEvaluation

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
        write_whole(folder / COMPLETE, json.dumps({"step": state.global_step, **self.content}))
        rotate_checkpoints(str(args.output_dir), self.limit, state.best_model_checkpoint)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.signals.training = False
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


def add_callbacks(trainer: "SFTTrainer", *callbacks: TrainerCallback) -> None:
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
        self._start, self._tokens = time.monotonic(), tokens_before(state)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        speed = (float(logs.get("num_tokens", 0)) - self._tokens) / (time.monotonic() - self._start)
        self.training_bar.set_postfix_str(
            f"loss {float(logs['loss']):.3f}, token accuracy {float(logs.get('mean_token_accuracy', 0)):.1%}, "
            f"{speed:,.0f} tokens/s"
        )


class JsonlLogger(TrainerCallback):
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
