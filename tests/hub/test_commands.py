"""Every command with hub ids, revisions, configurations and access: what works, and what is refused in one line."""

import json
import shutil

import pytest
from hub.conftest import chats, parquet
from hub.server import TOKEN
from safetensors.torch import load_file, save_file


def other_weights(folder, to):
    """A copy of a model folder with other weights."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    return to


def test_train_merge_chat_and_export_of_a_revision(hub, data, ma_sft, recipe, tiny_bpe, tmp_path):
    wanted = hub.add("models", "tiny/model", tiny_bpe, branch="v1")
    hub.add("models", "tiny/model", other_weights(tiny_bpe, tmp_path / "other"))
    done = ma_sft("train", recipe(model_revision="v1"))
    assert done.code == 0, done.err
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("tiny/model", wanted)
    manifest = json.loads((tmp_path / "run/merged/sft_manifest.json").read_text())
    assert manifest["base_model"]["revision"] == wanted
    assert not hub.fetched(hub.repos["models", "tiny/model"].branches["main"])
    for command in (["handoff-check", "run/adapter"], ["chat", "run/adapter", "--prompt", "Hi", "--max_new_tokens", 2]):
        done = ma_sft(*command)
        assert done.code == 0, done.out + done.err
    assert ma_sft("merge", "run/adapter", "-o", "again").code == 0
    for name, tensor in load_file(tmp_path / "again/model.safetensors").items():
        assert tensor.equal(load_file(tmp_path / "run/merged/model.safetensors")[name])
    cached = [path for path in (tmp_path / "run").rglob("*.json") if str(tmp_path / "home") in path.read_text()]
    assert not [path for path in cached if path.parent.name in ("adapter", "merged")]


def test_a_branch_that_moves_changes_nothing_in_a_run(hub, data, model, ma_sft, recipe, tiny_bpe, tmp_path):
    """The weights are asked for after the tokenizer: `main` moves between the two."""
    other = other_weights(tiny_bpe, tmp_path / "other")
    answer, moved = hub.fault, []

    def move(method, path):
        if "chats/resolve" in path and not moved:
            moved.append(hub.add("models", "tiny/model", other))
        return answer(method, path)

    hub.fault = move
    try:
        done = ma_sft("train", recipe(save_strategy="steps", save_steps=1))
    finally:
        del hub.fault
    assert done.code == 0, done.err
    assert moved and not hub.fetched(f"tiny/model/resolve/{moved[0]}")
    assert ma_sft("handoff-check", "run/adapter").code == 0
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert saved["revision"] == model
    assert f"{model}" in (tmp_path / "run/revisions.json").read_text()


def test_a_resumed_run_goes_on_with_its_commits(hub, data, model, ma_sft, recipe, tiny_bpe, tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 1}
    assert ma_sft("train", recipe(**steps)).code == 0
    for unfinished in ("summary.json", "adapter", "merged", "checkpoint-2"):
        path = tmp_path / "run" / unfinished
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    moved = hub.add("models", "tiny/model", other_weights(tiny_bpe, tmp_path / "other"))
    hub.add("datasets", "tiny/chats", {"data/train-0.parquet": parquet(chats(9, "product"))})
    done = ma_sft("train", recipe(**steps))
    assert done.code == 0, done.err
    assert "going on from" in done.out
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["revision"] == model
    assert not hub.fetched(moved)


def test_only_the_weights_that_are_needed_come(hub, data, ma_sft, recipe, tiny_bpe, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_bpe, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for at, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-0000{at}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "original").mkdir()
    for useless in ("original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin"):
        (folder / useless).write_bytes(b"useless")
    hub.add("models", "tiny/model", folder)
    done = ma_sft("train", recipe())
    assert done.code == 0, done.err
    came = [path.split("/resolve/")[1].split("/", 1)[1] for path in hub.fetched("tiny/model/resolve")]
    assert sorted(name for name in came if name.endswith((".safetensors", ".bin"))) == sorted(set(weight_map.values()))
    assert len(came) == len(set(came))


def test_configurations_splits_and_revisions_of_data(hub, model, ma_sft, recipe):
    files = {
        f"{config}/{split}-0.parquet": parquet(chats(rows, config))
        for config, split, rows in (("easy", "train", 5), ("hard", "train_sft", 6), ("hard", "test_sft", 2))
    }
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
        for config, splits in (("easy", ["train"]), ("hard", ["train_sft", "test_sft"]))
    )
    files["README.md"] = f"{card}---\n".encode()
    hub.add("datasets", "tiny/two", files)
    hub.add("datasets", "tiny/two", {**files, "easy/train-0.parquet": parquet(chats(7))}, branch="later")

    def rows(dataset, **settings):
        done = ma_sft("check", recipe(dataset_name=dataset, **settings), "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)["rows"]

    assert rows("tiny/two:easy") == 5
    assert rows("tiny/two@later:easy") == 7
    assert rows("tiny/two:hard", dataset_train_split="train_sft") == 6
    assert rows(None, datasets=[{"path": "tiny/two", "name": "hard", "split": "test_sft"}]) == 2
    assert rows(None, datasets=[{"path": "tiny/two", "name": "easy", "revision": "later"}]) == 7
    assert rows(None, datasets=[{"path": "tiny/two", "data_dir": "easy"}]) == 5
    assert rows(None, datasets=[{"path": "tiny/two", "data_files": {"train": "hard/test_sft*"}}]) == 2
    assert rows(None, datasets=[{"path": "tiny/two", "name": "easy", "limit": 3}]) == 3

    error = ma_sft("check", recipe(dataset_name="tiny/two")).error
    assert "tiny/two" in error and "easy" in error and "hard" in error
    error = ma_sft("check", recipe(dataset_name="tiny/two:hard")).error
    assert "train_sft" in error and "test_sft" in error
    error = ma_sft("check", recipe(dataset_name="tiny/two@never")).error
    assert "no revision 'never'" in error


# `datasets` waits 5 s at each end of a stream of Parquet files.
@pytest.mark.parametrize("ending", ["jsonl", pytest.param("parquet", marks=pytest.mark.slow)])
def test_a_stream(hub, model, ma_sft, recipe, ending):
    rows = chats(8)
    file = parquet(rows) if ending == "parquet" else "".join(json.dumps(row) + "\n" for row in rows).encode()
    hub.add("datasets", "tiny/chats", {f"data/train-0.{ending}": file})
    done = ma_sft("train", recipe(dataset_streaming=True))
    assert done.code == 0, done.err


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
    assert "It is " in ma_sft("preview", recipe(), "-n", 2).out
    assert ma_sft("plan", recipe(), "--json").code == 0
    done = ma_sft("init", "--model", "tiny/model", "--data", "tiny/chats", "--split", "test", "--hardware", "cpu",
                  "--task", "chat", "-o", "written.py")  # fmt: skip
    assert done.code == 0, done.err
    assert 'dataset_train_split="test"' in (tmp_path / "written.py").read_text()
    assert ma_sft("check", "written.py").code == 0
    assert ma_sft("chat", "tiny/model", "--prompt", "Hi", "--max_new_tokens", 2).code == 0
    assert ma_sft("export", "tiny/model", "-o", "exported").code == 0
    assert (tmp_path / "exported/model.safetensors").is_file()
    assert "has no sft_manifest.json" in ma_sft("handoff-check", "tiny/model").error


def test_an_adapter_on_the_hub(hub, data, model, ma_sft, recipe, tmp_path):
    assert ma_sft("train", recipe()).code == 0
    hub.add("models", "me/adapter", tmp_path / "run/adapter")
    assert ma_sft("merge", "me/adapter", "-o", "merged", home=tmp_path / "elsewhere").code == 0
    assert ma_sft("handoff-check", "me/adapter", home=tmp_path / "elsewhere").code == 0
    more = recipe("more", adapter_name_or_path="me/adapter", output_dir=str(tmp_path / "more"))
    more.write_text(more.read_text().replace("lora_preset: mini\n", ""))
    done = ma_sft("train", more)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    "settings",
    [
        {"model_revision": "v1", "filters": {"max_tokens": 1000}},  # which counts with the revision's tokenizer
        {"model_init_kwargs": {"revision": "v1"}},
    ],
)
def test_the_tokenizer_is_the_revisions(hub, data, ma_sft, recipe, tiny_bpe, settings):
    hub.add("models", "tiny/model", tiny_bpe, branch="v1")
    hub.add("models", "tiny/model", {"README.md": b"moved away"})
    done = ma_sft("check", recipe(**settings))
    assert done.code == 0, done.err
