"""Conversations of every kind that a template may be given."""

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


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def calls(*named, **more):
    made = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": name, "arguments": {"city": city}}}
        for i, (name, city) in enumerate(named)
    ]
    return assistant("", tool_calls=made, **more)


def result(text, name="weather", number=0):
    return {"role": "tool", "name": name, "tool_call_id": f"call0000{number}", "content": text}


ASK = user("How warm is it in Rome?")
ROWS = {
    "one turn": ([user("Name a river."), assistant("The Rhine.")], None),
    "three turns": (
        [
            user("Hi"),
            assistant("Hello."),
            user("Name a river."),
            assistant("The Po."),
            user("Ta"),
            assistant("Any time"),
        ],
        None,
    ),
    "system": ([{"role": "system", "content": "Be brief."}, user("Name a river."), assistant("The Rhine.")], None),
    "a call": ([ASK, calls(("weather", "Rome")), result("20 degrees"), assistant("It is 20 degrees.")], TOOLS),
    "two calls": (
        [
            ASK,
            calls(("weather", "Rome"), ("clock", "Oslo")),
            result("20 degrees"),
            result("noon", "clock", 1),
            assistant("It is noon."),
        ],
        TOOLS,
    ),
    "reasoning": ([user("Why?"), assistant("So it is.", reasoning_content="A question.")], None),
    "reasoning before": (
        [
            user("Why?"),
            assistant("So it is.", reasoning_content="A question."),
            user("And then?"),
            assistant("It went on.", reasoning_content="Another one."),
        ],
        None,
    ),
    "agent": (
        [
            ASK,
            calls(("weather", "Rome"), reasoning_content="Look it up."),
            result("20 degrees"),
            assistant("It is 20 degrees.", reasoning_content="Now say it."),
        ],
        TOOLS,
    ),
    "agent, plain answer": (
        [
            ASK,
            calls(("weather", "Rome"), reasoning_content="Look it up."),
            result("20"),
            assistant("It is 20 degrees."),
        ],
        TOOLS,
    ),
    "empty": ([user("Say nothing."), assistant("")], None),
    "whitespace": ([user("  Name a river.\n"), assistant("\n  The Rhine. \n")], None),
    "chinese": ([user("你好，世界"), assistant("谢谢 😀 再见")], None),
    "special text": ([user("What is <|im_end|> or <think>?"), assistant("A <|endoftext|> mark.")], None),
}
