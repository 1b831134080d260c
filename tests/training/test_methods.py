"""Each way to train takes a real step, changes what it should and nothing else, and leaves a model that says so."""

import copy
import json
import shutil

import pytest
import torch
from datasets import Dataset
from helpers import write_rows
from transformers import AutoModelForCausalLM

from ma_sft import Recipe, RecipeError, make_trainer, run
from ma_sft.release.manifest import read_manifest
from ma_sft.release.merge import load_adapter, merge
from ma_sft.training.optimizers import own_optimizer
from ma_sft.training.quantized import quantization
from ma_sft.training.trainer import check_early


@pytest.fixture
def train(tiny_bpe, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ({"prompt": f"{i}?", "completion": f"It is {i}."} for i in range(16)))
    common = {
        **{"model_name_or_path": str(tiny_bpe), "dataset_name": rows, "output_dir": str(tmp_path / "run")},
        **{"learning_rate": 0.05, "max_steps": 2, "report_to": [], "save_strategy": "no", "use_peft": True},
        "rehearse": False,
    }
    return lambda **settings: (tmp_path / "run", run(Recipe(**{**common, **settings})))


def logits(model):
    with torch.no_grad():
        return model(torch.arange(100, 140)[None]).logits.float()


def plain(text):
    """Printed text without the borders of tables and their line breaks."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize(
    ("method", "quantization"),
    [
        ({"use_dora": True}, None),
        ({"loraplus_lr_ratio": 8.0}, None),
        ({"load_in_4bit": True}, "4-bit nf4, double"),
        ({"load_in_8bit": True}, "8-bit"),
        ({"peft_config": {"peft_type": "LOHA", "r": 4}, "optim": "muon"}, None),
    ],
)
def test_adapter(train, tiny_bpe, method, quantization, capsys):
    out, summary = train(**method)
    said = plain(capsys.readouterr().out)
    untouched = logits(AutoModelForCausalLM.from_pretrained(tiny_bpe, dtype=torch.float32))
    adapter = logits(load_adapter(out / "adapter", dtype=torch.float32))
    merged = logits(AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32))
    assert (adapter - untouched).abs().max() > 1e-2
    torch.testing.assert_close(merged, adapter, atol=2e-3, rtol=1e-3)
    assert summary["merge_max_logit_difference"] < 2e-3
    assert read_manifest(out / "adapter")["base_model"]["quantization"] == quantization
    assert (out / "adapter" / "adapter_config.json").exists()
    if quantization:
        assert "in 16 bits before" in said and "quantised" in said
        assert "merged into it as it was before" in said
        assert "states of paged_adamw_8bit" in said
        if not torch.cuda.is_available():
            assert "bitsandbytes on the CPU nothing is paged" in said


@pytest.mark.parametrize("bits", [4, 8])
def test_an_evaluation_does_not_change_the_gradients_of_a_quantised_model(tiny_bpe, tmp_path, bits):
    """bitsandbytes repacks 4-bit weights at the first evaluation on some CPUs, and then has no backward pass."""
    rows = Dataset.from_list([{"prompt": "?", "completion": "So."}])
    places = {"model_name_or_path": str(tiny_bpe), "output_dir": str(tmp_path), "report_to": []}
    recipe = Recipe(**places, use_peft=True, **{f"load_in_{bits}bit": True})
    model = make_trainer(recipe, train_dataset=rows).model
    ids = torch.arange(100, 164)[None]

    def gradient():
        torch.manual_seed(0)
        model.train()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])

    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    before = gradient()
    model.eval()
    with torch.no_grad():
        model(ids)
    assert before.norm() > 0
    torch.testing.assert_close(gradient(), before, atol=0.02 * before.abs().max().item(), rtol=0.02)


def test_prompt_tuning_is_saved_and_loaded(train, tiny_bpe):
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    out, summary = train(peft_config=config, merge=False, test_size=2, generate_eval=1, max_new_tokens=2)
    untouched = logits(AutoModelForCausalLM.from_pretrained(tiny_bpe, dtype=torch.float32))
    adapter = logits(load_adapter(out / "adapter", dtype=torch.float32))
    assert adapter.shape[1] == 4 + 40 and (adapter[:, 4:] - untouched).abs().max() > 1e-2
    assert summary["eval_loss"] > 0 and not (out / "merged").exists()
    with pytest.raises(RecipeError, match="PROMPT_TUNING trains tokens before a sequence, and no weight has them"):
        merge(out, out / "merged")


def test_muon_for_matrices_and_adamw_for_the_rest(tiny_bpe):
    settings = Recipe(model_name_or_path=str(tiny_bpe), dataset_name="x", optim="muon", weight_decay=0.1).resolve()
    factory, kwargs = own_optimizer(settings)
    models = [AutoModelForCausalLM.from_pretrained(tiny_bpe) for _ in range(2)]
    first, second = (factory()(model, **kwargs) for model in models)

    def step(model, optimizer):
        ids = torch.arange(100, 140)[None]
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(models[0], first)
    kinds = {name: {*first.state[p]} for name, p in models[0].named_parameters()}
    assert {name for name, state in kinds.items() if state == {"momentum_buffer"}} == {
        name for name in kinds if "_proj" in name
    }
    assert {"exp_avg", "exp_avg_sq"} <= kinds["model.embed_tokens.weight"] & kinds["model.norm.weight"]
    assert [group["weight_decay"] for group in first.param_groups] == [0.1, 0.1, 0.0]
    before, after = (m.model.layers[0].mlp.up_proj.weight for m in models[::-1])
    moved = torch.linalg.svdvals((after - before * (1 - 2e-5 * 0.1)) / 2e-5)
    assert moved.min() > 0.3 * moved.max() and moved.max() < 3  # near to orthogonal, of the size of AdamW's step
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for pair in zip(models, (first, second), strict=True):
        step(*pair)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert one.equal(other)


def test_quantisations_of_transformers(tiny_bpe, tmp_path):
    def made(**config):
        recipe = Recipe(model_name_or_path=str(tiny_bpe), dataset_name="x", use_peft=True, quantization_config=config)
        return quantization(recipe.resolve(["--output_dir", str(tmp_path)]))

    assert made(load_in_4bit=True, bnb_4bit_quant_type="nf4").bnb_4bit_quant_type == "nf4"
    int8 = {"_type": "Int8WeightOnlyConfig", "_data": {}, "_version": 2}
    for config, message in (
        ({"quant_method": "torchao", "quant_type": {"default": int8}}, "pip install torchao"),
        ({"quant_method": "hqq", "nbits": 4}, "HQQ version .* is not available"),
        ({"quant_method": "gptq", "bits": 4}, r"requires optimum \(`pip install optimum`\)"),
        ({"quant_method": "awq"}, "does require the model to be pre-quantized"),
        ({"quant_method": "mxfp4"}, "triton" if not torch.cuda.is_available() else ""),
        ({"quant_method": "nf5"}, "Unknown quantization type, got nf5"),
        ({"bits": 4}, "has no `quant_method`"),
    ):
        with pytest.raises(RecipeError, match=f"^quantization_config: .*{message}"):
            made(**config)
    saved = tmp_path / "gptq"
    shutil.copytree(tiny_bpe, saved)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(RecipeError, match="pip install optimum"):
        check_early(Recipe(model_name_or_path=str(saved), dataset_name="x", use_peft=True).resolve())


def test_full_fine_tuning_with_frozen_layers(train, tiny_bpe):
    out, _ = train(use_peft=False, freeze=["embed_tokens", r"layers\.0\."], learning_rate=1e-3)
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(f).named_parameters()) for f in (tiny_bpe, out / "model")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("layers.1." in name or name == "model.norm.weight" for name in changed)
    assert read_manifest(out / "model")["kind"] == "model" and not (out / "model" / "training_args.bin").exists()
