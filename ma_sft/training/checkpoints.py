"""A run survives: its folder, whole checkpoints in it, a stop that saves first, and the log of its steps.

The checkpoints are transformers' own. `complete.json`, written last and after every process, makes one whole; a
folder without it was cut off while it was written, and is removed at the next start.
"""

import copy
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date, timedelta
from itertools import count
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase, ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints
from transformers.utils.logging import is_progress_bar_enabled, tqdm

from ma_sft.config import Overrides, Settings, known_settings, shown, with_defaults
from ma_sft.errors import Interrupted, RecipeError, RunError
from ma_sft.hub import commits
from ma_sft.training.distributed import gather, once
from ma_sft.utils import read_json, say, visible, write_whole

COMPLETE = "complete.json"  # in a checkpoint, written last and after every process: what makes it whole
REVISIONS = "revisions.json"  # the commits of the run's model and data, for when it is resumed

# All that a run writes into its folder, and so what a run that takes its place removes.
_WRITTEN = re.compile(
    r"(recipe|run|before|answers|summary|revisions)\.json|log\.jsonl|report\.html|README\.md|runs"
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

    A finished run stays as it is: `runs/x` becomes `runs/x-2` in the folder's `settings`.

    Raises:
        RecipeError: the folder holds another recipe's run, or something that no run wrote.
        RunError: another process trains in it.
        Interrupted: a signal stopped the block; the message says how to go on.
    """
    folder = RunFolder(_in_free_folder(settings))
    try:
        folder.checkpoint = once(folder.claim)
        if folder.checkpoint:  # goes on with the very commits of model and data that it began with
            commits.update(read_json(folder.out / REVISIONS, {}))
        yield folder
    except KeyboardInterrupt as stop:
        last = newest(folder.out)
        resumable = last is not None and _is_resumable(last)
        at = f"; the same command goes on from {last}" if resumable else " before the first checkpoint to go on from"
        raise Interrupted(f"stopped{at}", getattr(stop, "exit_code", 130)) from None
    finally:
        if folder.lock.is_locked:
            _remove_cut_off(folder.out)  # what a full disk or Ctrl-C left
        folder.lock.release()


def _in_free_folder(settings: Settings) -> Settings:
    """The settings with the first of the folders `x`, `x-2`, `x-3`, ... that holds no finished run."""
    wanted = Path(settings.training.output_dir)

    def find() -> Path:
        numbers, out = count(2), wanted
        while not settings.run.overwrite_output_dir and (out / "summary.json").exists():
            out = wanted.with_name(f"{wanted.name}-{next(numbers)}")
        if out != wanted:
            say(f"{wanted} holds a finished run: this one goes to {out} (--overwrite_output_dir true would replace it)")
        return out

    if (out := once(find)) == wanted:
        return settings
    training = copy.copy(settings.training)
    training.output_dir = str(out)
    return replace(settings, training=training, run=replace(settings.run, name=out.name))


class RunFolder:
    """The output folder of a run's `settings`; `checkpoint` is the one to go on from, None to start with step one."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.out = settings, Path(settings.training.output_dir)
        self.lock = FileLock(self.out / ".lock", blocking=False)
        self.checkpoint: Path | None = None
        self.anew = False

    def claim(self) -> Path | None:
        """Lock the folder and decide whether the run goes on, starts anew, or may not; gives the checkpoint."""
        out, run, chosen = self.out, self.settings.run, self.settings.training.resume_from_checkpoint
        recipe = read_json(out / "recipe.json", None)
        known = isinstance(recipe, dict) and "model_name_or_path" in recipe
        if out.exists() and not known and (not out.is_dir() or any(p.name != ".lock" for p in out.iterdir())):
            raise RecipeError(f"{out} holds something that is not a run; pass another --name or --output_dir")
        out.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except Timeout:
            raise RunError(f"another process is training in {out}; stop it first, or pass another --name") from None
        last = None if run.overwrite_output_dir else newest(out)
        self.anew = known and (run.overwrite_output_dir or run.resume == "never")
        checkpoint = Path(chosen) if chosen else None if self.anew else last
        for each in filter(None, dict.fromkeys((checkpoint, last))):
            self._check(each, goes_on=each == checkpoint)
        for key in ("model_name_or_path", "adapter_name_or_path", "resume_from_checkpoint") if self.anew else ():
            used = self.settings.chosen.get(key)
            if used and Path(used).resolve().is_relative_to(out.resolve()):
                raise RecipeError(f"{key}: {used} would be removed with {out}; pass another --name or --output_dir")
        if not self.anew:
            _remove_cut_off(out)
        if not known:
            _write_recipe(out, self.settings)  # who watches the folder knows it by this
        return checkpoint

    def _check(self, checkpoint: Path, *, goes_on: bool) -> None:
        """Refuse a checkpoint of another recipe, and one from which no run can go on."""
        ours = (checkpoint.parent / "recipe.json").exists()  # else a plain trainer's, whose recipe nobody knows
        if goes_on and not (checkpoint / (COMPLETE if ours else "trainer_state.json")).exists():
            raise RecipeError(f"resume_from_checkpoint: {checkpoint} is no whole checkpoint; take another one")
        before = read_json(checkpoint / COMPLETE, {}).get("recipe")
        if before and (changes := _changes(before, self.settings)):
            raise RecipeError(
                f"{checkpoint} is of another recipe ({changes}): bring the old values back, or start anew, in another "
                "folder (--name) or with --overwrite_output_dir true, which deletes the unfinished run"
            )
        if goes_on and not _is_resumable(checkpoint):
            raise RecipeError(
                f"{checkpoint} holds a model alone (save_only_model), from which no run goes on; pass --resume never "
                "to delete it and start anew, or another --name"
            )

    def begin(self, content: dict[str, Any], settings: Settings) -> None:
        """Now that the data has been read: remove the old run if a new one is asked for.

        Args:
            content: `data`, a digest of all rows, and of a stream what its order depends on.
            settings: the run's, with the date of its template.

        Raises:
            RecipeError: the content is not what the checkpoint was trained on, so that going on would train some rows
                twice and others never.
        """
        for path in self.out.iterdir():
            # A start that failed before its first checkpoint leaves a log, to which nothing may be appended
            if (self.anew and _WRITTEN.fullmatch(path.name)) or (path.name == "log.jsonl" and not newest(self.out)):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        known = read_json(self.checkpoint / COMPLETE, {}) if self.checkpoint else {}
        for name, value in content.items():
            if (before := known.get(name, value)) != value:
                raise RecipeError(
                    f"the data is not what {self.checkpoint} was trained on ({name} {before} -> {value}): bring it "
                    "back, or start anew with --resume never"
                )
        _write_recipe(self.out, settings)
        write_whole(self.out / REVISIONS, json.dumps(commits, indent=2))


def recipe_of(settings: Settings) -> Any:
    """The settings that were set by hand and say what is trained."""
    return shown({key: value for key, value in settings.chosen.items() if key not in _NOT_THE_RUN})


def _changes(before: dict[str, Any], settings: Settings) -> str:
    """What differs from a checkpoint's recipe, but for a longer training: `key old -> new, ...`."""
    recipes = before, json.loads(json.dumps(recipe_of(settings)))
    defaults = {name: setting.default for name, setting in known_settings().items()}
    old, new = ({**defaults, **with_defaults(Overrides(recipe))} for recipe in recipes)
    differing = {key for key in {*recipes[0], *recipes[1]}.difference(_NOT_TRAINED) if old.get(key) != new.get(key)}
    differing -= {key for key in _LENGTH if 0 < old[key] < new[key]}  # goes on for longer
    if settings.labels.template_now is None:  # found once the tokenizer is known; the digest of the data tells
        differing.discard("template_now")
    return ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in sorted(differing))


def _write_recipe(out: Path, settings: Settings) -> None:
    write_whole(out / "recipe.json", json.dumps(recipe_of(settings), indent=2, ensure_ascii=False))


def with_date(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Settings:
    """The settings with the date of a template that reads the clock: their own, the run's to go on with, or today.

    Raises:
        RecipeError: a date is set, and the template reads no clock.
    """
    labels, run = settings.labels, settings.run
    if "strftime_now" not in str(tokenizer.chat_template or ""):
        if labels.template_now is not None:
            raise RecipeError("template_now: the chat template reads no clock (strftime_now); remove the setting")
        return settings
    anew = run.overwrite_output_dir or run.resume == "never"
    kept = {} if anew else read_json(Path(settings.training.output_dir, "recipe.json"), {})
    now = labels.template_now or once(lambda: kept.get("template_now") or date.today().isoformat())
    return replace(settings, labels=replace(labels, template_now=now), chosen={**settings.chosen, "template_now": now})


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint in a run's folder."""
    return next((p for p in map(Path, reversed(sort_checkpoints(str(out)))) if (p / COMPLETE).exists()), None)


def _is_resumable(checkpoint: Path) -> bool:
    """Whether it holds more than a model, with which transformers would begin a new schedule in the middle."""
    return any(checkpoint.glob("rng_state*.pth"))


def _remove_cut_off(out: Path) -> None:
    for path in (*out.glob("checkpoint-*"), out / ".adapter", out / ".model"):
        if path.is_dir() and not path.is_symlink() and _WRITTEN.fullmatch(path.name) and not (path / COMPLETE).exists():
            shutil.rmtree(path)


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

    def stop(self, kind: type[Interrupted] = Interrupted) -> None:
        """Raise what ends the run: exit code 0 for SIGTERM, as a stop on request is no failure; 130 for Ctrl-C."""
        raise kind("stopped", 0 if self.signal == signal.SIGTERM else 130)

    def asked(self) -> bool:
        """Whether any process was asked to stop, by a signal or by the end of `accelerate launch`; all ask together."""
        if self._parent is not None and os.getppid() != self._parent:
            self.signal = self.signal or signal.SIGTERM
        self.signal = max(gather(self.signal))
        return bool(self.signal)

    def check(self) -> None:
        """Leave an evaluation during training between two of its batches; all processes must call it together."""
        if self.training and self.asked():
            self.stop(StopEvaluation)


class StopEvaluation(Interrupted):
    """Raised in an evaluation during training: the trainer saves and stops."""


class CheckpointCallback(TrainerCallback):
    """Marks checkpoints as whole, saves before a stop, and ends a run whose loss is no number before it is saved."""

    def __init__(self, trainer: Any, signals: SignalHandler, content: dict[str, Any]) -> None:
        self.signals, self.content = signals, content
        # An older checkpoint goes when the newer one is whole, which transformers cannot know.
        self.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.signals.training = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.signals.training = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.signals.asked():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        # What is summed up for the next log is not in a checkpoint: log first, and the curve goes on as if never cut.
        control.should_log |= control.should_save or control.should_evaluate or state.global_step >= state.max_steps

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= control.should_save or control.should_evaluate

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.signals.check()

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


def tokens_before(state: TrainerState) -> int:
    """The tokens that a run has seen, by its last log."""
    return int(next((log["num_tokens"] for log in reversed(state.log_history) if "num_tokens" in log), 0))


class JsonlLogger(ProgressCallback):
    """Each log as one JSON object a line of the file `path`, with the time and the speed since the last one; and as a
    line of figures, which a terminal has above a bar.

    A line `{"start": step, "max_steps": ...}` begins each start of the run: a resumed one trains again what came after
    `step`.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.path, self.bar = path, sys.stderr.isatty() and is_progress_bar_enabled()

    def _write(self, state: TrainerState, entry: dict[str, Any]) -> None:
        if self.path and state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry | {"time": time.time()}) + "\n")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar = self.bar and not args.disable_tqdm
        self.tokens = self.first_tokens = tokens_before(state)
        self.steps = self.first_step = self.current_step = state.global_step
        self.since = self.started = time.monotonic()
        if state.is_world_process_zero:
            steps = {"total": state.max_steps, "initial": state.global_step}
            self.training_bar = tqdm(**steps, dynamic_ncols=True, disable=not self.bar)
        self._write(state, {"start": state.global_step, "max_steps": state.max_steps})

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.first_step:  # until now the held-out rows were measured
            self.since = self.started = time.monotonic()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if self.bar:
            super().on_prediction_step(*args, **kwargs)  # type: ignore[no-untyped-call]

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        now, entry, words = time.monotonic(), {"step": state.global_step, **(logs or {})}, []
        if "loss" in entry and "num_tokens" in entry:
            entry["tokens_per_second"] = (entry["num_tokens"] - self.tokens) / max(now - self.since, 1e-9)
            self.tokens = int(entry["num_tokens"])
            a_step = (now - self.started) / max(state.global_step - self.first_step, 1)
            left = timedelta(seconds=round(a_step * (state.max_steps - state.global_step)))
            words = [f"loss {entry['loss']:.3f}, token accuracy {float(entry.get('mean_token_accuracy', 0)):.1%}"]
            words += [f"{entry['tokens_per_second']:,.0f} tokens/s", f"{left} left"]
        else:
            for key, value in entry.items():
                if key.startswith("eval_") and "_per_" not in key:
                    words.append(f"{key} {value:.4g}" if isinstance(value, int | float) else f"{key} {value}")
        self.since, self.steps = now, state.global_step  # an evaluation between two logs is not training
        self._write(state, entry)
        if words and state.is_world_process_zero:
            line = f"step {state.global_step:,} of {state.max_steps:,}: {', '.join(words)}"
            if self.bar and (shown := self.training_bar or self.prediction_bar):
                shown.write(visible(line))
            else:
                say(line)

    def figures(self) -> dict[str, Any]:
        """Steps, tokens and time of a training that has just ended; the speed is that since its last start."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        return {
            "tokens": self.tokens,
            "steps": self.steps,
            "train_seconds": round(seconds, 1),
            "tokens_per_second": round((self.tokens - self.first_tokens) / seconds, 1),
        }
