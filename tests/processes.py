"""Runs in processes of their own that a test can kill; started by a fork of one that has imported everything."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ma_sft.resume", "ma_sft.prepare", "ma_sft.report", "peft.tuners.lora"])


def train(settings: dict, args: list[str], log: str) -> None:
    """What `ma-sft train` does, with the terminal's output in the file `log`."""
    import torch

    from ma_sft import Recipe, run
    from ma_sft.cli import guard

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    code = guard(lambda: run(Recipe(**settings), args) and 0)
    sys.stdout.flush()
    os._exit(code)


class Run:
    """A started run: its process, its folder, and what it printed."""

    def __init__(self, settings: dict, *args: str) -> None:
        self.settings = settings
        self.out = Path(settings["output_dir"])
        self.log = self.out.with_name(f"{self.out.name}-{time.monotonic_ns()}.log")
        self.process = CONTEXT.Process(target=train, args=(settings, list(args), str(self.log)))
        self.process.start()

    def wait_for(self, path: str, seconds: float = 60) -> None:
        """Until something in the run's folder matches the glob `path`."""
        end = time.monotonic() + seconds
        while not any(self.out.glob(path)):
            assert time.monotonic() < end and self.process.is_alive(), self.text
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def finish(self, seconds: float = 60) -> int:
        """The exit code."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.text}"
        return self.process.exitcode

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""
