"""`ma-sft data build` gives the whole folder or nothing, and recipes and `datasets` read it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from datasets import DatasetDict, load_from_disk
from helpers import QUICK, ROOT, refusal, write_rows
from huggingface_hub import DatasetCard
from patience import PATIENCE

from ma_sft import Recipe, run
from ma_sft.cli import main
from ma_sft.data.mixture import load_mixture
from ma_sft.utils import atomic_dir

ROWS = [{"instruction": f"What is {i} + {i}?", "input": "", "output": f"It is {2 * i}."} for i in range(60)]


@pytest.fixture
def mixture(tmp_path):
    write_rows(tmp_path / "a.jsonl", [*ROWS, ROWS[0], {"instruction": "x"}])
    write_rows(tmp_path / "b.jsonl", [{"question": "Why?", "answer": "Because."}])
    path = tmp_path / "mixture.yaml"
    path.write_text(
        "on_error: skip\ntest_size: 6\nfilters: {exact_duplicates: true}\ndatasets:\n"
        f"- {{path: {tmp_path}/a.jsonl, license: mit}}\n- {{path: {tmp_path}/b.jsonl, license: apache-2.0}}\n"
    )
    return path


def test_build_and_train_on_what_is_built(mixture, tmp_path, tiny_bpe, capsys):
    out, before = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    assert main(["data", "build", str(mixture), "-o", str(out), "--num_proc", "2"]) == 0
    assert signal.getsignal(signal.SIGTERM) == before
    assert "exact_duplicates" in capsys.readouterr().out
    saved = load_from_disk(str(out))
    assert isinstance(saved, DatasetDict) and (len(saved["train"]), len(saved["test"])) == (55, 6)
    assert saved["train"].column_names == ["messages", "tools", "source", "origin"]
    assert set(saved["train"][0]["messages"][0]) == {"role", "content"}
    report = json.loads((out / "report.json").read_text())
    for stage in report["stages"]:
        assert stage["rows_in"] - sum(stage["removed"].values()) == stage["rows_out"]
    convert, duplicates = report["stages"][2], report["stages"][4]
    assert convert["removed"] == {"broken rows": 1} and "line 62" in convert["examples"]["broken rows"][0]
    assert duplicates["removed"] == {"exact_duplicates": 1} and "a.jsonl:61" in str(duplicates["examples"])
    sources = [(source["license"], source["format"]) for source in report["sources"]]
    assert sources == [("mit", "alpaca"), ("apache-2.0", "question-answer")]

    card = DatasetCard.load(out / "README.md")
    assert card.data.license == "other"
    assert "| mit |" in card.text and "exact_duplicates: 1" in card.text
    assert "exists already" in refusal(capsys, "data", "build", mixture, "-o", out)

    summary = run(settings(tmp_path, tiny_bpe, dataset_name=str(out), eval_dataset=str(out)))
    assert summary["rows"] == 55 and summary["steps"] == 2 and summary["eval_loss"] > 0
    again = load_mixture([str(out)]).train
    assert {origin.rpartition("/")[2].split(":")[0] for origin in again["origin"]} == {"a.jsonl", "b.jsonl"}


def test_build_preferences(tmp_path, capsys):
    path = tmp_path / "mixture.yaml"
    path.write_text(f"kind: preference\ndatasets: [{ROOT}/tests/files/preference/pku-saferlhf.jsonl]\n")
    assert main(["data", "build", str(path), "-o", str(tmp_path / "out")]) == 0
    assert "bad answers" in capsys.readouterr().out
    rows = load_from_disk(str(tmp_path / "out"))
    assert len(rows) == 2 and {"prompt", "chosen", "rejected"} <= set(rows.column_names)
    assert any(row["rejected"][0]["content"] == "Water." for row in rows)


def test_bad_mixture_is_one_line_and_nothing_stays(mixture, tmp_path, capsys):
    build = ("data", "build", mixture, "-o", tmp_path / "out")
    mixture.write_text(mixture.read_text().replace("on_error: skip", "on_error: raise"))
    assert "a.jsonl, line 62: field 'output' is missing or null" in refusal(capsys, *build)
    mixture.write_text("datasets: [a.jsonl]\nfilter: {}\n")
    assert "did you mean 'filters'" in refusal(capsys, *build)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stop", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGKILL, 1)])
def test_killed_in_the_middle(mixture, tmp_path, stop, workers):
    """A filter of the user's says when the build is under way, and then waits to be killed."""
    code = tmp_path / "slow.py"
    code.write_text(
        "import pathlib, time\ndef slow(messages):\n"
        f"    pathlib.Path({str(tmp_path / 'started')!r}).touch()\n    time.sleep(60)\n    return True\n"
    )
    text = mixture.read_text()
    mixture.write_text(text.replace("exact_duplicates: true", f"function: '{code}:slow'"))
    build = ["data", "build", str(mixture), "-o", str(tmp_path / "out")]
    flags = ["--allow_code", "true", *(["--num_proc", "2"] if workers == 2 else [])]  # it names a Python file
    process = subprocess.Popen(
        [sys.executable, "-m", "ma_sft.cli", *build, *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts these tests in the background has them ignore Ctrl-C, and what they start as well
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "started").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(stop)
    _, error = process.communicate(timeout=60 * PATIENCE)
    assert process.returncode == (130 if stop != signal.SIGKILL else -9)
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.*"))
    mixture.write_text(text)
    assert main(build) == 0
    assert len(load_from_disk(str(tmp_path / "out"))["train"]) == 55


def test_killed_while_writing(tmp_path):
    """What a killed process left is no folder of that name, and goes when the folder is made again."""
    out = tmp_path / "out"
    code = (
        "import os, pathlib, signal\nfrom ma_sft.utils import atomic_dir\n"
        f"with atomic_dir(pathlib.Path({str(out)!r})) as folder:\n"
        "    (folder / 'half').write_text('x')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1
    with atomic_dir(out) as folder, atomic_dir(tmp_path / "out.other"):
        (folder / "whole").write_text("x")
        assert folder.exists()  # a living process's scratch folder is spared
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.other"]


def settings(tmp_path, model, **data):
    more = {"name": "built", "max_length": 256, "packing": True, "use_peft": True, "merge": False}
    given = {"model_name_or_path": str(model), "output_dir": str(tmp_path / "run"), **more}
    return Recipe(**{**QUICK, **given, "per_device_train_batch_size": 1, **data})


def test_recipe_takes_a_mixture_and_holds_rows_out(mixture, tmp_path, tiny_bpe):
    write_rows(tmp_path / "b.jsonl", ({"question": f"Why {i}?", "answer": "Because."} for i in range(9)))
    columns = {"answer": "response", "question": "query"}
    sources = [
        {"path": str(tmp_path / "a.jsonl"), "weight": 1, "filters": {"min_response_chars": 1}},
        {"path": str(tmp_path / "b.jsonl"), "weight": 1, "columns": columns},
    ]
    filters = {"exact_duplicates": True, "max_tokens": 500}
    more = {"test_size": 10, "stopping_strategy": "all_exhausted", "generate_eval": 2, "max_new_tokens": 2}
    summary = run(settings(tmp_path, tiny_bpe, datasets=sources, on_error="skip", filters=filters, **more))
    assert summary["rows"] > 80 and summary["eval_loss"] > 0  # b's rows are repeated
    assert "exact_match_after" in summary
    page = (tmp_path / "run" / "report.html").read_text()
    assert "filtered by exact_duplicates" in page and "skipped rows" in page


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_recipe_streams(mixture, tmp_path, tiny_bpe, packing, capsys):
    rows = {"dataset_name": str(tmp_path / "a.jsonl"), "on_error": "skip", "dataset_streaming": True}
    recipe = settings(tmp_path, tiny_bpe, **rows, packing=packing)
    summary = run(recipe)
    assert summary["steps"] == 2 and summary["tokens"] > 50
    shown = " ".join(capsys.readouterr().out.split())
    assert "checked rows of the stream" in shown and "every label is right" in shown
    (tmp_path / "recipe.yaml").write_text(
        f"{{model_name_or_path: {tiny_bpe}, dataset_name: {tmp_path}/a.jsonl, dataset_streaming: true, max_steps: 1, "
        "on_error: skip}"
    )
    assert main(["check", str(tmp_path / "recipe.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 61
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        run(recipe, ["--max_steps", "-1", "--output_dir", str(tmp_path / "other")])
