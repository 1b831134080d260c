"""What `accelerate launch` asked for, and whether this machine has it."""

import os
from typing import TYPE_CHECKING

import torch
from accelerate.utils import parse_flag_from_env

from ma_sft.errors import RunError

if TYPE_CHECKING:
    pass


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
            "(make: LAUNCH=ddp), or on CPUs: torchrun --nproc_per_node N recipe.py"
        )
    gpus = torch.accelerator.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if use_cpu or cpu_deepspeed():
        return
    if wants_gpu() and not gpus:
        raise RunError(
            "the launcher asks for a GPU and PyTorch finds none; take accelerate_configs/cpu.yaml (make: LAUNCH=cpu), "
            "or pass --use_cpu true"
        )
    if gpus and processes > gpus:
        raise RunError(
            f"{processes} processes were started on a machine with {gpus} GPU(s), and each needs its own; "
            f"pass --num_processes {gpus} (make: GPUS={gpus})"
        )
