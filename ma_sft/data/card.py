"""`ma-sft data build`: a mixture as a folder that `load_from_disk`, recipes and TRL read."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from huggingface_hub import DatasetCard, DatasetCardData

from ma_sft.config import refuse_code
from ma_sft.data.load import processes
from ma_sft.data.mixture import load_mixture, read_mixture
from ma_sft.data.stages import Report
from ma_sft.errors import RecipeError
from ma_sft.utils import atomic_dir, must_be_new
from ma_sft.version import __version__

CARD = """---
{{ card_data }}
---

Built by ma_sft {{ version }}: {{ rows }} rows. Removed: {{ removed or "none" }}; examples are in `report.json`.

| source | format | licence | available | used |
| --- | --- | --- | --- | --- |
{% for s in sources -%}
| `{{ s.path }}` | {{ s.format }} | {{ s.license or "not stated" }} | {{ s.available }} | {{ s.used }} |
{% endfor %}
"""


def build(config: Path, out: Path, *, allow_code: bool = False, **overrides: Any) -> Report:
    """Make the mixture that a YAML file describes and save it in `out`, which is there whole or not at all.

    `out` then holds the data set (`save_to_disk`; splits `train` and `test` if rows were held out), `README.md`, its
    card with sources, counts and licences, and `report.json`, the table of stages and filters with examples.

    Raises:
        MaSftError: as `load_mixture`; `out` exists; or a Python file is named and `allow_code` is false.
    """
    must_be_new(out, "pass another folder with -o, or delete it")
    settings = read_mixture(config) | overrides
    if not allow_code:
        refuse_code(settings, config)
    if settings.get("streaming"):
        raise RecipeError(f"{config}: streaming: a stream cannot be saved; leave it out, memory stays constant anyway")
    mixture = load_mixture(**settings)
    assert isinstance(mixture.train, Dataset)
    rows = {"train": mixture.train, **({"test": mixture.test} if mixture.test is not None else {})}
    sources, removed = mixture.report.sources, mixture.report.removed
    licences = {source.get("license") for source in sources}
    report = {"ma_sft": __version__, "settings": settings, **asdict(mixture.report)}
    card = DatasetCard.from_template(
        DatasetCardData(license=licences.pop() if len(licences) == 1 else "other"),
        template_str=CARD,
        version=__version__,
        rows=", ".join(f"{len(part):,} ({name})" for name, part in rows.items()),
        removed=", ".join(f"{why}: {count:,}" for why, count in removed.items()),
        sources=sources,
    )
    with atomic_dir(out) as folder:
        saved = DatasetDict(rows) if len(rows) > 1 else mixture.train
        saved.save_to_disk(str(folder), num_proc=processes(settings.get("num_proc"), len(mixture.train)))
        (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=2, default=str), "utf-8")
        card.save(folder / "README.md")
    return mixture.report
