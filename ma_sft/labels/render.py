"""`apply_chat_template` by minijinja, a Jinja in Rust, wherever it is seen to give the same text.

minijinja takes a twentieth of the time, and differs from Jinja in a few things: what is a sequence, control characters
as white space, very large numbers. So it renders a conversation alone only once each of its *steps* was in renderings
in which both agreed: which kind of message (its keys, its kinds of values) comes first, last, and behind which other
one; with which tools and variables; prompt or not. Where they differ, or minijinja refuses, transformers' text is
taken. So it is for whatever is known to differ (`describe` gives it the kind `ODD`).
"""

import hashlib
import json
import re
from collections import Counter
from datetime import datetime
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import jinja2
import minijinja
from transformers import PreTrainedTokenizerBase

from ma_sft.errors import TemplateError, one_line
from ma_sft.labels.apply_template import RunawayTemplateError, apply_template
from ma_sft.labels.backend import EVERY, DifferentResultError
from ma_sft.labels.message_form import is_plain

Message = dict[str, Any]

PROOFS = 3  # renderings with a step that both must agree on
ODD = "\x1c"
_FUEL = 50_000_000  # instructions, about a second: what needs more goes to transformers, which has a time limit
_STEPS = 100_000
_REFUSALS = (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError, IndexError, MemoryError)
_MARKS = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
_USERS_NAMES = ("arguments", "properties", "parameters")  # whose keys are the user's


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
        self._environment: minijinja.Environment | None = None
        self._agreed = Counter[Any]()  # renderings with each step on which both agreed
        self._trusted: set[Any] = set()  # steps on which they agreed often enough
        self._alone = 0  # renderings by minijinja alone

    def render(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        variables: dict[str, Any],
        *,
        prompt: bool = False,
        kinds: tuple[str, ...] | None = None,
    ) -> str:
        """The template's text, with the generation prompt if `prompt`.

        Args:
            kinds: `describe` of each message and, last, of tools and variables, if they are known already.

        Raises:
            TemplateError: the template refuses the messages.
            RunawayTemplateError: it has not come to its end.
            DifferentResultError: prepare all again without `fast`.
        """
        if kinds is None:
            kinds = (*map(describe, messages), describe([tools, variables]))
        steps = _steps(prompt, kinds)
        trusted = self.fast and steps <= self._trusted
        self._alone += trusted
        if trusted and self._alone % EVERY and (text := self._quick(messages, tools, variables, prompt)) is not None:
            return text
        try:
            slow = apply_template(self.tokenizer, messages, tools, variables, prompt=prompt, date=self.date)
        except RunawayTemplateError:
            raise
        except _REFUSALS as error:
            roles = ", ".join(str(m.get("role")) for m in messages)
            line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            what = f"the chat template refuses a conversation with roles [{roles}]: {line}{one_line(error)}"
            raise TemplateError(what) from None
        if self.fast and not any(ODD in kind for kind in kinds):
            quick = self._quick(messages, tools, variables, prompt)
            if quick == slow:
                if len(self._agreed) >= _STEPS:
                    self._agreed.clear()
                    self._trusted.clear()
                self._agreed.update(steps)
                self._trusted.update(step for step in steps if self._agreed[step] >= PROOFS)
            elif trusted and quick is not None:
                raise DifferentResultError(f"minijinja renders {slow[:80]!r} otherwise")
        return slow

    def _quick(
        self, messages: list[Message], tools: list[Any] | None, variables: dict[str, Any], prompt: bool
    ) -> str | None:
        """minijinja's text; None if it refuses."""
        if self._environment is None:
            self._environment = minijinja.Environment(
                loader=self._source,
                trim_blocks=True,
                lstrip_blocks=True,
                fuel=_FUEL,
                filters={"tojson": partial(json.dumps, ensure_ascii=False)},
                tests=dict.fromkeys(("sequence", "iterable"), lambda v: isinstance(v, str | list | tuple | dict)),
                globals={
                    **self.tokenizer.special_tokens_map,
                    "strftime_now": datetime.fromisoformat(self.date).strftime,
                },
                auto_escape_callback=lambda _: False,
            )
        names = {"documents": None, **variables, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
        try:
            return self._environment.render_template("plain" if tools is None else "tools", **names)
        except Exception:  # whatever it is, transformers says it better
            return None

    def _source(self, name: str) -> str:
        """The template for rows without and with tools; what marks that it is generated is a condition that holds."""
        source = self.tokenizer.get_chat_template(tools=[] if name == "tools" else None)
        return _MARKS.sub(lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", source)

    def __getstate__(self) -> dict[str, Any]:
        """Another process compiles its own."""
        return {**self.__dict__, "_environment": None}


def describe(value: Any, key: str = "") -> str:
    """What decides, beside the words, how a template treats a value; `ODD` in it where minijinja is known to differ."""
    match value:
        case dict() if is_plain(value):  # as nearly every message is
            return f"{{role:{value.get('role')},content:{describe(value['content'])}}}"
        case str() if key == "role":
            return value
        case str():
            if "\x1c" in value or "\x1d" in value or "\x1e" in value or "\x1f" in value:  # space for Python alone
                return ODD
            return ("t " if value.isspace() else "t" if value else "t0") + ("<" if "think>" in value else "")
        case dict() if key in _USERS_NAMES:
            return f"{{{','.join(sorted({describe(item, name) for name, item in value.items()}))}}}"
        case dict():
            return f"{{{','.join([f'{name}:{describe(item, name)}' for name, item in value.items()])}}}"
        case None | bool():
            return str(value)
        case list() | tuple():
            return f"[{','.join(sorted({describe(item) for item in value}))}]{min(len(value), 2)}"
        case int() if -(2**63) <= value < 2**63:
            return "i" if value else "i0"
        case float() if "e" not in (shown := repr(value)):
            return shown if shown in ("inf", "-inf", "nan") else "f" if value else "f0"
    return ODD


@lru_cache(4096)
def _steps(prompt: bool, kinds: tuple[str, ...]) -> frozenset[tuple[Any, ...]]:
    """Which kinds of messages follow each other, and how it begins and ends: a loop goes by its neighbours."""
    *messages, rest = kinds
    return frozenset((prompt, rest, *pair) for pair in pairwise(["", *messages, ""]))


@lru_cache(4096)
def digest(kinds: tuple[str, ...], *more: bool) -> str:
    """A short name of a conversation's shape, which is all its steps; the same in every process."""
    shape = [sorted(map(str, _steps(False, kinds))), *more]
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:12]
