"""Write `docs/models.md`: every causal language model of the installed transformers, rehearsed on its twin.

python scripts/models.py [MODEL_TYPE ...]

What each rehearsal says is written to `models.jsonl` in ma-sft's cache as it goes, so that a walk that was cut goes on
where it stopped; the page is written from it at the end and when the walk is interrupted. With model types, only these
are rehearsed and printed, and the page stays.
"""

import json
import re
import signal
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from ma_sft.config import Recipe
from ma_sft.errors import RecipeError, first_line
from ma_sft.training.rehearsal import rehearse_here
from ma_sft.utils import cache_dir

PAGE = Path(__file__).parents[1] / "docs/models.md"
# Published models have kinds of layers, and values, that the default configurations of their types have not.
LAYERS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 5e5, "kv_n_heads": 8, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "gemma4_text": {"num_kv_shared_layers": 18},
}
SECONDS = 20  # of CPU for each rehearsal of a model type
VERSIONS = {library.__name__: library.__version__ for library in (transformers, trl, peft, torch)}
HEAD = """# Models

Each causal language model of transformers {transformers}, in its default configuration, on its twin (see
[LoRA and QLoRA](lora-and-qlora.md#rehearsed-before-a-row-is-read)), with TRL {trl}, PEFT {peft} and
torch {torch}, in float32 on a CPU without kernels of other packages, on {date}; `python scripts/models.py`
writes this page. {layers} are tried with the kinds of layers
and the values of their published models, which the default has not. A run rehearses its own model's configuration,
whatever stands here.

- **apart**: two documents of a pack give the logits and gradients that each gives alone. **refused**: a run with
  `packing: true` ends with one line before a row is read; in brackets, why.
- **yes**: LoRA on all linear layers is trained, saved, loaded, continued and merged, with the same logits.
- **not rehearsed**: there is no twin of its default configuration, or a library cannot do with the twin; such a model
  may train all the same, and nothing is proven of it. ma-sft says so before the run.

Two that surprise: transformers makes the masks of gpt-oss and AFMoE without the positions, so that documents of a pack
see each other with eager attention (and AFMoE's with sdpa and flex attention; gpt-oss has no sdpa). A FlashAttention
kernel takes the ends of documents from the batch and may keep them apart: the rehearsal of a run with it tells.

{counts}

| model type | `packing: true` | LoRA |
| --- | --- | --- |
"""


class TooSlowError(BaseException):
    """Nothing catches it on its way."""


def stop(*_: Any) -> None:
    raise TooSlowError


def rehearse(kind: str, **more: Any) -> str:
    """What the rehearsal says of a model type: its line, or why it refuses."""
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        config = AutoConfig.for_model(kind, **LAYERS.get(kind, {}))
        config.architectures = [CLASSES[kind]]
        chosen = {"model_name_or_path": "/none", "dataset_name": "x", "report_to": "none", "max_length": 32, **more}
        settings = Recipe(use_peft=True, **chosen).resolve()
        return rehearse_here(settings, config, config.get_text_config().vocab_size, [])
    except RecipeError as error:
        return f"refused: {error}"
    except TooSlowError:
        return f"not rehearsed: takes more than {SECONDS} seconds"
    except Exception as error:
        return f"not rehearsed: its default configuration is none: {type(error).__name__}: {first_line(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def tried(kind: str) -> dict[str, str]:
    """What the rehearsals of a model type say, packed and, where that does not end well, unpacked."""
    packed = rehearse(kind, packing=True)
    return {"kind": kind, "packed": packed, "plain": packed if packed.startswith("rehearsed") else rehearse(kind)}


def reason(line: str) -> str:
    """Why a line says no, short and in a cell of the table."""
    text = re.sub(r"^(refused|not rehearsed(, as there is no twin of [^:]*)?): |^not (?=rehearsed on a twin)", "", line)
    text = text.split("rehearsed on a twin: ")[-1]
    if "see each other" in text:
        return "documents see each other"
    text = re.sub(r"\S*/tmp/\S+", "...", text).replace("|", "/")
    return text if len(text) <= 100 else f"{text[:97].rstrip()}..."


def row(kind: str, packed: str, plain: str) -> str:
    """The line of the table; a model that is refused unpacked as well is so for what it is, not for packing."""
    if packed.startswith("rehearsed"):
        packing = "apart" if "packing keeps documents apart" in packed else "not packed"
    else:
        packing = f"{packed.split(':')[0].split(',')[0].split(' on')[0]} ({reason(packed)})"
    if plain.startswith("rehearsed"):
        adapter = "yes" if "merges to" in plain else "yes, not merged"
    else:
        adapter = f"{plain.split(':')[0].split(',')[0].split(' on')[0]} ({reason(plain)})"
    return f"| {kind} | {packing} | {adapter} |"


def page(found: dict[str, dict[str, str]], day: str) -> str:
    """The whole page; model types that were not tried are named."""
    rows = [row(**found[kind]) if kind in found else f"| {kind} | not tried | not tried |" for kind in sorted(CLASSES)]
    cells = [line.split(" | ") for line in rows]

    def count(column: int, *starts: str) -> int:
        return sum(line[column].startswith(starts) for line in cells)

    counts = (
        f"Of {len(rows)} model types, {count(1, 'apart')} are packed apart and {count(1, 'refused')} refused packed;\n"
        f"LoRA holds for {count(2, 'yes')} and is refused for {count(2, 'refused')}; "
        f"{count(2, 'not rehearsed')} are not rehearsed at all, and {count(2, 'not tried')} were not tried."
    )
    return HEAD.format(**VERSIONS, date=day, counts=counts, layers=", ".join(LAYERS)) + "\n".join(rows) + "\n"


def walk(path: Path) -> None:
    """Rehearse all model types that `path` does not have yet from the same versions, and write the page."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    if not lines or lines[0]["versions"] != VERSIONS:
        lines = [{"versions": VERSIONS, "date": date.today().isoformat()}]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(lines[0]) + "\n", encoding="utf-8")
    found = {line["kind"]: line for line in lines[1:]}
    try:
        for kind in sorted(set(CLASSES) - set(found)):
            begun = time.monotonic()
            found[kind] = tried(kind)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[kind]) + "\n")
            print(f"{time.monotonic() - begun:5.1f} s {row(**found[kind])}", flush=True)
    finally:
        PAGE.write_text(page(found, lines[0]["date"]), encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(*tried(name).values(), sep="\n")
    if not sys.argv[1:]:
        walk(cache_dir() / "models.jsonl")
