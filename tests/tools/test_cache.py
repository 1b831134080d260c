"""`ma-sft cache`: what is there, and what goes when it is to be smaller."""

import logging
import os
import shutil
import time

import pytest

from ma_sft.errors import RecipeError
from ma_sft.tools.cache import clean, entries, table


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Three entries of 1, 2 and 4 MB, last used 1, 10 and 100 days ago."""
    monkeypatch.setenv("MA_SFT_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "none")
    for name, size, days in (("tokenized/a", 1, 1), ("tokenized/b", 2, 10), ("models/c", 4, 100)):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "rows.arrow").write_bytes(bytes(size * 10**6))
        os.utime(folder, (time.time() - days * 86_400,) * 2)
    return tmp_path


def names(found):
    return [entry.path.name for entry in found]


def test_lists_sizes_and_ages(cache):
    assert [(e.kind, e.path.name, e.nbytes) for e in entries()] == [
        ("tokenized", "a", 10**6),
        ("tokenized", "b", 2 * 10**6),
        ("models", "c", 4 * 10**6),
    ]
    lines = table(entries())
    assert "100.0 days" in lines[2] and "7.0 MB  in 3 entries" in lines[3]


def test_removes_what_was_not_used_for_long(cache):
    assert names(clean("9d", None, dry_run=True)) == ["b", "c"] and len(entries()) == 3
    assert names(clean("2w", None)) == ["c"]
    assert names(entries()) == ["a", "b"] and not (cache / "models" / "c").exists()


def test_keeps_what_was_used_last(cache):
    assert names(clean(None, "3.5MB")) == ["c"]
    assert names(clean(None, "2 mb")) == ["b"]
    assert names(clean(None, "0KB")) == ["a"] and entries() == []


@pytest.mark.parametrize(("older", "keep"), [("soon", None), ("3", None), (None, "many"), (None, "3d")])
def test_what_is_no_age_or_size_is_refused(cache, older, keep):
    with pytest.raises(RecipeError, match=r"(older_than|keep): a number with one of"):
        clean(older, keep)


def test_bound_is_said_when_it_is_passed(cache, monkeypatch):
    from ma_sft.utils import over_bound

    assert over_bound() is None
    monkeypatch.setenv("MA_SFT_CACHE_GB", "0.005")
    assert over_bound() == (
        f"the cache folder {cache} holds 0.0 GB, more than the 0.005 GB of MA_SFT_CACHE_GB; "
        "`ma-sft cache --keep 0.0025GB` removes what was used longest ago"
    )


def test_sizes_while_another_process_writes_and_removes(cache):
    import threading

    from ma_sft.utils import over_bound

    done = threading.Event()

    def churn():
        while not done.is_set():
            (cache / "tokenized" / ".scratch" / "deep").mkdir(parents=True, exist_ok=True)
            (cache / "tokenized" / ".scratch" / "deep" / "rows.arrow").write_bytes(b"x")
            shutil.rmtree(cache / "tokenized" / ".scratch")

    other = threading.Thread(target=churn)
    other.start()
    try:
        for _ in range(300):
            assert over_bound() is None and {"a", "b", "c"} <= set(names(entries()))
    finally:
        done.set()
        other.join()


def test_run_says_that_the_bound_is_passed(tmp_path, monkeypatch, tiny, caplog):
    from ma_sft import Recipe
    from ma_sft.labels.templates import load_tokenizer
    from ma_sft.labels.tokenize import label

    monkeypatch.setenv("MA_SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MA_SFT_CACHE_GB", "0.0000001")
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    settings = Recipe(model_name_or_path=str(tiny), dataset_name=str(tmp_path / "rows.jsonl")).resolve()
    with caplog.at_level(logging.WARNING):
        label(settings, load_tokenizer(settings)[0])
    assert "ma-sft cache --keep" in caplog.text
