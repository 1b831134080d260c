"""Which shapes of conversations minijinja renders, of every template of TRL and of seventy families: all but these."""

from contextlib import suppress
from unittest.mock import MagicMock

import pytest
from kinds_of_rows import ROWS
from strange_templates import strange_tokenizer, templates
from trl_templates import NAMES, trl_tokenizer

from ma_sft.errors import TemplateError
from ma_sft.labels import render
from ma_sft.labels.encoder import ChatEncoder

TOKENIZERS = {**dict.fromkeys(NAMES, trl_tokenizer), **dict.fromkeys(templates(), strange_tokenizer)}
SLOW = {  # kinds of rows that transformers renders
    "CohereForAI-c4ai-command-r-plus-tool_use": {"a call", "two calls", "agent", "agent, plain answer"},
    "meetkai-functionary-medium-v3.1": {"a call", "two calls"},
}
QUICK = ("gptoss", "glm4moe", "nemotron_3_nano", "qwen3_8", "meetkai-functionary-medium-v3.1", "MiniMax-M3")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TOKENIZERS])
def test_shapes_that_are_rendered_fast(name, monkeypatch):
    """A new version of minijinja, TRL or transformers shows here what it changed."""
    try:
        encoder = ChatEncoder(TOKENIZERS[name](name))
    except TemplateError:
        return
    slow, by_transformers = set(), MagicMock(wraps=render.apply_template)
    monkeypatch.setattr(render, "apply_template", by_transformers)
    for kind, (messages, tools) in ROWS.items():
        with suppress(TemplateError):
            for _ in range(render.PROOFS + 1):
                by_transformers.reset_mock()
                encoder.encode([messages], [tools])
            slow |= {kind} if by_transformers.called else set()
    assert slow == SLOW.get(name, set())
