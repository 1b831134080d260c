"""Labels are made once, here: ids as the chat template's, masks exact, training equal to inference, text stays text."""

import json
import unicodedata
import warnings
from functools import partial

import numpy as np
import pytest
from helpers import FUZZ, assistant, load_tokenizer, system, user
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds_of_rows import TOOLS, calls, result
from strange_templates import stops
from trl_templates import NAMES, trl_tokenizer

from ma_sft import TemplateError, tokenize_conversation
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.labels.templates import TEMPLATES, set_chat_template
from ma_sft.labels.verify import Verifier

NFC = partial(unicodedata.normalize, "NFC")  # some tokenizers normalise what they read
SPECIAL = {
    **{"qwen3": "<|im_end|>", "llama2": "</s>", "llama3": "<|eot_id|>", "gemma3": "<end_of_turn>"},
    **{"deepseek_v3": "<｜User｜>", "gptoss": "<|end|>", "smollm2": "<|im_start|>"},
}
TURNS = [user("What is 2+2?"), assistant("It is 4."), user("谢谢 😀"), assistant("不客气！")]


def learned(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


@pytest.mark.parametrize("name", SPECIAL)
def test_many_texts_with_special_tokens_are_tokenised_as_each_alone(name):
    encoder = ChatEncoder(load_tokenizer(name))
    said = f" {SPECIAL[name]}</think>\n{SPECIAL[name]}"
    chats = [[user(f"{n}{said * (n % 3)}"), assistant(f"{said * (n % 2)} {n}")] for n in range(20)]
    for chat, (example,) in zip(chats, encoder.encode(chats), strict=True):
        ((alone,),) = encoder.encode([chat])
        assert (example.input_ids, example.labels) == (alone.input_ids, alone.labels)
        assert example.ids.dtype == alone.ids.dtype == np.int32


words = (
    'Hello|你好，世界|😀🎉| |\n|\n\n|x = 1\n|{"a": 1}|it\'s|  lead|trail  |1234|é|<b>|<|im_end|\t|the quick brown fox'
)
pieces = st.sampled_from(
    [*words.split("|"), "###Answer:", "|im_end|>", "<think>", "</think>", r"\x7f", r"\u007f", *SPECIAL.values()]
)
# SmolLM2's vocabulary lacks the bytes of some control characters (Cc) and of planes that hold no character yet;
# sentencepiece reads its own mark for a space as a space.
letters = st.characters(exclude_categories=("Cc", "Cs", "Cn", "Co"), exclude_characters="▁")
texts = st.lists(pieces | st.text(letters, max_size=8), max_size=5).map("".join)
# What an assistant writes between these two is reasoning, in whatever place the template wants it.
said = texts.map(lambda text: text.replace("<think>", "").replace("</think>", ""))


@st.composite
def conversations(draw, reasoning, tools):
    messages = [system(draw(texts) + "S")] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(texts)))
        if tools and draw(st.integers(0, 3)) == 0:
            arguments = json.dumps({"text": draw(texts)}, ensure_ascii=False)
            call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
            messages += [assistant("", tool_calls=[call]), {"role": "tool", "content": draw(texts)}]
        messages.append(assistant(draw(said)))
        if reasoning and draw(st.integers(0, 3)) == 0:
            messages[-1]["reasoning_content"] = draw(said) + "so"
    return messages


@pytest.mark.parametrize("name", SPECIAL)
def test_properties(name):
    """`make fuzz` runs this on 10,000 conversations of each tokenizer."""
    tokenizer = load_tokenizer(name)
    encoder = ChatEncoder(tokenizer)
    blank_encoder = ChatEncoder(tokenizer, history="mask")
    control_ids = set(encoder.control.values())

    @given(conversations(reasoning=name == "qwen3", tools=name == "qwen3"))
    def check(messages):
        (examples,) = encoder.encode([messages])
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        plain = not any(text in json.dumps(messages, ensure_ascii=False) for text in encoder.control)
        trained = {}
        for example in examples:
            ids, labels = example.input_ids, example.labels
            assert all(label in (-100, i) for label, i in zip(labels, ids, strict=True))
            in_turns = {at for turn in example.turns for at in range(turn.start, turn.end)}
            assert {at for at, label in enumerate(labels) if label != -100} == in_turns
            for turn in example.turns:
                if turn.trained:
                    trained[turn.message] = turn
                    assert ids[turn.end - 1] in control_ids
                    before = messages[: turn.message]
                    if plain:
                        prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
                        assert ids[: turn.start] == prompt
                    assert ids[: turn.start] == encoder.encode_prompt(before)
                    answer = tokenizer.decode(ids[turn.start : turn.end])
                    assert NFC(messages[turn.message]["content"].strip()) in NFC(answer)
                    if name == "qwen3":
                        assert NFC(messages[turn.message].get("reasoning_content", "").strip()) in NFC(answer)
        assert set(trained) == {i for i, m in enumerate(messages) if m["role"] == "assistant"}
        whole = examples[0].input_ids
        merged = any("merge" in turn.reason for turn in examples[0].turns) or not plain
        if not merged:
            same = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            last = examples[0].turns[-1]
            # Content that merges into the prompt's last token is cut where inference cuts it.
            cut = whole[: last.start] != same[: last.start] and NFC(tokenizer.decode(whole)) == NFC(rendered)
            assert whole == same or cut
        if name != "llama2":  # its decode puts spaces around every special token
            assert NFC(tokenizer.decode(whole)) == NFC(rendered)
        # Structure is what the template wrote: as many control ids as with content that holds none.
        ((expected,),) = blank_encoder.encode([[blank(m) for m in messages]])
        assert sum(i in control_ids for i in whole) == sum(i in control_ids for i in expected.input_ids)

    check()


TEXT = {"type": "object", "properties": {"text": {"type": "string", "description": "What."}}}
FIND = {"type": "function", "function": {"name": "find", "description": "Finds a text.", "parameters": TEXT}}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_properties_of_every_template(name):
    """What the encoder trains, the judge proves; what it does not train or refuses, it gives a reason for.

    `make fuzz` runs this on 500 conversations of each template.
    """
    tokenizer = trl_tokenizer(name)
    encoder, judge = ChatEncoder(tokenizer), Verifier(tokenizer, stops=stops(name, tokenizer))
    proven = 0

    @settings(max_examples=FUZZ // 20 or 60)
    @given(conversations(reasoning=True, tools=True))
    def check(messages):
        nonlocal proven
        tools = [FIND] if any("tool_calls" in message for message in messages) else None
        try:
            (examples,) = encoder.encode([messages], [tools])
        except TemplateError as error:
            assert str(error).startswith(("the chat template leaves out ", "the chat template refuses "))
            return
        trained = {turn.message for example in examples for turn in example.turns if turn.trained}
        reasons = {t.message: t.reason for e in examples for t in e.turns if t.message not in trained}
        assert all("template's generation prompt" in reason for reason in reasons.values())
        verdict = judge.verify(messages, [(e.input_ids, e.labels) for e in examples], tools=tools)
        assert verdict.errors == [] and verdict.unproven == []
        assert sorted(verdict.untrained) == sorted(reasons) and len(verdict.proven) == len(trained)
        proven += len(trained)

    check()
    assert proven > 9


def blank(message):
    message = {**message, "content": message["content"] and "x"}
    if "tool_calls" in message:
        call = {"type": "function", "function": {"name": "find", "arguments": '{"text": "x"}'}}
        message["tool_calls"] = [call]
    return message | ({"reasoning_content": "x"} if "reasoning_content" in message else {})


@pytest.mark.parametrize("name", ["qwen3", "llama3", "deepseek_v3", "smollm2"])
def test_a_conversation_that_ends_with_the_user_trains_the_turns_before(name):
    tokenizer = load_tokenizer(name)
    row = tokenize_conversation(TURNS[:3], tokenizer)
    assert row["input_ids"] == tokenizer.apply_chat_template(TURNS[:3], return_dict=False)
    assert "It is 4." in learned(tokenizer, row) and "谢谢" not in learned(tokenizer, row)


def test_consecutive_turns_of_one_role_are_kept_apart_where_the_template_allows_them():
    tokenizer, turns = load_tokenizer("smollm2"), [TURNS[0], TURNS[2], TURNS[1], TURNS[3]]
    row = tokenize_conversation(turns, tokenizer)
    assert learned(tokenizer, row) == "It is 4.<|im_end|>不客气！<|im_end|>"
    row = tokenize_conversation(turns, tokenizer, train_on="last")
    assert learned(tokenizer, row) == "不客气！<|im_end|>"


@pytest.mark.parametrize(
    ("name", "template", "messages", "warning", "learns"),
    [
        (  # Mistral's way: an answer has no header, and two of them run together
            *("llama2", "{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content + eos_token }}"),
            *(
                [TURNS[0], TURNS[1], TURNS[3]],
                "message 2 is not trained: the template opens no turn after an assistant's",
            ),
            "It is 4.</s>",
        ),
        (
            "qwen3",
            "{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' and 'open' not in m.content %}{{ eos_token }}"
            "{% endif %}\n{% if loop.last and add_generation_prompt %}assistant:{% endif %}",
            *([TURNS[0], assistant("left open")], "the template writes no end-of-turn token after this turn", ""),
        ),
    ],
)
def test_a_turn_that_the_template_does_not_open_or_end_is_not_trained(name, template, messages, warning, learns):
    tokenizer = load_tokenizer(name)
    with pytest.warns(UserWarning, match=warning):
        row = tokenize_conversation(messages, tokenizer, template="{% for m in messages %}" + template + "{% endfor %}")
    assert learned(tokenizer, row) == learns


def test_history_that_the_template_rewrites():
    tokenizer = load_tokenizer("qwen3")
    messages = [dict(m) for m in TURNS]
    messages[1]["reasoning_content"] = "Two and two."
    (split,) = ChatEncoder(tokenizer).encode([messages])
    assert len(split) == 2
    first = tokenizer.decode([i for i in split[1].labels if i != -100])
    assert first == "<think>\nTwo and two.\n</think>\n\nIt is 4.<|im_end|>"
    assert "Two and two." not in tokenizer.decode(split[0].input_ids)
    ((masked,),) = ChatEncoder(tokenizer, history="mask").encode([messages])
    assert [t.trained for t in masked.turns] == [False, True]
    assert masked.turns[0].reason == "the template rewrites this turn in history"
    with pytest.warns(UserWarning, match="message 1 is not trained: the template rewrites this turn in history"):
        tokenize_conversation(messages, tokenizer)


@pytest.mark.parametrize(
    ("answer", "trained"),
    [
        (assistant("<think>So.</think>Hello."), "So.\n</think>\n\nHello.<｜end▁of▁sentence｜>"),
        (assistant("So.\n</think>\n\nHello."), "So.\n</think>\n\nHello.<｜end▁of▁sentence｜>"),
        (assistant("end", reasoning_content="So."), "So.\n</think>\n\nend<｜end▁of▁sentence｜>"),
        (assistant("Hello.", reasoning_content=" \n"), ""),
        (assistant("<think>\n\n</think>\n\nHello."), ""),
        (assistant("<think>a</think>b<think>c</think>d"), ""),
    ],
)
def test_reasoning_in_all_forms_behind_a_prompt_that_opens_it(answer, trained):
    tokenizer = trl_tokenizer("deepseek_r1_distill")
    ((example,),) = ChatEncoder(tokenizer).encode([[TURNS[0], answer]])
    assert learned(tokenizer, {"labels": example.labels}) == trained
    assert trained or "opens <think> and this turn has no reasoning" in example.turns[0].reason


def test_reasoning_that_says_nothing_is_not_lost():
    tokenizer = load_tokenizer("smollm2")
    row = tokenize_conversation([TURNS[0], assistant("Hello.", reasoning_content=" \n")], tokenizer)
    assert row == tokenize_conversation([TURNS[0], assistant("Hello.")], tokenizer)


def test_reasoning_beside_another_in_the_text_is_not_lost():
    answer = assistant("<think>Inner.</think>Hello.", reasoning_content="Outer.")
    with pytest.raises(TemplateError, match="leaves out the reasoning of message 1"):
        ChatEncoder(trl_tokenizer("deepseek_r1_distill")).encode([[TURNS[0], answer]])


def test_special_text_in_a_template_that_writes_json_in_ascii():
    tokenizer = load_tokenizer("smollm2")
    content, escaped = "message['content']", "message['content'] | tojson(ensure_ascii=True)"
    assert content in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(content, escaped)
    row = tokenize_conversation([TURNS[0], assistant("é <|im_end|>")], tokenizer)
    assert learned(tokenizer, row) == '"\\u00e9 <|im_end|>"<|im_end|>'
    assert row["labels"].count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("qwen3", TURNS[:1], "no assistant turn"),
        ("qwen3", [], "no assistant turn"),
        ("qwen3", [{"content": "x"}], "message 0 has no 'role' or no 'content'"),
        ("qwen3", [TURNS[0], assistant(None)], "message 1 has no 'role' or no 'content'"),
        ("qwen3", [{"role": "narrator", "content": "Once"}, *TURNS], "the text 'Once' of message 0 (role 'narrator')"),
        ("gemma3", [TURNS[0], TURNS[0], TURNS[1]], "Conversation roles must alternate"),
        ("gemma3", [TURNS[0], calls(("add", "Rome"))], "leaves out the call 'add' of message 1"),
    ],
)
def test_refused_with_a_reason(name, messages, message):
    with pytest.raises(TemplateError) as error:
        tokenize_conversation(messages, load_tokenizer(name))
    assert message in str(error.value)


ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n### Response:\n"
    "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
)


def trained(tokenizer, messages, tools=None, **settings):
    """The text that each trained turn learns, by its message."""
    (examples,) = ChatEncoder(tokenizer, **settings).encode([messages], [tools])
    return {t.message: tokenizer.decode(e.input_ids[t.start : t.end]) for e in examples for t in e.turns if t.trained}


def test_add_eos_ends_the_turns_of_a_template_that_writes_no_end():
    tokenizer = load_tokenizer("qwen3")
    own, tokenizer.chat_template = tokenizer.chat_template, ALPACA
    assert trained(tokenizer, TURNS, add_eos=True) == {1: "It is 4.<|im_end|>", 3: "不客气！<|im_end|>"}
    with pytest.raises(TemplateError, match=r"never learn to stop.*set add_eos"):
        ChatEncoder(tokenizer)
    tokenizer.chat_template = own
    with pytest.raises(TemplateError, match=r"ends a turn by .* itself; remove the setting"):
        ChatEncoder(tokenizer, add_eos=True)


def test_a_template_that_ends_turns_only_where_a_message_follows():
    tokenizer = load_tokenizer("qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if not loop.last or m.role != 'assistant' %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert trained(tokenizer, TURNS) == {1: "It is 4.<|im_end|>", 3: "不客气！<|im_end|>"}


def test_an_answer_after_calls_with_reasoning_is_trained_as_it_is_asked_for():
    messages = [
        user("How warm is it in Rome, and what time in Oslo?"),
        calls(("weather", "Rome"), reasoning_content="Look Rome up."),
        result("20"),
        calls(("clock", "Oslo"), reasoning_content="And the time in Oslo."),
        result("noon", "clock"),
        assistant("20 degrees, noon."),
    ]
    said = trained(load_tokenizer("gptoss"), messages, TOOLS)
    assert said[5] == "<|channel|>final<|message|>20 degrees, noon.<|return|>"
    for k, thought in ((1, "Look Rome up."), (3, "And the time in Oslo.")):
        assert said[k].startswith(f"<|channel|>analysis<|message|>{thought}<|end|>") and said[k].endswith("<|call|>")


def test_an_argument_that_is_no_text_is_not_lost():
    tokenizer = load_tokenizer("qwen3")
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
        "<tool_call>{{ call.function.name }}{% for k, v in call.function.arguments.items() if v is string %}"
        " {{ k }}={{ v }}{% endfor %}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [user("How warm?"), calls(("weather", "Rome"))]
    assert trained(tokenizer, messages) == {1: "<tool_call>weather city=Rome</tool_call><|im_end|>"}
    messages[1]["tool_calls"][0]["function"]["arguments"]["days"] = 3
    for more, tools in (([], None), ([], TOOLS), ([result("20 degrees"), assistant("20.")], TOOLS)):
        with pytest.raises(TemplateError, match="leaves out the argument 'days' of 'weather' of message 1"):
            trained(tokenizer, [*messages, *more], tools)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", SPECIAL)
def test_named_templates(name, template):
    tokenizer = load_tokenizer(name, own=template == "chatml")
    added = set_chat_template(tokenizer, template)
    assert bool(added) == (template == "chatml" and name not in ("qwen3", "smollm2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = tokenize_conversation(TURNS, tokenizer)
    end = tokenizer.eos_token
    assert learned(tokenizer, row).replace(" ", "") == f"Itis4.{end}不客气！{end}"
    bos = tokenizer("")["input_ids"]
    assert row["input_ids"][: len(bos)] == bos or template == "chatml"


def test_plain_text_has_no_template(tokenizer):
    """A lone assistant turn is a text: trained whole, ended by EOS, and no text in it becomes a token of structure."""
    for text in ("It rained all night.", f"Say {tokenizer.eos_token} twice."):
        ((example,),) = ChatEncoder(tokenizer).encode([[{"role": "assistant", "content": text}]])
        start = tokenizer("")["input_ids"]
        assert example.input_ids[: len(start)] == start and example.labels[: len(start)] == [-100] * len(start)
        assert example.labels[len(start) :] == example.input_ids[len(start) :]
        assert example.input_ids.count(tokenizer.eos_token_id) == 1 and example.input_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(example.input_ids[len(start) : -1]).strip() == text


def test_turns_without_their_empty_reasoning_are_counted():
    assert ChatEncoder(load_tokenizer("qwen3")).tokenize_batch({"messages": [TURNS[:2] * 9]}, [0])["unthought"] == [8]
