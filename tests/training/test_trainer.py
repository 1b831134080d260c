"""The trainer is handed over: whatever `SFTTrainer` takes, `make_trainer` takes, with rows prepared and proven."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import QUICK, ROOT, assistant, user, write_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTTrainer

from ma_sft import LabelError, Recipe, RecipeError, make_trainer
from ma_sft.labels.templates import set_chat_template

ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i} so."} for i in range(12)]
MESSAGES = [{"messages": [user(row["prompt"]), assistant(row["completion"])]} for row in ROWS]


@pytest.fixture
def settings(tiny_bpe, tmp_path):
    """A recipe's settings without its data."""
    return {**QUICK, "model_name_or_path": str(tiny_bpe), "output_dir": str(tmp_path / "run")}


@pytest.fixture
def file(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def text(trainer, dataset):
    """What is trained of each row, as text."""
    return [
        trainer.processing_class.decode([t for t in row["labels"] if t != -100])
        for row in dataset
        if set(row["labels"]) != {-100}
    ]


def test_recipe_gives_trls_trainer_with_labelled_rows(settings, file):
    trainer = make_trainer(Recipe(**settings, dataset_name=file), ["--max_steps", "1"])
    assert isinstance(trainer, SFTTrainer) and trainer.args.max_steps == 1
    assert sorted(text(trainer, trainer.train_dataset)) == sorted(f"{row['completion']}<|im_end|>" for row in ROWS)
    assert trainer.train().global_step == 1


@pytest.mark.parametrize("adapter", [pytest.param({}, marks=pytest.mark.slow), {"use_peft": True, "lora_dropout": 0.0}])
def test_selective_checkpointing_learns_the_same(settings, file, adapter):
    """TRL's own way of it misses a model with an adapter."""
    losses = []
    for more in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}}):
        trainer = make_trainer(Recipe(**{**settings, **more, **adapter}, dataset_name=file))
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0])


def test_data_sets_are_rows_of_any_format(settings):
    rows, messages = Dataset.from_list(ROWS), Dataset.from_list(MESSAGES[:3])
    recipe = Recipe(**settings, eval_strategy="steps", eval_steps=1)
    trainer = make_trainer(recipe, train_dataset=rows, eval_dataset=messages)
    assert len(text(trainer, trainer.train_dataset)) == len(ROWS) and len(trainer.eval_dataset) == 3
    trainer.train()
    assert any("eval_loss" in log for log in trainer.state.log_history)


@pytest.mark.parametrize("packing", [False, True])
def test_labelled_rows_are_cut_and_packed_as_they_are(settings, packing):
    rows = Dataset.from_list([{"input_ids": [7] * 10, "labels": [-100] * 4 + [7] * 6, "other": "x"}] * 6)
    trainer = make_trainer(Recipe(**settings, max_length=8 if not packing else 20, packing=packing), train_dataset=rows)
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert lengths[:3] == [20] * 3 if packing else lengths == [8] * 6
    assert trainer.train().global_step == 2
    with pytest.raises(RecipeError, match="test_size: rows that have labels already are not split"):
        make_trainer(Recipe(**settings, test_size=2), train_dataset=rows)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"prompt": "q", "completion": ""}, ValueError, "response is empty"),
        ({"input_ids": [7, 8], "labels": [-100, -100]}, LabelError, "no row has anything to train on"),
    ],
)
def test_wrong_rows_are_refused_before_there_is_a_trainer(settings, row, error, message):
    with pytest.raises(error, match=message):
        make_trainer(Recipe(**settings), train_dataset=Dataset.from_list([row]))


def test_missing_flash_attention_falls_back_with_a_line(settings, file, caplog, capsys):
    recipe = Recipe(**settings, dataset_name=file, packing=True, max_length=96, attn_implementation="flash_attention_2")
    assert make_trainer(recipe).model.config._attn_implementation == "sdpa"
    line = "flash_attention_2 is not installed for this machine: attention by PyTorch's SDPA"
    assert (caplog.text + "".join(capsys.readouterr())).count(line) >= 1


def test_model_in_4_bits_is_an_object_and_gets_the_recipes_adapter(settings, file, tiny_bpe):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_bpe, quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.bfloat16
    )
    trainer = make_trainer(Recipe(**settings, dataset_name=file, use_peft=True), model=model)
    assert "down_proj" in {n.split(".")[-4] for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = [p.clone() for p in trainer.model.parameters() if p.requires_grad]
    assert trainer.train().global_step == 2
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert any(not one.equal(other) for one, other in zip(before, after, strict=True))


def test_model_with_an_adapter_of_its_own(settings, file, tiny_bpe):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_bpe), LoraConfig(target_modules=["q_proj"]))
    trainer = make_trainer(Recipe(**settings, dataset_name=file, use_peft=True), model=model)
    assert {n.split(".")[-3] for n, p in trainer.model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert trainer.train().global_step == 2


def test_peft_config_takes_the_place_of_the_recipes_adapter(settings, file):
    peft = LoraConfig(r=3, target_modules=["v_proj"])
    trainer = make_trainer(Recipe(**settings, dataset_name=file), peft_config=peft)
    trained = {name: p.shape for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("v_proj" in name and 3 in shape for name, shape in trained.items())
    with pytest.raises(RecipeError, match="'query' matches nothing"):
        make_trainer(Recipe(**settings, dataset_name=file), peft_config=LoraConfig(target_modules=["query"]))


def test_processing_class_is_the_tokenizer(settings, file, tiny_bpe):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bpe)
    set_chat_template(tokenizer, "role-tags")
    trainer = make_trainer(Recipe(**settings, dataset_name=file), processing_class=tokenizer)
    assert trainer.processing_class is tokenizer
    assert "#ASSISTANT:It is 0 so" in tokenizer.decode(trainer.train_dataset[0]["input_ids"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_loss_optimizers_callbacks_and_metrics_are_the_callers(settings, file, tiny_bpe):
    model = AutoModelForCausalLM.from_pretrained(tiny_bpe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = {"losses": 0, "steps": 0}

    def loss(outputs, labels, num_items_in_batch=None):
        seen["losses"] += 1
        return outputs.logits.float().pow(2).mean()

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen["steps"] += 1

    trainer = make_trainer(
        Recipe(**settings, dataset_name=file, eval_strategy="steps", eval_steps=2),
        model=model, optimizers=(optimizer, None), callbacks=[Count()], compute_loss_func=loss,
        eval_dataset=Dataset.from_list(ROWS[:2]),
        compute_metrics=lambda found: {"rows": len(found.predictions), "words": "any"},
    )  # fmt: skip
    assert trainer.model is model
    before = model.lm_head.weight.clone()
    trainer.train()
    assert seen["losses"] >= 2 and seen["steps"] == 2 and model.lm_head.weight.equal(before)
    assert [log["eval_rows"] for log in trainer.state.log_history if "eval_rows" in log] == [2]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("packing", [False, True])
def test_loss_of_the_caller_is_given_labels_as_torch_takes_them(settings, file, packing):
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits[0, :-1].float(), labels[0, 1:], ignore_index=-100)

    recipe = Recipe(**settings, dataset_name=file, packing=packing, max_length=64)
    assert make_trainer(recipe, compute_loss_func=loss).train().global_step == 2


def test_data_collator(settings, file):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=32)
    trainer = make_trainer(Recipe(**settings, dataset_name=file), data_collator=collator)
    assert trainer.data_collator is collator and trainer.train().global_step == 2
    with pytest.raises(ValueError, match="custom data collator is not supported when using padding-free"):
        make_trainer(Recipe(**settings, dataset_name=file, packing=True, max_length=64), data_collator=collator)


EXAMPLES = re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", (ROOT / "docs" / "trainer.md").read_text(), re.M | re.S)
assert len(EXAMPLES) == 5


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=[title for title, _ in EXAMPLES])
def test_example_of_the_page(code, tiny_bpe, file, monkeypatch):
    """As it stands, but for a model of this machine."""
    monkeypatch.chdir(Path(file).parent)
    names: dict = {}
    exec(code.replace("Qwen/Qwen3-0.6B", str(tiny_bpe)), names)
    if "summary" in names:
        assert names["summary"]["steps"] >= 1 and Path("runs/sft/report.html").is_file()
    else:
        assert names["trainer"].state.global_step >= 1
