"""transformers' rendering of a chat template, at a date that is given and within limits.

A chat template is a stranger's program, which can loop or fill memory. And transformers reads the machine's clock for
`strftime_now`, so that the same recipe would have other ids the next day; it lets no function in among a template's
variables, so the date stands in the globals of the compiled template, of which transformers keeps one for each source.
`tests/labels/test_assumptions.py` names what is taken here from transformers' inside.
"""

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from ma_sft.errors import MaSftError

SECONDS = 5  # of this process's own time for one conversation, which takes a thousandth
MEMORY = 2 << 30  # bytes more than before
TEXT = 100_000_000  # characters of one conversation

compiled = _compile_jinja_template

_ONE_AT_A_TIME = threading.Lock()  # threads share a compiled template


class RunawayTemplateError(MaSftError):
    """A chat template that does not come to an end, or whose text does not."""


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
        return check_size(texts[0])


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
    """Let a chat template render within `SECONDS` and `MEMORY`; outside a main thread, where no signal comes, without.

    Raises:
        RunawayTemplateError: it has not come to its end.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    _install_handler(os.getpid())
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    limits = _limit_memory()
    try:
        yield
    except MemoryError:
        raise _too_large() from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if limits:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def check_size(text: Any) -> str:
    """The rendered text; `RunawayTemplateError` if it is longer than any conversation."""
    if len(text) > TEXT:
        raise _too_large()
    return str(text)


@lru_cache(maxsize=1)
def _install_handler(process: int) -> None:
    """Once in a process: it takes longer than a short render."""
    signal.signal(signal.SIGVTALRM, _too_long)


def _too_long(*_: Any) -> None:
    raise _stopped(f"it has worked on one conversation for {SECONDS} s, as one that loops does")


def _too_large() -> RunawayTemplateError:
    return _stopped("it makes gigabytes of one conversation")


def _stopped(why: str) -> RunawayTemplateError:
    return RunawayTemplateError(f"the chat template was stopped: {why}; choose another with template")


@lru_cache(maxsize=1)
def _memory(tenth: int) -> int:
    """Bytes that this process has; asked for ten times a second at most, as that takes longer than a short render."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _limit_memory() -> tuple[int, int] | None:
    """Limit this process's memory; what the limits were, None where the system has none."""
    if sys.platform != "linux":
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ours = _memory(int(time.monotonic() * 10)) + MEMORY
    if any(limit != resource.RLIM_INFINITY and limit < ours for limit in (soft, hard)):
        return None
    resource.setrlimit(resource.RLIMIT_AS, (ours, hard))
    return soft, hard
