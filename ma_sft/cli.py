"""`ma-sft`: the command line. Nothing heavy is imported before a command is known.

Exit codes: 0 done, 1 a check found something wrong, 2 bad input or settings (one line on stderr), 130 Ctrl-C.
"""

import argparse
import errno
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.errors import MaSftError

if TYPE_CHECKING:
    from ma_sft.recipe import Recipe

DTYPES = ("float32", "bfloat16", "float16")


def launch(recipe: "Recipe") -> None:
    """Run a recipe as a script: flags from the command line, one line and an exit code for errors.

    This is how recipes end: `if __name__ == "__main__": launch(recipe)`.
    """
    from ma_sft.train import run

    main_file = getattr(sys.modules["__main__"], "__file__", None)
    if main_file:
        recipe.settings.setdefault("name", Path(main_file).stem)
    sys.exit(guard(lambda: run(recipe, sys.argv[1:])))


def guard(command: Callable[[], Any]) -> int:
    """Call `command`; its int result is the exit code. Errors that a user can mend become one line."""
    # On a CPU it warns with each import that a kernel for inference, which nobody asked for, is not installed
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        result = command()
        return result if isinstance(result, int) else 0
    except MaSftError as error:
        return _fail(" ".join(str(error).split()))
    except KeyboardInterrupt as stop:
        if _first_here():
            print(str(stop) or "stopped by Ctrl-C", file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # `datasets` lets a timeout of its workers cover it
            print("stopped by Ctrl-C", file=sys.stderr)
            return 130
        # safetensors and the tokenizers report a full disk as their own errors, with the text of the OS
        for full in (errno.ENOSPC, errno.EDQUOT):
            if getattr(error, "errno", None) == full or os.strerror(full) in str(error):
                return _fail(
                    f"the disk is full ({os.strerror(full)}): free some space and start again; nothing half-written "
                    "was kept"
                )
        if isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error)):
            return _fail(
                "lost another process of the run: it died (its own message is above, or in its machine's log) or its "
                "machine is out of reach; the same command goes on from the newest checkpoint"
            )
        raise


def main(args: Sequence[str] | None = None) -> int:
    """The console script."""
    parser = _parser()
    options, rest = parser.parse_known_args(args)
    if rest and options.command not in ("train", "check", "preview", "plan"):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return guard(lambda: options.function(options, rest))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ma-sft", description="Supervised fine-tuning with proven labels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function: Callable[..., Any], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(function=function)
        return command

    train = add("train", _train, "fine-tune as a recipe says; any setting of the recipe is a flag")
    train.add_argument("recipe", help="a recipe: .py or .yaml")

    check = add("check", _check, "prove the labels of a recipe's rows, without training; exit code 1 if any is wrong")
    check.add_argument("recipe", help="a recipe: .py or .yaml")
    check.add_argument("--json", action="store_true", help="print the report as JSON")

    preview = add("preview", _preview, "show which tokens of a recipe's rows are trained")
    preview.add_argument("recipe", help="a recipe: .py or .yaml")
    preview.add_argument("-n", type=int, default=3, help="rows to show (default: 3)")
    preview.add_argument("--html", type=Path, help="write a self-contained page instead")
    preview.add_argument("--borders", action="store_true", help="show the borders of tokens")

    data = add("data", lambda options, rest: options.data(options), "build a data set from a mixture, or show one")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser("build", help="load, convert, filter, split and mix what a YAML file says; save it")
    build.set_defaults(data=_data_build)
    build.add_argument("mixture", type=Path, help="a YAML file; see docs/formats.md")
    build.add_argument("-o", "--out", type=Path, required=True, help="folder of the data set; must not exist")
    build.add_argument("--num_proc", type=int, help="processes (default: all cores if there are many rows)")
    show = actions.add_parser("show", help="print counts, sources and first rows of a folder that `build` made")
    show.set_defaults(data=_data_show)
    show.add_argument("folder", type=Path)
    show.add_argument("-n", type=int, default=3, help="rows to show (default: 3)")

    merge = add("merge", _merge, "merge a run's adapter into its base model")
    merge.add_argument("run", type=Path, help="a run's folder, or an adapter's")
    merge.add_argument("-o", "--out", type=Path, required=True, help="folder of the merged model; must not exist")
    merge.add_argument("--base", help="the base model's folder or hub id (default: the one that the adapter names)")
    merge.add_argument("--dtype", choices=DTYPES, help="dtype of the merged weights (default: the base's)")

    plan = add("plan", _plan, "forecast a recipe's peak memory and pick the first launcher that fits")
    plan.add_argument("recipe", help="a recipe: .py or .yaml")
    plan.add_argument("--gpus", type=int, help="number of GPUs, 0 for the CPU (default: this machine's)")
    plan.add_argument("--gpu_memory", help="of each, e.g. 80GB (default: this machine's)")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")

    export = add("export", _export, "write a run's whole model for vLLM and transformers serve, or as GGUF")
    export.add_argument("run", type=Path, help="a run's folder, or a model's")
    export.add_argument(
        "-o", "--out", type=Path, required=True, help="a new folder, or a new file that ends with .gguf"
    )
    export.add_argument("--dtype", choices=DTYPES, help="dtype of a folder's weights (default: the model's)")
    export.add_argument("--outtype", default="auto", help="type of a GGUF file's weights: f32, f16, bf16, q8_0, auto")
    export.add_argument(
        "--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py (default: $LLAMA_CPP, the PATH)"
    )

    handoff = add("handoff-check", _handoff, "compare a saved model with its manifest; exit code 1 if they disagree")
    handoff.add_argument("folder", type=Path, help="a run's folder, a model's or an adapter's")
    handoff.add_argument("--json", action="store_true", help="print the findings as JSON")

    chat = add("chat", _chat, "talk to a run's model or to any model folder")
    chat.add_argument("folder", type=Path, help="a run's folder, or a model's")
    chat.add_argument("--prompt", help="ask this one question and print the answer alone")
    chat.add_argument("--system", help="system message (default: the one of training; '' for none)")
    chat.add_argument("--base", help="the base model of an adapter (default: the one that the adapter names)")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    chat.add_argument("--max_new_tokens", type=int, default=512, help="longest answer, in tokens (default: 512)")
    return parser


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.recipe import Recipe
    from ma_sft.train import run

    run(Recipe.load(options.recipe), rest)


def _check(options: argparse.Namespace, rest: list[str]) -> int:
    from rich.console import Console

    from ma_sft.prepare import check, label, load_tokenizer
    from ma_sft.recipe import Recipe

    if options.json:
        _silence()
    settings = Recipe.load(options.recipe).resolve(rest)
    tokenizer, _ = load_tokenizer(settings)
    report = check(settings, tokenizer, label(settings, tokenizer))
    if options.json:
        print(report.to_json())
    else:
        Console().print(report)
    return 1 if report.errors else 0


def _preview(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.inspect import preview
    from ma_sft.prepare import label, load_tokenizer
    from ma_sft.recipe import Recipe

    settings = Recipe.load(options.recipe).resolve(rest)
    tokenizer, _ = load_tokenizer(settings)
    preview(label(settings, tokenizer).dataset, tokenizer, n=options.n, html=options.html, borders=options.borders)
    if options.html:
        print(f"preview: {options.html}")


def _data_build(options: argparse.Namespace) -> None:
    from rich.console import Console

    from ma_sft.build import build

    main_process = os.getpid()

    def stop(number: int, _: Any) -> None:
        """A plain `kill` unwinds as Ctrl-C does, so that scratch folders go; a worker ends, as its pool expects."""
        if os.getpid() != main_process:
            os._exit(128 + number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        Console().print(build(options.mixture, options.out, **({"num_proc": n} if (n := options.num_proc) else {})))
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"data set: {options.out} (ma-sft data show {options.out})")


def _data_show(options: argparse.Namespace) -> None:
    from ma_sft.build import show

    show(options.folder, options.n)


def _silence() -> None:
    """Keep stdout for the JSON alone and stderr for errors: no progress bars."""
    import datasets

    datasets.disable_progress_bars()


def _merge(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.adapters import merge

    print(f"merged model: {options.out}: {merge(options.run, options.out, base=options.base, dtype=options.dtype)}")


def _plan(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.plan import plan, show_plan
    from ma_sft.prepare import load_tokenizer
    from ma_sft.recipe import Recipe

    recipe = Recipe.load(options.recipe)
    if options.gpus and not {"fp16", "--fp16"} & {*recipe.settings, *rest}:
        recipe.settings.setdefault("bf16", True)  # what those GPUs do, whatever this machine can
    settings = recipe.resolve(rest)
    load_tokenizer(settings)
    found = plan(settings, options.gpus, options.gpu_memory)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show_plan(settings, found, options.recipe)


def _export(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.export import export_folder, export_gguf

    if options.out.suffix == ".gguf":
        commands = export_gguf(options.run, options.out, options.outtype, options.converter)
    else:
        commands = export_folder(options.run, options.out, options.dtype)
    print("\n".join(commands))


def _handoff(options: argparse.Namespace, rest: list[str]) -> int:
    from ma_sft.manifest import check_handoff

    findings = check_handoff(options.folder)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{'ok' if finding.ok else 'WRONG':>6}  {finding.what}: {finding.text}")
    return 0 if all(finding.ok for finding in findings) else 1


def _chat(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.chat import chat

    chat(
        options.folder,
        prompt=options.prompt,
        system=options.system,
        base=options.base,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
    )


def _fail(message: str) -> int:
    if not _first_here():
        time.sleep(10)  # most errors are everybody's: the first process says it, and the launcher ends this one
    print(f"error: {message}", file=sys.stderr)
    return 2


def _first_here() -> bool:
    """Whether this is the only or the first process of the run on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
