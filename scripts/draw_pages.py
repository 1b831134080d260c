"""The pictures of the README: a run's report and the mask preview of the demo, as Chromium shows them.

Needs a finished `runs/demo` (`make sft-demo`).
"""

import tempfile
from pathlib import Path

from browser import show
from PIL import Image

from ma_sft.config import Recipe
from ma_sft.labels.templates import load_tokenizer
from ma_sft.labels.tokenize import label
from ma_sft.pages.preview import preview_html
from ma_sft.pages.report import write_report

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def draw(page: Path, picture: Path, width: int, height: int) -> None:
    """Draw the top `width` x `height` pixels of a page, in few colours to keep the file small."""
    show(page, width=width, height=height, picture=picture)
    with Image.open(picture) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(picture, optimize=True)
    print(f"{picture}: {picture.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        preview, report = Path(scratch) / "preview.html", Path(scratch) / "report.html"
        settings = Recipe.load("recipes/demo.py").resolve()
        tokenizer, _ = load_tokenizer(settings)
        rows = label(settings, tokenizer).dataset
        preview.write_text(preview_html([rows[0], rows[3]], tokenizer), encoding="utf-8")
        draw(preview, IMAGES / "preview.png", 1000, 760)
        write_report([Path("runs/demo")], report)
        draw(report, IMAGES / "report.png", 1100, 1250)
