"""What tests break good files with."""

import copy

JUNK = [None, 0, -1, 7.5, True, "", " ", "x", "\0", "a\0b", "\ud800", "\udfff tail", [], {}, [[]], [None], {"a": None}]
JUNK += [["x", "y"], [{"role": "user"}], [{"role": "user", "content": "x"}], {"text": ["x"], "label": []}, 10**400]
JUNK += ["user", "assistant", "system", "tool", "function_call", "<|im_end|>", "\n\nHuman: x\n\nAssistant: y"]
JUNK += ['{"name": 1}']


def places(value, path=()):
    """Every position in a JSON value."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def mutate(row, rng):
    """The row with one to three values replaced, removed, doubled or swapped."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        options = list(places(row))
        if not options:
            break
        *way, last = rng.choice(options)
        parent = row
        for key in way:
            parent = parent[key]
        kind = rng.random()
        if isinstance(parent[last], str) and kind < 0.3:
            text, at = parent[last], rng.randint(0, len(parent[last]))
            parent[last] = rng.choice([text[:at], text[at:], text[:at] + " again " + text[at:], text + text[at:]])
        elif kind < 0.5:
            parent[last] = copy.deepcopy(rng.choice(JUNK))
        elif kind < 0.7:
            del parent[last]
        elif kind < 0.85 and isinstance(parent, list):
            parent.insert(last, copy.deepcopy(parent[last]))
        elif isinstance(parent, list):
            rng.shuffle(parent)
        else:
            parent[f"{last}_{rng.choice('ab')}"] = parent.pop(last)
    return row


def spoil(data: bytes, rng) -> bytes:
    """A file's or a line's bytes cut off, with bytes changed or put in, or something else altogether."""
    data, kind = bytearray(data), rng.randrange(4)
    at = rng.randrange(len(data))
    if kind == 0:
        del data[at:]
    elif kind == 1:
        data[at : at + 3] = rng.randbytes(3)
    elif kind == 2:
        data[at:at] = rng.randbytes(3)
    else:
        data = rng.choice(
            [b"", b"null", b"[]", b"{}", b"3", b"[" * 20_000, b"\xff\xfe", b'{"a":' * 5_000, b"\x1f\x8b\x08"]
        )
    return bytes(data)
