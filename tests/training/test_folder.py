"""A run removes what a run wrote, by its own list; and what comes after training cannot lose what was trained."""

import json
import shutil
import time

import pytest
from helpers import QUICK, write_rows
from transformers import TrainerCallback

from ma_sft import Recipe, RecipeError, run

ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i} so."} for i in range(8)]


@pytest.fixture(scope="module")
def finished(tiny_bpe, tmp_path_factory):
    """(settings, a finished run's folder) with checkpoints, adapter, merged model, report and TensorBoard's files."""
    home = tmp_path_factory.mktemp("folder")
    rows = write_rows(home / "rows.jsonl", ROWS)
    more = {"model_name_or_path": str(tiny_bpe), "dataset_name": rows, "eval_dataset": rows, "use_peft": True}
    more |= {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4, "report_to": ["tensorboard"]}
    settings = {**QUICK, **more}
    run(Recipe(**settings, output_dir=str(home / "run")))
    return settings, home / "run"


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the run, and a function that starts the same run in it with more settings."""
    settings, folder = finished
    out = shutil.copytree(folder, tmp_path / "run")

    def start(**more):
        return run(Recipe(**{**settings, "output_dir": str(out), **more}))

    return out, start


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def another(finished, tmp_path):
    """Makes recipes of another run like it, in `tmp_path / "run"`."""
    return lambda **more: Recipe(**{**finished[0], "output_dir": str(tmp_path / "run"), **more})


ANSWERS = {"generate_eval": 1, "max_new_tokens": 2}


def test_overwrite_removes_all_that_a_run_left_in_its_folder_and_follows_no_link(again, tmp_path):
    out, start = again
    assert [*out.glob("runs/*/events.out.tfevents.*")]
    shutil.rmtree(out / "merged")
    (out / "merged").symlink_to(tmp_path / "mine")
    (out / "checkpoint-7").mkdir()  # cut off while it was written
    (out / "checkpoint-7" / "model.safetensors").write_bytes(b"half")
    mine = [out / name for name in ("thesis.tex", "data/rows.jsonl", ".env", "checkpoints/x")]
    mine.append(tmp_path / "mine" / "model.safetensors")
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    began = time.time()
    start(overwrite_output_dir=True, use_peft=False, save_strategy="no")
    assert all(path.read_text() == "mine" for path in mine)
    assert (out / "model").is_dir() and {path.name for path in tmp_path.iterdir()} == {"run", "mine"}
    left = (path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    assert {path for path in left if path.stat().st_mtime < began} == {path for path in mine if out in path.parents}
    assert not (out / "merged").exists() and not [*out.glob("checkpoint-*")]


@pytest.mark.parametrize(
    ("files", "overwrite"),
    [
        *(
            ({"summary.json": "{}", "recipe.json": text}, True)
            for text in ("{}", "[1]", '{"flour": "500 g"}', "broken")
        ),
        *(({"summary.json": "{}"}, True), ({"thesis.tex": "mine"}, True), ({"thesis.tex": "mine"}, False)),
    ],
)
def test_a_strangers_folder_is_no_run_whatever_its_files_are_called(again, tmp_path, files, overwrite):
    _, start = again
    mine = tmp_path / "kitchen"
    mine.mkdir()
    for name, text in files.items():
        (mine / name).write_text(text)
    broken = files.get("recipe.json") == "broken"
    with pytest.raises(RecipeError, match="is not valid JSON" if broken else "holds something that is not a run"):
        start(output_dir=str(mine), overwrite_output_dir=overwrite)
    assert {path.name: path.read_text() for path in mine.iterdir() if path.name != ".lock"} == files


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"dataset_name": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"max_length": 3}, "cuts off every response"),
        ({"adapter_name_or_path": "."}, "adapter_name_or_path: .* would be removed"),
        ({"model_name_or_path": "merged"}, "model_name_or_path: .* would be removed"),
    ],
)
def test_a_run_that_is_refused_removes_nothing(again, more, message):
    out, start = again
    before = files(out)
    more = {key: str(out / value) if key.endswith("_or_path") else value for key, value in more.items()}
    with pytest.raises(ValueError, match=message):
        start(overwrite_output_dir=True, **more)
    assert files(out) == before


def test_neither_another_recipes_run_nor_a_model_alone_is_gone_on_from(again):
    out, start = again
    (out / "summary.json").unlink()
    before = files(out)
    with pytest.raises(RecipeError, match=r"is of another recipe \(learning_rate 0.01 -> 1.0\): bring"):
        start(resume="never", learning_rate=1.0)
    assert files(out) == before
    for path in out.glob("checkpoint-*/*.p*t*"):
        if path.name.startswith(("optimizer", "scheduler", "rng_state")):
            path.unlink()
    with pytest.raises(RecipeError, match=r"checkpoint-2 holds a model alone \(save_only_model\)"):
        start()


class Fail(TrainerCallback):
    """A user's callback that breaks once training is over."""

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step:
            raise RuntimeError("out of luck\nand more")


def test_held_out_rows_that_fail_after_training(another, tmp_path, capfd):
    out, recipe = tmp_path / "run", another()
    summary = run(recipe, on_trainer=lambda trainer: trainer.add_callback(Fail()))
    assert summary["failed"] == {"the held-out rows after training": "RuntimeError: out of luck"}
    assert json.loads((out / "summary.json").read_text()) == summary and summary["steps"] == 2
    assert (out / "adapter" / "adapter_model.safetensors").is_file() and (out / "merged").is_dir()
    assert (out / "report.html").is_file()
    assert "the held-out rows after training failed, what was trained is saved" in capfd.readouterr().err
    assert run(recipe)["name"] == "run-2" and (tmp_path / "run-2" / "summary.json").is_file()
    assert "run holds a finished run: this one goes to" in capfd.readouterr().out
    assert json.loads((out / "summary.json").read_text()) == summary


def test_metric_and_merge_that_fail_after_training(another, tmp_path, tiny_bpe):
    (tmp_path / "bad.py").write_text("def metric(answer, reference):\n    return 1 / 0\n")
    base, out = shutil.copytree(tiny_bpe, tmp_path / "base"), tmp_path / "run"
    metric = {**ANSWERS, "metric": f"{tmp_path}/bad.py:metric"}

    class Vanish(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            (base / "model.safetensors").unlink()

    recipe = another(**metric, max_steps=1, model_name_or_path=str(base))
    summary = run(recipe, on_trainer=lambda trainer: trainer.add_callback(Vanish()))
    assert set(summary["failed"]) == {"grading the answers", "merging the adapter"}
    assert "held-out row 0: ZeroDivisionError" in summary["failed"]["grading the answers"]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert (out / "report.html").is_file() and not (out / "merged").exists()


def test_a_metric_that_is_not_there_is_said_before_training(another, tmp_path):
    with pytest.raises(RecipeError, match="none:such"):
        run(another(generate_eval=1, metric="none:such"))
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("use_peft", [False, True])
def test_what_greedy_decoding_ignores_is_saved_as_the_base_has_it(another, tmp_path, tiny_bpe, use_peft):
    """transformers refuses to save it in a configuration that changed, as ours does by its end ids."""
    base = shutil.copytree(tiny_bpe, tmp_path / "base")
    said = {"temperature": 0.6, "top_p": 0.9, "length_penalty": 2.0, "stop_strings": ["zz"]}
    (base / "generation_config.json").write_text(json.dumps(said))
    assert "failed" not in run(another(model_name_or_path=str(base), use_peft=use_peft, **ANSWERS))
    for folder in ["merged"] if use_peft else ["model", "checkpoint-1"]:
        found = json.loads((tmp_path / "run" / folder / "generation_config.json").read_text())
        assert found.items() >= said.items() and found["eos_token_id"]


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ('"text"', "not a mapping"),
        ("{", "not a valid JSON file"),
        ('{"max_new_tokens": "x"}', "not supported between"),
        ('{"cache_implementation": "none"}', "Invalid `cache_implementation`"),
        ('{"eos_token_id": [2, "x"]}', r"eos_token_id: whole numbers expected, found \[2, 'x'\]"),
    ],
)
def test_broken_generation_config_of_the_base_is_one_line_before_training(another, tmp_path, tiny_bpe, said, found):
    base = shutil.copytree(tiny_bpe, tmp_path / "base")
    (base / "generation_config.json").write_text(said)
    with pytest.raises(RecipeError, match=f"generation_config.json.*{found}") as error:
        run(another(model_name_or_path=str(base), **ANSWERS))
    assert "\n" not in str(error.value) and not (tmp_path / "run/checkpoint-1").exists()
