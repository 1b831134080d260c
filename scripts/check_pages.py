"""Hold pages against axe-core in Chromium: contrast, names, keyboard; at 390 and 1280 px, light and dark.

    python scripts/check_pages.py runs/demo/report.html comparison.html

Needs Chromium (`apt-get install chromium`); axe-core comes from npm.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from html import unescape
from pathlib import Path

from fetch_tokenizers import unpack

from ma_sft.files import atomic_dir, cache_dir

AXE = "axe-core@4.10.2"
# Reads what axe finds, and whether anything is wider than the window, into an attribute that the DOM's dump shows
RUN = """
for (const details of document.querySelectorAll("details")) details.open = true;
axe.run().then(found => document.body.dataset.found = JSON.stringify({
  wide: document.documentElement.scrollWidth - window.innerWidth,
  violations: found.violations.map(v => `${v.id}: ${v.help}: ${v.nodes.slice(0, 3).map(n => n.html).join(" ")}`),
}));
"""


def axe() -> str:
    """axe-core's script, fetched once."""
    folder = cache_dir() / "axe-core"
    if not folder.is_dir():
        with atomic_dir(folder) as scratch:
            unpack(AXE, ["axe.min.js"], scratch)
    return (folder / "axe.min.js").read_text(encoding="utf-8")


def chromium() -> str | None:
    """Where Chromium is, if it is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def findings(page: Path, width: int, dark: bool) -> list[str]:
    """What is wrong with a page at a width in a colour scheme."""
    source = page.read_text(encoding="utf-8")
    source = re.sub(r"<meta http-equiv=\"(Content-Security-Policy|refresh)\"[^>]*>", "", source)
    source = source.replace("</body>", f"<script>{axe()}</script><script>{RUN}</script></body>")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "page.html"
        copy.write_text(source, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=20000"]
        options += [f"--user-data-dir={scratch}/profile", f"--window-size={width},1200", "--dump-dom"]
        options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        shown = subprocess.run(
            [chromium() or "chromium", *options, copy.as_uri()], capture_output=True, text=True, timeout=300
        )
    told = re.search(r'data-found="([^"]*)"', shown.stdout)
    if told is None:
        return [f"the browser told nothing: {shown.stderr[-500:]}"]
    found = json.loads(unescape(told[1]))
    return found["violations"] + ([f"{found['wide']} px wider than the window"] if found["wide"] > 0 else [])


if __name__ == "__main__":
    wrong = [
        f"{page}, {width} px, {'dark' if dark else 'light'}: {text}"
        for page in sys.argv[1:]
        for width in (390, 1280)
        for dark in (False, True)
        for text in findings(Path(page), width, dark)
    ]
    print(*wrong or ["nothing found"], sep="\n")
    sys.exit(bool(wrong))
