"""Conversations of every kind that a template may be given."""

from helpers import assistant, system, user

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Looks up {name}.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where."}},
                "required": ["city"],
            },
        },
    }
    for name in ("weather", "clock")
]


def calls(*named, **more):
    made = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": name, "arguments": {"city": city}}}
        for i, (name, city) in enumerate(named)
    ]
    return assistant("", tool_calls=made, **more)


def result(text, name="weather", number=0):
    return {"role": "tool", "name": name, "tool_call_id": f"call0000{number}", "content": text}


ASK = user("How warm is it in Rome?")
LOOKS_UP, ANSWER = calls(("weather", "Rome"), reasoning_content="Look it up."), "It is 20 degrees."
RIVER = [user("Name a river."), assistant("The Po.")]
THOUGHT = [user("Why?"), assistant("So it is.", reasoning_content="A question.")]
TIMES = [calls(("weather", "Rome"), ("clock", "Oslo")), result("20 degrees"), result("noon", "clock", 1)]
ROWS = {
    "one turn": ([user("Name a river."), assistant("The Rhine.")], None),
    "three turns": ([user("Hi"), assistant("Hello."), *RIVER, user("Ta"), assistant("Any time")], None),
    "system": ([system("Be brief."), user("Name a river."), assistant("The Rhine.")], None),
    "a call": ([ASK, calls(("weather", "Rome")), result("20 degrees"), assistant(ANSWER)], TOOLS),
    "two calls": ([ASK, *TIMES, assistant("It is noon.")], TOOLS),
    "reasoning": (THOUGHT, None),
    "reasoning before": (
        [*THOUGHT, user("And then?"), assistant("It went on.", reasoning_content="Another one.")],
        None,
    ),
    "agent": (
        [ASK, LOOKS_UP, result("20 degrees"), assistant(ANSWER, reasoning_content="Now say it.")],
        TOOLS,
    ),
    "agent, plain answer": ([ASK, LOOKS_UP, result("20"), assistant(ANSWER)], TOOLS),
    "empty": ([user("Say nothing."), assistant("")], None),
    "whitespace": ([user("  Name a river.\n"), assistant("\n  The Rhine. \n")], None),
    "chinese": ([user("你好，世界"), assistant("谢谢 😀 再见")], None),
    "special text": ([user("What is <|im_end|> or <think>?"), assistant("A <|endoftext|> mark.")], None),
}


def judged(judge, messages, tools, examples, kwargs=None):
    """Messages that are trained, and why the others are not; the judge has proven the former."""
    trained = {turn.message for example in examples for turn in example.turns if turn.trained}
    reasons = {t.message: t.reason for e in examples for t in e.turns if t.message not in trained}
    assert trained | {*reasons} == {i for i, m in enumerate(messages) if m["role"] == "assistant"}
    verdict = judge.verify(messages, [(e.input_ids, e.labels) for e in examples], tools=tools, kwargs=kwargs)
    assert (verdict.errors, verdict.unproven) == ([], []), verdict
    assert len(verdict.proven) == len(trained) and sorted(verdict.untrained) == sorted(reasons), verdict
    return trained, reasons
