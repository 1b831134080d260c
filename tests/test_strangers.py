"""A stranger's run folder or recipe, broken at random: each command ends in a result or one line, and changes nothing
outside the folder."""

import json
import os
import random
import shutil

import pytest
from breaking import JUNK, mutate, spoil
from helpers import QUICK, refusal, write_rows

from ma_sft import Recipe, run
from ma_sft.cli import main


@pytest.fixture(scope="module")
def finished(tiny_bpe, tmp_path_factory):
    """A run with an adapter, its merged model, a report, and nothing else."""
    folder = tmp_path_factory.mktemp("stranger")
    rows = write_rows(folder / "rows.jsonl", ({"prompt": f"{i}?", "completion": f"{i}!"} for i in range(20)))
    places = {"model_name_or_path": str(tiny_bpe), "dataset_name": rows, "output_dir": str(folder / "run")}
    held_out = {"test_size": 4, "generate_eval": 2, "max_new_tokens": 2}
    run(Recipe(**{**QUICK, **places, **held_out}, name="stranger", max_length=64, use_peft=True))
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


FILES = ["recipe.json", "run.json", "summary.json", "answers.json", "log.jsonl"]
FILES += ["adapter/adapter_config.json", "adapter/sft_manifest.json", "merged/sft_manifest.json", "merged/config.json"]
FILES += ["merged/generation_config.json", "merged/tokenizer_config.json"]


@pytest.mark.parametrize("name", FILES)
def test_run_folder(name, stranger, capsys):
    rng = random.Random(name)
    path = stranger / name
    good = path.read_bytes()
    related = [c for c in commands(stranger) if concerns(c, name)]
    for turn in range(int(os.environ.get("MA_SFT_FUZZ") or 12)):
        path.write_bytes(spoil(good, rng) if turn % 3 == 0 else changed(good, path.suffix, rng))
        command = related[turn % len(related)]
        code, error = main(command), capsys.readouterr().err
        said = [line for line in error.splitlines() if line.startswith("error: ")]
        assert code in (0, 1) or (code == 2 and len(said) == 1), (command, error)
        shutil.rmtree(stranger / "again", ignore_errors=True)
    assert (stranger.parent / "mine" / "precious.txt").read_text() == "mine"
    assert sorted(path.name for path in (stranger.parent / "mine").iterdir()) == ["precious.txt"]


def concerns(command, name):
    """Whether the command reads that file."""
    if name.startswith(("adapter", "merged")):
        return command[0] in ("chat", "merge", "export", "handoff-check")
    return command[0] in ("report", "check") if name == "recipe.json" else command[0] == "report"


def changed(content, suffix, rng):
    lines = content.decode().splitlines() if suffix == ".jsonl" else [content.decode()]
    at = rng.randrange(len(lines))
    value = json.loads(lines[at])
    lines[at] = json.dumps(rng.choice(JUNK) if rng.random() < 0.1 else mutate({"": value}, rng).get("", value))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


MINE = "model_name_or_path: demo\ndataset_name: rows.jsonl\n"
RECIPES = {
    "syntax.py": ("from ma_sft import Recipe\nrecipe = Recipe(", "syntax.py, line 2"),
    "import.py": ("import no_such_module\n", "no_such_module"),
    "raises.py": ("from ma_sft import Recipe\n\n1 / 0\n", "raises.py, line 3: ZeroDivisionError"),
    "exits.py": ("raise SystemExit(3)\n", "exits.py"),
    "empty.py": ("x = 1\n", "has no variable `recipe"),
    "bytes.py": (b"\xff\xfe\x00", "bytes.py"),
    "deep.yaml": ("[" * 20_000, "deep.yaml"),
    "deep.json": ('{"a":' * 20_000, "deep.json"),
    "twice.yaml": ("max_steps: 1\nmodel_name_or_path: demo\nmax_steps: 2\n", "max_steps"),
    "bytes.yaml": (b"\xff\xfe\x00\x01", "bytes.yaml"),
    "list.json": ("[1, 2]", "list.json"),
    "list.yaml": ("- a\n- b\n", "list.yaml"),
    "open.yaml": ("a: [1\n", "open.yaml"),
    "number.yaml": (f"1: 2\n{MINE}", "unknown setting '1'"),
    "on.yaml": (f"on: 2\n{MINE}", "unknown setting 'True'"),
    "tag.yaml": ("!!python/object/apply:os.system ['touch mine']\n", "tag.yaml"),
    "name.yaml": (f"name: ../../x\n{MINE}", "../../x"),
    "slash.yaml": (f"name: /\n{MINE}", "name"),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with four rows."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "?", "completion": "!"}] * 4)
    return tmp_path


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, here, capsys):
    text, says = RECIPES[name]
    (here / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert says in refusal(capsys, "train", name)
    assert {path.name for path in here.iterdir()} - {"__pycache__"} == {name, "rows.jsonl"}


CHAT = ("chat", "RUN", "--prompt", "?")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ((*CHAT, "--temperature", "-1"), "temperature"),
        ((*CHAT, "--max_new_tokens", "0"), "max_new_tokens"),
        (("preview", "RUN/recipe.json", "--html", "none/page.html"), "none"),
        (("preview", "RUN/recipe.json", "--html", "RUN/run.json/page.html"), "run.json"),
        (("report", "RUN", "-o", "none/page.html"), "none"),
        (("report", "RUN", "-o", "RUN/run.json/page.html"), "run.json"),
        (("report", "RUN", "-o", "/"), "Is a directory: /"),
        (("report", "RUN", "-o", "RUN"), "Is a directory"),
        (("train", "RUN"), "is a folder, not a file"),
        (("chat", "RUN/run.json"), "is a file, not a folder"),
        (("audit", "RUN", "--tokenizer", "no-such"), "'no-such'"),
    ],
    ids=repr,
)
def test_what_a_command_cannot_take_is_one_line(command, says, stranger, capsys):
    assert says in refusal(capsys, *(word.replace("RUN", str(stranger)) for word in command))


def test_export_of_a_broken_adapter_is_one_line(stranger, capsys):
    (stranger / "adapter" / "adapter_config.json").write_text("[]")
    shutil.rmtree(stranger / "merged")
    assert "is not as ma_sft writes it" in refusal(capsys, "export", stranger, "-o", "again")


OWN = """
def fails(*given):
    return 1 / 0


def leaves(*given):
    raise SystemExit(3)


def one_text(batch):
    return 7
"""


OWN_FUNCTIONS = [
    (["--dataset_format", "own.py:fails"], "rows.jsonl, line 1: own.py:fails failed at own.py, line 3: Zero"),
    (["--dataset_format", "own.py:leaves"], "own.py:leaves failed at own.py, line 7: SystemExit: 3"),
    (["--filters", '{"function": "own.py:fails"}'], "own.py:fails failed at own.py, line 3: ZeroDivisionError"),
    (["--formatting_func", "own.py:fails", "--response_template", "!"], "whose columns are prompt, completion: "),
    (["--formatting_func", "own.py:one_text", "--response_template", "!"], "text expected, found int 7"),
    (["--formatting_func", "name.py:any", "--response_template", "!"], "name.py, line 1: NameError"),
    (["--formatting_func", "own.py", "--response_template", "!"], "is neither a known format"),
]
OF_LIBRARIES = [
    (["--model_init_kwargs", '{"x": 1}'], "model_init_kwargs: "),
    (["--model_init_kwargs", '{"device_map": "x"}'], "model_init_kwargs: When passing device_map as a string"),
    (["--model_init_kwargs", '{"num_hidden_layers": 1}'], "`num_hidden_layers` (1) must be equal to"),
    (["--use_peft", "true", "--lora_target_modules", "["], "lora_target_modules=[ cannot be: set lora_target_modules"),
    (["--seed", str(2**64)], "seed: a whole number from 0"),
    (["--name", "\udcff"], "name: found"),
    (["--deepspeed", "rows.jsonl"], "deepspeed: rows.jsonl is not valid JSON: Extra data: line 2"),
    (["--deepspeed", "."], "deepspeed: the file '.' is a folder, not a file"),
]


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [*(("check", *row) for row in OWN_FUNCTIONS), *(("train", *row) for row in OF_LIBRARIES)],
)
def test_what_fails_in_a_users_function_or_a_library_is_one_line(command, flags, says, tiny_bpe, here, capsys):
    (here / "own.py").write_text(OWN)
    (here / "name.py").write_text("nothing_of_this_name\n")
    given = {"model_name_or_path": str(tiny_bpe), "dataset_name": "rows.jsonl", "max_steps": 1, "report_to": "none"}
    (here / "mine.json").write_text(json.dumps(given))
    assert says in refusal(capsys, command, "mine.json", *flags)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", {"architectures": None}, "the architecture None"),
        ("config.json", {"architectures": ["BertModel"]}, "the architecture BertModel"),
        ("config.json", {"architectures": ["OfNobody"]}, "cannot be loaded: AttributeError"),
        ("config.json", {"pad_token_id": 99_999}, "Padding_idx must be within num_embeddings"),
        ("config.json", {"vocab_size": 100}, "cannot be loaded: RuntimeError"),
        ("config.json", {"num_attention_heads": 0}, "cannot be loaded: ZeroDivisionError"),
        ("config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
         "Please attach trainable adapters"),
        ("adapter_config.json", "{}", "cannot be loaded: ValueError"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "cannot be loaded: Type"),
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}, "Missing [UNK]"),
        ("chat_template.jinja", "{% if", "line 1: unexpected 'end of template'"),
    ],
)  # fmt: skip
def test_broken_folder_of_a_base_is_one_line(name, content, says, tiny_bpe, here, capsys):
    base = shutil.copytree(tiny_bpe, here / "base")
    if isinstance(content, dict):  # the same file with other values
        content = json.dumps({**json.loads((base / name).read_text()), **content})
    (base / name).write_text(content)
    (here / "mine.json").write_text(json.dumps({"model_name_or_path": "base", "dataset_name": "rows.jsonl"}))
    assert says in refusal(capsys, "train", "mine.json", "--max_steps", "1", "--report_to", "none")
    assert main(["plan", "mine.json", "--max_length", "64", "--gpus", "1", "--gpu_memory", "8GB"]) in (0, 2)
