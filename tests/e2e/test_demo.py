"""The demo as a user starts it: one short train, merge, chat run; and each method learns it and is merged right."""

import json

import pytest
import torch
from helpers import ROOT, read_rows, start, system
from patience import HANG
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ma_sft import to_messages
from ma_sft.demo import demo_model
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.release.merge import load_adapter, merge
from ma_sft.training.evaluation import exact_match, generate_answers


def train(out, *flags):
    done = start(
        *("accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml", "recipes/demo.py"),
        *("--output_dir", out, "--eval_strategy", "no", *flags),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done, json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Eight short steps: enough to write JSON, and an answer that shows it."""
    folder = tmp_path_factory.mktemp("runs")
    lines = (ROOT / "data/demo/heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "heldout.jsonl").write_text("".join(lines[2:4]), encoding="utf-8")
    out = folder / "demo"
    # float32 on every machine: rounding to bfloat16 may tip the answers of so short a training when it is merged
    short = "--max_steps 8 --warmup_steps 1 --learning_rate 2e-3 --logging_steps 2 --max_length 160 --bf16 false"
    answers = "--generate_eval 1 --max_new_tokens 50"
    return out, *train(out, "--eval_dataset", folder / "heldout.jsonl", *f"{short} {answers}".split())


def test_learns_and_says_so(demo):
    out, done, summary = demo
    losses = [entry["loss"] for entry in map(json.loads, (out / "log.jsonl").open()) if "loss" in entry]
    assert losses[0] > 1 and losses[-1] < 0.3
    assert summary["evaluation"]["after"]["loss"] < 0.2 < 1 < summary["evaluation"]["before"]["loss"]
    assert summary["eos_rate"] == 1
    assert summary["rows"] == 2300 and summary["trained_tokens"] > 50_000
    assert summary["train_seconds"] > 0 and summary["tokens_per_second"] > 0
    assert "trained parameters" in done.stdout and "forecast for one process" in done.stdout
    assert 0.85 < summary["forecast_peak_memory"] / summary["peak_memory"] < 1.15
    assert "held-out exact match" in done.stdout and f"ma-sft chat {out}" in done.stdout
    assert "token accuracy" in done.stdout and "tokens/s" in done.stdout


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
    out, _, _ = demo
    done = start("ma-sft", "merge", out, "-o", tmp_path / "again")
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (load_file(folder / "model.safetensors") for folder in (out / "merged", tmp_path / "again"))
    assert first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == [2]
    done = start("ma-sft", "merge", out, "-o", tmp_path / "again")
    assert done.returncode == 2 and "exists already" in done.stderr


METHODS = {"lora": "", "qlora": "--load_in_4bit true", "dora": "--use_dora true", "full": "--use_peft false"}


def answers(model, folder):
    """Answers to all held-out rows, and the share of exact matches."""
    rows = read_rows(ROOT / "data/demo/heldout.jsonl")
    conversations = [[system("You write JSON."), *to_messages(row)] for row in rows]
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder))
    prompts = [encoder.encode_prompt(c[:-1]) for c in conversations]
    texts = [answer.text for answer in generate_answers(model.eval(), encoder, prompts, max_new_tokens=80)]
    right = [exact_match(text, c[-1]["content"]) for text, c in zip(texts, conversations, strict=True)]
    return texts, sum(right) / len(right)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.timeout(8 * HANG)
@pytest.mark.parametrize("method", METHODS)
def test_learns_the_demo_task(method, tmp_path):
    out, few = tmp_path / "run", tmp_path / "few.jsonl"
    few.write_text("".join((ROOT / "data/demo/heldout.jsonl").read_text(encoding="utf-8").splitlines(True)[:8]))
    _, summary = train(out, "--eval_dataset", few, "--merge", "false", *METHODS[method].split())
    print(method, {key: value for key, value in summary.items() if key != "evaluation"})
    assert summary["exact_match_before"] <= 0.05 and summary["exact_match_after"] >= 0.5 and summary["eos_rate"] > 0.8
    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.bfloat16)
        share = answers(model, out / "model")[1]
        print(method, f"exact match {share:.1%}")
        assert share >= 0.85
        return
    merge(out, tmp_path / "merged", dtype="float32")
    adapter, share = answers(load_adapter(out / "adapter", dtype=torch.float32), out / "adapter")
    merged, _ = answers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tmp_path / "merged")
    print(method, f"exact match {share:.1%}, answers that merging changed: {sum(map(str.__ne__, adapter, merged))}")
    if method == "qlora":  # on the base as it was trained on; the 16-bit base that it is merged into is another model
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        config = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.bfloat16)
        base = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.bfloat16, quantization_config=config)
        share = answers(PeftModel.from_pretrained(base, out / "adapter"), out / "adapter")[1]
        print(method, f"exact match on the 4-bit base {share:.1%}")
    assert share >= 0.85
    assert merged == adapter
