"""The folder of a run: who may write in it, what in it a run wrote, and from which checkpoint a run goes on.

`written.json` lists, file by file, what a run put into its subfolders. Only what stands there, and the few files whose
names are a run's own, is ever removed.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer_utils import sort_checkpoints

from ma_sft.errors import Interrupted, RecipeError, RunError
from ma_sft.files import not_there, write_whole
from ma_sft.hub import commits, recall
from ma_sft.labels.template_date import recall_clock
from ma_sft.recipe import Settings
from ma_sft.settings import shown
from ma_sft.training.processes import once

COMPLETE = "complete.json"  # in a checkpoint, written last and after every process: what makes it whole
WRITTEN = "written.json"
REVISIONS = "revisions.json"  # the commits of the run's model and data, for when it is resumed

_FILES = set(
    "recipe.json run.json log.jsonl before.json answers.json summary.json report.html README.md .lock".split()
) | {WRITTEN, REVISIONS}
_UNFINISHED = re.compile(
    r"initial_adapter|\.(adapter|model|merged|recipe|run|before|answers|summary|report|written|revisions)\b.*"
)

# Settings that may differ between two starts of the same run.
_NOT_THE_RUN = set(
    "name output_dir overwrite_output_dir resume resume_from_checkpoint save_total_limit report_to disable_tqdm "
    "use_cpu ddp_backend ddp_timeout dataset_num_proc dataloader_num_workers".split()
)


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
            if known and _read(out / "recipe.json") != self._recipe():
                raise RecipeError(f"{out} holds an unfinished run of another recipe; {way_out}")
        if self.anew:
            self._check_removable()
        else:
            self._write_recipe()
            _remove_cut_off(out)
        return self._to_go_on_from()

    def recall_revisions(self) -> None:
        """Let a run that goes on use the very commits of model and data that it began with."""
        if self.checkpoint and (self.out / REVISIONS).is_file():
            recall(_read(self.out / REVISIONS) or {})

    def begin(self, content: dict[str, Any]) -> str | None:
        """Now that the data has been read: remove the old run if a new one is asked for; gives the checkpoint.

        Args:
            content: `data`, a digest of all rows, and of a stream (`stream`) what its order depends on.

        Raises:
            RecipeError: the content is not what the checkpoint was trained on, so that going on would train some rows
                twice and others never.
        """
        once(lambda: self._begin(content))
        return str(self.checkpoint) if self.checkpoint else None

    def _begin(self, content: dict[str, Any]) -> None:
        if self.anew:
            self._check_removable()  # once more: reading the data may have taken hours
            for path in self.out.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()
        if self.checkpoint:
            _check_same(self.checkpoint, content)
        self._write_recipe()  # now with the date of its template
        write_whole(self.out / REVISIONS, json.dumps(commits(), indent=2))

    def _write_recipe(self) -> None:
        write_whole(self.out / "recipe.json", json.dumps(self._recipe(), indent=2, ensure_ascii=False))

    def _recipe(self) -> Any:
        return shown({key: value for key, value in self.settings.chosen.items() if key not in _NOT_THE_RUN})

    def _to_go_on_from(self) -> Path | None:
        chosen = self.settings.training.resume_from_checkpoint
        if chosen and not Path(chosen).is_dir():
            raise RecipeError(f"resume_from_checkpoint: the checkpoint {not_there(chosen)}")
        checkpoint = Path(chosen) if chosen else None if self.anew else newest(self.out)
        if checkpoint and not _is_resumable(checkpoint):
            raise RecipeError(
                f"{checkpoint} holds a model alone (save_only_model), from which no run goes on; pass --resume never "
                "to delete it and start anew, or another --name"
            )
        return checkpoint

    def _check_removable(self) -> None:
        """Refuse to remove what no run wrote, or what this one is about to read."""
        out = self.out
        if not isinstance(recipe := _read(out / "recipe.json"), dict) or "model_name_or_path" not in recipe:
            raise RecipeError(f"{out} holds something that is not a run; pass another --name or --output_dir")
        for path in strangers(out):
            raise RecipeError(f"{path} was not written by a run, so {out} is not removed; move it away, or pass --name")
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


def enter(out: Path, name: str, content: Path) -> None:
    """Enter what a run writes as `out/name` into its list: the files that lie in `content` now."""
    files = sorted(str(path.relative_to(content)) for path in content.rglob("*") if path.is_file())
    listed = {key: value for key, value in (_read(out / WRITTEN) or {}).items() if (out / key).exists()}
    write_whole(out / WRITTEN, json.dumps({**listed, name: files}, indent=1))


def strangers(out: Path) -> Iterator[Path]:
    """What lies in a run's folder and was not written by a run, by its own list."""
    listed = _read(out / WRITTEN) or {}
    for path in sorted(out.iterdir()):
        if path.name in _FILES or _UNFINISHED.fullmatch(path.name) or _is_cut_off(path):
            continue
        if path.is_symlink() or not path.is_dir():
            yield path
            continue
        known = {*listed.get(path.name, []), COMPLETE}
        for file in sorted(path.rglob("*")):
            trackers = path.name == "runs" and file.name.startswith("events.out.tfevents.")
            if not file.is_dir() and str(file.relative_to(path)) not in known and not trackers:
                yield file


def _is_cut_off(path: Path) -> bool:
    return bool(re.fullmatch(r"checkpoint-\d+", path.name)) and path.is_dir() and not (path / COMPLETE).exists()


def _remove_cut_off(out: Path) -> None:
    for path in out.iterdir():
        if _is_cut_off(path):
            shutil.rmtree(path)


def _read(path: Path) -> Any:
    """What a JSON file of the folder holds; None without one, or if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
