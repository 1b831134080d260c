"""The recipes and launcher configurations that ship with ma_sft: list them, copy one to edit.

In a clone they are the folders `recipes/` and `accelerate_configs/`; a wheel carries both inside the package.
"""

import json
import runpy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ma_sft.config import Recipe, json_schema
from ma_sft.errors import RecipeError
from ma_sft.utils import cache_dir, console, must_be_new, write_whole
from ma_sft.version import __version__

DEMO_DATA = Path("data/demo")
YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Shipped:
    """A file to copy: a `recipe`, a `script` that makes data, or a `launcher` (a configuration of accelerate)."""

    name: str
    kind: str
    model: str
    about: str
    path: Path


def shipped() -> dict[str, Shipped]:
    """Everything that ships, by name: recipes first. They import nothing heavy."""
    found = [_read(path) for path in sorted(_folder("recipes").glob("[!_]*.py"))]
    for path in sorted(_folder("accelerate_configs").glob("*.yaml")):
        comment = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        found.append(Shipped(path.stem, "launcher", "", " ".join(comment), path))
    return {item.name: item for item in sorted(found, key=lambda item: "recipe script launcher".index(item.kind))}


def show_shipped() -> None:
    """Print what ships: folded on a terminal, elsewhere a line each."""
    screen = console()
    screen.width = screen.width if screen.is_terminal else 300
    table = Table("name", "kind", "model", "about", box=None, padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[2].overflow = "fold"
    for item in shipped().values():
        table.add_row(item.name, item.kind, item.model, item.about)
    screen.print(table)


def copy(name: str, out: Path | None = None) -> Path:
    """Copy what ships under `name` to `out` (by default its own name, here), and make the demo's data for the demo.

    A recipe is written as YAML if `out` says so.
    """
    known = shipped()
    if name not in known:
        raise RecipeError(f"no recipe {name!r} ships with ma_sft; there are {', '.join(known)}")
    source = known[name].path
    target = out / source.name if out is not None and out.is_dir() else out or Path(source.name)
    must_be_new(target, "pass another file with -o")
    if known[name].kind == "recipe" and target.suffix in YAML:
        settings = {key: value for key, value in Recipe.load(source).settings.items() if key != "name"}
        target.write_text(as_yaml(settings, {}, known[name].about), encoding="utf-8")
    else:
        shutil.copyfile(source, target)
    if name == "demo" and not DEMO_DATA.exists():  # beside no clone: a recipe's paths count from where it is started
        runpy.run_path(str(known["demo_data"].path))["write"](DEMO_DATA, seed=0, rows=2000, multi_turn=300, heldout=100)
    return target


def as_yaml(settings: Mapping[str, Any], comments: Mapping[str, str], head: str) -> str:
    """A recipe as YAML, whose first line tells editors of the schema with which they complete and check it."""
    schema = cache_dir() / f"schema-{__version__}.json"
    schema.parent.mkdir(parents=True, exist_ok=True)
    write_whole(schema, json.dumps(json_schema()))
    lines = [f"# yaml-language-server: $schema={schema.absolute().as_uri()}"]
    lines += [f"# {line}".rstrip() for line in head.splitlines()]
    for name, value in settings.items():
        comment = f"  # {' '.join(comments[name].split())}" if comments.get(name) else ""
        lines.append(f"{name}: {json.dumps(value, ensure_ascii=False)}{comment}")
    return "\n".join(lines) + "\n"


def launcher_file(name: str) -> Path:
    """The configuration of accelerate that ships under this name, or the file of one's own.

    Raises:
        RecipeError: neither is there.
    """
    if (path := Path(name)).is_file():
        return path
    known = {item.name: item.path for item in shipped().values() if item.kind == "launcher"}
    if name not in known:
        raise RecipeError(f"--launcher: a file or one of {', '.join(known)} expected, found {name!r}")
    return known[name]


def _folder(name: str) -> Path:
    package = Path(__file__).parents[1]
    return package / name if (package / name).is_dir() else package.parent / name


def _read(path: Path) -> Shipped:
    module = runpy.run_path(str(path))
    recipe = module.get("recipe")
    model = recipe.settings["model_name_or_path"] if recipe else ""
    return Shipped(path.stem, "recipe" if recipe else "script", model, module["__doc__"].splitlines()[0], path)
