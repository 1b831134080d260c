"""`ma-sft`: the command line. Nothing heavy is imported before a command is known.

A command is one function here, with `@command` above it: its name, its text and its arguments.
Exit codes: 0 done, 1 a check found something wrong, 2 bad input or settings (one line on stderr), 130 Ctrl-C.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.files import as_written
from ma_sft.terminal import console, guard, say
from ma_sft.version import __version__

if TYPE_CHECKING:
    from ma_sft.recipe import Recipe

Arguments = tuple[tuple[str, ...], dict[str, Any]]  # of `ArgumentParser.add_argument`


@dataclass(frozen=True)
class Command:
    """A line of `ma-sft --help`. `run` gives the exit code, None for 0; `settings`: a recipe's settings are flags."""

    run: Callable[[argparse.Namespace], int | None]
    text: str
    arguments: tuple[Arguments, ...]
    settings: bool


COMMANDS: dict[str, Command] = {}  # in the order in which the help lists them; "data build" is an action of `data`
GROUPS = {"data": "build a data set from a mixture, or show one"}


def command(name: str, text: str, *arguments: Arguments, settings: bool = False) -> Callable[..., Any]:
    """Make a function the command `name`; what `parse_known_args` leaves is in `options.rest`."""

    def register(run: Callable[[argparse.Namespace], int | None]) -> Callable[[argparse.Namespace], int | None]:
        COMMANDS[name] = Command(run, text, arguments, settings)
        return run

    return register


def arg(*names: str, **how: Any) -> Arguments:
    """An argument of a command."""
    return names, how


RECIPE = arg("recipe", help="a recipe: .py, .yaml, or a run's recipe.json")
JSON = arg("--json", action="store_true", help="print it as JSON")
TRUST = arg(
    "--trust_remote_code",
    choices=("true", "false"),
    default="false",
    help="run the model's own Python code (default: false)",
)
DTYPES = ("float32", "bfloat16", "float16")


def launch(recipe: "Recipe") -> None:
    """Run a recipe as a script: flags from the command line, one line and an exit code for errors.

    This is how recipes end: `if __name__ == "__main__": launch(recipe)`.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from ma_sft.sft import run

    main_file = getattr(sys.modules["__main__"], "__file__", None)
    if main_file:
        recipe.settings.setdefault("name", Path(main_file).stem)
    sys.exit(guard(lambda: run(recipe, sys.argv[1:])))


def main(args: Sequence[str] | None = None) -> int:
    """The console script."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: threads that wait leave their core
    parser = build_parser()
    options, rest = parser.parse_known_args(args)
    options.rest = rest
    if rest and not options.chosen.settings:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return guard(lambda: options.chosen.run(options))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="ma-sft",
        description="Supervised fine-tuning with proven labels.",
        epilog="Exit codes: 0 done, 1 a check found something wrong, 2 bad input or settings (one line on stderr), "
        "130 Ctrl-C. NO_COLOR=1 turns colours off.",
    )
    parser.add_argument("--version", action="version", version=f"ma-sft {__version__}")
    shelves = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    parsers = {}
    for name, entry in COMMANDS.items():
        group, _, verb = name.rpartition(" ")
        if group and group not in parsers:
            parsers[group] = shelves[""].add_parser(group, help=GROUPS[group], description=GROUPS[group])
        if group not in shelves:
            shelves[group] = parsers[group].add_subparsers(required=group in GROUPS, metavar="ACTION")
        parsers[name] = shelves[group].add_parser(verb, help=entry.text, description=entry.text, allow_abbrev=False)
        parsers[name].set_defaults(chosen=entry)
        for names, how in entry.arguments:
            parsers[name].add_argument(*names, **how)
    return parser


@command(
    "init",
    "look at your data and write a recipe for it; asks for what no flag says",
    arg("--model", help="a hub id, a folder, or demo (SmolLM2-135M from PyPI)"),
    arg("--data", help="a hub id (also as owner/name:configuration), a file, a glob, or a folder"),
    arg("--split", default="train", help="split of a hub data set (default: train)"),
    TRUST,
    arg("--hardware", help="cpu, or GPUs as 1x24GB"),
    arg("--task", help="chat, exact, reasoning, tools or text"),
    arg("-o", "--out", type=Path, help="the recipe (default: named after the data, here)"),
)
def _init(options: argparse.Namespace) -> None:
    from ma_sft.tools.init import init

    how = {"split": options.split, "code": _trusts(options)}
    recipe, start = init(options.model, options.data, options.hardware, options.task, options.out, **how)
    say(f"recipe: {recipe}; next:")
    for line in (f"ma-sft check {recipe}", start, f"ma-sft chat runs/{recipe.stem}"):
        say(f"  {line}")


@command("recipes", "list the recipes and launcher configurations that ship, or copy one to edit", JSON)
def _recipes(options: argparse.Namespace) -> None:
    from ma_sft.tools.gallery import shipped

    found = shipped().values()
    if options.json:
        return _print_json([asdict(item) | {"path": str(item.path)} for item in found])
    for item in found:
        say(f"{item.name:<17} {item.kind:<9} {item.model:<37} {item.about}".rstrip())
    say("copy one to edit: ma-sft recipes copy NAME")


@command(
    "recipes copy",
    "copy one into this folder",
    arg("name"),
    arg("-o", "--out", type=Path, help="file or folder (default: its own name, here)"),
)
def _copy(options: argparse.Namespace) -> None:
    from ma_sft.tools.gallery import copy

    say(f"copied: {copy(options.name, options.out)}")


@command(
    "settings",
    "list all settings of a recipe: each is a keyword, a YAML key and a flag",
    arg("word", nargs="?", default="", help="only those whose name or help has this word"),
    JSON,
)
def _settings(options: argparse.Namespace) -> None:
    from ma_sft.errors import RecipeError
    from ma_sft.recipe import all_settings
    from ma_sft.settings import nearest

    word, known = options.word.lower(), all_settings()
    found = {n: s for n, s in known.items() if word in n or word in s["help"].lower()}
    if not found:
        raise RecipeError(f"no setting speaks of {options.word!r}{nearest(word, known)}")
    if options.json:
        return _print_json(found)
    for stage in dict.fromkeys(setting["stage"] for setting in found.values()):
        say(f"[{stage}]")
        for name, setting in found.items():
            if setting["stage"] == stage:
                say(f"{name} = {setting['default']}  ({setting['class']})\n    {setting['help']}")


@command("train", "fine-tune as a recipe says; any setting of the recipe is a flag", RECIPE, settings=True)
def _train(options: argparse.Namespace) -> None:
    from ma_sft.recipe import Recipe
    from ma_sft.sft import run

    run(Recipe.load(options.recipe), options.rest)


@command(
    "check",
    "prove the labels of a recipe's rows, without training; exit code 1 if any is wrong",
    RECIPE,
    JSON,
    arg("--all", action="store_true", help="judge every row, not a sample in which every shape stands"),
    settings=True,
)
def _check(options: argparse.Namespace) -> int:
    from ma_sft.labels.templates import load_tokenizer
    from ma_sft.labels.tokenize import check, label
    from ma_sft.recipe import Recipe

    if options.json:
        _silence()
    settings = Recipe.load(options.recipe).resolve(options.rest)
    tokenizer, _ = load_tokenizer(settings)
    report = check(settings, tokenizer, label(settings, tokenizer), every_row=options.all)
    if options.json:
        say(report.to_json())
    else:
        console().print(report)
    return 1 if report.errors else 0


@command(
    "audit",
    "judge token ids and labels that another tool prepared; exit code 1 if any is wrong",
    arg(
        "folder", type=Path, help="a saved data set with input_ids and labels, of TRL, axolotl, LLaMA-Factory, ms-swift"
    ),
    arg("--tokenizer", required=True, help="folder or hub id of the model's tokenizer"),
    arg("--rows", help="the raw rows that were given to the tool, in any format that recipes take"),
    arg("--max_length", type=int, help="where the tool cut sequences, in tokens"),
    arg("-n", type=int, default=3, help="wrong rows to show (default: 3)"),
    JSON,
)
def _audit(options: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    from ma_sft.hub import load_pretrained
    from ma_sft.labels.audit import audit_folder, read_folder
    from ma_sft.labels.preview import preview_text

    if options.json:
        _silence()
    tokenizer = load_pretrained(AutoTokenizer, options.tokenizer)
    report = audit_folder(options.folder, tokenizer, options.rows, max_length=options.max_length)
    if options.json:
        say(report.to_json())
        return 1 if report.errors else 0
    console().print(report)
    worst = list(dict.fromkeys(row for finding in report.errors for row in finding.rows))[: options.n]
    if worst:
        sequences = read_folder(options.folder)
        shown = [{"row": n, "input_ids": sequences[n][0], "labels": sequences[n][1]} for n in worst]
        console().print(preview_text(shown, tokenizer))
    return 1 if report.errors else 0


@command(
    "preview",
    "show which tokens of a recipe's rows are trained",
    RECIPE,
    arg("-n", type=int, default=3, help="rows to show (default: 3)"),
    arg("--html", type=Path, help="write a self-contained page instead"),
    arg("--borders", action="store_true", help="show the borders of tokens"),
    settings=True,
)
def _preview(options: argparse.Namespace) -> None:
    from ma_sft.labels.templates import load_tokenizer
    from ma_sft.labels.tokenize import label
    from ma_sft.pages.preview import preview
    from ma_sft.recipe import Recipe
    from ma_sft.training.prepare import as_trained

    settings = Recipe.load(options.recipe).resolve(options.rest)
    tokenizer, _ = load_tokenizer(settings)
    rows = label(settings, tokenizer).dataset
    rows = rows.select(range(min(max(options.n, 0), len(rows))))
    preview(as_trained(settings, rows), tokenizer, n=options.n, html=options.html, borders=options.borders)
    if options.html:
        say(f"preview: {options.html}")


@command(
    "data build",
    "load, convert, filter, split and mix what a YAML file says; save it",
    arg("mixture", type=Path, help="a YAML file; see docs/formats.md"),
    arg("-o", "--out", type=Path, required=True, help="folder of the data set; must not exist"),
    arg("--num_proc", type=int, help="processes (default: all cores if there are many rows)"),
    arg("--allow_code", choices=("true", "false"), default="false", help="run Python files that it names"),
)
def _data_build(options: argparse.Namespace) -> None:
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
        console().print(build(options.mixture, options.out, allow_code=options.allow_code == "true", **overrides))
    finally:
        signal.signal(signal.SIGTERM, before)
    say(f"data set: {options.out} (ma-sft data show {options.out})")


@command(
    "data show",
    "print counts, sources and first rows of a folder that `build` made",
    arg("folder", type=Path),
    arg("-n", type=int, default=3, help="rows to show (default: 3)"),
)
def _data_show(options: argparse.Namespace) -> None:
    from ma_sft.data.card import show

    show(options.folder, options.n)


@command(
    "report",
    "write the page of one or several runs, finished or not; compare runs",
    arg("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder"),
    arg("-o", "--out", type=Path, help="the page (default: RUN/report.html, comparison.html for several)"),
    arg("--watch", action="store_true", help="write it every few seconds until the runs are finished"),
    arg("--json", action="store_true", help="print what the page is made of as JSON instead"),
)
def _report(options: argparse.Namespace) -> None:
    from ma_sft.pages.report import only_runs, read_run, watch, write_report

    runs = only_runs(options.runs)
    if options.json:
        return _print_json([read_run(run) for run in runs])
    page = options.out or (runs[0] / "report.html" if len(options.runs) == 1 else Path("comparison.html"))
    if options.watch:
        say(f"report: {page} (reloads itself; Ctrl-C ends the watch)", flush=True)
        watch(runs, page)
    else:
        write_report(runs, page)
        say(f"report: {page}")


@command(
    "merge",
    "merge a run's adapter into its base model",
    arg("run", type=Path, help="a run's folder, an adapter's, or a hub id"),
    arg("-o", "--out", type=Path, required=True, help="folder of the merged model; must not exist"),
    arg("--base", help="the base model's folder or hub id (default: the one that the adapter names)"),
    arg("--dtype", choices=DTYPES, help="dtype of the merged weights (default: the base's)"),
    TRUST,
)
def _merge(options: argparse.Namespace) -> None:
    from ma_sft.release.merge import merge

    how = {"base": options.base, "dtype": options.dtype, "code": _trusts(options)}
    with as_written(options.run):
        say(f"merged model: {options.out}: {merge(options.run, options.out, **how)}")


def _trusts(options: argparse.Namespace) -> bool:
    return bool(options.trust_remote_code == "true")


@command(
    "plan",
    "forecast a recipe's peak memory and pick the first launcher that fits",
    RECIPE,
    arg("--gpus", type=int, help="number of GPUs, 0 for the CPU (default: this machine's)"),
    arg("--gpu_memory", help="of each, e.g. 80GB (default: this machine's)"),
    JSON,
    settings=True,
)
def _plan(options: argparse.Namespace) -> None:
    from ma_sft.labels.templates import load_tokenizer
    from ma_sft.recipe import Recipe
    from ma_sft.tools.memory import plan, show_plan

    recipe = Recipe.load(options.recipe)
    if options.gpus and "fp16" not in recipe.settings:
        recipe.settings.setdefault("bf16", True)  # what those GPUs do, whatever this machine can
    settings = recipe.resolve(options.rest)
    load_tokenizer(settings)
    found = plan(settings, options.gpus, options.gpu_memory)
    if options.json:
        _print_json(found)
    else:
        show_plan(settings, found, options.recipe)


@command(
    "export",
    "write a run's whole model for vLLM and transformers serve, or as GGUF",
    arg("run", type=Path, help="a run's folder, a model's, or a hub id"),
    arg("-o", "--out", type=Path, required=True, help="a new folder, or a new file that ends with .gguf"),
    arg("--dtype", choices=DTYPES, help="dtype of a folder's weights (default: the model's)"),
    arg("--outtype", default="auto", help="type of a GGUF file's weights: f32, f16, bf16, q8_0, auto"),
    arg("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py (default: $LLAMA_CPP, the PATH)"),
    TRUST,
)
def _export(options: argparse.Namespace) -> None:
    from ma_sft.release.export import export_folder, export_gguf

    with as_written(options.run):
        if options.out.suffix == ".gguf":
            commands = export_gguf(options.run, options.out, options.outtype, options.converter)
        else:
            commands = export_folder(options.run, options.out, options.dtype, code=_trusts(options))
    say(*commands)


@command(
    "handoff-check",
    "compare a saved model with its manifest; exit code 1 if they disagree",
    arg("folder", type=Path, help="a run's folder, a model's or an adapter's, or a hub id"),
    TRUST,
    JSON,
)
def _handoff(options: argparse.Namespace) -> int:
    from ma_sft.release.handoff import check_handoff

    with as_written(options.folder):
        findings = check_handoff(options.folder, code=_trusts(options))
    if options.json:
        _print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            say(f"{'ok' if finding.ok else 'WRONG':>6}  {finding.what}: {finding.text}")
    return 0 if all(finding.ok for finding in findings) else 1


@command(
    "chat",
    "talk to a run's model or to any model folder",
    arg("folder", type=Path, help="a run's folder, a model's, or a hub id"),
    arg("--prompt", help="ask this one question and print the answer alone"),
    arg("--system", help="system message (default: the one of training; '' for none)"),
    arg("--base", help="the base model of an adapter (default: the one that the adapter names)"),
    arg("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)"),
    arg("--max_new_tokens", type=int, default=512, help="longest answer, in tokens (default: 512)"),
    TRUST,
)
def _chat(options: argparse.Namespace) -> None:
    from ma_sft.release.chat import chat

    how = {key: getattr(options, key) for key in ("prompt", "system", "base", "max_new_tokens", "temperature")}
    chat(options.folder, **how, code=_trusts(options))


@command(
    "cache",
    "list what the cache folder holds, or make it smaller",
    arg("--older_than", metavar="AGE", help="remove what was not used for so long, e.g. 30d"),
    arg("--keep", metavar="SIZE", help="remove what was used longest ago until this is left, e.g. 20GB"),
    arg("--dry_run", action="store_true", help="only tell what would be removed"),
)
def _cache(options: argparse.Namespace) -> None:
    from ma_sft.tools.cache import clean, entries, table

    if options.older_than is None and options.keep is None:
        return say(*table(entries()))
    gone = clean(options.older_than, options.keep, dry_run=options.dry_run)
    say("would be removed:" if options.dry_run else "removed:", *table(gone))


@command(
    "completion",
    "print a script that completes commands and settings in a shell",
    arg("shell", choices=["bash", "zsh"]),
)
def _completion(options: argparse.Namespace) -> None:
    import shtab

    from ma_sft.recipe import all_settings

    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    for action in (action for command in commands.values() for action in command._actions):
        if action.type is Path or action.dest in ("recipe", "data"):
            action.complete = shtab.FILE
    for name in (name for name, entry in COMMANDS.items() if entry.settings):
        known = {flag for action in commands[name]._actions for flag in action.option_strings}
        for setting, about in all_settings().items():
            if f"--{setting}" not in known:
                commands[name].add_argument(f"--{setting}", help=about["help"].split(". ")[0], choices=about["choices"])
    say(shtab.complete(parser, options.shell))


def _print_json(found: Any) -> None:
    """In ASCII: whole on every terminal, and nothing in it is obeyed by one."""
    say(json.dumps(found, indent=2, default=str))


def _silence() -> None:
    """Keep stdout for the JSON alone and stderr for errors: no progress bars."""
    import datasets

    datasets.disable_progress_bars()


if __name__ == "__main__":
    sys.exit(main())
