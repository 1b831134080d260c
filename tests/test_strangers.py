"""A stranger's run folder or recipe, broken at random: each command ends in a result or one line, and changes nothing
outside the folder."""

import json
import os
import random
import shutil

import pytest
from breaking import JUNK, mutate, spoil

from ma_sft import Recipe, run
from ma_sft.cli import main


@pytest.fixture(scope="module")
def finished(tiny_bpe, tmp_path_factory):
    """A run with an adapter, its merged model, a report, and nothing else."""
    folder = tmp_path_factory.mktemp("stranger")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}) + "\n" for i in range(20)))
    recipe = Recipe(
        name="stranger",
        model_name_or_path=str(tiny_bpe),
        dataset_name=str(rows),
        test_size=4,
        generate_eval=2,
        max_new_tokens=2,
        max_length=64,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        use_peft=True,
        report_to="none",
        output_dir=str(folder / "run"),
    )
    run(recipe)
    return folder / "run"


@pytest.fixture
def stranger(finished, tmp_path, monkeypatch):
    """A copy that a test may break, beside files that no command may touch."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "mine")
    return shutil.copytree(finished, tmp_path / "run")


def commands(folder):
    """What a user does with a folder that somebody sent."""
    one = ["--prompt", "?", "--max_new_tokens", "1"]
    return [
        ["report", str(folder)],
        ["report", "--json", str(folder)],
        ["handoff-check", str(folder)],
        ["handoff-check", str(folder / "merged")],
        ["chat", str(folder), *one],
        ["chat", str(folder / "adapter"), *one],
        ["merge", str(folder), "-o", str(folder / "again")],
        ["export", str(folder), "-o", str(folder / "again")],
        ["check", str(folder / "recipe.json"), "--json"],
    ]


def is_one_line(command, capsys):
    """The command ends in a result, or in exit code 2 and one line."""
    capsys.readouterr()
    code = main(command)
    error = capsys.readouterr().err
    assert code in (0, 1, 2), command
    if code == 2:
        assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1, (command, error)
    return code


FILES = ["recipe.json", "run.json", "summary.json", "answers.json", "log.jsonl"]
FILES += ["adapter/adapter_config.json", "adapter/sft_manifest.json", "merged/sft_manifest.json", "merged/config.json"]
FILES += ["merged/generation_config.json", "merged/tokenizer_config.json"]


@pytest.mark.parametrize("name", FILES)
def test_run_folder(name, stranger, capsys):
    rng = random.Random(name)
    path = stranger / name
    good = path.read_text(encoding="utf-8")
    related = [c for c in commands(stranger) if concerns(c, name)]
    for turn in range(int(os.environ.get("MA_SFT_FUZZ") or 12)):
        path.write_bytes(spoil(good, rng) if turn % 3 == 0 else changed(good, path.suffix, rng))
        is_one_line(related[turn % len(related)], capsys)
        shutil.rmtree(stranger / "again", ignore_errors=True)
    path.write_text(good, encoding="utf-8")
    assert (stranger.parent / "mine" / "precious.txt").read_text() == "mine"
    assert sorted(path.name for path in (stranger.parent / "mine").iterdir()) == ["precious.txt"]


def concerns(command, name):
    """Whether the command reads that file."""
    if name.startswith(("adapter", "merged")):
        return command[0] in ("chat", "merge", "export", "handoff-check")
    return command[0] in ("report", "check") if name == "recipe.json" else command[0] == "report"


def changed(text, suffix, rng):
    lines = text.splitlines() if suffix == ".jsonl" else [text]
    at = rng.randrange(len(lines))
    value = json.loads(lines[at])
    lines[at] = json.dumps(rng.choice(JUNK) if rng.random() < 0.1 else mutate({"": value}, rng).get("", value))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


RECIPES = {
    "syntax.py": ("from ma_sft import Recipe\nrecipe = Recipe(", "syntax.py, line 2"),
    "import.py": ("import no_such_module\n", "no_such_module"),
    "raises.py": ("from ma_sft import Recipe\n\n1 / 0\n", "raises.py, line 3: ZeroDivisionError"),
    "exits.py": ("raise SystemExit(3)\n", "exits.py"),
    "bytes.py": (b"\xff\xfe\x00", "bytes.py"),
    "deep.yaml": ("[" * 20_000, "deep.yaml"),
    "deep.json": ('{"a":' * 20_000, "deep.json"),
    "bomb.yaml": (
        "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]\n" for n in range(9))
        + "dataset_name: *a8\n",
        "bomb.yaml",
    ),
    "twice.yaml": ("max_steps: 1\nmodel_name_or_path: demo\nmax_steps: 2\n", "max_steps"),
    "bytes.yaml": (b"\xff\xfe\x00\x01", "bytes.yaml"),
    "list.json": ("[1, 2]", "list.json"),
    "number.yaml": ("1: 2\nmodel_name_or_path: demo\ndataset_name: rows.jsonl\n", "1 is no name of a setting"),
    "on.yaml": ("on: 2\nmodel_name_or_path: demo\ndataset_name: rows.jsonl\n", "True is no name of a setting"),
    "tag.yaml": ("!!python/object/apply:os.system ['touch mine']\n", "tag.yaml"),
    "name.yaml": ("name: ../../x\nmodel_name_or_path: demo\ndataset_name: rows.jsonl\n", "../../x"),
    "slash.yaml": ("name: /\nmodel_name_or_path: demo\ndataset_name: rows.jsonl\n", "name"),
    "steps.yaml": ("max_steps: -5\nmodel_name_or_path: demo\ndataset_name: rows.jsonl\n", "max_steps"),
    "rate.yaml": ("learning_rate: -1.0\nmodel_name_or_path: demo\ndataset_name: rows.jsonl\n", "learning_rate"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, tmp_path, monkeypatch, capsys):
    text, says = RECIPES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "?", "completion": "!"}\n' * 4)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["train", name]) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert says in line and "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {name, "rows.jsonl"}


def test_export_of_a_broken_adapter_is_one_line(stranger, capsys):
    (stranger / "adapter" / "adapter_config.json").write_text("[]")
    shutil.rmtree(stranger / "merged")
    assert main(["export", str(stranger), "-o", "again"]) == 2
    assert "is not as ma_sft writes it" in capsys.readouterr().err


def test_negative_temperature_is_one_line(stranger, capsys):
    assert main(["chat", str(stranger), "--prompt", "?", "--temperature", "-1"]) == 2
    assert "temperature" in capsys.readouterr().err


def test_page_in_a_folder_that_is_not_there_is_one_line(stranger, capsys):
    recipe = str(stranger / "recipe.json")
    for where in ("none/page.html", str(stranger / "run.json" / "page.html")):
        assert main(["preview", recipe, "--html", where]) == 2
        assert main(["report", str(stranger), "-o", where]) == 2
        assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.parametrize("place", ["adapter", "merged"])
def test_refused_pickle_is_one_line(place, stranger, capsys):
    name = {"adapter": "adapter_model", "merged": "model"}[place]
    (stranger / place / f"{name}.safetensors").rename(stranger / place / f"{name}.bin")
    shutil.rmtree(stranger / ("merged" if place == "adapter" else "adapter"))
    assert is_one_line(["chat", str(stranger), "--prompt", "?"], capsys) == 2


OWN = """
def fails(*given):
    return 1 / 0


def leaves(*given):
    raise SystemExit(3)


def one_text(batch):
    return 7
"""


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--dataset_format", "own.py:fails"], "rows.jsonl, line 1: own.py:fails failed at own.py, line 3: Zero"),
        (["--dataset_format", "own.py:leaves"], "own.py:leaves failed at own.py, line 7: SystemExit: 3"),
        (["--filters", '{"function": "own.py:fails"}'], "own.py:fails failed at own.py, line 3: ZeroDivisionError"),
        (["--formatting_func", "own.py:fails", "--response_template", "!"], "whose columns are prompt, completion: "),
        (["--formatting_func", "own.py:one_text", "--response_template", "!"], "text expected, found int 7"),
        (["--formatting_func", "name.py:any", "--response_template", "!"], "name.py, line 1: NameError"),
        (["--formatting_func", "own.py", "--response_template", "!"], "is neither a known format"),
    ],
)  # fmt: skip
def test_function_of_the_user_that_fails_is_one_line(flags, says, tiny_bpe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "name.py").write_text("nothing_of_this_name\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "?", "completion": "!"}\n' * 4)
    (tmp_path / "mine.json").write_text(json.dumps({"model_name_or_path": str(tiny_bpe), "dataset_name": "rows.jsonl"}))
    assert main(["check", "mine.json", *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert says in line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model_init_kwargs", '{"x": 1}'], "model_init_kwargs: "),
        (["--model_init_kwargs", '{"device_map": "x"}'], "model_init_kwargs: When passing device_map as a string"),
        (["--model_init_kwargs", '{"num_hidden_layers": 1}'], "`num_hidden_layers` (1) must be equal to"),
        (["--use_peft", "true", "--lora_target_modules", "["], "lora_target_modules: '[' is no regular expression"),
        (["--seed", str(2**64)], "seed: a whole number from 0"),
        (["--name", "\udcff"], "name: found"),
        (["--deepspeed", "rows.jsonl"], "deepspeed: rows.jsonl is not valid JSON"),
        (["--deepspeed", "."], "deepspeed: the file '.' is a folder"),
    ],
)
def test_value_that_a_library_refuses_is_one_line(flags, says, tiny_bpe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "?", "completion": "!"}\n' * 4)
    (tmp_path / "mine.json").write_text(json.dumps({"model_name_or_path": str(tiny_bpe), "dataset_name": "rows.jsonl"}))
    assert main(["train", "mine.json", "--max_steps", "1", "--report_to", "none", *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert says in line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--temperature", "nan"], "temperature: 0 or more"),
        (["--max_new_tokens", "0"], "max_new_tokens: 1 or more"),
        (["--system", "\udcff"], "'system' holds a lone surrogate"),
    ],
)
def test_chat_refuses_what_no_model_takes(flags, says, stranger, capsys):
    assert main(["chat", str(stranger), "--prompt", "?", *flags]) == 2
    assert says in capsys.readouterr().err


def test_file_in_place_of_a_folder_is_said(stranger, capsys):
    for command, says in (
        (["train", str(stranger)], "is a folder, not a file"),
        (["chat", str(stranger / "run.json")], "is a file, not a folder"),
        (["report", str(stranger), "-o", "/"], "Is a directory: /"),
        (["report", str(stranger), "-o", str(stranger)], "Is a directory"),
        (["audit", str(stranger), "--tokenizer", "no-such"], "'no-such'"),
    ):
        assert main(command) == 2
        assert says in capsys.readouterr().err


def of_json(name, **changed):
    """The file `name` of a model's folder with other values."""
    return lambda folder: json.dumps({**json.loads((folder / name).read_text()), **changed})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", of_json("config.json", architectures=None), "the architecture None"),
        ("config.json", of_json("config.json", architectures=["BertModel"]), "the architecture BertModel"),
        ("config.json", of_json("config.json", architectures=["OfNobody"]), "cannot be loaded: AttributeError"),
        ("config.json", of_json("config.json", pad_token_id=99_999), "Padding_idx must be within num_embeddings"),
        ("config.json", of_json("config.json", vocab_size=100), "cannot be loaded: RuntimeError"),
        ("config.json", of_json("config.json", hidden_act="none"), "cannot be loaded: KeyError: 'none'"),
        ("config.json", of_json("config.json", num_attention_heads=0), "cannot be loaded: ZeroDivisionError"),
        (
            "config.json",
            of_json("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
            "Please attach trainable adapters",
        ),
        ("adapter_config.json", "{}", "cannot be loaded: ValueError"),
        ("tokenizer_config.json", of_json("tokenizer_config.json", model_max_length="x"), "cannot be loaded: Type"),
        ("tokenizer_config.json", of_json("tokenizer_config.json", tokenizer_class="BertTokenizer"), "Missing [UNK]"),
        ("chat_template.jinja", "{% if", "line 1: unexpected 'end of template'"),
    ],
)  # fmt: skip
def test_broken_folder_of_a_base_is_one_line(name, content, says, tiny_bpe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = shutil.copytree(tiny_bpe, tmp_path / "base")
    (base / name).write_text(content if isinstance(content, str) else content(tiny_bpe))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "?", "completion": "!"}\n' * 4)
    (tmp_path / "mine.json").write_text(json.dumps({"model_name_or_path": "base", "dataset_name": "rows.jsonl"}))
    assert main(["train", "mine.json", "--max_steps", "1", "--report_to", "none"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert says in line
    assert main(["plan", "mine.json", "--max_length", "64", "--gpus", "1", "--gpu_memory", "8GB"]) in (0, 2)
