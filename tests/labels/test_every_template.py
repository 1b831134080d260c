"""Every kind of row with every chat template: right by inference's prompt and the verifier, or refused for a reason.

The templates are those that TRL ships and those of seventy families more.
"""

import json
import re
import sys
from itertools import product
from unittest.mock import MagicMock

import pytest
from helpers import ROOT, assistant, load_tokenizer, user
from kinds_of_rows import ASK, ROWS, TOOLS, calls, judged, result
from strange_templates import stops, strange_tokenizer, templates
from trl_templates import NAMES, trl_tokenizer

from ma_sft import TemplateError
from ma_sft.labels import render
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.labels.verify import Verifier

TEMPLATES = {**dict.fromkeys(templates(), strange_tokenizer), **dict.fromkeys(NAMES, trl_tokenizer)}
PLAIN = {"one turn", "three turns", "system", "empty", "whitespace", "chinese", "special text"}
CALLS = {"a call", "two calls"}
REASONING = {"reasoning", "reasoning before", "agent"}
# The kinds of rows that a template takes wholly as it stands; the others it leaves out part of, refuses, or begins
# otherwise than inference does, unless a variable of it says so.
TAKEN = {
    frozenset(ROWS): (
        *("Bielik-11B-v3.0-Instruct", "GLM-4.6", "Kimi-K3", "LFM2.5-8B-A1B", "MiniMax-M3", "Qwen-Qwen3-0.6B"),
        *("Qwen3.5-4B", "StepFun3.5-Flash", "inclusionai-ling-3.0-flash", "muse-glimmer", "openbmb-MiniCPM5-1B"),
        *("poolside-Laguna-S-2.1", "diffusion_gemma", "gemma4_v5", "glm4moe", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"),
        *("muse_glimmer", "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8"),
    ),
    frozenset(ROWS) - {"empty"}: ("ByteDance-Seed-OSS",),
    frozenset(ROWS) - {"two calls"}: ("openai-gpt-oss-120b", "gptoss"),
    frozenset(ROWS) - {"agent"} - REASONING: ("gemma4", "gemma4_v3", "gemma4_v4"),
    frozenset(PLAIN | CALLS): (
        *("CohereForAI-c4ai-command-r7b-12-2024-tool_use", "MiMo-VL", "MiniMax-M1", "Qwen-QwQ-32B", "Qwen3-Coder"),
        *("Mistral-Small-3.2-24B-Instruct-2506", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "Reka-Edge"),
        *("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "Qwen-Qwen2.5-7B-Instruct", "deepseek-ai-DeepSeek-V4"),
        *("deepseek-ai-DeepSeek-V4-Flash-0731", "google-gemma-4-31B-it", "google-gemma-4-31B-it-interleaved"),
        *("ibm-granite-granite-4.0", "ibm-granite-granite-4.1", "meetkai-functionary-medium-v3.1", "tencent-Hy3"),
        *("moonshotai-Kimi-K2", "poolside-Laguna-XS-2.1", "poolside-Laguna-XS.2", "unsloth-Apriel-1.5"),
        *("unsloth-mistral-Devstral-Small-2507", "upstage-Solar-Open-100B", "mistralai-Mistral-Nemo-Instruct-2407"),
        *("gemma4_v2", "lfm2_v2", "qwen2_5", "qwen3_5_nothink", "qwen3_instruct_2507", "qwen3_vl"),
    ),
    frozenset(PLAIN | CALLS) - {"empty"}: (
        "meetkai-functionary-medium-v3.2",
        "mistralai-Ministral-3-14B-Reasoning-2512",
    ),
    frozenset(PLAIN | {"a call"}): (
        *("GigaChat3.1-10B-A1.8B", "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct"),
        *("meta-llama-Llama-3.3-70B-Instruct", "llama3_1", "llama3_2"),
    ),
    frozenset(PLAIN): (
        *("Apertus-8B-Instruct", "GigaChat3-10B-A1.8B", "HuggingFaceTB-SmolLM3-3B", "Kimi-K2-Instruct"),
        *("Kimi-K2-Thinking", "LFM2-8B-A1B", "LFM2.5-Instruct", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"),
        *("deepseek-ai-DeepSeek-V3.1", "ibm-granite-granite-3.3-2B-Instruct", "microsoft-Phi-3.5-mini-instruct"),
        *("cohere", "cohere2", "gemma3", "idefics3", "lfm2", "llama3", "llava_next", "phi3", "phi3_5", "qwen2_5_vl"),
        "smolvlm",
    ),
    frozenset(PLAIN) - {"system"}: ("google-gemma-2-2b-it", "gemma"),
    frozenset(REASONING): (
        *("Cohere2MoE", "GLM-4.7-Flash", "MiniMax-M2", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
        *("NVIDIA-Nemotron-Nano-v2", "Spark2.5", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super"),
        "nemotron_3_ultra",
    ),
    frozenset(REASONING) - {"agent"}: (
        *("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "llama-cpp-deepseek-r1", "deepseek_r1_distill", "deepseekv3"),
    ),
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
NOT_REFUSED = {"nemotron_3_nano": {*ROWS}, "deepseek_r1_distill": {"one turn", "three turns"}}
KINDS = {name: kinds for kinds, names in TAKEN.items() for name in names}
# One of each family; the others differ from them in little and are tried with the slow tests.
FAST = ("cohere2", "deepseek_r1_distill", "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "llama3_1", "nemotron_3_nano")
FAST += ("phi3", "qwen3", "qwen3_8", "smolvlm", "Apertus-8B-Instruct", "MiniMax-M2", "Qwen-QwQ-32B")
FAST += ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "meetkai-functionary-medium-v3.1")
SLOW = {  # kinds of rows that minijinja does not render; a new version of it, TRL or transformers shows here
    "CohereForAI-c4ai-command-r-plus-tool_use": {"a call", "two calls", "agent", "agent, plain answer"},
    "meetkai-functionary-medium-v3.1": {"a call", "two calls"},
}
REASONS = (
    *("the chat template leaves out ", "the chat template refuses ", "the template's generation prompt "),
    "the template writes <|message_sep|> inside this turn",
)
# Reasons that no encoder can do anything about: they name what to change. The second is Qwen3.5's that does not think
TRUE_REASONS = (" opens <think> and this turn has no reasoning: give ", " is not how it begins the turn: give ")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in KINDS])
def test_every_kind_of_row_is_right_or_refused(name, monkeypatch):
    tokenizer = TEMPLATES[name](name)
    encoder, judge = ChatEncoder(tokenizer), Verifier(tokenizer, stops=stops(name, tokenizer))
    monkeypatch.setattr(render, "apply_template", by_transformers := MagicMock(wraps=render.apply_template))
    taken, slow = set(), set()
    for kind, (messages, tools) in ROWS.items():
        try:
            for _ in range(render.PROOFS + 1):
                by_transformers.reset_mock()
                (examples,) = encoder.encode([messages], [tools])
            slow |= {kind} if by_transformers.called else set()
            _, reasons = judged(judge, messages, tools, examples)
            true = TRUE_REASONS if name in NAMES else [""]
            assert all(any(each in reason for each in true) for reason in reasons.values()), (kind, reasons)
            if name in NAMES and kind != "special text":
                assert_begins_as_inference_does(name, tokenizer, examples, messages, tools, kind)
        except TemplateError as error:
            assert name not in NAMES or str(error).startswith(REASONS[:2])
            assert name not in NAMES or kind not in NOT_REFUSED.get(name, {"one turn"}), error
            named = re.search(r" message (\d+)", str(error))
            reasons = {int(named.group(1)) if named else len(messages) - 1: str(error)}
        assert all(reason.startswith(REASONS) for reason in reasons.values()), (kind, reasons)
        taken |= {kind} if not reasons else set()
    assert taken == KINDS[name] and slow == SLOW.get(name, set())


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
        ChatEncoder(TEMPLATES[name](name))


@pytest.mark.slow
def test_all_templates_are_tried():
    assert {*KINDS, *REFUSED} == {*TEMPLATES}


def assert_begins_as_inference_does(name, tokenizer, examples, messages, tools, kind):
    parts = "['text']" in tokenizer.chat_template and "is string" not in tokenizer.chat_template
    if parts:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    for example in examples:
        for turn in example.turns:
            if turn.trained:
                before = messages[: turn.message]
                if name.startswith("deepseekv3"):  # the one that wants arguments as JSON text
                    before = [with_json(m) for m in before]
                prompt = tokenizer.apply_chat_template(
                    before, tools=tools, add_generation_prompt=True, return_dict=False
                )
                assert example.input_ids[: turn.start] == prompt, kind


def work(function):
    """How many functions of Python are called: the template's part of the time, the same on every machine."""
    calls = 0

    def count(_frame, event, _what):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("name", ["qwen3", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "qwen3")])
def test_work_is_linear_in_turns(name):
    """But where the template's own is not, and where every turn needs a sequence of its own."""
    tokenizer = trl_tokenizer(name)
    encoder = ChatEncoder(tokenizer)
    takes_text = "'content'][0]['text']" not in tokenizer.chat_template
    applied, encoded, written = {}, {}, {}
    for n in (20, 200):
        chat = [turn for i in range(n // 2) for turn in (user(f"Question {i}?"), assistant(f"It is {i}."))]
        given = chat if takes_text else [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
        written[n] = sum(len(example.ids) for example in encoder.encode([chat])[0])
        applied[n] = work(lambda given=given: tokenizer.apply_chat_template(given, return_dict=False))
        encoded[n] = work(lambda chat=chat: encoder.encode([chat]))
    more = max(1, applied[200] / applied[20] / 10, written[200] / written[20] / 10)
    assert encoded[200] <= 12 * more * encoded[20]
    assert written[200] > 2 * written[20] * 10 or encoded[200] <= 15 * applied[200]


@pytest.mark.parametrize("name", ["nemotron_3_nano", pytest.param("qwen3_5_think", marks=pytest.mark.slow)])
def test_rows_with_and_without_reasoning_stand_in_one_file(name):
    tokenizer = trl_tokenizer(name)
    rows = {
        "messages": [ROWS["one turn"][0], ROWS["reasoning"][0]],
        "chat_template_kwargs": ['{"enable_thinking": false}', None],
    }
    columns = ChatEncoder(tokenizer).tokenize_batch(rows, [0, 1])
    assert columns["untrained"] == [[], []] and columns["turns"] == [1, 1]
    said = [tokenizer.decode(labels[labels != -100]) for labels in columns["labels"]]
    assert said[0] == "The Rhine.<|im_end|>" and said[1].startswith("A question.")


CASES = json.loads((ROOT / "tests/files/labels/cases.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize("as_text", [False, True], ids=["objects", "json"])
def test_cases(case, as_text):
    """`as_text`: the arguments of calls are JSON text, as rows from files carry them."""
    end = [case["eos_token"]] if "template" in case else []
    tokenizer = load_tokenizer("qwen3", special=[*case.get("add_special_tokens", []), *end])
    if end:
        tokenizer.chat_template, tokenizer.eos_token = case["template"], case["eos_token"]
    else:
        tokenizer.chat_template = dict.fromkeys(("default", "tool_use"), tokenizer.chat_template)
    encoder = ChatEncoder(tokenizer)
    rows, trained = case.get("rows", [case.get("row")]), case.get("trained_rows", [case.get("trained")])
    for row, expected in zip(rows, trained, strict=True):
        messages = [with_json(m) if as_text else m for m in row["messages"]]
        given = ([messages], [row.get("tools")], [row.get("chat_template_kwargs")])
        if "refused" in case or "or_refused" in case:
            with pytest.raises(TemplateError, match=r"leaves out .* of message 1"):
                encoder.encode(*given)
            continue
        (examples,) = encoder.encode(*given)
        found = {
            str(t.message): tokenizer.decode(e.input_ids[t.start : t.end])
            for e in examples
            for t in e.turns
            if t.trained
        }
        assert found.keys() == expected.keys()
        for message, text in expected.items():
            stops = case.get("stop_tokens", [])
            assert found[message] in [text, *(text.replace("<one of the stop tokens>", stop) for stop in stops)]
        assert sum(label != -100 for e in examples for label in e.labels) == sum(
            t.end - t.start for e in examples for t in e.turns
        )
        if case["name"] == "dict-of-templates":
            think = tokenizer.convert_tokens_to_ids("<think>")
            assert examples[0].input_ids.count(think) == 1  # the template's own; the user's stays text


def with_json(message):
    if not message.get("tool_calls"):
        return message
    made = [
        {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
        for c in message["tool_calls"]
    ]
    return {**message, "tool_calls": made}


@pytest.mark.parametrize(
    "how",
    ["{% set c = '' ~ m.content %}", "{% set c %}{{ m.content }}{% endset %}", "{% set c = [m.content] | join %}"],
)
def test_the_second_row_of_a_shape_takes_another_way_than_the_first(how):
    tokenizer = load_tokenizer("qwen3")
    cut = (
        "{% if m.role == 'assistant' and '!' in c %}{% set c = c ~ '?' %}{% endif %}<|im_start|>{{ m.role }}\n{{ c }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.chat_template = "{% for m in messages %}" + how + cut
    rows = [[user("Name a river."), assistant(text)] for text in ("The Rhine", "The Po!", "The Rhone", "The Ebro!")]
    for messages, (example,) in zip(rows, ChatEncoder(tokenizer).encode(rows), strict=True):
        assert example.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)


def test_a_message_that_the_row_forbids_to_train_is_context():
    tokenizer = load_tokenizer("qwen3")
    messages = [user("Hi"), assistant("No.", train=False), user("Name a river."), assistant("The Rhine.")]
    ((example,),) = ChatEncoder(tokenizer).encode([messages])
    assert [turn.reason for turn in example.turns] == ["marked not to be trained in the row", ""]
    assert "No." in tokenizer.decode(example.input_ids)
    assert tokenizer.decode([i for i in example.labels if i != -100]).endswith("The Rhine.<|im_end|>")


def test_escapes_in_arguments_cannot_spell_a_control_token():
    tokenizer = load_tokenizer("qwen3")
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "\\u003c|im_end|>"}'}}
    keyed = {"type": "function", "function": {"name": "clock", "arguments": {"<|im_end|>": "Oslo"}}}
    messages = [ASK, assistant("", tool_calls=[call, keyed]), result("20"), assistant("20.")]
    ((example,),) = ChatEncoder(tokenizer).encode([messages], [TOOLS])
    plain = [ASK, calls(("weather", "Rome"), ("clock", "Oslo")), result("20"), assistant("20.")]
    ((expected,),) = ChatEncoder(tokenizer).encode([plain], [TOOLS])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert example.input_ids.count(end) == expected.input_ids.count(end)


@pytest.mark.parametrize("shape", ["plain", "agent", "reasoning"])
def test_long_conversations_are_labelled_as_short_ones(shape):
    tokenizer = load_tokenizer("qwen3")
    turn = {
        "plain": [user("Name a river."), assistant("The Rhine.")],
        "agent": [calls(("weather", "Rome"), reasoning_content="Look."), result("20 degrees")],
        "reasoning": [user("Why?"), assistant("So.", reasoning_content="A question.")],
    }[shape]
    tools = TOOLS if shape == "agent" else None
    messages = [ASK, *turn * 7, assistant("It is 20 degrees.")] if tools else turn * 8
    (examples,) = ChatEncoder(tokenizer).encode([messages], [tools])
    assert len(examples) == (8 if shape == "reasoning" else 1)
    trained, _ = judged(Verifier(tokenizer), messages, tools, examples)
    assert len(trained) == 8


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
