"""The judge by itself: what it takes for right, what it accuses, what it says it cannot judge."""

import json

import pytest
from datasets import Dataset
from helpers import assistant, load_tokenizer, system, user
from jinja2 import UndefinedError
from trl_templates import NAMES, SHELF, trl_tokenizer

from ma_sft.labels.check import check_dataset
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.labels.verify import Verifier, runs


def labelled(tokenizer, pieces):
    """Ids and labels of texts, of which those in a tuple are trained."""
    ids, labels = [], []
    for piece in pieces:
        new = tokenizer("".join(piece), add_special_tokens=False)["input_ids"]
        ids += new
        labels += new if isinstance(piece, tuple) else [-100] * len(new)
    return ids, labels


def chat(turns, answer="Answer {}.", **more):
    """A conversation of so many answers; `more` is what the middle one has beside its text."""
    messages = [m for n in range(turns) for m in (user(f"Question {n}?"), assistant(answer.format(n)))]
    messages[turns // 2 * 2 + 1] |= more
    return messages


def encoded(tokenizer, messages, **settings):
    (examples,) = ChatEncoder(tokenizer, **settings).encode([messages])
    return [(example.input_ids, example.labels) for example in examples]


def verified(tokenizer, messages, *sequences, **settings):
    """What the verifier says: of these sequences, or of the encoder's."""
    return Verifier(tokenizer).verify(messages, [*sequences] or encoded(tokenizer, messages), **settings)


def codes(verdict):
    return [code for code, _ in verdict.errors]


def outcome(verdict):
    return len(verdict.proven), verdict.errors, verdict.unproven


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
    tokenizer = load_tokenizer("qwen3", special=special)
    tokenizer.eos_token = end
    tokenizer.chat_template = template
    return tokenizer


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<call>{{ {'name': c.function.name, 'parameters': c.function.arguments} | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CITY = {"city": "Rome"}
ASKED = [user("Weather?"), assistant(None, tool_calls=[call("w", {"city": "Paris"})])]
WEATHER = "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}])
def test_arguments_are_values_and_never_text_inside_text(arguments):
    tokenizer, messages = qwen(CALLS), [ASKED[0], assistant(None, tool_calls=[call("w", arguments)])]
    written = '<call>{"name": "w", "parameters": %s}</call><|im_end|>'
    right = labelled(tokenizer, [WEATHER, (written % '{"city": "Paris"}',)])
    assert verified(tokenizer, messages, right).errors == []
    inner = labelled(tokenizer, [WEATHER, (written % json.dumps('{"city": "Paris"}'),)])
    ((code, what),) = verified(tokenizer, messages, inner).errors
    assert code == "unlike the template" and "message 1" in what


@pytest.mark.parametrize("steps", [1, 8])
def test_a_conversation_may_end_with_the_result_of_a_call(steps):
    """Each call is trained; what stands behind the last turn cannot change a label."""
    pairs = [(ASKED[1], {"role": "tool", "content": f"{n} degrees"}) for n in range(steps)]
    messages = [ASKED[0], *(message for pair in pairs for message in pair)]
    assert outcome(verified(load_tokenizer("qwen3"), messages)) == (steps, [], [])


@pytest.mark.parametrize("opening", ["<think>\n", ""])
def test_reasoning_in_the_text_goes_on_with_an_opened_prompt(opening):
    """Spark closes an empty reasoning before a text, which here has one of its own; its prompt opens one."""
    tokenizer = qwen(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}</think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    messages = [ASKED[0], assistant(f"{opening}Sunny?\n</think>\n\nSunny.")]
    assert outcome(verified(tokenizer, messages)) == (1, [], [])


@pytest.mark.parametrize(("answer", "right"), [("Hello", True), ("\nHello", False), (" Hello", False)])
def test_whitespace_before_an_answer_is_the_headers_once(answer, right):
    """Of a template that writes the question otherwise once the answer follows."""
    tokenizer = qwen(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if loop.last and m.role == 'user' %}!"
        "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    prompt = "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    sequence = labelled(tokenizer, [prompt, (f"{answer}<|im_end|>",)])
    verdict = verified(tokenizer, [user("Hi"), assistant("Hello")], sequence)
    assert (codes(verdict) == []) is right and bool(verdict.proven) is right


def test_the_bos_token_of_a_text_is_not_trained():
    tokenizer, messages = load_tokenizer("gemma3"), [assistant("The Rhine.")]
    ((ids, labels),) = encoded(tokenizer, messages)
    assert (ids[0], labels[0]) == (tokenizer.bos_token_id, -100)
    assert outcome(verified(tokenizer, messages)) == (1, [], [])
    ((code, what),) = verified(tokenizer, messages, (ids, ids)).errors
    assert code == "unlike inference" and what.startswith("labels begin 1 tokens early; before message 0")


@pytest.mark.parametrize(
    "template",
    [
        CALLS,
        CALLS.replace("tojson", "tojson(ensure_ascii=True)"),
        CALLS.replace(
            "'parameters': c.function.arguments} | tojson }}",
            "'at': '<' in c.function.arguments | string, 'parameters': c.function.arguments} | tojson }}",
        ),
    ],
    ids=["as it is", "in ASCII", "asks for a bracket"],
)
def test_a_control_tokens_text_is_right_in_keys_and_values_however_they_are_written(template):
    arguments = {"é <|im_end|>": ["<|im_start|>é"], "b": {"<think>": 1}}
    messages = [ASKED[0], assistant(None, tool_calls=[call("w", arguments)])]
    assert outcome(verified(qwen(template), messages)) == (1, [], [])


@pytest.mark.parametrize("name", ["qwen3", "qwen3_8"])
def test_an_answer_before_the_first_question_is_context(name):
    """Qwen3.5's template refuses it alone."""
    messages = [assistant("Welcome."), user("Hi"), assistant("Hello.")]
    verdict = verified(trl_tokenizer(name), messages)
    assert outcome(verdict) == (1, [], []) and verdict.untrained == [0]


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
    tokenizer, messages = qwen(template), [ASKED[0], {**ASKED[1], **message}]
    verdict = verified(tokenizer, messages, as_rendered(tokenizer, messages))
    assert {*codes(verdict)} == {"lost content"} and any(what in each for _, each in verdict.errors)


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
    start = "<|start|>user\nHi<|end_of_turn|><|start|>assistant\n"
    right = labelled(tokenizer, [start, ("Hello!<|end_of_response|><|end_of_turn|>",)])
    short = labelled(tokenizer, [start, ("Hello!<|end_of_response|>",), "<|end_of_turn|>"])
    found = [codes(verified(tokenizer, [user("Hi"), assistant("Hello!")], each)) for each in (right, short)]
    assert found == [[], ["missing end token"]]


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
    asked = assistant("", tool_calls=[call("w", CITY)])
    messages = [ASKED[0], asked, {"role": "tool", "tool_call_id": "c1", "content": "20"}, assistant("20.")]
    written = f"<call>{json.dumps({'name': 'w', 'arguments': CITY})}</call><|observation|>"
    pieces = ["<|user|>\nWeather?<|assistant|>\n", (written,), "\n20<|assistant|>\n", (f"20.{last}",)]
    verdict = verified(tokenizer, messages, labelled(tokenizer, pieces))
    assert (verdict.errors == []) is right and len(verdict.proven) == 1 + right


def test_a_turn_of_nothing_but_its_end_is_wrong_where_history_is_written_otherwise_too():
    rewritten = GLM.replace("{{ m.content or '' }}", "{{ m.content }}{{ '!' if loop.last and m.role == 'user' }}")
    tokenizer = qwen(rewritten, "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|observation|>"])
    sequence = labelled(tokenizer, ["<|user|>\nHi!<|assistant|>\n", ("<|user|>",)])
    assert codes(verified(tokenizer, [user("Hi"), assistant("Hello")], sequence)) == ["unlike the template"]


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and m.reasoning_content %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% elif m.role == 'assistant' and enable_thinking is defined and not "
    "enable_thinking %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)


def test_a_rows_own_template_variables_decide_its_prompt():
    tokenizer, plain = qwen(THINKS), [user("q"), assistant("a")]
    start = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n"
    thought = labelled(tokenizer, [start, ("because\n</think>\n\na<|im_end|>",)])
    assert verified(tokenizer, [user("q"), assistant("a", reasoning_content="because")], thought).errors == []
    bare = labelled(tokenizer, [f"{start}\n</think>\n\n", ("a<|im_end|>",)])
    assert verified(tokenizer, plain, bare, kwargs={"enable_thinking": False}).errors == []
    assert verified(tokenizer, plain, bare).errors  # without the variable inference opens a reasoning
    assert verified(tokenizer, plain, labelled(tokenizer, [start, ("a<|im_end|>",)])).unproven


def test_text_that_spells_a_control_token_stays_text():
    tokenizer = load_tokenizer("qwen3")
    messages = [user("Is <|im_end|> a word?"), assistant("Yes.")]
    question = tokenizer(messages[0]["content"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    start, target = "<|im_start|>user\n", ("<think>\n\n</think>\n\nYes.<|im_end|>",)
    end = labelled(tokenizer, ["<|im_end|>\n<|im_start|>assistant\n", target])
    before = tokenizer(start, add_special_tokens=False)["input_ids"]
    right = ([*before, *question, *end[0]], [-100] * (len(before) + len(question)) + end[1])
    real = labelled(tokenizer, [start + messages[0]["content"], "<|im_end|>\n<|im_start|>assistant\n", target])
    found = [codes(verified(tokenizer, messages, each)) for each in (right, real)]
    assert found == [[], ["unlike inference"]]


def test_what_must_not_be_trained_is_not():
    tokenizer, messages = load_tokenizer("smollm2"), [user("q"), assistant("a", train=False)]
    ids, labels = as_rendered(tokenizer, messages)
    assert codes(verified(tokenizer, messages, (ids, labels))) == ["trained against the row"]
    assert verified(tokenizer, messages, (ids, [-100] * len(ids))).errors == []


def test_what_a_template_refuses_is_not_proven():
    tokenizer, twice = load_tokenizer("llama2"), [user("a"), user("b"), assistant("c")]
    rows = Dataset.from_dict({"input_ids": [[1, 5, 2]], "labels": [[-100, 5, 2]]})
    report = check_dataset(rows, tokenizer, conversations=Dataset.from_dict({"messages": [twice]}))
    assert report.errors == [] and "must alternate" in report.verdict
    assert "not proven" in report.verdict and json.loads(report.to_json())["proven"] is False


TWINS = [name for name in NAMES if (SHELF / f"{name}_training.jinja").is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_what_is_proven_ends_where_the_training_twins_generation_marks_end(name):
    tokenizer, chat = trl_tokenizer(name), [user("Hi"), assistant("Hello!")]
    if tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True).strip().endswith("<think>"):
        chat[1]["reasoning_content"] = "Greet back."  # whoever is made to think has to
    ((ids, labels),) = encoded(tokenizer, chat)
    verdict = verified(tokenizer, chat, (ids, labels))
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
    if ids[:end] == marked["input_ids"][:end] and at:
        beyond = [*range(begin, end), *at][-1] + 1
        edge = marked["input_ids"][min(end, beyond) : max(end, beyond)]
        assert not tokenizer.decode([i for i in edge if i != tokenizer.eos_token_id]).strip()


def test_most_templates_of_trl_have_a_training_twin():
    assert len(TWINS) > 25 and {"glm4moe", "gptoss", "cohere2", "nemotron_3_nano"} <= {*TWINS}


def test_a_long_conversation_is_judged_to_its_last_turn():
    tokenizer, messages = load_tokenizer("smollm2"), chat(40)
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    opening = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    size = len(opening)
    begins = [n + size for n in range(len(ids)) if ids[n : n + size] == opening]
    spans = [(begin, ids.index(tokenizer.eos_token_id, begin) + 1) for begin in begins]
    labels = [-100] * len(ids)
    for begin, end in spans:
        labels[begin:end] = ids[begin:end]
    judge = Verifier(tokenizer)
    assert outcome(judge.verify(messages, [(ids, labels)])) == (40, [], [])
    for turn, (begin, end) in enumerate(spans):  # what another turn says is wrong wherever it stands
        other = ids[slice(*spans[turn - 1])]
        wrong = ([*ids[:begin], *other, *ids[end:]], [*labels[:begin], *other, *labels[end:]])
        assert judge.verify(messages, [wrong]).errors, turn


def test_ids_of_texts_that_share_their_beginnings_are_the_tokenizers_own(tokenizer):
    """They are put together from what stands between control tokens, where that gives what the tokenizer gives."""
    verifier = Verifier(tokenizer)
    first, second = list(verifier.controls)[:2]
    whole = f" a {first}\nuser\n 你好 \n{second}  x{first}{second}end{first}"
    texts = [whole[:at] for at in range(len(whole) + 1)] + [f"{first}b {second}\nuser\n 你好 \n{first}"]
    own = [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    assert verifier.ids(texts) == own


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
    assert outcome(of_right) == (turns, [], [])
    assert of_wrong.proven == [] and codes(of_wrong).count("unlike inference") == 2 * turns


def test_equal_answers_are_told_apart_by_what_stands_before_them():
    tokenizer, messages = load_tokenizer("smollm2"), chat(40, "Yes.", train=False)
    verdict = verified(tokenizer, messages)
    assert (*outcome(verdict), verdict.untrained) == (39, [], [], [])
    everyone = own_sequences(encoded(tokenizer, chat(40, "Yes.")))
    verdict = verified(tokenizer, messages, *everyone[1:])  # the forbidden turn for one that is wanted
    assert codes(verdict) == ["trained against the row"] and verdict.untrained == [1]


ARGUMENTS = CALLS.replace(
    "{{ {'name': c.function.name, 'parameters': c.function.arguments} | tojson }}",
    "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<{{ k }}>WRITE</{{ k }}>{% endfor %}",
)


@pytest.mark.parametrize(
    ("writes", "value", "lost"),
    [
        *(("{{ v or '' }}", value, False) for value in (None, [], {}, 2)),
        *(("{% if v %}{{ v }}{% endif %}", value, True) for value in (None, [], {})),
        ("{% if v is string %}{{ v }}{% endif %}", 2, True),
        ("{% if v is string %}{{ v }}{% endif %}", True, True),
        ("{{ v or '' }}", False, True),
        ("{{ v or '' }}", 0, True),
        ("{{ v if v is string else v | tojson }}", False, False),
        ("{{ v.near or '' if v is mapping else v }}", {"near": 0}, True),
        ("{{ v | tojson }}", {"near": [0, False]}, False),
        ("{{ v | tojson if v is string else v + 1 }}", 2, False),
        ("{{ v }}", {"near": {"by": "Oslo"}}, False),  # as Python shows it, which is how Seed-OSS writes it
    ],
)
def test_a_value_that_is_not_written_is_named(writes, value, lost):
    skips = " if v" if writes.startswith("{% if v %}") else ""
    tokenizer = qwen(ARGUMENTS.replace("items() %}", f"items(){skips} %}}").replace("WRITE", writes))
    messages = [ASKED[0], {**ASKED[1], "tool_calls": [call("w", {"city": "Paris", "days": value})]}]
    verdict = verified(tokenizer, messages, as_rendered(tokenizer, messages))
    assert {*codes(verdict)} == ({"lost content"} if lost else set()) and len(verdict.proven) == 1
    assert all("days" in what for _, what in verdict.errors)


def test_the_last_turn_has_the_empty_reasoning_that_inference_writes():
    tokenizer = load_tokenizer("qwen3")
    start = "<|im_start|>user\nQuestion 0?<|im_end|>\n<|im_start|>assistant\n"
    more = "<|im_end|>\n<|im_start|>user\nQuestion 1?<|im_end|>\n<|im_start|>assistant\n"
    for empty, found in (("<think>\n\n</think>\n\n", (1, [])), ("", (0, ["unlike the template"]))):
        pieces = [f"{start}Answer 0.{more}", (f"{empty}Answer 1.<|im_end|>",)]
        verdict = verified(tokenizer, chat(2), labelled(tokenizer, pieces))
        assert (len(verdict.proven), codes(verdict)) == found


@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_the_dropped_name_of_a_speaker_is_named(name):
    verdict = verified(load_tokenizer(name), [{**user("Hi"), "name": "Ada"}, assistant("Hello.")])
    assert outcome(verdict) == (1, [], []) and any("name of a speaker" in what for what in verdict.losses)


@pytest.mark.parametrize("before", [[], [system("Be brief.")]])
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3"])
def test_a_conversation_may_begin_with_the_assistant(name, before):
    verdict = verified(load_tokenizer(name), [*before, assistant("Welcome!"), *chat(1)])
    # Nobody would ask for a turn that nothing comes before
    assert (*outcome(verdict), verdict.untrained) == (1 + len(before), [], [], [] if before else [0])


ALPACA = (
    "{% for m in messages %}### {{ 'Instruction' if m.role == 'user' else 'Response' }}:\n{{ m.content }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("answer", ["Answer {}.", "{} is a number", "Is <|im_start|> a word, {}?", " A\n\n{}", "{}.\n"])
def test_the_end_that_the_recipe_adds_is_right(answer, turns):
    tokenizer, messages = qwen(ALPACA), chat(turns, answer)
    sequences = encoded(tokenizer, messages, add_eos=True)
    assert outcome(verified(tokenizer, messages, *sequences)) == (turns, [], [])
    short = [(ids[:-2] + ids[-1:], labels[:-2] + labels[-1:]) for ids, labels in own_sequences(sequences)]
    verdict = verified(tokenizer, messages, *short)  # without the answer's last token
    assert verdict.proven == [] and {*codes(verdict)} == {"unlike the template"}


def test_a_prompts_shut_reasoning_stands_once_where_its_last_token_merges():
    """Hunyuan's tags are text: the prompt's last `>` is one token with the `<` of the call that follows."""
    shut = "<think:x></think:x>"
    own = f"{{{{ '{shut}' if m.role == 'assistant' }}}}{{{{ m.content }}}}"
    prompt = f"<|im_start|>assistant\n{shut}"
    tokenizer = qwen(CALLS.replace("{{ m.content or '' }}", own).replace("<|im_start|>assistant\n", prompt))
    for again, right in (("", True), (shut, False)):
        said = f'{again}<call>{{"name": "w", "parameters": {{"city": "Paris"}}}}</call><|im_end|>'
        sequence = labelled(tokenizer, [WEATHER + shut, (said,)])
        verdict = verified(tokenizer, [ASKED[0], {**ASKED[1], "content": ""}], sequence)
        assert (not verdict.errors, verdict.unproven) == (right, []), verdict


LOOKS = [assistant("Looking.", tool_calls=[call("w", CITY)])]
LOOKS += [{"role": "tool", "name": "w", "tool_call_id": "c1", "content": "20"}, assistant("Answer 0.")]


@pytest.mark.parametrize(
    ("name", "first", "what"),
    [
        ("qwen3", [assistant("Hm.</think>It is.")], "the reasoning in the text of earlier turns"),
        ("gptoss", LOOKS, "the text 'Looking.' of earlier turns"),
    ],
)
def test_what_history_alone_leaves_out_is_no_error(name, first, what):
    messages = [user("Question 0?"), *first, *chat(1)]
    verdict = verified(load_tokenizer(name), messages)
    assert outcome(verdict) == (sum(m["role"] == "assistant" for m in messages), [], [])
    assert verdict.losses == [what]
