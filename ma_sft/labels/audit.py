"""The judge for data that others prepared: the batches of any `SFTTrainer`, or a folder of token ids and labels.

Where the raw rows are given, each sequence is judged by the row that it comes from. Without them its turns are read
back from its ids: a template writes fixed text before, between and behind messages, which is found by rendering
nonsense words. What was read back is rendered again by transformers and compared.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import PreTrainedTokenizerBase

from ma_sft.errors import LabelError
from ma_sft.hub import stop_ids
from ma_sft.labels.check import check_dataset
from ma_sft.labels.placeholders import Message, Refused
from ma_sft.labels.report import CheckReport, Finding
from ma_sft.labels.verify import IGNORE_INDEX, MARKUP, Labelled, Verifier, runs

if TYPE_CHECKING:
    from trl import SFTTrainer

LEFT_OUT = "left out by who prepared the data"


def audit(trainer: "SFTTrainer", rows: str | None = None, *, sequences: int | None = 2_000) -> CheckReport:
    """Judge what a trainer really trains: the batches of its dataloader, after its collator, padded or packed.

    Args:
        trainer: any `SFTTrainer` of a language model, before or after training.
        rows: the raw rows that it was given: a file, folder or hub id, in any format that recipes take.
        sequences: how many are judged, from the first batches; None for an epoch.

    Raises:
        LabelError: no batch has labels.
    """
    tokenizer = trainer.processing_class
    stops = stop_ids(getattr(trainer.model, "generation_config", None))
    found = (sequence for batch in trainer.get_train_dataloader() for sequence in unpacked(batch))
    limit = getattr(trainer.args, "max_length", None)
    return _audit(list(islice(found, sequences)), tokenizer, rows, limit, stops)


def audit_folder(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, rows: str | None = None, *, max_length: int | None = None
) -> CheckReport:
    """Judge a saved data set with the columns `input_ids` and `labels`; see `read_folder` and `audit`."""
    return _audit(read_folder(folder), tokenizer, rows, max_length, [])


def read_folder(folder: str | Path) -> list[Labelled]:
    """The sequences of a data set saved by TRL, axolotl (`last_run_prepared`), LLaMA-Factory, ms-swift or `datasets`.

    Raises:
        LabelError: no such data set, or one without token ids and labels.
    """
    names = [f"{depth}{marker}" for depth in ("", "*/", "*/*/") for marker in ("state.json", "dataset_dict.json")]
    found = next((path for name in names for path in sorted(Path(folder).glob(name))), None)
    if found is None:
        raise LabelError(f"{folder}: no folder with a saved data set; name the one that holds dataset_dict.json")
    saved = load_from_disk(str(found.parent))
    if isinstance(saved, DatasetDict):
        saved = saved["train"] if "train" in saved else next(iter(saved.values()))
    if missing := {"input_ids", "labels"} - {*saved.column_names}:
        raise LabelError(f"{folder}: no column {min(missing)!r}; it has {', '.join(saved.column_names)}")
    known = [n for n in ("input_ids", "labels", "attention_mask", "position_ids", "seq_lengths") if n in saved.features]
    batches = saved.select_columns(known).iter(1)
    return [sequence for batch in batches for sequence in unpacked(batch)]


def unpacked(batch: dict[str, Any]) -> Iterator[Labelled]:
    """The sequences of a batch or row: without padding, a pack cut where its sequences begin."""
    for n, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        ids, labels = np.asarray(ids), np.asarray(labels)
        starts = np.zeros(len(ids), dtype=bool)
        starts[:1] = True
        keep = np.ones(len(ids), dtype=bool)
        if "attention_mask" in batch:
            mask = np.asarray(batch["attention_mask"][n])
            keep = mask != 0
            starts[1:] |= mask[1:] != mask[:-1]  # packs count their sequences here
        if "seq_lengths" in batch:
            starts[np.cumsum(batch["seq_lengths"][n])[:-1]] = True
        elif "position_ids" in batch:
            starts |= np.asarray(batch["position_ids"][n]) == 0
        for begin, end in pairwise([*np.flatnonzero(starts), len(ids)]):
            at = np.arange(begin, end)[keep[begin:end]]
            if len(at) > 1:
                yield ids[at].tolist(), labels[at].tolist()


def _audit(
    sequences: list[Labelled],
    tokenizer: PreTrainedTokenizerBase,
    rows: str | None,
    max_length: int | None,
    stops: Sequence[int | None],
) -> CheckReport:
    if not any(label != IGNORE_INDEX for _, labels in sequences for label in labels):
        raise LabelError(f"none of {len(sequences):,} sequences has a label; nothing would be trained")
    judge = Verifier(tokenizer, stops=[stop for stop in stops if stop is not None])
    reader = Reader(judge)
    sequences = [_cut_back(sequence, max_length) for sequence in sequences]
    read = [reader.read(ids) for ids, _ in sequences]
    known = _Rows(rows) if rows else None
    conversations = [known.find(messages, n) if known else {"messages": messages} for n, messages in enumerate(read)]
    columns = {name: [each.get(name) for each in conversations] for name in ("tools", "chat_template_kwargs", "raw")}
    untrained = [
        [LEFT_OUT] * max(0, sum(m["role"] == "assistant" for m in each["messages"]) - len([*runs(labels)]))
        for each, (_, labels) in zip(conversations, sequences, strict=True)
    ]
    report = check_dataset(
        Dataset.from_dict(
            {
                "input_ids": [ids for ids, _ in sequences],
                "labels": [labels for _, labels in sequences],
                "untrained": untrained,
            }
        ),
        tokenizer,
        conversations=Dataset.from_dict(
            {"messages": [json.dumps(each["messages"]) for each in conversations], **columns}
        ),
        verifier=judge,
        sample=None,
    )
    if not any(read) and all(reader.is_foreign(sequence) for sequence in sequences):
        what = "none holds what the tokenizer's template writes between messages: another template prepared them"
        report.findings.insert(0, Finding("error", "unlike inference", len(sequences), [], what))
    return report


def _cut_back(sequence: Labelled, max_length: int | None) -> Labelled:
    """A turn that `max_length` cuts off has no end to judge: it is left out."""
    ids, labels = sequence
    if len(ids) != max_length or labels[-1] == IGNORE_INDEX:
        return sequence
    begin, end = [*runs(labels)][-1]
    return ids, labels[:begin] + [IGNORE_INDEX] * (end - begin)


class Reader:
    """Reads messages back from ids, by what the template writes before, between and behind messages."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self._heads: dict[str, str] = {}  # text before the first message -> its role
        self._between: dict[str, str] = {}  # text between two messages -> the role of the second
        self._tails: set[str] = set()
        words = [f"Quxr{n}z" for n in range(5)]
        for roles in (("user", "assistant") * 2, ("system", *("user", "assistant") * 2)):
            self._learn(roles, words)
        frames = sorted(map(re.escape, self._between), key=len, reverse=True)
        self._frame = re.compile(f"({'|'.join(frames) or r'(?!)'})")

    def _learn(self, roles: Sequence[str], words: list[str]) -> None:
        messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=False)]
        for end in range(2, len(roles) + 1):
            for prompt in (False, True):
                try:
                    text = self.verifier.render(messages[:end], None, {}, prompt=prompt)
                except Refused:
                    continue
                (ids,) = self.verifier.ids([text])
                parts = re.split("|".join(words), self.verifier.text(ids))
                if len(parts) != end + 1:
                    continue
                self._heads.setdefault(parts[0], roles[0])
                for part, role in zip(parts[1:-1], roles[1:], strict=False):
                    if part.strip():
                        self._between[part] = role
                if prompt and roles[end - 1] == "user" and parts[-1].strip():
                    self._between[parts[-1]] = "assistant"
                if not prompt and roles[end - 1] == "assistant":
                    self._tails.add(parts[-1])

    def read(self, ids: list[int]) -> list[Message]:
        """The messages; none if this is no conversation as the template writes it."""
        text = self.verifier.text(ids)
        if (head := self._head(text)) is None:
            return []
        role, begins = head
        messages: list[Message] = []
        for n, part in enumerate(self._frame.split(text[begins:])):
            if n % 2:
                role = self._between[part]
            else:
                messages.append({"role": role, "content": part})
        if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""}:
            messages.pop()  # a template that always opens the next answer
        if messages[-1]["role"] == "assistant":
            messages[-1]["content"] = self._without_tail(messages[-1]["content"])
        # A call in the template's own tokens, or something that is no message
        structure = {*self.verifier.signs.values()}
        markup = {self.verifier.signs[self.verifier.controls[m]] for m in MARKUP if m in self.verifier.controls}
        for message in messages:
            if (structure - (markup if message["role"] == "assistant" else set())) & {*message["content"]}:
                return []
        return [{**m, "content": self.verifier.spell(m["content"])} for m in messages]

    def is_foreign(self, sequence: Labelled) -> bool:
        """Whether it has prompts, and nothing that the template writes between two messages."""
        ids, labels = sequence
        return IGNORE_INDEX in labels and not self._frame.search(self.verifier.text(ids))

    def _head(self, text: str) -> tuple[str, int] | None:
        """Role of the first message and where it begins; also where the BOS token is missing or stands twice."""
        for head in sorted(self._heads, key=len, reverse=True):
            for begins in (head, text[:1] + head, *(head[cut:] for cut in range(1, len(head)))):
                if {*begins} & {*self.verifier.signs.values()} and text.startswith(begins):
                    return self._heads[head], len(begins)
        return next(((role, 0) for head, role in self._heads.items() if not head), None)

    def _without_tail(self, content: str) -> str:
        """The last answer up to its end, whatever follows that."""
        ends = {*"".join(self._tails)} & {*self.verifier.signs.values()}
        at = [content.index(end) for end in ends if end in content]
        tail = max((tail for tail in self._tails if content.endswith(tail)), key=len, default="")
        return content[: min(at, default=len(content) - len(tail))]


class _Rows:
    """The raw rows, and which of them a sequence comes from."""

    def __init__(self, path: str) -> None:
        from ma_sft.data.mixture import load_mixture

        self._rows = load_mixture([path]).train
        self._by_text: dict[str, list[int]] = {}
        for n, row in enumerate(self._rows):
            for message in row["messages"]:
                self._by_text.setdefault(_squeeze(message["content"]), []).append(n)

    def find(self, messages: list[Message], n: int) -> dict[str, Any]:
        """The row that shares most texts with what was read back, else the n-th."""
        shared = Counter(row for m in messages for row in self._by_text.get(_squeeze(m["content"]), []))
        row = self._rows[max(shared, key=lambda r: (shared[r], r == n)) if shared else min(n, len(self._rows) - 1)]
        return {**row, "messages": [{k: v for k, v in m.items() if v is not None} for m in row["messages"]]}


def _squeeze(text: str | None) -> str:
    return "".join((text or "").split())
