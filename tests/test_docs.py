"""The documentation's Python is run, page by page, and what it prints is what the page says."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest
from conftest import ROOT, load_tokenizer

PAGES = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
# What a page takes from a hub lies in a folder here.
HUB = {"Qwen/Qwen3-0.6B": "qwen3", "google/gemma-3-1b-it": "gemma3"}


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """(line, code, expected output) of each Python block of a page that shows what it prints."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(text[: m.start()].count("\n") + 2, m[1], m[2] or "") for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [p for p in PAGES if any(output for _, _, output in blocks(p))], ids=str)
def test_python_on_the_page_prints_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # DeepSpeed, if installed, prints a line where it has to guess
    names: dict = {}
    for line, code, expected in blocks(page):
        for hub, local in HUB.items():
            if hub in code:
                load_tokenizer(local).save_pretrained(tmp_path / local)
                code = code.replace(f'"{hub}"', repr(str(tmp_path / local)))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
        assert printed.getvalue() == expected, f"{page}, line {line}"
