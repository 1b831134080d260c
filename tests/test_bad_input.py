"""Whatever a user gets wrong ends, before any training, in one line that says what and where."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from ma_sft import MaSftError, Recipe, run
from ma_sft.cli import main
from ma_sft.config import known_settings
from ma_sft.utils import guard

GOOD = {"instruction": "Say hi", "input": "", "output": "hi there"}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def recipe(tmp_path, **settings):
    defaults = {"name": "bad", "model_name_or_path": "demo", "output_dir": str(tmp_path / "run"), "max_steps": 1}
    return Recipe(**{**defaults, **settings})


def fails(recipe, *args):
    with pytest.raises(MaSftError) as error:
        run(recipe, args)
    message = str(error.value)
    assert "\n" not in message
    return message


LINE = json.dumps(GOOD)


@pytest.mark.parametrize(
    ("name", "text", "more", "says"),
    [
        ("no.jsonl", None, {}, "the file 'no.jsonl' does not exist"),
        ("empty.json", "", {}, "empty"),
        ("empty.json", "[]", {}, "empty"),
        (
            *("a.jsonl", '{"instruction": "x", "reply": "y"}', {}),
            "a.jsonl, line 1: unknown format: columns ['instruction', 'reply'] ... alpaca (misses output)",
        ),
        ("a.jsonl", f"{LINE}\n{json.dumps({**GOOD, 'output': ''})}", {}, "a.jsonl, line 2: the response is empty"),
        ("a.jsonl", f'{LINE}\n{{"instruction": "x", "output', {}, "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", LINE, {"max_length": 5}, "max_length=5 cuts off every response ... raise max_length"),
    ],
)
def test_data_that_cannot_be_trained(tmp_path, monkeypatch, name, text, more, says):
    """The second start is no other than the first, which left nothing in its way."""
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    for _ in range(2):
        message = fails(recipe(tmp_path, dataset_name=name, **more))
        assert all(part in message for part in says.split(" ... "))


@pytest.mark.parametrize("args", [[], ["--overwrite_output_dir", "true"]], ids=["as it is", "to be overwritten"])
def test_output_folder_with_something_else(tmp_path, args):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "holds something that is not a run" in fails(recipe(tmp_path, dataset_name="x.jsonl"), *args)
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_model_that_is_nowhere(tmp_path):
    message = fails(recipe(tmp_path, dataset_name="x.jsonl", model_name_or_path="Qwen/Qwen3-0.6B"))
    assert "cannot be had from a hub" in message and "MODEL=PATH" in message


def test_data_that_is_nowhere(tmp_path):
    message = fails(recipe(tmp_path, dataset_name="trl-lib/Capybara"))
    assert "cannot be had from a hub" in message and "DATA=PATH" in message


def test_adapter_on_lm_head_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [GOOD] * 4)
    message = fails(recipe(tmp_path, dataset_name=path, use_peft=True, lora_target_modules=["q_proj", "lm_head"]))
    assert "an adapter on the head would never be trained" in message and 'lora_modules_to_save=["lm_head"]' in message


def test_full_disk_is_one_line(capsys):
    def save():
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    assert guard(save) == 2
    assert capsys.readouterr().err.startswith("error: the disk is full")


def test_cli_exit_code_and_line(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("model_name_or_path: demo\ndataset_name: no.jsonl\n")
    assert main(["train", str(path), "--max_stepz", "3"]) == 2
    assert capsys.readouterr().err == "error: unknown setting '--max_stepz'; did you mean 'max_steps'?\n"
    assert main(["train", str(tmp_path / "none.py")]) == 2
    assert main(["merge", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "holds no adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["--help"], 0, "handoff-check"),
        (["settings", "lora_r"], 0, "lora_r = 16"),
        (["schema"], 0, "lora_r"),
        (["train", "mine.yaml", "--max_stepz", "3"], 2, "did you mean 'max_steps'?"),
        (["train", "mine.yaml"], 2, "did you mean 'learning_rate'?"),
        (["train", "--max_steps", "many"], 2, "max_steps: int expected, found 'many'"),
        (["plan"], 2, "no model"),
        (
            ["train", "--model_name_or_path", "demo", "--dataset_name", "no/rows.jsonl"],
            2,
            "does not exist (counted from",
        ),
        (["frob"], 2, "No such command 'frob'"),
    ],
)
def test_what_needs_no_torch_does_not_load_it(tmp_path, args, code, word):
    (tmp_path / "mine.yaml").write_text("lr: 3\n")
    known_settings()  # the table is there
    script = "import sys\nfrom ma_sft.cli import main\ncode = main(sys.argv[1:])\n"
    script += "sys.exit(99 if 'torch' in sys.modules else code)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *args]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert word in done.stdout + done.stderr


def test_train_without_a_recipe(tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", [GOOD, {"instruction": "x"}])
    flags = ["--model_name_or_path", "demo", "--dataset_name", rows, "--output_dir", str(tmp_path / "run")]
    assert main(["train", *flags]) == 2
    assert "line 2" in capsys.readouterr().err
