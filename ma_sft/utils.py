"""What two rooms or more share: files that are written whole, and what a terminal gets to see.

Text comes from rows, models, file names and other people's folders. None of it is markup, and what would move the
cursor, change the title, colour the rest or turn the reading direction is shown as its escape instead.
"""

import errno
import gc
import glob
import io
import json
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.errors import MaSftError, RecipeError, one_line
from ma_sft.version import versions

if TYPE_CHECKING:
    from rich.console import Console

# Controls but tab and newline, marks and overrides of direction, other line ends, halves of characters
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What a user can mend where an operating system says no, if the error names a file
MENDED = {getattr(errno, name) for name in "EACCES EPERM EROFS ENOENT ENOTDIR EISDIR EEXIST ENAMETOOLONG ELOOP".split()}


def visible(text: object) -> str:
    """The text with what a terminal would obey written as its escape, e.g. `\\x1b`."""
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def say(*lines: object, error: bool = False, end: str = "\n") -> None:
    """Print lines, to stderr if they tell an error; nothing in them is obeyed."""
    text = "\n".join(visible(line) for line in lines)
    print(text, end=end if lines else "", file=sys.stderr if error else sys.stdout, flush=True)


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


class Readable:
    """Something that rich can print, and that `print`, a REPL and a notebook show in the same way."""

    def __repr__(self) -> str:
        screen = console(file=io.StringIO(), width=100)
        screen.print(self)
        return str(screen.file.getvalue()).rstrip()  # type: ignore[attr-defined]  # it is a StringIO


def guard(command: Callable[[], Any]) -> int:
    """Call `command`; its int result is the exit code. Errors that a user can mend become one line."""
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):  # one that cannot encode a character shows its escape
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
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
            if not _first_here():
                time.sleep(10)  # most errors are everybody's: the first process says it, and the launcher ends this one
            say(f"error: {line}", error=True)
            return 2
        known = ", ".join(f"{name} {version}" for name, version in versions().items())
        error.add_note(f"This was not foreseen: please open an issue with the lines above and these versions: {known}")
        raise


def _mendable(error: Exception) -> str | None:
    """What to say of an error that a user can mend; None for all others."""
    if isinstance(error, MaSftError):
        return one_line(error)
    # safetensors and the tokenizers report a full disk as their own errors, with the text of the OS, torch without it
    texts = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "unexpected pos ", "iostream error")
    if full := next((text for text in texts if text in str(error)), None):
        return f"the disk is full ({full}): free some space and start again; nothing half-written was kept"
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
    # Bars of what takes long, and in a terminal alone; `timed` tells of each stage
    os.environ.setdefault(*("TQDM_DELAY", "2") if sys.stderr.isatty() else ("TQDM_DISABLE", "1"))
    # TRL sets, and PEFT asks for, what transformers is about to rename
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated")


def progress(line: str) -> None:
    """Say on stderr how far it is, once for all processes."""
    if _first_here():
        say(line, error=True)


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Say how long the block took, once it is done."""
    start = time.monotonic()
    yield
    progress(f"{stage}: {time.monotonic() - start:.1f} s")


@contextmanager
def frozen() -> Iterator[None]:
    """Let the garbage collector leave alone what is there and come rarely: it takes a tenth of the time else.

    Of the imports of torch, transformers and TRL even a seventh.
    """
    gc.freeze()
    threshold = gc.get_threshold()
    gc.set_threshold(100_000)
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()


def _first_here() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def cache_dir() -> Path:
    """The user's cache folder: `$MA_SFT_CACHE`, else `$XDG_CACHE_HOME/ma_sft`, else `~/.cache/ma_sft`."""
    if path := os.environ.get("MA_SFT_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ma_sft"


def not_there(path: str | Path) -> str:
    """What is wrong with a path: that it is of the other kind, or that it is not there, counted from which folder."""
    if Path(path).is_dir():
        return f"{str(path)!r} is a folder, not a file"
    if Path(path).exists():
        return f"{str(path)!r} is {'a file, not a folder' if Path(path).is_file() else 'neither a file nor a folder'}"
    return f"{str(path)!r} does not exist" + ("" if Path(path).is_absolute() else f" (counted from {Path.cwd()})")


def must_be_new(path: Path, way_out: str = "choose another folder or remove it") -> None:
    """Nothing that is there is ever overwritten.

    Raises:
        RecipeError: `path` exists.
    """
    if path.exists():
        raise RecipeError(f"{path} exists already; {way_out}")


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name first, so that a reader sees the old or the new one, never a part.

    The other name cannot be foreseen and must be new, and a link at `path` is replaced, not followed: nobody who
    prepared the folder decides where the text goes.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    scratch = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    try:
        with scratch.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def read_json(path: Path, default: Any = ...) -> Any:
    """What a JSON file holds; `default`, where given, if there is none.

    Raises:
        RecipeError: the file is not there, or is no JSON.
    """
    if default is not ... and not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(f"the file {not_there(path)}") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not valid JSON: {error}; it was not written whole, or was changed") from None


@contextmanager
def as_written(what: object) -> Iterator[None]:
    """Reading what ma_sft wrote once: whatever is not as it was written is an error of that file, in one line.

    Raises:
        RecipeError: anything in the block failed but the operating system.
    """
    try:
        yield
    except MaSftError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # transformers raises OSErrors of its own
            raise
        raise RecipeError(
            f"{what} is not as ma_sft writes it ({type(error).__name__}: {error}); it was changed, or is of "
            "another version"
        ) from error


@contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `target` when the block ends well, and vanishes when it does not.

    The scratch folder lies beside `target`, so the last step is one rename: a reader sees nothing or the whole.
    If another process made `target` meanwhile, theirs is kept. What a killed process of this machine left is removed.
    """
    import psutil

    target.parent.mkdir(parents=True, exist_ok=True)
    mine = f".{target.name}.{socket.gethostname()}."
    for left in target.parent.glob(f"{glob.escape(mine)}*"):
        process = left.name.removeprefix(mine).split(".")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}.", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
