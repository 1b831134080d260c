"""Conversations and their sequences before the judge: which of them, in which processes, and what he said."""

import json
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from ma_sft.data.parallel import Inherited, processes
from ma_sft.labels.facts import Facts
from ma_sft.labels.findings import CheckReport, Findings, count
from ma_sft.labels.shapes import EACH_SHAPE, shapes_of, spread
from ma_sft.labels.statement import misquotes
from ma_sft.labels.verify import Verifier, VerifyResult, runs

if TYPE_CHECKING:
    from numpy.typing import NDArray

AT_A_TIME = 100  # conversations that are judged; of fewer, other processes are not worth their start
LIKE_ROWS = 50  # judging a conversation takes as long as converting and tokenising so many


class Court:
    """Brings conversations and their sequences before the judge, in several processes where there are many."""

    def __init__(
        self,
        dataset: Dataset,
        conversations: Dataset,
        judge: Verifier,
        report: CheckReport,
        found: Findings,
        facts: Facts,
        num_proc: int | None,
    ) -> None:
        self.conversations, self.report, self.found, self.facts = conversations, report, found, facts
        self.num_proc = num_proc
        owner = np.asarray(dataset["row"]) if "row" in dataset.column_names else np.arange(len(dataset))
        columns = [name for name in ("input_ids", "labels", "untrained") if name in dataset.column_names]
        self.bench = Bench(judge, dataset.select_columns(columns), owner)
        self.proven_edges: set[tuple[str, int]] = set()

    def judge(self, sample: int | None) -> None:
        """Judge a sample, then rows with an edge (see `Facts._add_edges`) that no proven turn had."""
        total = len(self.conversations)
        everything = sample is None or sample >= total
        controls = list(self.bench.judge.controls)
        shapes = np.zeros(0, dtype=np.uint64) if everything else shapes_of(self.conversations, controls)
        chosen = np.arange(total) if everything else spread(shapes, sample or 0)
        self._judge_all(chosen)
        odd = [row for edge, rows in self.facts.edges.items() if edge not in self.proven_edges for row in rows]
        more = np.setdiff1d(self.bench.owner[odd], chosen) if odd else np.zeros(0, dtype=np.int64)
        self._judge_all(more)
        self.report.judged_rows = len(chosen) + len(more)
        self.report.judged = f"all {total:,} rows were judged"
        if self.report.judged_rows < total:
            self.report.judged = (
                f"{self.report.judged_rows:,} of {total:,} rows were judged, evenly spread, with each of "
                f"{len(np.unique(shapes)):,} shapes at least {EACH_SHAPE} times or wholly; all rows were counted"
            )

    def _judge_all(self, rows: "NDArray[Any]") -> None:
        bench = Inherited(partial(self.bench, rows=rows))
        heard = self.conversations.select(rows).map(
            bench,
            batched=True,
            batch_size=AT_A_TIME,
            with_indices=True,
            remove_columns=self.conversations.column_names,
            num_proc=processes(self.num_proc, len(rows) * LIKE_ROWS) if len(rows) > AT_A_TIME else None,
            keep_in_memory=True,  # nothing is kept or found again: what the judge depends on need not be hashed
            load_from_cache_file=False,
            new_fingerprint="heard",
            desc="judging",
        )
        for row, text in zip(rows, heard["heard"] if len(rows) else (), strict=True):
            self._enter(int(self.bench.begins(row)), **json.loads(text))

    def _enter(self, row: int, origin: str, turns: int, edges: list[list[Any]], verdict: dict[str, Any]) -> None:
        report, said = self.report, VerifyResult(**verdict)
        report.compared_turns += turns
        report.proven_turns += len(said.proven)
        report.witnessed_turns += said.confirmed
        count(report.losses, [dict.fromkeys(said.losses)])
        count(report.not_proven, [dict.fromkeys(said.unproven)])
        for code, what in dict(reversed(said.errors)).items():
            if code == "foreign labels" or (code == "missing end token" and row in self.facts.open_rows):
                continue  # it was counted with the facts
            self.found.add(code, [row], f"row {row}{f' ({origin})' if origin else ''}: {what}")
        for remark in dict.fromkeys(said.remarks):
            self.found.add("harmless", [row], remark)
        if said.unproven:
            self.found.add("not proven", [row])
        if said.losses:
            self.found.add("said but not shown", [row])
        self.proven_edges |= {(edge, token) for edge, token in edges}


class Bench:
    """What a process needs to judge its share of the conversations; see `Court._judge_all`.

    Args:
        sequences: columns `input_ids`, `labels` and, if there is one, `untrained`.
        owner: the conversation of each sequence, in rising order.
    """

    def __init__(self, judge: Verifier, sequences: Dataset, owner: "NDArray[Any]") -> None:
        self.judge, self.sequences, self.owner = judge, sequences, owner

    def begins(self, row: int) -> "np.intp":
        """The first sequence of a conversation."""
        return np.searchsorted(self.owner, row)

    def __call__(self, batch: dict[str, list[Any]], places: list[int], rows: "NDArray[Any]") -> dict[str, list[str]]:
        spans = [range(self.begins(rows[at]), np.searchsorted(self.owner, rows[at], "right")) for at in places]
        found = self.sequences.select([at for span in spans for at in span])[:]
        labelled = iter(zip(found["input_ids"], found["labels"], strict=True))
        reasons = iter(found.get("untrained") or [[]] * sum(map(len, spans)))
        return {
            "heard": [
                self._hear(
                    {name: batch[name][at] for name in batch},
                    [next(labelled) for _ in span],
                    sum(len(next(reasons)) for _ in span),
                )
                for at, span in enumerate(spans)
            ]
        }

    def _hear(self, conversation: dict[str, Any], sequences: list[Any], excused: int) -> str:
        messages = [_without_nulls(message) for message in _read(conversation["messages"])]
        tools, kwargs = (_read(conversation.get(name)) for name in ("tools", "chat_template_kwargs"))
        verdict = self.judge.verify(messages, sequences, tools=tools, kwargs=kwargs)
        if raw := _read(conversation.get("raw")):
            wrong, unread = misquotes(raw, messages, tools)
            verdict.errors += [("unlike the row", what) for what in wrong]
            verdict.unproven += [unread] if unread else []
        if len(verdict.untrained) > excused:
            named = ", ".join(map(str, verdict.untrained))
            verdict.errors.append(("turns left out", f"messages {named} are not trained, and no reason is given"))
        edges = set()
        for number, begin, end in verdict.proven if not verdict.errors else ():
            ids = sequences[number][0]
            edges |= {("before", ids[begin - 1]), ("end", ids[end - 1])}
            edges |= {("inside", i) for i in {*ids[begin:end]} & self.judge.signs.keys()}
        turns = sum(1 for _, labels in sequences for _ in runs(labels))
        origin = conversation.get("origin") or ""
        return json.dumps({"origin": origin, "turns": turns, "edges": [*edges], "verdict": asdict(verdict)})


def _read(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _without_nulls(value: Any) -> Any:
    """Arrow gives every message every key of the column."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
