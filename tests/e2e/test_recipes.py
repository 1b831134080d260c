"""The shipped recipes run as they are, with a small model and local rows in place of the hub's."""

import json

import pytest
from helpers import start

pytestmark = pytest.mark.slow

CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i} + {i}?"},
            {"role": "assistant", "content": f"{2 * i}"},
            {"role": "user", "content": "And in words, 谢谢?"},
            {"role": "assistant", "content": f"Twice {i} is {2 * i}."},
        ]
    }
    for i in range(40)
]
ALPACA = [{"instruction": "Double it", "input": str(i), "output": f"That is {2 * i}."} for i in range(40)]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def launch(recipe, *args):
    return start(
        *(
            "accelerate",
            "launch",
            "--quiet",
            "--config_file",
            "accelerate_configs/cpu.yaml",
            f"recipes/{recipe}.py",
            *args,
        )
    )


def test_qwen3(tiny_qwen3, tmp_path):
    data = write(tmp_path / "rows.jsonl", CONVERSATIONS)
    out = tmp_path / "run"
    done = launch(
        *("qwen3", "--model_name_or_path", tiny_qwen3, "--dataset_name", data),
        *("--output_dir", out, "--max_steps", "3", "--logging_steps", "1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["rows"] == 40
    assert (out / "adapter" / "adapter_config.json").exists() and (out / "merged" / "config.json").exists()
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (32, 8, ["q_proj", "v_proj"])


def test_qwen3_without_a_hub_says_what_to_do(tmp_path):
    done = launch("qwen3", "--output_dir", tmp_path / "run")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Qwen/Qwen3-0.6B" in line and "MODEL=PATH" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("recipe", ["alpaca_qlora", "alpaca_pack"])
def test_alpaca(recipe, tmp_path):
    data = write(tmp_path / "rows.jsonl", ALPACA)
    out = tmp_path / "run"
    done = launch(
        *(recipe, "--model_name_or_path", "demo", "--dataset_name", data, "--output_dir", out, "--max_steps", "1"),
        *("--max_length", "64", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 1
    # "That is 2i." and the end token; nothing of the question
    assert 40 * 6 <= summary["trained_tokens"] <= 40 * 8
