"""Write docs/settings.md: every setting with its class, default and help, and the rules between them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ma_sft.config import (
    EXCLUSIVE,
    NEEDS,
    OF_THE_MACHINE,
    PRESETS,
    TWO_WAYS,
    all_settings,
    reason,
)


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


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "docs" / "settings.md"
    page.write_text(settings_page(all_settings()), encoding="utf-8")
