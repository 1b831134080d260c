"""Bring the chat templates of many families, as llama.cpp keeps them for its tests, into the cache for the tests.

They come from PyPI, in the source package of `llama-cpp-python`; nothing of it is built or installed.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from ma_sft.utils import atomic_dir, cache_dir

PACKAGE = "llama-cpp-python==0.3.36"


def fetch_templates() -> Path:
    """Folder with one `*.jinja` for each template."""
    folder = cache_dir() / "templates" / PACKAGE.replace("==", "-")
    if not folder.is_dir():
        print(f"fetching {PACKAGE}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        with atomic_dir(folder) as target, tempfile.TemporaryDirectory() as scratch:
            subprocess.run([*pip, "--no-binary", "llama-cpp-python", "--dest", scratch, PACKAGE], check=True)
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                for member in archive:
                    path = PurePosixPath(member.name)
                    if path.suffix == ".jinja" and path.match("vendor/llama.cpp/models/templates/*"):
                        file = archive.extractfile(member)
                        assert file is not None
                        (target / path.name).write_bytes(file.read())
    return folder


if __name__ == "__main__":
    fetch_templates()
