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
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.errors import MaSftError
from ma_sft.version import __version__

if TYPE_CHECKING:
    from ma_sft.recipe import Recipe

DTYPES = ("float32", "bfloat16", "float16")
TAKE_SETTINGS = ("train", "check", "preview", "plan")  # commands whose flags are a recipe's settings too


def launch(recipe: "Recipe") -> None:
    """Run a recipe as a script: flags from the command line, one line and an exit code for errors.

    This is how recipes end: `if __name__ == "__main__": launch(recipe)`.
    """
    from ma_sft.sft import run

    main_file = getattr(sys.modules["__main__"], "__file__", None)
    if main_file:
        recipe.settings.setdefault("name", Path(main_file).stem)
    sys.exit(guard(lambda: run(recipe, sys.argv[1:])))


def guard(command: Callable[[], Any]) -> int:
    """Call `command`; its int result is the exit code. Errors that a user can mend become one line."""
    # On a CPU it warns with each import that a kernel for inference, which nobody asked for, is not installed
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # TRL sets it by itself under the name that transformers is about to drop
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated")
    try:
        result = command()
        sys.stdout.flush()  # while a reader that has gone is still caught below
        return result if isinstance(result, int) else 0
    except MaSftError as error:
        return _fail(" ".join(str(error).split()))
    except BrokenPipeError:  # `| head` had enough; what is left would fail again when Python flushes it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
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
        from ma_sft.pages.report import versions

        known = ", ".join(f"{name} {version}" for name, version in versions().items())
        error.add_note(f"This was not foreseen: please open an issue with the lines above and these versions: {known}")
        raise


def main(args: Sequence[str] | None = None) -> int:
    """The console script."""
    parser = _parser()
    options, rest = parser.parse_known_args(args)
    if rest and options.command not in TAKE_SETTINGS:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return guard(lambda: options.function(options, rest))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ma-sft",
        description="Supervised fine-tuning with proven labels.",
        epilog="Exit codes: 0 done, 1 a check found something wrong, 2 bad input or settings (one line on stderr), "
        "130 Ctrl-C. NO_COLOR=1 turns colours off.",
    )
    parser.add_argument("--version", action="version", version=f"ma-sft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function: Callable[..., Any], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(function=function)
        return command

    init = add("init", _init, "look at your data and write a recipe for it; asks for what no flag says")
    init.add_argument("--model", help="a hub id, a folder, or demo (SmolLM2-135M from PyPI)")
    init.add_argument("--data", help="a hub id, a file, a glob, or a folder")
    init.add_argument("--hardware", help="cpu, or GPUs as 1x24GB")
    init.add_argument("--task", help="chat, exact, reasoning, tools or text")
    init.add_argument("-o", "--out", type=Path, help="the recipe (default: named after the data, here)")

    recipes = add("recipes", _recipes, "list the recipes and launcher configurations that ship, or copy one to edit")
    recipes.add_argument("--json", action="store_true", help="print the list as JSON")
    shelf = recipes.add_subparsers(metavar="ACTION")
    copy = shelf.add_parser("copy", help="copy one into this folder")
    copy.add_argument("name")
    copy.add_argument("-o", "--out", type=Path, help="file or folder (default: its own name, here)")
    copy.set_defaults(function=_copy)

    settings = add("settings", _settings, "list all settings of a recipe: each is a keyword, a YAML key and a flag")
    settings.add_argument("word", nargs="?", default="", help="only those whose name or help has this word")
    settings.add_argument("--json", action="store_true", help="print them as JSON")

    train = add("train", _train, "fine-tune as a recipe says; any setting of the recipe is a flag")
    train.add_argument("recipe", help="a recipe: .py, .yaml, or a run's recipe.json")

    check = add("check", _check, "prove the labels of a recipe's rows, without training; exit code 1 if any is wrong")
    check.add_argument("recipe", help="a recipe: .py, .yaml, or a run's recipe.json")
    check.add_argument("--json", action="store_true", help="print the report as JSON")

    preview = add("preview", _preview, "show which tokens of a recipe's rows are trained")
    preview.add_argument("recipe", help="a recipe: .py, .yaml, or a run's recipe.json")
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

    report = add("report", _report, "write the page of one or several runs, finished or not; compare runs")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    report.add_argument(
        "-o", "--out", type=Path, help="the page (default: RUN/report.html, comparison.html for several)"
    )
    report.add_argument("--watch", action="store_true", help="write it every few seconds until the runs are finished")
    report.add_argument("--json", action="store_true", help="print what the page is made of as JSON instead")

    merge = add("merge", _merge, "merge a run's adapter into its base model")
    merge.add_argument("run", type=Path, help="a run's folder, or an adapter's")
    merge.add_argument("-o", "--out", type=Path, required=True, help="folder of the merged model; must not exist")
    merge.add_argument("--base", help="the base model's folder or hub id (default: the one that the adapter names)")
    merge.add_argument("--dtype", choices=DTYPES, help="dtype of the merged weights (default: the base's)")

    plan = add("plan", _plan, "forecast a recipe's peak memory and pick the first launcher that fits")
    plan.add_argument("recipe", help="a recipe: .py, .yaml, or a run's recipe.json")
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

    cache = add("cache", _cache, "list what the cache folder holds, or make it smaller")
    cache.add_argument("--older_than", metavar="AGE", help="remove what was not used for so long, e.g. 30d")
    cache.add_argument("--keep", metavar="SIZE", help="remove what was used longest ago until this is left, e.g. 20GB")
    cache.add_argument("--dry_run", action="store_true", help="only tell what would be removed")

    completion = add("completion", _completion, "print a script that completes commands and settings in a shell")
    completion.add_argument("shell", choices=["bash", "zsh"])
    return parser


def _init(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.tools.init import init

    recipe, command = init(options.model, options.data, options.hardware, options.task, options.out)
    print(f"recipe: {recipe}; next:")
    for line in (f"ma-sft check {recipe}", command, f"ma-sft chat runs/{recipe.stem}"):
        print(f"  {line}")


def _recipes(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.tools.gallery import shipped

    found = shipped().values()
    if options.json:
        print(json.dumps([asdict(item) | {"path": str(item.path)} for item in found], ensure_ascii=False, indent=2))
        return
    for item in found:
        print(f"{item.name:<17} {item.kind:<9} {item.model:<37} {item.about}".rstrip())
    print("copy one to edit: ma-sft recipes copy NAME")


def _copy(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.tools.gallery import copy

    print(f"copied: {copy(options.name, options.out)}")


def _settings(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.recipe import all_settings

    word = options.word.lower()
    found = {n: s for n, s in all_settings().items() if word in n or word in s["help"].lower()}
    if options.json:
        print(json.dumps(found, indent=2, default=str))
        return
    for name, setting in found.items():
        print(f"{name} = {setting['default']}\n    {setting['help']}")


def _cache(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.tools.cache import clean, entries, table

    if options.older_than is None and options.keep is None:
        print("\n".join(table(entries())))
        return
    gone = clean(options.older_than, options.keep, dry_run=options.dry_run)
    print("would be removed:" if options.dry_run else "removed:", *table(gone), sep="\n")


def _completion(options: argparse.Namespace, rest: list[str]) -> None:
    import shtab

    from ma_sft.recipe import all_settings

    parser = _parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    for action in (action for command in commands.values() for action in command._actions):
        if action.type is Path or action.dest in ("recipe", "data"):
            action.complete = shtab.FILE
    for name in TAKE_SETTINGS:
        known = {flag for action in commands[name]._actions for flag in action.option_strings}
        for setting, about in all_settings().items():
            if f"--{setting}" not in known:
                commands[name].add_argument(f"--{setting}", help=about["help"].split(". ")[0], choices=about["choices"])
    print(shtab.complete(parser, options.shell))


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.recipe import Recipe
    from ma_sft.sft import run

    run(Recipe.load(options.recipe), rest)


def _check(options: argparse.Namespace, rest: list[str]) -> int:
    from rich.console import Console

    from ma_sft.labels.templates import load_tokenizer
    from ma_sft.labels.tokenize import check, label
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
    from ma_sft.labels.templates import load_tokenizer
    from ma_sft.labels.tokenize import label
    from ma_sft.pages.preview import preview
    from ma_sft.recipe import Recipe

    settings = Recipe.load(options.recipe).resolve(rest)
    tokenizer, _ = load_tokenizer(settings)
    preview(label(settings, tokenizer).dataset, tokenizer, n=options.n, html=options.html, borders=options.borders)
    if options.html:
        print(f"preview: {options.html}")


def _data_build(options: argparse.Namespace) -> None:
    from rich.console import Console

    from ma_sft.data.card import build

    main_process = os.getpid()

    def stop(number: int, _: Any) -> None:
        """A plain `kill` unwinds as Ctrl-C does, so that scratch folders go; a worker ends, as its pool expects."""
        if os.getpid() != main_process:
            os._exit(128 + number)
        raise KeyboardInterrupt

    overrides = {"num_proc": options.num_proc} if options.num_proc else {}
    before = signal.signal(signal.SIGTERM, stop)
    try:
        Console().print(build(options.mixture, options.out, **overrides))
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"data set: {options.out} (ma-sft data show {options.out})")


def _data_show(options: argparse.Namespace) -> None:
    from ma_sft.data.card import show

    show(options.folder, options.n)


def _silence() -> None:
    """Keep stdout for the JSON alone and stderr for errors: no progress bars."""
    import datasets

    datasets.disable_progress_bars()


def _report(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.pages.report import read_run, watch, write_report

    if options.json:
        print(json.dumps([read_run(run) for run in options.runs], ensure_ascii=False, indent=2))
        return
    one = len(options.runs) == 1
    page = options.out or (options.runs[0] / "report.html" if one else Path("comparison.html"))
    if options.watch:
        print(f"report: {page} (reloads itself; Ctrl-C ends the watch)", flush=True)
        watch(options.runs, page)
    else:
        write_report(options.runs, page)
        print(f"report: {page}")


def _merge(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.release.merge import merge

    print(f"merged model: {options.out}: {merge(options.run, options.out, base=options.base, dtype=options.dtype)}")


def _plan(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.labels.templates import load_tokenizer
    from ma_sft.recipe import Recipe
    from ma_sft.tools.memory import plan, show_plan

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
    from ma_sft.release.export import export_folder, export_gguf

    if options.out.suffix == ".gguf":
        commands = export_gguf(options.run, options.out, options.outtype, options.converter)
    else:
        commands = export_folder(options.run, options.out, options.dtype)
    print("\n".join(commands))


def _handoff(options: argparse.Namespace, rest: list[str]) -> int:
    from ma_sft.release.handoff import check_handoff

    findings = check_handoff(options.folder)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{'ok' if finding.ok else 'WRONG':>6}  {finding.what}: {finding.text}")
    return 0 if all(finding.ok for finding in findings) else 1


def _chat(options: argparse.Namespace, rest: list[str]) -> None:
    from ma_sft.release.chat import chat

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
