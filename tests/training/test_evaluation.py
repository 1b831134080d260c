"""Held-out rows have one measure, and a run that goes on or is handed over does as one that never stopped."""

import json
import re
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
from datasets import Dataset
from filelock import FileLock, Timeout
from helpers import QUICK, Die, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerCallback
from transformers.utils import logging

from ma_sft import Recipe, RecipeError, RunError, make_trainer, run
from ma_sft.errors import Interrupted
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.training.checkpoints import COMPLETE, StopEvaluation
from ma_sft.training.evaluation import generate_answers

ROWS = [{"prompt": f"What is {i}?", "completion": "It is " + "so " * (i * i % 7) + f"{i}."} for i in range(12)]


@pytest.fixture
def settings(tiny_bpe, tmp_path):
    """A recipe's settings with training rows and two held-out files, `near` and `far`."""
    parts = {"rows": ROWS, "near": ROWS[:5], "far": ROWS[5:]}
    rows, *held_out = [write_rows(tmp_path / f"{name}.jsonl", part) for name, part in parts.items()]
    places = {"model_name_or_path": str(tiny_bpe), "output_dir": str(tmp_path / "run")}
    return {**QUICK, **places, "dataset_name": rows, "eval_dataset": held_out}


@pytest.fixture
def start(settings, tmp_path):
    """Starts a run in a folder, with callbacks and more settings; its summary."""

    def started(out="run", *callbacks, **more):
        def add(trainer):
            for callback in callbacks:
                trainer.add_callback(callback)

        return run(Recipe(**{**settings, "output_dir": str(tmp_path / out), **more}), on_trainer=add)

    return started


def logs(out, key):
    return [log[key] for log in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines()) if key in log]


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}
SAVES = {"save_strategy": "steps", "save_steps": 1}
BEST = {**EVERY_STEP, **SAVES, "load_best_model_at_end": True}
BEST_ANSWERS = {**BEST, "metric_for_best_model": "eval_exact_match", "generate_eval": 2, "max_new_tokens": 3}
KINDS = [
    {"per_device_eval_batch_size": 1},
    {"per_device_eval_batch_size": 5, "loss_type": "dft"},
    {"per_device_eval_batch_size": 3, "label_smoothing_factor": 0.2},
    {"per_device_eval_batch_size": 2, "eval_packing": True, "max_length": 128},
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_eval_loss_is_one_measure_whatever_batch_packing_and_loss(start, tmp_path):
    found = []
    for number, kind in enumerate(KINDS):
        summary, out = start(f"{number}", **EVERY_STEP, learning_rate=0.0, **kind), tmp_path / f"{number}"
        losses = logs(out, "eval_loss")
        # before, at both steps; the last step's is not made again for after
        assert len(losses) == 3 and losses == pytest.approx([losses[0]] * 3, abs=1e-6)
        assert losses[0] == pytest.approx(summary["eval_loss"])
        assert losses[0] == pytest.approx(summary["evaluation"]["before"]["loss"])
        own = bool({"loss_type", "label_smoothing_factor"} & kind.keys())
        assert bool(logs(out, "eval_near_objective")) == own
        found.append((losses[0], logs(out, "eval_far_loss")[0]))
    for pair in found:
        assert pair == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("names", [("near", "far"), ("test",), ("v1.0", "data/v1.1")])
def test_held_out_data_sets_keep_their_names(settings, labelled, names):
    del settings["eval_dataset"]
    rows = [{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}] * 3 if labelled else ROWS[:3]
    tests = {name: Dataset.from_list(rows[at:]) for at, name in enumerate(names)}
    best = {**BEST, "metric_for_best_model": f"eval_{names[0]}_loss"}
    trainer = make_trainer(Recipe(**{**settings, **best}), eval_dataset=tests)
    assert {name: len(part) for name, part in trainer.eval_dataset.items()} == dict(zip(names, (3, 2), strict=False))
    assert {"eval_loss", *(f"eval_{name}_loss" for name in names)} <= trainer.evaluate().keys()


def test_a_best_metric_that_is_not_measured_is_refused_before_the_first_step(start, tmp_path):
    for metric in ("eval_test_loss", "exact_match", "eval_objective"):
        with pytest.raises(RecipeError, match=r"metric_for_best_model: .* is not measured; one of near_loss, "):
            start(**BEST, metric_for_best_model=metric)
    (broken := tmp_path / "broken.jsonl").write_text('{"messages": 1}\n')
    with pytest.raises(RecipeError, match="'blue' is not measured"):  # and before any row is read
        start(**BEST, metric_for_best_model="blue", dataset_name=str(broken))


def test_the_best_model_by_the_answers(start, tmp_path):
    summary = start(**BEST_ANSWERS, greater_is_better=True, max_steps=5, early_stopping_patience=2)
    assert logs(tmp_path / "run", "eval_exact_match") == [0.0] * 3 and summary["steps"] == 3


def test_answers_at_each_evaluation(start, tmp_path, capsys):
    """Without a terminal each log is a line."""
    for wanted, found in ((False, []), (True, [0.0] * 2)):
        start(f"{wanted}", **EVERY_STEP, generate_eval=2, max_new_tokens=3, predict_with_generate=wanted)
        assert logs(tmp_path / f"{wanted}", "eval_exact_match") == found
        shown = capsys.readouterr().out
        line = r"step 1 of 2: loss \d+\.\d+, token accuracy [\d.]+%, [\d,]+ tokens/s, \d:\d\d:\d\d left"
        assert re.search(line, shown) and "step 0 of 2: eval_near_loss" in shown and "it/s" not in shown


def test_early_stopping_keeps_its_patience_when_the_run_goes_on(start):
    def stopped(out, *callbacks):
        more = {**BEST, "metric_for_best_model": "eval_loss", "max_steps": 12, "learning_rate": 3.0}
        return start(out, EarlyStoppingCallback(early_stopping_patience=3), *callbacks, **more)["steps"]

    uncut = stopped("uncut")
    assert 3 < uncut < 12
    with pytest.raises(RunError, match="killed"):
        stopped("cut", Die(uncut - 1))
    assert stopped("cut") == uncut


def test_another_folder_takes_a_checkpoint_of_the_same_recipe_alone(start, tmp_path):
    start(**SAVES, lr_scheduler_type="linear")
    first, last = (str(tmp_path / f"run/checkpoint-{step}") for step in (1, 2))
    more = {**SAVES, "lr_scheduler_type": "linear", "resume_from_checkpoint": first}
    for key, value in {"per_device_train_batch_size": 3, "learning_rate": 1e-3, "use_peft": True}.items():
        with pytest.raises(RecipeError, match=f"is of another recipe .*{key} .* -> {value}"):
            start("other", **{**more, key: value})
    assert start("other", **more, adam_beta1=0.9, num_train_epochs=5)["steps"] == 2  # as by default; longer
    # More steps from a finished run's checkpoint
    assert start("more", **{**more, "resume_from_checkpoint": last}, max_steps=4)["steps"] == 4
    assert logs(tmp_path / "more", "learning_rate") == pytest.approx([0.005, 0.0025])
    # A plain trainer's checkpoint, whose recipe nobody knows; one that was cut off has none of its own
    foreign = shutil.copytree(first, tmp_path / "foreign/checkpoint-1")
    for path in (Path(first, COMPLETE), foreign / COMPLETE):
        path.unlink()
    assert start("other", **{**more, "resume_from_checkpoint": str(foreign)})["steps"] == 2
    with pytest.raises(RecipeError, match="checkpoint-1 is no whole checkpoint"):
        start("run", **more)
    # Steps of more processes have other rows
    (complete := Path(last, COMPLETE)).write_text(complete.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(RecipeError, match=r"the data is not what .* \(processes 2 -> 1\): bring it back"):
        start("fewer", **{**more, "resume_from_checkpoint": last}, max_steps=4)
    complete.write_text("{")  # by which its rows and recipe are known
    with pytest.raises(RecipeError, match=r"complete.json is not valid JSON"):
        start("fewer", **{**more, "resume_from_checkpoint": last}, max_steps=4)


def weights(out):
    (path,) = [*out.glob("model/model.safetensors"), *out.glob("adapter/adapter_model.safetensors")]
    return path.read_bytes()


def test_stopped_run_goes_on_to_the_same_weights_and_figures(start, tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    more = {**SAVES, "save_steps": 2, "max_steps": 8, "use_peft": True, "lora_dropout": 0.1}
    uncut = start("uncut", **more)
    with pytest.raises(Interrupted, match=r"goes on from .*checkpoint-3") as stopped:
        start("run", Stop(), **more)
    assert stopped.value.exit_code == 0 and not (tmp_path / "run/summary.json").exists()
    went_on = start(**more)
    assert (went_on["train_loss"], went_on["evaluation"]) == (uncut["train_loss"], uncut["evaluation"])
    assert went_on["evaluation"]["before"] != went_on["evaluation"]["after"]
    assert weights(tmp_path / "run") == weights(tmp_path / "uncut")
    assert {*logs(tmp_path / "uncut", "num_tokens")} == {*logs(tmp_path / "run", "num_tokens")}


@pytest.mark.parametrize("streaming", [False, True])
def test_killed_after_the_last_step_trains_no_more(start, tmp_path, streaming, capsys):
    more = {
        **SAVES,
        "dataset_streaming": streaming,
        "per_device_train_batch_size": 5,
        "max_steps": 4,
    }
    whole = start(**more)
    out, expected = tmp_path / "run", weights(tmp_path / "run")
    for path in (out / "summary.json", out / "report.html", out / "model/model.safetensors"):
        path.unlink()
    assert start(**more)["train_loss"] == whole["train_loss"] and weights(out) == expected
    assert f"going on from {out}/checkpoint-4" in capsys.readouterr().out


def test_cut_off_checkpoint_is_skipped(start, tmp_path, capsys):
    with pytest.raises(RunError, match="killed"):
        start("run", Die(2), **SAVES, max_steps=3)
    cut = tmp_path / "run/checkpoint-2"
    (cut / COMPLETE).unlink()
    (cut / "model.safetensors").write_bytes(b"half")
    assert start(**SAVES, max_steps=3)["steps"] == 3 and (cut / COMPLETE).exists()  # made again
    assert f"going on from {tmp_path}/run/checkpoint-1" in capsys.readouterr().out


def test_changed_data_is_refused(settings, start, tmp_path):
    with pytest.raises(RunError, match="killed"):
        start("run", Die(1), **SAVES)
    write_rows(Path(settings["dataset_name"]), ROWS[::-1])
    with pytest.raises(RecipeError, match=r"the data is not what .*checkpoint-1 was trained on .* --resume never"):
        start(**SAVES)
    assert start(**SAVES, resume="never")["steps"] == 2 and logs(tmp_path / "run", "start") == [0]


def test_two_runs_in_one_folder(start, tmp_path):
    lock = FileLock(tmp_path / "run/.lock", blocking=False)

    class Second(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            with pytest.raises(Timeout):
                lock.acquire()

    assert start("run", Second())["steps"] == 2
    with lock, pytest.raises(RunError, match="another process is training in"):
        start(overwrite_output_dir=True)


def test_loss_that_is_no_number_ends_the_run_before_it_is_saved(start, tmp_path):
    with pytest.raises(RunError, match=r"loss is (nan|inf) at step 2"):
        start(**{**SAVES, "save_steps": 2}, learning_rate=1e38, max_grad_norm=0.0)
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_a_start_that_failed_does_not_block_the_corrected_command(start, tmp_path):
    with pytest.raises(RunError):
        start("run", Die(1))
    assert start(learning_rate=1e-3)["steps"] == 2
    assert logs(tmp_path / "run", "start") == [0]


def test_ctrl_c_during_an_evaluation_stops_within_one_batch_and_saves(settings, start):
    seen = []

    class Press(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            if state.global_step:
                seen.append(state.global_step)
                signal.raise_signal(signal.SIGINT)

    more = {**EVERY_STEP, "per_device_eval_batch_size": 1, **SAVES, "save_steps": 500}
    with pytest.raises(Interrupted, match=r"goes on from .*checkpoint-1"):
        recipe = Recipe(**{**settings, **more})
        run(recipe, on_trainer=lambda trainer: trainer.callback_handler.callbacks.insert(0, Press()))
    assert seen == [1]
    assert start(**more)["steps"] == 2


def test_ctrl_c_while_answers_are_generated_stops_within_one_token_and_saves(settings, start):
    more = {**BEST_ANSWERS, "load_best_model_at_end": False, "save_steps": 500, "max_new_tokens": 40}
    seen = []

    def press(trainer):
        def generate(*args, real=trainer.model.generate, **kwargs):
            if trainer.state.global_step and not seen:
                seen.append(trainer.state.global_step)
                signal.raise_signal(signal.SIGINT)
            ids = real(*args, **kwargs)
            assert not seen or trainer.state.global_step == 0, "generated on"
            return ids

        trainer.model.generate = generate

    with pytest.raises(Interrupted, match=r"goes on from .*checkpoint-1"):
        run(Recipe(**{**settings, **more}), on_trainer=press)
    assert seen == [1]
    assert start(**more)["steps"] == 2


def test_the_last_step_of_an_epoch_has_what_is_left(settings):
    del settings["eval_dataset"], settings["max_steps"]
    rows = Dataset.from_list([{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}] * 33)
    recipe = Recipe(**{**settings, "per_device_train_batch_size": 32, "num_train_epochs": 1})
    trainer, steps = make_trainer(recipe, train_dataset=rows), []

    def collate(rows, real=trainer.data_collator):
        steps.append(sum(any(label != -100 for label in row["labels"]) for row in rows))  # without padding
        return real(rows)

    trainer.data_collator = collate
    trainer.train()
    assert steps == [32, 1]


def test_neftune_scales_the_noise_by_each_documents_length(settings):
    rows = Dataset.from_list([{"input_ids": [7] * n, "labels": [7] * n} for n in [3] * 40 + [48] * 4])
    recipe = Recipe(**settings, packing=True, max_length=64, neftune_noise_alpha=5.0)
    trainer = make_trainer(recipe, train_dataset=rows)
    embedding, batch = trainer.model.get_input_embeddings(), trainer.data_collator([trainer.train_dataset[0]])
    trainer.compute_loss(trainer.model.train(), dict(batch))
    noise = (embedding(batch["input_ids"]) - embedding.eval()(batch["input_ids"])).abs().amax(-1)[0]
    starts = [i for i, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
    documents = list(pairwise([*starts, len(noise)]))
    for start, end in documents:
        bound = 5 / ((end - start) * embedding.embedding_dim) ** 0.5
        assert 0.5 * bound < noise[start:end].max() <= bound * 1.001
    assert len({end - start for start, end in documents}) > 1


def test_settings_stay_as_they_were_resolved(settings):
    recipe = Recipe(**settings, packing=True, max_length=64)
    trainer = make_trainer(recipe)
    assert trainer.args.packing and trainer.args.max_length is None  # TRL's guards see packs
    assert recipe.resolve().training.max_length == 64


# -- what is seen while held-out questions are answered


@pytest.fixture(params=[True, False], ids=["bars", "no bars"])
def bars(request):
    """Whether transformers shows progress bars."""
    (logging.enable_progress_bar if request.param else logging.disable_progress_bar)()
    yield request.param
    logging.enable_progress_bar()


@pytest.fixture
def answer(tiny_bpe):
    """Answers three questions, to the limit of five tokens or with the first one."""
    model = AutoModelForCausalLM.from_pretrained(tiny_bpe)
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tiny_bpe))
    prompts = [encoder.encode_prompt([{"role": "user", "content": f"What is {i}?"}]) for i in range(3)]

    def start(ended=False, **more):
        model.generation_config.eos_token_id = list(range(model.config.vocab_size)) if ended else None
        return generate_answers(model, encoder, prompts, max_new_tokens=5, batch_size=2, **more)

    return start


@pytest.mark.parametrize("ended", [False, True], ids=["to the limit", "ended at once"])
def test_bar_counts_tokens_and_comes_to_its_end(answer, bars, ended, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    found, shown = answer(ended), capsys.readouterr().err
    assert len(found) == 3 and (not ended or all(answer.stopped for answer in found))
    assert ("10/10" in shown and "token" in shown) if bars else shown == ""  # two batches of five


def test_without_a_terminal_there_is_no_bar_and_a_check_is_asked_with_every_token(answer, capsys):
    asked = []
    answer(check=lambda: asked.append(1))
    assert len(asked) == 2 * (1 + 5) and capsys.readouterr().err == ""


def test_what_a_check_raises_ends_the_generation(answer):
    def check():
        raise StopEvaluation("stopped", 130)

    with pytest.raises(StopEvaluation):
        answer(check=check)
