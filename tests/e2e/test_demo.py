"""One real train, merge, chat run: the demo's recipe, shorter, started as a user starts it."""

import json

import pytest
from helpers import ROOT, start
from patience import HANG


def train(out, *flags):
    done = start(
        *("accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml", "recipes/demo.py"),
        *("--output_dir", out, "--eval_strategy", "no", *flags),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done, json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Twelve short steps: enough to write JSON, and two answers that show it."""
    folder = tmp_path_factory.mktemp("runs")
    lines = (ROOT / "data/demo/heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "heldout.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    out = folder / "demo"
    # float32 on every machine: rounding to bfloat16 may tip the answers of so short a training when it is merged
    short = "--max_steps 12 --warmup_steps 3 --learning_rate 1.5e-3 --logging_steps 2 --max_length 256 --bf16 false"
    answers = "--generate_eval 2 --max_new_tokens 50"
    return out, *train(out, "--eval_dataset", folder / "heldout.jsonl", *f"{short} {answers}".split())


def test_learns_and_says_so(demo):
    out, done, summary = demo
    losses = [entry["loss"] for entry in map(json.loads, (out / "log.jsonl").open()) if "loss" in entry]
    assert losses[0] > 1 and losses[-1] < 0.3
    assert summary["evaluation"]["after"]["loss"] < 0.2 < 1 < summary["evaluation"]["before"]["loss"]
    assert summary["eos_rate"] == 1
    assert summary["rows"] == 2300 and summary["trained_tokens"] > 50_000
    assert summary["train_seconds"] > 0 and summary["tokens_per_second"] > 0
    assert "held-out exact match" in done.stdout and f"ma-sft chat {out}" in done.stdout
    assert "token accuracy" in done.stdout and "tokens/s" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3 * HANG)
def test_learns_the_task_and_stops(tmp_path):
    out = tmp_path / "demo"
    _, summary = train(out, "--max_steps", "100", "--generate_eval", "40")
    assert summary["exact_match_before"] <= 0.05
    assert summary["exact_match_after"] >= 0.5
    assert summary["eos_rate"] >= 0.9
    message = "Turn the message into JSON.\n\nHello, I am Priya, I would like to buy 12 of your bamboo trays."
    assert json.loads(chat(out, message))["quantity"] == 12


def chat(out, message):
    done = start("ma-sft", "chat", out, "--system", "You write JSON.", "--prompt", message)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_merged_model_answers_like_the_run_said(demo):
    out, _, _ = demo
    question, _, answer, _ = json.loads((out / "answers.json").read_text())[0]
    assert json.loads(answer)["intent"] and chat(out, question) == answer


@pytest.mark.slow
def test_merge_again_gives_the_same_model_and_refuses_to_overwrite(demo, tmp_path):
    from safetensors.torch import load_file

    out, _, _ = demo
    done = start("ma-sft", "merge", out, "-o", tmp_path / "again")
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (load_file(folder / "model.safetensors") for folder in (out / "merged", tmp_path / "again"))
    assert first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == [2]
    done = start("ma-sft", "merge", out, "-o", tmp_path / "again")
    assert done.returncode == 2 and "exists already" in done.stderr
