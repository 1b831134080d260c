"""Every setting does what it says, or is refused in one line: the table of all of them, and each row's proof."""

import dataclasses
import inspect
import json
from datetime import date
from pathlib import Path

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset, DatasetDict
from helpers import ROOT, assistant, save_tiny, user, write_rows
from processes import launcher
from settings_page import settings_page
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import SFTConfig
from trl_templates import SHELF

from ma_sft import MaSftError, Recipe, RecipeError, run
from ma_sft.cli import main
from ma_sft.config import (
    EXCLUSIVE,
    NEEDS,
    PRESETS,
    all_settings,
    known_settings,
    settings_of,
    shown,
    shown_command,
)
from ma_sft.labels.templates import load_tokenizer
from ma_sft.labels.tokenize import check, label

BASE = {"name": "x", "model_name_or_path": "demo", "dataset_name": "rows.jsonl"}
ROWS = [{"instruction": f"Say {n}", "input": "", "output": f"it is {n}"} for n in range(4)]
HELD_OUT = {"test_size": 0.5}


def resolve(*args, **settings):
    return Recipe(**{**BASE, **settings}).resolve(args)


def error_of(function):
    with pytest.raises(RecipeError) as error:
        function()
    return str(error.value)


def refused(*args, **settings):
    message = error_of(lambda: resolve(*args, **settings))
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


# the table


def test_new_fields_of_trl_are_named():
    """They are passed on by themselves: whoever raises TRL's version looks at each, and adds it to the list."""
    from trl import ModelConfig, SFTConfig

    theirs = {field.name for kind in (SFTConfig, ModelConfig) for field in dataclasses.fields(kind) if field.init}
    assert theirs == set((ROOT / "tests" / "trl_fields.txt").read_text(encoding="utf-8").split())
    assert {*PRESETS, *sum(EXCLUSIVE, ()), *(name for _, name in DOES_NOTHING)} <= known_settings().keys()


def test_a_field_that_a_new_trl_brings_passes_through():
    @dataclasses.dataclass
    class Newer(SFTConfig):
        brand_new: int = dataclasses.field(default=3, metadata={"help": "New."})

    setting = settings_of({"training": Newer})["brand_new"]
    assert (setting.kind, setting.default, setting.take("4")) == ("trainer", 3, 4)


def test_table_is_made_anew_where_it_is_broken_or_of_other_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("MA_SFT_CACHE", str(tmp_path))
    made = known_settings.__wrapped__()
    (file,) = tmp_path.glob("settings-*.json")
    assert known_settings.__wrapped__() == made == known_settings()
    kept = file.read_text()
    for broken in ("", kept[:-20]):
        file.write_text(broken)
        assert known_settings.__wrapped__() == made and file.read_text() == kept
    monkeypatch.setenv("MA_SFT_CACHE", str(file))  # a cache folder that cannot be written costs time alone
    assert known_settings.__wrapped__() == made


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lr", "learning_rate"), ("epochs", "num_train_epochs"), ("batch_size", "per_device_train_batch_size"),
        ("per_device_batch_size", "per_device_train_batch_size"), ("max_seq_length", "max_length"),
        ("max_step", "max_steps"), ("learnin_rate", "learning_rate"),
    ],
)  # fmt: skip
def test_wrong_names_and_those_of_other_tools_lead_to_the_right_one(wrong, right):
    assert f"unknown setting '{wrong}'; did you mean '{right}'?" in refused(**{wrong: 1})
    assert f"did you mean '{right}'?" in refused(f"--{wrong.replace('_', '-')}", "1")
    assert f"unknown setting '--{wrong}'; did you mean '{right}'?" in refused(f"--{wrong}=1")


def test_every_setting_may_be_given_its_own_default():
    for name, what in known_settings().items():
        if what.default is not None or what.nullable:
            assert what.take(what.default) == what.default, name
    resolve(**{name: what.default for name, what in known_settings().items() if what.default is not None} | BASE)


def test_docs_list_what_each_setting_does():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page(all_settings()), "run scripts/settings_page.py"


def test_settings_command_shows_class_and_the_default_that_holds(capsys):
    assert main(["settings", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["check"]["default"] is True and found["merge"]["default"] is True
    assert found["do_predict"]["class"] == "refused" and found["lora_r"]["class"] == "trainer"
    assert main(["settings", "max_length", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["max_length"]["help"] and "lora_r" not in found
    assert main(["settings", "adapter_name"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("[adapter]\nadapter_name_or_path = None  (ours)\n    Go on with this adapter")
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"].keys() - {"allow_code"} == known_settings().keys()
    assert schema["properties"]["train_on"]["enum"] == ["all", "last"]
    assert schema["properties"]["max_length"]["type"] == ["integer", "null"]
    assert {"array", "object"} < {*schema["properties"]["datasets"]["type"]}


CONTRARY = {
    "local_rank": 1, "dataset_kwargs": {"add_special_tokens": False}, "lora_task_type": "SEQ_CLS",
    "hub_strategy": "checkpoint",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, (accepted, _) in PRESETS.items() if not accepted or name in CONTRARY])
def test_contrary_value_is_refused(name):
    message = refused(**{name: CONTRARY.get(name, True)})
    assert message.startswith(name) and message.endswith(PRESETS[name][1])


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (accepted, _) in PRESETS.items() for value in accepted]
)
def test_preset_may_be_said(name, value):
    resolve(**{name: value, **({"push_to_hub": True} if name.startswith("hub") else {})})


# What another setting is needed for, with a value that is not its default; each is refused without the other.
VALUES = {
    "adapter_name_or_path": "runs/x", "loraplus_lr_ratio": 4, "lora_preset": "mini", "lora_config": {"r": 3},
    "lora_target_modules": ["q_proj"], "lora_target_parameters": ["w"], "lora_modules_to_save": ["lm_head"],
    "lora_dropout": 0.1, "generate_eval": 2, "eval_strategy": "steps", "metric": "m:f",
    "test_near_duplicates": 0.9, "stopping_strategy": "all_exhausted", "packing_strategy": "wrapped",
    "response_template": "A:", "instruction_template": "Q:", "hub_model_id": "me/x", "hub_revision": "v1",
    "label_smoothing_factor": 0.1, "router_aux_loss_coef": 0.1, "warmup_steps": 5, "lora_r": 5, "lora_alpha": 5,
    "max_new_tokens": 5, "train_on": "last", "history": "mask", "on_error": "skip", "template_kwargs": {"a": 1},
    "template_now": "2026-11-25", "truncation_mode": "keep_end", "overflow": "drop", "system_prompt": "Be so",
    "peft_config": {"peft_type": "IA3"}, "early_stopping_patience": 2,
    "dataset_format": "alpaca", "dataset_text_field": "text2", "model_revision": "v1", "dataset_test_split": "dev",
    "freeze": ["embed"],
}  # fmt: skip
DOES_NOTHING = [(condition, name) for names, condition, _ in NEEDS for name in names.split()]


# What makes the setting useless, where it is not that nothing else is set.
USELESS = {
    "!formatting_func": {"formatting_func": "question-answer"},
    "!formatting_func response_template": {"formatting_func": "question-answer"},
    "lr_scheduler_type!=constant": {"lr_scheduler_type": "constant"},
    "loss_type=nll": {"loss_type": "dft"},
    "!label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "max_length": {"max_length": None},
    "!packing packing_strategy=bfd": {"packing": True, "packing_strategy": "wrapped"},
    "!overflow overflow=keep_end": {"overflow": "drop"},
    "completion_only_loss!=false": {"completion_only_loss": False},
    "model_name_or_path:on_a_hub": {"model_name_or_path": "."},
    "!use_peft": {"use_peft": True},
    "!peft_config": {"use_peft": True, "peft_config": {"peft_type": "IA3"}},
    "parallelism_config:whole_sequences": {"parallelism_config": {"cp_size": 2}, "max_length": 64, **HELD_OUT},
}


@pytest.mark.parametrize(("condition", "name"), DOES_NOTHING, ids=[name for _, name in DOES_NOTHING])
def test_setting_that_would_do_nothing_is_refused(condition, name):
    more = dict(USELESS.get(condition, {}))
    if name == "response_template" and "completion_only_loss" in condition:
        more |= {"formatting_func": "question-answer"}
    if name == "load_best_model_at_end":
        more |= {"save_strategy": "no"}
    assert f"{name} " in refused(**{name: VALUES.get(name, True), **more})


def test_flag_may_turn_off_what_a_recipe_sets():
    recipe = Recipe(**BASE, use_peft=True, lora_preset="mini", load_in_4bit=True, lora_r=4, full_learning_rate=1e-5)
    settings = recipe.resolve(["--use_peft", "false"])
    assert not settings.model.use_peft and settings.training.learning_rate == 1e-5
    held_out = {"test_size": 5, "test_near_duplicates": 0.8, "generate_eval": 3}
    recipe = Recipe(**BASE, **held_out, packing=True, packing_strategy="bfd_split")
    assert recipe.resolve(["--eval_dataset", "held.jsonl"]).rows.test_size is None
    assert recipe.resolve(["--test_size", "none", "--packing", "false"]).training.packing is False


# one mapping, one parse


def test_dashes_do_for_underscores_everywhere(tmp_path):
    settings = resolve("--use-peft", "--lora-r", "5", "--lora-target-modules", "q_proj", "--loss-type", "dft")
    assert settings.model.use_peft and settings.model.lora_r == 5 and settings.training.loss_type == "dft"
    assert settings.chosen["lora_target_modules"] == ["q_proj"] and settings.chosen["loss_type"] == "dft"
    assert settings.training.learning_rate == 2e-4  # the default of an adapter follows the flag
    assert not resolve("--no-check").labels.check and not resolve("--no_merge").adapter.merge
    (tmp_path / "more.yaml").write_text("learning-rate: 1\nmax_length: 7\n")
    settings = resolve("--config", str(tmp_path / "more.yaml"))
    assert settings.training.learning_rate == 1 and settings.training.max_length == 7


def test_what_is_said_later_wins():
    settings = resolve("--use_peft", "false", "--use_peft", "--learning_rate", "1", "--learning-rate", "2", "--name=b")
    assert settings.model.use_peft and settings.training.learning_rate == 2
    assert settings.training.output_dir == "runs/b"
    assert resolve("--datasets", "a.jsonl", "b.jsonl").rows.dataset_name is None
    assert resolve("--test_size", "2", eval_dataset="held.jsonl").rows.eval_dataset == []


def test_a_flag_may_be_a_source_with_settings():
    rows = resolve("--datasets", "a.jsonl", '{"path": "~/b.jsonl", "weight": 2}').rows
    assert rows.datasets == ["a.jsonl", {"path": f"{Path.home()}/b.jsonl", "weight": 2}]


def test_null_stands_for_our_own_default():
    settings = resolve(bf16=None, dtype=None, report_to=None, max_length=None)
    assert settings.training.max_length is None and settings.model.dtype == resolve().model.dtype
    assert settings.training.report_to == resolve().training.report_to


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_stepz", 3), ("max_steps", [3]), ("train_on", "first"), ("learning_rate", "fast"),
        ("max_steps", 0), ("max_steps", -2), ("num_train_epochs", -1), ("num_train_epochs", 0),
        ("per_device_train_batch_size", 0), ("per_device_eval_batch_size", 0), ("gradient_accumulation_steps", 0),
        ("max_length", 0), ("max_length", -5), ("test_size", 0), ("test_size", -0.1), ("learning_rate", -1e-5),
        ("learning_rate", float("nan")), ("warmup_steps", -1), ("weight_decay", float("inf")), ("lora_r", 0),
        ("lora_dropout", 1), ("generate_eval", -2), ("max_new_tokens", 0), ("save_steps", 0), ("seed", -1),
        ("max_steps", 2.5), ("max_steps", "2.0"), ("max_steps", True), ("packing", "maybe"), ("packing", 2),
        ("optim", "adam"), ("lr_scheduler_type", "cosin"), ("dtype", "float8"),
        ("name", True), ("template_kwargs", "{thinking"), ("lora_config", "{r: 3}"), ("filters", "[1]"),
        ("lr_scheduler_kwargs", "{a"), ("model_init_kwargs", 3), ("deepspeed", "no.json"),
        ("pad_to_multiple_of", "many"),
    ],
)  # fmt: skip
def test_wrong_value_names_its_setting(name, value):
    more = {"use_peft": True} if name.startswith("lora") else {}
    assert name in refused(**{name: value, **more})


# files


def test_recipe_then_yaml_then_flags(tmp_path):
    for name, text in {"a": "learning_rate: 1e-4\nmax_steps: 7\nsave_steps: 3\n", "b": "learning_rate: 1e-3\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    flags = ["--config", f"{tmp_path}/a.yaml", f"--config={tmp_path}/b.yaml", "--max_steps", "9"]
    found = resolve(*flags, learning_rate=5e-5, seed=3).training
    assert (found.seed, found.learning_rate, found.save_steps, found.max_steps) == (3, 1e-3, 3, 9)
    assert found.output_dir == "runs/x"


@pytest.mark.parametrize("form", ["yaml", "json", "config"])
def test_wrong_setting_of_a_file_names_its_line(form, tmp_path):
    path = tmp_path / f"mine.{form}"
    lines = {
        "yaml": "model_name_or_path: demo\ndataset_name: rows.jsonl\n# the steps\nmax_steps: many\n",
        "json": '{\n  "model_name_or_path": "demo",\n  "dataset_name": "rows.jsonl",\n  "max_steps": "many"\n}',
        "config": "seed: 3\n\n\n'max_steps' : many\n",
    }
    path.write_text(lines[form])
    with pytest.raises(RecipeError, match=r"mine\.\w+, line 4: max_steps: int expected, found 'many'"):
        resolve("--config", str(path)) if form == "config" else Recipe.load(path).resolve()


def test_yaml_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model_name_or_path: demo\ndatasets:\n- path: a.jsonl\n  limit: 5\n- b.jsonl\nuse_peft: true\n")
    settings = Recipe.load(path).resolve()
    assert settings.rows.datasets == [{"path": "a.jsonl", "limit": 5}, "b.jsonl"]
    assert settings.training.output_dir == "runs/mine" and settings.model.use_peft


def test_values_of_other_types_become_the_settings_own(tmp_path, monkeypatch):
    variables = resolve(template_kwargs={"date_string": date(2026, 1, 2), 1: (2,)}).labels.template_kwargs
    assert variables == {"date_string": "2026-01-02", "1": [2]}  # as the JSON of a flag has them
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = resolve(
        max_steps=2.0, model_name_or_path=Path("~/model"), datasets="~/a.jsonl", dataset_name=None,
        dtype=torch.bfloat16,
        use_peft=True, lora_target_modules="q_proj", lora_modules_to_save={"b", "a"}, output_dir=Path("~/out"),
        save_strategy=False, template_kwargs='{"enable_thinking": false}', lora_config='{"r": 3}', learning_rate="1e-3",
        eval_dataset=[{"path": Path("~/held.jsonl")}], filters='{"exact_duplicates": true}',
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
    assert settings.rows.filters == {"exact_duplicates": True} and settings.training.learning_rate == 1e-3


@pytest.mark.parametrize("spelling", [True, "true", "full_shard", "full_shard auto_wrap", ["full_shard", "auto_wrap"]])
def test_spellings_of_fsdp(spelling):
    config = {"fsdp_version": 2, "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
    training = resolve(fsdp=spelling, fsdp_config=config).training
    assert training.fsdp is True and training.fsdp_config["transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer"]
    assert resolve("--fsdp").training.fsdp is True and not resolve("--fsdp", "false").training.fsdp


def test_parallelism_config_is_a_mapping():
    assert resolve("--parallelism_config", '{"sp_size": 2}').training.parallelism_config.sp_size == 2
    assert resolve(parallelism_config=ParallelismConfig(cp_size=4)).training.parallelism_config.cp_size == 4


@pytest.mark.parametrize("name", ["cp", "sp"])
def test_launchers_that_split_rows(name, monkeypatch):
    for key, value in launcher(name).items():
        if "PARALLELISM" in key:
            monkeypatch.setenv(key, value)
    config = ParallelismConfig()
    assert getattr(config, f"{name}_size") == config.total_size == 2
    if name == "cp":
        apart = "packing keeps documents apart by a mask, which context parallelism drops; set it"
        assert refused(packing=True, max_length=64).startswith(apart)
    else:
        assert resolve(packing=True, max_length=64).training.packing


def test_rows_may_be_handed_over():
    data = Dataset.from_list(ROWS)
    assert resolve(dataset_name=data).rows.datasets == [data]
    assert resolve(dataset_name=None, datasets=data, eval_dataset=data).rows.eval_dataset == [data]
    assert json.dumps(shown(resolve(dataset_name=data).chosen))


def test_recipe_is_not_changed_by_what_is_done_with_its_settings():
    recipe = Recipe(**BASE, model_init_kwargs={"x": 1})
    recipe.resolve().training.model_init_kwargs.clear()
    assert recipe.settings["model_init_kwargs"] == {"x": 1}


def test_a_recipe_shows_what_it_sets_and_help_shows_what_can_be_set():
    recipe = Recipe(model_name_or_path="demo", hub_token="hf_x", dataset_name=[{"text": "a"}], use_peft=True)
    assert repr(recipe) == "Recipe(model_name_or_path='demo', dataset_name='list with 1 rows', use_peft=True)"
    assert inspect.signature(Recipe).parameters["train_on"].annotation == ["all", "last"]


def test_model_init_kwargs_that_are_settings_become_them():
    kwargs = {"torch_dtype": "float16", "attn_implementation": "eager", "use_cache": False}
    settings = resolve(model_init_kwargs=kwargs)
    assert (settings.model.dtype, settings.model.attn_implementation) == ("float16", "eager")
    assert settings.training.model_init_kwargs == {"use_cache": False}
    assert resolve("--dtype", "float32", model_init_kwargs=kwargs).model.dtype == "float32"
    # the folder may come later than what was chosen for a hub's model
    assert (
        Recipe(**{**BASE, "model_revision": "v1"}).resolve(["--model_name_or_path", "."]).model.model_revision == "v1"
    )


# what is not installed, or does not go together, is said before any data is read


NOT_NONE = "check max_steps learning_rate packing train_on lora_r datasets"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_name_or_path": None}, "no model"),
        ({"dataset_name": None}, "no data"),
        ({"optim": "lomo"}, "optim=lomo"),
        ({"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}, "optim=galore_adamw"),
        ({"optim_args": "nonsense"}, "optim"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "lr_scheduler_type=cosine"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "eval strategy"),
        ({"report_to": "mlflow"}, "report_to: mlflow is not installed"),
        ({"report_to": "paper"}, "report_to: paper is not installed"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", **HELD_OUT, "eval_steps": 7}, "load_best_model"),
        ({"assistant_only_loss": True, "completion_only_loss": False}, "assistant_only_loss"),
        ({"formatting_func": "question-answer", "completion_only_loss": True}, "response_template"),
        ({"formatting_func": "question-answer", "response_template": "A", "completion_only_loss": False}, "response"),
        ({"accelerator_config": {"splits": 1}}, "splits"),
        ({"fp16": True, "bf16": True}, "bf16 and fp16 say the same in two ways"),
        ({"model_init_kwargs": {"torch_dtype": "float17"}}, "dtype: invalid choice: 'float17'"),
        ({"model_init_kwargs": {"dtype": "float32"}, "dtype": "float16"}, "dtype and model_init_kwargs say the same"),
        ({"include_num_input_tokens_seen": "some"}, "one of all, non_padding, no"),
        ({"dataset_test_split": "dev"}, "dataset_test_split does nothing without eval_dataset"),
        ({"model_name_or_path": ".", "model_revision": "v1"}, "model_revision is for a model on a hub"),
        ({"eval_dataset": "held.jsonl", "test_size": 2}, "two ways"),
        ({"parallelism_config": {"cp": 2}}, "unexpected keyword argument 'cp'"),
        *(({name: None}, f"{name}: a value is missing") for name in NOT_NONE.split()),
        (["--max_steps", "many"], "max_steps: int expected, found 'many'"),
        (["--packing_strategy", "best"], "invalid choice: 'best'"),
        ({"lora_preset": "all"}, "lora_preset"),
        (["--config", "no.yaml"], "'no.yaml' does not exist"),
        (["--config"], "--config: expected one argument"),
    ],
)
def test_what_cannot_be_is_one_line(given, message):
    assert message in (refused(**given) if isinstance(given, dict) else refused(*given))


def test_bf16_without_the_hardware_is_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "bf16" in refused(bf16=True, use_cpu=False)


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_missing_tracker(monkeypatch, tracker):
    available = "transformers.integrations.integration_utils.get_available_reporting_integrations"
    monkeypatch.setattr("ma_sft.config.find_spec", lambda name: None)
    monkeypatch.setattr(available, list)
    message = refused("--report_to", tracker)
    assert f"report_to: {tracker} is not installed; " in message and "'ma-sft[trackers]'" in message
    assert resolve().training.report_to == []


# secrets


def test_secrets_are_not_shown():
    chosen = {"hub_token": "hf_1", "model_init_kwargs": {"token": "hf_2", "a": [{"api_key": "3"}]}, "eos_token": "</s>"}
    assert shown(chosen) == {"model_init_kwargs": {"a": [{}]}, "eos_token": "</s>"}
    args = "--hub_token hf_1 --hub-token=hf_2 --model_init_kwargs {'token':'hf_3'} --eos_token </s>".split()
    line = " ".join(shown_command(args))
    assert "hf_" not in line and "</s>" in line
    assert "hf_secret" not in refused("--hub_tokn=hf_secret") + refused(hub_token=["hf_secret"])


# what ma_sft does with TRL's settings


def labelled(model, rows, *, held_out=False, **settings):
    settings = resolve(**{"model_name_or_path": str(model), "dataset_name": rows, **settings})
    tokenizer, added = load_tokenizer(settings)
    return label(settings, tokenizer, held_out=held_out), tokenizer, added, settings


def test_completion_only_loss_false_trains_every_token(tiny_bpe, rows):
    found, tokenizer, _, settings = labelled(tiny_bpe, rows, completion_only_loss=False)
    assert found.dataset["labels"] == found.dataset["input_ids"] and len(found.dataset) == 4
    assert not check(settings, tokenizer, found).errors
    always, *_ = labelled(tiny_bpe, rows)
    assert found.dataset["input_ids"] == always.dataset["input_ids"] and -100 in always.dataset["labels"][0]


def test_a_run_is_named_for_its_folder(tiny_bpe, rows):
    recipe = {"model_name_or_path": str(tiny_bpe), "dataset_name": rows, "report_to": "none"}
    for more, name in (({}, "sft"), ({"output_dir": "out/mine/"}, "mine"), ({"output_dir": "out", "name": "x"}, "x")):
        settings = Recipe(**recipe, **more).resolve()
        assert settings.run.name == settings.training.run_name == name


def test_dataset_text_field_names_the_column(tiny_bpe, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"body": "What is so"}\n{"body": "user system"}\n')
    found, tokenizer, *_ = labelled(tiny_bpe, str(path), dataset_text_field="body")
    texts = [tokenizer.decode(ids) for ids in found.dataset["input_ids"]]
    assert sorted("What is so" in text for text in texts) == [False, True]
    with pytest.raises(MaSftError, match="prose"):
        labelled(tiny_bpe, str(path), dataset_text_field="prose")


@pytest.mark.parametrize("setting", ["dataset_config", "dataset_train_split"])
def test_what_is_for_hub_data_sets_is_refused_for_files(tiny_bpe, rows, setting):
    with pytest.raises(RecipeError, match=f"{setting}=de says nothing of .*, a .jsonl file; remove it"):
        labelled(tiny_bpe, rows, **{setting: "de"})


def test_eos_and_pad_token(tiny_bpe, rows):
    for token, message in (("<|endoftext|>", r"the chat template ends a turn with '<\|im_end\|>"),
                           ("<end>", "the tokenizer has no token '<end>'")):  # fmt: skip
        with pytest.raises(RecipeError, match=f"eos_token: {message}"):
            labelled(tiny_bpe, rows, eos_token=token)
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
    for none in ("none.jinja", "none"):
        with pytest.raises(MaSftError):
            labelled(tiny_bpe, rows, chat_template_path=str(tmp_path / none))


# Each setting that ma_sft does itself, with what shows it.

SYSTEM = {"messages": [user("a"), user("b"), assistant("c")]}
TWO_TURNS = {"messages": [user("user"), assistant("assistant")] * 2}
QWEN3 = str(SHELF / "qwen3.jinja")
THOUGHTS = {"messages": [t for n in "12" for t in (user(n), assistant(f"<think>\nso\n</think>\n\n{n}"))]}


@pytest.fixture(scope="module")
def see(tiny_bpe, rows, tmp_path_factory):
    """Labels rows as settings say: `see(content, **settings)` gives the texts, the trained texts and all else."""
    folder = tmp_path_factory.mktemp("see")

    def look(content=None, *, held_out=False, **settings):
        if content is not None:
            path = write_rows(folder / f"{len(list(folder.iterdir()))}.jsonl", content)
            settings = {"dataset_name": path, **settings}
        found, tokenizer, *_ = labelled(tiny_bpe, rows, held_out=held_out, **settings)
        texts = [tokenizer.decode(ids) for ids in found.dataset["input_ids"]]
        trained = [tokenizer.decode([i for i in ids if i != -100]) for ids in found.dataset["labels"]]
        return texts, trained, found

    look.rows, look.folder = rows, folder
    return look


def splits(see):
    path = see.folder / "splits"
    if not path.exists():
        DatasetDict({"train": Dataset.from_list(ROWS[:1]), "more": Dataset.from_list(ROWS[:3])}).save_to_disk(path)
    return str(path)


def weighted(see, **settings):
    few = write_rows(see.folder / "few.jsonl", ROWS[:1])
    return len(see(datasets=[{"path": p, "weight": 1} for p in (see.rows, few)], dataset_name=None, **settings)[0])


def marked(see):
    path = see.folder / "mark.jinja"
    path.write_text(
        "{% for m in messages %}{{ m['role'] + mark + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant' + mark }}{% endif %}"
    )
    return str(path)


LABELS = {
    "dataset_name": lambda see: len(see()[0]) == 4,
    "datasets": lambda see: len(see(dataset_name=None, datasets=[see.rows, see.rows])[0]) == 8,
    "eval_dataset": lambda see: len(see(ROWS[:1], eval_dataset=[see.rows], held_out=True)[0]) == 4,
    "test_size": lambda see: len(see(test_size=1)[0]) == 3,
    "test_near_duplicates": lambda see: "1 groups that stay together" in error_of(
        lambda: see([ROWS[0]] * 4, test_size=2, test_near_duplicates=0.9)
    ),
    "filters": lambda see: len(see([*ROWS, *ROWS], filters={"exact_duplicates": True})[0]) == 4,
    "stopping_strategy": lambda see: weighted(see, stopping_strategy="all_exhausted") > weighted(see),
    "dataset_streaming": lambda see: (
        see(dataset_streaming=True, max_steps=1)[2].counts.checked_rows_of_the_stream == 4
    ),
    "dataset_train_split": lambda see: len(see(dataset_name=splits(see), dataset_train_split="more")[0]) == 3,
    "dataset_test_split": lambda see: (
        len(see(eval_dataset=[splits(see)], dataset_test_split="more", held_out=True)[0]) == 3
    ),
    "dataset_format": lambda see: (
        see([{**ROWS[0], "prompt": "P", "completion": "C"}], dataset_format="prompt-completion")[1][0].startswith("C")
    ),
    "on_error": lambda see: see([*ROWS, "broken"], on_error="skip")[2].counts.skipped_rows == 1,
    "system_prompt": lambda see: "Be so" in see(system_prompt="Be so")[0][0],
    "merge_turns": lambda see: see([SYSTEM], merge_turns=True)[0][0].count("<|im_start|>user") == 1,
    "template": lambda see: "###Question" in see(template="question-answer")[0][0],
    "template_kwargs": lambda see: "user::Say" in see(template=marked(see), template_kwargs={"mark": "::"})[0][0],
    "train_on": lambda see: see([TWO_TURNS], train_on="last")[1][0].count("assistant") == 1,
    "history": lambda see: (
        len(see([THOUGHTS], template=QWEN3, history="mask")[0]) < len(see([THOUGHTS], template=QWEN3)[0])
    ),
    "formatting_func": lambda see: see(formatting_func="question-answer")[1][0].startswith("###Question"),
    "response_template": lambda see: see(formatting_func="question-answer", response_template="###Answer:")[1][
        0
    ].strip().startswith("it is"),
    "instruction_template": lambda see: (
        see(formatting_func="question-answer", response_template="###Answer:", instruction_template="###Question:")[2]
        .collator.instruction_template
        is not None
    ),
    "dataset_num_proc": lambda see: len(see(dataset_num_proc=2)[0]) == 4,
    "seed": lambda see: see(seed=1)[0] != see(seed=2)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_setting_shows_in_the_labels(name, see):
    assert LABELS[name](see)


@dataclasses.dataclass
class Run:
    """Two steps on the tiny model: what was resolved, the trainer, the folder, the summary."""

    settings: object
    trainer: object
    out: Path
    summary: dict


def train(tmp_path_factory, model, rows, **settings):
    out = tmp_path_factory.mktemp("run") / "out"
    given = {"model_name_or_path": str(model), "dataset_name": rows, "output_dir": str(out)}
    recipe = Recipe(**{**given, "max_steps": 2, "per_device_train_batch_size": 2, "report_to": [],
                       "disable_tqdm": True, "bf16": False, "rehearse": False, **settings})  # fmt: skip
    kept = []
    summary = run(recipe, on_trainer=kept.append)
    return Run(recipe.resolve(), kept[0], out, summary)


@pytest.fixture(scope="module")
def full(tiny_bpe, rows, tmp_path_factory):
    (tmp_path_factory.getbasetemp() / "grade.py").write_text("def one(answer, reference):\n    return 0.25\n")
    return train(
        tmp_path_factory, tiny_bpe, rows, name="mine", run_name="shown", optim="sgd", full_learning_rate=3e-3,
        learning_rate=1.0, report_to=["tensorboard"], save_strategy="steps", save_steps=1, save_total_limit=1,
        dataloader_drop_last=True, test_size=1, generate_eval=1, max_new_tokens=3, freeze=["embed"],
        metric=f"{tmp_path_factory.getbasetemp()}/grade.py:one", model_init_kwargs={"attn_implementation": "eager"},
        padding_free=True, logging_nan_inf_filter=False, check=False, logging_steps=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tiny_bpe, rows, tmp_path_factory):
    return train(
        tmp_path_factory, tiny_bpe, rows, use_peft=True, lora_preset="attention", lora_config={"r": 3},
        lora_dropout=0.25, loraplus_lr_ratio=4, learning_rate=1e-3, merge=False, dtype="bfloat16", packing=True,
        max_length=64, packing_strategy="wrapped", attn_implementation="eager", save_strategy="no", test_size=1,
        eval_packing=False,
    )  # fmt: skip


def lora_layers(trainer):
    return {n.split(".")[-1]: m for n, m in trainer.model.named_modules() if hasattr(m, "lora_A")}


def learning_rates(trainer):
    """(whether it is LoRA's B, its learning rate) of the trained parameters"""
    names = {id(p): "lora_B" in name for name, p in trainer.model.named_parameters()}
    return {(names[id(p)], group["initial_lr"]) for group in trainer.optimizer.param_groups for p in group["params"]}


FULL = {
    "name": lambda run: run.summary["name"] == "mine",
    "output_dir": lambda run: (run.out / "model" / "config.json").is_file(),
    "run_name": lambda run: run.trainer.args.run_name == "shown",
    "optim": lambda run: type(run.trainer.optimizer.optimizer) is torch.optim.SGD,
    "full_learning_rate": lambda run: run.trainer.args.learning_rate == 3e-3,
    "report_to": lambda run: any(run.out.rglob("events.out.tfevents.*")),
    "save_strategy": lambda run: (run.out / "checkpoint-2" / "complete.json").is_file(),
    "save_total_limit": lambda run: len(list(run.out.glob("checkpoint-*"))) == 1,
    "dataloader_drop_last": lambda run: len(run.trainer.train_dataset) == 3,
    "generate_eval": lambda run: len(json.loads((run.out / "answers.json").read_text())) == 1,
    "metric": lambda run: run.summary["evaluation"]["after"]["score"] == 0.25,
    "max_new_tokens": lambda run: run.settings.evaluation.max_new_tokens == 3,
    "freeze": lambda run: not run.trainer.model.get_input_embeddings().weight.requires_grad,
    "model_init_kwargs": lambda run: run.trainer.model.config._attn_implementation == "eager",
    "padding_free": lambda run: run.trainer.data_collator.padding_free,
    "logging_nan_inf_filter": lambda run: run.trainer.args.logging_nan_inf_filter is False,
    "check": lambda run: json.loads((run.out / "run.json").read_text())["findings"] is None,
    "disable_tqdm": lambda run: not any("Bar" in type(c).__name__ for c in run.trainer.callback_handler.callbacks),
    "model_name_or_path": lambda run: run.trainer.model.config.model_type == "qwen3",
    "bf16": lambda run: run.trainer.args.bf16 is False,
    "use_cpu": lambda run: run.trainer.args.use_cpu is not torch.accelerator.is_available(),
    "ddp_find_unused_parameters": lambda run: run.trainer.args.ddp_find_unused_parameters is False,
}
ADAPTER = {
    "use_peft": lambda run: (run.out / "adapter" / "adapter_config.json").is_file(),
    "lora_preset": lambda run: set(lora_layers(run.trainer)) == {"q_proj", "k_proj", "v_proj", "o_proj"},
    "lora_config": lambda run: run.trainer.model.peft_config["default"].r == 3,
    "lora_dropout": lambda run: lora_layers(run.trainer)["q_proj"].lora_dropout["default"].p == 0.25,
    "loraplus_lr_ratio": lambda run: learning_rates(run.trainer) == {(False, 1e-3), (True, 4e-3)},
    "learning_rate": lambda run: run.trainer.args.learning_rate == 1e-3,
    "merge": lambda run: not (run.out / "merged").exists(),
    "dtype": lambda run: run.trainer.model.get_input_embeddings().weight.dtype == torch.bfloat16,
    "packing": lambda run: len(run.trainer.train_dataset) < 3 + 2,
    "max_length": lambda run: max(len(row["input_ids"]) for row in run.trainer.train_dataset) <= 64,
    "packing_strategy": lambda run: not run.trainer.data_collator.padding_free,
    "attn_implementation": lambda run: run.trainer.model.config._attn_implementation == "eager",
    "eval_packing": lambda run: len(run.trainer.eval_dataset) == 1,
}


@pytest.mark.parametrize(
    ("kind", "name"), [*(("full", name) for name in FULL), *(("adapter", name) for name in ADAPTER)]
)
def test_setting_shows_in_a_run(kind, name, request):
    assert {**FULL, **ADAPTER}[name](request.getfixturevalue(kind))


def test_adapter_is_tried_out_before_any_row_is_read(tiny_bpe, tmp_path):
    model = {"model_name_or_path": str(tiny_bpe), "use_peft": True, "dataset_name": "no.jsonl"}
    for name, value in (("lora_target_parameters", ["experts.up"]), ("lora_target_modules", ["no_proj"])):
        with pytest.raises(RecipeError, match=f"^{name}=.*'{value[0]}' matches nothing"):
            run(Recipe(**model, output_dir=str(tmp_path / name), **{name: value}))


def test_default_adapter_trains_a_mixture_of_experts(tiny_bpe, rows, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bpe)
    folder = save_tiny(tmp_path / "moe", tokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM)
    recipe = Recipe(
        model_name_or_path=str(folder), dataset_name=rows, use_peft=True, max_steps=1, output_dir=str(tmp_path / "run"),
        merge=False, report_to=[], disable_tqdm=True, save_strategy="no", max_length=32,
    )  # fmt: skip
    run(recipe, ["--rehearse", "false"])
    lines = dict(json.loads((tmp_path / "run" / "run.json").read_text())["lines"])
    assert "2 x experts.gate_up_proj" in lines["the adapter is on"] and "2 x q_proj" in lines["the adapter is on"]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0
    with pytest.raises(RecipeError, match="lora_dropout != 0"):
        run(recipe, ["--lora_dropout", "0.05", "--output_dir", str(tmp_path / "other")])


# Settings that a test above observes, or one of another file.
PROVEN = {
    "test_settings.py": "dataset_config dataset_text_field completion_only_loss chat_template_path eos_token pad_token "
    "fsdp parallelism_config",
    "training/test_adapters.py": "lora_target_modules lora_target_parameters",
    "test_recipes.py": "adapter_name_or_path",
    "labels/test_template_date.py": "template_now",
    "labels/test_encoder.py": "add_eos",
    "training/test_prepare.py": "overflow truncation_mode",
    "training/test_methods.py": "use_bnb_nested_quant quantization_config",
    "training/test_rehearsal.py": "rehearse peft_config",
    "training/test_evaluation.py": "predict_with_generate early_stopping_patience resume",
    "training/test_folder.py": "overwrite_output_dir save_only_model",
    "training/test_streams.py": "resume_from_checkpoint",
    "training/test_distributed.py": "ddp_backend",
    "hub/test_publish.py": "push_to_hub",
    "hub/test_commands.py": "model_revision",
}


def test_every_setting_of_ours_is_observed():
    ours = {name for name, what in known_settings().items() if what.kind == "ours"}
    assert ours == {*LABELS, *FULL, *ADAPTER, *" ".join(PROVEN.values()).split()}
    assert all((ROOT / "tests" / file).is_file() for file in PROVEN)
