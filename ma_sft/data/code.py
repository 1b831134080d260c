"""The code of a user's function: what decides what it gives, for every cache that keeps what it gave."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from ma_sft.errors import RecipeError

INSTALLED = ("site-packages", "dist-packages", "lib-dynload")


def code_of(name: str | None) -> str:
    """The text of the file that holds the function `name` and of every module of the user's that it imports.

    Args:
        name: `module:function` or `file.py:function`; anything else ships with ma_sft, and its code is "".

    Raises:
        RecipeError: a file that is no Python.
    """
    module, _, function = (name or "").rpartition(":")
    if not module or not function:
        return ""
    first = [Path(module)] if module.endswith(".py") else [f for root in _roots() for f in _files(root, module)]
    found: dict[Path, str] = {}
    waiting = [file.resolve() for file in first if file.is_file()]
    while waiting:
        file = waiting.pop()
        if file not in found:
            try:
                found[file] = file.read_text(encoding="utf-8")
                waiting += [each.resolve() for each in _imports(file, ast.parse(found[file]))]
            except (SyntaxError, ValueError) as error:
                raise RecipeError(f"{file}, which {name!r} needs, is no Python: {error}") from None
    return "\0".join(found[file] for file in sorted(found))


def _roots() -> list[Path]:
    """The folders that modules of the user's are imported from; installed packages have versions instead."""
    roots = [Path(entry or ".").absolute() for entry in sys.path]
    library = Path(ast.__file__).parent
    return [root for root in roots if root.is_dir() and root != library and not set(INSTALLED) & set(root.parts)]


def _files(base: Path, module: str) -> list[Path]:
    """`a.b` below `base`: the files that are executed when it is imported, as far as they are there."""
    paths = [base.joinpath(*module.split(".")[:depth]) for depth in range(1, module.count(".") + 2)]
    files = [file for path in paths for file in (path / "__init__.py", path.with_name(f"{path.name}.py"))]
    return [file for file in files if file.is_file()]


def _imports(file: Path, tree: ast.Module) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bases, names = [file.parent, *_roots()], [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            bases = [file.parents[node.level - 1]] if node.level else [file.parent, *_roots()]
            names = [".".join(filter(None, (node.module, alias.name))) for alias in node.names]
        else:
            continue
        theirs = [name for name in names if name.split(".")[0] != "ma_sft"]
        yield from (found for name in theirs for base in bases for found in _files(base, name))
