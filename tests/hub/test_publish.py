"""`push_to_hub` uploads what a user would publish, once and at the end, and a hub that fails costs the run nothing."""

import json
import re

from hub.server import TOKEN

ADAPTER = """README.md adapter_config.json adapter_model.safetensors chat_template.jinja recipe.json report.html
    sft_manifest.json tokenizer.json tokenizer_config.json""".split()
MODEL = """README.md chat_template.jinja config.json generation_config.json model.safetensors recipe.json report.html
    sft_manifest.json tokenizer.json tokenizer_config.json""".split()


def published(hub, name):
    repo = hub.repos["models", name]
    files = repo.commits[repo.branches["main"]]
    return {path: content for path, content in files.items() if path != ".gitattributes"}, len(repo.commits)


def test_an_adapter_with_its_card_is_as_good_as_a_folder(hub, data, model, ma_sft, recipe, tmp_path):
    path = recipe(push_to_hub=True, hub_model_id="me/tuned", hub_private_repo=True, save_strategy="steps", save_steps=1)
    done = ma_sft("train", path, "--hub_token", TOKEN)
    assert done.code == 0, done.err
    files, commits = published(hub, "me/tuned")
    assert sorted(files) == sorted(ADAPTER)
    assert commits == 2  # the repository's own, and ours
    assert hub.repos["models", "me/tuned"].access == "private"
    assert all(name in done.out for name in ADAPTER)
    card = files["README.md"].decode()
    assert "base_model: tiny/model" in card and "- tiny/chats" in card and model in card and "train loss" in card
    assert str(tmp_path) not in card.split("## Recipe")[0]
    everything = b"".join(files.values()) + (tmp_path / "run/summary.json").read_bytes()
    assert TOKEN.encode() not in everything
    assert not [f for f in (tmp_path / "run").rglob("*") if f.is_file() and TOKEN.encode() in f.read_bytes()]
    for command in (("merge", "me/tuned", "-o", "merged"), ("handoff-check", "me/tuned")):
        again = ma_sft(*command, token=TOKEN, home=tmp_path / "elsewhere")
        assert again.code == 0, again.err
    more = {"adapter_name_or_path": "me/tuned", "output_dir": str(tmp_path / "more"), "lora_preset": None}
    again = ma_sft("train", recipe("more", **more), token=TOKEN)
    assert again.code == 0, again.err


def test_a_whole_model(hub, data, model, ma_sft, recipe):
    path = recipe(push_to_hub=True, use_peft=False, lora_preset=None)
    done = ma_sft("train", path, "--name", "whole", token=TOKEN)
    assert done.code == 0, done.err
    files, _ = published(hub, "me/whole")
    assert sorted(files) == sorted(MODEL)


def test_without_a_token_nothing_begins(hub, data, model, ma_sft, recipe, tmp_path):
    error = ma_sft("train", recipe(push_to_hub=True)).error
    assert "hf auth login" in error and "HF_TOKEN" in error
    assert not hub.fetched("safetensors")


def test_a_hub_that_fails_at_the_end(hub, data, model, ma_sft, recipe, tmp_path):
    hub.fail("repos/create", "503", times=100)
    done = ma_sft("train", recipe(push_to_hub=True, hub_model_id="me/tuned"), token=TOKEN)
    assert done.code == 0, done.err
    (line,) = [line for line in done.err.splitlines() if "publishing failed" in line]
    assert re.search(r"later: hf upload me/tuned \S+/adapter", line)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert "publishing" in summary["failed"] and "published" not in summary
    assert (tmp_path / "run/merged/model.safetensors").is_file() and (tmp_path / "run/report.html").is_file()
