"""Hold pages against axe-core in Chromium: contrast, names, keyboard; at 390 and 1280 px, light and dark.

    python scripts/check_pages.py runs/demo/report.html comparison.html

axe-core comes from npm, Chromium from where `browser.py` has it.
"""

import sys
from pathlib import Path
from typing import Any

from browser import show
from fetch_tokenizers import unpack

from ma_sft.utils import atomic_dir, cache_dir

AXE = "axe-core@4.10.2"
# What axe finds, and by how much anything is wider than the window
RUN = """
for (const details of document.querySelectorAll("details")) details.open = true;
axe.run().then(found => ({
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


def findings(page: Path, width: int, dark: bool) -> list[str]:
    """What is wrong with a page at a width in a colour scheme."""
    found: dict[str, Any] = show(page, f"{axe()};{RUN}", width=width, height=1200, dark=dark)
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
