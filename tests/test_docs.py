"""What README and docs show is run: Python blocks print what the page says, and every command ends with exit code 0.

Commands run in a folder with what the pages take for granted: rows, recipes, a finished run. Models and data of a hub
are replaced by local ones, and training is cut to one step. Commands for GPUs and of make are only held against what
there is: configuration, script, settings, target.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from fetch_converter import fetch_converter
from helpers import ROOT, assistant, load_tokenizer, user, write_rows
from transformers import AutoTokenizer

from ma_sft import Recipe, RecipeError, run, to_messages
from ma_sft.cli import app, main
from ma_sft.data import filters, formats
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.tools.gallery import launcher_file

PAGES = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
# What a page takes from a hub lies in a folder here.
HUB = {"Qwen/Qwen3-0.6B": "qwen3", "google/gemma-3-1b-it": "gemma3"}
CHINESE = [page for page in PAGES if page.name.endswith(".zh.md")]  # whose blocks are those of the English page


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """(line, code, expected output) of each Python block of a page that shows what it prints."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(text[: m.start()].count("\n") + 2, m[1], m[2] or "") for m in BLOCK.finditer(text)]


LONG = (Path("docs/templates-and-masks.md"),)  # TRL's preparation, once for each trap
SHOWN = [p for p in PAGES if p not in CHINESE and any(output for _, _, output in blocks(p))]


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] * (p in LONG), id=str(p)) for p in SHOWN])
def test_python_on_the_page_prints_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for line, code, expected in blocks(page):
        for hub, local in HUB.items():
            if hub in code:
                if not (tmp_path / local).is_dir():
                    load_tokenizer(local).save_pretrained(tmp_path / local)
                code = code.replace(f'"{hub}"', repr(str(tmp_path / local)))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
        assert printed.getvalue() == expected, f"{page}, line {line}"


ROWS = [{"instruction": f"What is {i} and {i}?", "input": "", "output": f"So it is {2 * i}."} for i in range(50)]
SHORT = (
    "--max_steps 1 --max_length 128 --generate_eval 2 --max_new_tokens 2 --gradient_accumulation_steps 1 "
    "--per_device_train_batch_size 1 --save_strategy no --eval_strategy no --logging_steps 1 --report_to none "
    "--rehearse false"
).split()


def commands(page: Path) -> list[tuple[int, str]]:
    """(line, command) of all bash blocks of a page; lines that go on with a backslash are one command."""
    found, block, held = [], False, ""
    script = False  # a block that is a script of its own is one command
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            found += [(number, held)] if script else []
            block, script, held = line == "```bash", False, ""
        elif block and (script or line.startswith("#!")):
            script, held = True, f"{held}{line}\n"
        elif block:
            held += re.sub(r"(^|\s)#.*", "", line).removesuffix("\\")
            quotes = held.count("'") % 2  # a quoted argument over several lines
            if not line.endswith("\\") and not quotes:
                found += [(number, held)] if shlex.split(held, comments=True) else []
                held = ""
            elif quotes:
                held += "\n"
    return found


class Shell:
    """Runs the commands of one page."""

    def __init__(self, folder: Path, places: dict[str, str]) -> None:
        self.folder, self.places = folder, places

    def __call__(self, line: str) -> None:
        if line.startswith("#!"):
            subprocess.run(["bash", "-n"], input=line, text=True, check=True)
            assert all((ROOT / path).is_file() for path in re.findall(r"(?:accelerate_configs|recipes)/[\w.]+", line))
            return
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if ">" in words:
                words = words[: words.index(">")]
            words = [self.places.get(word, word) for word in words]
            if words:
                getattr(self, words[0].replace("-", "_"))(words[1:])

    def ma_sft(self, words: list[str]) -> None:
        if "--launcher" in words:  # tests/training/test_distributed.py starts them
            launcher_file(words[words.index("--launcher") + 1])
            return Recipe.load(words[1]).check_early(words[2 : words.index("--launcher")], reads_rows=False)
        if words[0] == "train":
            asks = {"eval_dataset", "test_size"} & set(Recipe.load(words[1]).settings)
            words = [*words, *SHORT, *([] if asks else ["--eval_dataset", "heldout.jsonl"])]
        if words[0] in ("check", "plan"):
            words = [*words, "--rehearse", "false"]
        if words[0] == "chat":
            words = [*words, "--max_new_tokens", "4"]
        if words[-1].endswith(".gguf") or "--outtype" in words:
            words = ["export", "gguf-model", *words[2:]]
        assert main(words) == 0

    def accelerate(self, words: list[str]) -> None:
        config = Path(words[words.index("--config_file") + 1])
        assert words[0] == "launch" and (ROOT / config).is_file()
        script, flags = self.script(words)
        if config.stem == "cpu":
            run(Recipe.load(script), [*flags, *SHORT])

    def torchrun(self, words: list[str]) -> None:
        self.script(words)

    deepspeed = torchrun

    def script(self, words: list[str]) -> tuple[str, list[str]]:
        """The recipe among a launcher's words, and its flags, which must be settings."""
        at = next(at for at, word in enumerate(words) if word.endswith(".py"))
        Recipe.load(words[at]).resolve([*words[at + 1 :], "--bf16", "false"])
        return words[at], words[at + 1 :]

    def make(self, words: list[str]) -> None:
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr

    def docker(self, words: list[str]) -> None:
        """The image's name, port and volume are the reader's; an argument of the build is one of the Dockerfile."""
        given = [words[at + 1].split("=")[0] for at, word in enumerate(words) if word == "--build-arg"]
        assert set(given) <= set(re.findall(r"(?m)^ARG (\w+)", (ROOT / "Dockerfile").read_text()))

    def source(self, words: list[str]) -> None:
        assert words == [".venv/bin/activate"]  # where `make env` puts it

    def pip(self, words: list[str]) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        (extra,) = re.findall(r"ma-sft\[(\w+)\]", " ".join(words))
        assert extra in project["optional-dependencies"]


@pytest.fixture(scope="module")
def assumed(tiny_bpe, tmp_path_factory):
    """A folder as the pages assume it: rows, recipes, two finished runs of a tiny model."""
    folder = tmp_path_factory.mktemp("assumed")
    for name, rows in (("rows", ROWS), ("heldout", ROWS[:4])):
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "mixture.yaml").write_text("datasets: [rows.jsonl]\nfilters: {exact_duplicates: true}\ntest_size: 0.1\n")
    chats = [[user(row["instruction"]), assistant(row["output"])] for row in ROWS]
    encoded = ChatEncoder(AutoTokenizer.from_pretrained(tiny_bpe)).encode(chats)
    prepared = [{"input_ids": e.input_ids, "labels": e.labels} for examples in encoded for e in examples]
    Dataset.from_list(prepared).save_to_disk(folder / "prepared")
    (folder / "overrides.yaml").write_text("learning_rate: 0.001\n")
    for name in ("recipes", "data/demo"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (readme,) = (code for _, code, _ in blocks(Path("README.md")) if code.startswith("# recipes/mine.py"))
    (folder / "recipes" / "mine.py").write_text(readme)
    for path in (folder / "recipes").glob("*.py"):
        text = path.read_text(encoding="utf-8").replace('"trl-lib/Capybara"', '"rows.jsonl"')
        for hub in ("demo", *HUB):
            text = text.replace(f'model_name_or_path="{hub}"', f"model_name_or_path={str(tiny_bpe)!r}")
        path.write_text(text, encoding="utf-8")
    places = {"dataset_name": str(folder / "rows.jsonl"), "output_dir": str(folder / "runs" / "demo")}
    run(Recipe(name="demo", model_name_or_path=str(tiny_bpe), test_size=5, use_peft=True, **places), SHORT)
    shutil.copytree(folder / "runs" / "demo", folder / "runs" / "other")
    return folder


@pytest.fixture
def shell(assumed, tiny_bpe, tiny, tmp_path, monkeypatch):
    """In a copy of that folder."""
    shutil.copytree(assumed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "gguf-model").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA_CPP", str(fetch_converter()))
    # Who is asked says: the tiny model, what is offered twice, one question, nothing more.
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    questions = iter(["Hello", *[""] * 99])

    def say(text):
        return next(questions) if text == "> " else str(tiny_bpe) if text.startswith("Model") else ""

    monkeypatch.setattr("builtins.input", say)
    return Shell(tmp_path, {"/models/x": str(tiny_bpe)})


@pytest.mark.parametrize("page", [p for p in PAGES if p not in CHINESE and commands(p)], ids=str)
def test_commands_on_the_page_run(page, shell):
    if page.name not in ("README.md", "commands.md"):  # which train `runs/mine` themselves
        shutil.copytree(shell.folder / "runs" / "demo", shell.folder / "runs" / "mine")
    for line, command in commands(page):
        try:
            shell(command)
        except Exception as error:
            raise AssertionError(f"{page}, line {line}: {command}") from error


def english(page: Path) -> Path:
    return page.with_name(page.name.replace(".zh.", "."))


@pytest.mark.parametrize("page", CHINESE, ids=str)
def test_chinese_page_is_in_step_with_the_english_one(page):
    """The same headings, tables, blocks (but for comments), names between backticks, and pages that it leads to."""

    def shape(page):
        text = (ROOT / page).read_text(encoding="utf-8")
        fence = re.compile(r"^```\w*\n.*?^```$", re.MULTILINE | re.DOTALL)
        shown = [re.sub(r"(?m)(^|\s+)# .*$", "", block) for block in fence.findall(text)]
        prose = fence.sub("", text)
        lines = re.findall(r"(?m)^(?:#+|\||- |\d\. )", prose)
        names = {code for code in re.findall(r"`([^`]+)`", prose) if not re.search(r"\s", code)}
        links = set(re.findall(r"\]\(([^)#]+?)(?:\.zh)?(?:\.md)?(?:#[^)]*)?\)", prose))
        return lines, shown, names, links - {english(page).stem}

    assert shape(page) == shape(english(page))


def test_links_between_pages_lead_somewhere():
    def headings(page):
        titles = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target, heading in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", text):
            file = ROOT / page if not target else (ROOT / page).parent / target
            assert file.exists() and (not heading or heading in headings(file)), f"{page}: {target}#{heading}"
    assert all(f"]({page.name})" in (ROOT / english(page)).read_text(encoding="utf-8") for page in CHINESE)


@pytest.mark.slow
def test_notebook_prints_what_it_shows(smollm2, tmp_path, monkeypatch):
    """The code cells of `docs/tour.ipynb`, in order, on the demo model; training's own lines are not kept in it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict = {}
    for cell in json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            code, printed = "".join(cell["source"]), io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, cell["id"], "exec"), names)
            shown = "".join(line for output in cell["outputs"] for line in output["text"])
            assert printed.getvalue() == shown or code.endswith("run(recipe)"), cell["id"]
    assert (tmp_path / names["recipe"].settings["output_dir"] / "report.html").is_file()


def test_container_holds_what_the_demo_needs(tmp_path):
    """What the Dockerfile copies is enough to install and for each command of `make sft-demo`, on a CPU and a GPU."""
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines()]
    for *sources, target in (words[1:] for words in lines if words[:1] == ["COPY"]):
        for source in sources:
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, tmp_path / source)
            assert target in (source, "./")
    metadata = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_editable('.')"
    subprocess.run([sys.executable, "-c", metadata], cwd=tmp_path, check=True, capture_output=True)
    assert ["RUN", "make", "env"] in lines and lines[-1] == ["CMD", '["make",', '"sft-demo"]']
    for launch in ("cpu", "single_gpu"):
        environment = {**os.environ, "LAUNCH": launch}
        command = ["make", "-n", "sft-demo"]
        steps = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert steps.returncode == 0 and f"--launcher {launch}" in steps.stdout
        used = {f"accelerate_configs/{launch}.yaml", *re.findall(r"recipes/[\w.]+|constraints\.txt", steps.stdout)}
        assert len(used) == 4 and all((tmp_path / path).is_file() for path in used), used


def test_commands_targets_and_files_named_in_the_text_exist():
    """What stands between backticks, outside of the blocks that are run."""
    commands = {entry.name for entry in (*app.registered_commands, *app.registered_groups)}
    targets = set(re.findall(r"(?m)^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    folders = "ma_sft|tests|docs|recipes|benchmarks|scripts|accelerate_configs"
    for page in (page for page in PAGES if page.name != "CHANGELOG.md"):  # which tells of earlier versions
        text = (ROOT / page).read_text(encoding="utf-8")
        assert set(re.findall(r"`make ([a-z][\w-]*)", text)) <= targets, page
        assert set(re.findall(r"`ma-sft ([a-z][\w-]*)", text)) <= commands, page
        named = re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", text)  # NAME stands for one of the reader's own
        assert not [path for path in named if "NAME" not in path and not (ROOT / path).exists()], page


def test_plug_in_points_work_as_contributing_shows_them(monkeypatch):
    monkeypatch.setitem(formats.FORMATS, "riddles", None)  # what the page registers goes after the test
    monkeypatch.setitem(filters.ROW_FILTERS, "max_messages", None)
    for _, code, _ in blocks(Path("CONTRIBUTING.md")):
        exec(code, {})
    assert to_messages({"riddle": "What keys?", "key": "A piano's."}) == [user("What keys?"), assistant("A piano's.")]
    row = filters.SeenRow([user("a"), assistant("b")], 2)
    assert [filters.ROW_FILTERS["max_messages"](limit, row) for limit in (1, 2)] == ["2 messages", None]


def test_every_answer_of_contributing_names_what_is_in_its_file():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| a.*", text.split("## Where would I change X?")[1].split("## Plug-in points")[0])
    assert len(rows) == 12
    for row in rows:
        paths = re.findall(r"`((?:ma_sft|accelerate_configs|tests)/[^`]*)`", row)
        for name in re.findall(r"`@?([A-Z_]{6,}|command)`", row):
            assert name in (ROOT / paths[0]).read_text(encoding="utf-8"), row
        assert all((ROOT / path).exists() for path in paths), row


def test_settings_that_pass_by_name():
    text = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| [^|]+ \| `([^`|]+)` \| ?([\w-]*) ?\|$", text, re.MULTILINE)
    assert len(table) == 19
    for shown, package in table:
        recipe = Recipe(model_name_or_path="demo", dataset_name="x", **yaml.safe_load(f"{{{shown}}}"))
        try:
            recipe.resolve()
        except RecipeError as error:
            assert package and package in str(error) and find_spec(package.replace("-", "_")) is None, error


def test_recipes_and_settings_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| recipe | what for |") : text.index("## A recipe")]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if "`" in line)))
    shipped = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"demo_data"}
    assert named == shipped
    launchers = set(re.findall(r"`(\w+)\.yaml`", text))
    assert launchers == {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}


def test_readme_is_short_and_its_bug_is_the_one_that_the_docs_run():
    text, masks = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/templates-and-masks.md"))
    assert len(text) <= 9000
    shown = re.findall(r"^```\n(<\|im_start\|>.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(shown) == 2 and all(block in masks for block in shown)
