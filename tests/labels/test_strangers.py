"""Chat templates of seventy families: every kind of row is right by the judge, or refused for a reason that holds."""

import json
import re

import pytest
from kinds_of_rows import ROWS, judged
from strange_templates import stops, strange_tokenizer, templates

from ma_sft import TemplateError
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.labels.verify import Verifier

PLAIN = {"one turn", "three turns", "system", "empty", "whitespace", "chinese", "special text"}
CALLS = {"a call", "two calls"}
REASONING = {"reasoning", "reasoning before", "agent"}
# The kinds of rows that a template takes wholly as it stands; the others it leaves out part of, refuses, or begins
# otherwise than inference does, unless a variable of it says so.
TAKEN = {
    frozenset(ROWS): (
        *("Bielik-11B-v3.0-Instruct", "GLM-4.6", "Kimi-K3", "LFM2.5-8B-A1B", "MiniMax-M3", "Qwen-Qwen3-0.6B"),
        *("Qwen3.5-4B", "StepFun3.5-Flash", "inclusionai-ling-3.0-flash", "muse-glimmer", "openbmb-MiniCPM5-1B"),
        "poolside-Laguna-S-2.1",
    ),
    frozenset(ROWS) - {"empty"}: ("ByteDance-Seed-OSS",),
    frozenset(ROWS) - {"two calls"}: ("openai-gpt-oss-120b",),
    frozenset(PLAIN | CALLS): (
        *("CohereForAI-c4ai-command-r7b-12-2024-tool_use", "MiMo-VL", "MiniMax-M1", "Qwen-QwQ-32B", "Qwen3-Coder"),
        *("Mistral-Small-3.2-24B-Instruct-2506", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "Reka-Edge"),
        *("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "Qwen-Qwen2.5-7B-Instruct", "deepseek-ai-DeepSeek-V4"),
        *("deepseek-ai-DeepSeek-V4-Flash-0731", "google-gemma-4-31B-it", "google-gemma-4-31B-it-interleaved"),
        *("ibm-granite-granite-4.0", "ibm-granite-granite-4.1", "meetkai-functionary-medium-v3.1", "tencent-Hy3"),
        *("moonshotai-Kimi-K2", "poolside-Laguna-XS-2.1", "poolside-Laguna-XS.2", "unsloth-Apriel-1.5"),
        *("unsloth-mistral-Devstral-Small-2507", "upstage-Solar-Open-100B", "mistralai-Mistral-Nemo-Instruct-2407"),
    ),
    frozenset(PLAIN | CALLS) - {"empty"}: (
        "meetkai-functionary-medium-v3.2",
        "mistralai-Ministral-3-14B-Reasoning-2512",
    ),
    frozenset(PLAIN | {"a call"}): (
        *("GigaChat3.1-10B-A1.8B", "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct"),
        "meta-llama-Llama-3.3-70B-Instruct",
    ),
    frozenset(PLAIN): (
        *("Apertus-8B-Instruct", "GigaChat3-10B-A1.8B", "HuggingFaceTB-SmolLM3-3B", "Kimi-K2-Instruct"),
        *("Kimi-K2-Thinking", "LFM2-8B-A1B", "LFM2.5-Instruct", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"),
        *("deepseek-ai-DeepSeek-V3.1", "ibm-granite-granite-3.3-2B-Instruct", "microsoft-Phi-3.5-mini-instruct"),
    ),
    frozenset(PLAIN) - {"system"}: ("google-gemma-2-2b-it",),
    frozenset(REASONING): (
        *("Cohere2MoE", "GLM-4.7-Flash", "MiniMax-M2", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
        *("NVIDIA-Nemotron-Nano-v2", "Spark2.5"),
    ),
    frozenset(REASONING) - {"agent"}: ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "llama-cpp-deepseek-r1"),
    # Command R+ puts an instruction before the prompt and behind the conversation, Apriel 1.6 opens its reasoning with
    # words that a turn does not have, DeepSeek-V3.2 of llama.cpp closes a reasoning that only its prompt opens.
    frozenset(): (
        *("Apriel-1.6-15b-Thinker-fixed", "CohereForAI-c4ai-command-r-plus-tool_use", "deepseek-ai-DeepSeek-V3.2"),
    ),
}
REFUSED = {
    "fireworks-ai-llama-3-firefunction-v2": "'functions' is undefined",
    "llama-cpp-rwkv-world": "writes no end-of-turn token",
}
NAMES = {name: kinds for kinds, names in TAKEN.items() for name in names}
FAST = ("Apertus-8B-Instruct", "MiniMax-M2", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "Qwen-QwQ-32B")
REASONS = (
    *("the chat template leaves out ", "the chat template refuses ", "the template's generation prompt "),
    "the template writes <|message_sep|> inside this turn",
)
ADVICE = re.compile(r"set (\w+)=(\S+) in template_kwargs, or in the row's chat_template_kwargs")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_every_kind_of_row_is_right_or_refused(name):
    tokenizer = strange_tokenizer(name)
    encoder, judge = ChatEncoder(tokenizer), Verifier(tokenizer, stops=stops(name, tokenizer))
    taken = set()
    for kind, (messages, tools) in ROWS.items():
        try:
            (examples,) = encoder.encode([messages], [tools])
            _, reasons = judged(judge, messages, tools, examples)
        except TemplateError as error:
            named = re.search(r" message (\d+)", str(error))
            reasons = {int(named.group(1)) if named else len(messages) - 1: str(error)}
        assert all(reason.startswith(REASONS) for reason in reasons.values()), (kind, reasons)
        taken |= {kind} if not reasons else set()
        for k, reason in reasons.items():
            if advice := ADVICE.search(reason):
                kwargs = {advice.group(1): json.loads(advice.group(2))}
                (examples,) = encoder.encode([messages[: k + 1]], [tools], [kwargs])
                trained, _ = judged(judge, messages[: k + 1], tools, examples, kwargs)
                assert k in trained, (kind, reason)
    assert taken == NAMES[name]


def test_two_turns_in_a_row_are_right():
    tokenizer = strange_tokenizer("muse-glimmer")
    messages = [*ROWS["one turn"][0], {"role": "assistant", "content": "Or the Po."}, *ROWS["three turns"][0]]
    (examples,) = ChatEncoder(tokenizer).encode([messages])
    trained, _ = judged(Verifier(tokenizer), messages, None, examples)
    assert len(trained) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_train_is_refused_in_one_line(name):
    with pytest.raises(TemplateError, match=REFUSED[name]):
        ChatEncoder(strange_tokenizer(name))


@pytest.mark.slow
def test_all_templates_are_tried():
    assert {*NAMES, *REFUSED} == {*templates()}
