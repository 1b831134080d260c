"""What `accelerate launch` and the settings ask for, and whether this machine has it."""

import logging
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from accelerate.utils import parse_flag_from_env

from ma_sft.errors import RecipeError, RunError, one_line


def start(config: Path, processes: int | None, words: Sequence[str]) -> int:
    """Run `ma-sft WORDS` by a configuration of accelerate; the exit code is that of the process that failed first.

    Args:
        config: the configuration; several processes on CPUs are started as by torchrun, accelerate would take MPI.
        processes: how many, on all machines; None takes the configuration's.

    Raises:
        RecipeError: what the configuration asks for is wrong, or not installed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("multiprocessing.api", "agent.server.api"):  # they retell what a process said in one line
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGINT, lambda *_: None)  # the processes get a Ctrl-C as well, and save
    program, many = ["-m", "ma_sft.cli", *words], str(processes or 1)
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        if on_cpu := content.get("use_cpu", False):
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (psutil.cpu_count(logical=False) or 1) // int(many))))
        if on_cpu and many != "1":
            os.environ["ACCELERATE_USE_CPU"] = "true"
            torchrun.run(torchrun.parse_args(["--standalone", "--nproc_per_node", many, *program]))
        else:
            sizes = [key for key in content.get("parallelism_config") or {} if key.endswith("_size")]
            names = ["num_processes", *(sizes if len(sizes) == 1 else ())]  # all of them share a row
            count = [word for name in names for word in (f"--{name}", many)] if processes else []
            launch_command(launch_command_parser().parse_args(["--config_file", str(config), *count, *program]))
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as stop:
        return 128 + stop.sigval
    except (ValueError, ImportError, RuntimeError, yaml.YAMLError) as error:
        raise RecipeError(f"--launcher {config}: {one_line(error)}") from None
    return 0


def wants_gpu() -> bool:
    """Whether `accelerate launch` was told to use a GPU: every configuration but `use_cpu: true` does."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and not parse_flag_from_env("ACCELERATE_USE_CPU")


def cpu_deepspeed() -> bool:
    """Whether DeepSpeed is to run on the CPU, which its own variable says: `DS_ACCELERATOR=cpu`."""
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and os.environ.get("DS_ACCELERATOR") == "cpu"


def check_launch(use_cpu: bool) -> None:
    """Compare what the launcher asks for with what this machine has, before any process can wait for another.

    Raises:
        RunError: a GPU launcher without a GPU, more processes than GPUs, or one process where several were asked for.
    """
    if "MASTER_ADDR" in os.environ and not {"RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & set(os.environ):
        raise RunError(
            "--num_processes asks for several processes, and this accelerate configuration starts one; take ddp.yaml "
            "(--launcher ddp, make: LAUNCH=ddp), or on CPUs: --launcher cpu --gpus N"
        )
    gpus = torch.accelerator.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if use_cpu or cpu_deepspeed():
        return
    if wants_gpu() and not gpus:
        raise RunError(
            "the launcher asks for a GPU and PyTorch finds none; take cpu.yaml (--launcher cpu, make: LAUNCH=cpu), "
            "or pass --use_cpu true"
        )
    if gpus and processes > gpus:
        raise RunError(
            f"{processes} processes were started on a machine with {gpus} GPU(s), and each needs its own; "
            f"pass --num_processes {gpus} (--gpus {gpus}, make: GPUS={gpus})"
        )


def check_installed(training: Any) -> None:
    """Let the libraries make of TRL's `SFTConfig` what they would make once the data is prepared.

    Raises:
        RecipeError: a package that is missing, arguments that are missing or wrong.
    """
    from huggingface_hub import is_offline_mode
    from transformers import Trainer, get_scheduler
    from transformers.integrations import integration_utils

    what, kwargs = f"optim={training.optim.value}", training.lr_scheduler_kwargs
    try:
        try:
            Trainer.get_optimizer_cls_and_kwargs(training)
        except ValueError as error:
            if "model" not in str(error):  # some want the model, which is not loaded yet
                raise
        what = f"lr_scheduler_type={training.lr_scheduler_type.value} with lr_scheduler_kwargs={kwargs}"
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        steps = {"num_warmup_steps": 1, "num_training_steps": 10**9}
        get_scheduler(training.lr_scheduler_type, optimizer, **steps, scheduler_specific_kwargs=kwargs)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{what}: {one_line(error)}") from None
    for name in set(training.report_to) - {*integration_utils.get_available_reporting_integrations()}:
        trackers = "'ma-sft[trackers]' brings tensorboard, trackio and wandb"
        raise RecipeError(f"report_to: {name} is not installed; pip install it ({trackers}), or --report_to none")
    if is_offline_mode() and "wandb" in training.report_to:
        os.environ.setdefault("WANDB_MODE", "offline")
