"""Scripts of TRL 0.x run after one changed import: those that docs/migrating.md shows."""

import re
import warnings

import pytest
import torch
from datasets import Dataset
from helpers import QUICK, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from ma_sft import ConstantLengthDataset, DataCollatorForCompletionOnlyLM, SFTConfig, SFTTrainer
from ma_sft.training import compat

SCRIPTS = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", (ROOT / "docs/migrating.md").read_text(), re.S))


@pytest.fixture
def names(tmp_path, tiny_bpe):
    """What a script has before it makes its trainer."""
    classes = (SFTTrainer, SFTConfig, DataCollatorForCompletionOnlyLM, ConstantLengthDataset)
    short = {key: value for key, value in QUICK.items() if key not in ("dtype", "gradient_checkpointing", "rehearse")}
    return {
        **{kind.__name__: kind for kind in classes},
        "tokenizer": AutoTokenizer.from_pretrained(tiny_bpe),
        "model": AutoModelForCausalLM.from_pretrained(tiny_bpe, dtype=torch.float32),
        "rows": Dataset.from_dict({"question": ["What is 1+1?"] * 8, "answer": ["Two."] * 8}),
        "output_dir": str(tmp_path / "run"),
        "short": {**short, "report_to": "none", "use_cpu": True},
    }


def trained(tokenizer, labels) -> list[str]:
    return [tokenizer.decode([i for i in row.tolist() if i != -100]) for row in labels]


WANTED = {"completion": " Two.<|im_end|>", "ids": "Two.<|im_end|>", "turns": " Hello\n Bye<|im_end|>"}


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"loop"}))
def test_script_trains(names, script):
    exec(SCRIPTS[script], names)
    trainer, before = names["trainer"], names["model"].lm_head.weight.detach().clone()
    batch = next(iter(trainer.get_train_dataloader()))
    if script in WANTED:
        assert trained(names["tokenizer"], batch["labels"]) == [WANTED[script]] * 2
    else:
        own = batch["labels"] != -100
        assert own.sum() and (batch["labels"][own] == batch["input_ids"][own]).all()
    trainer.train()
    assert trainer.state.global_step == 2
    if script != "lora":
        assert not torch.equal(names["model"].lm_head.weight, before)


@pytest.mark.parametrize("streamed", [False, True])
def test_formatting_func_of_streams_and_of_several_held_out_sets(names, streamed):
    rows = names["rows"].to_iterable_dataset() if streamed else names["rows"]
    held_out = {"near": names["rows"].select(range(3)), "far": names["rows"].select(range(2))}
    trainer = SFTTrainer(
        names["model"],
        SFTConfig(names["output_dir"], **names["short"], eval_strategy="steps"),
        train_dataset=rows,
        eval_dataset=held_out,
        formatting_func=lambda row: f"{row['question']}\n### Answer: {row['answer']}",
        data_collator=DataCollatorForCompletionOnlyLM("### Answer:", tokenizer=names["tokenizer"]),
        tokenizer=names["tokenizer"],
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert trained(names["tokenizer"], batch["labels"]) == [" Two.<|im_end|>"] * 2
    assert {"eval_near_loss", "eval_far_loss"} <= trainer.evaluate().keys()


def test_loop_in_plain_pytorch(names):
    exec(SCRIPTS["loop"], names)
    assert trained(names["tokenizer"], names["batch"]["labels"]) == [" Two."] * 2
    assert torch.isfinite(names["loss"]) and torch.equal(names["batch"].input_ids, names["batch"]["input_ids"])


def test_plain_trainer_over_the_collator(names, tmp_path):
    tokenizer = names["tokenizer"]
    texts = [tokenizer(f"### Question: {r['question']}\n### Answer: {r['answer']}") for r in names["rows"]]
    trainer = Trainer(
        names["model"],
        TrainingArguments(str(tmp_path / "plain"), **names["short"]),
        data_collator=DataCollatorForCompletionOnlyLM("### Answer:", tokenizer=tokenizer),
        train_dataset=Dataset.from_list([dict(text) for text in texts]),
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_each_old_name_means_todays_and_is_said_once(names):
    compat._say.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for more in ({}, {"evaluation_strategy": "no"}):
            assert SFTConfig(names["output_dir"], max_seq_length=64, **more, **names["short"]).max_length == 64
    found = [str(w.message) for w in said if "TRL 0.x" in str(w.message) and "max_seq_length" in str(w.message)]
    assert found == ["max_seq_length is TRL 0.x's: today it is max_length"]


def test_a_trainer_without_arguments_is_made_on_a_machine_without_bfloat16(names, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(names["output_dir"].rpartition("/")[0])
    rows = Dataset.from_dict({"text": ["Hi there."] * 4})
    trainer = SFTTrainer(names["model"], train_dataset=rows, tokenizer=names["tokenizer"], max_seq_length=8)
    assert not trainer.args.bf16 and trainer.args.max_length == 8


def test_what_neither_knows_is_refused(names):
    config = SFTConfig(names["output_dir"], **names["short"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch'"):
        SFTTrainer(names["model"], config, train_dataset=names["rows"], tokenizer=names["tokenizer"], batch=3)
