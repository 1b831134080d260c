"""LoRALinear is PEFT's layer: forward, gradients, merged weights and files."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference.models import PAD, as_decoder, examples, tiny
from torch import nn

from ma_sft.reference import InputError, collate, lora, train

PATTERN = r"(q|v|down)_proj$"


def randomise(module):
    torch.manual_seed(5)
    for name, weight in module.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight.data, std=0.3)


def peft_model(**settings):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **settings)
    found = get_peft_model(tiny("qwen3"), config)
    randomise(found)
    return found


def from_peft(theirs, folder):
    theirs.save_pretrained(folder / "adapter")
    ours = as_decoder(tiny("qwen3"), folder / "base")
    lora.load_adapter(ours, folder / "adapter")
    return ours


def batch():
    return collate.collate(examples(3), PAD)


def their_logits(theirs, inputs):
    """Of real tokens; at padding the two models differ and nothing reads them."""
    mask = inputs["attention_mask"]
    return theirs(input_ids=inputs["input_ids"], attention_mask=mask).logits[mask.bool()]


def our_logits(ours, inputs):
    return ours(inputs["input_ids"], inputs["attention_mask"])[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_a_peft_adapter_loads_with_equal_outputs_gradients_and_merged_weights(tmp_path, settings):
    theirs = peft_model(**settings)
    ours = from_peft(theirs, tmp_path)
    inputs = batch()
    base = our_logits(as_decoder(tiny("qwen3"), tmp_path / "base"), inputs)
    mine, other = our_logits(ours, inputs), their_logits(theirs, inputs)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert (mine - base).abs().max() > 0.1, "the adapter does something"

    (mine.log_softmax(-1)[:, 3].sum() / 50).backward()
    (other.log_softmax(-1)[:, 3].sum() / 50).backward()
    their_gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    our_gradients = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert len(our_gradients) == len(their_gradients) == 2 * 2 * 3
    for name, gradient in our_gradients.items():
        theirs_gradient = their_gradients[f"base_model.model.{name}.default.weight"]
        torch.testing.assert_close(gradient, theirs_gradient, rtol=1e-5, atol=1e-5)

    merged = theirs.merge_and_unload().state_dict()
    lora.merge(ours)
    assert ours.state_dict().keys() == merged.keys()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_our_adapter_loads_in_peft(tmp_path, normalise):
    ours = as_decoder(tiny("qwen3"), tmp_path / "base")
    names = lora.inject(ours, PATTERN, r=4, alpha=0.5, normalise=normalise)
    assert len(names) == 6
    randomise(ours)
    lora.save_adapter(ours, tmp_path / "adapter", base_model="tiny")
    theirs = PeftModel.from_pretrained(tiny("qwen3"), tmp_path / "adapter")
    inputs = batch()
    torch.testing.assert_close(our_logits(ours, inputs), their_logits(theirs, inputs), rtol=1e-5, atol=1e-5)
    layer = ours.model["layers"][0].self_attn.q_proj
    assert layer.scale == (0.5 / 4 if normalise else 0.5)


def test_merging_keeps_the_outputs_and_unmerging_gives_the_weight_back():
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    before = base.weight.detach().clone()
    layer = lora.LoRALinear(base, r=2, alpha=3.0)
    randomise(layer)
    x = torch.randn(4, 6)
    apart = layer(x)
    layer.merge()
    layer.merge()
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(layer(x), apart, rtol=1e-5, atol=1e-6)
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("init", "a_learns", "b_learns"), [("B=0", False, True), ("A=0", True, False), ("A=B=0", False, False)]
)
def test_what_learns_follows_from_the_initialisation_and_the_rest_stays(tmp_path, init, a_learns, b_learns):
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    layer = lora.LoRALinear(base, r=2, alpha=3.0, init=init)
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), base(x)), "the first output is the base model's"
    layer(x).pow(2).sum().backward()
    assert (layer.lora_A.grad.abs().max() > 0) == a_learns
    assert (layer.lora_B.grad.abs().max() > 0) == b_learns
    assert layer.weight.grad is None

    ours = as_decoder(tiny("llama"), tmp_path)
    lora.inject(ours, PATTERN, r=2, alpha=4, init=init)
    frozen = {n: p.clone() for n, p in ours.named_parameters() if not p.requires_grad}
    settings = train.Settings(max_steps=4, learning_rate=0.01, warmup_steps=1, weight_decay=0.0)
    assert len(train.train(ours, [[e] for e in examples(8)] * 4, settings, PAD)) == 4
    assert all(torch.equal(p, frozen[n]) for n, p in ours.named_parameters() if n in frozen)
    moved = any(bool(layer.update().abs().max() > 0) for layer in lora.adapters(ours).values())
    assert moved == (a_learns or b_learns)


def test_what_is_not_plain_lora_is_refused(tmp_path):
    ours = as_decoder(tiny("llama"), tmp_path / "base")
    with pytest.raises(InputError, match="finds no linear layer"):
        lora.inject(ours, "query_key_value", r=2, alpha=4)
    theirs = peft_model(use_dora=True)
    theirs.save_pretrained(tmp_path / "dora")
    with pytest.raises(InputError, match="use_dora is True"):
        lora.load_adapter(ours, tmp_path / "dora")
