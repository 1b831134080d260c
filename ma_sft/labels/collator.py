"""Labels from ids alone: train on what follows the response template, for data that is text rather than messages.

The template is looked for in the row's *text*, byte by byte through the tokens, and not as one fixed list of ids:
the same `### Answer:` has other ids at the start of a line, after a space, or when its first or last character
merges with a neighbour. Control tokens (`<|im_start|>`) count as one symbol that no text can spell, so a template
with control tokens never matches text that only looks like it.
"""

import difflib
import functools
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
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ma_sft.errors import ResponseTemplateError
from ma_sft.labels.templates import control_tokens

SURROUNDINGS = 32  # bytes of text shown on each side of the nearest place


@dataclass(frozen=True)
class Match:
    """One occurrence of a template: it touches tokens `start:end`, and what it introduces begins at `body`.

    `body` is `end`, except where the template's trailing spaces went into the first token of what follows: that
    token belongs to the response. `merged` says that the last token holds text from both sides of the border,
    `exact` that its ids are the template's own, `indented` that a space stands before it in its line.
    """

    start: int
    end: int
    body: int
    merged: bool
    exact: bool
    line_start: bool
    indented: bool


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

    Of the found rows, `merged` have a border inside a token, and `ambiguous` hold more templates than turns that are
    answered: one may be quoted. `problems` has the first few rows of each kind.
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

        def describe(row: int, status: str, template: _Template, ids: np.ndarray) -> None:
            described[status] += 1
            if described[status] <= max_problems:
                report.problems.append(RowProblem(row, status, template.source, template.ids, *template.nearest(ids)))

        for row, example in enumerate(dataset):
            ids, attended = self._read(example)
            labels, absent, marks = self._label(ids)
            report.rows += 1
            if absent is not None:
                report.missing += 1
                describe(row, "missing", absent, ids)
            elif not (attended & (labels != self.ignore_index)).any():
                report.nothing_left += 1
                describe(row, "nothing left", self._response, ids)
            else:
                report.found += 1
                for status in marks:
                    setattr(report, status, getattr(report, status) + 1)
                    describe(row, status, self._response, ids)
        return report

    def torch_call(self, examples: list[Any]) -> BatchEncoding:  # type: ignore[override]
        """Pad and label a batch; `examples` are mappings with `input_ids`, or lists or tensors of ids."""
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

    def _label(self, ids: np.ndarray) -> tuple[np.ndarray, "_Template | None", list[str]]:
        """Labels, the template that does not occur (then all are masked), and which of merged and ambiguous it is."""
        labels = np.full(len(ids), self.ignore_index, dtype=np.int64)
        text = self._bytes.join(ids)
        responses = self._response.find(ids, text)
        if not responses:
            return labels, self._response, []
        instructions: list[Match] = []
        if self._instruction is not None:
            instructions = self._instruction.find(ids, text)
            if not instructions:
                return labels, self._instruction, []
        in_lines = _in_lines(instructions, responses)
        length = self._instruction.begun_at(text, in_lines) if self._instruction else len(ids)
        answers, unanswered = _answers(instructions, responses, length, in_lines)
        for begin, stop in answers:
            labels[begin:stop] = ids[begin:stop]
        ended = length > 0 and ids[length - 1] == self.tokenizer.eos_token_id
        marks = {
            "merged": any(match.merged for match in responses),
            # A template is quoted, or not every turn is answered; the last turn may be cut off before its answer
            "ambiguous": len(responses) > len(answers) or any(stop < length or ended for stop in unanswered),
        }
        return labels, None, [name for name, holds in marks.items() if holds]

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


def _answers(
    instructions: list[Match], responses: list[Match], n_tokens: int, in_lines: bool
) -> tuple[list[tuple[int, int]], list[int]]:
    """Where a row's answers begin and end, and where the turns after an answer end that have none; in tokens.

    Turns alternate, so a template that stands in the wrong turn is quoted; and where one of a template's occurrences
    begins a line, those that do not are quoted too. Of several responses to one instruction the last counts, of which
    TRL 0.x took the last with the bare ids: if it was the question that quoted, none of the question is trained.
    """
    if in_lines:
        responses, instructions = _unquoted(responses), _unquoted(instructions)
    borders = sorted([(m.start, False, m) for m in instructions] + [(m.start, True, m) for m in responses])
    turns: list[tuple[int, list[Match]]] = [(0, [])]  # where each turn begins, and the responses in it
    for at, (start, is_response, match) in enumerate(borders):
        answered = at + 1 < len(borders) and borders[at + 1][1]
        if is_response:
            turns[-1][1].append(match)
        elif match.line_start or answered or not in_lines or not turns[-1][1]:  # else the answer quotes it
            turns.append((start, []))
    stops = [*(start for start, _ in turns[1:]), n_tokens]
    found: list[tuple[int, int]] = []
    unanswered: list[int] = []
    for (_, matches), stop in zip(turns, stops, strict=True):
        end = stop
        while matches and matches[-1].body >= end:  # a prompt at the row's end, which nothing answers
            end = matches.pop().start
        if matches:
            exact = [match for match in matches if match.exact]
            found.append(((exact or matches)[-1].body, end))
        elif found:
            unanswered.append(stop)
    return found, unanswered


def _in_lines(instructions: list[Match], responses: list[Match]) -> bool:
    """Whether the row's templates begin lines: if a response does; one behind a space, if not all turns alternate."""
    lines = [match for match in responses if match.line_start and match.start]
    if any(not match.indented for match in lines):
        return True
    order = sorted([(m.start, False) for m in instructions] + [(m.start, True) for m in responses])
    return bool(lines) and any(one == other for (_, one), (_, other) in pairwise(order))


def _unquoted(matches: list[Match]) -> list[Match]:
    """The occurrences that begin a line, if more than the row's first token does; else all."""
    lines = [match for match in matches if match.line_start]
    return lines if any(match.start for match in lines) else matches


class TokenBytes(dict[int, bytes]):
    """Id -> the bytes that the token stands for; a control token is a symbol that is no UTF-8."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control = {index: text for text, index in control_tokens(tokenizer).items()}
        super().__init__({i: token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()})
        self.update({i: b"\xff%d\xfe" % i for i in self.control})
        decoder = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
        self.byte_level = "ByteLevel" in decoder
        self.pieces = "▁" in decoder or "Metaspace" in decoder

    def __missing__(self, index: int) -> bytes:
        token = self.tokenizer.convert_ids_to_tokens(index)
        if not isinstance(token, str):
            raise ResponseTemplateError(f"token id {index} is not in the tokenizer's vocabulary")
        if self.byte_level:
            alphabet = _byte_alphabet()
            self[index] = bytes(alphabet[char] for char in token)
        elif self.pieces:
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            self[index] = bytes.fromhex(byte.group(1)) if byte else token.replace("▁", " ").encode()
        else:
            self[index] = str(self.tokenizer.decode([index])).encode()
        return self[index]

    def join(self, ids: np.ndarray) -> list[bytes]:
        return [self[i] for i in ids.tolist()]

    def readable(self, raw: bytes) -> str:
        """Text of joined token bytes, with control tokens as they are written."""
        parts = re.split(rb"\xff(\d+)\xfe", raw)
        return "".join(
            part.decode(errors="replace") if at % 2 == 0 else self.control[int(part)] for at, part in enumerate(parts)
        )


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The printable character in which byte-level tokenizers write each byte."""
    return {char: byte for byte, char in bytes_to_unicode().items()}


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
        raw = b"".join(token_bytes.join(np.array(self.ids)))
        if self.is_text and not self.source.startswith(" "):
            raw = raw.removeprefix(b" ")  # sentencepiece puts a space before a text
        self.raw, self.begins_line = raw, raw.lstrip(b" ").startswith(b"\n")

    def find(self, ids: np.ndarray, text: list[bytes]) -> list[Match]:
        """All occurrences in a row, in order; two share a token at most."""
        exact = self._find_ids(ids)
        if self.is_text:
            return self._find_text(text, {start + len(self.ids): start for start in exact})
        matches: list[Match] = []
        for start in exact:
            end, line = start + len(self.ids), start == 0 or text[start - 1].endswith(b"\n") or self.begins_line
            if not matches or start >= matches[-1].end:
                matches.append(Match(start, end, end, merged=False, exact=True, line_start=line, indented=False))
        return matches

    def _find_ids(self, ids: np.ndarray) -> list[int]:
        n = len(self.ids)
        starts = np.flatnonzero(ids[: max(len(ids) - n + 1, 0)] == self.ids[0])
        return [int(s) for s in starts if ids[s : s + n].tolist() == self.ids]

    def _find_text(self, text: list[bytes], exact: dict[int, int]) -> list[Match]:
        """The template's text; `exact` has the start of its own ids by their end."""
        raw = b"".join(text)
        at = raw.find(self.raw)
        if at < 0:
            return []
        ends = np.cumsum([len(piece) for piece in text])
        matches = []
        while at >= 0:
            stop = at + len(self.raw)
            # `####Answer:` is another heading than `###Answer:`, not the template with something in front
            if not (at and raw[at - 1 : at] == self.raw[:1] and not self.raw[:1].isspace()):
                start, last = np.searchsorted(ends, [at, stop - 1], side="right").tolist()
                merged = int(ends[last]) != stop
                begin, end = int(ends[last]) - len(text[last]), last + 1
                only_space = merged and not raw[begin:stop].strip() and begin >= at
                body = last if only_space else end
                line, indented = self._begins_line(raw[:at])
                matches.append(Match(exact.get(end, start), end, body, merged, end in exact, line, indented))
            at = raw.find(self.raw, stop)
        return matches

    def _begins_line(self, before: bytes) -> tuple[bool, bool]:
        """Whether the template begins a line behind this text, and whether only if a space does not count."""
        if not before or before.endswith(b"\n") or self.begins_line:
            return True, False
        # With sentencepiece, a part of a row that was encoded by itself begins with a space
        indented = self.bytes.pieces and before.endswith(b"\n ")
        return indented, indented

    def begun_at(self, text: list[bytes], in_lines: bool) -> int:
        """The token at which a row was cut off inside the template; the row's length if it was not."""
        raw = b"".join(text)
        for length in range(len(self.raw) - 1, 0, -1):
            begun, before = self.raw[:length], raw[: len(raw) - length]
            apart = self._begins_line(before)[0] if in_lines else before.endswith(b" ")
            if apart and begun.strip() and raw.endswith(begun):
                ends = np.cumsum([len(piece) for piece in text])
                at = int(np.searchsorted(ends, len(before), side="right"))
                # sentencepiece may have put a space before the template, as a token of its own
                return at - (self.bytes[self.ids[0]] == b" " == text[max(at - 1, 0)])
        return len(text)

    def nearest(self, ids: np.ndarray) -> tuple[list[int], str, str, str]:
        """Where the row comes nearest to the template: ids, their text, the text around, and what to do."""
        pieces = self.bytes.join(ids)
        raw = b"".join(pieces)
        if not raw:
            return [], "", "", "the row is empty"
        wanted = self.raw.lstrip(b" ") or self.raw  # the space is sentencepiece's, and often what does not match
        # Only other spaces or letters' case: training after another text would train what the user said
        spaced = rb"\s*".join(re.escape(bytes([byte])) for byte in wanted if not bytes([byte]).isspace())
        alike = [*re.finditer(spaced, raw, re.IGNORECASE)]
        if (at := raw.rfind(wanted)) >= 0:
            stop = at + len(wanted)
        elif alike:
            at, stop = alike[-1].span()
        else:
            best = difflib.SequenceMatcher(None, wanted, raw, autojunk=False).find_longest_match()
            at = max(best.b - best.a, 0)
            stop = min(at + len(wanted), len(raw))
        ends = np.cumsum([len(piece) for piece in pieces])
        first, last = np.searchsorted(ends, [at, max(stop - 1, at)], side="right").tolist()
        near = ids[first : last + 1].tolist()
        near_text = self.bytes.readable(b"".join(pieces[first : last + 1]))
        around = self.bytes.readable(raw[max(0, at - SURROUNDINGS) : stop + SURROUNDINGS])
        if raw[at:stop] == wanted:
            advice = (
                f"its text is encoded here as {near}: pass these ids, or the text {self.bytes.readable(self.raw)!r}"
            )
        elif alike:
            advice = f"these ids would match: {near}; did you mean {self.name}={near_text!r}?"
        else:
            advice = "the row may be cut off before its response (raise max_length), or was formatted with another text"
        return near, near_text, around, advice
