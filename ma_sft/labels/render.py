"""Rendering one chat template many times: trace what it does with the messages' texts once, then replay that.

Jinja takes most of the time that it takes to prepare a conversation, and conversations of one shape (the same roles
in the same order) go the same way through a template. So each shape is rendered once with *traced* texts, which
write down what the template asks of them (`'</think>' in content`) and makes of them (`content | trim`). Another
conversation of that shape, whose texts give the same answers, gets the same text with its own words in the places
of the first one's. Jinja joins texts past the trace in some places (`~`, macros, set blocks, `join`, a text as the
argument of another's method): a template whose source holds one of those, and all that is not known to be followed,
is rendered by transformers each time. So are the first conversations of each trace, to see that it gives the same.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import nodes
from transformers import PreTrainedTokenizerBase

from ma_sft.labels.bounds import bounded, check_size
from ma_sft.labels.clock import clock_at
from ma_sft.labels.jinja import compiled

Message = dict[str, Any]


# Stands in the place of a text. Trimming, escaping or changing case destroys it, and the trace with it.
_MARK = ' \n"\ue000aA{}\ue001"\n '


_MARKS = re.compile(' \n"\ue000aA([0-9]+)\ue001"\n ')


_TRACES_PER_SHAPE = 8


_SHAPES = 4096

_PROOFS = 2


class _UntraceableError(Exception):
    """The template does something with a text that a replay could not repeat."""


@dataclass
class _Trace:
    """How a rendered text is made: every second of `literals` is replaced by the values at the indices `places`.

    `values` are message texts (position, key), or a string method of an earlier value, or a sum of earlier values
    and literals; `facts` are what the template asked of values and what the answers were.
    """

    values: list[tuple[str, tuple[Any, ...]]]
    facts: list[tuple[int, str, tuple[Any, ...], bool]]
    literals: list[str]
    places: list[int]
    proofs: int = 0  # conversations for which it gave what the template did

    def replay(self, messages: list[Message]) -> str | None:
        """The text of other messages; None if the template would go another way with them."""
        values: list[str] = []
        for kind, how in self.values:
            values.append(_value(kind, how, messages, values))
        for index, method, arguments, answer in self.facts:
            if _ask(values[index], method, arguments) is not answer:
                return None
        parts = self.literals.copy()
        parts[1::2] = [values[place] for place in self.places]
        return "".join(parts)


def _value(kind: str, how: tuple[Any, ...], messages: list[Message], values: list[str]) -> str:
    if kind == "text":
        return messages[how[0]][how[1]]  # type: ignore[no-any-return]
    if kind == "sum":
        return "".join(values[part] if isinstance(part, int) else part for part in how)
    return str(getattr(values[how[0]], kind)(*how[1]))


def _ask(value: str, method: str, arguments: tuple[Any, ...]) -> bool:
    return bool(value) if method == "__bool__" else bool(getattr(value, method)(*arguments))


class _Text(str):
    """A text that writes down what is done with it. Its own characters are a mark that no text contains."""

    __slots__ = ("recorder", "value_index")
    value_index: int
    recorder: "_Recorder"

    def __str__(self) -> str:
        return self  # a plain copy would not be traced


class _Recorder:
    """Values and facts of the trace in the making; `known` holds the values' real texts."""

    def __init__(self, messages: list[Message]) -> None:
        self.messages = messages
        self.values: list[tuple[str, tuple[Any, ...]]] = []
        self.known: list[str] = []
        self.facts: list[tuple[int, str, tuple[Any, ...], bool]] = []

    def text(self, kind: str, *how: Any) -> _Text:
        text = _Text(_MARK.format(len(self.values)))
        text.value_index, text.recorder = len(self.values), self
        self.values.append((kind, how))
        self.known.append(_value(kind, how, self.messages, self.known))
        return text


def _change(method: str) -> Callable[..., _Text]:
    def traced(self: _Text, *arguments: Any) -> _Text:
        _refuse_traced(arguments)
        return self.recorder.text(method, self.value_index, arguments)

    return traced


def _question(method: str) -> Callable[..., bool]:
    def traced(self: _Text, *arguments: Any) -> bool:
        _refuse_traced(arguments)
        answer = _ask(self.recorder.known[self.value_index], method, arguments)
        self.recorder.facts.append((self.value_index, method, arguments, answer))
        return answer

    return traced


def _sum(self: _Text, other: Any, *, reverse: bool = False) -> _Text:
    parts = [self.value_index, other.value_index if isinstance(other, _Text) else str(other)]
    return self.recorder.text("sum", *(reversed(parts) if reverse else parts))


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise _UntraceableError


def _refuse_traced(arguments: tuple[Any, ...]) -> None:
    if any(isinstance(argument, _Text) for argument in arguments):
        raise _UntraceableError


for _name in dir(str):
    if _name in ("strip", "lstrip", "rstrip", "removeprefix", "removesuffix"):
        setattr(_Text, _name, _change(_name))
    elif _name in ("__contains__", "__eq__", "__ne__", "startswith", "endswith"):
        setattr(_Text, _name, _question(_name))
    elif not _name.startswith("__") or _name in (
        *("__getitem__", "__iter__", "__len__", "__hash__", "__format__", "__repr__", "__mul__", "__rmul__"),
        *("__mod__", "__rmod__", "__lt__", "__le__", "__gt__", "__ge__"),
    ):
        setattr(_Text, _name, _refuse)


_Text.__bool__ = _question("__bool__")  # type: ignore[attr-defined]


_Text.__add__ = _sum  # type: ignore[method-assign,assignment]


_Text.__radd__ = lambda self, other: _sum(self, other, reverse=True)  # type: ignore[attr-defined]


_FOLLOWED_METHODS = {
    *("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "startswith", "endswith", "split", "items", "get"),
}
_FOLLOWED_FUNCTIONS = {"raise_exception", "namespace", "strftime_now", "range"}
_FOLLOWED_FILTERS = {"trim", "string", "safe", "default", "tojson", "length", "count", "list", "first", "last"}


@lru_cache
def _followed(template: str) -> bool:
    """Whether a trace sees all that this template does with texts."""

    def known(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Filter):
            return node.name in _FOLLOWED_FILTERS
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name):
            return node.node.name in _FOLLOWED_FUNCTIONS
        if isinstance(node, nodes.Call):
            constant = all(isinstance(argument, nodes.Const) for argument in node.args)
            return isinstance(node.node, nodes.Getattr) and node.node.attr in _FOLLOWED_METHODS and constant
        if isinstance(node, nodes.Compare) and any(op.op in ("in", "notin") for op in node.ops):
            return isinstance(node.expr, nodes.Const) or isinstance(node.ops[0].expr, nodes.List | nodes.Tuple)
        hidden = (nodes.Concat, nodes.AssignBlock, nodes.Macro, nodes.CallBlock, nodes.FilterBlock)
        return not isinstance(node, hidden)

    tree = compiled(template).environment.parse(template)
    return all(known(node) for node in tree.find_all(nodes.Node))


class Renderer:
    """`tokenizer.apply_chat_template(messages, tokenize=False, ...)`, fast for many conversations of few shapes.

    Args:
        tokenizer: its chat template must not change afterwards.
        template_now: what the template's clock says, an ISO date or date-time; None for the machine's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_now: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template_now = template_now
        self._traces: dict[Any, list[_Trace]] = {}

    def render(
        self, messages: list[Message], tools: list[Any] | None, variables: dict[str, Any], *, prompt: bool = False
    ) -> str:
        """The template's text, with the generation prompt if `prompt`; the errors are the template's own."""
        shape = None if tools is not None else _shape(messages, repr(variables), prompt)
        if shape is not None and not _followed(self.tokenizer.get_chat_template()):
            shape = None
        traces = self._traces.get(shape, []) if shape is not None else []
        replayed = next(((t, text) for t in traces if (text := t.replay(messages)) is not None), None)
        if replayed and replayed[0].proofs >= _PROOFS:
            return replayed[1]
        with bounded(), clock_at(self.template_now, self.tokenizer.get_chat_template(tools=tools)):
            text = check_size(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **variables
                )
            )
        if replayed and shape is not None:
            replayed[0].proofs += 1
            if replayed[1] != text:
                self._traces[shape] = []
        elif shape is not None and (shape in self._traces or len(self._traces) < _SHAPES):
            traces = self._traces.setdefault(shape, [])
            if len(traces) < _TRACES_PER_SHAPE:
                trace = self._trace(messages, variables, prompt)
                if trace is not None and trace.replay(messages) == text:
                    traces.append(trace)
        return text

    def _trace(self, messages: list[Message], variables: dict[str, Any], prompt: bool) -> _Trace | None:
        recorder = _Recorder(messages)
        traced = [
            {key: value if key == "role" else recorder.text("text", i, key) for key, value in message.items()}
            for i, message in enumerate(messages)
        ]
        # transformers gives templates the reasoning under the name that gpt-oss uses, too
        traced = [{"thinking": m["reasoning_content"], **m} if "reasoning_content" in m else m for m in traced]
        try:
            with clock_at(self.template_now, self.tokenizer.get_chat_template()):
                marked = compiled(self.tokenizer.get_chat_template()).render(
                    messages=traced,
                    tools=None,
                    documents=None,
                    add_generation_prompt=prompt,
                    **{**self.tokenizer.special_tokens_map, **variables},
                )
        except _UntraceableError:
            return None
        literals = _MARKS.split(marked)
        if any("\ue000" in literal or "\ue001" in literal for literal in literals):
            return None
        return _Trace(recorder.values, recorder.facts, literals, [int(place) for place in literals[1::2]])


def _shape(messages: list[Message], variables: str, prompt: bool) -> tuple[Any, ...] | None:
    """What decides, beside the texts, how messages are rendered; None for what is not traced."""
    shape: list[Any] = [prompt, variables]
    for message in messages:
        for key, value in message.items():
            if type(value) is not str or key not in ("role", "content", "reasoning_content"):
                return None
            if "\ue000" in value or "\ue001" in value:
                return None
            shape.append(value if key == "role" else key)
    return tuple(shape)
