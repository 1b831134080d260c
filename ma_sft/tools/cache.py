"""What the cache folder holds, since when it was not used, and how it is made smaller."""

import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ma_sft.errors import RecipeError
from ma_sft.utils import cache_dir, size_of

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
SPANS = {"h": 3600, "d": 86_400, "w": 7 * 86_400}  # seconds


@dataclass(frozen=True)
class Entry:
    """Something that was made once.

    `kind` is `tokenized`, `reader` (rows as they were read), `models`, ...; the size is in bytes, the last use in Unix
    time.
    """

    kind: str
    path: Path
    nbytes: int
    used: float


def entries() -> list[Entry]:
    """All that the cache folder holds, and the rows that `datasets` keeps for it, what was used last first."""
    from datasets.config import HF_DATASETS_CACHE

    found = []
    for path in (*cache_dir().glob("*/*"), *Path(HF_DATASETS_CACHE).glob("reader/*")):
        with suppress(FileNotFoundError):  # what another process has just finished or removed
            found.append(Entry(path.parent.name, path, size_of(path), path.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def clean(older_than: str | None, keep: str | None, *, dry_run: bool = False) -> list[Entry]:
    """Remove what was not used for `older_than`, then what was used longest ago until no more than `keep` is left.

    Args:
        older_than: a number with h, d or w, e.g. "30d".
        keep: a number with KB, MB, GB or TB, e.g. "20GB".
        dry_run: only tell.

    Returns:
        What is gone, or would be. All of it is made again when it is needed.

    Raises:
        RecipeError: not such a number.
    """
    age, room = _number("older_than", older_than, SPANS), _number("keep", keep, UNITS)
    now, total, gone = time.time(), 0.0, []
    for entry in entries():
        if (age is not None and now - entry.used > age) or (room is not None and total + entry.nbytes > room):
            gone.append(entry)
        else:
            total += entry.nbytes
    for entry in () if dry_run else gone:
        with suppress(FileNotFoundError):
            shutil.rmtree(entry.path) if entry.path.is_dir() and not entry.path.is_symlink() else entry.path.unlink()
    return gone


def table(found: Sequence[Entry]) -> list[str]:
    """Lines for the terminal: size, days since the last use, kind, path; and the sum."""
    lines = [
        f"{e.nbytes / 1e6:>10,.1f} MB  {(time.time() - e.used) / 86_400:>6.1f} days  {e.kind:<11} {e.path}"
        for e in found
    ]
    return [*lines, f"{sum(e.nbytes for e in found) / 1e6:>10,.1f} MB  in {len(found)} entries of {cache_dir()}"]


def _number(name: str, text: str | None, units: dict[str, int]) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in units:
        raise RecipeError(f"{name}: a number with one of {', '.join(units)} expected, found {text!r}")
    return float(match[1]) * units[match[2]]
