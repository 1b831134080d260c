"""What `training/trainer.py` and `training/quantized.py` take for granted of other libraries, each by its name.

A release that changes one fails here with the name of what changed, before it can train anything wrong.
"""

import inspect
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers.generation.configuration_utils
import transformers.trainer
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.integrations import deepspeed
from trl.trainer import sft_trainer
from trl.trainer import utils as trl_utils

from ma_sft.training.distributed import outside_zero3
from ma_sft.training.quantized import NOISY_LOGGER, REPACKS
from ma_sft.training.trainer import labelled_positions_alone

SOURCES = {
    # What `ResumableTrainer` overrides or sets, and the file that reads it
    transformers.trainer: "self._run_epoch( self._save( self._save_checkpoint( self._maybe_log_save_evaluate( "
    "self._load_optimizer_and_scheduler( self._get_train_sampler, self._get_dataloader(",
    sft_trainer: "self._total_train_tokens fused_lm_head outputs.log_probs outputs.is_top1 outputs.label_mask",
    trl_utils: "_ChunkedLogProbFunction _use_triton .bias",  # which PEFT's wrapper of a tied head lacks
    transformers.generation.configuration_utils: "_original_object_hash",
}


@pytest.mark.parametrize("module", SOURCES, ids=lambda module: module.__name__)
def test_names_that_are_not_public_are_still_used(module):
    """Tests of training show what follows where one means something else."""
    source = inspect.getsource(module)
    assert [name for name in SOURCES[module].split() if name not in source] == []


@pytest.mark.parametrize("masked", ["some", "none", "all"])
def test_trls_head_scores_labelled_positions_alone_and_gives_the_same(tiny_bpe, masked, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_bpe)
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.randint(0, 200, (2, 30), generator=torch.Generator().manual_seed(0))
    labels = ids.clone() if masked != "all" else torch.full_like(ids, -100)
    if masked == "some":
        labels[:, ::3] = -100
    rows = []
    monkeypatch.setattr(
        trl_utils._ChunkedLogProbFunction, "apply", lambda *args, real=trl_utils._ChunkedLogProbFunction.apply: (
            rows.append(len(args[0])), real(*args))[1],
    )  # fmt: skip

    def step():
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        loss = -out.log_probs.sum() / max(1, int(out.label_mask.sum()))
        loss.backward()
        grads = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                           for p in model.parameters()])  # fmt: skip
        return loss.detach(), out.entropy.detach(), out.is_top1, grads

    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: False)
    every = step()
    with labelled_positions_alone():
        labelled = step()
        assert not trl_utils._use_triton(torch.device("meta"))  # anywhere else TRL decides
    assert rows == [58, int((labels[:, 1:] != -100).sum())]
    for one, other in zip(labelled, every, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert not trl_utils._use_triton(torch.device("cpu"))


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_names(tmp_path, caplog, bits):
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    if bits == 4:
        assert hasattr(layer, REPACKS)
    else:
        with caplog.at_level(logging.WARNING, NOISY_LOGGER):
            layer(torch.ones(1, 64))
        assert [record.name for record in caplog.records] == [NOISY_LOGGER]


def test_transformers_deepspeed_configuration_comes_back(monkeypatch):
    """By public calls alone, though transformers holds it by a weak reference."""
    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    held = deepspeed.HfDeepSpeedConfig(config)
    assert deepspeed.is_deepspeed_zero3_enabled()
    with outside_zero3():
        assert not deepspeed.is_deepspeed_zero3_enabled()
    del held
    assert deepspeed.is_deepspeed_zero3_enabled() and deepspeed.deepspeed_config() == config
    deepspeed.unset_hf_deepspeed_config()
    with outside_zero3():
        pass
    assert deepspeed.deepspeed_config() is None


def test_peft_names():
    from peft.tuners import tuners_utils
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    assert tuners_utils.check_target_module_exists(LoraConfig(target_modules=["q_proj"]), "layers.0.q_proj")
    assert {"get_base_layer", "merge"} <= set(dir(tuners_utils.BaseTunerLayer))
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        config = SimpleNamespace(model_type="mamba")
        tuners_utils._check_lora_target_modules_mamba(LoraConfig(), SimpleNamespace(config=config), "out_proj")
    assert inspect.isclass(ModulesToSaveWrapper) and inspect.isclass(TrainableTokensWrapper)


def test_transformers_says_how_it_renames_tensors(tiny_bpe):
    model = AutoModelForCausalLM.from_pretrained(tiny_bpe)
    assert isinstance(get_model_conversion_mapping(model), list) and inspect.isclass(WeightConverter)
    name = next(iter(model.state_dict()))
    assert rename_source_key(name, [], [], model.base_model_prefix, model.state_dict()) == (name, None)
