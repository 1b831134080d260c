"""Runs and commands in processes of their own, on CPUs, that a test can kill; forked from one that has imported all."""

import gc
import importlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from patience import PATIENCE

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # which DeepSpeed chooses as it is imported
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = """ma_sft.cli ma_sft.sft ma_sft.data.mixture ma_sft.labels.preview ma_sft.release.merge ma_sft.pages.report
    ma_sft.tools.memory datasets.packaged_modules.json.json deepspeed peft.tuners.lora scipy.io
    torch.utils.tensorboard transformers.models.qwen3.modeling_qwen3"""
CONTEXT.set_forkserver_preload(PRELOADED.split())


def enter(out: str, err: str, env: dict[str, str]) -> None:
    """What a process that was just forked begins with: its output in files, its variables, one thread."""
    import torch

    gc.freeze()  # what is imported is no garbage
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    os.environ.update(env)


def command(words: list[str], folder: str, out: str, err: str, env: dict[str, str]) -> None:
    """What `ma-sft WORDS` does in a folder, with variables that the libraries read as they are imported."""
    import datasets
    import huggingface_hub.constants

    from ma_sft.cli import main

    enter(out, err, env)
    for variables in (huggingface_hub.constants, datasets.config):
        importlib.reload(variables)
    os.setsid()  # no terminal to ask at
    os.chdir(folder)
    end(main(words) or 0)


def train(settings: dict, args: list[str], log: str, env: dict[str, str]) -> None:
    """What `ma-sft train` does, with the terminal's output in the file `log`."""
    from ma_sft import Recipe, run
    from ma_sft.utils import guard

    enter(log, log, env)
    if "ACCELERATE_TORCH_DEVICE" in env:
        fsdp_on_cpu()
    if env.get("DS_ACCELERATOR") == "cpu":
        import deepspeed.ops

        # a faster way between processes on CPUs, which DeepSpeed would compile for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    end(guard(lambda: run(Recipe(**settings), args) and 0))


def end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fsdp_on_cpu() -> None:
    """Let accelerate use FSDP without a GPU: PyTorch can over gloo, accelerate only never tries."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def launcher(config: str) -> dict[str, str]:
    """The environment that `accelerate launch --config_file accelerate_configs/<config>.yaml` gives each process."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    path = Path(__file__).parents[1] / "accelerate_configs" / f"{config}.yaml"
    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "--num_processes", "2", "recipe.py"])
    )
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        env = prepare_deepspeed_cmd_env(args)[1]
    else:
        env = prepare_multi_gpu_env(args)
    return {key: value for key, value in env.items() if os.environ.get(key) != value}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Run:
    """A started run: its processes, its folder, and what they printed."""

    def __init__(self, settings: dict, *args: str, processes: int = 1, env: dict[str, str] | None = None) -> None:
        self.settings, self.env = settings, env or {}
        self.out = Path(settings["output_dir"])
        self.log = self.out.with_name(f"{self.out.name}-{time.monotonic_ns()}.log")
        self.processes = []
        port = free_port()
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **ranks} if processes > 1 else {}
            own = {"CUDA_VISIBLE_DEVICES": "", **{key: str(value) for key, value in where.items()}, **self.env}
            self.processes.append(CONTEXT.Process(target=train, args=(settings, list(args), str(self.log), own)))
        for process in self.processes:
            process.start()

    def wait_for(self, path: str, seconds: float = 60 * PATIENCE) -> None:
        """Until something in the run's folder matches the glob `path`."""
        self._wait(lambda: any(self.out.glob(path)), seconds)
        assert any(self.out.glob(path)), self.text

    def wait_for_step(self, step: int, seconds: float = 60 * PATIENCE) -> None:
        """Until a checkpoint of this step or a later one begins, or the run is over."""
        self._wait(lambda: any(int(p.name.split("-")[1]) >= step for p in self.out.glob("checkpoint-*")), seconds)

    def _wait(self, there: Callable[[], bool], seconds: float) -> None:
        """Until it is there, or the run is over."""
        end = time.monotonic() + seconds
        while self.processes[0].is_alive() and not there():
            assert time.monotonic() < end, self.text
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def finish(self, seconds: float = 60 * PATIENCE) -> int:
        """The first process's exit code. If it is not 0 the others are ended, as every launcher does."""
        for process in self.processes:
            process.join(seconds)
            if process.exitcode is None:
                self.kill()
                raise AssertionError(f"still running after {seconds} s: {self.text}")
            if process.exitcode:
                self.kill()
        return self.processes[0].exitcode

    def done(self, seconds: float = 60 * PATIENCE) -> "Run":
        """The run itself, which must end well."""
        assert self.finish(seconds) == 0, self.text
        return self

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""
