"""The date of a chat template: `strftime_now` gives one date in labels, verifier, evaluation, resume and hand-off.

Llama, Mistral, gpt-oss and others write today's date. A recipe's is `template_now`.
"""

import json
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from ma_sft.errors import RecipeError

if TYPE_CHECKING:
    from ma_sft.config import Settings


def set_clock(settings: "Settings", tokenizer: PreTrainedTokenizerBase) -> None:
    """Settle `template_now` of a recipe: its own, that of the run in its output folder, or today.

    Raises:
        RecipeError: it is set, and the template reads no clock.
    """
    labels = settings.labels
    if "strftime_now" in str(tokenizer.chat_template or ""):
        recall_clock(settings)
        labels.template_now = labels.template_now or date.today().isoformat()
        settings.chosen["template_now"] = labels.template_now  # goes into the run's recipe.json
    elif labels.template_now is not None:
        raise RecipeError("template_now: the chat template reads no clock (strftime_now); remove the setting")


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
