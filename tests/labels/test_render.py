"""What minijinja renders: conversations of steps that it was seen to render as transformers does."""

from itertools import product
from unittest.mock import MagicMock

from kinds_of_rows import TOOLS, assistant, calls, result, user
from trl_templates import trl_tokenizer

from ma_sft.labels import render
from ma_sft.labels.encoder import ChatEncoder


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
