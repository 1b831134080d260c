"""How long a test may wait before what it waits for is taken to hang, and the end of all that it started."""

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Iterator

import psutil
import pytest


def patience() -> float:
    """How much slower this machine is now than an idle core of 2020; other work comes and goes."""
    start = time.perf_counter()
    sum(number * number % 7 for number in range(400_000))
    took = time.perf_counter() - start
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    return max(1.0, took / 0.04, busy)


if "MA_SFT_PATIENCE" not in os.environ:  # once: what a test starts has the same
    os.environ["MA_SFT_PATIENCE"] = f"{patience():.1f}"

PATIENCE = float(os.environ["MA_SFT_PATIENCE"])  # as it was at the start; limits are multiplied by it
HANG = 900 * PATIENCE  # seconds that a test may take; a whole training says that it may take more

SUBREAPER = 36  # prctl: the children of a process that ended become this one's, not init's
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


@pytest.fixture(autouse=True)
def end_what_it_started() -> Iterator[None]:
    """No process outlives the test that started it, however deep and however the test ended."""
    this = psutil.Process()
    before = {child.pid for child in this.children(recursive=True)}
    yield
    left = [child for child in this.children(recursive=True) if child.pid not in before and not _of_python(child)]
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(left, timeout=10)


def _of_python(process: psutil.Process) -> bool:
    """Whether it is one of the two that `multiprocessing` keeps for all tests, directly below this one."""
    try:
        command = " ".join(process.cmdline())
        return process.ppid() == os.getpid() and ("forkserver" in command or "resource_tracker" in command)
    except psutil.Error:
        return False
