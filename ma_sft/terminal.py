"""What a terminal gets to see: text that it cannot obey, and errors as one line with an exit code.

Text comes from rows, models, file names and other people's folders. None of it is markup, and what would move the
cursor, change the title, colour the rest or turn the reading direction is shown as its escape instead.
"""

import codecs
import errno
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ma_sft.errors import MaSftError, one_line
from ma_sft.version import versions

if TYPE_CHECKING:
    from rich.console import Console

# Controls but tab and newline, marks and overrides of direction, other line ends, halves of characters
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
PLAIN = {"█": "#", "…": "...", "·": "*", "–": "-", "—": "-", "→": "->", "⏎": "\\n"}  # our own ornaments, in ASCII
# What a user can mend where an operating system says no, if the error names a file
MENDED = {getattr(errno, name) for name in "EACCES EPERM EROFS ENOENT ENOTDIR EISDIR EEXIST ENAMETOOLONG ELOOP".split()}


def visible(text: object) -> str:
    """The text with what a terminal would obey written as its escape, e.g. `\\x1b`."""
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def say(*lines: object, error: bool = False, end: str = "\n", flush: bool = False) -> None:
    """Print lines, to stderr if they tell an error; nothing in them is obeyed."""
    if not lines:
        return
    print(*(visible(line) for line in lines), sep="\n", end=end, file=sys.stderr if error else sys.stdout, flush=flush)


def console(**how: Any) -> "Console":
    """A rich console for which every text is only text: no markup, no emoji names, no control characters."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(visible(text), **how)

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(visible(segment.text), segment.style)

    return PlainConsole(markup=False, emoji=False, highlight=False, **how)


def guard(command: Callable[[], Any]) -> int:
    """Call `command`; its int result is the exit code. Errors that a user can mend become one line."""
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):  # one that cannot encode a character shows its escape
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="ma_sft.plain")
    try:
        result = command()
        sys.stdout.flush()  # while a reader that has gone is still caught below
        return result if isinstance(result, int) else 0
    except BrokenPipeError:  # `| head` had enough; what is left would fail again when Python flushes it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:
        if _first_here():
            say(str(stop) or "stopped by Ctrl-C", error=True)
        return getattr(stop, "exit_code", 130)
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # `datasets` lets a timeout of its workers cover it
            say("stopped by Ctrl-C", error=True)
            return 130
        if line := _mendable(error):
            return _fail(line)
        known = ", ".join(f"{name} {version}" for name, version in versions().items())
        error.add_note(f"This was not foreseen: please open an issue with the lines above and these versions: {known}")
        raise


def _mendable(error: Exception) -> str | None:
    """What to say of an error that a user can mend; None for all others."""
    if isinstance(error, MaSftError):
        return one_line(error)
    # safetensors and the tokenizers report a full disk as their own errors, with the text of the OS
    for full in (errno.ENOSPC, errno.EDQUOT):
        if getattr(error, "errno", None) == full or os.strerror(full) in str(error):
            return (
                f"the disk is full ({os.strerror(full)}): free some space and start again; nothing half-written was "
                "kept"
            )
    if isinstance(error, OSError) and error.errno in MENDED and error.filename is not None:
        return f"{error.strerror}: {error.filename}; see to it that the path is right and yours to use"
    if isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error)):
        return (
            "lost another process of the run: it died (its own message is above, or in its machine's log) or its "
            "machine is out of reach; the same command goes on from the newest checkpoint"
        )
    return None


def _quiet_libraries() -> None:
    """What libraries say of themselves, by name: nothing that a user can do something about."""
    # On a CPU it warns with each import that a kernel for inference, which nobody asked for, is not installed
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # TRL sets it by itself under the name that transformers is about to drop
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated")
    # PEFT asks for it by the name that transformers is about to drop
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")


@contextmanager
def no_bar_for_weights() -> Iterator[None]:
    """transformers' bar over the tensors of a file that lies here is left out; its other bars stay."""
    from transformers.utils.logging import set_tqdm_hook

    def shown(bar: Callable[..., Any], args: tuple[Any, ...], how: dict[str, Any]) -> Any:
        return bar(*args, **how, **({"disable": True} if how.get("desc") == "Loading weights" else {}))

    previous = set_tqdm_hook(shown)
    try:
        yield
    finally:
        set_tqdm_hook(previous)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler for encoders: our own ornaments have a form in ASCII, all else becomes its escape."""
    if isinstance(error, UnicodeEncodeError) and (plain := PLAIN.get(error.object[error.start])):
        return plain, error.start + 1
    return codecs.backslashreplace_errors(error)


codecs.register_error("ma_sft.plain", _plain)


def _fail(message: str) -> int:
    if not _first_here():
        time.sleep(10)  # most errors are everybody's: the first process says it, and the launcher ends this one
    say(f"error: {message}", error=True)
    return 2


def _first_here() -> bool:
    """Whether this is the only or the first process of the run on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
