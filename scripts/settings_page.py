"""Write docs/settings.md, every setting with its class, default and help, and the rules between them; and
ma_sft/settings_types.py, the same as types, for mypy, completion and help()."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ma_sft.config import (
    EXCLUSIVE,
    NEEDS,
    OF_THE_MACHINE,
    PATHS,
    PRESETS,
    TWO_WAYS,
    Setting,
    all_settings,
    known_settings,
    reason,
)

ROWS = ("dataset_name", "datasets", "eval_dataset")  # paths, mappings, or rows that are handed over
TYPES = {"dict": "dict[str, Any] | str", "list": "list[Any] | str", "bool": "bool", "int": "int", "float": "float"}


def settings_page(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """`docs/settings.md`: what `all_settings` gives, as one table a stage, and the rules."""
    lines = [
        "# Settings",
        "",
        "Every setting is a keyword of `Recipe(...)`, a YAML key and a flag. Later wins: TRL's default, ours, the",
        "recipe, `--config` files, flags. Dashes do for underscores. `ma-sft settings WORD` shows those with a word,",
        "`ma-sft schema` prints a JSON Schema with which editors complete and check a YAML recipe.",
        "",
        "**ours** is done by ma_sft; **trainer** is passed on to TRL, transformers or PEFT as it is; **preset** is",
        "decided by ma_sft, and a contrary value is refused; **refused** takes its default alone.",
    ]
    for stage in dict.fromkeys(about["stage"] for about in settings.values()):
        lines += ["", f"## {stage}", "", "| setting | class | default | what it does |", "| --- | --- | --- | --- |"]
        for name, about in settings.items():
            if about["stage"] == stage:
                help = about["help"].replace("|", "\\|").replace("<", "&lt;")
                default = "by machine" if name in OF_THE_MACHINE else f"`{json.dumps(about['default'])}`"
                lines.append(f"| `{name}` | {about['class']} | {default} | {help} |")
    lines += ["", "## What goes together", "", "Anything against these rules is refused before a row is read.", ""]
    rules = [(name, why) for name, (_, why) in PRESETS.items()]
    rules += [(" ".join(pair), TWO_WAYS) for pair in EXCLUSIVE]
    rules += [(names, reason(condition, words)) for names, condition, words in NEEDS]
    lines += [f"- {', '.join(f'`{name}`' for name in names.split())}: {why}" for names, why in rules]
    return "\n".join(lines) + "\n"


def settings_types(settings: Mapping[str, Setting]) -> str:
    """`ma_sft/settings_types.py`."""
    lines = [
        '"""The keywords of `Recipe`, as types. Written by scripts/settings_page.py."""',
        "",
        "from os import PathLike",
        "from typing import Any, Literal, TypedDict",
        "",
        "",
        "class RecipeSettings(TypedDict, total=False):",
        '    """Every setting of a recipe; `ma-sft settings` and docs/settings.md say what each does."""',
        "",
    ]
    for name, what in settings.items():
        types = [TYPES.get(kind, "str" if kind == "str" else "Any") for kind in what.kinds]
        if what.choices and set(what.kinds) <= {"str"}:
            types = [f"Literal[{', '.join(json.dumps(choice) for choice in what.choices)}]"]
        types = [*dict.fromkeys(" | ".join(types).split(" | "))]
        types += ["PathLike[str]"] * (name in PATHS) + ["None"] * what.nullable
        lines.append(f"    {name}: {'Any' if name in ROWS or 'Any' in types else ' | '.join(types)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    types = Path(__file__).parents[1] / "ma_sft" / "settings_types.py"
    types.write_text(settings_types(known_settings()), encoding="utf-8")
    page = Path(__file__).parents[1] / "docs" / "settings.md"
    page.write_text(settings_page(all_settings()), encoding="utf-8")
