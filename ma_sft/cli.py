"""`ma-sft`: the command line. Nothing heavy is imported before a command is known.

Exit codes: 0 done, 1 a check found something wrong, 2 bad input or settings (one line on stderr), 130 Ctrl-C.
"""

import argparse
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.errors import MaSftError

if TYPE_CHECKING:
    from ma_sft.recipe import Recipe


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
    if rest and options.command not in ("train", "check", "preview"):
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

    chat = add("chat", _chat, "talk to a run's model or to any model folder")
    chat.add_argument("folder", type=Path, help="a run's folder, or a model's")
    chat.add_argument("--prompt", help="ask this one question and print the answer alone")
    chat.add_argument("--system", help="system message")
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

    # A plain `kill` unwinds as Ctrl-C does, so that scratch folders go and other processes end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    overrides = {"num_proc": options.num_proc} if options.num_proc else {}
    Console().print(build(options.mixture, options.out, **overrides))
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

    difference = merge(options.run, options.out)
    print(f"merged model: {options.out} (largest difference of a logit to the adapter model: {difference:.2g})")


def _chat(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.chat import chat

    chat(options.folder, prompt=options.prompt, system=options.system, max_new_tokens=options.max_new_tokens)


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
