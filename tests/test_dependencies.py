"""What the package asks for is what its code imports."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, requires

from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [line for extra in ("quant", "data", "fast", "deepspeed") for line in PROJECT["optional-dependencies"][extra]]
DECLARED = {canonicalize_name(Requirement(line).name): Requirement(line) for line in PROJECT["dependencies"] + EXTRAS}


def imported() -> set[str]:
    """The distributions that modules of ma_sft import."""
    names = set()
    for path in (ROOT / "ma_sft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else found
            names |= {name.split(".")[0] for name in found} - {*sys.stdlib_module_names, "ma_sft"}
    return {canonicalize_name(packages_distributions()[name][0]) for name in names}


def test_what_is_imported_is_asked_for():
    """By us, or by what we ask for."""
    brought = [line for name in DECLARED for line in requires(name) or () if "extra ==" not in line]
    known = {*DECLARED, *(canonicalize_name(re.match(r"[\w.-]+", line)[0]) for line in brought)}
    assert imported() <= known
    assert DECLARED.keys() - imported() <= {"bitsandbytes", "deepspeed", "zstandard"}, "asked for and not imported"


def test_what_is_asked_for_is_what_is_tried():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    tried = {canonicalize_name(name): version.split("+")[0].split(";")[0].strip() for name, version in pinned.items()}
    assert all(wanted.specifier.contains(tried[name]) for name, wanted in DECLARED.items())
