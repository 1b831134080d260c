"""A hub that is down, busy, slow or broken: a bounded wait, one line, and nothing half in the cache."""

import json

import pytest
from hub.conftest import chats, parquet
from patience import patience


def test_cached_and_the_hub_down(hub, data, model, ma_sft, recipe):
    assert ma_sft("train", recipe()).code == 0
    warm = ma_sft("check", recipe()).seconds
    with hub.down():
        done = ma_sft("check", recipe())
        again = ma_sft("train", recipe(), "--overwrite_output_dir", "true")
        empty = ma_sft("check", recipe(model_name_or_path="tiny/other"))
    assert done.code == again.code == 0, done.err + again.err
    assert "cannot be reached" in done.err and "going on with what is cached" in done.err
    assert "Retrying" not in done.err + again.err
    assert done.seconds < warm + 10 * patience()
    assert "MODEL=PATH" in empty.error and "cannot be reached" in empty.error and empty.seconds < 15 * patience()


@pytest.mark.slow
def test_cached_and_a_hub_that_does_not_answer(hub, data, model, ma_sft, recipe):
    assert ma_sft("check", recipe()).code == 0
    hub.fail(".", "stall", times=100)
    done = ma_sft("check", recipe())
    assert done.code == 0, done.err
    assert "cannot be reached" in done.err and "timed out" in done.err
    assert done.seconds < 25 * patience()  # 8 s of waiting, and what a check takes


def test_offline_takes_the_revision_that_is_asked_for(hub, model, ma_sft, recipe):
    """`datasets` alone would take whatever revision was cached last."""
    for branch, count in (("v1", 5), ("v2", 6)):
        hub.add("datasets", "tiny/chats", {"data/train-0.parquet": parquet(chats(count))}, branch=branch)

    def rows(revision):
        done = ma_sft("check", recipe(dataset_name=f"tiny/chats@{revision}"), "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)["rows"]

    assert [rows("v1"), rows("v2")] == [5, 6]
    with hub.down():
        assert [rows("v1"), rows("v2")] == [5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "429"])
def test_a_busy_hub_is_asked_again(hub, data, model, ma_sft, recipe, fault):
    """As huggingface_hub does: of files, where it says when to come again."""
    hub.fail("models/tiny/model", fault, times=2)
    if fault == "429":
        hub.fail("resolve/.*/tokenizer.json", fault, times=1)
        hub.fail("resolve/.*parquet", fault, times=1)
    done = ma_sft("check", recipe())
    assert done.code == 0, done.err


@pytest.mark.slow
def test_a_hub_that_stays_busy(hub, data, model, ma_sft, recipe):
    hub.fail("api/models", "503", times=100)
    done = ma_sft("check", recipe())
    assert "503" in done.error and "tiny/model" in done.error
    assert done.seconds < 25 * patience()


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", *(pytest.param(f, marks=pytest.mark.slow) for f in ("tokenizer.json", "train-0.parquet"))],
)
def test_a_connection_cut_in_the_middle_goes_on(hub, data, model, ma_sft, recipe, file):
    hub.fail(f"resolve/.*/{file}", "cut", times=2)
    done = ma_sft("train", recipe())
    assert done.code == 0, done.err


@pytest.mark.slow
def test_a_download_that_is_cut_for_good_leaves_nothing_whole(hub, data, model, ma_sft, recipe):
    hub.fail("resolve/.*/model.safetensors", "cut", times=100)
    error = ma_sft("train", recipe()).error
    assert "tiny/model" in error
    hub.faults.clear()
    assert ma_sft("train", recipe()).code == 0


def test_files_that_are_broken_at_the_hub(hub, model, ma_sft, recipe, tiny_bpe):
    hub.add("datasets", "tiny/chats", {"data/train-0.parquet": parquet(chats(8))[:-20] + b"x" * 20})
    error = ma_sft("check", recipe()).error
    assert "tiny/chats" in error and "arquet" in error
    files = {path.name: path.read_bytes() for path in tiny_bpe.iterdir()}
    hub.add("datasets", "tiny/chats", {"data/train-0.parquet": parquet(chats(8))})
    for name, content in (("config.json", b"{"), ("tokenizer.json", b"{}"), ("model.safetensors", b"x" * 90)):
        hub.add("models", "tiny/model", {**files, name: content})
        error = ma_sft("train", recipe(), "--overwrite_output_dir", "true").error
        assert "tiny/model" in error or "model.safetensors" in error, error
    hub.add("models", "tiny/model", {name: files[name] for name in ("config.json", "model.safetensors")})
    error = ma_sft("check", recipe()).error
    assert "tiny/model" in error and "tokenizer" in error
