"""Every command with hub ids, revisions, configurations and access: what works, and what is refused in one line."""

import json
import shutil

import pytest
import yaml
from hub.conftest import chats, parquet
from hub.server import TOKEN
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def other_weights(folder, to):
    """A copy of a model folder with other weights."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    return to


def succeeds(done):
    assert done.code == 0, done.out + done.err
    return done.out


def test_a_revision_is_trained_merged_and_used(hub, data, ma_sft, recipe, tiny_bpe, tmp_path):
    folder = shutil.copytree(tiny_bpe, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny_bpe).save_pretrained(folder, max_shard_size="50KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 1
    (folder / "original").mkdir()
    for useless in ("original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin"):
        (folder / useless).write_bytes(b"useless")
    wanted = hub.add("models", "tiny/model", folder, branch="v1")
    hub.add("models", "tiny/model", other_weights(tiny_bpe, tmp_path / "other"))
    revision = {"model_init_kwargs": {"revision": "v1"}, "filters": {"max_tokens": 1000}}  # by its own tokenizer
    succeeds(ma_sft("train", recipe(**revision)))
    came = [path.split("/resolve/")[1].split("/", 1) for path in hub.fetched("tiny/model/resolve")]
    assert {commit for commit, _ in came} == {wanted}
    assert sorted(name for _, name in came if name.endswith((".safetensors", ".bin"))) == shards
    assert len(came) == len({name for _, name in came})
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("tiny/model", wanted)
    manifest = json.loads((tmp_path / "run/merged/sft_manifest.json").read_text())
    assert manifest["base_model"]["revision"] == wanted
    succeeds(ma_sft("handoff-check", "run/adapter"))
    succeeds(ma_sft("chat", "run/adapter", "--prompt", "Hi", "--max_new_tokens", 2))
    succeeds(ma_sft("merge", "run/adapter", "-o", "again"))
    for name, tensor in load_file(tmp_path / "again/model.safetensors").items():
        assert tensor.equal(load_file(tmp_path / "run/merged/model.safetensors")[name])
    for path in (*tmp_path.glob("run/adapter/*.json"), *tmp_path.glob("run/merged/*.json")):
        assert str(tmp_path / "home") not in path.read_text()


def test_a_branch_that_moves_changes_nothing_in_a_run_nor_where_it_is_resumed(
    hub, data, model, ma_sft, recipe, tiny_bpe, tmp_path, monkeypatch
):
    """The weights are asked for after the tokenizer: `main` moves between the two."""
    other = other_weights(tiny_bpe, tmp_path / "other")
    answer, moved = hub.fault, []

    def move(method, path):
        if "chats/resolve" in path and not moved:
            moved.append(hub.add("models", "tiny/model", other))
        return answer(method, path)

    def holds_to_the_first_commit():
        saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
        return saved["revision"] == model and not hub.fetched(f"tiny/model/resolve/{moved[0]}")

    monkeypatch.setattr(hub, "fault", move)
    path = recipe(save_strategy="steps", save_steps=1)
    succeeds(ma_sft("train", path))
    assert holds_to_the_first_commit()
    succeeds(ma_sft("handoff-check", "run/adapter"))
    assert model in (tmp_path / "run/revisions.json").read_text()
    (tmp_path / "run/summary.json").unlink()
    for unfinished in ("adapter", "merged", "checkpoint-2"):
        shutil.rmtree(tmp_path / "run" / unfinished)
    hub.add("datasets", "tiny/chats", {"data/train-0.parquet": parquet(chats(9, "product"))})
    assert "going on from" in succeeds(ma_sft("train", path))
    assert holds_to_the_first_commit()


def test_configurations_splits_and_revisions_of_data(hub, model, ma_sft, recipe):
    parts = (("easy", "train", 5), ("hard", "train_sft", 6), ("hard", "test_sft", 2))
    files = {f"{config}/{split}-0.parquet": parquet(chats(rows, config)) for config, split, rows in parts}
    listed = {name: [split for config, split, _ in parts if config == name] for name in ("easy", "hard")}
    configs = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in splits]}
        for name, splits in listed.items()
    ]
    files["README.md"] = f"---\n{yaml.safe_dump({'configs': configs})}---\n".encode()
    hub.add("datasets", "tiny/two", files)
    hub.add("datasets", "tiny/two", {**files, "easy/train-0.parquet": parquet(chats(7))}, branch="later")

    def rows(dataset, **settings):
        return json.loads(succeeds(ma_sft("check", recipe(dataset_name=dataset, **settings), "--json")))["rows"]

    assert rows("tiny/two:easy") == 5
    assert rows("tiny/two@later:easy") == 7
    assert rows("tiny/two:hard", dataset_train_split="train_sft") == 6
    for source, count in (
        ({"name": "hard", "split": "test_sft"}, 2),
        ({"name": "easy", "revision": "later"}, 7),
        ({"data_dir": "easy"}, 5),
        ({"data_files": {"train": "hard/test_sft*"}}, 2),
        ({"name": "easy", "limit": 3}, 3),
    ):
        assert rows(None, datasets=[{"path": "tiny/two", **source}]) == count
    for name, says in (
        ("tiny/two", ["tiny/two", "easy", "hard"]),
        ("tiny/two:hard", ["train_sft", "test_sft"]),
        ("tiny/two@never", ["no revision 'never'"]),
    ):
        error = ma_sft("check", recipe(dataset_name=name)).error
        assert all(word in error for word in says)


# `datasets` waits 5 s at each end of a stream of Parquet files.
@pytest.mark.parametrize("ending", ["jsonl", pytest.param("parquet", marks=pytest.mark.slow)])
def test_a_stream(hub, model, ma_sft, recipe, ending):
    rows = chats(8)
    file = parquet(rows) if ending == "parquet" else "".join(json.dumps(row) + "\n" for row in rows).encode()
    hub.add("datasets", "tiny/chats", {f"data/train-0.{ending}": file})
    succeeds(ma_sft("train", recipe(dataset_streaming=True)))


@pytest.mark.parametrize("where", ["model", "data"])
def test_private_and_gated(hub, data, model, ma_sft, recipe, where, tiny_bpe):
    kind, name = ("models", "tiny/model") if where == "model" else ("datasets", "tiny/chats")
    repo = hub.repos[kind, name]
    repo.access = "gated"
    error = ma_sft("check", recipe()).error
    assert name in error and "accept its terms at http" in error and "hf auth login" in error
    assert ma_sft("check", recipe(), token=TOKEN).code == 0
    repo.access = "private"
    error = ma_sft("check", recipe(), token="hf_wrong").error
    assert "token" in error and "hf auth login" in error
    error = ma_sft("check", recipe()).error
    assert name in error and "private" in error and "hf auth login" in error
    assert ma_sft("check", recipe(), token=TOKEN).code == 0


def test_what_is_not_there(hub, data, model, ma_sft, recipe):
    assert "has none" in ma_sft("check", recipe(model_name_or_path="tiny/modle")).error
    assert "'tinny/chats'" in ma_sft("check", recipe(dataset_name="tinny/chats")).error
    assert "no revision 'v9'" in ma_sft("check", recipe(model_revision="v9")).error


def test_preview_plan_init_chat_handoff_and_export(hub, data, model, ma_sft, recipe, tmp_path):
    assert "It is " in succeeds(ma_sft("preview", recipe(), "-n", 2))
    succeeds(ma_sft("plan", recipe(), "--json"))
    asked = "--model tiny/model --data tiny/chats --split test --hardware cpu --task chat -o written.py"
    succeeds(ma_sft("init", *asked.split()))
    assert 'dataset_train_split="test"' in (tmp_path / "written.py").read_text()
    succeeds(ma_sft("check", "written.py"))
    succeeds(ma_sft("chat", "tiny/model", "--prompt", "Hi", "--max_new_tokens", 2))
    succeeds(ma_sft("export", "tiny/model", "-o", "exported"))
    assert (tmp_path / "exported/model.safetensors").is_file()
    assert "has no sft_manifest.json" in ma_sft("handoff-check", "tiny/model").error
