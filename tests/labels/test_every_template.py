"""Every kind of row with every chat template that TRL ships: right by inference's prompt and the judge, or refused."""

import json
import sys

import pytest
from helpers import ROOT, assistant, load_tokenizer, user
from kinds_of_rows import ASK, ROWS, TOOLS, calls, judged, result
from trl_templates import NAMES, trl_tokenizer

from ma_sft import TemplateError
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.labels.verify import Verifier

# One of each family; the others differ from them in little and are tried with the slow tests.
FAST = ("cohere2", "deepseek_r1_distill", "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "llama3_1", "nemotron_3_nano")
FAST += ("phi3", "qwen3", "qwen3_8", "smolvlm")
# What a template is known to take; a refusal of it is a fault of ours. Everybody takes one turn.
PLAIN = {"one turn", "three turns", "system", "empty", "whitespace", "chinese", "special text"}
TAKEN = {
    **{name: {*ROWS} for name in ("glm4moe", "qwen3", "qwen3_8", "lfm2_2_5", "gemma4_v5", "nemotron_3_nano")},
    **{name: PLAIN for name in ("cohere2", "phi3", "smolvlm")},
    "gptoss": {"one turn", "three turns", "system", "a call", "reasoning", "reasoning before", "agent"},
    "llama3_1": PLAIN | {"a call"},
    "deepseek_r1_distill": {"one turn", "three turns", "reasoning", "reasoning before"},
}
# Reasons that no encoder can do anything about: they name what to change.
TRUE_REASONS = (" opens <think> and this turn has no reasoning: set ", "give the turn reasoning_content")
TRUE_REASONS += (" is not how it begins the turn: set enable_thinking=true ",)  # Qwen3.5 that does not think


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_every_kind_of_row_is_right_or_refused(name):
    tokenizer = trl_tokenizer(name)
    # GLM's generation_config names the role tokens at which it stops; this tokenizer has none beside it.
    roles = [token for token in ("<|user|>", "<|observation|>") if name == "glm4moe"]
    encoder, judge = ChatEncoder(tokenizer), Verifier(tokenizer, stops=tokenizer.convert_tokens_to_ids(roles))
    for kind, (messages, tools) in ROWS.items():
        try:
            (examples,) = encoder.encode([messages], [tools])
        except TemplateError as error:
            assert kind not in TAKEN.get(name, {"one turn"}), f"{kind}: {error}"
            assert str(error).startswith(("the chat template leaves out ", "the chat template refuses "))
            continue
        _, reasons = judged(judge, messages, tools, examples)
        assert all(any(true in reason for true in TRUE_REASONS) for reason in reasons.values()), (kind, reasons)
        if kind != "special text":
            assert_begins_as_inference_does(name, tokenizer, examples, messages, tools, kind)


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
