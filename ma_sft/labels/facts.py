"""What is true of all labelled rows, whatever made them: from ids and labels alone, in batches of NumPy arrays."""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ma_sft.errors import LabelError
from ma_sft.labels.findings import CheckReport, Findings, count
from ma_sft.labels.response import TokenBytes
from ma_sft.labels.shapes import EACH_SHAPE
from ma_sft.labels.templates import control_tokens
from ma_sft.labels.verify import IGNORE_INDEX

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Facts:
    """What is true of all rows, batch by batch, from ids and labels alone."""

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        report: CheckReport,
        found: Findings,
    ) -> None:
        self.dataset, self.report, self.found, self.max_length = dataset, report, found, max_length
        self.bos = tokenizer.bos_token_id if tokenizer.bos_token_id != tokenizer.eos_token_id else None
        self.token_bytes = TokenBytes(tokenizer)
        self.controls = np.fromiter(control_tokens(tokenizer).values(), dtype=np.int64)
        ends = {*self.controls.tolist(), tokenizer.eos_token_id} - {None, self.bos}
        self.ends = np.fromiter(ends, dtype=np.int64)
        self.notes = dataset.select_columns([n for n in ("untrained", "special_text") if n in dataset.column_names])
        self.lengths = np.zeros(0, dtype=np.int64)
        self.edges: dict[tuple[str, int], list[int]] = {}  # token before, at the end of, inside a turn -> first rows
        self.open_rows: set[int] = set()
        self._seen: set[bytes] = set()
        self._first = 0  # row of the batch at hand

    def gather(self) -> None:
        """Read all rows.

        Raises:
            LabelError: no such columns, or labels of another length than the ids.
        """
        for batch in _columns(self.dataset):
            self._add(*batch)
        self.report.histogram = _histogram(self.lengths)

    def _add(self, ids: "NDArray[Any]", labels: "NDArray[Any]", starts: "NDArray[Any]") -> None:
        """Flat ids, flat labels and row starts (one more than rows) of the next batch."""
        sizes = np.diff(starts)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        trained = labels != IGNORE_INDEX
        self.lengths = np.concatenate([self.lengths, sizes])
        self.report.tokens += len(ids)
        self.report.trained_tokens += int(trained.sum())
        self.found.add("foreign labels", self._first + np.unique(owner[trained & (labels != ids)]))
        begins, stops = _runs(trained, starts)
        self.report.turns += len(begins)
        labelled = np.zeros(len(sizes), dtype=bool)
        labelled[owner[begins]] = True
        self._add_notes(labelled)
        self._add_ends(ids, owner, begins, stops)
        self._add_edges(ids, owner, begins, stops, trained)
        self._add_bos(ids, starts, sizes)
        if self.max_length is not None:
            self._add_cuts(starts, sizes, owner[begins], begins, stops, labelled, self.max_length)
        self._add_duplicates(ids, starts)
        self._first += len(sizes)

    def _add_notes(self, labelled: "NDArray[Any]") -> None:
        noted = self.notes[self._first : self._first + len(labelled)]
        reasons = noted.get("untrained") or [[]] * len(labelled)
        excused = np.array([bool(each) for each in reasons])
        count(self.report.untrained_turns, reasons)
        self.report.rows_without_label += int((~labelled).sum())
        self.found.add("untrained turns", self._first + np.flatnonzero(excused))
        self.found.add("no labels", self._first + np.flatnonzero(~labelled & ~excused))
        special = noted.get("special_text") or []
        count(self.report.special_text, special)
        self.found.add("special-token text", self._first + np.flatnonzero([bool(tokens) for tokens in special]))

    def _add_ends(
        self, ids: "NDArray[Any]", owner: "NDArray[Any]", begins: "NDArray[Any]", stops: "NDArray[Any]"
    ) -> None:
        open_end = ~np.isin(ids[stops - 1], self.ends)
        for at in np.flatnonzero(open_end):  # whitespace after the end token is no harm
            run = ids[begins[at] : stops[at]]
            text = [self.token_bytes[int(i)] for i in run[-4:]]
            while text and not text[-1].strip():
                text.pop()
                run = run[:-1]
            open_end[at] = not (len(run) and np.isin(run[-1], self.ends))
        rows = self._first + owner[begins][open_end]
        self.open_rows.update(rows.tolist())
        self.found.add("missing end token", rows)

    def _add_edges(
        self,
        ids: "NDArray[Any]",
        owner: "NDArray[Any]",
        begins: "NDArray[Any]",
        stops: "NDArray[Any]",
        trained: "NDArray[Any]",
    ) -> None:
        """Where turns begin and end, and their control tokens: what no judged turn has makes a row be judged."""
        inside = np.flatnonzero(trained & np.isin(ids, self.controls))
        inner = begins > 0
        for edge, at, rows in (
            ("before", begins[inner] - 1, owner[begins[inner]]),
            ("end", stops - 1, owner[begins]),
            ("inside", inside, owner[inside]),
        ):
            tokens, first = np.unique(ids[at], return_index=True)
            for token, where in zip(tokens.tolist(), first.tolist(), strict=True):
                known = self.edges.setdefault((edge, token), [])
                if len(known) < EACH_SHAPE:
                    known.append(self._first + int(rows[where]))

    def _add_bos(self, ids: "NDArray[Any]", starts: "NDArray[Any]", sizes: "NDArray[Any]") -> None:
        if self.bos is not None:
            firsts = starts[:-1][sizes > 1]
            double = (ids[firsts] == self.bos) & (ids[firsts + 1] == self.bos)
            self.found.add("double BOS", self._first + np.flatnonzero(sizes > 1)[double])

    def _add_cuts(
        self,
        starts: "NDArray[Any]",
        sizes: "NDArray[Any]",
        rows: "NDArray[Any]",
        begins: "NDArray[Any]",
        stops: "NDArray[Any]",
        labelled: "NDArray[Any]",
        limit: int,
    ) -> None:
        offset = starts[:-1][rows]
        kept = np.zeros(len(sizes), dtype=bool)
        kept[rows[(begins - offset) < limit]] = True
        self.found.add("cut rows", self._first + np.flatnonzero(sizes > limit))
        self.found.add("cut turns", self._first + rows[(stops - offset) > limit])
        self.found.add("nothing left after cutting", self._first + np.flatnonzero(labelled & ~kept))

    def _add_duplicates(self, ids: "NDArray[Any]", starts: "NDArray[Any]") -> None:
        duplicates = []
        for row in range(len(starts) - 1):
            key = hashlib.blake2b(ids[starts[row] : starts[row + 1]].tobytes(), digest_size=16).digest()
            if key in self._seen:
                duplicates.append(self._first + row)
            self._seen.add(key)
        self.found.add("duplicate rows", duplicates)


def _columns(dataset: Dataset) -> "Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]":
    """Batches of flat ids, flat labels and row starts (one more than rows), straight from Arrow's buffers."""
    for name in ("input_ids", "labels"):
        if name not in dataset.column_names:
            raise LabelError(f"the dataset has no column {name!r}; it has {', '.join(dataset.column_names)}")
    first_row = 0
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=10_000):
        ids, labels = (batch[name].combine_chunks() for name in ("input_ids", "labels"))
        sizes = np.asarray(ids.value_lengths())
        wrong = np.flatnonzero(sizes != np.asarray(labels.value_lengths()))
        if len(wrong):
            raise LabelError(f"row {first_row + wrong[0]}: labels and input_ids differ in length")
        starts = np.concatenate([[0], np.cumsum(sizes)])
        yield (
            np.asarray(ids.flatten()).astype(np.int64),
            np.asarray(labels.flatten()).astype(np.int64),
            starts,
        )
        first_row += len(sizes)


def _runs(trained: "NDArray[Any]", starts: "NDArray[Any]") -> "tuple[NDArray[Any], NDArray[Any]]":
    """Begin and end positions of each stretch of labels; a new row begins a new stretch."""
    before = np.concatenate([[False], trained[:-1]])
    after = np.concatenate([trained[1:], [False]])
    inner = starts[:-1][np.diff(starts) > 0]
    before[inner] = False
    after[starts[1:][np.diff(starts) > 0] - 1] = False
    return np.flatnonzero(trained & ~before), np.flatnonzero(trained & ~after) + 1


def _histogram(lengths: "NDArray[Any]") -> dict[int, int]:
    if not len(lengths):
        return {}
    bounds = 2 ** np.arange(int(np.log2(max(lengths.min(), 1))), int(np.ceil(np.log2(max(lengths.max(), 2)))) + 1)
    counts = np.bincount(np.searchsorted(bounds, lengths), minlength=len(bounds))
    return {int(bound): int(n) for bound, n in zip(bounds, counts, strict=True)}
