"""The rehearsal: what would go wrong after the labels are proven is one line before a row is read."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from helpers import refusal, write_rows
from transformers import AutoConfig, AutoTokenizer, OPTConfig, OPTForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WITH_IMAGES

from ma_sft import RecipeError
from ma_sft.config import Recipe
from ma_sft.labels.templates import load_tokenizer
from ma_sft.training import rehearsal
from ma_sft.training.rehearsal import rehearse, rehearse_here

NEW = ["<|im_start|>", "<|im_end|>"]


def rehearsed(kind, *, tied=None, added=(), config=None, **more):
    """The line of a rehearsal for transformers' own configuration of a model type; nothing is loaded."""
    config = AutoConfig.for_model(kind, **(config or {}))
    config.architectures = [CLASSES.get(kind) or WITH_IMAGES[kind]]
    if tied is not None:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
    chosen = {"model_name_or_path": "/none", "dataset_name": "x", "report_to": "none", "max_length": 512, **more}
    tokens = config.get_text_config().vocab_size + len(added)
    return rehearse_here(Recipe(**chosen).resolve(), config, tokens, list(added))


def slow(*kinds):
    """Models like one that is tried with the fast tests."""
    return [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def refused(kind, **more):
    with pytest.raises(RecipeError) as error:
        rehearsed(kind, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


# Gemma 4 has layers of other sizes among its own, and Mistral Small 3 is a model of text and images
@pytest.mark.parametrize(
    ("kind", "use_peft"),
    [
        *((kind, True) for kind in ("llama", "qwen3", "gpt2", "gemma2", "qwen3_moe", "gemma4_text", "mistral3")),
        *((kind, False) for kind in ("llama", "gpt2", "qwen3_moe")),
    ],
)
def test_what_holds_is_told(kind, use_peft):
    line = rehearsed(kind, packing=True, use_peft=use_peft)
    assert "a step moves what is trained" in line or kind in ("qwen3_moe", "gpt2")
    assert line.startswith("rehearsed on a twin of 0.") and "packing keeps documents apart to" in line
    assert ("merges to" in line) == use_peft and ("the model loads to" in line) != use_peft


def test_layers_that_peft_cannot_adapt_or_refuses_are_left_out_of_all_linear():
    """A router is a linear layer for PEFT, which cannot adapt what returns a tuple (Phi-3.5-MoE, Llama 4)."""
    assert "merges to" in rehearsed("phimoe", use_peft=True, router_aux_loss_coef=0.0)
    assert "merges to" in rehearsed("mamba", use_peft=True)
    message = refused("phimoe", use_peft=True)  # TRL looks for the number of experts by another name
    assert message.startswith("set router_aux_loss_coef=0.0; rehearsed on a twin: AttributeError")


def test_rotary_parameters_of_each_frequency():
    """Phi-3 with 128k positions and Phi-4-mini; Qwen2.5-VL shares them out to height, width and time."""
    longrope = {"type": "longrope", "short_factor": [1.0] * 36, "long_factor": [1.1] * 36}
    phi = {"rope_scaling": longrope, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 4096}
    assert "merges to" in rehearsed("phi3", use_peft=True, packing=True, config=phi)
    mrope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    assert "merges to" in rehearsed("qwen2_5_vl", use_peft=True, config={"text_config": mrope})


def test_a_twin_that_cannot_be_loaded_refuses_no_run(monkeypatch):
    def run(self, config):
        raise RecipeError(f"the model {str(self.base)!r} cannot be loaded")

    monkeypatch.setattr(rehearsal.Rehearsal, "run", run)
    assert rehearsed("llama").startswith("not rehearsed on a twin: ")


@pytest.mark.parametrize(
    "config",
    [
        *({"peft_type": "ia3"}, {"peft_type": "loha", "r": 4}, {"peft_type": "vera", "r": 8}),
        *({"peft_type": "oft", "oft_block_size": 8}, {"peft_type": "lora", "r": 4}),
        *slow({"peft_type": "lokr", "r": 4}, {"peft_type": "boft", "boft_block_size": 4}),
    ],
    ids=lambda config: config["peft_type"],
)
def test_methods_of_peft(config):
    line = rehearsed("llama", packing=True, use_peft=True, peft_config=config)
    for holds in ("keeps documents apart", "a step moves what is trained", "loads to", "goes on to", "merges to"):
        assert holds in line


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_methods_of_peft_that_train_tokens_before_a_sequence(method):
    more = {"use_peft": True, "peft_config": {"peft_type": method, "num_virtual_tokens": 4}}
    line = rehearsed("llama", **more, merge=False, gradient_checkpointing=False)
    assert "a step moves what is trained, the adapter loads to" in line and "goes on to" in line
    assert "in no weight; set packing=false, merge=false" in refused("llama", **more, packing=True)


@pytest.mark.parametrize("kind", ["opt", "qwen3_next", *slow("bloom", "biogpt", "qwen3_5_text", "falcon_h1")])
def test_packing_that_leaks_or_needs_kernels(kind):
    leaks = kind in ("opt", "bloom", "biogpt")
    message = refused(kind, packing=True, use_peft=leaks)
    assert "set packing=false" in message and ("documents of a pack see each other" in message or not leaks)
    assert not leaks or "rows of a batch are apart" in rehearsed(kind, use_peft=True)


@pytest.mark.parametrize("more", [{"padding_free": True}, {"eval_packing": True, "test_size": 2}])
def test_other_ways_to_pack_leak_too(more):
    assert f"set {next(iter(more))}=false" in refused("opt", use_peft=True, **more)


@pytest.mark.parametrize("kind", ["jamba", "mamba", "minimax", *slow("recurrent_gemma", "falcon_mamba", "mpt")])
def test_state_space_models_full_fine_tuning(kind):
    """What cannot be kept apart is refused, or what the library says of it is told."""
    try:
        line = rehearsed(kind, packing=True)
    except RecipeError as error:
        line = str(error)
        assert "packing=false" in line
    assert "keeps documents apart" not in line


def test_packing_that_needs_kernels_on_a_twin_that_fails_otherwise_too(monkeypatch):
    def run(self, config):
        what = "can't keep packed sequences apart" if self.values["packing"] else "something else"
        raise ValueError(what)

    monkeypatch.setattr(rehearsal.Rehearsal, "run", run)
    assert refused("llama", packing=True).startswith("set packing=false; rehearsed on a twin: ValueError")
    assert rehearsed("llama") == "not rehearsed on a twin: ValueError: something else"


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_trained_whole_are_merged_right(tied, saved):
    line = rehearsed("llama", tied=tied, use_peft=True, lora_modules_to_save=saved)
    assert "merges to" in line and "goes on" in line


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("use_peft", [True, False])
def test_new_tokens_on_a_base_of_exactly_the_tokenizers_size(tied, use_peft):
    line = rehearsed("llama", tied=tied, added=NEW, use_peft=use_peft)
    assert ("merges to" in line and "goes on" in line) == use_peft


@pytest.mark.parametrize(
    "more",
    [
        {"lora_bias": True},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [5, 6]},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": "pisa"},
        {"rank_pattern": 3},
        {"inference_mode": True},  # of a finished adapter, which trains nothing
    ],
)
def test_fields_of_peft_that_it_refuses_or_that_do_not_come_back(more):
    # All layers, where they are named by number
    message = refused("llama", use_peft=True, lora_config=more, config={"num_hidden_layers": 3})
    assert f"lora_config: {next(iter(more))} cannot be: leave it out" in message


def test_layers_and_values_that_peft_or_trl_refuse():
    for targets in (["mlp"], ["q_proj", "lm_head"]):  # the latter as MA-RLHF's r1 script has it
        message = refused("llama", use_peft=True, lora_target_modules=targets)
        assert "cannot be: set lora_target_modules=null; rehearsed on a twin: ValueError" in message
    message = refused("llama", use_peft=True, peft_config={"peft_type": "loha", "r": "x"})
    assert "peft_config: r cannot be: leave it out; rehearsed on a twin: TypeError" in message


def test_nothing_left_to_train():
    assert "freeze=['.'] cannot be: set freeze=[]; rehearsed on a twin" in refused("llama", freeze=["."])


def test_positions():
    assert "the model has 1024 positions; set max_length=1024" in refused("gpt2", max_length=2048)
    assert "goes beyond the 2048 positions" in rehearsed("llama", max_length=4096)
    assert "positions" not in rehearsed("llama")


def test_losses():
    for more in ({"label_smoothing_factor": 0.1}, {"loss_type": "dft"}):
        assert rehearsed("llama", **more).startswith("rehearsed on")
    assert rehearsed("modernbert-decoder").startswith("rehearsed on"), "its head transforms before its matrix"
    message = refused("llama", label_smoothing_factor=0.1, loss_type="dft")
    assert "label_smoothing_factor smooths loss_type=nll alone" in message
    assert "a step moves" in rehearsed("mixtral", use_peft=True, router_aux_loss_coef=0.1)
    message = refused("mixtral", use_peft=True, label_smoothing_factor=0.1, router_aux_loss_coef=0.1)
    assert "router_aux_loss_coef" in message


@pytest.mark.parametrize(
    ("kind", "more", "holds"),
    [
        ("qwen3_moe", {"optim": "muon"}, "a step moves what is trained"),
        ("qwen3_moe", {"optim": "muon", "optim_args": "momentum=0.9, nesterov=False", "use_peft": True}, "a step"),
        ("qwen3_moe", {"optim": "torch.optim:Adagrad", "optim_args": "initial_accumulator_value=0.1"}, "a step moves"),
        ("llama", {"use_peft": True, "load_in_4bit": True}, "merges to"),  # unquantised
        ("llama", {"use_peft": True, "lora_target_modules": ["q_proj"], "lora_config": {"layers_to_transform": [20]}},
         "merges to"),
    ],
)  # fmt: skip
def test_what_a_twin_can_do_as_well(kind, more, holds):
    assert holds in rehearsed(kind, **more)


def test_same_random_numbers_after_it(tiny_bpe):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    rehearsed("llama")
    assert torch.rand(2).equal(expected)


# -- where it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "check", "plan"])
def test_before_a_row_is_read(command, capsys, tmp_path, tiny_bpe, monkeypatch):
    """Of a tiny OPT, with rows that nobody can read."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bpe)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    monkeypatch.setenv("MA_SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "broken.jsonl", ["no row"])
    (tmp_path / "r.yaml").write_text("{model_name_or_path: m, dataset_name: broken.jsonl, packing: true}")
    error = refusal(capsys, command, "r.yaml", "--max_length", "64", "--report_to", "none")
    assert "packing=True cannot be: set packing=false" in error


def test_it_can_be_turned_off_and_is_done_once(tiny_bpe, tmp_path, monkeypatch):
    monkeypatch.setenv("MA_SFT_CACHE", str(tmp_path))
    settings = Recipe(model_name_or_path=str(tiny_bpe), dataset_name="x").resolve(["--rehearse", "false"])
    tokenizer, added = load_tokenizer(settings)
    assert rehearse(settings, tokenizer, added) == "not rehearsed: rehearse=false"
    with pytest.raises(FrozenInstanceError):  # nothing writes into settings once they are resolved
        settings.run.rehearse = True
    settings = replace(settings, run=replace(settings.run, rehearse=True))
    line = rehearse(settings, tokenizer, added)
    assert line.startswith("rehearsed on a twin")
    monkeypatch.setattr(rehearsal, "rehearse_here", None)
    assert rehearse(settings, tokenizer, added) == line
