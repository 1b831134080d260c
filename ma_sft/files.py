"""Where ma_sft keeps what is made once and used again: converted models, fetched tokenizers, tokenised data."""

import errno
import glob
import json
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ma_sft.errors import MaSftError, RecipeError


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


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; what another process removes meanwhile counts for nothing."""
    files = [path] if path.is_file() else [Path(at, name) for at, _, names in os.walk(path) for name in names]
    total = 0
    for file in files:
        with suppress(FileNotFoundError):
            total += file.lstat().st_size
    return total


def over_bound() -> str | None:
    """What to say if the cache folder holds more than `$MA_SFT_CACHE_GB` (50) gigabytes, None if it does not."""
    bound = float(os.environ.get("MA_SFT_CACHE_GB") or 50)
    held = size_of(cache_dir()) / 1e9
    if held <= bound:
        return None
    return (
        f"the cache folder {cache_dir()} holds {held:,.1f} GB, more than the {bound:g} GB of MA_SFT_CACHE_GB; "
        f"`ma-sft cache --keep {bound / 2:g}GB` removes what was used longest ago"
    )


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


MOST_VALUES = 100_000  # in one YAML file, each anchor counted wherever it is used


def parse_yaml(path: Path) -> Any:
    """What a YAML file holds; anything that YAML would quietly drop or blow up is refused.

    Raises:
        RecipeError: no valid YAML, a key that stands twice, nesting without end, or anchors that expand to more than
            `MOST_VALUES` values.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise RecipeError(f"{path}, line {node.start_mark.line + 1}: {twice[0]!r} stands twice; keep one")
            return super().construct_mapping(node, deep)

    sizes: dict[int, int] = {}

    def size(value: Any) -> int:
        if id(value) not in sizes:
            sizes[id(value)] = 1
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            sizes[id(value)] += sum(map(size, parts))
        return sizes[id(value)]

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
        if size(content) > MOST_VALUES:
            raise RecipeError(f"{path}: its anchors expand to more than {MOST_VALUES:,} values; write it out")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{path} is not valid YAML: nested too deeply") from None
    return content


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
