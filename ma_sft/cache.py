"""Where ma_sft keeps what is made once and used again: converted models, fetched tokenizers, tokenised data."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache folder: `$MA_SFT_CACHE`, else `$XDG_CACHE_HOME/ma_sft`, else `~/.cache/ma_sft`."""
    if path := os.environ.get("MA_SFT_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ma_sft"


@contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `target` when the block ends well, and vanishes when it does not.

    The scratch folder lies beside `target`, so the last step is one rename: a reader sees nothing or the whole.
    If another process made `target` meanwhile, theirs is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
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
