"""Every setting does what it says, or is refused in one line: the table of all of them, and each row's proof."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from datasets import Dataset

from ma_sft import MaSftError, Recipe, RecipeError
from ma_sft.cli import main
from ma_sft.labels.templates import load_tokenizer
from ma_sft.labels.tokenize import check, label
from ma_sft.recipe import all_settings, known_settings
from ma_sft.settings import NEEDS, OURS, PRESET, REFUSED, TRAINER, settings_page, shown, shown_command

BASE = {"name": "x", "model_name_or_path": "demo", "dataset_name": "rows.jsonl"}
ROWS = [{"instruction": f"Say {n}", "input": "", "output": f"it is {n}"} for n in range(4)]
HELD_OUT = {"test_size": 0.5}


def resolve(*args, **settings):
    return Recipe(**{**BASE, **settings}).resolve(args)


def refused(*args, **settings):
    with pytest.raises(RecipeError) as error:
        resolve(*args, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


# the table


def test_every_field_stands_in_the_table_once():
    from trl import ModelConfig, SFTConfig

    theirs = {field.name for kind in (SFTConfig, ModelConfig) for field in dataclasses.fields(kind) if field.init}
    tables = [TRAINER, set(OURS), set(PRESET), set(REFUSED)]
    assert set().union(*tables) == theirs
    assert sum(map(len, tables)) == len(theirs)
    assert {what.kind for what in known_settings().values()} == {"ours", "trainer", "preset", "refused"}


def test_every_setting_may_be_given_its_own_default():
    for name, what in known_settings().items():
        if what.default is not None or what.nullable:
            assert what.take(what.default) == what.default, name
        resolve(**{name: what.default} if name not in BASE and what.default is not None else {})


def test_docs_list_what_each_setting_does():
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings_page(all_settings())


def test_settings_command_shows_class_and_the_default_that_holds(capsys):
    assert main(["settings", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["check"]["default"] is True and found["merge"]["default"] is True
    assert found["do_predict"]["class"] == "refused" and found["lora_r"]["class"] == "trainer"
    assert main(["settings", "lora_r"]) == 0
    assert "lora_r = 16" in capsys.readouterr().out


REFUSALS = {
    "do_predict": (True, "do_predict: nothing is predicted"),
    "enable_jit_checkpoint": (True, "enable_jit_checkpoint: a run that is asked to stop saves by itself"),
    "hub_always_push": (True, "hub_always_push: push_to_hub uploads once"),
    "local_rank": (1, "local_rank: the launcher says it"),
    "dataset_kwargs": ({"add_special_tokens": False}, "rows are prepared before the trainer sees them"),
    "lora_task_type": ("SEQ_CLS", "ma_sft trains causal language models alone"),
    "hub_strategy": ("checkpoint", "push_to_hub uploads once, at the end"),
}


@pytest.mark.parametrize("name", [*REFUSED, "dataset_kwargs", "lora_task_type", "hub_strategy"])
def test_contrary_value_is_refused(name):
    value, message = REFUSALS[name]
    assert message in refused(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, (accepted, _) in PRESET.items() for v in accepted])
def test_preset_may_be_said(name, value):
    resolve(**{name: value, **({"push_to_hub": True} if name.startswith("hub") else {})})


# What another setting is needed for, with a value that is not its default; each is refused without the other.
VALUES = {
    "adapter_name_or_path": "runs/x", "loraplus_lr_ratio": 4, "lora_preset": "mini", "lora_config": {"r": 3},
    "lora_target_modules": ["q_proj"], "lora_target_parameters": ["w"], "lora_modules_to_save": ["lm_head"],
    "lora_dropout": 0.1, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "uint8", "generate_eval": 2,
    "eval_strategy": "steps", "metric": "m:f", "eval_steps": 3, "metric_for_best_model": "loss",
    "test_near_duplicates": 0.9, "stopping_strategy": "all_exhausted", "packing_strategy": "wrapped",
    "response_template": "A:", "instruction_template": "Q:", "hub_model_id": "me/x", "hub_revision": "v1",
    "liger_kernel_config": {"rope": True}, "fsdp_config": {}, "dataloader_prefetch_factor": 2,
}  # fmt: skip
DOES_NOTHING = [(need, name) for need in NEEDS for name in need.names.split() if name in known_settings()]


@pytest.mark.parametrize(("need", "name"), DOES_NOTHING, ids=[name for _, name in DOES_NOTHING])
def test_setting_that_would_do_nothing_is_refused(need, name, rows):
    value = VALUES.get(name, {"warmup_steps": 5, "lora_r": 5, "lora_alpha": 5, "max_new_tokens": 5}.get(name, True))
    more = {}
    if need.switches == "formatting_func":
        more = {} if name == "response_template" else {"formatting_func": "question-answer"}
        other = {"train_on": "last", "history": "mask", "on_error": "skip", "template_kwargs": {"a": 1}}
        value = value if name == "response_template" else other.get(name, "text2")
    if need.switches == "lr_scheduler_type":
        more = {"lr_scheduler_type": "constant"}
    if name == "fsdp_config":
        value = {"min_num_params": 1}
    if need.switches == "completion_only_loss":
        more = {"completion_only_loss": False, **({"formatting_func": "question-answer"} if "template" in name else {})}
    if name == "load_best_model_at_end":
        more = {"save_strategy": "no"}
    if name == "dataloader_prefetch_factor":
        return  # transformers refuses it by itself
    assert name in refused(**{name: value, **more})


def test_flag_may_turn_off_what_a_recipe_sets():
    recipe = Recipe(**BASE, use_peft=True, lora_preset="mini", load_in_4bit=True, lora_r=4, full_learning_rate=1e-5)
    settings = recipe.resolve(["--use_peft", "false"])
    assert not settings.model.use_peft and settings.training.learning_rate == 1e-5


# one mapping, one parse


def test_dashes_do_for_underscores_everywhere(tmp_path):
    settings = resolve("--use-peft", "--lora-r", "5", "--lora-target-modules", "q_proj", "--loss-type", "dft")
    assert settings.model.use_peft and settings.model.lora_r == 5 and settings.training.loss_type == "dft"
    assert settings.chosen["lora_target_modules"] == ["q_proj"] and settings.chosen["loss_type"] == "dft"
    assert settings.training.learning_rate == 2e-4  # the default of an adapter follows the flag
    assert not resolve("--no-check").labels.check and not resolve("--no_merge").adapter.merge


def test_the_last_of_a_repeated_flag_wins():
    settings = resolve("--use_peft", "false", "--use_peft", "--learning_rate", "1", "--learning-rate", "2", "--name=b")
    assert settings.model.use_peft and settings.training.learning_rate == 2
    assert settings.training.output_dir == "runs/b"


def test_several_config_files_and_both_ways_to_write_them(tmp_path):
    for name, text in (("a", "max_steps: 1\nseed: 5\n"), ("b", "max_steps: 2\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    settings = resolve(f"--config={tmp_path}/a.yaml", "--config", f"{tmp_path}/b.yaml")
    assert settings.training.max_steps == 2 and settings.training.seed == 5


def test_later_way_to_say_one_thing_replaces_the_other():
    assert resolve("--datasets", "a.jsonl", "b.jsonl").rows.dataset_name is None
    assert resolve("--test_size", "2", eval_dataset="held.jsonl").rows.eval_dataset == []
    assert "two ways" in refused(eval_dataset="held.jsonl", test_size=2)


@pytest.mark.parametrize("name", ["check", "max_steps", "learning_rate", "packing", "train_on", "lora_r", "datasets"])
def test_null_where_none_is_meant_is_refused(name):
    assert f"{name}: a value is missing" in refused(**{name: None})


def test_null_stands_for_our_own_default():
    settings = resolve(bf16=None, dtype=None, report_to=None, max_length=None)
    assert settings.training.max_length is None and settings.model.dtype == resolve().model.dtype
    assert settings.training.report_to == resolve().training.report_to


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0), ("max_steps", -2), ("num_train_epochs", -1), ("num_train_epochs", 0),
        ("per_device_train_batch_size", 0), ("per_device_eval_batch_size", 0), ("gradient_accumulation_steps", 0),
        ("max_length", 0), ("max_length", -5), ("test_size", 0), ("test_size", -0.1), ("learning_rate", -1e-5),
        ("learning_rate", float("nan")), ("warmup_steps", -1), ("weight_decay", float("inf")), ("lora_r", 0),
        ("lora_dropout", 1), ("generate_eval", -2), ("max_new_tokens", 0), ("save_steps", 0), ("seed", -1),
        ("max_steps", 2.5), ("max_steps", "2.0"), ("max_steps", True), ("packing", "maybe"), ("packing", 2),
        ("optim", "adam"), ("lr_scheduler_type", "cosin"), ("attn_implementation", "sdpaa"), ("dtype", "float8"),
        ("name", True), ("template_kwargs", "{thinking"), ("lora_config", "{r: 3}"), ("filters", "[1]"),
        ("lr_scheduler_kwargs", "{a"), ("model_init_kwargs", 3), ("deepspeed", "no.json"),
    ],
)  # fmt: skip
def test_wrong_value_names_its_setting(name, value):
    more = {"use_peft": True} if name.startswith("lora") else {}
    assert name in refused(**{name: value, **more})


def test_values_of_other_types_become_the_settings_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = resolve(
        max_steps=2.0, model_name_or_path=Path("~/model"), datasets="~/a.jsonl", dataset_name=None,
        dtype=torch.bfloat16,
        use_peft=True, lora_target_modules="q_proj", lora_modules_to_save={"b", "a"}, output_dir=Path("~/out"),
        save_strategy=False, template_kwargs='{"enable_thinking": false}', lora_config='{"r": 3}', learning_rate="1e-3",
        eval_dataset=[{"path": Path("~/held.jsonl")}], filters='{"trivial": true}',
    )  # fmt: skip
    home = str(tmp_path)
    assert settings.training.max_steps == 2 and isinstance(settings.training.max_steps, int)
    assert settings.model.model_name_or_path == f"{home}/model" and settings.training.output_dir == f"{home}/out"
    assert settings.rows.datasets == [f"{home}/a.jsonl"] and settings.rows.eval_dataset == [
        {"path": f"{home}/held.jsonl"}
    ]
    assert settings.model.dtype == "bfloat16" and settings.training.save_strategy == "no"
    assert settings.chosen["lora_target_modules"] == ["q_proj"] and settings.model.lora_modules_to_save == ["a", "b"]
    assert settings.labels.template_kwargs == {"enable_thinking": False} and settings.adapter.lora_config == {"r": 3}
    assert settings.rows.filters == {"trivial": True} and settings.training.learning_rate == 1e-3


def test_rows_may_be_handed_over():
    data = Dataset.from_list(ROWS)
    assert resolve(dataset_name=data).rows.datasets == [data]
    assert resolve(dataset_name=None, datasets=data, eval_dataset=data).rows.eval_dataset == [data]
    assert json.dumps(shown(resolve(dataset_name=data).chosen))


def test_recipe_is_not_changed_by_what_is_done_with_its_settings():
    recipe = Recipe(**BASE, model_init_kwargs={"revision": "main"})
    recipe.resolve().training.model_init_kwargs.clear()
    assert recipe.settings["model_init_kwargs"] == {"revision": "main"}


# what is not installed, or does not go together, is said before any data is read


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "lomo"}, "optim=lomo"),
        ({"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}, "optim=galore_adamw"),
        ({"optim_args": "nonsense"}, "optim"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "lr_scheduler_type=cosine"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "eval strategy"),
        ({"report_to": "mlflow"}, "report_to: mlflow is not installed"),
        ({"report_to": "paper"}, "report_to: 'paper' does not exist"),
        ({"attn_implementation": "sdpaa"}, "attn_implementation: 'sdpaa' does not exist"),
        ({"use_liger_kernel": True}, "use_liger_kernel: pip install liger-kernel"),
        ({"model_init_kwargs": {"use_kernels": True}}, "use_kernels needs pip install kernels"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", **HELD_OUT, "eval_steps": 7}, "load_best_model"),
        ({"assistant_only_loss": True, "completion_only_loss": False}, "assistant_only_loss"),
        ({"formatting_func": "question-answer", "completion_only_loss": True}, "response_template"),
        ({"formatting_func": "question-answer", "response_template": "A", "completion_only_loss": False}, "response"),
        ({"accelerator_config": {"splits": 1}}, "splits"),
        ({"fp16": True, "bf16": True}, "fp16 and bf16"),
    ],
)
def test_what_cannot_be_is_one_line(settings, message):
    assert message in refused(**settings)


# secrets


def test_secrets_are_not_shown():
    chosen = {"hub_token": "hf_1", "model_init_kwargs": {"token": "hf_2", "a": [{"api_key": "3"}]}, "eos_token": "</s>"}
    assert shown(chosen) == {"model_init_kwargs": {"a": [{}]}, "eos_token": "</s>"}
    args = [
        "--hub_token",
        "hf_1",
        "--hub-token=hf_2",
        "--model_init_kwargs",
        '{"token": "hf_3"}',
        "--eos_token",
        "</s>",
    ]
    line = " ".join(shown_command(args))
    assert "hf_" not in line and "</s>" in line


def test_secret_is_not_in_an_error():
    assert "hf_secret" not in refused("--hub_tokn=hf_secret")
    assert "hf_secret" not in refused(hub_token=["hf_secret"])


# what ma_sft does with TRL's settings


def labelled(model, rows, **settings):
    settings = resolve(**{"model_name_or_path": str(model), "dataset_name": rows, **settings})
    tokenizer, added = load_tokenizer(settings)
    return label(settings, tokenizer), tokenizer, added, settings


def test_completion_only_loss_false_trains_every_token(tiny_bpe, rows):
    found, tokenizer, _, settings = labelled(tiny_bpe, rows, completion_only_loss=False)
    assert found.dataset["labels"] == found.dataset["input_ids"] and len(found.dataset) == 4
    assert not check(settings, tokenizer, found).errors
    always, *_ = labelled(tiny_bpe, rows)
    assert found.dataset["input_ids"] == always.dataset["input_ids"] and -100 in always.dataset["labels"][0]


def test_dataset_text_field_names_the_column(tiny_bpe, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"body": "What is so"}\n{"body": "user system"}\n')
    found, tokenizer, *_ = labelled(tiny_bpe, str(path), dataset_text_field="body")
    texts = [tokenizer.decode(ids) for ids in found.dataset["input_ids"]]
    assert sorted("What is so" in text for text in texts) == [False, True]
    with pytest.raises(MaSftError, match="prose"):
        labelled(tiny_bpe, str(path), dataset_text_field="prose")


def test_dataset_config_is_for_hub_data_sets(tiny_bpe, rows):
    with pytest.raises(MaSftError, match="de"):
        labelled(tiny_bpe, rows, dataset_config="de")


def test_eos_and_pad_token(tiny_bpe, rows):
    with pytest.raises(RecipeError, match=r"eos_token: the chat template ends a turn with '<\|im_end\|>"):
        labelled(tiny_bpe, rows, eos_token="<|endoftext|>")
    with pytest.raises(RecipeError, match="eos_token: the tokenizer has no token '<end>'"):
        labelled(tiny_bpe, rows, eos_token="<end>")
    found, tokenizer, *_ = labelled(tiny_bpe, rows, eos_token="<|endoftext|>", template="question-answer")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert all(labels[-1] == end for labels in found.dataset["labels"])
    assert labelled(tiny_bpe, rows, pad_token="<|im_start|>")[1].pad_token == "<|im_start|>"


def test_chat_template_path_takes_a_file_or_a_tokenizer(tiny_bpe, tiny_qwen3, rows, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}"
        "{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found, tokenizer, *_ = labelled(tiny_bpe, rows, chat_template_path=str(template))
    assert tokenizer.decode(found.dataset["input_ids"][0]).startswith("user: Say")
    _, tokenizer, added, _ = labelled(tiny_bpe, rows, chat_template_path=str(tiny_qwen3))
    assert "enable_thinking" in tokenizer.chat_template and "<think>" in added
    assert tokenizer.convert_tokens_to_ids(added) == list(range(len(tokenizer) - len(added), len(tokenizer)))
    with pytest.raises(MaSftError):
        labelled(tiny_bpe, rows, chat_template_path=str(tmp_path / "none.jinja"))
    with pytest.raises(MaSftError):
        labelled(tiny_bpe, rows, chat_template_path=str(tmp_path / "none"))


def test_missing_column_in_a_formatting_func_is_one_line(tiny_bpe, rows, tmp_path):
    (tmp_path / "mine.py").write_text("def texts(rows):\n    return [a for a in rows['question']]\n")
    with pytest.raises(MaSftError, match="instruction, input, output: KeyError: 'question'"):
        labelled(tiny_bpe, rows, formatting_func=f"{tmp_path}/mine.py:texts")
