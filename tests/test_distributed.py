"""Two processes train what one trains, whatever splits the model between them; and they fail together, soon."""

import json
from pathlib import Path

import pytest
import torch
from processes import Run, launcher
from safetensors.torch import load_file

STEPS = 10
ENGINES = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_TORCH_DEVICE": "cpu"},
    "zero2": {"DS_ACCELERATOR": "cpu"},
    "zero3": {"DS_ACCELERATOR": "cpu"},
}
KINDS = {"full": {}, "lora": {"use_peft": True, "packing": True}}


def engine(name: str) -> dict[str, str]:
    """The environment of a process that `accelerate launch` starts, without its GPU."""
    env = launcher(name) | ENGINES[name]
    if name == "fsdp2":
        del env["ACCELERATE_MIXED_PRECISION"]  # by which a run knows that it was promised a GPU
    return env


@pytest.fixture(scope="module")
def base(tiny_bpe, tmp_path_factory):
    """Settings of a run of ten steps; the answers' lengths, and so the labels per process, differ a lot."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": " ".join(["so"] * (1 + i % 7 * 5)) + f" {i}."},
            ]
        }
        for i in range(46)
    ]
    for name, part in (("rows", rows), ("held_out", rows[:5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return {
        "name": "r",
        "model_name_or_path": str(tiny_bpe),
        "dataset_name": str(folder / "rows.jsonl"),
        "eval_dataset": str(folder / "held_out.jsonl"),
        "generate_eval": -1,
        "max_new_tokens": 4,
        "max_length": 96,
        "max_steps": STEPS,
        "save_steps": 5,
        "logging_steps": 1,
        "learning_rate": 5e-3,
        "lora_dropout": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "dtype": "float32",
        "disable_tqdm": True,
    }


def outcome(out: Path) -> tuple[list[float], dict[str, torch.Tensor], dict]:
    """(loss of each step, final weights, summary)"""
    state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    (weights,) = [*out.glob("model/model.safetensors"), *out.glob("adapter/adapter_model.safetensors")]
    return losses, load_file(weights), json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module", params=KINDS)
def single(request, base, tmp_path_factory):
    """(settings, outcome) of one process with a batch of two."""
    out = tmp_path_factory.mktemp("single") / "run"
    settings = {**base, **KINDS[request.param], "output_dir": str(out)}
    run = Run(settings, "--per_device_train_batch_size", "2")
    assert run.finish() == 0, run.text
    return settings, outcome(out)


@pytest.mark.parametrize("name", ENGINES)
def test_two_processes_train_what_one_trains(single, tmp_path, name):
    settings, (losses, weights, summary) = single
    run = Run(
        {**settings, "output_dir": str(tmp_path / "run")},
        *("--per_device_train_batch_size", "1", "--use_cpu", str(name == "ddp")),
        processes=2,
        env=engine(name),
    )
    assert run.finish(300) == 0, run.text
    assert [process.exitcode for process in run.processes] == [0, 0]
    found, found_weights, found_summary = outcome(run.out)
    assert found == pytest.approx(losses, abs=1e-4)
    assert len(found) == STEPS
    for key, value in weights.items():
        torch.testing.assert_close(found_weights[key], value, atol=1e-4, rtol=0)
    assert found_summary["tokens"] == summary["tokens"]
    assert found_summary["exact_match_after"] == summary["exact_match_after"]
    if settings.get("use_peft"):
        assert found_summary["merge_max_logit_difference"] < 1e-4
