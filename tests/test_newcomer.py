"""A newcomer with fifty rows and the README: five commands to a chat, and every wrong turn ends in one line."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
import torch
from helpers import ROOT, load_tokenizer, start
from patience import patience

from ma_sft import Recipe
from ma_sft.cli import main
from ma_sft.tools.gallery import shipped

ROWS = [{"instruction": f"Say number {i}", "input": "", "output": f"Number {i}, aye aye!"} for i in range(50)]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A fresh folder with fifty rows, and nothing else."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", ROWS)
    return tmp_path


@pytest.mark.slow
def test_five_commands_to_a_chat(here, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## From your rows to a chat.*?```bash\n(.*?)```", readme, re.DOTALL)[1]
    (_, *commands) = [line.split("#")[0].split() for line in block.splitlines()]
    assert [command[:2] for command in commands] == [["ma-sft", name] for name in ("init", "check", "train", "chat")]
    more = {
        "init": ["--model", "demo", "--hardware", "cpu", "--task", "exact"],
        "train": ["--max_steps", "12", "--generate_eval", "1", "--max_new_tokens", "4", "--learning_rate", "0.002"],
        "chat": ["--prompt", "Say number 7", "--max_new_tokens", "12"],
    }
    took = {}
    for command in commands:
        begin = time.perf_counter()
        assert main([*command[1:], *more.get(command[1], [])]) == 0
        took[command[1]] = round(time.perf_counter() - begin, 1)
    said, shown = capsys.readouterr()
    print("seconds on this machine:", took)
    assert max(took["init"], took["check"]) < 20 * patience() and max(took["train"], took["chat"]) < 90 * patience()
    assert "Loading weights" not in shown  # a bar that says nothing to a user
    assert "every label is right" in said and "ma-sft chat runs/rows" in said
    assert said.splitlines()[-1].startswith("Number 7, aye")  # the answer alone, and in the tone of the rows
    assert (here / "runs/rows/report.html").exists() and (here / "runs/rows/merged/model.safetensors").exists()


@pytest.mark.parametrize(
    ("kind", "rows", "task", "expected"),
    [
        ("jsonl", ROWS, "exact", {"on_error": None, "packing": False, "test_size": 5}),
        ("jsonl", [*ROWS, {"instruction": "?", "output": ""}], "exact", {"on_error": "skip"}),
        ("jsonl", [{"text": "Once upon a time there was a table. " * 20}] * 60, "text", {"generate_eval": None}),
        ("jsonl", [{"prompt": f"{i}?", "completion": "<think>Hm.</think>Yes."} for i in range(20)], "reasoning", {}),
        (
            "jsonl",
            [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "tools": [TOOL]}]
            * 9,
            "tools",
            {"test_size": None},
        ),
        (
            "jsonl",
            [{"prompt": f"Number {i}?", "completion": f"It is {i}. " * 20} for i in range(900)],
            "chat",
            {"packing": True, "generate_eval": 10},
        ),
        ("csv", "Question,Answer\nWhy?,Because of a number of reasons.\n" * 1, "exact", {"dataset_name": "mine.csv"}),
    ],
    ids=["alpaca", "broken row", "text", "reasoning", "tools", "many", "csv"],
)
def test_init_looks_at_the_rows_and_its_recipe_passes_the_check(
    here, kind, rows, task, expected, tiny_bpe, tiny_qwen3, capsys
):
    model = str(tiny_qwen3 if task == "tools" else tiny_bpe)
    data = here / f"mine.{kind}"
    data.write_text(rows, encoding="utf-8") if isinstance(rows, str) else write(data, rows)
    assert main(["init", "--data", data.name, "--model", model, "--hardware", "cpu", "--task", task]) == 0
    settings = Recipe.load("mine.py").settings
    assert {key: settings.get(key) for key in expected} == expected
    source = (here / "mine.py").read_text(encoding="utf-8")
    assert all("#" in line for line in source.splitlines() if "max_length=" in line or "learning_rate=" in line)
    assert max(map(len, source.splitlines())) <= 120 or kind == "csv"
    capsys.readouterr()
    assert main(["check", "mine.py", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


CHINESE = (
    "question,answer\n今天天气怎么样？,今天天气很好，适合出去玩。\n"
    "请写一首关于春天的诗,春天来了，花儿开了，小鸟在唱歌。\n"
)
WRITTEN = {
    "bom.csv": (CHINESE.encode("utf-8-sig"), {}),
    "comma.csv": (b"question,answer\nWhy; me?,So; there.\n", {}),
    "excel.csv": ("Question;Answer\nWhy, me?;So, there.\n".encode("utf-8-sig"), {}),
    "Case.csv": (b"Question,Answer\nWhy?,So.\n", {}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_init_reads_marked_text_and_heads_in_any_case(name, here, tiny_bpe, capsys):
    content, expected = WRITTEN[name]
    (here / name).write_bytes(content)
    flags = ["--model", str(tiny_bpe), "--hardware", "cpu", "--task", "chat", "-o", "mine.py"]
    assert main(["init", "--data", name, *flags]) == 0
    settings = Recipe.load("mine.py").settings
    assert settings.get("datasets", [{"path": name}]) == [{"path": name, **expected}]
    capsys.readouterr()
    assert main(["preview", "mine.py"]) == 0
    assert ("So" if b"So" in content else "今天天") in capsys.readouterr().out


def test_init_guesses_the_task_and_asks_in_words(here, tiny_bpe, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "")
    assert main(["init", "--data", "rows.jsonl", "--model", str(tiny_bpe), "-o", "mine.yaml"]) == 0
    assert Recipe.load("mine.yaml").settings["dataset_name"] == "rows.jsonl"
    assert (here / "mine.yaml").read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=file:///")
    assert [text.split(":")[0].split()[-1] for text in asked if "Hardware" in text] == ["Hardware"]
    assert any(text.strip().endswith("[exact]:") for text in asked)  # short answers
    assert "50 rows in the format alpaca" in capsys.readouterr().out


def test_init_chooses_what_fits_the_gpus(here, tiny_bpe, capsys):
    flags = ["init", "--data", "rows.jsonl", "--model", str(tiny_bpe), "--task", "chat"]
    assert main([*flags, "--hardware", "4x80GB", "-o", "big.py"]) == 0
    assert "ma-sft train big.py --launcher ddp --gpus 4" in capsys.readouterr().out
    assert main([*flags, "--hardware", "1x0.1GB", "-o", "small.py"]) == 2
    assert "nothing fits 1 GPU(s) of 0.1gb, not even 4-bit QLoRA" in capsys.readouterr().err


BASE = {"model_name_or_path": "demo", "dataset_name": "rows.jsonl"}
WRONG = {
    "wrong path of the data": (
        {"dataset_name": "row.jsonl"},
        [],
        "'row.jsonl' does not exist (counted from /",
    ),
    "wrong path without an ending": ({"dataset_name": "rows"}, [], "pass a file or folder (make: DATA=PATH)"),
    "wrong model": ({"model_name_or_path": "my/modle"}, [], "pass a folder (make: MODEL=PATH)"),
    "no model in the folder": ({"model_name_or_path": "."}, [], "holds no config.json; give the folder of a model"),
    "wrong column": ({"dataset_name": "columns.jsonl"}, [], "map columns to these names"),
    "two formats": ({"dataset_name": "two.jsonl"}, [], "rows.jsonl, line 2: field 'instruction' is missing or null; "),
    "a row of another format": ({"dataset_name": "two.jsonl"}, [], "needs it; this row looks like 'question-answer'"),
    "wrong folder of the model": ({"model_name_or_path": "./modle"}, [], "the model './modle' does not exist"),
    "wrong format": ({"dataset_format": "sharegtp"}, [], "sharegtp"),
    "wrong template": ({"template": "chatlm"}, [], "unknown template 'chatlm'; known: "),
    "missing template file": (
        {"template": "my.jinja"},
        [],
        "template 'my.jinja' does not exist (counted from /",
    ),
    "no chat template": ({"model_name_or_path": "base"}, [], "choose one with template="),
    "tiny max_length": ({"max_length": 8}, [], "raise max_length"),
    "misspelt setting": ({}, ["--learning_rat", "1"], "did you mean 'learning_rate'?"),
    "misspelt key": ({"max_step": 3}, [], "did you mean 'max_steps'?"),
    "wrong value": ({}, ["--max_steps", "many"], "max_steps"),
    "wrong choice": ({"lora_preset": "all"}, [], "lora_preset"),
    "wrong layer": ({"use_peft": True, "lora_target_modules": ["query"]}, [], "q_proj"),
    "empty file": ({"dataset_name": "empty.jsonl"}, [], "the file is empty"),
    "broken row": ({"dataset_name": "broken.jsonl"}, [], "broken.jsonl, line 2: not valid JSON"),
    "empty answer": ({"dataset_name": "silent.jsonl"}, [], "silent.jsonl, line 1: the response is empty"),
    "missing config": ({}, ["--config", "none.yaml"], "'none.yaml' does not exist (counted from /"),
}


@pytest.mark.parametrize("turn", WRONG)
def test_wrong_turn_is_one_line_that_says_what_to_do(turn, here, capsys):
    changed, flags, says = WRONG[turn]
    write(here / "columns.jsonl", [{"Frage": "Why?", "Antwort": "So."}])
    write(here / "two.jsonl", [ROWS[0], {"question": "Why?", "answer": "So."}])
    write(here / "silent.jsonl", [{"instruction": "Why?", "output": " "}])
    (here / "empty.jsonl").touch()
    (here / "broken.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"instruction": \n')
    tokenizer = load_tokenizer("smollm2")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(here / "base")
    (here / "mine.yaml").write_text(json.dumps({**BASE, "max_steps": 1, **changed}), encoding="utf-8")
    assert main(["train", "mine.yaml", *flags]) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert says.replace("rows.jsonl", "two.jsonl") in line and "Traceback" not in error
    assert not list(here.glob("runs/*/adapter")) and not list(here.glob("runs/*/model"))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["train", "mine.py"], "the recipe 'mine.py' does not exist (counted from /"),
        (["check", "rows.jsonl"], "is no recipe; give a .py or .yaml file"),
        (["chat", "runs/none"], "the folder 'runs/none' does not exist (counted from /"),
        (["report", "runs/none"], "give one that `ma-sft train` made"),
        (["merge", "./none", "-o", "out"], "the folder 'none' does not exist (counted from /"),
        (["merge", "rows.jsonl", "-o", "out"], "'rows.jsonl' is a file, not a folder"),
        (["check", "/dev/null"], "'/dev/null' is neither a file nor a folder"),
        (["settings", "lerning_rate"], "no setting speaks of 'lerning_rate'; did you mean 'learning_rate'?"),
        (["settings", "xyzzy"], "'xyzzy'; `ma-sft settings` lists them all"),
        (["init", "--data", "rows.jsonl"], "pass --model demo"),
        (["init"], "pass --data"),
        (
            ["init", "--data", "nothing.jsonl"],
            "'nothing.jsonl' does not exist (counted from /",
        ),
        (["init", "--data", "rows.jsonl", "--model", "demo", "--hardware", "a GPU"], "cpu, or GPUs as 1x24GB"),
        (
            ["init", "--data", "rows.jsonl", "--model", "demo", "--hardware", "cpu", "--task", "talk"],
            "one of chat, exact",
        ),
        (["recipes", "copy", "alpacca"], "there are alpaca, "),
        (
            ["init", "--data", "gbk.csv", "--model", "demo"],
            "line 2: not UTF-8 text: save it as UTF-8, or name its encoding: datasets: [{path: FILE, encoding: ",
        ),
        (
            ["init", "--data", "text.csv", "--model", "demo", "--task", "chat"],
            "the rows are plain text; pass --task text",
        ),
        (["init", "--data", "latin.csv", "--model", "demo"], "save it as UTF-8, or name its encoding: "),
        (["init", "--data", "sheet.xlsx", "--model", "demo"], "'sheet.xlsx' exists, but it is none of .jsonl"),
    ],
    ids=str,
)
def test_wrong_command_is_one_line_that_says_what_to_do(command, says, here, capsys):
    (here / "gbk.csv").write_text("question,answer\n你好吗,很好\n", encoding="gbk")
    (here / "text.csv").write_text("Kunde;Text;Reaktion\nIch;Hallo;Ja\n")
    (here / "latin.csv").write_text("question,answer\nGrüße und Äpfel?,Schön für Öl \n", encoding="cp1252")
    (here / "sheet.xlsx").write_bytes(b"PK\3\4" + bytes(range(256)))
    assert main(command) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert says in line and "Traceback" not in error


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("launcher", ["single_gpu", "ddp", "zero2"])
def test_a_launcher_that_does_not_fit_ends_in_one_line_and_our_exit_code(here, launcher):
    (here / "mine.yaml").write_text(json.dumps({**BASE, "dataset_name": str(here / "rows.jsonl")}))
    done = start("ma-sft", "train", here / "mine.yaml", "--launcher", launcher, "--output_dir", here / "run")
    first, loading, line = done.stderr.splitlines()
    assert done.returncode == 2 and first.startswith("starting by ") and loading.startswith("loading PyTorch")
    assert line.startswith("error: the launcher asks for a GPU and PyTorch finds none; take cpu.yaml (--launcher cpu")


def test_a_launcher_is_a_name_or_a_file(here, capsys):
    (here / "mine.yaml").write_text(json.dumps(BASE))
    assert main(["train", "mine.yaml", "--launcher", "zero9"]) == 2
    assert "--launcher: a file or one of cp, cpu, ddp, " in capsys.readouterr().err
    assert main(["train", "mine.yaml", "--gpus", "2"]) == 2
    assert "say which, e.g. --launcher ddp" in capsys.readouterr().err


def test_recipes_are_listed_and_copied(here, capsys):
    assert main(["recipes", "--json"]) == 0
    listed = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert {"demo", "tools", "csv_qa", "demo_data", "fsdp2", "cpu"} <= set(listed)
    assert listed["tools"]["model"] == "Qwen/Qwen3-1.7B" and listed["fsdp2"]["kind"] == "launcher"
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(listed) + 2 and "copy one to edit" in lines[-1]
    assert main(["recipes", "copy", "tools", "-o", "tools.yaml"]) == 0
    text = (here / "tools.yaml").read_text(encoding="utf-8")
    schema = json.loads(Path(text.splitlines()[0].removeprefix("# yaml-language-server: $schema=file://")).read_text())
    settings = Recipe.load("tools.yaml").settings
    assert settings == Recipe.load(listed["tools"]["path"]).settings
    assert settings.keys() <= schema["properties"].keys() and "# Tool calls: " in text
    assert main(["recipes", "copy", "csv_qa"]) == 0
    assert (here / "csv_qa.py").read_text() == (ROOT / "recipes" / "csv_qa.py").read_text()
    assert main(["recipes", "copy", "csv_qa"]) == 2
    assert "csv_qa.py exists already; pass another file with -o" in capsys.readouterr().err
    assert main(["recipes", "copy", "fsdp2", "-o", "mine.yaml"]) == 0
    assert (here / "mine.yaml").exists()
    assert all(item.about for item in shipped().values())


def test_settings_are_found_by_word(capsys):
    assert main(["settings", "max_length", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "max_length" in found and found["max_length"]["help"] and "lora_r" not in found
    assert main(["settings", "adapter_name"]) == 0
    assert capsys.readouterr().out.startswith(
        "[adapter]\nadapter_name_or_path = None  (ours)\n    Go on with this adapter"
    )


def test_completion_knows_commands_and_settings(capsys):
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert "_MA_SFT_COMPLETE" in capsys.readouterr().out
    for words, at, answer in (("ma-sft hand", 1, "handoff-check"), ("ma-sft train x.py --max_st", 3, "--max_steps")):
        environment = {**os.environ, "COMP_WORDS": words, "COMP_CWORD": str(at), "_MA_SFT_COMPLETE": "complete_bash"}
        command = [sys.executable, "-X", "importtime", "-m", "ma_sft.cli"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == answer, done.stderr
        assert " torch\n" not in done.stderr


@pytest.mark.parametrize(("no_color", "colours"), [pytest.param("", True, marks=pytest.mark.slow), ("1", False)])
def test_no_color_is_respected(no_color, colours, here):
    (here / "mine.yaml").write_text(json.dumps(BASE))
    environment = {**os.environ, "FORCE_COLOR": "1", "NO_COLOR": no_color}
    command = [sys.executable, "-m", "ma_sft.cli", "preview", "mine.yaml", "-n", "1"]
    shown = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=True).stdout
    assert "\x1b[" in shown  # bold and dim stay: they tell what is trained
    assert bool(re.search(r"\x1b\[(?:\d+;)*3[0-7]m", shown)) == colours


def test_unforeseen_error_names_versions():
    code = "from ma_sft.utils import guard\nguard(lambda: 1 / 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    assert re.search(r"please open an issue with .* python 3\.\d+\.\d+, ma-sft \S+, torch ", done.stderr)


@pytest.mark.parametrize("command", ["train mine.yaml", "check mine.yaml", "chat ."])
def test_the_first_word_comes_before_what_takes_seconds(command, here):
    (here / "mine.yaml").write_text(json.dumps(BASE))
    begin = time.perf_counter()
    words = [sys.executable, "-m", "ma_sft.cli", *command.split()]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline().startswith("loading PyTorch")
        took = time.perf_counter() - begin
        process.kill()
    assert took < 2 * patience()


@pytest.mark.slow
def test_pipe_that_closes_early_is_no_error(here):
    done = subprocess.run(
        f"{sys.executable} -m ma_sft.cli settings | head -n 1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("\n") == 1 and done.stderr == ""


@pytest.fixture
def installed(tmp_path):
    """`ma-sft` of the wheel in an empty environment; with `more`, what it depends on is there too."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("ma_sft", "recipes", "accelerate_configs", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("ma_sft-*.whl")
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def ma_sft(*words, **more):
        command = [tmp_path / "venv" / "bin" / "ma-sft", *words]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd=tmp_path, env={**bare, **more}, **how)
        assert done.returncode == 0, done.stdout
        return done.stdout

    return ma_sft


def test_wheel_installs_in_an_empty_venv_and_lists_its_recipes(installed, tmp_path):
    typer = {"PYTHONPATH": sysconfig.get_paths()["purelib"]}
    listed = installed("recipes", **typer)
    assert "csv_qa" in listed and "zero3_offload" in listed
    installed("recipes", "copy", "reasoning", **typer)
    assert (tmp_path / "reasoning.py").read_text() == (ROOT / "recipes" / "reasoning.py").read_text()
    installed("recipes", "copy", "demo", **typer)
    rows = Recipe.load(tmp_path / "demo.py").settings
    for path in (*rows["datasets"], rows["eval_dataset"]):
        assert (tmp_path / path).read_text() == (ROOT / path).read_text()
    assert "init" in installed("--help", **typer)


@pytest.mark.slow
def test_wheel_alone_trains_the_demo(installed, tmp_path):
    # A folder on the path brings what is in it, and not the checkout that a .pth file in it names.
    libraries = {"PYTHONPATH": sysconfig.get_path("purelib"), "HF_HUB_OFFLINE": "1"}
    installed("recipes", "copy", "demo", **libraries)
    short = {"max_steps": 2, "per_device_train_batch_size": 1, "eval_strategy": "no", "generate_eval": 2}
    shown = installed(
        "train", "demo.py", "--launcher", "cpu", *(w for k, v in short.items() for w in (f"--{k}", str(v))), **libraries
    )
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2 and str(folder.name) in shown
    assert not re.search(r"Warning|WARN|not passed|[Ff]ailed|RANK|DeepSpeed|Generating|dequant|de-quant|it/s\]", shown)
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size > 0
