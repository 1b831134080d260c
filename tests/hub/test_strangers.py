"""Nothing of a stranger's runs, and nobody is asked: code of models, scripts, pickles, templates, recipes."""

import json
import os
import pickle
import shutil

import pytest
import yaml
from hub.conftest import chats, parquet
from safetensors.torch import load_file

CONFIG = """
import pathlib
pathlib.Path("ran").touch()
from transformers import Qwen3Config
class TinyConfig(Qwen3Config):
    model_type = "tiny_custom"
"""
MODEL = """
from transformers import Qwen3ForCausalLM
from .configuration_tiny import TinyConfig
class TinyForCausalLM(Qwen3ForCausalLM):
    config_class = TinyConfig
"""


def with_code(folder, to):
    """A copy of a model folder whose classes are in Python files beside it."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    config |= {"model_type": "tiny_custom", "architectures": ["TinyForCausalLM"], "auto_map": auto_map}
    (to / "config.json").write_text(json.dumps(config))
    (to / "configuration_tiny.py").write_text(CONFIG)
    (to / "modeling_tiny.py").write_text(MODEL)
    return to


def refused(done, *words):
    """One line, and no question."""
    error = done.error
    assert "[y/N]" not in done.out + done.err
    for word in words:
        assert word in error, error


def test_code_of_a_model_runs_only_where_it_is_trusted(hub, data, ma_sft, recipe, tiny_bpe, tmp_path):
    folder = with_code(tiny_bpe, tmp_path / "custom")
    hub.add("models", "tiny/custom", folder)
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    for where in ("tiny/custom", str(folder)):
        path = recipe(model_name_or_path=where, overwrite_output_dir=True)
        for command in ("train", "plan"):
            refused(ma_sft(command, path, **modules), where, "trust_remote_code")
        refused(ma_sft("chat", where, "--prompt", "Hi", **modules), where, "trust_remote_code")
        refused(ma_sft("export", where, "-o", "x", **modules), where, "trust_remote_code")
        refused(ma_sft("init", "--model", where, "--data", "tiny/chats", "--hardware", "cpu", "--task", "chat", "-o",
                       "written.py", **modules), where, "trust_remote_code")  # fmt: skip
    assert not (tmp_path / "ran").exists()

    trusting = recipe(model_name_or_path="tiny/custom", trust_remote_code=True, overwrite_output_dir=True)
    done = ma_sft("train", trusting, **modules)
    assert done.code == 0, done.err
    assert "same first choice at 100.0%" in done.out, "the skeleton on which PEFT merges is the custom model's"
    assert set(load_file(tmp_path / "run/merged/model.safetensors")) == set(load_file(tiny_bpe / "model.safetensors"))
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    for command in (["merge", "run/adapter", "-o", "again"], ["chat", "run/merged", "--prompt", "Hi"],
                    ["export", "run/merged", "-o", "exported"], ["chat", "run/adapter", "--prompt", "Hi"]):  # fmt: skip
        refused(ma_sft(*command, **modules), "trust_remote_code")
    assert ma_sft("handoff-check", "run/adapter", **modules).code == 1  # says that the base cannot be loaded
    assert not (tmp_path / "ran").exists()
    for command in (["merge", "run/adapter", "-o", "again"], ["handoff-check", "run/merged"],
                    ["chat", "run/merged", "--prompt", "Hi", "--max_new_tokens", 2]):  # fmt: skip
        done = ma_sft(*command, "--trust_remote_code", "true", **modules)
        assert done.code == 0, done.out + done.err


def test_code_of_a_tokenizer(hub, data, ma_sft, recipe, tiny_bpe, tmp_path):
    folder = shutil.copytree(tiny_bpe, tmp_path / "custom")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_mine.py").write_text('import pathlib\npathlib.Path("ran").touch()\nclass Mine: pass\n')
    hub.add("models", "tiny/custom", folder)
    hub.add("models", "tiny/model", tiny_bpe)
    for where in ("tiny/custom", str(folder)):
        for command in ("train", "check", "preview", "plan"):
            path = recipe(model_name_or_path=where, overwrite_output_dir=True)
            refused(ma_sft(command, path), where, "trust_remote_code")
        refused(ma_sft("chat", where, "--prompt", "Hi"), where, "trust_remote_code")
        filters = {"max_tokens": 100, "tokenizer": where}
        refused(ma_sft("check", recipe(filters=filters)), where, "trust_remote_code")
    assert not (tmp_path / "ran").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_pickles(hub, data, model, ma_sft, recipe, tiny_bpe, tmp_path):
    folder = shutil.copytree(tiny_bpe, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    hub.add("models", "tiny/pickled", folder)
    for where, peft in (("tiny/pickled", True), (str(folder), False)):
        adapter = {"use_peft": peft, "lora_preset": "mini" if peft else None}
        done = ma_sft("train", recipe(model_name_or_path=where, overwrite_output_dir=True, **adapter))
        refused(done, where, "pickles can carry code")
        assert "0/2" not in done.err  # before step one
        refused(ma_sft("chat", where, "--prompt", "Hi"), "pickles can carry code")
        refused(ma_sft("export", where, "-o", "x"), "pickles can carry code")
    assert ma_sft("train", recipe(overwrite_output_dir=True)).code == 0
    (tmp_path / "run/adapter/adapter_model.safetensors").unlink()
    (tmp_path / "run/adapter/adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    refused(ma_sft("merge", "run/adapter", "-o", "again"), "adapter_model.bin")
    refused(ma_sft("chat", "run/adapter", "--prompt", "Hi"), "adapter_model.bin")
    more = {"adapter_name_or_path": "run/adapter", "output_dir": str(tmp_path / "more"), "lora_preset": None}
    refused(ma_sft("train", recipe("more", **more)), "adapter_model.bin")
    assert not (tmp_path / "ran").exists()


def test_scripts_of_data(hub, model, ma_sft, recipe, tmp_path):
    script = b'import pathlib\npathlib.Path("ran").touch()\n'
    hub.add("datasets", "tiny/chats", {"chats.py": script, "data/train-0.parquet": parquet(chats(4))})
    refused(ma_sft("check", recipe()), "tiny/chats", "chats.py", "refs/convert/parquet")
    assert not (tmp_path / "ran").exists()


LOOP = (
    "{% for i in range(90000) %}{% for j in range(90000) %}{% for k in range(90000) %}{% endfor %}" + 2 * "{% endfor %}"
)
DOUBLE = "{% set n = namespace(s='abcdefgh') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "word"),
    [
        pytest.param(LOOP, "stopped", marks=pytest.mark.slow),
        pytest.param(DOUBLE, "stopped", marks=pytest.mark.slow),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_hostile_templates(hub, data, ma_sft, recipe, tiny_bpe, template, word):
    files = {path.name: path.read_bytes() for path in tiny_bpe.iterdir()}
    own = files["chat_template.jinja"].decode()
    hub.add("models", "tiny/model", {**files, "chat_template.jinja": (template + own).encode()})
    done = ma_sft("check", recipe())
    assert word in done.error and "template" in done.error
    # only for the third answer: what is rendered first looks well
    late = own + "{% if messages | length > 2 %}" + template + "{% endif %}"
    hub.add("models", "tiny/model", {**files, "chat_template.jinja": late.encode()})
    rows = [{"messages": chats(1)[0]["messages"] * 2}] * 4
    hub.add("datasets", "tiny/chats", {"data/train-0.parquet": parquet(rows)})
    done = ma_sft("check", recipe())
    assert word in done.error and "template" in done.error


CODE = """
import pathlib
pathlib.Path("ran").touch()
def function(*args):
    return "a text"
"""


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset_format": "evil.py:function"},
        {"formatting_func": "evil.py:function", "response_template": "a"},
        {"generate_eval": 2, "test_size": 0.5, "metric": "evil.py:function"},
        {"filters": {"function": "evil.py:function"}},
        {"dataset_name": None, "datasets": [{"path": "tiny/chats", "format": "evil.py:function"}]},
        {"dataset_name": None, "datasets": [{"path": "tiny/chats", "filters": {"function": "evil.py:function"}}]},
    ],
)
def test_recipes_of_strangers_name_no_code(hub, data, model, ma_sft, recipe, tmp_path, settings):
    (tmp_path / "evil.py").write_text(CODE)
    path = recipe(**settings)
    as_json = tmp_path / "recipe.json"
    as_json.write_text(json.dumps(yaml.safe_load(path.read_text())))
    for command in ("check", *(("train", "preview", "plan") if "dataset_format" in settings else ())):
        refused(ma_sft(command, path), "evil.py:function", "--allow_code true")
    refused(ma_sft("train", as_json), "evil.py:function", "--allow_code true")
    assert not (tmp_path / "ran").exists()
    refused(ma_sft("check", recipe("own", allow_code=True, **settings)), "allow_code")  # no file allows itself
    assert not (tmp_path / "ran").exists()
    ma_sft("check" if "metric" not in settings else "train", path, "--allow_code", "true")
    assert (tmp_path / "ran").exists()


def test_recipes_of_strangers_in_other_files(hub, data, model, ma_sft, recipe, tmp_path):
    (tmp_path / "evil.py").write_text(CODE)
    (tmp_path / "more.yaml").write_text("dataset_format: evil.py:function\n")
    refused(ma_sft("check", recipe(), "--config", "more.yaml"), "evil.py:function", "--allow_code true")
    mixture = {"datasets": [{"path": "tiny/chats", "format": "evil.py:function"}]}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    refused(ma_sft("data", "build", "mixture.yaml", "-o", "built"), "evil.py:function", "--allow_code true")
    assert not (tmp_path / "ran").exists()
    ma_sft("check", recipe(), "--dataset_format", "evil.py:function")  # a flag is the user's own word
    assert (tmp_path / "ran").exists()
