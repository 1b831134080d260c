"""`ma-sft`: the command line, a function a command. Nothing heavy is imported before a command is known.

Exit codes: 0 done, 1 a check found something wrong, 2 bad input or settings (one line on stderr), 130 Ctrl-C.
"""

import atexit
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import CompletionItem, TyperCommand  # type: ignore[attr-defined]  # core imports CompletionItem

from ma_sft.errors import MaSftError, RecipeError, one_line
from ma_sft.utils import as_written, console, frozen, guard, not_there, progress, say
from ma_sft.version import __version__

if TYPE_CHECKING:
    from ma_sft.config import Recipe

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: threads that wait leave their core
atexit.register(gc.freeze)  # else the last collection goes through all that was imported, for a second or two
app = typer.Typer(
    help="Supervised fine-tuning with proven labels.",
    epilog="Exit codes: 0 done, 1 a check found something wrong, 2 bad input or settings (one line on stderr), "
    "130 Ctrl-C. NO_COLOR=1 turns colours off.",
    rich_markup_mode=None,
)
recipes = typer.Typer(rich_markup_mode=None, help="list the recipes and launcher configurations, or copy one to edit")
data = typer.Typer(rich_markup_mode=None, help="build a data set from a mixture")
app.add_typer(recipes, name="recipes", invoke_without_command=True)
app.add_typer(data, name="data")


class RecipeCommand(TyperCommand):
    """A command that takes a recipe, and every setting of it as a flag."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[CompletionItem]:
        """The command's own flags, and the settings."""
        from ma_sft.config import known_settings

        own = super().shell_complete(ctx, incomplete)
        flags = {f"--{name}" for name in known_settings()} - {item.value for item in own}
        return own + [CompletionItem(flag) for flag in sorted(flags) if incomplete and flag.startswith(incomplete)]


ON_RECIPE: dict[str, Any] = {"cls": RecipeCommand, "context_settings": {"ignore_unknown_options": True}}
LOADING = "loading PyTorch, transformers and TRL"  # the first word, before what takes seconds
LEGEND = "ours: done by ma_sft; trainer: passed on to TRL; preset: decided by ma_sft; refused: takes its default alone"
A_RECIPE = "a recipe (.py, .yaml, or a run's recipe.json), and its settings as flags; flags alone do as well"
RecipeArgs = Annotated[
    list[str] | None, Argument(metavar="[RECIPE] [--SETTING VALUE]...", show_default=False, help=A_RECIPE)
]
Json = Annotated[bool, Option("--json", help="print it as JSON")]
Answer = Literal["true", "false"]
Trust = Annotated[Answer, Option("--trust_remote_code", help="run the model's own Python code")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    Option(show_default=False, help="dtype of the written weights (default: the model's)"),
]
Out = Annotated[Path, Option("-o", "--out", help="a folder that does not exist yet")]
OutOrDefault = Annotated[Path | None, Option("-o", "--out", show_default=False, help="where it is written")]


def _there(run: Path) -> Path:
    """Said before anything heavy is imported."""
    from ma_sft.hub import is_hub_id

    if not run.is_dir() and not is_hub_id(str(run)):
        raise RecipeError(f"the folder {not_there(run)}")
    return run


Run = Annotated[Path, Argument(callback=_there, help="a run's folder, that of a model or adapter, or a hub id")]


def launch(recipe: "Recipe") -> None:
    """Run a recipe as a script: flags from the command line, one line and an exit code for errors.

    This is how recipes end: `if __name__ == "__main__": launch(recipe)`.
    """
    if main_file := getattr(sys.modules["__main__"], "__file__", None):
        recipe.settings.setdefault("name", Path(main_file).stem)

    def start() -> int:
        recipe.check_early(sys.argv[1:])
        progress(LOADING)
        return _run(recipe, sys.argv[1:])

    sys.exit(guard(start))


def main(args: Sequence[str] | None = None) -> int:
    """The console script."""

    def call() -> Any:
        try:
            command = typer.main.get_command(app)
            return command(args, prog_name="ma-sft", complete_var="_MA_SFT_COMPLETE", standalone_mode=False)
        except Exception as error:
            if not hasattr(error, "format_message"):  # of the parser
                raise
            raise MaSftError(f"{one_line(ValueError(error.format_message()))} (see --help)") from None

    return guard(call)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"ma-sft {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, Option("--version", help="print it", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


@app.command("init")
def _init(
    model: Annotated[str | None, Option(help="a hub id, a folder, or demo (SmolLM2-135M from PyPI)")] = None,
    data: Annotated[str | None, Option(help="a hub id (owner/name:configuration), a file, glob or folder")] = None,
    split: Annotated[str, Option(help="split of a hub data set")] = "train",
    trust_remote_code: Trust = "false",
    hardware: Annotated[str | None, Option(help="cpu, or GPUs as 1x24GB")] = None,
    task: Annotated[str | None, Option(help="chat, exact, reasoning, tools or text")] = None,
    columns: Annotated[str | None, Option(help="what columns mean: THEIRS=question,THEIRS=answer")] = None,
    out: OutOrDefault = None,
) -> None:
    """look at your data and write a recipe for it; asks for what no flag says"""
    progress(LOADING)
    from ma_sft.tools.init import init

    recipe, start = init(
        model, data, hardware, task, out, split=split, code=trust_remote_code == "true", columns=columns
    )
    say(f"recipe: {recipe}; next:", f"  ma-sft check {recipe}", f"  {start}", f"  ma-sft chat runs/{recipe.stem}")


@recipes.callback()
def _recipes(ctx: typer.Context, as_json: Json = False) -> None:
    from ma_sft.tools.gallery import shipped, show_shipped

    if ctx.invoked_subcommand:
        return
    if as_json:
        return _print_json([asdict(item) | {"path": str(item.path)} for item in shipped().values()])
    show_shipped()
    say("copy one to edit: ma-sft recipes copy NAME")


@recipes.command("copy")
def _copy(name: str, out: OutOrDefault = None) -> None:
    """copy one into this folder"""
    from ma_sft.tools.gallery import copy

    say(f"copied: {copy(name, out)}")


@app.command("settings")
def _settings(
    word: Annotated[str, Argument(help="only those whose name or help has this word")] = "", as_json: Json = False
) -> None:
    """list all settings of a recipe: each is a keyword, a YAML key and a flag"""
    from ma_sft.config import OF_THE_MACHINE, all_settings, nearest

    known, word = all_settings(), word.lower()
    found = {n: s for n, s in known.items() if word in n or word in s["help"].lower()}
    if not found:
        raise RecipeError(f"no setting speaks of {word!r}{nearest(word, known)}")
    if as_json:
        return _print_json(found)
    stage = None
    for name, about in found.items():
        if about["stage"] != stage:
            say(f"[{(stage := about['stage'])}]")
        default = "by machine" if name in OF_THE_MACHINE else about["default"]
        say(f"{name} = {default}  ({about['class']})\n    {about['help']}")
    say(f"\n{LEGEND}")


@app.command("schema")
def _schema() -> None:
    """print the JSON Schema of a YAML recipe, for editors"""
    from ma_sft.config import json_schema

    _print_json(json_schema())


def _load(args: list[str] | None, *, reads_rows: bool = True, first_word: str = LOADING) -> tuple["Recipe", list[str]]:
    """The recipe that a command line begins with, or an empty one, and its flags; what is wrong is refused at once."""
    from ma_sft.config import Recipe

    flags = args or []
    recipe = Recipe.load(flags.pop(0)) if flags and not flags[0].startswith("-") else Recipe()
    recipe.check_early(flags, reads_rows=reads_rows)
    progress(first_word)
    return recipe, flags


def _run(recipe: "Recipe", flags: Sequence[str]) -> int:
    with frozen():
        from ma_sft.sft import MERGING, run

    return int(MERGING in run(recipe, flags).get("failed", {}))  # a merged model that is not what the adapter says


@app.command("train", **ON_RECIPE)
def _train(
    args: RecipeArgs = None,
    launcher: Annotated[
        str | None, Option(show_default=False, help="start by a configuration of accelerate: its name or file")
    ] = None,
    gpus: Annotated[int | None, Option(min=1, show_default=False, help="of the launcher; with cpu: processes")] = None,
) -> int:
    """fine-tune as a recipe says; any setting of the recipe is a flag"""
    if launcher is None:
        if gpus:
            raise RecipeError("--gpus is of a launcher: say which, e.g. --launcher ddp")
        return _run(*_load(args))
    from ma_sft.tools.gallery import launcher_file

    config, words = launcher_file(launcher), ["train", *(args or [])]
    _load(args, first_word=f"starting by {config}")
    from ma_sft.launcher import start

    return start(config, gpus, words)


@app.command("check", **ON_RECIPE)
def _check(
    args: RecipeArgs = None,
    as_json: Json = False,
    every_row: Annotated[bool, Option("--all", help="verify every row, not a sample with every shape")] = False,
) -> int:
    """prove the labels of a recipe's rows, without training; exit code 1 if any is wrong"""
    recipe, flags = _load(args)
    with frozen():
        from ma_sft.look import check

    return _show(check(recipe, flags, every_row=every_row), as_json)


@app.command("audit")
def _audit(
    folder: Annotated[Path, Argument(exists=True, help="a saved data set of TRL, axolotl, LLaMA-Factory or ms-swift")],
    tokenizer: Annotated[str, Option(help="folder or hub id of the model's tokenizer")],
    rows: Annotated[str | None, Option(help="the raw rows that were given to the tool, in any format")] = None,
    max_length: Annotated[int | None, Option("--max_length", help="where the tool cut sequences, in tokens")] = None,
    n: Annotated[int, Option("-n", help="wrong rows to show")] = 3,
    as_json: Json = False,
) -> int:
    """verify token ids and labels that another tool prepared; exit code 1 if any is wrong"""
    progress(LOADING)
    from transformers import AutoTokenizer

    from ma_sft.hub import load_pretrained
    from ma_sft.labels.audit import audit_folder, read_folder
    from ma_sft.labels.preview import preview_text

    loaded = load_pretrained(AutoTokenizer, tokenizer)
    report = audit_folder(folder, loaded, rows, max_length=max_length)
    code = _show(report, as_json)
    worst = list(dict.fromkeys(row for finding in report.errors for row in finding.rows))[:n]
    if worst and not as_json:
        sequences = read_folder(folder)
        shown = [{"row": n, "input_ids": sequences[n][0], "labels": sequences[n][1]} for n in worst]
        console().print(preview_text(shown, loaded))
    return code


@app.command("preview", **ON_RECIPE)
def _preview(
    args: RecipeArgs = None,
    n: Annotated[int, Option("-n", help="rows to show")] = 3,
    html: Annotated[Path | None, Option(help="write a self-contained page instead")] = None,
    borders: Annotated[bool, Option("--borders", help="show the borders of tokens")] = False,
) -> None:
    """show which tokens of a recipe's rows are trained"""
    recipe, flags = _load(args)
    with frozen():
        from ma_sft.look import preview

    preview(recipe, flags, n=n, html=html, borders=borders)
    if html:
        say(f"preview: {html}")


@data.command("build")
def _data_build(
    mixture: Annotated[Path, Argument(help="a YAML file; see docs/formats.md")],
    out: Out,
    num_proc: Annotated[int | None, Option("--num_proc", help="processes (all cores if rows are many)")] = None,
    allow_code: Annotated[Answer, Option("--allow_code", help="run Python files that it names")] = "false",
) -> None:
    """load, convert, filter, split and mix what a YAML file says; save it"""
    from ma_sft.data.card import build

    main_process = os.getpid()

    def stop(number: int, _: Any) -> None:
        """A plain `kill` unwinds as Ctrl-C does, so that scratch folders go; a worker ends, as its pool expects."""
        if os.getpid() != main_process:
            os._exit(128 + number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        given = {"num_proc": num_proc} if num_proc else {}
        console().print(build(mixture, out, allow_code=allow_code == "true", **given))
    finally:
        signal.signal(signal.SIGTERM, before)
    say(f"data set: {out}")


@app.command("report")
def _report(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="folders of runs")],
    out: OutOrDefault = None,
    watching: Annotated[bool, Option("--watch", help="write it anew until the runs are finished")] = False,
    as_json: Json = False,
) -> None:
    """write the page of one or several runs, finished or not; compare runs"""
    from ma_sft.pages.report import only_runs, read_run, watch, write_report

    found = only_runs(runs)
    if as_json:
        return _print_json([read_run(run) for run in found])
    page = out or (found[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    if watching:
        say(f"report: {page} (reloads itself; Ctrl-C ends the watch)")
        watch(found, page)
    else:
        write_report(found, page)
        say(f"report: {page}")


@app.command("merge")
def _merge(
    run: Run,
    out: Out,
    base: Annotated[str | None, Option(help="folder or hub id of the base (else: the adapter's)")] = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = "false",
) -> None:
    """merge a run's adapter into its base model"""
    progress(LOADING)
    from ma_sft.release.merge import merge

    with as_written(run):
        say(f"merged model: {out}: {merge(run, out, base=base, dtype=dtype, code=trust_remote_code == 'true')}")


@app.command("plan", **ON_RECIPE)
def _plan(
    args: RecipeArgs = None,
    gpus: Annotated[int | None, Option(min=0, help="number of GPUs, 0 for the CPU (else: this machine's)")] = None,
    gpu_memory: Annotated[str | None, Option("--gpu_memory", help="of each, e.g. 80GB")] = None,
    as_json: Json = False,
) -> None:
    """forecast a recipe's peak memory and pick the first launcher that fits"""
    file = [str(Path(word)) for word in (args or [])[:1] if not word.startswith("-")]
    recipe, flags = _load(args, reads_rows=False)
    from ma_sft.labels.templates import load_tokenizer
    from ma_sft.tools.memory import plan, show_plan
    from ma_sft.training.rehearsal import rehearse

    if gpus and "fp16" not in recipe.settings:
        recipe.settings.setdefault("bf16", True)  # what those GPUs do, whatever this machine can
    settings = recipe.resolve(flags)
    tokenizer, added_tokens = load_tokenizer(settings)
    rehearsed = rehearse(settings, tokenizer, added_tokens)
    found = plan(settings, gpus, gpu_memory)
    if as_json:
        return _print_json(found)
    show_plan(settings, found, [*file, *flags])
    say(rehearsed)


@app.command("export")
def _export(
    run: Run,
    out: Annotated[Path, Option("-o", "--out", help="a new folder, or a new file that ends with .gguf")],
    dtype: Dtype = None,
    outtype: Annotated[str, Option(help="weights of a GGUF file: f32, f16, bf16, q8_0, auto")] = "auto",
    converter: Annotated[Path | None, Option(help="llama.cpp's convert_hf_to_gguf.py")] = None,
    trust_remote_code: Trust = "false",
) -> None:
    """write a run's whole model for vLLM and transformers serve, or as GGUF"""
    progress(LOADING)
    from ma_sft.release.export import export_folder, export_gguf

    with as_written(run):
        if out.suffix == ".gguf":
            say(*export_gguf(run, out, outtype, converter))
        else:
            say(*export_folder(run, out, dtype, code=trust_remote_code == "true"))


@app.command("handoff-check")
def _handoff(folder: Run, trust_remote_code: Trust = "false", as_json: Json = False) -> int:
    """compare a saved model with its manifest; exit code 1 if they disagree"""
    progress(LOADING)
    from ma_sft.release.manifest import check_handoff

    with as_written(folder):
        findings = check_handoff(folder, code=trust_remote_code == "true")
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        say(*(f"{'ok' if finding.ok else 'WRONG':>6}  {finding.what}: {finding.text}" for finding in findings))
    return 0 if all(finding.ok for finding in findings) else 1


@app.command("chat")
def _chat(
    folder: Run,
    prompt: Annotated[str | None, Option(help="ask this one question and print the answer alone")] = None,
    system: Annotated[str | None, Option(help="system message (else: that of training; '': none)")] = None,
    base: Annotated[str | None, Option(help="the base of an adapter (else: the one that it names)")] = None,
    temperature: Annotated[float, Option(min=0, help="0 takes the likeliest token")] = 0.0,
    max_new_tokens: Annotated[int, Option("--max_new_tokens", min=1, help="longest answer, in tokens")] = 512,
    trust_remote_code: Trust = "false",
) -> None:
    """talk to a run's model or to any model folder"""
    progress(LOADING)
    from ma_sft.release.chat import chat

    given = {"prompt": prompt, "system": system, "base": base, "code": trust_remote_code == "true"}
    chat(folder, **given, temperature=temperature, max_new_tokens=max_new_tokens)  # type: ignore[arg-type]


@app.command("completion")
def _completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """print a script that completes commands and settings in a shell"""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # it imports it

    say(get_completion_script(prog_name="ma-sft", complete_var="_MA_SFT_COMPLETE", shell=shell))


def _show(report: Any, as_json: bool) -> int:
    """Print what a check found; its exit code."""
    if as_json:
        say(report.to_json())
    else:
        console().print(report)
    return 1 if report.errors else 0


def _print_json(found: Any) -> None:
    """In ASCII: whole on every terminal, and nothing in it is obeyed by one."""
    say(json.dumps(found, indent=2, default=str))


if __name__ == "__main__":
    sys.exit(main())
