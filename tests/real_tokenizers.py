"""Real tokenizers, each loaded once a process: pytest imports `conftest.py` twice, and this module once."""

import copy
import functools
import importlib.resources
from collections.abc import Iterable

from fetch_tokenizers import fetch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ma_sft.demo import demo_model

# The template that meta-llama/Llama-2-7b-chat-hf ships, which the tokenizer package leaves out.
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

TOKENIZERS = ("qwen3", "llama2", "llama3", "gemma3", "deepseek_v3", "gptoss", "smollm2")


@functools.cache
def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(demo_model() if name == "smollm2" else fetch(name))
    if name == "llama2":
        tokenizer.chat_template = LLAMA2_TEMPLATE
    if name == "gptoss":
        templates = importlib.resources.files("trl") / "chat_templates"
        tokenizer.chat_template = (templates / "gptoss.jinja").read_text(encoding="utf-8")
    _whole[name] = _parts(tokenizer)
    return tokenizer


def load_tokenizer(name: str, *, own: bool = False, special: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """One of TOKENIZERS with its real chat template; each call gives a copy that the test may change.

    All share one vocabulary, which takes a second to copy, and one for each set of `special` tokens that were not
    special; a test that adds other tokens asks for its `own`.
    """
    shared = _load_tokenizer(name)
    known = {token.content for token in shared.added_tokens_decoder.values() if token.special} if special else set()
    if new := tuple(sorted(set(special) - known)):
        shared = _with_special_tokens(name, new)
    copied = copy_without_vocabulary(shared)
    if own:
        copied._tokenizer = copy.deepcopy(shared._tokenizer)
    return copied


@functools.lru_cache(maxsize=8)
def _with_special_tokens(name: str, tokens: tuple[str, ...]) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(name, own=True)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def missing(name: str, tokens: Iterable[str]) -> list[str]:
    """Those that the vocabulary lacks."""
    return [token for token in tokens if _load_tokenizer(name)._tokenizer.token_to_id(token) is None]


def copy_without_vocabulary(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy with settings and templates of its own, that shares the vocabulary."""
    copied = object.__new__(type(tokenizer))
    aside = ("_vocab", "_merges", "_tokenizer")
    copied.__dict__ = {key: value if key in aside else copy.copy(value) for key, value in vars(tokenizer).items()}
    return copied


def _parts(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = tokenizer.backend_tokenizer
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
    return repr((backend.get_vocab_size(with_added_tokens=True), *parts))


_whole: dict[str, str] = {}  # what the shared vocabularies had when they were loaded


def changed() -> list[str]:
    """Names of the shared vocabularies that are not what was loaded; the next test gets new ones."""
    found = [name for name, parts in _whole.items() if parts != _parts(_load_tokenizer(name))]
    for name in found:
        del _whole[name]
    if found:
        _load_tokenizer.cache_clear()
    return found
