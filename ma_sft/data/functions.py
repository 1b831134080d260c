"""The user's own functions: by their names, with their code; and the classic text form for `formatting_func`."""

import ast
import importlib
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ma_sft.data.messages import Row, check_text, show
from ma_sft.errors import FormatError, RecipeError, failed_in

INSTALLED = {"site-packages", "dist-packages"}


def formatting_func(example: Row) -> str | list[str]:
    """MA-RLHF's text form of Alpaca rows, `###Question: {instruction} {input}\\n###Answer: {output}`.

    Args:
        example: one row (strings), which gives its text, or a batch (lists of strings), which gives a list of texts.
    """
    if isinstance(example.get("instruction"), list | tuple):
        keys = [key for key in ("instruction", "input", "output") if key in example]
        rows = zip(*(example[key] for key in keys), strict=True)
        return [str(formatting_func(dict(zip(keys, values, strict=True)))) for values in rows]
    instruction, output = (check_text(example.get(field), field) for field in ("instruction", "output"))
    question = f"{instruction} {example.get('input') or ''}".strip()
    return f"###Question: {question}\n###Answer: {output}"


def load_function(name: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function that `question-answer`, `module:function` or `file.py:function` names; or a function itself.

    What fails in it is a `FormatError` with the line there.

    Raises:
        RecipeError: there is none.
    """
    if name == "question-answer":
        return formatting_func
    found = name if callable(name) else load_object(name)
    where = getattr(getattr(found, "__code__", None), "co_filename", name)

    def call(*args: Any) -> Any:
        try:
            return found(*args)
        except (Exception, SystemExit) as error:
            raise FormatError(f"{getattr(name, '__name__', name)} failed at {failed_in(str(where), error)}") from error

    return call


def load_object(name: str) -> Callable[..., Any]:
    """The function or class that `module:function` or `file.py:function` names.

    Raises:
        RecipeError: there is none.
    """
    module, _, function = name.rpartition(":")
    try:
        if module.endswith(".py"):
            found = _run_file(module, Path(module).stat().st_mtime_ns).get(function)
        else:
            found = getattr(importlib.import_module(module), function, None) if module else None
    except (Exception, SystemExit) as error:
        raise RecipeError(f"cannot load the function {name!r}: {failed_in(module, error)}") from error
    if not callable(found):
        raise RecipeError(
            f"{name!r} is neither a known format (docs/formats.md) nor optimiser (docs/trainer.md), module:name or "
            "file.py:name"
        )
    return found  # type: ignore[no-any-return]


@lru_cache
def _run_file(path: str, changed: int) -> dict[str, Any]:
    return runpy.run_path(path)


class TextFunction:
    """A `formatting_func`, which gives one text for a row, or a list of texts for a batch; calls find out once which.

    Args:
        function: the function, or its name as for `load_function`.
    """

    def __init__(self, function: str | Callable[..., Any]) -> None:
        self.function = load_function(function) if isinstance(function, str) else function
        self.takes_batches: bool | None = None

    def __call__(self, rows: list[Row]) -> list[Any]:
        """The text of each row; raises `FormatError` where the function failed, or gives not a text a row."""
        if rows and self.takes_batches is None:
            try:  # one that takes a row alone fails at two, or gives one text for both
                two = self.function(_columns([rows[0], rows[0]]))
            except Exception:
                two = None
            self.takes_batches = isinstance(two, list | tuple) and len(two) == 2
        if self.takes_batches:
            texts = self.function(_columns(rows))
            if not isinstance(texts, list | tuple) or len(texts) != len(rows):
                raise FormatError(f"a list of {len(rows)} texts for {len(rows)} rows expected, found {show(texts)}")
            return list(texts)
        texts = [self.function(dict(row)) for row in rows]
        return [text[0] if isinstance(text, list | tuple) and len(text) == 1 else text for text in texts]


def _columns(rows: list[Row]) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def code_of(name: str | Callable[..., Any] | None) -> str:
    """The text of the file that holds a function, and of the user's modules it imports.

    It decides what the function gives, for every cache that keeps what it gave. It is "" for names of what ships with
    ma_sft. The file of a recipe's own function is left out: `datasets` hashes the function, and the file has settings.
    """
    # Installed packages have versions instead.
    roots = [Path(entry or ".").absolute() for entry in sys.path]
    roots = [root for root in roots if root != Path(ast.__file__).parent and not INSTALLED & set(root.parts)]
    function = getattr(name, "func", name)  # of a partial
    own = getattr(function, "__module__", None) in ("__main__", "<run_path>")
    if isinstance(name, str):
        module = name.rpartition(":")[0]
    else:
        code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
        module = getattr(code, "co_filename", "")
    waiting = [Path(module)] if module.endswith(".py") else [*_files(roots, module)] if module else []
    waiting = [file for file in waiting if INSTALLED.isdisjoint(file.parts)]
    found: dict[Path, str] = {}
    while waiting:
        file = waiting.pop().resolve()
        if file in found or not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
            waiting += _imports(file, ast.parse(text), roots)
            found[file], own = "" if own else text, False
        except (SyntaxError, ValueError) as error:
            raise RecipeError(f"{file}, which {name!r} needs, is no Python: {error}") from None
    return "\0".join(found[file] for file in sorted(found))


def _files(bases: list[Path], module: str) -> Iterator[Path]:
    """The files that may be executed when `a.b`, below one of the bases, is imported."""
    parts = module.split(".")
    for path in (base.joinpath(*parts[:depth]) for base in bases for depth in range(1, len(parts) + 1)):
        yield from (path / "__init__.py", path.with_name(f"{path.name}.py"))


def _imports(file: Path, tree: ast.Module, roots: list[Path]) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            level = getattr(node, "level", 0)
            bases = [file.parents[level - 1]] if level else [file.parent, *roots]
            for name in (".".join(filter(None, (getattr(node, "module", ""), alias.name))) for alias in node.names):
                if name.split(".")[0] != "ma_sft":
                    yield from _files(bases, name)
