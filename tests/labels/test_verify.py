"""The judge by itself: what it takes for right, what it accuses, what it says it cannot judge."""

import json

import pytest
from datasets import Dataset
from helpers import load_tokenizer
from jinja2 import UndefinedError
from trl_templates import NAMES, SHELF, trl_tokenizer

from ma_sft.labels.check import check_dataset
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.labels.verify import Verifier, runs


def labelled(tokenizer, pieces):
    """Ids and labels of texts, of which those in a tuple are trained."""
    ids, labels = [], []
    for piece in pieces:
        text = piece[0] if isinstance(piece, tuple) else piece
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += new
        labels += new if isinstance(piece, tuple) else [-100] * len(new)
    return ids, labels


def as_rendered(tokenizer, messages):
    """Ids and labels of a question and an answer as the template writes them, whatever it leaves out."""
    prompt, whole = (
        tokenizer.apply_chat_template(messages[:n], add_generation_prompt=n == 1, return_dict=True)["input_ids"]
        for n in (1, 2)
    )
    trained = whole[: len(whole) - whole[::-1].index(tokenizer.eos_token_id)]
    return trained, [-100] * len(prompt) + trained[len(prompt) :]


def call(name, arguments):
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def qwen(template, end="<|im_end|>", special=()):
    tokenizer = load_tokenizer("qwen3", own=bool(special))
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.eos_token = end
    tokenizer.chat_template = template
    return tokenizer


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<call>{{ {'name': c.function.name, 'parameters': c.function.arguments} | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [call("w", {"city": "Paris"})]},
]


@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_are_values_and_never_text_inside_text(as_text):
    tokenizer = qwen(CALLS)
    messages = [
        ASKED[0],
        {**ASKED[1], "tool_calls": [call("w", '{"city": "Paris"}' if as_text else {"city": "Paris"})]},
    ]
    start = "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n"
    right = labelled(tokenizer, [start, ('<call>{"name": "w", "parameters": {"city": "Paris"}}</call><|im_end|>',)])
    assert Verifier(tokenizer).verify(messages, [right]).errors == []
    inner = '<call>{"name": "w", "parameters": "{\\"city\\": \\"Paris\\"}"}</call><|im_end|>'
    ((code, what),) = Verifier(tokenizer).verify(messages, [labelled(tokenizer, [start, (inner,)])]).errors
    assert code == "unlike the template" and "message 1" in what


@pytest.mark.parametrize("steps", [1, 8])
def test_a_conversation_may_end_with_the_result_of_a_call(steps):
    """Each call is trained; what stands behind the last turn cannot change a label."""
    tokenizer = load_tokenizer("qwen3")
    pairs = [(ASKED[1], {"role": "tool", "content": f"{n} degrees"}) for n in range(steps)]
    messages = [ASKED[0], *(message for pair in pairs for message in pair)]
    ((example,),) = ChatEncoder(tokenizer).encode([messages])
    verdict = Verifier(tokenizer).verify(messages, [(example.input_ids, example.labels)])
    assert (verdict.errors, verdict.unproven, len(verdict.proven)) == ([], [], steps)


def test_reasoning_in_the_text_goes_on_with_an_opened_prompt():
    """Spark closes an empty reasoning before a text, which here has one of its own; its prompt opens one."""
    tokenizer = qwen(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}</think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    messages = [ASKED[0], {"role": "assistant", "content": "<think>\nSunny?\n</think>\n\nSunny."}]
    ((example,),) = ChatEncoder(tokenizer).encode([messages])
    verdict = Verifier(tokenizer).verify(messages, [(example.input_ids, example.labels)])
    assert (verdict.errors, verdict.unproven, len(verdict.proven)) == ([], [], 1)


FIRST_CALL = CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
NO_TEXT = CALLS.replace("{{ m.content or '' }}", "{{ '' if m.tool_calls else m.content }}")


@pytest.mark.parametrize(
    ("template", "message", "what"),
    [
        (FIRST_CALL, {"tool_calls": [call("w", {}), call("t", {})]}, "call 't'"),
        (NO_TEXT, {"content": "Let me look"}, "look"),
        (CALLS, {"reasoning_content": "because"}, "reasoning"),
    ],
)
def test_what_the_template_loses_is_named(template, message, what):
    tokenizer = qwen(template)
    messages = [ASKED[0], {**ASKED[1], **message}]
    faults = Verifier(tokenizer).verify(messages, [as_rendered(tokenizer, messages)]).errors
    assert {code for code, _ in faults} == {"lost content"} and any(what in each for _, each in faults)


def test_what_is_lost_is_named_for_each_row_of_a_shape():
    tokenizer = qwen(FIRST_CALL.replace("c.function.arguments", "c.function.name"))
    verifier = Verifier(tokenizer)
    for first, second, key in (("w", "t", "days"), ("f", "f", "days"), ("g", "h", "hours")):
        calls = [call(first, {key: 2}), call(second, {})]
        messages = [ASKED[0], {**ASKED[1], "tool_calls": calls}]
        what = {what for _, what in verifier.verify(messages, [as_rendered(tokenizer, messages)]).errors}
        assert what == {
            f"message 1: the template does not write {each}"
            for each in (f"the argument {key!r} of {first!r}", f"the arguments of {first!r}", f"the call {second!r}")
        } | {f"message 1: the template does not write the arguments of {second!r}"}


def test_a_turn_ends_where_generation_stops_and_not_at_the_first_control_token():
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' %}<|end_of_response|>"
        "{% endif %}<|end_of_turn|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    tokenizer = qwen(template, "<|end_of_turn|>", ["<|start|>", "<|end_of_response|>", "<|end_of_turn|>"])
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    start = "<|start|>user\nHi<|end_of_turn|><|start|>assistant\n"
    right = labelled(tokenizer, [start, ("Hello!<|end_of_response|><|end_of_turn|>",)])
    short = labelled(tokenizer, [start, ("Hello!<|end_of_response|>",), "<|end_of_turn|>"])
    assert Verifier(tokenizer).verify(messages, [right]).errors == []
    assert [code for code, _ in Verifier(tokenizer).verify(messages, [short]).errors] == ["missing end token"]


def test_a_tokenizer_without_a_name_has_no_folder_even_where_one_lies_around(tmp_path, monkeypatch):
    tokenizer = load_tokenizer("qwen3")
    tokenizer.name_or_path = ""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7]}')
    monkeypatch.chdir(tmp_path)
    assert Verifier(tokenizer).stops == {tokenizer.eos_token_id}
    tokenizer.name_or_path = str(tmp_path)
    assert Verifier(tokenizer).stops == {tokenizer.eos_token_id, 7}


GLM = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|observation|>\n{% else %}<|{{ m.role }}|>\n{% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize(("last", "right"), [("<|user|>", True), ("<|endoftext|>", True), ("<|observation|>", False)])
def test_the_token_of_the_next_message_is_where_generation_stops(last, right):
    tokenizer = qwen(GLM, "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|observation|>", "<|system|>"])
    arguments = {"city": "Rome"}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call("w", arguments)]},
        {"role": "tool", "tool_call_id": "c1", "content": "20"},
        {"role": "assistant", "content": "20."},
    ]
    written = f"<call>{json.dumps({'name': 'w', 'arguments': arguments})}</call><|observation|>"
    sequence = labelled(
        tokenizer, ["<|user|>\nWeather?<|assistant|>\n", (written,), "\n20<|assistant|>\n", (f"20.{last}",)]
    )
    verdict = Verifier(tokenizer).verify(messages, [sequence])
    assert (verdict.errors == []) is right and len(verdict.proven) == 1 + right


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and m.reasoning_content %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% elif m.role == 'assistant' and enable_thinking is defined and not "
    "enable_thinking %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)


def test_a_rows_own_template_variables_decide_its_prompt():
    tokenizer = qwen(THINKS)
    judge = Verifier(tokenizer)
    start = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n"
    thinking = [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": "because", "content": "a"}]
    plain = [thinking[0], {"role": "assistant", "content": "a"}]
    assert judge.verify(thinking, [labelled(tokenizer, [start, ("because\n</think>\n\na<|im_end|>",)])]).errors == []
    bare = labelled(tokenizer, [f"{start}\n</think>\n\n", ("a<|im_end|>",)])
    assert judge.verify(plain, [bare], kwargs={"enable_thinking": False}).errors == []
    assert judge.verify(plain, [bare]).errors  # without the variable inference opens a reasoning
    assert judge.verify(plain, [labelled(tokenizer, [start, ("a<|im_end|>",)])]).unproven


def test_text_that_spells_a_control_token_stays_text():
    tokenizer = load_tokenizer("qwen3")
    messages = [{"role": "user", "content": "Is <|im_end|> a word?"}, {"role": "assistant", "content": "Yes."}]
    question = tokenizer(messages[0]["content"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    start, target = "<|im_start|>user\n", ("<think>\n\n</think>\n\nYes.<|im_end|>",)
    end = labelled(tokenizer, ["<|im_end|>\n<|im_start|>assistant\n", target])
    before = tokenizer(start, add_special_tokens=False)["input_ids"]
    right = ([*before, *question, *end[0]], [-100] * (len(before) + len(question)) + end[1])
    assert Verifier(tokenizer).verify(messages, [right]).errors == []
    real = labelled(tokenizer, [start + messages[0]["content"], "<|im_end|>\n<|im_start|>assistant\n", target])
    assert [code for code, _ in Verifier(tokenizer).verify(messages, [real]).errors] == ["unlike inference"]


def test_what_must_not_be_trained_is_not():
    tokenizer = load_tokenizer("smollm2")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    begin = len(tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"])
    end = len(ids) - 1
    verdict = Verifier(tokenizer).verify(messages, [(ids, [-100] * begin + ids[begin:end] + [-100])])
    assert [code for code, _ in verdict.errors] == ["trained against the row"]
    assert Verifier(tokenizer).verify(messages, [(ids, [-100] * len(ids))]).errors == []


def test_what_a_template_refuses_is_not_proven():
    tokenizer = load_tokenizer("llama2")
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    rows = Dataset.from_dict({"input_ids": [[1, 5, 2]], "labels": [[-100, 5, 2]]})
    report = check_dataset(rows, tokenizer, conversations=Dataset.from_dict({"messages": [twice]}))
    assert report.errors == [] and "must alternate" in report.verdict
    assert "not proven" in report.verdict and json.loads(report.to_json())["proven"] is False


TWINS = [name for name in NAMES if (SHELF / f"{name}_training.jinja").is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_what_is_proven_ends_where_the_training_twins_generation_marks_end(name):
    tokenizer = trl_tokenizer(name)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    if tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True).strip().endswith("<think>"):
        chat[1]["reasoning_content"] = "Greet back."  # whoever is made to think has to
    ((example,),) = ChatEncoder(tokenizer).encode([chat])
    verdict = Verifier(tokenizer).verify(chat, [(example.input_ids, example.labels)])
    ((_, begin, end),) = verdict.proven
    assert verdict.errors == []
    twin = (SHELF / f"{name}_training.jinja").read_text(encoding="utf-8")
    how = {"chat_template": twin, "return_dict": True, "return_assistant_tokens_mask": True}
    try:
        marked = tokenizer.apply_chat_template(chat, **how)
    except UndefinedError:  # it takes parts alone
        parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
        marked = tokenizer.apply_chat_template(parts, **how)
    at = [n for n, mark in enumerate(marked["assistant_masks"]) if mark]
    if example.input_ids[:end] == marked["input_ids"][:end] and at:
        beyond = [*range(begin, end), *at][-1] + 1
        edge = marked["input_ids"][min(end, beyond) : max(end, beyond)]
        assert not tokenizer.decode([i for i in edge if i != tokenizer.eos_token_id]).strip()


def test_most_templates_of_trl_have_a_training_twin():
    assert len(TWINS) > 25 and {"glm4moe", "gptoss", "cohere2", "nemotron_3_nano"} <= {*TWINS}


def test_a_long_conversation_is_verified_to_its_last_turn():
    tokenizer = load_tokenizer("smollm2")
    chat = [{"role": ("user", "assistant")[n % 2], "content": f"message number {n}"} for n in range(80)]
    ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    opening = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    end, size = tokenizer.eos_token_id, len(opening)
    begins = [n + size for n in range(len(ids)) if ids[n : n + size] == opening]
    labels = [-100] * len(ids)
    for begin in begins:
        stop = ids.index(end, begin) + 1
        labels[begin:stop] = ids[begin:stop]
    judge = Verifier(tokenizer)
    verdict = judge.verify(chat, [(ids, labels)])
    assert verdict.errors == [] and len(verdict.proven) == 40
    for turn in range(40):  # what another turn says is wrong wherever it stands
        at = begins[turn]
        said = ids[begins[turn - 1] : ids.index(end, begins[turn - 1])]
        stop = ids.index(end, at)
        wrong = [*ids[:at], *said, *ids[stop:]]
        assert judge.verify(chat, [(wrong, [*labels[:at], *said, *labels[stop:]])]).errors, turn


def test_ids_of_texts_that_share_their_beginnings_are_the_tokenizers_own(tokenizer):
    """They are put together from what stands between control tokens, where that gives what the tokenizer gives."""
    verifier = Verifier(tokenizer)
    first, second = list(verifier.controls)[:2]
    whole = f" a {first}\nuser\n 你好 \n{second}  x{first}{second}end{first}"
    texts = [whole[:at] for at in range(len(whole) + 1)] + [f"{first}b {second}\nuser\n 你好 \n{first}"]
    own = [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    assert verifier.ids(texts) == own


def chat(turns, answer="Answer {}.", **more):
    """A conversation of so many answers; `more` is what the middle one has beside its text."""
    pairs = [(f"Question {n}?", answer.format(n)) for n in range(turns)]
    messages = [m for q, a in pairs for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    messages[turns // 2 * 2 + 1] |= more
    return messages


def encoded(tokenizer, messages, **settings):
    (examples,) = ChatEncoder(tokenizer, **settings).encode([messages])
    return [(example.input_ids, example.labels) for example in examples]


def own_sequences(sequences):
    """A sequence for each trained turn, which ends there."""
    return [(ids[:end], [-100] * begin + ids[begin:end]) for ids, labels in sequences for begin, end in runs(labels)]


def changed_history(ids, labels, change):
    middle = next(runs(labels))[0] // 2
    if change == "cut out":
        return ids[: middle - 4] + ids[middle + 4 :], labels[: middle - 4] + labels[middle + 4 :]
    at = next(at for at in range(middle, len(ids)) if ids[at] != ids[at + 1])
    return [*ids[:at], ids[at + 1], ids[at], *ids[at + 2 :]], labels


@pytest.mark.parametrize(("name", "turns"), [("smollm2", 40), ("gemma4", 18)])
def test_the_history_of_each_of_many_turns_is_compared(name, turns):
    tokenizer = trl_tokenizer(name) if name in NAMES else load_tokenizer(name)
    messages = chat(turns)
    right = own_sequences(encoded(tokenizer, messages))
    wrong = [changed_history(*sequence, change) for change in ("cut out", "a token swapped") for sequence in right]
    of_right, of_wrong = Verifier(tokenizer).verify_batch([(messages, s, None, None) for s in (right, wrong)])
    assert (len(of_right.proven), of_right.errors, of_right.unproven) == (turns, [], [])
    unlike = [what for code, what in of_wrong.errors if code == "unlike inference"]
    assert of_wrong.proven == [] and len(unlike) == 2 * turns


def test_equal_answers_are_told_apart_by_what_stands_before_them():
    tokenizer = load_tokenizer("smollm2")
    messages = chat(40, "Yes.", train=False)
    sequences = encoded(tokenizer, messages)
    verdict = Verifier(tokenizer).verify(messages, sequences)
    assert (len(verdict.proven), verdict.errors, verdict.unproven, verdict.untrained) == (39, [], [], [])
    everyone = own_sequences(encoded(tokenizer, chat(40, "Yes.")))
    verdict = Verifier(tokenizer).verify(messages, everyone[1:])  # the forbidden turn for one that is wanted
    assert [code for code, _ in verdict.errors] == ["trained against the row"] and verdict.untrained == [1]


ARGUMENTS = CALLS.replace(
    "{{ {'name': c.function.name, 'parameters': c.function.arguments} | tojson }}",
    "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<{{ k }}>WRITE</{{ k }}>{% endfor %}",
)


@pytest.mark.parametrize("value", [None, [], {}])
@pytest.mark.parametrize(("skipped", "lost"), [(" if v", True), ("", False)])
def test_an_empty_value_that_is_left_out_is_named(value, skipped, lost):
    tokenizer = qwen(ARGUMENTS.replace("items() %}", f"items(){skipped} %}}").replace("WRITE", "{{ v or '' }}"))
    messages = [ASKED[0], {**ASKED[1], "tool_calls": [call("w", {"city": "Paris", "days": value})]}]
    verdict = Verifier(tokenizer).verify(messages, [as_rendered(tokenizer, messages)])
    assert [code for code, _ in verdict.errors] == ["lost content"] * lost and len(verdict.proven) == 1


@pytest.mark.parametrize(
    ("writes", "value", "lost"),
    [
        ("{% if v is string %}{{ v }}{% endif %}", 2, True),
        ("{% if v is string %}{{ v }}{% endif %}", True, True),
        ("{{ v or '' }}", False, True),
        ("{{ v or '' }}", 0, True),
        ("{{ v or '' }}", 2, False),
        ("{{ v if v is string else v | tojson }}", False, False),
        ("{{ v.near or '' if v is mapping else v }}", {"near": 0}, True),
        ("{{ v | tojson }}", {"near": [0, False]}, False),
        ("{{ v | tojson if v is string else v + 1 }}", 2, False),
        ("{{ v }}", {"near": {"by": "Oslo"}}, False),  # as Python shows it, which is how Seed-OSS writes it
        ("{{ v or '' }}", [], False),
    ],
)
def test_a_value_that_is_no_text_and_is_not_written_is_named(writes, value, lost):
    tokenizer = qwen(ARGUMENTS.replace("WRITE", writes))
    messages = [ASKED[0], {**ASKED[1], "tool_calls": [call("w", {"city": "Paris", "days": value})]}]
    verdict = Verifier(tokenizer).verify(messages, [as_rendered(tokenizer, messages)])
    assert {code for code, _ in verdict.errors} == ({"lost content"} if lost else set())
    assert all("days" in what for _, what in verdict.errors)


def test_the_last_turn_has_the_empty_reasoning_that_inference_writes():
    tokenizer = load_tokenizer("qwen3")
    messages = chat(2)
    start = "<|im_start|>user\nQuestion 0?<|im_end|>\n<|im_start|>assistant\n"
    more = "<|im_end|>\n<|im_start|>user\nQuestion 1?<|im_end|>\n<|im_start|>assistant\n"
    for empty, right in (("<think>\n\n</think>\n\n", True), ("", False)):
        sequence = labelled(tokenizer, [f"{start}Answer 0.{more}", (f"{empty}Answer 1.<|im_end|>",)])
        verdict = Verifier(tokenizer).verify(messages, [sequence])
        assert (len(verdict.proven), [code for code, _ in verdict.errors]) == (
            (1, []) if right else (0, ["unlike the template"])
        )


@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_the_dropped_name_of_a_speaker_is_named(name):
    tokenizer = load_tokenizer(name)
    messages = [{"role": "user", "name": "Ada", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    verdict = Verifier(tokenizer).verify(messages, encoded(tokenizer, messages))
    assert (len(verdict.proven), verdict.errors) == (1, [])
    assert any("name of a speaker" in what for what in verdict.losses)


@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "Be brief."}]])
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3"])
def test_a_conversation_may_begin_with_the_assistant(name, before):
    tokenizer = load_tokenizer(name)
    messages = [*before, {"role": "assistant", "content": "Welcome!"}, *chat(1)]
    verdict = Verifier(tokenizer).verify(messages, encoded(tokenizer, messages))
    # Nobody would ask for a turn that nothing comes before
    assert (verdict.errors, verdict.unproven, verdict.untrained) == ([], [], [] if before else [0])
    assert len(verdict.proven) == 1 + len(before)


ALPACA = (
    "{% for m in messages %}### {{ 'Instruction' if m.role == 'user' else 'Response' }}:\n{{ m.content }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("answer", ["Answer {}.", "{} is a number", "Is <|im_start|> a word, {}?", " A\n\n{}", "{}.\n"])
def test_the_end_that_the_recipe_adds_is_right(answer, turns):
    tokenizer = qwen(ALPACA)
    messages = chat(turns, answer)
    sequences = encoded(tokenizer, messages, add_eos=True)
    verdict = Verifier(tokenizer).verify(messages, sequences)
    assert (verdict.errors, verdict.unproven, len(verdict.proven)) == ([], [], turns)
    short = [(ids[:-2] + ids[-1:], labels[:-2] + labels[-1:]) for ids, labels in own_sequences(sequences)]
    verdict = Verifier(tokenizer).verify(messages, short)  # without the answer's last token
    assert verdict.proven == [] and {code for code, _ in verdict.errors} == {"unlike the template"}


def test_a_prompts_shut_reasoning_stands_once_where_its_last_token_merges():
    """Hunyuan's tags are text: the prompt's last `>` is one token with the `<` of the call that follows."""
    tokenizer = qwen(
        CALLS.replace(
            "{{ m.content or '' }}", "{{ '<think:x></think:x>' if m.role == 'assistant' }}{{ m.content }}"
        ).replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think:x></think:x>")
    )
    messages = [ASKED[0], {**ASKED[1], "content": ""}]
    start = "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n<think:x></think:x>"
    for again, right in (("", True), ("<think:x></think:x>", False)):
        said = f'{again}<call>{{"name": "w", "parameters": {{"city": "Paris"}}}}</call><|im_end|>'
        verdict = Verifier(tokenizer).verify(messages, [labelled(tokenizer, [start, (said,)])])
        assert (not verdict.errors, verdict.unproven) == (right, []), verdict


CITY = {"city": "Rome"}


@pytest.mark.parametrize(
    ("name", "first", "result", "what"),
    [
        ("qwen3", {"content": "Hm.</think>It is."}, [], "the reasoning in the text of earlier turns"),
        (
            "gptoss",
            {"content": "Looking.", "tool_calls": [call("w", CITY)]},
            [{"role": "tool", "name": "w", "tool_call_id": "c1", "content": "20"}, chat(1)[1]],
            "the text 'Looking.' of earlier turns",
        ),
    ],
)
def test_what_history_alone_leaves_out_is_no_error(name, first, result, what):
    tokenizer = load_tokenizer(name)
    messages = [chat(1)[0], {"role": "assistant", **first}, *result, *chat(1)]
    verdict = Verifier(tokenizer).verify(messages, encoded(tokenizer, messages))
    assert (verdict.errors, verdict.unproven, verdict.losses) == ([], [], [what])
    assert len(verdict.proven) == sum(m["role"] == "assistant" for m in messages)
