"""Two processes train what one trains, whatever splits the model between them; and they fail together, soon."""

import json
import os
import signal
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from datasets import Dataset
from helpers import QUICK, ROOT, assistant, start, user, write_rows
from patience import PATIENCE
from processes import Run, free_port, launcher
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from ma_sft import RunError
from ma_sft.launcher import check_launch
from ma_sft.packing.pack import pack
from ma_sft.training.checkpoints import COMPLETE
from ma_sft.training.distributed import PaddedSampler, fill_up

STEPS = 10
ENGINES = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_TORCH_DEVICE": "cpu"},
    "zero1": {"DS_ACCELERATOR": "cpu"},
    "zero2": {"DS_ACCELERATOR": "cpu"},
    "zero3": {"DS_ACCELERATOR": "cpu"},
}
KINDS = {"full": {}, "lora": {"use_peft": True, "packing": True, "lora_dropout": 0.0}}
# Each engine once and each kind twice; the other pairs are left to the slow set
FIRST = {("full", "ddp"), ("full", "zero3"), ("lora", "fsdp2"), ("lora", "zero2")}


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
    answers = [" ".join(["so"] * (1 + i % 7 * 5)) + f" {i}." for i in range(46)]
    rows = [{"messages": [user(f"What is {i}?"), assistant(answer)]} for i, answer in enumerate(answers)]
    files = {name: write_rows(folder / f"{name}.jsonl", part) for name, part in (("rows", rows), ("few", rows[:5]))}
    return {
        **QUICK,
        **{"name": "r", "model_name_or_path": str(tiny_bpe), "dataset_name": files["rows"]},
        **{"eval_dataset": files["few"], "generate_eval": -1, "max_new_tokens": 4, "max_length": 96},
        **{"max_steps": STEPS, "save_strategy": "steps", "save_steps": 5, "learning_rate": 5e-3},
        **{"per_device_train_batch_size": 8},
    }


def outcome(out: Path) -> tuple[list[float], dict[str, torch.Tensor], dict]:
    """(loss of each step, final weights, summary)"""
    state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    (weights,) = [*out.glob("model/model.safetensors"), *out.glob("adapter/adapter_model.safetensors")]
    return losses, load_file(weights), json.loads((out / "summary.json").read_text())


def two(base: dict, folder: Path, *args: str, env: dict[str, str] | None = None, **settings: object) -> Run:
    """Two processes of a run, started on CPUs."""
    flags = ("--use_cpu", "true", *args) if env is None else args
    return Run({**base, "output_dir": str(folder / "run"), **settings}, *flags, processes=2, env=env)


def one_error(run: Run) -> str:
    """The one line in which both processes end."""
    assert run.finish() == 2, run.text
    (line,) = [line for line in run.text.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in run.text
    return line


@pytest.fixture(scope="module")
def single(base, tmp_path_factory):
    """(settings, outcome) of one process with a batch of two, for each kind."""

    @cache
    def make(kind):
        out = tmp_path_factory.mktemp("single") / "run"
        settings = {**base, **KINDS[kind], "output_dir": str(out)}
        Run(settings, "--per_device_train_batch_size", "2").done()
        return settings, outcome(out)

    return make


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in FIRST)) for pair in product(KINDS, ENGINES)],
)
def test_two_processes_train_what_one_trains(single, tmp_path, kind, name):
    settings, (losses, weights, summary) = single(kind)
    run = Run(
        {**settings, "output_dir": str(tmp_path / "run")},
        *("--per_device_train_batch_size", "1", "--use_cpu", str(name == "ddp")),
        processes=2,
        env=engine(name),
    )
    run.done(300 * PATIENCE)
    assert [process.exitcode for process in run.processes] == [0, 0]
    found, found_weights, found_summary = outcome(run.out)
    assert found == pytest.approx(losses, abs=1e-4)
    assert len(found) == STEPS
    for key, value in weights.items():
        torch.testing.assert_close(found_weights[key], value, atol=1e-4, rtol=0)
    assert found_summary["tokens"] - summary["tokens"] in (0, 1)  # a row of one token fills up the last batch
    assert found_summary["exact_match_after"] == summary["exact_match_after"]
    for time in ("before", "after"):  # whatever splits the model, it is measured before the first step too
        assert found_summary["evaluation"][time]["loss"] == pytest.approx(summary["evaluation"][time]["loss"], abs=1e-4)
        assert found_summary["evaluation"][time]["answers"] == 5
    if settings.get("use_peft"):
        assert found_summary["merge_max_logit_difference"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_killed_and_resumed(base, tmp_path, name):
    settings = {**base, **KINDS["lora" if name in ("ddp", "zero2") else "full"], "generate_eval": 0, "merge": False}
    del settings["max_new_tokens"]
    args = ("--per_device_train_batch_size", "1", "--use_cpu", str(name == "ddp"))
    uncut = Run({**settings, "output_dir": str(tmp_path / "uncut")}, *args, processes=2, env=engine(name)).done()
    cut = Run({**settings, "output_dir": str(tmp_path / "cut")}, *args, processes=2, env=engine(name))
    cut.wait_for(f"checkpoint-5/{COMPLETE}")
    cut.kill()
    cut.finish()
    assert not (cut.out / "summary.json").exists()
    again = Run(cut.settings, *args, processes=2, env=engine(name)).done()
    assert "going on from" in again.text
    (losses, weights, _), (found, found_weights, _) = outcome(uncut.out), outcome(again.out)
    assert found == pytest.approx(losses, abs=1e-6)
    for key, value in weights.items():
        torch.testing.assert_close(found_weights[key], value, atol=1e-6, rtol=0)


def test_one_stopped_process_stops_both_and_saves(base, tmp_path):
    run = two(base, tmp_path, max_steps=100_000)
    run.wait_for("checkpoint-5")
    os.kill(run.processes[1].pid, signal.SIGTERM)
    run.done(30 * PATIENCE)
    assert run.processes[1].exitcode == 0
    assert run.text.count("stopped; the same command goes on from") == 1


def test_dead_process_ends_the_other_with_one_line(base, tmp_path):
    run = two(base, tmp_path, max_steps=100_000)
    run.wait_for("checkpoint-5")
    run.processes[1].kill()
    assert one_error(run).startswith("error: lost another process of the run")


def test_everybodys_error_is_said_once(base, tmp_path):
    line = one_error(two(base, tmp_path, "--learning_rate", "1e38"))
    assert line.startswith(("error: loss is", "error: grad_norm is"))


def test_error_in_the_rows_is_said_once(base, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": [user("Hi"), assistant("")]}])
    assert "rows.jsonl, line 1: the response is empty" in one_error(two(base, tmp_path, dataset_name=rows))


def test_gpu_launcher_without_a_gpu(base, tmp_path):
    run = two(base, tmp_path, env=launcher("zero2") | {"DS_ACCELERATOR": "cuda"})
    assert "the launcher asks for a GPU and PyTorch finds none" in one_error(run)


def ranks(local_ranks: tuple[int, int]) -> list[dict[str, str]]:
    """The environments of two processes that are started by hand: on one machine (0, 1), or on two (0, 0)."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    size = str(max(local_ranks) + 1)
    return [
        {**where, "RANK": str(rank), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": size}
        for rank, local in enumerate(local_ranks)
    ]


def test_second_process_reads_what_the_first_prepared(base, tmp_path):
    """The second one could not prepare anything: its source does not exist."""
    settings = {**base, "output_dir": str(tmp_path / "run"), "max_steps": 1}
    first, second = ranks((0, 1))
    runs = [
        Run(settings, "--use_cpu", "true", env=first),
        Run({**settings, "dataset_name": "nowhere.jsonl", "eval_dataset": "no.jsonl"}, "--use_cpu", "true", env=second),
    ]
    for run in runs:
        run.done()


def test_machines_with_different_data_refuse_to_train(base, tmp_path):
    """The same command on two machines, but another file of that name lies on the second."""
    runs = []
    for rank, env in enumerate(ranks((0, 0))):
        here = tmp_path / str(rank)
        here.mkdir()
        text = Path(base["dataset_name"]).read_text()
        (here / "rows.jsonl").write_text(text if rank == 0 else text.replace("so", "no", 1))
        settings = {**base, "output_dir": str(here / "run"), "dataset_name": str(here / "rows.jsonl")}
        runs.append(Run(settings, "--use_cpu", "true", env={**env, "MA_SFT_CACHE": str(here / "cache")}))
    for run in runs:
        assert run.finish() == 2, run.text
        assert "error: the processes prepared different data: rank 0 has" in run.text
        assert "rank 1 has" in run.text
        assert not list(run.out.glob("checkpoint-*"))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_no_process_repeats_or_misses_a_row(world, batch):
    rows = pack(Dataset.from_list([{"input_ids": [i + 1] * 3, "labels": [i + 1] * 3} for i in range(11)]), 3, "none")
    filled = fill_up(rows, world * batch, pad_token_id=0)
    sampler = PaddedSampler(len(rows), len(filled) - len(rows), seed=0)
    order = list(sampler)
    assert order[:11] == list(SeedableRandomSampler(range(11), data_seed=0))  # as one process without padding
    assert order[11:] == list(range(11, len(filled))) and len(sampler) == len(filled)
    sampler.set_epoch(1)
    assert list(sampler)[:11] != order[:11]
    shards = [
        list(BatchSamplerShard(BatchSampler(order, batch, drop_last=False), world, rank)) for rank in range(world)
    ]
    assert len({len(shard) for shard in shards}) == 1
    # step by step the processes together get what one process with the whole batch gets
    assert [i for step in zip(*shards, strict=True) for indices in step for i in indices] == order
    trained = [row["input_ids"][0] for row in filled if set(row["labels"]) != {-100}]
    assert trained == list(range(1, 12))


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3", "zero3_offload"])
def test_configuration_is_what_its_engine_reads(monkeypatch, name):
    for key, value in launcher(name).items():
        monkeypatch.setenv(key, value)
    if name == "fsdp2":
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"
        return
    filled = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "train_batch_size": 1}
    config = {**DeepSpeedPlugin().deepspeed_config, **filled, "gradient_clipping": 1.0}
    from deepspeed.runtime.config import DeepSpeedConfig

    zero = DeepSpeedConfig(config).zero_config
    assert zero.stage == int(name[4])
    assert zero.gather_16bit_weights_on_model_save == (zero.stage == 3)
    device = "cpu" if name == "zero3_offload" else "none"
    assert (zero.offload_param.device, zero.offload_optimizer.device) == (device, device)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(RunError, match=r"4 processes .* 2 GPU.* --num_processes 2"):
        check_launch(use_cpu=False)
    check_launch(use_cpu=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/ddp.yaml"),
        ("deepspeed", "--num_gpus", "2", "--master_port"),
        ("torchrun", "--standalone", "--nproc_per_node", "2"),
        ("ma-sft", "train", "--launcher", "ddp", "--gpus", "2"),
        ("ma-sft", "train", "--launcher", "cpu", "--gpus", "2"),
    ],
    ids=["accelerate", "deepspeed", "torchrun", "ddp", "cpu"],
)
def test_real_launchers(base, tmp_path, command):
    out = tmp_path / "run"
    if command[-1] == "--master_port":
        command = (*command, str(free_port()))
    done = start(
        *(*command, "recipes/qwen3.py", "--model_name_or_path", base["model_name_or_path"]),
        *("--dataset_name", base["dataset_name"], "--output_dir", out, "--max_steps", "2", "--use_cpu", "true"),
        *("--gradient_accumulation_steps", "1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "summary.json").read_text())["steps"] == 2
    assert (out / "adapter" / "adapter_config.json").exists() and (out / "merged" / "config.json").exists()


@pytest.mark.slow
def test_several_processes_of_a_configuration_that_starts_one(base, tmp_path):
    done = start(
        *("accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml", "--num_processes", "2"),
        *("recipes/qwen3.py", "--output_dir", tmp_path / "run"),
    )
    assert done.returncode != 0
    assert "error: --num_processes asks for several processes" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_machines(base, tmp_path):
    """The configuration for several machines, started twice on this one."""
    out, port = tmp_path / "run", free_port()
    machines = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "accelerate.commands.launch", "--quiet"),
                *("--config_file", "accelerate_configs/multi_node.yaml"),
                *("--num_processes", "2", "--machine_rank", str(rank), "--main_process_port", str(port)),
                *("recipes/qwen3.py", "--model_name_or_path", base["model_name_or_path"]),
                *("--dataset_name", base["dataset_name"], "--output_dir", str(out), "--use_cpu", "true"),
                *("--max_steps", "2", "--gradient_accumulation_steps", "1"),
            ],
            cwd=ROOT,
        )
        for rank in (1, 0)
    ]
    assert [machine.wait(240 * PATIENCE) for machine in machines] == [0, 0]
    assert json.loads((out / "summary.json").read_text())["steps"] == 2


@pytest.mark.slow
def test_zero3_offload(base, tmp_path):
    """Apart, because DeepSpeed first compiles its optimizer for this CPU."""
    settings = {**base, "output_dir": str(tmp_path / "run"), "generate_eval": 0}
    del settings["max_new_tokens"]
    env = launcher("zero3_offload") | {"DS_ACCELERATOR": "cpu"}
    run = Run(settings, "--per_device_train_batch_size", "1", "--use_cpu", "false", processes=2, env=env).done(
        600 * PATIENCE
    )
    single = Run({**settings, "output_dir": str(tmp_path / "one")}, "--per_device_train_batch_size", "2").done()
    assert outcome(run.out)[0] == pytest.approx(outcome(single.out)[0], abs=1e-4)


@pytest.mark.slow
def test_gpu_check_says_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = start(sys.executable, "benchmarks/gpu_check.py")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("no GPU on this machine: nothing was measured")


@pytest.mark.slow
def test_gpu_check_on_a_cpu(tmp_path):
    """The script as it runs on a GPU, of which each case that this machine can train is measured on both sides."""
    done = start(
        *(sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--steps", "2", "--batch_size", "2"),
        *("--max_length", "64", "--out", tmp_path),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split(" | ") for line in (tmp_path / "gpu.md").read_text().splitlines() if line.startswith("| ")]
    cases = {cells[0].removeprefix("| "): cells[1:] for cells in lines[2:]}
    measured = {name for name, cells in cases.items() if not cells[0].startswith("not measured")}
    selective = "packed, selective checkpointing"
    assert measured >= {"LoRA", "LoRA, packed", "full, packed", f"full, {selective}", "QLoRA, packed"}
    # Selective checkpointing with an adapter ends plain TRL 1.16 in its first step
    alone = measured & {f"LoRA, {selective}"}
    assert all(float(cell.replace(",", "")) > 0 for name in measured - alone for cell in cases[name][:3])
    assert all(cases[name][1].startswith("not measured: ValueError") for name in alone), cases
    reasons = {name: cells[0] for name, cells in cases.items() if name not in measured}
    assert "is not installed" in reasons["LoRA, packed, FlashAttention 2"], reasons
    assert f"kept as {tmp_path / 'gpu.md'}" in done.stdout.replace("\n", "")


@pytest.mark.slow
def test_two_processes_with_loader_workers_share_a_packed_stream(base, tmp_path):
    settings = {**base, "output_dir": str(tmp_path / "run"), "dataset_streaming": True, "dataloader_num_workers": 2}
    settings |= {"packing": True, "max_length": 64, "max_steps": 2, "save_steps": 2}
    runs = [Run(settings, "--use_cpu", "true", env=env) for env in ranks((0, 1))]
    for run in runs:
        run.done()
    assert json.loads((tmp_path / "run" / "checkpoint-2" / COMPLETE).read_text())["processes"] == 2
