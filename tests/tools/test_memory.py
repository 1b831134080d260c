"""The forecast of memory: its arithmetic, its agreement with a real run, and the choice of a launcher."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import ROOT
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    Qwen3MoeConfig,
)

from ma_sft import Recipe, RecipeError
from ma_sft.cli import main
from ma_sft.labels.templates import load_tokenizer
from ma_sft.tools.gallery import shipped, show_shipped
from ma_sft.tools.memory import (
    LAUNCHERS,
    _candidates,
    _smaller,
    advice,
    bytes_of,
    forecast,
    memory_table,
    peak_memory,
    plan,
    show_plan,
    start_command,
)


def settings(**more):
    common = {"model_name_or_path": "demo", "dataset_name": "x", "max_length": 256, "per_device_train_batch_size": 1}
    found = Recipe(**{**common, "gradient_checkpointing": False, **more}).resolve()
    load_tokenizer(found)
    return found


def weight_bytes(model):
    """Bytes of a loaded model's weights, bitsandbytes' scales among them."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        scales = [getattr(state, "absmax", None), getattr(nested, "absmax", None), getattr(parameter, "SCB", None)]
        total += parameter.nbytes + sum(scale.nbytes for scale in scales if scale is not None)
    return total


def without_weights(folder, config, tokenizer):
    """A model's folder as a plan needs it."""
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory, smollm2):
    """The demo model with two layers of thirty: a forecast walks through each."""
    config = AutoConfig.from_pretrained(smollm2, num_hidden_layers=2)
    return without_weights(tmp_path_factory.mktemp("two"), config, smollm2)


@pytest.fixture(scope="module")
def small(two_layers, tmp_path_factory):
    """The same with weights."""
    folder = shutil.copytree(two_layers, tmp_path_factory.mktemp("small") / "m")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(two_layers)).bfloat16().save_pretrained(folder)
    return str(folder)


def test_fused_experts_are_simulated_in_any_dtype(tiny_bpe, tmp_path):
    """PyTorch has no shape of their product but in bfloat16; weights that are trained are float32."""
    config = Qwen3MoeConfig(
        **{"vocab_size": 300, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 4},
        **{"num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
        architectures=["Qwen3MoeForCausalLM"],
    )
    folder = without_weights(tmp_path, config, tiny_bpe)
    half, full = (forecast(settings(model_name_or_path=folder, bf16=bf16)) for bf16 in (True, False))
    assert half.weights == full.weights == 4 * half.total
    assert 0 < half.kept <= full.kept and half.activations < full.activations


@pytest.mark.parametrize("nested", [True, False])
def test_bytes_of_4_bit_weights_are_those_of_the_loaded_model(small, nested):
    quantised = {"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": nested, "dtype": "bfloat16"}
    found = forecast(settings(model_name_or_path=small, **quantised))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    real = AutoModelForCausalLM.from_pretrained(small, quantization_config=config, dtype=torch.bfloat16)
    adapter, embedding = 2 * found.trainable, real.get_input_embeddings().weight
    assert abs(found.weights - adapter - weight_bytes(real)) < 0.002 * found.weights
    layers = found.total - found.trainable - embedding.numel()
    assert weight_bytes(real) - embedding.nbytes < 0.7 * layers  # the embedding stays in 16 bits


def test_full_fine_tuning_is_sixteen_bytes_a_parameter(two_layers):
    full = {"model_name_or_path": two_layers, "use_peft": False, "dtype": "float32"}
    found = forecast(settings(**full))
    parameters = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(two_layers)).num_parameters()
    assert found.total == found.trainable == parameters
    assert found.weights == found.gradients == 4 * found.total and found.optimizer == 8 * found.total
    assert found.peak < found.weights + found.gradients + found.optimizer + found.activations + found.reserve
    accumulated = forecast(settings(**full, gradient_accumulation_steps=2))
    # The reserve holds what this process has at the moment, which other tests decide
    assert accumulated.peak - accumulated.reserve > found.peak - found.reserve and accumulated.overlap == 0


@pytest.mark.slow
def test_what_saves_memory_is_forecast_to_save_it(tmp_path, smollm2):
    """With six layers of thirty: a forecast walks through each."""
    small = without_weights(tmp_path, AutoConfig.from_pretrained(smollm2, num_hidden_layers=6), smollm2)

    def of(**more):
        return forecast(settings(model_name_or_path=small, **more))

    lora = of(use_peft=True, lora_r=16)
    assert lora.trainable == 4_884_480 // 5 and lora.gradients == 4 * lora.trainable
    again = of(use_peft=True, gradient_checkpointing=True)
    assert again.kept < 0.2 * lora.kept
    longer = of(use_peft=True, max_length=512)
    assert 1.8 < longer.kept / lora.kept < 3
    flash = of(use_peft=True, attn_implementation="flash_attention_2")
    assert flash.kept == lora.kept, "a plan for GPUs is made where no FlashAttention is installed"
    whole, frozen = of(use_peft=False), of(use_peft=False, freeze=["embed_tokens"])
    assert whole.trainable - frozen.trainable == 49_152 * 576
    eight = of(use_peft=False, optim="adamw_8bit")
    assert 2 < eight.optimizer / eight.trainable < 2.2
    muon = of(use_peft=False, optim="muon")
    assert 4 <= muon.optimizer / muon.trainable < 5
    prompt = of(use_peft=True, peft_config={"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}, merge=False)
    assert prompt.trainable == 8 * 576


def test_measured_peak_is_not_that_of_the_process_that_started_this_one():
    """`e2e/test_demo.py` holds a forecast against it, benchmarks/memory.py those of twelve ways to train."""
    ballast = torch.ones(1 << 28)  # 1 GB, twice what PyTorch alone takes
    imports = "import resource, sys, torch\nfrom pathlib import Path\n"
    code = f"{imports}{inspect.getsource(peak_memory)}\nprint(peak_memory())"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < ballast.nbytes


@pytest.mark.slow
def test_seventy_billion_parameters(tmp_path, smollm2):
    """Llama-3-70B's configuration with a small tokenizer: a plan needs no weights."""
    config = LlamaConfig(
        **{"vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "architectures": ["LlamaForCausalLM"]},
    )
    folder = without_weights(tmp_path, config, smollm2)

    def choice(gpus, **more):
        many = settings(model_name_or_path=folder, gradient_checkpointing=True, bf16=True, **more)
        found = plan(many, gpus, "80GB")
        return found["choice"], found["forecast"], found["launchers"]

    name, found, launchers = choice(8, use_peft=True, dtype="bfloat16")
    assert name == "fsdp2" and not launchers["ddp"]["fits"]
    assert found["total"] - found["trainable"] == 70_553_706_496
    name, found, _ = choice(1, use_peft=True, dtype="bfloat16", load_in_4bit=True)
    assert name == "single_gpu" and 36e9 < found["weights"] < 45e9
    name, _, launchers = choice(8, dtype="float32")
    assert name == "zero3_offload" and launchers["zero3_offload"]["host"] > 70e9 * 14


def test_nothing_fits_says_what_to_try(two_layers, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(f"model_name_or_path: {two_layers}\ndataset_name: none.jsonl\ngradient_checkpointing: false\n")
    assert main(["plan", str(path), "--gpus", "1", "--gpu_memory", "300MB", "--max_length", "256"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "nothing fits, not even one row at a time; try use_peft=true with load_in_4bit=true, a shorter" in out


def test_the_printed_command_keeps_flags():
    command = "ma-sft train 'my rows.yaml' --max_length 64 --launcher ddp --gpus 2"
    assert start_command("ddp", 2, ["my rows.yaml", "--max_length", "64"]) == command
    assert start_command("single_gpu", 1, ["--seed", "1"]) == "ma-sft train --seed 1"


def test_a_plan_says_what_is_faster_for_nothing_and_leaves_the_settings_alone(two_layers):
    short = {"model_name_or_path": two_layers, "use_peft": True, "max_length": 64}
    mine = settings(**short, gradient_checkpointing=True)
    before = mine.training.to_dict()
    found = plan(mine, 1, "80GB")
    assert found["choice"] == "single_gpu"
    whole, off = found["launchers"]["single_gpu"]["total"], forecast(settings(**short, use_cpu=True))
    options = {"gradient_checkpointing_kwargs": {"selective": True, "use_reentrant": False}}
    selective = forecast(settings(**short, gradient_checkpointing=True, **options))
    assert found["forecast"]["kept"] < selective.kept < off.kept
    assert any("gradient_checkpointing=false fits too" in line for line in advice(mine, found))
    narrow = {**found, "memory": whole * 1.001}
    assert not any("=false" in line for line in advice(mine, narrow))
    assert mine.training.to_dict() == before


def test_smaller_batches_checkpointing_and_4_bits_come_before_offload(two_layers, monkeypatch, capsys):
    """With the memory of a GPU taken away little by little."""
    monkeypatch.setenv("COLUMNS", "80")
    mine = settings(model_name_or_path=two_layers, use_peft=True, per_device_train_batch_size=4, max_length=128)
    whole = plan(mine, 1, "80GB")
    assert (whole["choice"], whole["changes"]) == ("single_gpu", {})
    less = plan(mine, 1, f"{whole['total'] * 0.98 / 1e6}MB")
    halves, ones = ({"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size} for size in (2, 1))
    assert (less["choice"], less["changes"]) == ("single_gpu", halves) and less["total"] < whole["total"]
    parts = whole["launchers"]["single_gpu"]
    least = plan(mine, 1, f"{(parts['total'] - parts['activations'] * 0.6) / 1e6}MB")
    assert least["choice"] == "single_gpu" and least["changes"] == ones
    again = {**ones, "gradient_checkpointing": True}
    assert [*_smaller(mine)] == [halves, ones, again, {**again, "load_in_4bit": True}]
    show_plan(mine, less, ["my rows.yaml", "--seed", "1"])
    said = capsys.readouterr().out
    assert "single_gpu fits with per_device_train_batch_size=2 gradient_accumulation_steps=2" in said
    command = "ma-sft train 'my rows.yaml' --seed 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    assert said.splitlines()[-1] == command


def test_a_plan_reads_at_80_columns(two_layers, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    mine = settings(model_name_or_path=two_layers, use_peft=True, max_length=64)
    show_plan(mine, plan(mine, 8, "80GB"), ["mine.yaml"])
    table = [line for line in capsys.readouterr().out.splitlines() if line[:1] in "┃│├┡┏└"]
    assert max(map(len, table)) <= 80
    heads = table[1].replace("┃", " ").split()
    assert heads == ["ddp", "zero1", "zero2", "fsdp2", "zero3", "zero3_offload"]
    names = [line.split("│")[1].strip() for line in table if line.startswith("│")]
    terms = ["weights", "gradients", "optimizer", "activations", "CUDA, allocator", "total", "in host memory", "fits"]
    assert names == terms


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_of_recipes_folds(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    show_shipped()
    said = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert max(map(len, said.splitlines())) <= width and "…" not in said
    assert all(name in said for name in shipped())


def test_a_run_says_of_which_rows_its_forecast_is(two_layers):
    mine = settings(model_name_or_path=two_layers, use_peft=True, max_length=64)
    short, whole = (
        dict(memory_table(mine, torch.nn.Linear(1, 1), forecast(mine, longest)))["peak of memory"]
        for longest in (32, 64)
    )
    assert short.endswith("at 32 tokens, the longest row (`ma-sft plan` takes max_length, 64)") and " GB " in short
    assert whole.endswith("at rows of 64 tokens")


def test_long_rows_are_split_over_gpus(two_layers):
    mine = {"model_name_or_path": two_layers, "max_length": 1024, "per_device_train_batch_size": 1}
    options = settings(**mine, gradient_checkpointing=True)
    wide = plan(options, 4, "80GB")["launchers"]
    assert wide["zero1"]["optimizer"] < wide["ddp"]["optimizer"] and wide["zero1"]["total"] > wide["zero2"]["total"]
    found = plan(options, 4, f"{0.95 * min(parts['total'] for parts in wide.values() if not parts['host']) / 1e9}GB")
    for name in ("cp", "sp"):
        assert name not in wide and found["launchers"][name]["activations"] < 0.4 * wide["zero3"]["activations"]
    assert found["choice"] == "cp"
    packed = {launcher.name for launcher in _candidates(settings(**mine, packing=True), 4)}
    assert "zero3" in packed and not {"cp", "sp"} & packed


def test_launchers_are_what_their_files_say():
    known = {launcher.name: launcher for launcher in LAUNCHERS}
    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        if path.stem in ("cpu", "multi_node", "fp8"):
            continue
        launcher, config = known[path.stem], yaml.safe_load(path.read_text())
        deepspeed, kind = config.get("deepspeed_config", {}), config["distributed_type"]
        stage = 3 if kind == "FSDP" else deepspeed.get("zero_stage", 0)
        assert launcher.deepspeed == (kind == "DEEPSPEED") and launcher.many == (kind != "NO"), path
        assert launcher.stage == stage and launcher.sequence == ("parallelism_config" in config), path
        assert launcher.offload == (deepspeed.get("offload_optimizer_device", "none") != "none"), path


def test_sizes():
    sizes = {"80GB": 80e9, "80gb": 80e9, "24 GiB": 24 * 2**30, "512m": 512e6}
    assert {size: bytes_of(size) for size in sizes} == sizes
    with pytest.raises(RecipeError, match="a size like 80GB"):
        bytes_of("24")


@pytest.mark.slow
def test_command_line(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("model_name_or_path: demo\ndataset_name: none.jsonl\nuse_peft: true\nmax_length: 128\n")
    assert main(["plan", str(path), "--json", "--gpus", "2", "--gpu_memory", "16GB", "--lora_r", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["choice"] == "ddp" and found["forecast"]["trainable"] == 4_884_480 // 2
    assert main(["plan", str(path), "--gpus", "0"]) == 0
    out = capsys.readouterr().out
    assert "134,515,008 parameters" in out and f"ma-sft train {path}" in out
    flags = ["--model_name_or_path", "demo", "--dataset_name", "x", "--max_length", "64"]
    assert main(["plan", *flags, "--rehearse", "false", "--gpus", "0"]) == 0
    assert f"\nma-sft train {' '.join(flags)} --rehearse false\n" in capsys.readouterr().out
    assert main(["plan", str(path), "--gpus", "2"]) == (0 if torch.cuda.is_available() else 2)
    assert main(["plan", str(path), "--gpus", "0", "--max_length", "none"]) == 2
