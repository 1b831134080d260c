"""One recipe, one flag: LoRA, QLoRA, DoRA and full fine-tuning learn the demo task, and merging changes no answer."""

import json

import pytest
import torch
from helpers import ROOT, start
from patience import HANG
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ma_sft import to_messages
from ma_sft.demo import demo_model
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.release.merge import load_adapter, merge
from ma_sft.training.evaluation import exact_match, generate_answers

METHODS = {
    "lora": (),
    "qlora": ("--load_in_4bit", "true"),
    "dora": ("--use_dora", "true"),
    "full": ("--use_peft", "false"),
}


def answers(model, folder):
    """Answers to all held-out rows, and the share of exact matches."""
    rows = [json.loads(line) for line in (ROOT / "data/demo/heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    conversations = [[{"role": "system", "content": "You write JSON."}, *to_messages(row)] for row in rows]
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder))
    found = generate_answers(
        model.eval(), encoder, [encoder.encode_prompt(c[:-1]) for c in conversations], max_new_tokens=80
    )
    texts = [answer.text for answer in found]
    right = [exact_match(text, c[-1]["content"]) for text, c in zip(texts, conversations, strict=True)]
    return texts, sum(right) / len(right)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.timeout(8 * HANG)
@pytest.mark.parametrize("method", METHODS)
def test_learns_the_demo_task(method, tmp_path):
    out, few = tmp_path / "run", tmp_path / "few.jsonl"
    few.write_text("".join((ROOT / "data/demo/heldout.jsonl").read_text(encoding="utf-8").splitlines(True)[:8]))
    done = start(
        *("accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml", "recipes/demo.py"),
        *("--output_dir", out, "--eval_dataset", few, "--eval_strategy", "no", "--merge", "false", *METHODS[method]),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    print(method, {key: value for key, value in summary.items() if key != "evaluation"})
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
        quantization = BitsAndBytesConfig(
            **{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        base = AutoModelForCausalLM.from_pretrained(
            demo_model(), dtype=torch.bfloat16, quantization_config=quantization
        )
        share = answers(PeftModel.from_pretrained(base, out / "adapter"), out / "adapter")[1]
        print(method, f"exact match on the 4-bit base {share:.1%}")
    assert share >= 0.85
    assert merged == adapter
