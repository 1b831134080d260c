"""The user's own functions by name; and the classic text form for `formatting_func`."""

import importlib
import runpy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ma_sft.data.values import Row, check_text
from ma_sft.errors import FormatError, RecipeError, failed_in


def formatting_func(example: Row) -> str | list[str]:
    """MA-RLHF's text form of Alpaca rows: `###Question: {instruction} {input}\\n###Answer: {output}`.

    Args:
        example: one row (strings) or a batch (lists of strings).

    Returns:
        The text of the row, or the batch's texts.

    Raises:
        FormatError: a row without instruction or output.
    """
    if not isinstance(example.get("instruction"), list | tuple):
        instruction, output = (check_text(example.get(field), field) for field in ("instruction", "output"))
        question = f"{instruction} {example.get('input') or ''}".strip()
        return f"###Question: {question}\n###Answer: {output}"
    keys = [key for key in ("instruction", "input", "output") if key in example]
    rows = (dict(zip(keys, values, strict=True)) for values in zip(*(example[key] for key in keys), strict=True))
    return [str(formatting_func(row)) for row in rows]


def load_function(name: str) -> Callable[..., Any]:
    """The function that `question-answer`, `module:function` or `file.py:function` names.

    What fails in it is a `FormatError` with the line there.

    Raises:
        RecipeError: there is none.
    """
    if name == "question-answer":
        return formatting_func
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
            f"{name!r} is neither a known format (docs/formats.md lists them) nor a function "
            "module:function or file.py:function"
        )
    where = getattr(getattr(found, "__code__", None), "co_filename", name)

    def call(*args: Any) -> Any:
        try:
            return found(*args)
        except (Exception, SystemExit) as error:
            raise FormatError(f"{name} failed at {failed_in(where, error)}") from error

    return call


@lru_cache
def _run_file(path: str, changed: int) -> dict[str, Any]:
    return runpy.run_path(path)
