"""The judge finds every way in which labels are broken here, for real templates, and accuses nothing that is right."""

import copy

import pytest
from helpers import assistant, load_tokenizer, user
from kinds_of_rows import result
from trl_templates import trl_tokenizer

from ma_sft.labels.encoder import ChatEncoder
from ma_sft.labels.verify import Verifier, runs

REAL = ("qwen3", "llama2", "gptoss", "smollm2")
SLOW = ("llama3", "gemma3", "deepseek_v3")
TRL = ("cohere", "cohere2", "deepseek_r1_distill", "gemma4_v5", "glm4moe", "lfm2_v2", "llama3_1", "muse_glimmer")
TRL += ("nemotron_3_nano", "phi3_5", "qwen2_5", "qwen3_5_think", "qwen3_8", "smolvlm")
WITH_TOOLS = ("gemma4_v5", "glm4moe", "lfm2_v2", "qwen2_5", "qwen3_8")

CHAT = [
    *(user("Name two rivers, please."), assistant("The Rhine,\nthe Danube.")),
    *(user("And a third one, 谢谢?"), assistant("The Elbe flows to the North Sea.")),
]


PLACE = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Looks up the {name}.", "parameters": PLACE}}
    for name in ("weather", "clock")
]
ASKED = [
    {"id": f"call0000{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
    for n, (name, arguments) in enumerate((("weather", {"city": "Rome", "days": 2}), ("clock", {"city": "Rome"})))
]
AGENT = [
    *(user("Weather and time in Rome?"), assistant("", tool_calls=ASKED)),
    *(result("20 degrees"), result("noon", "clock", 1), assistant("It is noon, at 20 degrees.")),
]

# -- the sequence that trains the last turn, broken: (ids, labels, begin, end of its last turn) -> ids, labels --------


def _middle(begin, end):
    return (begin + end) // 2


def _relabel(ids, spans):
    labels = [-100] * len(ids)
    for begin, end in spans:
        labels[begin:end] = ids[begin:end]
    return ids, labels


def _put(ids, labels, at, token, trained):
    return [*ids[:at], token, *ids[at:]], [*labels[:at], token if trained else -100, *labels[at:]]


def _set(ids, labels, at, token):
    return [*ids[:at], token, *ids[at + 1 :]], [*labels[:at], token if labels[at] != -100 else -100, *labels[at + 1 :]]


def _swap(ids, labels, at):
    ids = [*ids[:at], ids[at + 1], ids[at], *ids[at + 2 :]]
    return ids, [i if label != -100 else -100 for i, label in zip(ids, labels, strict=True)]


BROKEN = {
    "labels shifted to the left": lambda i, y, b, e, t: (i, [*y[1:], -100]),
    "labels shifted to the right": lambda i, y, b, e, t: (i, [-100, *y[:-1]]),
    "the stop token is masked": lambda i, y, b, e, t: (i, [*y[: e - 1], -100, *y[e:]]),
    "the stop token is dropped": lambda i, y, b, e, t: (i[: e - 1], y[: e - 1]),
    "another end token": lambda i, y, b, e, t: _set(i, y, e - 1, t.convert_tokens_to_ids("<|unused|>")),
    "a second end token": lambda i, y, b, e, t: _put(i[:e], y[:e], e, i[e - 1], True),
    "the first token is masked": lambda i, y, b, e, t: (i, [*y[:b], -100, *y[b + 1 :]]),
    "the first token is dropped": lambda i, y, b, e, t: (i[:b] + i[b + 1 :], y[:b] + y[b + 1 :]),
    "the header's last token is trained": lambda i, y, b, e, t: _relabel(i, [(b - 1, e)]),
    "the whole header is trained": lambda i, y, b, e, t: _relabel(i, [(b - 3, e)]),
    "everything is trained": lambda i, y, b, e, t: (i, list(i)),
    "everything but the first token is trained": lambda i, y, b, e, t: (i, [-100, *i[1:]]),
    "the question is trained too": lambda i, y, b, e, t: _relabel(i, [(b - 9, b - 6), *runs(y)]),
    "the question is trained instead": lambda i, y, b, e, t: _relabel(i, [(b - 9, b - 5)]),
    "text behind the end is trained": lambda i, y, b, e, t: _put(i[:e], y[:e], e, t("more")["input_ids"][-1], True),
    "a token in the middle is masked": lambda i, y, b, e, t: _relabel(i, [(b, _middle(b, e)), (_middle(b, e) + 1, e)]),
    "only the second half is trained": lambda i, y, b, e, t: _relabel(i, [(_middle(b, e), e)]),
    "only the first half is trained": lambda i, y, b, e, t: _relabel(i, [(b, _middle(b, e))]),
    "cut in the middle": lambda i, y, b, e, t: (i[: _middle(b, e)], y[: _middle(b, e)]),
    "no turn is trained": lambda i, y, b, e, t: (i, [-100] * len(i)),
    "only the end is trained": lambda i, y, b, e, t: _relabel(i, [(e - 1, e)]),
    "two tokens are swapped": lambda i, y, b, e, t: _swap(i, y, _middle(b, e)),
    "a token is doubled": lambda i, y, b, e, t: _put(i, y, _middle(b, e), i[_middle(b, e)], True),
    "a token of the answer is dropped": lambda i, y, b, e, t: tuple(
        each[: _middle(b, e)] + each[_middle(b, e) + 1 :] for each in (i, y)
    ),
    "a token of the answer is another": lambda i, y, b, e, t: _set(i, y, _middle(b, e), i[b]),
    "a token of the prompt is dropped": lambda i, y, b, e, t: (i[: b - 6] + i[b - 5 :], y[: b - 6] + y[b - 5 :]),
    "a token of the prompt is another": lambda i, y, b, e, t: _set(i, y, b - 7, t("Wrong")["input_ids"][-1]),
    "the prompt's last token is dropped": lambda i, y, b, e, t: (i[: b - 1] + i[b:], y[: b - 1] + y[b:]),
    "the first token is doubled": lambda i, y, b, e, t: _put(i, y, 0, i[0], False),
    "the first token of all is dropped": lambda i, y, b, e, t: (i[1:], y[1:]),
    "a control token inside the answer": lambda i, y, b, e, t: _put(i, y, _middle(b, e), i[e - 1], True),
    "padding before the turn": lambda i, y, b, e, t: _put(i, y, b, i[e - 1], False),
}


# -- the conversation, broken before it is encoded ------------------------------------------------------------


def _said(message, **changes):
    return lambda rows: [row if n != message % len(rows) else {**row, **changes} for n, row in enumerate(rows)]


MISREAD = {
    "a line end is stripped": _said(1, content="The Rhine,the Danube."),
    "a full stop is lost": _said(3, content="The Elbe flows to the North Sea"),
    "the question is another": _said(2, content="And a fourth one, 谢谢?"),
    "the answer is another row's": _said(3, content="Six."),
    "the first exchange is lost": lambda rows: rows[2:],
    "the exchanges are swapped": lambda rows: rows[2:] + rows[:2],
    "question and answer are swapped": lambda rows: [
        {**a, "content": b["content"]} for a, b in zip(rows, [rows[1], rows[0], rows[3], rows[2]], strict=True)
    ],
    "an exchange comes twice": lambda rows: rows[:2] + rows,
    "capitals are lost": _said(3, content="the elbe flows to the north sea."),
}


MISTHOUGHT = {
    "the reasoning is lost": _said(3, reasoning_content=""),
    "the reasoning is another": _said(3, reasoning_content="Of the sea."),
    "the reasoning is said": lambda rows: [*rows[:3], assistant("One more. " + rows[3]["content"])],
}


def _calls(change):
    def changed(rows):
        rows = copy.deepcopy(rows)
        rows[1]["tool_calls"] = change(rows[1]["tool_calls"])
        return rows

    return changed


def _first(**changes):
    return _calls(lambda calls: [{**calls[0], "function": {**calls[0]["function"], **changes}}, *calls[1:]])


MISCALLED = {
    "the second call is lost": _calls(lambda calls: calls[:1]),
    "the calls are swapped": _calls(lambda calls: calls[::-1]),
    "a call is another": _first(name="clock"),
    "an argument is another": _first(arguments={"city": "Oslo", "days": 2}),
    "an argument is lost": _first(arguments={"city": "Rome"}),
    "an argument has another name": _first(arguments={"town": "Rome", "days": 2}),
    "a number is text": _first(arguments={"city": "Rome", "days": "2 "}),
    "arguments are text inside text": _first(arguments={"arguments": '{"city": "Rome", "days": 2}'}),
    "the result is another": _said(2, content="21 degrees"),
    "a result is lost": lambda rows: rows[:3] + rows[4:],
}


def _tokenizer(name):
    own = name in REAL + SLOW
    return load_tokenizer(name, special=["<|unused|>"]) if own else trl_tokenizer(name, "<|unused|>")


def _sequences(encoder, messages, tools=None):
    (examples,) = encoder.encode([messages], [tools])
    return [(example.input_ids, example.labels) for example in examples]


def _accuses(verdict):
    return bool(verdict.errors or verdict.untrained or verdict.unproven)


@pytest.mark.parametrize("name", [*REAL, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW + TRL)])
def test_every_mutation_is_found(name):
    tokenizer = _tokenizer(name)
    encoder, judge = ChatEncoder(tokenizer), Verifier(tokenizer)
    chat, misread = CHAT, MISREAD
    if tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True).strip().endswith("<think>"):
        thoughts = {1: "Of Europe.", 3: "One more."}
        chat = [{**m, "reasoning_content": thoughts[n]} if n in thoughts else m for n, m in enumerate(CHAT)]
        misread = MISREAD | MISTHOUGHT
    right = _sequences(encoder, chat)
    assert not _accuses(judge.verify(chat, right)), "the encoder is right"
    *others, last = right if len(right) == 1 or [*runs(right[0][1])][-1:] < [*runs(right[-1][1])][-1:] else right[::-1]
    begin, end = [*runs(last[1])][-1]
    wrong = {what: [*others, change(*last, begin, end, tokenizer)] for what, change in BROKEN.items()}
    assert all(sequences[-1] != last for sequences in wrong.values())
    wrong |= {what: _sequences(encoder, change(chat)) for what, change in misread.items()}
    wrong["a turn is trained twice"] = [*right, last]
    missed = [what for what, sequences in wrong.items() if not _accuses(judge.verify(chat, sequences))]
    assert len(BROKEN) + len(MISREAD) > 30 and missed == []


@pytest.mark.parametrize("name", ["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in WITH_TOOLS)])
def test_every_mutation_of_a_call_is_found(name):
    tokenizer = _tokenizer(name)
    encoder, judge = ChatEncoder(tokenizer), Verifier(tokenizer)
    verdict = judge.verify(AGENT, _sequences(encoder, AGENT, TOOLS), tools=TOOLS)
    assert not _accuses(verdict) and len(verdict.proven) == 2
    wrong = {what: _sequences(encoder, change(AGENT), TOOLS) for what, change in MISCALLED.items()}
    wrong["a tool is lost"] = _sequences(encoder, AGENT, TOOLS[:1])
    missed = [what for what, each in wrong.items() if not _accuses(judge.verify(AGENT, each, tools=TOOLS))]
    assert missed == []
