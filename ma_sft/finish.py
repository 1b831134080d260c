"""What a run does once its model is saved: held-out figures, the merged model, summary, report, publishing."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.config import Settings
from ma_sft.errors import first_line
from ma_sft.pages.report import write_report
from ma_sft.pages.screen import show_end
from ma_sft.release.manifest import write_manifest
from ma_sft.release.publish import publish
from ma_sft.training.exam import Exam
from ma_sft.training.folder import enter
from ma_sft.training.processes import outside_zero3
from ma_sft.utils import say, write_whole

if TYPE_CHECKING:
    from trl import SFTTrainer


def finish(
    settings: Settings,
    trainer: "SFTTrainer",
    exam: Exam,
    saved: Path,
    manifest: dict[str, Any],
    summary: dict[str, Any],
) -> dict[str, Any]:
    """All that comes after saving: held-out figures, the merged model, summary and report.

    What was trained lies in `saved`. A step that fails is said and entered in the summary under `failed`; the others
    go on, and the run is finished.
    """
    out, failed = saved.parent, dict[str, str]()
    with attempt("the held-out rows after training", failed, alone=trainer.args.world_size == 1):
        exam.finish()
    if not trainer.is_world_process_zero():
        return {}
    with attempt("grading the answers", failed):
        summary |= exam.figures()
        write_manifest(saved, {**manifest, "metrics": summary.get("evaluation", {}).get("after")})
    if saved.name == "adapter" and settings.adapter.merge:
        with attempt("merging the adapter", failed):
            summary["merge_max_logit_difference"] = merge_into(out / "merged", settings.training.trust_remote_code)
    if failed:
        summary["failed"] = failed
    write_whole(out / "answers.json", json.dumps(exam.table(), ensure_ascii=False, indent=1))
    write_whole(out / "summary.json", json.dumps(summary, ensure_ascii=False, indent=2))
    with attempt("the report", failed):
        write_report([out], out / "report.html")
    if settings.chosen.get("push_to_hub"):
        with attempt("publishing", failed):
            summary["published"] = publish(settings, saved, summary)
        write_whole(out / "summary.json", json.dumps(summary | ({"failed": failed} if failed else {}), indent=2))
    with attempt("showing the result", failed):
        show_end(out, exam.table(), summary)
    return summary


@contextmanager
def attempt(step: str, failed: dict[str, str], *, alone: bool = True) -> Iterator[None]:
    """Say, and enter in `failed`, what a step that comes after training failed with.

    Args:
        alone: whether no other process takes part, which would wait for this one for ever.
    """
    try:
        yield
    except Exception as error:
        if not alone:
            raise
        failed[step] = f"{type(error).__name__}: {first_line(error)}"
        say(f"{step} failed, what was trained is saved: {failed[step]}", error=True)


def merge_into(folder: Path, code: bool) -> float | None:
    """Merge the run's adapter; the largest difference of a logit, None where the models were not compared."""
    from ma_sft.release.merge import merge

    shutil.rmtree(folder, ignore_errors=True)
    with outside_zero3():
        merged = merge(folder.parent, folder, code=code)
    enter(folder.parent, folder.name, folder)
    say(f"merged model: {merged}")
    return merged.difference
