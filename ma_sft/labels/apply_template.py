"""transformers' rendering of a chat template, at a date that is given and within a time limit.

A chat template is a stranger's program, which can loop. And transformers reads the machine's clock for `strftime_now`,
so that the same recipe would have other ids the next day; it lets no function in among a template's variables, so the
date stands in the globals of the compiled template, of which transformers keeps one for each source.
`tests/labels/test_assumptions.py` names what is taken here from transformers' inside.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from ma_sft.errors import MaSftError

SECONDS = 5  # of this process's own time for one conversation, which takes a thousandth

compiled = _compile_jinja_template

_ONE_AT_A_TIME = threading.Lock()  # threads share a compiled template


class RunawayTemplateError(MaSftError):
    """A chat template that does not come to an end."""


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
    variables: dict[str, Any] | None = None,
    *,
    prompt: bool = False,
    date: str | None = None,
) -> str:
    """`tokenizer.apply_chat_template(messages, tokenize=False, ...)`.

    Args:
        prompt: with the generation prompt.
        date: an ISO date or date-time; None for the machine's clock.

    Raises:
        RunawayTemplateError: the template has not come to its end.
    """
    with bounded(), clock_at(date, tokenizer.get_chat_template(tools=tools)):
        texts = tokenizer.apply_chat_template(  # a batch of one may be an empty conversation
            [messages], tools=tools, tokenize=False, add_generation_prompt=prompt, **(variables or {})
        )
        return str(texts[0])


@contextmanager
def clock_at(date: str | None, template: str) -> Iterator[None]:
    """Let a chat template, given as its Jinja source, read `date` as the time; None for the machine's clock."""
    if date is None or "strftime_now" not in template:
        yield
        return
    with _ONE_AT_A_TIME:
        names = compiled(template).globals
        names["strftime_now"] = datetime.fromisoformat(date).strftime
        try:
            yield
        finally:
            del names["strftime_now"]  # transformers' own stands in the globals behind these


@contextmanager
def bounded() -> Iterator[None]:
    """Let a chat template render within `SECONDS`; outside a main thread, where no signal comes, without.

    What doubles a text in a loop gets to a few gigabytes in that time.

    Raises:
        RunawayTemplateError: it has not come to its end.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _stop(*_: Any) -> None:
    raise RunawayTemplateError(
        f"the chat template was stopped: it has worked on one conversation for {SECONDS} s, as one that loops does; "
        "choose another with template"
    )
