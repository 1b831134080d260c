"""`apply_chat_template` by minijinja, a Jinja in Rust, wherever it is seen to give the same text.

minijinja takes a twentieth of the time, and differs from Jinja in a few things: what is a sequence, control characters
as white space, very large numbers. So it renders a conversation alone only once each of its *steps* was in renderings
in which both agreed: which kind of message (its keys, its kinds of values) comes first, last, and behind which other
one; with which tools and variables; prompt or not. Where they differ, or minijinja refuses, transformers' text is
taken. So it is for whatever is known to differ (`describe` gives None).
"""

import hashlib
import json
import re
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jinja2
import minijinja
from transformers import PreTrainedTokenizerBase

from ma_sft.errors import TemplateError
from ma_sft.labels.apply_template import RunawayTemplateError, apply_template, check_size
from ma_sft.labels.message_form import is_plain

Message = dict[str, Any]

PROOFS = 3  # renderings with a step that both must agree on
EVERY = 1000  # of so many later ones, one is compared
_FUEL = 50_000_000  # instructions, about a second: what needs more goes to transformers, which has a time limit
_STEPS = 100_000
_REFUSALS = (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError, IndexError)

_MARKS = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
_ODD = ("\x1c", "\x1d", "\x1e", "\x1f")  # space for Python alone
_USERS_NAMES = ("arguments", "properties", "parameters")  # whose keys are the user's


class DifferentTextError(Exception):
    """minijinja gave another text than transformers for a conversation of steps that they had agreed on."""


class Renderer:
    """Renders one tokenizer's chat template, which must not change afterwards.

    Args:
        date: what the template takes for now, an ISO date or date-time; None for the machine's clock, read once.

    Attributes:
        fast: let minijinja render.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> None:
        self.tokenizer, self.fast = tokenizer, True
        self.date = date or datetime.now().isoformat()
        self._special = dict(tokenizer.special_tokens_map)
        self._environments: dict[bool, minijinja.Environment | None] = {}  # with tools and without
        self._agreed: dict[Any, int] = {}  # renderings with each step on which both agreed
        self._trusted: set[Any] = set()  # conversations all of whose steps they agreed on
        self._alone = 0  # renderings by minijinja alone

    def render(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        variables: dict[str, Any],
        *,
        prompt: bool = False,
        kinds: tuple[str | None, ...] | None = None,
    ) -> str:
        """The template's text, with the generation prompt if `prompt`.

        Args:
            kinds: `describe` of each message and, last, of tools and variables, if they are known already.

        Raises:
            TemplateError: the template refuses the messages.
            RunawayTemplateError: it has not come to its end.
            DifferentTextError: prepare all again without `fast`.
        """
        if kinds is None:
            kinds = (*map(describe, messages), describe([tools, variables]))
        trusted = self.fast and ((prompt, kinds) in self._trusted or self._trusts(prompt, kinds))
        if trusted and (self._alone + 1) % EVERY:
            text = self._quick(messages, tools, variables, prompt)
            if text is not None:
                self._alone += 1
                return text
        try:
            slow = apply_template(self.tokenizer, messages, tools, variables, prompt=prompt, date=self.date)
        except RunawayTemplateError:
            raise
        except _REFUSALS as error:
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise TemplateError(f"the chat template refuses a conversation with roles [{roles}]: {error}") from None
        quick = self._quick(messages, tools, variables, prompt) if self.fast and None not in kinds else None
        if quick == slow:
            if len(self._agreed) >= _STEPS:
                self._agreed.clear()
            self._agreed |= {step: self._agreed.get(step, 0) + 1 for step in _steps(prompt, kinds)}
            self._alone += trusted
        elif trusted and quick is not None:
            raise DifferentTextError(f"minijinja renders {slow[:80]!r} otherwise")
        return slow

    def _trusts(self, prompt: bool, kinds: tuple[str | None, ...]) -> bool:
        """Whether both agreed often enough on each step."""
        if None in kinds or any(self._agreed.get(step, 0) < PROOFS for step in _steps(prompt, kinds)):
            return False
        if len(self._trusted) >= _STEPS:
            self._trusted.clear()
        self._trusted.add((prompt, kinds))
        return True

    def _quick(
        self, messages: list[Message], tools: list[Any] | None, variables: dict[str, Any], prompt: bool
    ) -> str | None:
        """minijinja's text; None if it refuses."""
        if (has_tools := tools is not None) not in self._environments:
            self._environments[has_tools] = self._compile(self.tokenizer.get_chat_template(tools=tools))
        environment = self._environments[has_tools]
        if environment is None:
            return None
        names = {"documents": None, **variables, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
        try:
            text = environment.render_template("", **names)
        except Exception:  # whatever it is, transformers says it better
            return None
        return check_size(text)

    def _compile(self, source: str) -> minijinja.Environment | None:
        now = datetime.fromisoformat(self.date)
        environment = minijinja.Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            fuel=_FUEL,
            filters={"tojson": _to_json},
            tests=dict.fromkeys(("sequence", "iterable"), lambda value: isinstance(value, str | list | tuple | dict)),
            globals={**self._special, "raise_exception": _refuse, "strftime_now": now.strftime},
            auto_escape_callback=lambda _: False,
        )
        try:
            environment.add_template("", _MARKS.sub(_as_condition, source))
        except minijinja.TemplateError:
            return None
        return environment

    def __getstate__(self) -> dict[str, Any]:
        """Another process compiles its own."""
        return {**self.__dict__, "_environments": {}}


class _OddError(Exception):
    pass


def describe(value: Any) -> str | None:
    """What decides, beside the words, how a template treats a value; None where minijinja is known to differ."""
    try:
        if isinstance(value, dict) and is_plain(value):  # as nearly every message is
            return f"{{role:{value.get('role')},content:{_describe_text(value['content'])}}}"
        return _describe(value)
    except _OddError:
        return None


def _describe(value: Any, key: str = "") -> str:
    if isinstance(value, str):
        return value if key == "role" else _describe_text(value)
    if isinstance(value, dict):
        if key in _USERS_NAMES:
            return f"{{{','.join(sorted({_describe(item, name) for name, item in value.items()}))}}}"
        return f"{{{','.join([f'{name}:{_describe(item, name)}' for name, item in value.items()])}}}"
    match value:
        case None | bool():
            return str(value)
        case list() | tuple():
            return f"[{','.join(sorted({_describe(item) for item in value}))}]{min(len(value), 2)}"
        case int() if -(2**63) <= value < 2**63:
            return "i" if value else "i0"
        case float() if "e" not in (shown := repr(value)):
            return shown if shown in ("inf", "-inf", "nan") else "f" if value else "f0"
    raise _OddError


def _steps(prompt: bool, kinds: tuple[str | None, ...]) -> set[tuple[Any, ...]]:
    """Which kinds of messages follow each other, and how it begins and ends: a loop goes by its neighbours."""
    *messages, rest = kinds
    return {(prompt, rest, *pair) for pair in pairwise(["", *messages, ""])}


def _describe_text(text: str) -> str:
    if not text:
        return "t0"
    a, b, c, d = _ODD  # a loop would take longer than these searches
    if a in text or b in text or c in text or d in text:
        raise _OddError
    return ("t " if text.isspace() else "t") + ("<" if "think>" in text else "")


@lru_cache(4096)
def digest(kinds: tuple[str | None, ...], *more: bool) -> str:
    """A short name of a conversation's shape, which is all its steps; the same in every process."""
    shape = [sorted(map(str, _steps(False, kinds))), *more]
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:12]


def _as_condition(mark: re.Match[str]) -> str:
    """A mark of what is generated as a condition that holds: minijinja has no such block."""
    before, end, after = mark.groups()
    return f"{{%{before} {'endif' if end else 'if true'} {after}%}}"


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise ValueError(message)
