"""How many processes a stage of the data takes, and what they have of the one that starts them."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import multiprocess

MANY_ROWS = 20_000  # from here on, other processes are worth their start
EACH = 5_000  # rows of a process, at least


def processes(num_proc: int | None, rows: int) -> int | None:
    """`num_proc`, or by default all cores for many rows and this process alone for few; None is this process alone."""
    if num_proc is None and rows >= MANY_ROWS:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_proc = min(cores, rows // EACH)
    return None if num_proc == 1 else num_proc  # `datasets` would start a process for one


@contextmanager
def frozen() -> Iterator[None]:
    """Let the garbage collector leave alone what is there already: the libraries' objects, a million and more.

    To walk through them again and again took a tenth of the preparation, and makes forked workers copy them.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Inherited:
    """A function for `Dataset.map` that forked workers have already, so that it is not pickled for each of them.

    To pickle a tokenizer of 150,000 tokens takes two seconds, which are 40,000 tokenised rows. It must be there
    before the workers are; where they are not forked it is pickled.
    """

    _known: ClassVar[WeakValueDictionary[int, "Inherited"]] = WeakValueDictionary()

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._known[id(self)] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        if multiprocess.get_start_method() == "fork":
            return _inherited, (id(self),)
        return Inherited, (self.function,)


def _inherited(key: int) -> Inherited:
    return Inherited._known[key]
