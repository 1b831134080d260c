"""Which shapes of conversations minijinja renders, of every template of TRL and of seventy families: all but these."""

from contextlib import suppress
from itertools import product
from unittest.mock import MagicMock

import pytest
from kinds_of_rows import ROWS, TOOLS, assistant, calls, result, user
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


def test_a_conversation_of_known_steps_is_rendered_fast(monkeypatch):
    """Conversations of many calls are each a shape of their own; a loop goes by neighbours, which few differ in."""
    encoder = ChatEncoder(trl_tokenizer("qwen3"))
    by_transformers = MagicMock(wraps=render.apply_template)
    monkeypatch.setattr(render, "apply_template", by_transformers)

    def conversation(*kinds):
        steps = {"text": [calls(("clock", {"place": "Rome"})), result("noon", "clock")]}
        steps["number"] = [calls(("clock", {"zone": 2})), result("one", "clock")]
        return [user("When?"), *(message for kind in kinds for message in steps[kind]), assistant("Now.")]

    some = [conversation(*kinds) for n in (1, 2, 3) for kinds in product(("text", "number"), repeat=n)]
    encoder.encode(some, [TOOLS] * len(some))
    by_transformers.reset_mock()
    encoder.encode([conversation(*["text", "number", "number", "text"] * 3)], [TOOLS])
    assert not by_transformers.called
