"""Labels from ids alone: train on what follows the response template, for data that is text rather than messages.

The template is looked for in the row's *text*, byte by byte through the tokens, and not as one fixed list of ids:
the same `### Answer:` has other ids at the start of a line, after a space, or when its first or last character
merges with a neighbour. Control tokens (`<|im_start|>`) count as one symbol that no text can spell, so a template
with control tokens never matches text that only looks like it. Who quotes a template is not guessed: the last one of a
turn counts, and a row that may mean another is reported.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, cast

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


@dataclass(frozen=True)
class Match:
    """One occurrence of a template: it begins in token `start`, and what it introduces in token `body`.

    `merged` says that the token before `body` holds text from both sides of the border.
    """

    start: int
    body: int
    merged: bool = False


@dataclass(frozen=True)
class RowProblem:
    """A row of `TemplateReport` that is not plainly found, with what a person needs to mend it."""

    row: int
    status: str
    template: str
    looked_for: list[int]
    nearest_ids: list[int]
    nearest_text: str
    surroundings: str
    suggestion: str


@dataclass
class TemplateReport:
    """What `DataCollatorForCompletionOnlyLM.check` found; `rows == found + missing + nothing_left`.

    Of the found rows, `merged` have a border inside a token, and `ambiguous` have a turn with several response
    templates or an instruction after an answer that nothing answers: one may be quoted. `problems` has the first few
    rows of each kind.
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
    the pad token is trained; two instructions in a row do not shift the mask; a row whose `labels` already mask
    something keeps them (a packed row has several responses).

    Raises:
        ResponseTemplateError: an empty template, no tokenizer, `mlm=True`; later, a row without a match.
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
        if mlm:
            raise ResponseTemplateError("mlm=True trains random tokens instead of the response; leave it False")
        if on_missing not in ("raise", "mask"):
            raise ResponseTemplateError(f"on_missing must be 'raise' or 'mask', not {on_missing!r}")
        if not args and kwargs.get("tokenizer") is None:
            raise ResponseTemplateError("DataCollatorForCompletionOnlyLM needs tokenizer=...")
        if args:
            kwargs["tokenizer"] = args[0]
        super().__init__(mlm=False, **kwargs)
        self.response_template = response_template
        self.instruction_template = instruction_template
        self.ignore_index = ignore_index
        self.padding_free = padding_free
        self.on_missing = on_missing
        self.missing_rows = 0
        self._bytes = TokenBytes(self.tokenizer)
        self._response = _Template("response_template", response_template, self._bytes)
        self._instruction: _Template | None = None
        if instruction_template is not None:
            self._instruction = _Template("instruction_template", instruction_template, self._bytes)
            if self._instruction.raw == self._response.raw:  # each would be answered by the other: all would be trained
                raise ResponseTemplateError(
                    f"response_template and instruction_template are both {self._response.source!r}; "
                    "give each the text that only its turns begin with"
                )

    @property
    def response_token_ids(self) -> list[int]:
        """The response template's ids; set, the template is looked for by these ids, as in TRL 0.x."""
        return self._response.ids

    @response_token_ids.setter
    def response_token_ids(self, ids: Sequence[int]) -> None:
        self._response = _Template("response_template", ids, self._bytes)

    @property
    def instruction_token_ids(self) -> list[int] | None:
        """The instruction template's ids, None without one; set as `response_token_ids`."""
        return self._instruction.ids if self._instruction else None

    @instruction_token_ids.setter
    def instruction_token_ids(self, ids: Sequence[int]) -> None:
        self._instruction = _Template("instruction_template", ids, self._bytes)

    def labels_for(self, input_ids: Sequence[int], *, index: int | None = None) -> list[int]:
        """Labels of one row: its ids where they are trained, `ignore_index` elsewhere.

        Args:
            input_ids: ids of the row, without padding.
            index: row number for the error message.

        Raises:
            ResponseTemplateError: a template does not occur (unless `on_missing="mask"`).
        """
        ids = np.asarray(input_ids, dtype=np.int64)
        labels, absent, _ = self._label(ids)
        if absent is not None:
            self._missing(absent, ids, index)
        row: list[int] = labels.tolist()
        return row

    def check(self, dataset: Iterable[Mapping[str, Any]], *, max_problems: int = 20) -> TemplateReport:
        """Look at every row of a dataset with `input_ids` without raising.

        Args:
            dataset: rows, each a mapping with `input_ids` (and perhaps `attention_mask`).
            max_problems: how many rows of each kind of problem are described; all are counted.
        """
        report = TemplateReport()
        described: Counter[str] = Counter()

        def describe(row: int, status: str, template: _Template, ids: np.ndarray, why: str = "") -> None:
            described[status] += 1
            if described[status] <= max_problems:
                near, near_text, around, advice = template.nearest(ids)
                looked_for = (template.source, template.ids)
                report.problems.append(RowProblem(row, status, *looked_for, near, near_text, around, why or advice))

        for row, example in enumerate(dataset):
            ids, attended = self._read(example)
            labels, absent, remarks = self._label(ids)
            report.rows += 1
            if absent is not None:
                report.missing += 1
                describe(row, "missing", absent, ids)
            elif not (attended & (labels != self.ignore_index)).any():
                report.nothing_left += 1
                describe(row, "nothing left", self._response, ids)
            else:
                report.found += 1
                for status, why in remarks.items():
                    setattr(report, status, getattr(report, status) + 1)
                    describe(row, status, self._response, ids, why)
        return report

    def torch_call(self, examples: list[Any]) -> BatchEncoding:  # type: ignore[override]
        """Pad and label a batch; `examples` are mappings with `input_ids`, or lists or tensors of ids."""
        if not examples:
            raise ResponseTemplateError("the batch is empty: give at least one row of input_ids")
        rows = [e if isinstance(e, Mapping) else {"input_ids": e} for e in examples]
        for number, row in enumerate(rows):
            ids = np.asarray(row.get("input_ids"))
            if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids < 0).any():
                raise ResponseTemplateError(
                    f"row {number}: input_ids are no list of whole numbers from 0: {str(row.get('input_ids'))[:60]}; "
                    "tokenise the text first"
                )
        labels = [self._row_labels(row, number) for number, row in enumerate(rows)]
        if self.padding_free:
            flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True, separator_id=self.ignore_index)
            read = [(*self._read(row), own) for row, own in zip(rows, labels, strict=True)]
            documents = [{"input_ids": ids[attended], "labels": own[attended]} for ids, attended, own in read]
            return BatchEncoding(flatten(documents, return_tensors="pt"))
        features = [{**row, "labels": own.tolist()} for row, own in zip(rows, labels, strict=True)]
        for feature in features:
            feature.pop("special_tokens_mask", None)
        multiple, ignored = self.pad_to_multiple_of, self.ignore_index
        pad = DataCollatorForSeq2Seq(self.tokenizer, pad_to_multiple_of=multiple, label_pad_token_id=ignored)
        return cast(BatchEncoding, pad(features))

    def numpy_call(self, examples: list[Any]) -> dict[str, Any]:
        """As `torch_call`, in numpy arrays."""
        batch = self.torch_call(examples)
        return {key: value.numpy() if torch.is_tensor(value) else value for key, value in batch.items()}

    def _read(self, row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a row, and which of them are no padding."""
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        if "attention_mask" in row:
            return ids, np.asarray(row["attention_mask"], dtype=bool)
        attended = np.ones(len(ids), dtype=bool)
        # Rows that were padded beforehand and lost their mask: only a run at the end can be padding, and where the
        # pad token ends turns as well, the first of that run is the end token.
        other = np.flatnonzero(ids != self.tokenizer.pad_token_id)
        if len(other) and len(ids) - other[-1] > 1:
            attended[other[-1] + 1 + (self.tokenizer.pad_token_id == self.tokenizer.eos_token_id) :] = False
        return ids, attended

    def _row_labels(self, row: Mapping[str, Any], number: int) -> np.ndarray:
        ids, attended = self._read(row)
        if "labels" in row:
            given = np.asarray(row["labels"], dtype=np.int64)
            if len(given) != len(ids):
                raise ResponseTemplateError(f"row {number}: {len(given)} labels for {len(ids)} input_ids")
            if not np.array_equal(given[attended], ids[attended]):
                return np.where(given == -100, self.ignore_index, given)
        labels, absent, _ = self._label(ids)
        if absent is not None:
            self._missing(absent, ids, number)
        return np.where(attended, labels, self.ignore_index)

    def _label(self, ids: np.ndarray) -> tuple[np.ndarray, "_Template | None", dict[str, str]]:
        """Labels, the template that does not occur (then all are masked), and why it is merged or ambiguous."""
        labels = np.full(len(ids), self.ignore_index, dtype=np.int64)
        text = [self._bytes[i] for i in ids.tolist()]
        found: list[list[Match]] = []
        for template in filter(None, (self._response, self._instruction)):
            found.append(template.find(ids, text))
            if not found[-1]:
                return labels, template, {}
        responses, instructions = found[0], found[1] if self._instruction else []
        # A row begins in the middle of a turn, if not with an instruction
        bounds = [0, *(match.start for match in instructions), len(ids)]
        why: list[str] = []
        counted: list[Match] = []
        for begin, end in pairwise(bounds):
            matches = [match for match in responses if begin <= match.start < end]
            if len(matches) > 1:
                why.append(f"{len(matches)} response templates in one turn, of which the last counts")
                if matches[-1].body == len(ids):  # a prompt for the next answer, as some chat templates write
                    end = matches.pop().start
            if not matches and counted:
                why.append("an instruction template that no response follows; what follows it is masked")
            if matches:
                counted.append(matches[-1])
                labels[matches[-1].body : end] = ids[matches[-1].body : end]
        merged = "the border lies inside a token, which is masked" if any(match.merged for match in counted) else ""
        remarks = {"merged": merged, "ambiguous": "; ".join(dict.fromkeys(why))}
        return labels, None, {status: text for status, text in remarks.items() if text}

    def _missing(self, template: "_Template", ids: np.ndarray, index: int | None) -> None:
        nearest_ids, _, surroundings, suggestion = template.nearest(ids)
        message = (
            f"{'row' if index is None else f'row {index}'}: {template.name} {template.source!r} (ids {template.ids}) "
            f"does not occur; nearest: ids {nearest_ids} in {surroundings!r}; {suggestion}"
        )
        if self.on_missing == "raise":
            raise ResponseTemplateError(message)
        if self.missing_rows == 0:
            warnings.warn(f"{message}; such rows are masked and counted in missing_rows", stacklevel=3)
        self.missing_rows += 1


class _Template:
    """A response or instruction template, and where it stands in a row."""

    def __init__(self, name: str, source: str | Sequence[int], token_bytes: TokenBytes) -> None:
        self.name = name
        self.is_text = isinstance(source, str)
        self.bytes = token_bytes
        ids = token_bytes.tokenizer(source, add_special_tokens=False)["input_ids"] if self.is_text else source
        self.ids = [int(i) for i in ids]
        self.source = str(source if self.is_text else self.ids)
        if not self.ids:
            raise ResponseTemplateError(f"{name} is empty: there is nothing to look for")
        self.raw = b"".join(token_bytes[i] for i in self.ids)
        if self.is_text and not self.source.startswith(" "):
            self.raw = self.raw.removeprefix(b" ")  # sentencepiece puts a space before a text

    def find(self, ids: np.ndarray, text: list[bytes]) -> list[Match]:
        """All occurrences in a row whose tokens stand for `text`, in order."""
        matches: list[Match] = []
        if not self.is_text:
            n = len(self.ids)
            for start in np.flatnonzero(ids[: max(len(ids) - n + 1, 0)] == self.ids[0]).tolist():
                if ids[start : start + n].tolist() == self.ids and (not matches or start >= matches[-1].body):
                    matches.append(Match(start, start + n))
            return matches
        raw, ends = b"".join(text), np.cumsum([len(token) for token in text])
        stop = 0
        while (at := raw.find(self.raw, stop)) >= 0:
            stop = at + len(self.raw)
            # `####Answer:` is another heading than `###Answer:`, not the template with something in front
            if at and raw[at - 1 : at] == self.raw[:1] and not self.raw[:1].isspace():
                continue
            start, last = np.searchsorted(ends, [at, stop - 1], side="right").tolist()
            merged, begin = int(ends[last]) != stop, int(ends[last]) - len(text[last])
            if ids[max(last + 1 - len(self.ids), 0) : last + 1].tolist() == self.ids:
                start = last + 1 - len(self.ids)  # with the space that sentencepiece put before it
            # A token that has only the template's trailing spaces is the response's
            body = last if merged and begin >= at and not raw[begin:stop].strip() else last + 1
            matches.append(Match(start, body, merged))
        return matches

    def nearest(self, ids: np.ndarray) -> tuple[list[int], str, str, str]:
        """Where the row comes nearest to the template: ids, their text, the text around, and what to do."""
        tokens = [self.bytes[i] for i in ids.tolist()]
        raw = b"".join(tokens)
        if not raw:
            return [], "", "", "the row is empty"
        wanted = self.raw.lstrip(b" ") or self.raw  # the space is sentencepiece's, and often what does not match
        # Only other spaces or letters' case: training after another text would train what the user said
        spaced = rb"\s*".join(re.escape(bytes([byte])) for byte in wanted if not bytes([byte]).isspace())
        alike = [*re.finditer(spaced, raw, re.IGNORECASE)]
        exact = raw.rfind(wanted)
        at, stop = alike[-1].span() if alike else (max(len(raw) - len(wanted), 0), len(raw))
        if exact >= 0:
            at, stop = exact, exact + len(wanted)
        first, last = np.searchsorted(np.cumsum([len(t) for t in tokens]), [at, max(stop - 1, at)], "right").tolist()
        near, near_text = ids[first : last + 1].tolist(), self.bytes.readable(b"".join(tokens[first : last + 1]))
        advice = "the row may be cut off before its response (raise max_length), or was formatted with another text"
        if exact >= 0:
            text = self.bytes.readable(self.raw)
            advice = f"its text is encoded here as {near}: pass these ids, or the text {text!r}"
        elif alike:
            advice = f"these ids would match: {near}; did you mean {self.name}={near_text!r}?"
        return near, near_text, self.bytes.readable(raw[max(0, at - SURROUNDINGS) : stop + SURROUNDINGS]), advice
