"""Chat templates of families that nobody here has tried, each on Qwen3's real tokenizer with the tokens it writes."""

import re
from functools import cache

from fetch_templates import fetch_templates
from real_tokenizers import load_tokenizer, missing
from transformers import PreTrainedTokenizerBase

# Tags that are text in the families that write them: parts of a system prompt, XML inside a call or a result
WRITTEN = re.compile(
    r"<[|｜][^<>\n\s{}'\"]{1,40}[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>|〈\|EOS\|〉|<SPECIAL_\d+>|</?seed:[a-z_]+>"
    r"|</?(?:start_of_turn|end_of_turn|beginning_of_sentence|end_of_sentence|begin_of_document|sep|role|mm:think)>"
    r"|</?(?:assistant|user|system)>|\[/?[A-Z_]{3,}\]|\](?:~!|~)b[\[\]]|\[e~\[|\]minimax\[|<end_of_utterance>|</s>"
)
# What ends a turn of each family, in the order in which it is looked for in a template
ENDS = (
    *("<|END_OF_TURN_TOKEN|>", "<|return|>", "<|im_end|>", "<|eot_id|>", "<turn|>", "<end_of_turn>"),
    *("<end_of_utterance>", "<sep>", "<｜end▁of▁sentence｜>", "<|assistant_end|>", "<|end_of_text|>", "<|end_of_msg|>"),
    *("<|message_sep|>", "<|role_end|>", "<end_of_sentence>", "[e~[", "<SPECIAL_12>", "<seed:eos>", "</assistant>"),
)
# Hunyuan's template puts its tokens together
HUNYUAN = [f"<｜hy_{name}:opensource｜>" for name in ("eos", "begin_of_sentence", "User", "Assistant")]
# Their generation_config names the role tokens at which they stop, beside the EOS token
ROLES = {**dict.fromkeys(("GLM", "glm4moe"), ("<|user|>", "<|observation|>"))}
ROLES |= {"upstage": ("<|calls|>",), "openai": ("<|call|>",)}


@cache
def templates() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(fetch_templates().glob("*.jinja"))}


def family_tokenizer(template: str, end: str | None, *more: str) -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer with a template, the tokens that it writes and `more`; its EOS is `end` or one of ENDS."""
    end = next((end for end in ENDS if end in template), end)
    written = {token.replace("\\", "") for token in WRITTEN.findall(template)}
    tokenizer = load_tokenizer("qwen3", special=[*missing("qwen3", written), "<s>", end, *more])
    tokenizer.chat_template, tokenizer.eos_token = template, end
    if "bos_token" in template:
        tokenizer.bos_token = "<s>"
    return tokenizer


def strange_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer with the template `name` and its tokens; its EOS is the family's end of turn."""
    template = templates()[name]
    if name.startswith("tencent"):
        return family_tokenizer(template, HUNYUAN[0], *HUNYUAN)
    return family_tokenizer(template, next((end for end in ("<|eot|>", "<|end|>") if end in template), "</s>"))


def stops(name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    named = next((tokens for family, tokens in ROLES.items() if name.startswith(family)), ())
    return [tokenizer.convert_tokens_to_ids(token) for token in named]
