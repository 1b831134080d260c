"""The chat templates that the installed TRL ships, each on Qwen3's real tokenizer with the tokens that it writes."""

from importlib.resources import files

from strange_templates import family_tokenizer
from transformers import PreTrainedTokenizerBase

SHELF = files("trl") / "chat_templates"
NAMES = sorted(
    path.name.removesuffix(".jinja")
    for path in SHELF.iterdir()
    if path.name.endswith(".jinja") and not path.name.endswith("_training.jinja")
)


def trl_tokenizer(name: str, *more: str) -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer with TRL's template `name`; its EOS is the template's end of turn, else `<|endoftext|>`."""
    template = (SHELF / f"{name}.jinja").read_text(encoding="utf-8")
    end = "</s>" if "</s>" in template else "<|endoftext|>"
    return family_tokenizer(template, end, *more)
