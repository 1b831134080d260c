"""Adapters: what is trained, what is refused before any weight is loaded, and merges that say what the adapter says."""

import functools
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from ma_sft import RecipeError, RunError, run
from ma_sft.config import Recipe
from ma_sft.release import merge as merging
from ma_sft.release.manifest import read_weights, write_manifest
from ma_sft.release.merge import find_base, load_adapter, merge
from ma_sft.training.adapters import fitting_adapter, freeze, lora_config, with_new_tokens
from ma_sft.training.twin import shrink

BASE = {"model_name_or_path": "demo", "dataset_name": "x"}


def settings(**more):
    return Recipe(**{**BASE, "use_peft": True, **more}).resolve()


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_bpe):
    """A two-layer Llama with the tiny tokenizer, its embedding tied or not."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bpe)
    sizes = {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2, "initializer_range": 0.2},
    }

    @functools.cache
    def make(tied=True, seed=0, **more):
        folder = tmp_path_factory.mktemp("base")
        set_seed(seed)
        config = LlamaConfig(**{**sizes, "tie_word_embeddings": tied, **more})
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def moved(model, scale=0.1):
    """The model, each of whose trained weights was moved as training would."""
    set_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn_like(parameter)
    return model


def adapter(base, folder, scale=0.1, **config):
    """A trained adapter on `base`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": "all-linear", **config})
    moved(get_peft_model(model, config), scale).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A trained adapter on the tied base; whoever changes it takes a copy."""
    return adapter(base(), tmp_path_factory.mktemp("trained") / "adapter")


def logits(model):
    with torch.no_grad():
        return model(torch.arange(100, 150)[None]).logits


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        ({"lora_preset": "mini"}, {"target_modules": {"q_proj", "v_proj"}, "r": 32, "lora_alpha": 8}),
        ({"lora_preset": "attention"}, {"target_modules": {"q_proj", "k_proj", "v_proj", "o_proj"}, "r": 16}),
        ({"lora_preset": "all-linear"}, {"target_modules": "all-linear", "r": 16, "lora_alpha": 32}),
        # What the recipe sets wins over the preset
        ({"lora_preset": "mini", "lora_r": 4, "lora_target_modules": ["k_proj"]},
         {"r": 4, "lora_alpha": 8, "target_modules": {"k_proj"}}),
        ({"lora_config": {"init_lora_weights": "gaussian", "use_rslora": True, "layers_to_transform": [1]},
          "lora_preset": "mini", "use_dora": True},
         {"init_lora_weights": "gaussian", "use_rslora": True, "layers_to_transform": [1], "use_dora": True}),
        ({"lora_config": '{"r": 3}'}, {"r": 3}),
    ],
)  # fmt: skip
def test_presets_and_any_field_of_peft(more, fields):
    given = settings(**more)
    config = lora_config(given)
    assert {key: getattr(config, key) for key in fields} == fields and config.task_type == "CAUSAL_LM"
    assert given.model.lora_r == more.get("lora_r", 16), "nothing is written into the settings"


def test_defaults_of_the_methods():
    assert settings().training.learning_rate == 2e-4 and settings().training.optim == "adamw_torch_fused"
    assert settings(use_peft=False).training.learning_rate == 2e-5
    both = Recipe(**BASE, use_peft=True, learning_rate=8e-4, full_learning_rate=1e-4)
    for flags, rate in (("", 8e-4), ("--use_peft false", 1e-4), ("--use_peft false --learning_rate 3e-5", 3e-5)):
        assert both.resolve(flags.split()).training.learning_rate == rate
    qlora = Recipe(**BASE, use_peft=True).resolve(["--load_in_4bit", "true"])
    assert qlora.model.bnb_4bit_quant_type == "nf4" and qlora.model.use_bnb_nested_quant  # as in the paper
    assert qlora.training.optim == "paged_adamw_8bit"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_config": "{r: 3}"}, "a JSON object expected"),
        ({"lora_config": {"init_lora_weights": "eva"}}, "needs calls of PEFT's own before or after training"),
        ({"lora_config": {"layers_pattern": "h"}}, "`layers_pattern` cannot be used when `target_modules` is a str"),
        ({"lora_config": {"init_lora_weights": "pissa_niter_4"}}, "needs calls of PEFT's own before or after"),
        ({"lora_config": {"use_doraa": True}}, "lora_config: .* unexpected keyword argument 'use_doraa'"),
        ({"peft_config": {"peft_type": "LOHA", "rank": 3}}, "peft_config: .* unexpected keyword argument 'rank'"),
        ({"peft_config": {"peft_type": "LOCON"}}, "peft_config: KeyError: 'LOCON'"),
        (
            {"peft_config": {"peft_type": "lora", "init_lora_weights": "eva"}},
            "peft_config: init_lora_weights='eva' needs",
        ),
        ({"freeze": ["embed"]}, "freeze is for full fine-tuning"),
    ],
)
def test_settings_that_cannot_be(more, message):
    with pytest.raises(RecipeError, match=message):
        lora_config(settings(**more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_target_modules": ["q_proj", "query"]}, "'query' matches nothing in LlamaForCausalLM; the linear"),
        ({"lora_target_modules": ["q_proj"], "lora_modules_to_save": ["head"]}, "modules_to_save: 'head' matches"),
        ({"peft_config": {"peft_type": "LOHA", "target_modules": ["no"]}}, "target_modules: 'no' matches nothing"),
    ],
)  # fmt: skip
def test_targets_are_checked_against_the_model(base, more, message):
    model = AutoModelForCausalLM.from_pretrained(base())
    with pytest.raises(RecipeError, match=message):
        fitting_adapter(settings(**more), model)
    for targets in ("all-linear", ["q_proj", "layers.1.mlp.up_proj"], r".*\.0\..*_proj"):
        assert fitting_adapter(settings(lora_target_modules=targets), model).target_modules
    assert not any(name.startswith("lora") for name, _ in model.named_parameters())
    with pytest.raises(RecipeError, match=r"'layers.7' finds no parameter; there are .*model.layers.N.mlp.down_proj"):
        freeze(model, ["layers.7"])


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tied", "config"),
    [
        (True, {}),
        (False, {"use_dora": True}),
        (True, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
        (True, {"trainable_token_indices": {"embed_tokens": [3, 120]}}),
        (False, {"trainable_token_indices": {"embed_tokens": [3, 120]}, "modules_to_save": ["lm_head"]}),
        (False, {"target_modules": ["embed_tokens", "q_proj"]}),
        (True, {"bias": "lora_only"}),
    ],
)
def test_merged_model_says_what_the_adapter_says(base, tmp_path, tied, config):
    folder = base(tied)
    run = adapter(folder, tmp_path / "adapter", **config)
    found = merge(run, tmp_path / "merged", dtype="float32")
    ours = logits(load_adapter(run, dtype=torch.float32))
    untouched = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (ours - untouched).abs().max() > 0.1
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert found.difference < 1e-4 and found.agreement == 1 and found.how == "float32"
    assert "whole model in memory" in found.note if config.get("bias") else not found.note


def test_merge_keeps_the_dtype_of_the_base_and_says_what_rounding_did(base, trained, tmp_path):
    found = merge(trained, tmp_path / "merged")
    merged, before = (load_file(f / "model.safetensors") for f in (tmp_path / "merged", base()))
    assert merged.keys() == before.keys()
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    assert 1e-4 < found.difference < 0.1 * found.largest
    assert "its logits differ from the adapter model's by at most" in str(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("fault", ["none", "missing", "scaled", "swapped"])
def test_a_wrong_merge_is_never_kept_and_a_right_one_always(base, tmp_path, monkeypatch, dtype, fault):
    """The adapter changes weights by far less than rounding to bfloat16 does."""

    def wrong(*args):
        updates = layer_updates(*args)
        first, second = (name for name in updates if "q_proj" in name)
        right = updates[first]
        if fault == "missing":
            del updates[first]
        if fault == "scaled":
            updates[first] = lambda weight: weight + 1.5 * (right(weight) - weight)
        if fault == "swapped":
            updates[first], updates[second] = updates[second], right
        return updates

    layer_updates = merging._layer_updates
    monkeypatch.setattr(merging, "_layer_updates", wrong)
    run, out = adapter(base(), tmp_path / "adapter", scale=1e-3), tmp_path / "merged"
    if fault == "none":
        found = merge(run, out, dtype=dtype)
        assert found.difference < 0.05 * found.largest
        return
    with pytest.raises(RunError, match=r"more than rounding: .*q_proj.weight in its files"):
        merge(run, out, dtype=dtype)
    assert not out.exists()


def test_rounding_may_send_a_token_to_another_expert(smollm2, tmp_path):
    """Logits of a mixture of experts differ then, though each weight is the right one."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 2, "pad_token_id": 2}
    config = GptOssConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)
    for seed in range(3):
        torch.manual_seed(seed)
        GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / f"base-{seed}")
        tokenizer.save_pretrained(tmp_path / f"base-{seed}")
        run = adapter(tmp_path / f"base-{seed}", tmp_path / f"adapter-{seed}", use_dora=True)
        assert merge(run, tmp_path / f"merged-{seed}").difference


# -- bad input --------------------------------------------------------------------------------------------------------


def refused(run, out, **more):
    with pytest.raises(RecipeError) as error:
        merge(run, out, **more)
    assert not out.exists() and not [*out.parent.glob(f".{out.name}*")]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_adapter_of_another_or_a_quantised_model(base, trained, tmp_path):
    out = tmp_path / "out"
    wider = refused(trained, out, base=str(base(hidden_size=64)))
    assert "was trained on another model" in wider and "--base" in wider
    fewer = refused(trained, out, base=str(base(num_hidden_layers=1)))
    assert "was trained on another model" in fewer and "layers.1" in fewer
    run = shutil.copytree(trained, tmp_path / "adapter")
    described = {"name_or_path": str(base()), "weights": read_weights(base()).digest, "quantization": None}
    write_manifest(run, {"format": 1, "base_model": described})
    same_shape = refused(run, out, base=str(base(seed=5)))
    assert "holds other weights; pass the right base model" in same_shape
    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    quantised = AutoModelForCausalLM.from_pretrained(base(), quantization_config=four_bits)
    quantised.save_pretrained(tmp_path / "quantised")
    message = refused(trained, out, base=str(tmp_path / "quantised"))
    assert "is quantised (bitsandbytes)" in message and "16-bit" in message


def test_shards_are_written_without_holding_the_model_and_may_not_be_missing_or_broken(trained, tmp_path, monkeypatch):
    many, out = tmp_path / "many", tmp_path / "out"
    merge(trained, tmp_path / "one")
    monkeypatch.setattr("ma_sft.release.merge.SHARD_BYTES", 20_000)
    merge(trained, many)
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "one", many))
    assert logits(one).equal(logits(other))
    assert merge(adapter(many, tmp_path / "adapter2"), tmp_path / "again").difference is not None
    shard = many / files[0]
    shard.rename(tmp_path / "kept")
    assert "many lacks 1 of" in refused(trained, out, base=str(many))
    for content in ((tmp_path / "kept").read_bytes()[:-10], b"not a tensor in sight"):
        shard.write_bytes(content)
        assert "is no whole safetensors file" in refused(trained, out, base=str(many))
    assert "is no file or folder here and cannot be had from a hub" in refused(trained, out, base="no/such-model")


def test_broken_adapters(base, trained, tmp_path):
    run, out = shutil.copytree(trained, tmp_path / "adapter"), tmp_path / "out"
    tensors = load_file(run / "adapter_model.safetensors")
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, run / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        merge(run, out)
    assert not out.exists()
    tokenizer = AutoTokenizer.from_pretrained(base())
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(run)
    assert "has 2 tokens more than the embedding" in refused(run, out)
    path = run / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_tomorrow": True, "peft_version": "9.9.9"}))
    message = refused(run, out)
    assert "made by PEFT 9.9.9 and sets use_tomorrow" in message and "pip install -U peft" in message
    path.write_text("{}")
    assert "is no adapter's configuration" in refused(run, out)


@pytest.mark.parametrize("quantization", [None, BitsAndBytesConfig(load_in_4bit=True)], ids=["16 bits", "4 bits"])
@pytest.mark.parametrize(
    ("tied", "config", "rows", "whole"),
    [
        (True, {}, [0], set()),
        (True, {"trainable_token_indices": [3]}, [3, 0], set()),
        (False, {"trainable_token_indices": {"embed_tokens": [3]}}, [3, 0], {"lm_head"}),
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}, None, {"embed_tokens", "lm_head"}),
        (True, {"modules_to_save": ["embed_tokens"]}, None, {"embed_tokens"}),
    ],
)
def test_new_tokens_are_trained_beside_what_the_adapter_trains(base, tied, config, rows, whole, quantization):
    model = AutoModelForCausalLM.from_pretrained(base(tied), quantization_config=quantization)
    tokenizer = AutoTokenizer.from_pretrained(base(tied))
    tokenizer.add_tokens(["<new>"])
    new = tokenizer.convert_tokens_to_ids("<new>")
    peft = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **config)
    model = get_peft_model(with_new_tokens(model, ["<new>"], tokenizer, peft), peft)
    expected = {"embed_tokens": [row or new for row in rows]} if rows else None
    assert peft.trainable_token_indices == expected and whole <= {*(peft.modules_to_save or ())}
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    head = model.get_output_embeddings()
    trained = getattr(head, "modules_to_save", None) or getattr(head, "token_adapter", None)
    assert any(parameter.requires_grad for parameter in trained.parameters()), "the head learns to write them"


def test_new_tokens_are_part_of_the_merge(base, tmp_path):
    """A tokenizer that grew, with rows that the adapter trained: the merged model has them, the base has not."""
    tokenizer, folder = AutoTokenizer.from_pretrained(base()), tmp_path / "adapter"
    old = len(tokenizer)
    tokenizer.add_tokens(["<a>", "<b>"])
    model = AutoModelForCausalLM.from_pretrained(base())
    model.resize_token_embeddings(len(tokenizer))
    rows = {"embed_tokens": [old, old + 1]}
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=rows)
    model = moved(get_peft_model(model, config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert find_base(folder)[1].vocab_size == old + 2
    saved = load_file(folder / "adapter_model.safetensors")  # with copies of the embedding
    copies = {name: value * 1.02 for name, value in saved.items() if len(value) == old + 2}
    assert copies
    save_file({**saved, **copies}, folder / "adapter_model.safetensors")
    merge(folder, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[5, old, old + 1, 9]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model.float()(ids).logits, atol=1e-3, rtol=1e-3)


def test_text_of_a_model_of_text_and_images(tiny_bpe, tmp_path):
    """It is loaded by its own class; its towers are not trained, and its processor's files go with the merged model."""
    config = AutoConfig.for_model("gemma3", architectures=["Gemma3ForConditionalGeneration"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_bpe)
    folder, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    Gemma3ForConditionalGeneration(shrink(config, len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    rows.write_text('{"question": "Hi?", "answer": "Ho."}\n' * 8)
    chosen = {"model_name_or_path": str(folder), "dataset_name": str(rows), "report_to": "none", "max_steps": 1}
    for use_peft, saved in ((True, "merged"), (False, "model")):
        out = tmp_path / saved
        run(Recipe(**chosen, use_peft=use_peft, max_length=64, output_dir=str(out), rehearse=False))
        assert (out / saved / "preprocessor_config.json").is_file()
        old, new = load_file(folder / "model.safetensors"), load_file(out / saved / "model.safetensors")
        moved = {name.split("layers")[0] for name in old if not torch.equal(old[name].float(), new[name].float())}
        assert any("language_model" in name for name in moved) and not any("tower" in name for name in moved)
