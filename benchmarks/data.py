"""`ma-sft data build` on a million short rows: rows/s of each stage, and memory against a tenth of the rows.

python benchmarks/data.py [--rows 1000000]

Memory is what all processes hold for themselves together (anonymous pages, those that a fork shares counted once); the
pages of Arrow files are the kernel's to drop. Linux only.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

FILTERS = {"max_chars": 4000, "exact_duplicates": True, "near_duplicates": 0.9}


def write_rows(path: Path, count: int) -> None:
    """Alpaca rows of some thirty words; one in fifty copies an earlier row, one in fifty does but for a word."""
    rng = random.Random(0)
    words = Path(__file__).read_text(encoding="utf-8").split()
    kept: list[dict[str, str]] = []
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            kind = rng.random()
            if kind < 0.04 and kept:
                row = dict(rng.choice(kept))
                if kind < 0.02:
                    row["output"] += " indeed"
            else:
                question, answer = (" ".join(rng.choices(words, k=rng.randint(5, 30))) for _ in range(2))
                row = {"instruction": f"{i}: {question}", "output": f"{i}. {answer}"}
            if len(kept) < 1000:
                kept.append(row)
            file.write(json.dumps(row) + "\n")


def anonymous(process: psutil.Process) -> int:
    """The process's share of anonymous memory, in kB."""
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    return int(text.split("Pss_Anon:")[1].split()[0])


def build(count: int, folder: Path) -> float:
    """Build in a process of its own; the most memory that it and its children held at once, in MB."""
    write_rows(folder / "rows.jsonl", count)
    (folder / "mixture.yaml").write_text(
        yaml.safe_dump({"datasets": [str(folder / "rows.jsonl")], "filters": FILTERS, "test_size": 0.01})
    )
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "COLUMNS": "120"}
    command = [sys.executable, "-m", "ma_sft.cli", "data", "build", str(folder / "mixture.yaml"), "-o"]
    process = psutil.Popen([*command, str(folder / "out")], env=environment, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error, OSError):  # one has just ended
            peak = max(peak, sum(map(anonymous, (process, *process.children(recursive=True)))))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    for count in (options.rows // 10, options.rows):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            peak = build(count, Path(folder))
            seconds = time.perf_counter() - start
            print(f"{count:,} rows: {seconds:.0f} s with writing them, {peak:,.0f} MB at most", flush=True)


if __name__ == "__main__":
    main()
