"""Settings: one name everywhere, later wins, and a wrong one ends in one line with the right name."""

import inspect
from typing import Literal

import pytest

from ma_sft import Recipe, RecipeError

BASE = {"name": "x", "model_name_or_path": "demo", "dataset_name": "rows.jsonl"}


def test_recipe_then_yaml_then_flags(tmp_path):
    for name, text in {"a": "learning_rate: 1e-4\nmax_steps: 7\nsave_steps: 3\n", "b": "learning_rate: 1e-3\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    flags = ["--config", f"{tmp_path}/a.yaml", f"--config={tmp_path}/b.yaml", "--max_steps", "9"]
    settings = Recipe(**BASE, learning_rate=5e-5, seed=3).resolve(flags)
    assert settings.training.seed == 3
    assert settings.training.learning_rate == 1e-3
    assert settings.training.save_steps == 3
    assert settings.training.max_steps == 9
    assert settings.training.output_dir == "runs/x"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max_step", "3"], "unknown setting '--max_step'; did you mean 'max_steps'?"),
        (["--learnin_rate=1"], "did you mean 'learning_rate'?"),
        (["--max_steps", "many"], "max_steps: int expected, found 'many'"),
        (["--packing_strategy", "best"], "invalid choice: 'best'"),
        (["--config", "no.yaml"], "'no.yaml' does not exist"),
        (["--config"], "--config: expected one argument"),
    ],
)
def test_wrong_flag(args, message):
    with pytest.raises(RecipeError) as error:
        Recipe(**BASE).resolve(args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


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
        (Recipe(**BASE).resolve(["--config", str(path)]) if form == "config" else Recipe.load(path).resolve())


@pytest.mark.parametrize("missing", ["model_name_or_path", "dataset_name"])
def test_model_and_data_are_needed(missing):
    with pytest.raises(RecipeError, match="no model" if "model" in missing else "no data"):
        Recipe(**{k: v for k, v in BASE.items() if k != missing}).resolve()


def test_yaml_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model_name_or_path: demo\ndatasets:\n- path: a.jsonl\n  limit: 5\n- b.jsonl\nuse_peft: true\n")
    settings = Recipe.load(path).resolve()
    assert settings.rows.datasets == [{"path": "a.jsonl", "limit": 5}, "b.jsonl"]
    assert settings.training.output_dir == "runs/mine"
    assert settings.model.use_peft


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n"])
def test_broken_yaml(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"mine.yaml"):
        Recipe.load(path)


def test_python_file_without_a_recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("x = 1\n")
    with pytest.raises(RecipeError, match="has no variable `recipe"):
        Recipe.load(path)


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_missing_tracker(monkeypatch, tracker):
    available = "transformers.integrations.integration_utils.get_available_reporting_integrations"
    monkeypatch.setattr("ma_sft.config.find_spec", lambda name: None)
    monkeypatch.setattr(available, list)
    with pytest.raises(RecipeError, match=rf"report_to: {tracker} is not installed; .*'ma-sft\[trackers\]'"):
        Recipe(**BASE).resolve(["--report_to", tracker])
    assert Recipe(**BASE).resolve().training.report_to == []


def test_bf16_without_the_hardware_is_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RecipeError, match="bf16") as error:
        Recipe(**BASE, bf16=True, use_cpu=False).resolve()
    assert "\n" not in str(error.value)


def test_a_recipe_shows_what_it_sets_and_help_shows_what_can_be_set():
    recipe = Recipe(model_name_or_path="demo", hub_token="hf_x", dataset_name=[{"text": "a"}], use_peft=True)
    assert repr(recipe) == "Recipe(model_name_or_path='demo', dataset_name='list with 1 rows', use_peft=True)"
    assert inspect.signature(Recipe).parameters["train_on"].annotation == Literal["all", "last"]
