"""What rendering one conversation may cost: a chat template is a stranger's program, which can loop or fill memory."""

import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ma_sft.errors import TemplateError

SECONDS = 5  # of this process's own time for one conversation, which takes a thousandth
MEMORY = 2 << 30  # bytes more than before
TEXT = 100_000_000  # characters of one conversation


class RunawayTemplateError(TemplateError):
    """A chat template that does not come to an end, or whose text does not."""


def _too_long(*_: Any) -> None:
    raise RunawayTemplateError(
        f"the chat template was stopped: it has worked on one conversation for {SECONDS} s, as one that loops does; "
        "choose another with template"
    )


@contextmanager
def bounded() -> Iterator[None]:
    """Let a chat template render within `SECONDS` and `MEMORY`; outside a main thread, where no signal comes, without.

    Raises:
        RunawayTemplateError: it has not come to its end.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    limits = _limit_memory()
    try:
        yield
    except MemoryError:
        raise _too_large() from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        if limits:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def check_size(text: Any) -> str:
    """The rendered text.

    Raises:
        RunawayTemplateError: it is longer than any conversation.
    """
    if len(text) > TEXT:
        raise _too_large()
    return str(text)


def _too_large() -> RunawayTemplateError:
    return RunawayTemplateError(
        "the chat template was stopped: it makes gigabytes of one conversation; choose another with template"
    )


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
    if (soft != resource.RLIM_INFINITY and soft < ours) or (hard != resource.RLIM_INFINITY and hard < ours):
        return None
    resource.setrlimit(resource.RLIMIT_AS, (ours, hard))
    return soft, hard
