"""Labels from ids alone: train on what follows the response template, for data that is text rather than messages.

The template is looked for in the row's *text*, byte by byte through the tokens, and not as one fixed list of ids:
the same `### Answer:` has other ids at the start of a line, after a space, or when its first or last character
merges with a neighbour. A control token (`<|im_start|>`) counts as one symbol that no text can spell. Who quotes a
template is not guessed: the last one of a turn counts, and a row that may mean another is reported.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from transformers import (
    BatchEncoding,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerBase,
)

from ma_sft.errors import ResponseTemplateError
from ma_sft.labels.token_bytes import TokenBytes

SURROUNDINGS = 32  # bytes of text shown on each side of the nearest place
DESCRIBED = 20  # rows with each kind of problem


class RowProblem(NamedTuple):
    """A row that is not plainly found: one of `TemplateReport`'s counts, and what a person needs to mend it."""

    row: int
    status: str
    text: str


@dataclass
class TemplateReport:
    """What `DataCollatorForCompletionOnlyLM.check` found; `rows == found + missing + nothing_left`.

    Of the found rows, `merged` have a border inside a token, and `ambiguous` have a turn with several response
    templates or an instruction after an answer that nothing answers: one may be quoted. `problems` has the first few.
    """

    rows: int = 0
    found: int = 0
    missing: int = 0
    nothing_left: int = 0
    merged: int = 0
    ambiguous: int = 0
    problems: list[RowProblem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.missing == 0 and self.nothing_left == 0


class DataCollatorForCompletionOnlyLM(DataCollatorForLanguageModeling):
    """TRL 0.x's collator with its constructor: labels only after `response_template`.

    Args:
        response_template: text (or ids) after which the response begins. A text is found however it is encoded in
            context; ids are found only as they are.
        instruction_template: text (or ids) that begins an instruction, for rows with several turns: everything from
            it to the end of the next response template is masked. Without it, the last response template counts.
        *args: `tokenizer` may stand here, as in TRL 0.x.
        mlm: must be False.
        ignore_index: label of what is not trained.
        padding_free: join the batch into one row of shape (1, n_tokens) with `position_ids` and `cu_seq_lens`.
        on_missing: `"raise"`, or `"mask"` the row, warn once, and count it in `missing_rows` as TRL 0.x did.
        **kwargs: `tokenizer`, `pad_to_multiple_of`, and what `DataCollatorForLanguageModeling` takes.

    A batch is `input_ids`, `attention_mask` and `labels`, int64 tensors of shape (n_rows, longest row).

    What differs from TRL 0.x: a row without a match is an error and not silently lost; an end token that is also
    the pad token is trained; two instructions in a row do not shift the mask; an instruction template in which a row
    is cut off is masked; a row whose `labels` already mask something keeps them (a packed row has several responses).

    Raises:
        ResponseTemplateError: an empty template, two that are the same; later, a row without a match.
    """

    def __init__(
        self,
        response_template: str | Sequence[int],
        instruction_template: str | Sequence[int] | None = None,
        *args: PreTrainedTokenizerBase,
        mlm: bool = False,
        ignore_index: int = -100,
        padding_free: bool = False,
        on_missing: Literal["raise", "mask"] = "raise",
        **kwargs: Any,
    ) -> None:
        if on_missing not in ("raise", "mask"):
            raise ResponseTemplateError(f"on_missing must be 'raise' or 'mask', not {on_missing!r}")
        if args:
            kwargs["tokenizer"] = args[0]
        super().__init__(mlm=mlm, **kwargs)
        self.response_template = response_template
        self.instruction_template = instruction_template
        self.ignore_index = ignore_index
        self.padding_free = padding_free
        self.on_missing = on_missing
        self.missing_rows = 0
        self._bytes = TokenBytes(self.tokenizer)
        self._templates = [_Template("response_template", response_template, self._bytes)]
        if instruction_template is not None:
            self._templates.append(_Template("instruction_template", instruction_template, self._bytes))
        if len({template.raw for template in self._templates}) < len(self._templates):  # all would be trained
            raise ResponseTemplateError(f"response_template and instruction_template are both {response_template!r}")

    @property
    def response_token_ids(self) -> list[int]:
        """The response template's ids; set, the template is looked for by these ids, as in TRL 0.x."""
        return self._templates[0].ids

    @response_token_ids.setter
    def response_token_ids(self, ids: Sequence[int]) -> None:
        self._templates[0] = _Template("response_template", ids, self._bytes)

    @property
    def instruction_token_ids(self) -> list[int] | None:
        """The instruction template's ids, None without one; set as `response_token_ids`."""
        return self._templates[1].ids if len(self._templates) > 1 else None

    @instruction_token_ids.setter
    def instruction_token_ids(self, ids: Sequence[int]) -> None:
        self._templates[1:] = [_Template("instruction_template", ids, self._bytes)]

    def labels_for(self, input_ids: Sequence[int], *, index: int | None = None) -> list[int]:
        """Labels of one row: its ids where they are trained, `ignore_index` elsewhere.

        Args:
            input_ids: ids of the row, without padding.
            index: row number for the error message.

        Raises:
            ResponseTemplateError: a template does not occur (unless `on_missing="mask"`).
        """
        labels, problems = self._label(np.asarray(input_ids, dtype=np.int64))
        if "missing" in problems:
            message = f"{'row' if index is None else f'row {index}'}: {problems['missing']}"
            if self.on_missing == "raise":
                raise ResponseTemplateError(message)
            if self.missing_rows == 0:
                warnings.warn(f"{message}; such rows are masked and counted in missing_rows", stacklevel=2)
            self.missing_rows += 1
        return cast(list[int], labels.tolist())

    def check(self, dataset: Iterable[Mapping[str, Any]]) -> TemplateReport:
        """Look at every row of a dataset with `input_ids` (and perhaps `attention_mask`) without raising."""
        counts, described = Counter[str](), list[RowProblem]()
        for row, example in enumerate(dataset):
            ids, attended = self._read(example)
            labels, problems = self._label(ids[attended])
            if "missing" not in problems and (labels == self.ignore_index).all():
                problems = {"nothing_left": "no token is left after the response template; raise max_length"}
            counts.update(["rows", *problems, *([] if {"missing", "nothing_left"} & {*problems} else ["found"])])
            described += [RowProblem(row, status, t) for status, t in problems.items() if counts[status] <= DESCRIBED]
        return TemplateReport(**counts, problems=described)

    def torch_call(self, examples: list[Any]) -> BatchEncoding:  # type: ignore[override]
        """Pad and label a batch; `examples` are mappings with `input_ids`, or lists or tensors of ids."""
        if not examples:
            raise ResponseTemplateError("the batch is empty: give at least one row of input_ids")
        rows = [dict(e) if isinstance(e, Mapping) else {"input_ids": e} for e in examples]
        ignored, multiple = self.ignore_index, self.pad_to_multiple_of
        for number, row in enumerate(rows):
            ids, attended = self._read(row)
            labels = np.asarray(row.get("labels", ids))
            if np.array_equal(labels[attended], ids[attended]):
                labels = np.full(len(ids), ignored)
                labels[attended] = self.labels_for(ids[attended].tolist(), index=number)
            labels = np.where(labels == -100, ignored, labels)
            row["labels"] = labels.tolist()
            row.pop("special_tokens_mask", None)
            if self.padding_free:
                rows[number] = {"input_ids": ids[attended], "labels": labels[attended]}
        if self.padding_free:
            flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True, separator_id=ignored)
            return BatchEncoding(flatten(rows, return_tensors="pt"))
        pad = DataCollatorForSeq2Seq(self.tokenizer, pad_to_multiple_of=multiple, label_pad_token_id=ignored)
        return cast(BatchEncoding, pad(rows))

    def numpy_call(self, examples: list[Any]) -> dict[str, Any]:
        """As `torch_call`, in numpy arrays."""
        batch = self.torch_call(examples)
        return {key: value.numpy() if torch.is_tensor(value) else value for key, value in batch.items()}

    def _read(self, row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a row, and which of them are no padding."""
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        if "attention_mask" in row:
            return ids, np.asarray(row["attention_mask"], dtype=bool)
        # Padded beforehand, without a mask: only a run at the end can be padding, and its first token may end the turn
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        length = int(np.flatnonzero(ids != pad).max(initial=-1)) + 1
        return ids, np.arange(len(ids)) < (length + (pad == end) if 0 < length < len(ids) - 1 else len(ids))

    def _label(self, ids: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
        """Labels, all masked where a template is missing, and the problems by status."""
        labels, row = np.full(len(ids), self.ignore_index, dtype=np.int64), _Row(ids, self._bytes)
        found = [template.find(row) for template in self._templates]
        for template, matches in zip(self._templates, found, strict=True):
            if not matches:
                return labels, {"missing": f"{template} does not occur; {template.nearest(row)}"}
        bounds = [0, len(ids)]
        for template in self._templates[1:]:
            # A row begins in the middle of a turn, if not with an instruction, and may be cut off in the next one
            bounds = [0, *(match.start for match in found[1]), template.cut_off(row)]
        problems: dict[str, str] = {}
        begun = False
        for begin, end in pairwise(bounds):
            matches = [match for match in found[0] if begin <= match.start < end]
            if len(matches) > 1:
                problems["ambiguous"] = f"{len(matches)} response templates in one turn, of which the last counts"
                if matches[-1].body == len(ids):  # a prompt for the next answer, as some chat templates write
                    end = matches.pop().start
            if matches:
                begun = True
                labels[matches[-1].body : end] = ids[matches[-1].body : end]
                if matches[-1].merged:
                    problems["merged"] = "the border lies inside a token, which is masked"
            elif begun:
                problems["ambiguous"] = "an instruction template that no response follows; what follows it is masked"
        return labels, {status: f"{text}; {self._templates[0].nearest(row)}" for status, text in problems.items()}


class _Row:
    """A row's ids, the bytes that they stand for, and the end of each token in them."""

    def __init__(self, ids: np.ndarray, token_bytes: TokenBytes) -> None:
        tokens = [token_bytes[i] for i in ids.tolist()]
        self.ids, self.raw, self.ends = ids, b"".join(tokens), np.cumsum([len(token) for token in tokens])

    def tokens(self, begin: int, end: int) -> tuple[int, int]:
        """The first and the last token of some bytes."""
        first, last = np.searchsorted(self.ends, [begin, max(end - 1, begin)], side="right").tolist()
        return first, last


class Match(NamedTuple):
    """A template from token `start` up to `body`, before which a `merged` token holds text from both sides."""

    start: int
    body: int
    merged: bool = False


class _Template:
    """A response or instruction template, and where it stands in a row."""

    def __init__(self, name: str, source: str | Sequence[int], token_bytes: TokenBytes) -> None:
        self.name, self.bytes, self.is_text = name, token_bytes, isinstance(source, str)
        ids = token_bytes.tokenizer(source, add_special_tokens=False)["input_ids"] if self.is_text else source
        self.ids = [int(i) for i in ids]
        if not self.ids:
            raise ResponseTemplateError(f"{name} is empty: there is nothing to look for")
        self.raw = b"".join(token_bytes[i] for i in self.ids)
        if self.is_text and not str(source).startswith(" "):
            self.raw = self.raw.removeprefix(b" ")  # sentencepiece puts a space before a text
        self.spaced = token_bytes[self.ids[0]] == b" "  # as a token of its own
        # `####Answer:` is another heading than `###Answer:`, not the template with something in front
        before = b"" if self.raw[:1].isspace() else b"(?<!" + re.escape(self.raw[:1]) + b")"
        begun = (re.escape(self.raw[:size]) for size in range(len(self.raw) - 1, 0, -1) if self.raw[:size].strip())
        self.whole = re.compile(before + re.escape(self.raw))
        self.begun = re.compile(before + b"(?:" + (b"|".join(begun) or b"(?!)") + rb")\Z")

    def __str__(self) -> str:
        return f"{self.name} {self.bytes.readable(self.raw)!r} (ids {self.ids})"

    def find(self, row: _Row) -> list[Match]:
        """All occurrences in a row, in order."""
        if not self.is_text:
            template, ids = ("".join(map(chr, each)) for each in (self.ids, row.ids.tolist()))
            return [Match(*found.span()) for found in re.finditer(re.escape(template), ids)]
        matches: list[Match] = []
        for found in self.whole.finditer(row.raw):
            start, last = row.tokens(*found.span())
            begin = row.ends[last - 1] if last else 0
            merged = bool(row.ends[last] > found.end())
            # A token that has only the template's trailing spaces is the response's
            only_space = merged and begin >= found.start() and not row.raw[begin : found.end()].strip()
            matches.append(Match(self._with_space(start, row), last if only_space else last + 1, merged))
        return matches

    def cut_off(self, row: _Row) -> int:
        """The token in which the template begins, if the row ends in the middle of it; else the number of tokens."""
        cut = self.begun.search(row.raw, max(len(row.raw) - len(self.raw), 0))
        return self._with_space(row.tokens(*cut.span())[0], row) if cut else len(row.ids)

    def _with_space(self, start: int, row: _Row) -> int:
        """The first token of a template, with the space that sentencepiece puts before a text."""
        return start - (self.is_text and start > 0 and row.ids[start - 1] == self.ids[0] and self.spaced)

    def nearest(self, row: _Row) -> str:
        """Where a row comes nearest to the template, and what to do."""
        raw, readable = row.raw, self.bytes.readable
        # Only other spaces or letters' case: training after another text would train what the user said
        alike = rb"\s*".join(re.escape(bytes([byte])) for byte in self.raw if not bytes([byte]).isspace())
        near = [found.span() for found in re.finditer(alike, raw, re.IGNORECASE)] if alike else []
        at, stop = near[-1] if near else (max(len(raw) - len(self.raw), 0), len(raw))
        advice = "the row may be cut off before its response (raise max_length), or was formatted with another text"
        if near:
            first, last = row.tokens(at, stop)
            ids = row.ids[first : last + 1].tolist()
            text = readable(b"".join(self.bytes[i] for i in ids))
            advice = f"did you mean {self.name}={text!r}, which is encoded here as {ids}?"
        return f"nearest: {readable(raw[max(0, at - SURROUNDINGS) : stop + SURROUNDINGS])!r}; {advice}"
