"""The clock of a chat template: `strftime_now` gives one date in labels, judge, exam, resume and hand-off.

Llama, Mistral, gpt-oss and others write today's date. transformers reads the machine's clock for it, so that the same
recipe would have other ids the next day. It lets no function in among a template's variables, so the clock stands in
the globals of the compiled template, of which transformers keeps one for each source.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from ma_sft.errors import RecipeError
from ma_sft.labels.jinja import compiled

if TYPE_CHECKING:
    from ma_sft.config import Settings

NAME = "strftime_now"  # transformers' function of chat templates

_ONE_AT_A_TIME = threading.Lock()  # threads share it


@contextmanager
def clock_at(template_now: str | None, template: str) -> Iterator[None]:
    """Let a chat template read `template_now` as the time.

    Args:
        template_now: an ISO date or date-time; None for the machine's clock.
        template: its Jinja source, as transformers will be given it.
    """
    if template_now is None:
        yield
        return
    with _ONE_AT_A_TIME:
        names = compiled(template).globals
        names[NAME] = datetime.fromisoformat(template_now).strftime
        try:
            yield
        finally:
            del names[NAME]  # transformers' own stands in the globals behind these


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template, or one of several, asks for the date."""
    return NAME in str(tokenizer.chat_template or "")


def set_clock(settings: "Settings", tokenizer: PreTrainedTokenizerBase) -> None:
    """Settle `template_now` of a recipe: its own, that of the run in its output folder, or today.

    Raises:
        RecipeError: it is set, and the template reads no clock.
    """
    labels = settings.labels
    if not reads_clock(tokenizer):
        if labels.template_now is not None:
            raise RecipeError("template_now: the chat template reads no clock (strftime_now); remove the setting")
        return
    recall_clock(settings)
    labels.template_now = labels.template_now or date.today().isoformat()
    settings.chosen["template_now"] = labels.template_now  # goes into the run's recipe.json


def recall_clock(settings: "Settings") -> None:
    """Let a run that goes on, and whoever looks at it, have the date with which it was first prepared."""
    labels, run = settings.labels, settings.run
    if labels.template_now is not None or run.overwrite_output_dir or run.resume == "never":
        return
    try:
        kept = json.loads((Path(settings.training.output_dir) / "recipe.json").read_text(encoding="utf-8"))
        found = kept["template_now"]
        datetime.fromisoformat(found)
    except (OSError, ValueError, KeyError, TypeError):
        return
    settings.chosen["template_now"] = labels.template_now = found
