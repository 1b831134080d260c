"""Write `docs/models.md`: every causal language model of the installed transformers, rehearsed on its twin.

python scripts/models.py [MODEL_TYPE ...]
"""

import signal
import sys
from pathlib import Path
from typing import Any

import peft
import transformers
import trl
from ma_sft.recipe import Recipe
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from ma_sft.errors import RecipeError
from ma_sft.training.rehearsal import rehearse_here

PAGE = Path(__file__).parents[1] / "docs/models.md"
HEAD = f"""# Models

Each causal language model of transformers {transformers.__version__}, in its default configuration, on its twin (see
[LoRA and QLoRA](lora-and-qlora.md#rehearsed-before-a-row-is-read)), with TRL {trl.__version__} and
PEFT {peft.__version__}, on a CPU without kernels of other packages; `scripts/models.py` writes this page. A model that
is not rehearsed here may train: its default configuration has no twin, or a library cannot do with the twin.

| model type | `packing: true` | LoRA on all linear layers: trained, saved, loaded, merged |
| --- | --- | --- |
"""


class TooSlowError(BaseException):
    """Nothing catches it on its way."""


def stop(*_: Any) -> None:
    raise TooSlowError


def rehearse(kind: str, **more: Any) -> str:
    """What the rehearsal says of a model type: its line, or why it refuses."""
    signal.alarm(60)
    try:
        config = AutoConfig.for_model(kind)
        config.architectures = [CLASSES[kind]]
        chosen = {"model_name_or_path": "/none", "dataset_name": "x", "report_to": "none", "max_length": 32, **more}
        settings = Recipe(use_peft=True, **chosen).resolve()
        return rehearse_here(settings, config, config.get_text_config().vocab_size, [])
    except RecipeError as error:
        return f"refused: {error}"
    except TooSlowError:
        return "not rehearsed: takes more than a minute"
    except Exception as error:
        return f"not rehearsed: its default configuration is none: {type(error).__name__}"
    finally:
        signal.alarm(0)


def row(kind: str) -> str:
    """The line of the table."""
    packed = rehearse(kind, packing=True)
    if "packing keeps documents apart" in packed:
        return f"| {kind} | apart | {'yes' if 'merges to' in packed else 'not merged'} |"
    plain = rehearse(kind)
    adapter = "yes" if "merges to" in plain else plain.split(": ", 1)[-1] if plain[:3] == "ref" else "not rehearsed"
    packing = "not rehearsed"
    if packed[:3] == "ref":
        packing = "refused: documents see each other" if "see each other" in packed else "refused: needs kernels"
        packing = packing if "packing" in packed or "see each other" in packed else "refused, see LoRA"
    return f"| {kind} | {packing} | {adapter.replace('|', '/')[:150]} |"


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, stop)
    lines = []
    for name in sys.argv[1:] or sorted(CLASSES):
        lines.append(row(name))
        print(lines[-1], flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
