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
from helpers import ROOT, assistant, refusal, start, user, write_rows
from patience import patience
from transformers import AutoTokenizer

from ma_sft import Recipe
from ma_sft.cli import main
from ma_sft.config import known_settings
from ma_sft.tools.gallery import shipped
from ma_sft.utils import guard

ROWS = [{"instruction": f"Say number {i}", "input": "", "output": f"Number {i}, aye aye!"} for i in range(50)]
MANY = [{"prompt": f"Number {i}?", "completion": f"It is {i}. " * 20} for i in range(900)]
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A fresh folder with fifty rows, and nothing else."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS)
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
    for command in commands:
        assert main([*command[1:], *more.get(command[1], [])]) == 0
    said = capsys.readouterr().out
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
        ("jsonl", [{"messages": [user("?"), assistant("!")], "tools": [TOOL]}] * 9, "tools", {"test_size": None}),
        ("jsonl", MANY, "chat", {"packing": True, "generate_eval": 10}),
        ("csv", "Question,Answer\nWhy?,Because of a number of reasons.\n", "exact", {"dataset_name": "mine.csv"}),
        ("csv", "\ufeffquestion,answer\n今天天气怎么样？,今天天气很好，适合出去玩。\n", "chat", {"datasets": None}),
        ("csv", "question,answer\nWhy; me?,So; there.\n", "chat", {"dataset_name": "mine.csv"}),
    ],
    ids=["alpaca", "broken row", "text", "reasoning", "tools", "many", "csv", "marked csv", "semicolons in cells"],
)
def test_init_looks_at_the_rows_and_its_recipe_passes_the_check(
    here, kind, rows, task, expected, tiny_bpe, tiny_qwen3, capsys
):
    model = str(tiny_qwen3 if task == "tools" else tiny_bpe)
    data = here / f"mine.{kind}"
    data.write_text(rows, encoding="utf-8") if isinstance(rows, str) else write_rows(data, rows)
    assert main(["init", "--data", data.name, "--model", model, "--hardware", "cpu", "--task", task]) == 0
    settings = Recipe.load("mine.py").settings
    assert {key: settings.get(key) for key in expected} == expected
    source = (here / "mine.py").read_text(encoding="utf-8")
    assert all("#" in line for line in source.splitlines() if "max_length=" in line or "learning_rate=" in line)
    assert max(map(len, source.splitlines())) <= 120 or kind == "csv"
    capsys.readouterr()
    assert main(["check", "mine.py", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


INIT = ["init", "--hardware", "cpu", "--task", "exact", "--model", "MODEL", "--data"]
FRENCH = [{"Demande": f"Combien font {i} + 1 ?", "Retour": str(i + 1)} for i in range(12)]
MEANS = {"Demande": "question", "Retour": "answer"}


def test_init_is_told_columns_or_asks_for_them(here, tiny_bpe, monkeypatch, capsys):
    told = [str(tiny_bpe) if word == "MODEL" else word for word in (*INIT, write_rows(here / "french.jsonl", FRENCH))]
    expected = [{"path": str(here / "french.jsonl"), "columns": MEANS}]
    assert main([*told, "-o", "told.py", "--columns", "Demande=question,Retour=answer"]) == 0
    assert Recipe.load("told.py").settings["datasets"] == expected
    answers = iter(["", "Question", "Demande", "Retour"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda text: next(answers))
    assert main([*told, "-o", "asked.py"]) == 0
    assert Recipe.load("asked.py").settings["datasets"] == expected
    said = capsys.readouterr().out
    assert "Demande: Combien font 0 + 1 ?" in said and "one of Demande, Retour" in said


def test_init_takes_a_folder_of_texts_and_says_what_is_not_used_of_preferences(here, tiny_bpe, capsys):
    (here / "texts").mkdir()
    for number in range(4):
        (here / "texts" / f"{number}.txt").write_text(f"Chapter {number}.\n\nOnce upon a time.\n")
    write_rows(
        here / "pairs.jsonl", ({"prompt": f"{i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(12))
    )
    for data, task in (("texts", "text"), ("pairs.jsonl", "exact")):
        words = ["init", "--hardware", "cpu", "--model", str(tiny_bpe), "--task", task, "--data", data]
        assert main(words) == 0
    assert Recipe.load("texts.py").settings["datasets"] == [{"path": "texts/*.txt", "sample_by": "document"}]
    assert "the better answer is trained, `rejected` is not used" in capsys.readouterr().out
    assert "`rejected` is not used" in (here / "pairs.py").read_text()


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
FILES = {
    "columns.jsonl": '{"Frage": "Why?", "Antwort": "So."}\n',
    "two.jsonl": json.dumps(ROWS[0]) + '\n{"question": "Why?", "answer": "So."}\n',
    "silent.jsonl": '{"instruction": "Why?", "output": " "}\n',
    "broken.jsonl": json.dumps(ROWS[0]) + '\n{"instruction": \n',
    "empty.jsonl": "",
    "none.json": "[]",
    "gbk.csv": "question,answer\n你好吗,很好\n".encode("gbk"),
    "semicolon.csv": "question;answer\nWhy?;So.\nHow?\n",  # no table of two columns
    "latin.csv": "question,answer\nGrüße und Äpfel?,Schön für Öl \n".encode("cp1252"),
    "text.csv": "Kunde,Text,Reaktion\nIch,Hallo,Ja\n",
    "sheet.xlsx": b"PK\3\4" + bytes(range(256)),
    "french.jsonl": "\n".join(map(json.dumps, FRENCH)),
    "calls.jsonl": f"{json.dumps({'messages': [user('?'), assistant('', tool_calls=[CALL])], 'tools': [TOOL]})}\n" * 12,
}
WRONG = [  # settings, flags, and what the line says
    ({"dataset_name": "row.jsonl"}, [], "'row.jsonl' does not exist (counted from /"),
    ({"dataset_name": "rows"}, [], "pass a file or folder (make: DATA=PATH)"),
    ({"dataset_name": "trl-lib/Capybara"}, [], "cannot be had from a hub ... DATA=PATH"),
    ({"model_name_or_path": "my/modle"}, [], "cannot be had from a hub ... pass a folder (make: MODEL=PATH)"),
    ({"model_name_or_path": "./modle"}, [], "the model './modle' does not exist"),
    ({"model_name_or_path": "."}, [], "holds no config.json; give the folder of a model"),
    ({"dataset_name": "columns.jsonl"}, [], "map columns to these names"),
    (
        {"dataset_name": "two.jsonl"},
        [],
        "line 2: field 'instruction' is missing or null; format 'alpaca' needs it",
    ),
    ({"dataset_name": "empty.jsonl"}, [], "the data set is empty"),
    ({"dataset_name": "none.json"}, [], "empty"),
    ({"dataset_name": "broken.jsonl"}, [], "broken.jsonl, line 2: not valid JSON"),
    ({"dataset_name": "silent.jsonl"}, [], "silent.jsonl, line 1: the response is empty"),
    ({"dataset_format": "sharegtp"}, [], "sharegtp"),
    ({"template": "chatlm"}, [], "unknown template 'chatlm'; known: "),
    ({"template": "my.jinja"}, [], "template 'my.jinja' does not exist (counted from /"),
    ({"model_name_or_path": "base"}, [], "choose one with template="),
    ({"max_length": 8}, [], "max_length=8 cuts off every response ... raise max_length"),
    ({}, ["--config", "none.yaml"], "'none.yaml' does not exist (counted from /"),
    ({}, ["--launcher", "zero9"], "--launcher: a file or one of cp, cpu, ddp, "),
    ({}, ["--gpus", "2"], "say which, e.g. --launcher ddp"),
]


@pytest.fixture(scope="module")
def without_template(tiny_bpe, tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bpe)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder := tmp_path_factory.mktemp("models") / "base")
    return folder


@pytest.fixture
def wrong(here, without_template):
    """A folder with files that no run can take, and a model without a chat template."""
    for name, content in FILES.items():
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (here / "base").symlink_to(without_template)
    (here / "empty").mkdir()


@pytest.mark.parametrize(("changed", "flags", "says"), WRONG, ids=str)
def test_wrong_turn_is_one_line_that_says_what_to_do(changed, flags, says, wrong, here, tiny_bpe, capsys):
    """The second start is no other than the first, which left nothing in its way."""
    given = {**BASE, "model_name_or_path": str(tiny_bpe), "max_steps": 1, **changed}
    (here / "mine.yaml").write_text(json.dumps(given), encoding="utf-8")
    for _ in range(2):
        line = refusal(capsys, "train", "mine.yaml", *flags)
        assert all(part in line for part in says.split(" ... ")), line
    assert not list(here.glob("runs/*/adapter")) and not list(here.glob("runs/*/model"))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["train", "mine.py"], "the recipe 'mine.py' does not exist (counted from /"),
        (["check", "rows.jsonl"], "is no recipe; give a .py or .yaml file"),
        (["chat", "runs/none"], "the folder 'runs/none' does not exist (counted from /"),
        (["chat", ".", "--prompt", "Hi"], "holds no model"),
        (["report", "runs/none"], "give one that `ma-sft train` made"),
        (["merge", "./none", "-o", "out"], "the folder 'none' does not exist (counted from /"),
        (["merge", "rows.jsonl", "-o", "out"], "'rows.jsonl' is a file, not a folder"),
        (["merge", ".", "-o", "out"], "holds no adapter"),
        (["check", "/dev/null"], "'/dev/null' is neither a file nor a folder"),
        (["settings", "lerning_rate"], "no setting speaks of 'lerning_rate'; did you mean 'learning_rate'?"),
        (["plan", "--gpus", "-1"], "--gpus"),
        (["settings", "xyzzy"], "'xyzzy'; `ma-sft settings` lists them all"),
        (["init", "--data", "rows.jsonl"], "pass --model demo"),
        (["init"], "pass --data"),
        ([*INIT, "nothing.jsonl"], "'nothing.jsonl' does not exist (counted from /"),
        ([*INIT, "rows.jsonl", "--task", "talk"], "one of chat, exact"),
        ([*INIT, "french.jsonl"], "--columns THEIRS=question,THEIRS=answer"),  # with nobody to ask
        ([*INIT, "french.jsonl", "--columns", "Q=question"], "there is no column 'Q', there are Demande, Retour"),
        ([*INIT, "empty", "--task", "text"], "empty holds no files that end in .jsonl"),
        ([*INIT, "calls.jsonl", "--task", "tools"], "use a template that knows tools"),
        ([*INIT, "nothing.jsonl", "-o", "mine.txt"], "a recipe is a .py or .yaml file, found mine.txt"),
        *(
            ([*INIT, "nothing.jsonl", "--hardware", hardware], "cpu, or GPUs as 1x24GB expected")
            for hardware in ("a GPU", "0x24GB", "24GB", "1xlarge", "2x")
        ),
        (["recipes", "copy", "alpacca"], "there are alpaca, "),
        (
            [*INIT, "gbk.csv"],
            "line 2: not UTF-8 text: save it as UTF-8 ... encoding: datasets: [{path: FILE, encoding: ",
        ),
        ([*INIT, "semicolon.csv"], 'datasets: [{path: FILE, delimiter: ";"}]'),
        ([*INIT, "latin.csv"], "save it as UTF-8, or name its encoding: "),
        ([*INIT, "text.csv"], "the rows are plain text; pass --task text"),
        ([*INIT, "sheet.xlsx"], "'sheet.xlsx' exists, but it is none of .jsonl"),
    ],
    ids=str,
)
def test_wrong_command_is_one_line_that_says_what_to_do(command, says, wrong, tiny_bpe, capsys):
    line = refusal(capsys, *(tiny_bpe if word == "MODEL" else word for word in command))
    assert all(part in line for part in says.split(" ... "))


def test_what_needs_no_torch_does_not_load_it(here, capsys):
    """All in one process, after the table of settings is there."""
    (here / "mine.yaml").write_text("lr: 3\n")
    flags = ["--model_name_or_path", "demo", "--dataset_name", "no/rows.jsonl"]
    commands = [
        (["--help"], 0, "handoff-check"),
        (["settings", "lora_r"], 0, "lora_r = 16"),
        (["schema"], 0, "lora_r"),
        (["train", "mine.yaml", "--max_stepz", "3"], 2, "unknown setting '--max_stepz'; did you mean 'max_steps'?"),
        (["train", "mine.yaml"], 2, "did you mean 'learning_rate'?"),
        (["train", "--max_steps", "many"], 2, "max_steps: int expected, found 'many'"),
        (["plan"], 2, "no model"),
        (["train", *flags], 2, "does not exist (counted from"),
        (["train", *flags, "--lora_r", "4"], 2, "lora_r trains an adapter and use_peft is false"),
        (["frob"], 2, "No such command 'frob'"),
    ]
    known_settings()
    script = """
import contextlib, io, json, sys
from ma_sft.cli import main
from ma_sft.config import known_settings
for words in json.load(sys.stdin):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        code = main(words)
    print(json.dumps([code or 0, shown.getvalue(), "torch" in sys.modules]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    given = json.dumps([words for words, *_ in commands])
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=here, env=environment, input=given, capture_output=True, text=True)
    for (words, code, says), line in zip(commands, done.stdout.splitlines(), strict=True):
        found, shown, torch_is_there = json.loads(line)
        assert found == code and says in shown and not torch_is_there, (words, line)


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("launcher", ["single_gpu", "ddp", "zero2"])
def test_a_launcher_that_does_not_fit_ends_in_one_line_and_our_exit_code(here, launcher):
    (here / "mine.yaml").write_text(json.dumps({**BASE, "dataset_name": str(here / "rows.jsonl")}))
    done = start("ma-sft", "train", here / "mine.yaml", "--launcher", launcher, "--output_dir", here / "run")
    first, loading, line = done.stderr.splitlines()
    assert done.returncode == 2 and first.startswith("starting by ") and loading.startswith("loading PyTorch")
    assert line.startswith("error: the launcher asks for a GPU and PyTorch finds none; take cpu.yaml (--launcher cpu")


def test_recipes_are_listed_and_copied(here, capsys):
    assert main(["recipes", "--json"]) == 0
    listed = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert {"demo", "tools", "csv_qa", "demo_data", "fsdp2", "cpu"} <= set(listed)
    assert listed["tools"]["model"] == "Qwen/Qwen3-1.7B" and listed["fsdp2"]["kind"] == "launcher"
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(listed) + 2 and "copy one to edit" in lines[-1]
    for words in ("tools -o tools.yaml", "csv_qa", "fsdp2 -o mine.yaml"):
        assert main(["recipes", "copy", *words.split()]) == 0
    text = (here / "tools.yaml").read_text(encoding="utf-8")
    schema = json.loads(Path(text.splitlines()[0].removeprefix("# yaml-language-server: $schema=file://")).read_text())
    settings = Recipe.load("tools.yaml").settings
    assert settings == Recipe.load(listed["tools"]["path"]).settings
    assert settings.keys() <= schema["properties"].keys() and "# Tool calls: " in text
    assert (here / "csv_qa.py").read_text() == (ROOT / "recipes" / "csv_qa.py").read_text()
    assert "csv_qa.py exists already; pass another file with -o" in refusal(capsys, "recipes", "copy", "csv_qa")
    assert (here / "mine.yaml").exists() and all(item.about for item in shipped().values())


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


@pytest.mark.parametrize(("no_color", "colours"), [("", True), ("1", False)])
def test_no_color_is_respected(no_color, colours, here, tiny_bpe, monkeypatch, capsys):
    (here / "mine.yaml").write_text(json.dumps({**BASE, "model_name_or_path": str(tiny_bpe)}))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", no_color)
    assert main(["preview", "mine.yaml", "-n", "1"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[" in shown  # bold and dim stay: they tell what is trained
    assert bool(re.search(r"\x1b\[(?:\d+;)*3[0-7]m", shown)) == colours


def test_unforeseen_error_names_versions():
    with pytest.raises(ZeroDivisionError) as error:
        guard(lambda: 1 / 0)
    said = r"please open an issue with .* python 3\.\d+\.\d+, ma-sft \S+, torch "
    assert re.search(said, "\n".join(error.value.__notes__))


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
    line = f"{sys.executable} -m ma_sft.cli settings | head -n 1"
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


@pytest.fixture
def installed(tmp_path):
    """`ma-sft` of the wheel in an empty environment; what it depends on is there if PYTHONPATH says so."""
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
    # A folder on the path brings what is in it, and not the checkout that a .pth file in it names.
    bare = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "HF_HUB_OFFLINE": "1"}

    def ma_sft(*words):
        command = [tmp_path / "venv" / "bin" / "ma-sft", *words]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd=tmp_path, env=bare, **how)
        assert done.returncode == 0, done.stdout
        return done.stdout

    return ma_sft


def test_wheel_installs_in_an_empty_venv_and_lists_its_recipes(installed, tmp_path):
    listed = installed("recipes")
    assert "csv_qa" in listed and "zero3_offload" in listed
    installed("recipes", "copy", "demo")
    assert (tmp_path / "demo.py").read_text() == (ROOT / "recipes" / "demo.py").read_text()
    rows = Recipe.load(tmp_path / "demo.py").settings
    for path in (*rows["datasets"], rows["eval_dataset"]):
        assert (tmp_path / path).read_text() == (ROOT / path).read_text()
    assert "init" in installed("--help")


@pytest.mark.slow
def test_wheel_alone_trains_the_demo(installed, tmp_path):
    installed("recipes", "copy", "demo")
    short = "--max_steps 2 --per_device_train_batch_size 1 --eval_strategy no --generate_eval 2".split()
    shown = installed("train", "demo.py", "--launcher", "cpu", *short)
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2 and str(folder.name) in shown
    assert not re.search(r"Warning|WARN|not passed|[Ff]ailed|RANK|DeepSpeed|Generating|dequant|de-quant|it/s\]", shown)
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size > 0
