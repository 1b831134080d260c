"""The verifier for data that others prepared: the batches of any `SFTTrainer`, or a folder of token ids and labels.

Where the raw rows are given, each sequence is verified by the row that it comes from. Without them its turns are read
back from its ids: a template writes fixed text before, between and behind messages, which placeholder words show. What
was read back is rendered again by transformers and compared.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice, pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from ma_sft.data.load import read_saved
from ma_sft.errors import LabelError, TemplateError
from ma_sft.hub import stop_ids
from ma_sft.labels.check import CheckReport, Finding, check_dataset
from ma_sft.labels.placeholders import Message
from ma_sft.labels.verify import IGNORE_INDEX, MARKUP, Labelled, Verifier, runs

if TYPE_CHECKING:
    from trl import SFTTrainer

LEFT_OUT = "left out by who prepared the data"
OTHER_TEMPLATE = "none holds what the tokenizer's template writes between messages: another template prepared them"


def audit(trainer: "SFTTrainer", rows: str | None = None, *, sequences: int | None = 2_000) -> CheckReport:
    """Verify what a trainer really trains: the batches of its dataloader, after its collator, padded or packed.

    Args:
        trainer: any `SFTTrainer` of a language model, before or after training.
        rows: the raw rows that it was given: a file, folder or hub id, in any format that recipes take.
        sequences: how many are verified, from the first batches; None for an epoch.

    Raises:
        LabelError: no batch has labels.
    """
    stops = stop_ids(getattr(trainer.model, "generation_config", None))
    found = (sequence for batch in trainer.get_train_dataloader() for sequence in unpacked(batch))
    limit = getattr(trainer.args, "max_length", None)
    return _audit(list(islice(found, sequences)), trainer.processing_class, rows, limit, stops)


def audit_folder(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, rows: str | None = None, *, max_length: int | None = None
) -> CheckReport:
    """Verify a saved data set with the columns `input_ids` and `labels`; see `read_folder` and `audit`."""
    return _audit(read_folder(folder), tokenizer, rows, max_length, [])


def read_folder(folder: str | Path) -> list[Labelled]:
    """The sequences of a data set saved by TRL, axolotl (`last_run_prepared`), LLaMA-Factory, ms-swift or `datasets`.

    Raises:
        LabelError: no such data set, or one without token ids and labels.
    """
    names = product(("", "*/", "*/*/"), ("state.json", "dataset_dict.json"))
    found = next((path for name in names for path in sorted(Path(folder).glob("".join(name)))), None)
    if found is None:
        raise LabelError(f"{folder}: no folder with a saved data set; name the one that holds dataset_dict.json")
    saved = read_saved(str(found.parent))
    if isinstance(saved, DatasetDict):
        saved = saved["train"] if "train" in saved else next(iter(saved.values()))
    if missing := {"input_ids", "labels"} - {*saved.column_names}:
        raise LabelError(f"{folder}: no column {min(missing)!r}; it has {', '.join(saved.column_names)}")
    known = [n for n in ("input_ids", "labels", "attention_mask", "position_ids", "seq_lengths") if n in saved.features]
    sequences: list[Labelled] = []
    for row, batch in enumerate(saved.select_columns(known).iter(1)):
        ids, labels = (np.asarray(batch[name][0]) for name in ("input_ids", "labels"))
        if ids.ndim != 1 or ids.shape != labels.shape or (len(ids) and (ids.dtype.kind != "i" or ids.min() < 0)):
            raise LabelError(f"{folder}, row {row}: input_ids and labels are no two lists of token ids of one length")
        sequences += unpacked(batch)
    return sequences


def unpacked(batch: dict[str, Any]) -> Iterator[Labelled]:
    """The sequences of a batch or row: without padding, a pack cut where its sequences begin."""
    for n, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        ids, labels = np.asarray(ids), np.asarray(labels)
        mask = np.asarray(batch["attention_mask"][n]) if "attention_mask" in batch else np.ones(len(ids))
        starts = np.diff(mask, prepend=-1) != 0  # packs count their sequences in the mask
        if "seq_lengths" in batch:
            starts[np.cumsum(batch["seq_lengths"][n])[:-1]] = True
        elif "position_ids" in batch:
            starts |= np.asarray(batch["position_ids"][n]) == 0
        for begin, end in pairwise([*np.flatnonzero(starts), len(ids)]):
            at = begin + np.flatnonzero(mask[begin:end])
            if len(at) > 1:
                yield ids[at].tolist(), labels[at].tolist()


def _audit(
    sequences: list[Labelled],
    tokenizer: PreTrainedTokenizerBase,
    rows: str | None,
    max_length: int | None,
    stops: Sequence[int],
) -> CheckReport:
    if not any(label != IGNORE_INDEX for _, labels in sequences for label in labels):
        raise LabelError(f"none of {len(sequences):,} sequences has a label; nothing would be trained")
    if not tokenizer.chat_template:
        raise LabelError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; name the one of the training")
    reader = Reader(verifier := Verifier(tokenizer, stops=stops))
    sequences = [_cut_back(sequence, max_length) for sequence in sequences]
    read = [reader.read(ids) for ids, _ in sequences]
    conversations = _rows_of(read, rows) if rows else ({"messages": messages} for messages in read)
    labelled, raw = list[dict[str, Any]](), list[dict[str, Any]]()
    for row, (ids, labels) in zip(conversations, sequences, strict=True):
        others = {name: row.get(name) for name in ("tools", "chat_template_kwargs")}
        raw.append({"messages": json.dumps(row["messages"]), **others})
        turns = sum(message["role"] == "assistant" for message in row["messages"])
        left_out = [LEFT_OUT] * (turns - len([*runs(labels)]))
        labelled.append({"input_ids": ids, "labels": labels, "untrained": left_out})
    dataset, messages = Dataset.from_list(labelled), Dataset.from_list(raw)
    report = check_dataset(dataset, tokenizer, conversations=messages, verifier=verifier, sample=None)
    for finding in report.findings:  # what is wrong in one of its rows before what that means
        meaning, found, example = finding.message.partition(": row ")
        number, _, what = example.partition(": ")
        finding.message = f"{what} (row {number}; {meaning})" if found else meaning
    foreign = (IGNORE_INDEX in labels and not reader.frame.search(verifier.text(ids)) for ids, labels in sequences)
    if not any(read) and all(foreign):  # they have prompts, but nothing that the template writes between two messages
        report.findings.insert(0, Finding("error", "unlike inference", len(sequences), [], OTHER_TEMPLATE))
    return report


def _cut_back(sequence: Labelled, max_length: int | None) -> Labelled:
    """A turn that `max_length` cuts off has no end to verify: it is left out."""
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
        self._signs = {*verifier.signs.values()}
        for begins, end, prompt in product(((), ("system",)), range(2, 6), (False, True)):
            with suppress(TemplateError):
                self._learn((*begins, *("user", "assistant") * 2)[:end], prompt)
        frames = sorted(map(re.escape, self._between), key=len, reverse=True)
        self.frame = re.compile(f"({'|'.join(frames) or r'(?!)'})")

    def _learn(self, roles: Sequence[str], prompt: bool) -> None:
        messages = [{"role": role, "content": f"Qux{n}z"} for n, role in enumerate(roles)]
        text = self.verifier.render(messages, None, {}, prompt=prompt)
        head, *parts = re.split(r"Qux\dz", self.verifier.text(self.verifier.ids([text])[0]))
        if len(parts) != len(roles):
            return
        self._heads.setdefault(head, roles[0])
        # A generation prompt begins an answer
        following = [*roles[1:], *["assistant"] * (prompt and roles[-1] == "user")]
        self._between |= {part: role for part, role in zip(parts, following, strict=False) if part.strip()}
        if not prompt and roles[-1] == "assistant":
            self._tails.add(parts[-1])

    def read(self, ids: list[int]) -> list[Message]:
        """The messages; none if this is no conversation as the template writes it."""
        text = self.verifier.text(ids)
        if (head := self._head(text)) is None:
            return []
        first, *parts = self.frame.split(text[head[1] :])
        pairs = zip(parts[::2], parts[1::2], strict=True)
        messages = [{"role": head[0], "content": first}]
        messages += [{"role": self._between[frame], "content": content} for frame, content in pairs]
        if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""}:
            messages.pop()  # a template that always opens the next answer
        if messages[-1]["role"] == "assistant":
            messages[-1]["content"] = self._without_tail(messages[-1]["content"])
        markup = {self.verifier.signs[self.verifier.controls[m]] for m in MARKUP if m in self.verifier.controls}
        for message in messages:  # a call in the template's own tokens, or something that is no message
            if (self._signs - (markup if message["role"] == "assistant" else set())) & {*message["content"]}:
                return []
        return [{**message, "content": self.verifier.spell(message["content"])} for message in messages]

    def _head(self, text: str) -> tuple[str, int] | None:
        """Role of the first message and where it begins; also where the BOS token is missing or stands twice."""
        for head in sorted(self._heads, key=len, reverse=True):
            for begins in (head, text[:1] + head, *(head[cut:] for cut in range(1, len(head)))):
                if {*begins} & self._signs and text.startswith(begins):
                    return self._heads[head], len(begins)
        return (self._heads[""], 0) if "" in self._heads else None

    def _without_tail(self, content: str) -> str:
        """The last answer up to its end, whatever follows that."""
        at = [content.index(end) for end in {*"".join(self._tails)} & self._signs if end in content]
        tail = max((tail for tail in self._tails if content.endswith(tail)), key=len, default="")
        return content[: min(at, default=len(content) - len(tail))]


def _rows_of(read: list[list[Message]], path: str) -> Iterator[dict[str, Any]]:
    """The raw row of each conversation that was read back: that which shares most texts with it, else the n-th."""
    from ma_sft.data.mixture import load_mixture

    rows, by_text = load_mixture([path]).train, dict[str, list[int]]()
    for n, row in enumerate(rows):
        for message in row["messages"]:
            by_text.setdefault(_squeeze(message["content"]), []).append(n)
    for n, messages in enumerate(read):
        shared = Counter(row for m in messages for row in by_text.get(_squeeze(m["content"]), []))
        yield rows[max(shared, key=lambda row: (shared[row], row == n), default=min(n, len(rows) - 1))]


def _squeeze(text: str | None) -> str:
    return "".join((text or "").split())
