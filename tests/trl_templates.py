"""The chat templates that the installed TRL ships, each on Qwen3's real tokenizer with the tokens that it writes."""

import re
from importlib.resources import files

from real_tokenizers import load_tokenizer, missing
from transformers import PreTrainedTokenizerBase

SHELF = files("trl") / "chat_templates"
NAMES = sorted(
    path.name.removesuffix(".jinja")
    for path in SHELF.iterdir()
    if path.name.endswith(".jinja") and not path.name.endswith("_training.jinja")
)
WRITTEN = re.compile(
    r"<[|｜][^<>\n\s{}'\"]{1,40}[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>"
    r"|</s>|</?(?:start_of_turn|end_of_turn|end_of_utterance)>|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]"
)
# In the order in which an end of turn is looked for in a template
ENDS = (
    *("<|END_OF_TURN_TOKEN|>", "<|return|>", "<|im_end|>", "<|eot_id|>", "<turn|>", "<end_of_turn>"),
    *("<end_of_utterance>", "<｜end▁of▁sentence｜>", "</s>"),
)


def trl_tokenizer(name: str, *more: str) -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer with TRL's template `name`; its EOS is the template's end of turn, else `<|endoftext|>`."""
    template = (SHELF / f"{name}.jinja").read_text(encoding="utf-8")
    end = next((end for end in ENDS if end in template), "<|endoftext|>")
    written = {token.replace("\\", "") for token in WRITTEN.findall(template)}
    bos = ["<s>"] if "bos_token" in template else []
    tokenizer = load_tokenizer("qwen3", special=[*missing("qwen3", written), *bos, end, *more])
    tokenizer.chat_template, tokenizer.eos_token = template, end
    if bos:
        tokenizer.bos_token = "<s>"
    return tokenizer
