"""CONTRIBUTING's plug-in points work as they stand there, and its answers name what there is."""

import re

import pytest
from helpers import ROOT

from ma_sft import to_messages
from ma_sft.data import filters, formats

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture
def plug_in():
    """Runs the block of the page that has a word in it; what it registers goes after the test."""
    registries = (formats.FORMATS, filters.ROW_FILTERS)
    kept = [dict(registry) for registry in registries]

    def run(word):
        (code,) = [block for block in BLOCKS if word in block]
        exec(code, {})

    yield run
    for registry, before in zip(registries, kept, strict=True):
        registry.clear()
        registry.update(before)


def test_format(plug_in):
    plug_in("FORMATS")
    assert to_messages({"riddle": "What has keys?", "key": "A piano."}) == [
        {"role": "user", "content": "What has keys?"},
        {"role": "assistant", "content": "A piano."},
    ]


def test_filter(plug_in):
    plug_in("ROW_FILTERS")
    row = filters.SeenRow([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], 2)
    assert filters.ROW_FILTERS["max_messages"](1, row) == "2 messages"
    assert filters.ROW_FILTERS["max_messages"](2, row) is None


def test_every_answer_names_a_file_that_is_there_and_a_name_in_it():
    answers = PAGE.split("## Where would I change X?")[1].split("## Plug-in points")[0]
    rows = [line for line in answers.splitlines() if line.startswith("| a")]
    assert len(rows) == 12
    for row in rows:
        paths = re.findall(r"`((?:ma_sft|accelerate_configs|tests)/[^`]*)`", row)
        assert all((ROOT / path).exists() for path in paths), row
        for name in re.findall(r"`@?([A-Z_]{6,}|command)`", row):
            assert name in (ROOT / paths[0]).read_text(encoding="utf-8"), row
