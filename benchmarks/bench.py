"""What a user gets, side by side with plain TRL: whole processes, cold caches, the check on, both on the same file.

python benchmarks/bench.py [--only preparation,packing,...] [--conversations 100000] [--lengths 200000,1000000]

Prints goal, ours, TRL and ratio, and keeps them with date, machine and command in benchmarks/results; exits with 1
where a goal is missed.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from trainings import SHAPES

HERE = Path(__file__).parent
HEADS = ("", "goal", "ours", "TRL", "ratio", "")
TEXTS = [HERE.parent / name for name in ("LICENSE", "README.md", "README.zh.md")]


@dataclass(frozen=True)
class Row:
    """A line of the table: what was measured on each side, their ratio (better is more), and what is asked of it."""

    what: str
    ours: float
    theirs: float | None
    ratio: float
    goal: float

    @property
    def met(self) -> bool:
        return self.ratio >= self.goal


@contextmanager
def cold(cache: Path | None = None) -> Iterator[dict[str, str]]:
    """An environment whose caches are empty (or `cache`); tokenizers and models, which both sides need, are kept."""
    from ma_sft.utils import cache_dir

    with tempfile.TemporaryDirectory() as scratch:
        ours = cache or Path(scratch)
        (ours / "ma_sft").mkdir(parents=True, exist_ok=True)
        for name in ("models", "tokenizers"):
            if not (ours / "ma_sft" / name).exists():
                (ours / "ma_sft" / name).symlink_to(cache_dir() / name)
        own = {"MA_SFT_CACHE": str(ours / "ma_sft"), "HF_DATASETS_CACHE": str(ours / "datasets")}
        yield {**os.environ, **own, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def process(*arguments: object, env: dict[str, str], script: str = "sides.py") -> dict[str, Any]:
    """Run one side to its end; its result, with `wall`, the seconds of the whole process."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)], env=env, capture_output=True, text=True
    )
    wall = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} failed:\n{done.stderr[-3000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": wall}


def side(*arguments: object, script: str = "sides.py") -> dict[str, Any]:
    with cold() as env:
        return process(*arguments, env=env, script=script)


def fastest(*sides: tuple[object, ...], env: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Sides in turn, twice; the faster run of each, as a machine has busy moments. With `env`, three times in that."""
    runs = [[process(*each, env=env) if env else side(*each) for each in sides] for _ in range(3 if env else 2)]
    return [min(found, key=lambda run: float(run["wall"])) for found in zip(*runs, strict=True)]


def command(*arguments: str, env: dict[str, str], code: int = 0) -> float:
    """Seconds of a whole command that ends with exit code `code`, the best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(arguments, env=env, capture_output=True, text=True)
        best = min(best, time.perf_counter() - start)
        if done.returncode != code:
            raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return best


def first_word(env: dict[str, str]) -> float:
    """Seconds until the demo's training prints its first line."""
    with tempfile.TemporaryDirectory() as scratch:
        begin = time.perf_counter()
        arguments = [str(Path(sys.executable).parent / "ma-sft"), "train", "recipes/demo.py", "--output_dir", scratch]
        run = subprocess.Popen(arguments, env=env, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            assert run.stdout is not None
            run.stdout.readline()
            return time.perf_counter() - begin
        finally:
            run.kill()
            run.wait()


def write_conversations(path: Path, count: int) -> None:
    """Conversations of 2 to 8 turns and some 475 tokens, a third of them Chinese, as JSON Lines."""
    rng = random.Random(0)
    # Qwen3's template cuts an answer at </think> and loses what stands before <think>, which ends our side in an error
    texts = [re.sub("</?think>", "", file.read_text(encoding="utf-8")) for file in TEXTS]
    english, chinese = " ".join(texts[:2]).split(), texts[2]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages = []
            for turn in range(rng.choice([2, 2, 2, 4, 4, 8])):
                if number % 3 == 0:
                    at = rng.randrange(len(chinese) - 400)
                    text = chinese[at : at + rng.randint(20, 400)]
                else:
                    text = " ".join(rng.choices(english, k=rng.randint(5, 160))) + f" {rng.random():.4f}"
                messages.append({"role": ("user", "assistant")[turn % 2], "content": text.strip() or "-"})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def preparation(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Rows to labelled, proven packs."""
    model = side("save_model", scratch / "model")["folder"]
    imports = {who: min(side(f"{who}_imports")["wall"] for _ in range(3)) for who in ("our", "trl")}
    many, few = scratch / "many.jsonl", scratch / "few.jsonl"
    write_conversations(many, options.conversations)
    write_conversations(few, options.conversations // 5)
    rows, some = options.conversations, options.conversations // 5

    def beyond(found: dict[str, Any], who: str = "our") -> float:
        return float(found["wall"]) - imports[who]

    given, goals = (many, model, options.num_proc), {"fast": 4, "standard": 2}
    sides = [("trl_rows", *given), *(("our_rows", *given, "true", backend) for backend in goals)]
    trl_run, *our_runs = fastest(*sides)
    theirs = beyond(trl_run, "trl")
    for (backend, goal), seconds in zip(goals.items(), map(beyond, our_runs), strict=True):
        what = f"{rows:,} conversations to proven packs, {backend} tokenizer, beyond imports: rows/s"
        yield Row(what, rows / seconds, rows / theirs, theirs / seconds, goal)
    whole, trl = (
        run["wall"] for run in fastest(*((w, few, model, options.num_proc) for w in ("our_rows", "trl_rows")))
    )
    yield Row(f"{some:,} conversations, whole processes: rows/s", some / whole, some / trl, trl / whole, 2)

    warm = scratch / "warm"
    with cold(warm) as env:
        first = process("our_rows", few, model, 1, env=env)
        idle, again = (run["wall"] for run in fastest(("our_imports",), ("our_rows", few, model, 1), env=env))
    checked, unchecked = map(beyond, fastest(*(("our_rows", few, model, 1, check) for check in ("true", "false"))))
    share = 1 - unchecked / checked
    yield Row("the check's share of the preparation (one process): at most a quarter", share, None, 0.25 / share, 1)
    yield Row(
        f"{some:,} conversations prepared again, beyond imports: at most 0.5 s",
        again - idle,
        None,
        0.5 / (again - idle),
        1,
    )
    found = [p for p in warm.rglob("*.arrow") if _holds_tokens(p)]
    nbytes = sum(path.stat().st_size for path in found) / first["tokens"]
    yield Row("bytes written per prepared token: ids and labels once (8)", nbytes, None, 8.8 / nbytes, 1)
    one, two = map(beyond, fastest(*(("our_rows", many, model, n) for n in (1, 2))))
    yield Row("rows/s of two processes beside one", rows / two, rows / one, one / two, 1.7)


def _holds_tokens(path: Path) -> bool:
    from datasets import Dataset

    return "input_ids" in Dataset.from_file(str(path)).column_names


def packing(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Best-fit packing of token rows: indices beside TRL's copies; and reading the packs."""
    for count in map(int, options.lengths.split(",")):
        for where in ("memory", "disk"):
            ours, trl = (
                side("pack_rows", w, count, scratch / f"{w}{count}" if where == "disk" else where)
                for w in ("ours", "trl")
            )
            speeds = ours["rows_per_second"], trl["rows_per_second"]
            yield Row(f"packing {count:,} rows, {where}: rows/s", *speeds, speeds[0] / speeds[1], 50)
        ratio = min(ours["density"] / 0.999, ours["density"] / trl["density"])
        yield Row(f"density of {count:,} rows: at least 99.9 % and TRL's", ours["density"], trl["density"], ratio, 1)
    ours, trl = (side("read_packs", w, 50_000, scratch / f"{w}-read")["batches_per_second"] for w in ("ours", "trl"))
    yield Row("reading packs in random order through the collator: batches/s", ours, trl, ours / trl, 1.5)


def start(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """How long a user waits for the program itself."""
    model = side("save_model", scratch / "model")["folder"]
    write_conversations(scratch / "ten.jsonl", 10)
    recipe = scratch / "ten.yaml"
    recipe.write_text(f"model_name_or_path: {model}\ndataset_name: {scratch / 'ten.jsonl'}\nuse_cpu: true\n")
    program = str(Path(sys.executable).parent / "ma-sft")
    with cold(scratch / "started") as env:
        check = command(program, "check", str(recipe), env=env)
        imports, used = (
            command(sys.executable, "-c", code, env=env)
            for code in ("import trl, transformers, datasets", "from trl import SFTConfig, SFTTrainer")
        )
        quick = {
            "--help": command(program, "--help", env=env),
            "settings lora_r": command(program, "settings", "lora_r", env=env),
            "check --lora_rr 3 (a wrong flag)": command(
                program, "check", str(recipe), "--lora_rr", "3", env=env, code=2
            ),
        }
        first = first_word(env)
    # TRL and transformers import little before a name of theirs is used: the second is what any training waits for
    for names, seconds in (("trl, transformers, datasets", imports), ("trl.SFTConfig, SFTTrainer", used)):
        what = f"ma-sft check on 10 rows, warm: at most 1.5 times the import of {names}, s"
        yield Row(what, check, seconds, 1.5 * seconds / check, 1)
    for words, seconds in quick.items():
        yield Row(f"ma-sft {words}: at most 0.5 s", seconds, None, 0.5 / seconds, 1)
    yield Row("first line of `ma-sft train recipes/demo.py`, warm: at most 2 s", first, None, 2 / first, 1)
    long, short = (side("long_conversation", turns, model)["seconds"] for turns in (200, 20))
    yield Row("a 200-turn conversation: at most 12 times a 20-turn one, s", long, short, 12 * short / long, 1)


def demo(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """The demo's steps beside TRL's on the same packs, alone and beside a busy process."""
    speeds = {who: side("demo", who, script="trainings.py")["speed"] for who in ("ours", "trl")}
    yield Row("demo, TRL on the same packs: tokens/s", *speeds.values(), speeds["ours"] / speeds["trl"], 1.3)
    busy = side("demo", "ours", "busy", script="trainings.py")["speed"]
    yield Row("demo beside a busy process, against alone: tokens/s", busy, None, busy / speeds["ours"], 0.5)


def training(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Whole trainings of rows of three shapes, as long on each side, and examined after it."""
    model = side("save_model", scratch / "trained", script="trainings.py")["folder"]
    for shape in SHAPES:
        ours = side("ours", shape, model, script="trainings.py")
        for packed, name in (("", "TRL"), ("packing", "TRL with packing=True")):
            trl = side("trl", shape, model, packed, script="trainings.py")
            speeds = {who: found["tokens"] / found["seconds"] for who, found in (("ours", ours), ("trl", trl))}
            what = f"{shape}, {name}"
            yield Row(f"{what}: trained tokens/s", *speeds.values(), speeds["ours"] / speeds["trl"], 1)
            yield Row(f"{what}: held-out loss at equal time", ours["loss"], trl["loss"], trl["loss"] / ours["loss"], 1)
            peaks = [found["peak"] / 1e9 for found in (ours, trl)]
            yield Row(f"{what}: peak memory, GB", *peaks, peaks[1] / peaks[0], 1)


PARTS: dict[str, Callable[[argparse.Namespace, Path], Iterator[Row]]] = {
    "preparation": preparation,
    "packing": packing,
    "start": start,
    "demo": demo,
    "training": training,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--lengths", default="200000,1000000")
    parser.add_argument("--num_proc", type=int, default=2)
    options = parser.parse_args()
    missed, found = 0, []
    with tempfile.TemporaryDirectory() as scratch:
        for part in options.only.split(","):
            for row in PARTS[part](options, Path(scratch)):
                missed += not row.met
                theirs = "" if row.theirs is None else f"{row.theirs:,.4g}"
                found.append([row.what, f"{row.goal:g}", f"{row.ours:,.4g}", theirs, f"{row.ratio:.2f}"])
                found[-1].append("" if row.met else "missed")
                print(*found[-1], flush=True)
                keep(options.only, found)
    table = Table(*HEADS)
    for cells in found:
        table.add_row(*cells)
    Console(width=140).print(table)
    return int(missed > 0)


def keep(parts: str, found: list[list[str]]) -> None:
    """Write the table, as far as it has come, with what it was measured by and on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    known = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "datasets", "tokenizers"))
    head = [
        f"`{' '.join(['python benchmarks/bench.py', *sys.argv[1:]])}`",
        f"{date.today()}, {os.cpu_count()} cores of {cpu}, Python {platform.python_version()}, {known}. "
        "A ratio of the goal or more is better.",
    ]
    rows = [" | ".join(cells) for cells in ([cell or " " for cell in HEADS], ["---"] * len(HEADS), *found)]
    target = HERE / "results" / f"{parts.replace(',', '-')}.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n\n".join([*head, "\n".join(f"| {row} |" for row in rows)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
