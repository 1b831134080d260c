"""The decoder's logits and greedy text are transformers', with and without cache, alone and in a batch."""

import pytest
import torch
from helpers import load_tokenizer
from reference.models import PAD, VOCAB, as_decoder, examples, tiny
from transformers import (
    AutoModelForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ma_sft.reference import InputError, generate, model, template

PROMPTS = [e.input_ids for e in examples(5, (1, 20))]


def their_greedy(theirs, prompts, new, eos, pad):
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = theirs.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=eos, pad_token_id=pad
    )
    answers = []
    for row in out[:, width:].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        answers.append(row[:stop])
    return answers


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_of_tiny_models_token_for_token(kind, use_cache, tmp_path):
    theirs = tiny(kind)
    ours = as_decoder(theirs, tmp_path)
    # an end token that greedy text really reaches in some row, and not in all at once
    free = their_greedy(theirs, PROMPTS, 20, [VOCAB + 1], PAD)
    eos = [free[0][7]]
    want = their_greedy(theirs, PROMPTS, 20, eos, PAD)
    assert len({len(row) for row in want}) > 1
    settings = {"max_new_tokens": 20, "eos_ids": eos, "pad_id": PAD, "use_cache": use_cache}
    assert generate.generate(ours, PROMPTS, **settings) == want
    assert [generate.generate(ours, [p], **settings)[0] for p in PROMPTS] == want


@pytest.mark.slow
def test_greedy_text_of_the_demo_model_token_for_token(smollm2):
    tokenizer = load_tokenizer("smollm2")
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ours = model.load(smollm2)
    questions = ["What is the capital of France? Answer with one word.", "Say hi.", "用中文说你好。"]
    prompts = [template.encode_prompt([{"role": "user", "content": q}], tokenizer, "chatml") for q in questions]
    end = [tokenizer.eos_token_id]
    want = their_greedy(theirs, prompts, 8, end, tokenizer.pad_token_id)
    settings = {"max_new_tokens": 8, "eos_ids": end, "pad_id": tokenizer.pad_token_id}
    assert generate.generate(ours, prompts, **settings) == want
    assert generate.generate(ours, prompts[:1], **settings, use_cache=False) == want[:1]
    assert "Paris" in tokenizer.decode(want[0])


def test_sharded_weights_load(tmp_path):
    theirs = tiny("llama")
    ours = as_decoder(theirs, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert all(torch.equal(weight, theirs.state_dict()[name]) for name, weight in ours.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(tmp_path, changes):
    with pytest.raises(InputError, match="the reference decoder knows"):
        as_decoder(tiny("llama", **changes), tmp_path)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.6), (1.5, 12, 0.8), (0.3, 200, 0.05)]
)
def test_the_distribution_that_is_sampled_is_that_of_transformers(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(6, 50) * 3
    want = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        want = TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(None, want)
    got = generate.next_distribution(logits, temperature, top_k, top_p)
    torch.testing.assert_close(got, want.softmax(-1))


def test_sampling_is_repeatable_and_stays_in_the_allowed_set(tmp_path):
    ours = as_decoder(tiny("llama"), tmp_path)
    settings = {"max_new_tokens": 15, "eos_ids": [], "pad_id": PAD, "temperature": 1.3}
    one, two = (generate.generate(ours, PROMPTS, **settings, seed=seed) for seed in (1, 2))
    assert one == generate.generate(ours, PROMPTS, **settings, seed=1)
    assert one != two
    greedy = generate.generate(ours, PROMPTS, max_new_tokens=15, eos_ids=[], pad_id=PAD)
    assert generate.generate(ours, PROMPTS, **settings, top_k=1, seed=1) == greedy


@pytest.mark.parametrize(
    ("changes", "prompts"), [({"top_p": 0.0}, PROMPTS), ({"temperature": -1.0}, PROMPTS), ({}, [[]])]
)
def test_settings_out_of_range_are_errors(tmp_path, changes, prompts):
    ours = as_decoder(tiny("llama"), tmp_path)
    with pytest.raises(InputError):
        generate.generate(ours, prompts, max_new_tokens=2, eos_ids=[2], pad_id=PAD, **changes)
