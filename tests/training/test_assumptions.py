"""What `training/trainer.py` and `training/quantized.py` take for granted of other libraries, each by its name.

A release that changes one fails here with the name of what changed, before it can train anything wrong.
"""

import inspect
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Trainer, TrainerCallback
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.integrations import deepspeed
from trl import SFTConfig, SFTTrainer

from ma_sft.training.distributed import outside_zero3
from ma_sft.training.quantized import NOISY_LOGGER, REPACKS
from ma_sft.training.trainer import ResumableTrainer, as_it_was, labelled_positions_alone

ROWS = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 4)


@pytest.fixture
def trainer(tiny_bpe, tmp_path):
    args = SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to="none",
        disable_tqdm=True, logging_steps=1, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    return ResumableTrainer(AutoModelForCausalLM.from_pretrained(tiny_bpe), args=args, train_dataset=ROWS)


def test_trl_counts_tokens_in_total_train_tokens(trainer):
    assert trainer._total_train_tokens == 0
    trainer._total_train_tokens = 100
    trainer.train()
    logged = [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log]
    assert logged == [100 + 8, 100 + 16]


def test_transformers_makes_every_loader_by_get_dataloader_and_get_train_sampler(trainer, monkeypatch):
    """Else the last batch of several processes would hold rows twice."""
    made = []
    for name in ("_get_dataloader", "_get_train_sampler"):
        real = getattr(SFTTrainer, name)
        monkeypatch.setattr(SFTTrainer, name, lambda *args, n=name, real=real, **more: (
            made.append((n, more.get("batch_size"), more.get("is_training"))), real(*args, **more))[1])  # fmt: skip
    trainer.get_train_dataloader()
    trainer.get_eval_dataloader(ROWS)
    assert made == [("_get_dataloader", 2, True), ("_get_train_sampler", None, None), ("_get_dataloader", 8, False)]


def test_trl_puts_a_fused_head_into_the_model_which_gives_log_probs_is_top1_and_label_mask(trainer):
    ids, labels = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[-100, 6, -100, 8]])
    loss, right, _, count = trainer.label_sums(trainer.model, {"input_ids": ids, "labels": labels}).tolist()
    logits = trainer.model(ids).logits[0, [0, 2]].float()
    targets = torch.tensor([6, 8])
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-4)
    assert (right, count) == ((logits.argmax(-1) == targets).sum().item(), 2)


def test_transformers_runs_an_epoch_through_run_epoch(trainer, monkeypatch):
    """Else a run that is resumed after its last step would take another one."""
    called = []
    monkeypatch.setattr(Trainer, "_run_epoch", lambda self, *args, **kwargs: called.append(kwargs["epoch"]))
    trainer.train()
    assert called[0] == 0


def test_transformers_saves_models_through_save(trainer, monkeypatch, tmp_path):
    saved = []

    def note(self, output_dir, state_dict=None):
        Path(output_dir).mkdir(parents=True)
        saved.append(Path(output_dir).name)

    monkeypatch.setattr(Trainer, "_save", note)
    trainer.save_model(str(tmp_path / "model"))
    trainer.args.save_steps = 1
    trainer.state.compute_steps(trainer.args, 2)
    trainer.train()
    assert saved == ["model", "checkpoint-1", "checkpoint-2"]


def test_transformers_knows_by_original_object_hash_that_a_generation_config_changed(tmp_path):
    GenerationConfig(eos_token_id=2).save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.5}))
    config = GenerationConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    config.eos_token_id = [2, 3]
    with pytest.raises(ValueError, match="temperature"):
        config.save_pretrained(tmp_path)
    as_it_was(config)
    config.save_pretrained(tmp_path)
    saved = json.loads(path.read_text())
    assert (saved["temperature"], saved["eos_token_id"]) == (0.5, [2, 3])


@pytest.mark.parametrize("masked", ["some", "none", "all"])
def test_trls_head_scores_labelled_positions_alone_and_gives_the_same(tiny_bpe, masked, monkeypatch):
    from trl.trainer import utils

    model = AutoModelForCausalLM.from_pretrained(tiny_bpe)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.randint(0, 200, (2, 30), generator=torch.Generator().manual_seed(0))
    labels = ids.clone() if masked != "all" else torch.full_like(ids, -100)
    if masked == "some":
        labels[:, ::3] = -100
    rows = []
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction, "apply", lambda *args, real=utils._ChunkedLogProbFunction.apply: (
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

    monkeypatch.setattr(utils, "_use_triton", lambda device: False)
    every = step()
    with labelled_positions_alone():
        labelled = step()
        assert not utils._use_triton(torch.device("meta"))  # anywhere else TRL decides
    assert rows == [58, int((labels[:, 1:] != -100).sum())]
    for one, other in zip(labelled, every, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert not utils._use_triton(torch.device("cpu"))


def test_transformers_prepares_the_model_before_on_train_begin(trainer):
    """So that figures before training are those of the model as the launcher's engine runs it."""
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append((len(trainer.accelerator._models), trainer.is_in_train, state.global_step))

    trainer.add_callback(Look())
    trainer.train()
    assert seen == [(1, True, 0)]


def test_trl_asks_the_head_for_a_bias_which_pefts_wrapper_of_a_tied_head_lacks(tiny_bpe, tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    peft = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3]})
    model = AutoModelForCausalLM.from_pretrained(tiny_bpe)
    head = SFTTrainer(model, args, train_dataset=ROWS, peft_config=peft).model.get_output_embeddings()
    assert not hasattr(head, "bias")


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
