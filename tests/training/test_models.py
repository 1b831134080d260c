"""`docs/models.md` says what the rehearsal says, and what it calls apart is apart by a check of its own."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from ma_sft import RecipeError
from ma_sft.config import Recipe
from ma_sft.training.rehearsal import rehearse_here
from ma_sft.training.twin import shrink

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("models_page", ROOT / "scripts/models.py")
models = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(models)

PAGE = {
    cells[1].strip(): (cells[2].strip(), cells[3].strip())
    for line in models.PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and len(cells := line.split("|")) == 5 and cells[1].strip() in CLASSES
}
APART = [kind for kind, (packing, _) in PAGE.items() if packing == "apart"]
SAMPLE = "afmoe bart bloom ctrl gemma3_text gpt2 gpt_oss granite jamba mistral qwen3_moe".split()


def verdict(cell):
    """A cell of the table without its reason."""
    return cell.split(" (")[0]


def changed_by_another_document(config, attention, kind=None):
    """By how much the logits of a pack's second document change with its first, in a model of random weights."""
    torch.manual_seed(0)
    own = getattr(transformers, CLASSES[kind]) if kind else None  # of a text's configuration, where it is that
    build = own._from_config if own and own.config_class is type(config) else AutoModelForCausalLM.from_config
    model = build(config, attn_implementation=attention).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        first, other, second = torch.randint(4, 200, (3, 1, 12))
        positions = torch.arange(12).repeat(2)[None]
        logits = [
            model(input_ids=torch.cat([ids, second], 1), position_ids=positions, use_cache=False).logits[0, -12:]
            for ids in (first, other)
        ]
    return float((logits[0] - logits[1]).abs().max())


def test_the_page_has_every_model_once_and_its_versions():
    assert sorted(PAGE) == sorted(CLASSES)
    text = models.PAGE.read_text(encoding="utf-8")
    assert all(version in text for library, version in models.VERSIONS.items() if library != "torch")


def test_a_models_own_layers_count_not_those_of_the_default_configuration():
    """LFM2 has no convolutions by default; the published models do, which need a kernel to keep documents apart."""
    config = AutoConfig.for_model("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"])
    config.architectures = [CLASSES["lfm2"]]
    chosen = {"model_name_or_path": "/none", "dataset_name": "x", "report_to": "none", "max_length": 32}
    settings = Recipe(**chosen, use_peft=True, packing=True).resolve()
    with pytest.raises(RecipeError, match="set packing=false"):
        rehearse_here(settings, config, config.vocab_size, [])


@pytest.mark.parametrize("kind", SAMPLE)
def test_the_page_says_what_the_rehearsal_says(kind):
    found = models.tried(kind)
    assert all("Traceback" not in line and "\n" not in line for line in found.values())
    cells = models.row(**found).split(" | ")
    assert (verdict(cells[1]), verdict(cells[2].removesuffix(" |"))) == tuple(map(verdict, PAGE[kind]))


@pytest.mark.parametrize("kind", APART)
def test_what_is_called_apart_does_not_leak(kind):
    """Without the rehearsal's own functions: the second document's logits do not change with the first."""
    config = AutoConfig.for_model(kind, **models.LAYERS.get(kind, {})).get_text_config()
    assert changed_by_another_document(shrink(config, 260), None, kind) < 1e-4


@pytest.mark.parametrize("kind", ["gpt_oss", "afmoe"])
def test_models_whose_masks_do_not_see_positions_leak(kind):
    """transformers' own classes: their masks are made without `position_ids`, so nothing parts a pack in eager."""
    assert changed_by_another_document(shrink(AutoConfig.for_model(kind), 260), "eager") > 0.1
    assert PAGE[kind][0] == "refused (documents see each other)"
