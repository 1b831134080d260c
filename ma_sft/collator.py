"""Response-only labels from token ids alone, for text that a `formatting_func` made.

`DataCollatorForCompletionOnlyLM` as TRL 0.x had it, with what went wrong there made right: the template's ids are
looked up as the tokenizer really writes them in context, a row without a match is an error instead of a warning and
an untrained row, and the end-of-turn token is trained even where it is the pad token.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from ma_sft.errors import RecipeError, ResponseTemplateError

# What may stand before and after a template: enough to meet each way in which its first and last token can merge.
_BEFORE = ("", "\n", " ", "a", "a\n", "a ", "1\n", ".", ".\n", "。", "。\n", "?\n", "\n\n")
_AFTER = ("", " ", " a", "a", "\n", "1", " 1", "中", " {", "{")


class DataCollatorForCompletionOnlyLM(DataCollatorForLanguageModeling):
    """Pads a batch and masks everything but the responses.

    Args:
        response_template: text or ids that begin a response. Labels start right after it.
        instruction_template: text or ids that begin a user turn; needed to train every turn of a conversation.
            Without it, labels start after the last response template of the row.
        mlm: kept for old scripts; must be False.
        ignore_index: the label of what is not trained.
        padding_free: concatenate the rows to one of shape (1, n_tokens) with `position_ids` that restart.
        on_missing: a row without the template is an error (`"raise"`), or wholly masked and counted in `missing`
            (`"mask"`, TRL 0.x's behaviour).
        tokenizer, pad_to_multiple_of, ...: as in `transformers.DataCollatorForLanguageModeling`.

    Differs from TRL 0.x: ids that a text template has in context are all looked for, not only those of the bare
    text; a row without a match raises `ResponseTemplateError`; padding is told by length, so an end token whose id is
    also the pad token's keeps its label.
    """

    def __init__(
        self,
        response_template: str | list[int],
        instruction_template: str | list[int] | None = None,
        *args: Any,
        mlm: bool = False,
        ignore_index: int = -100,
        padding_free: bool = False,
        on_missing: str = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **{**kwargs, "mlm": False})
        if mlm:
            raise RecipeError("mlm: response-only training is causal; leave mlm=False")
        if on_missing not in ("raise", "mask"):
            raise RecipeError(f"on_missing: 'raise' or 'mask' expected, found {on_missing!r}")
        self.response_template = response_template
        self.instruction_template = instruction_template
        self.ignore_index = ignore_index
        self.padding_free = padding_free
        self.on_missing = on_missing
        self.missing = 0
        self._response_ids = encodings_in_context(response_template, self.tokenizer)
        self._instruction_ids = (
            None if instruction_template is None else encodings_in_context(instruction_template, self.tokenizer)
        )

    def labels_for(self, input_ids: Sequence[int], *, index: int | None = None) -> list[int]:
        """Labels of one row of ids: the ids of the responses, `ignore_index` elsewhere.

        Args:
            input_ids: ids without padding, n_tokens of them.
            index: the row's number, for the error.

        Raises:
            ResponseTemplateError: no response template in the row, and `on_missing="raise"`.
        """
        ids = np.asarray(input_ids)
        responses = find(ids, self._response_ids)
        labels = np.full(len(ids), self.ignore_index)
        if not responses:
            if self.on_missing == "raise":
                raise ResponseTemplateError(self._explain(ids, index))
            self.missing += 1
            return list(labels.tolist())
        if self._instruction_ids is None:
            start = responses[-1][1]
            labels[start:] = ids[start:]
            return list(labels.tolist())
        instructions = [begin for begin, _ in find(ids, self._instruction_ids)]
        for _, start in responses:
            end = next((begin for begin in instructions if begin >= start), len(ids))
            labels[start:end] = ids[start:end]
        return list(labels.tolist())

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """A padded batch: `input_ids`, `attention_mask`, `labels`, each int64 of shape (batch, n_tokens)."""
        rows = [e["input_ids"] if isinstance(e, dict) or hasattr(e, "keys") else e for e in examples]
        rows = [row.tolist() if isinstance(row, torch.Tensor | np.ndarray) else list(row) for row in rows]
        labels = [self.labels_for(row, index=index) for index, row in enumerate(rows)]
        if self.padding_free:
            return {
                "input_ids": torch.tensor([[i for row in rows for i in row]]),
                "labels": torch.tensor(
                    [[self.ignore_index if at == 0 else i for row in labels for at, i in enumerate(row)]]
                ),
                "position_ids": torch.tensor([[at for row in rows for at in range(len(row))]]),
            }
        batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt", pad_to_multiple_of=self.pad_to_multiple_of)
        padded = torch.full_like(batch["input_ids"], self.ignore_index)
        padded[batch["attention_mask"].bool()] = torch.tensor([i for row in labels for i in row])
        return {**batch, "labels": padded}

    def _explain(self, ids: np.ndarray, index: int | None) -> str:
        where = "the row" if index is None else f"row {index}"
        wanted = " or ".join(str(list(c)) for c in self._response_ids[:3])
        nearest, at = max(
            (
                (sum(a == b for a, b in zip(c, ids[i:], strict=False)) / len(c), i)
                for c in self._response_ids
                for i in range(len(ids))
            ),
            default=(0, 0),
        )
        around = ids[max(0, at - 2) : at + len(self._response_ids[0]) + 2].tolist()
        text = repr(self.tokenizer.decode(around))
        return (
            f"{where}: the response template {self.response_template!r} (ids {wanted}) is not in its {len(ids)} "
            f"tokens; nearest ({nearest:.0%} alike): {around} = {text}; give response_template as the ids that stand "
            "there, raise max_length if it was cut off, or pass on_missing='mask' to leave such rows untrained"
        )


def encodings_in_context(template: str | list[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """The id sequences as which a template can stand in a text, the longest first.

    A text's first and last characters can merge with what stands around it, so the ids of the bare text may never
    occur (`"\\n###Answer:"` in a Llama text, for one). Here the text is encoded in many surroundings, and the tokens
    that lie wholly inside it are kept if they carry all of it but white space at its ends.

    Raises:
        ResponseTemplateError: an empty template.
    """
    if not isinstance(template, str):
        if not len(template):
            raise ResponseTemplateError("the response template has no ids")
        return [tuple(int(i) for i in template)]
    if not template.strip():
        raise ResponseTemplateError("the response template is empty")
    found = {tuple(tokenizer(template, add_special_tokens=False)["input_ids"])}
    core_start = len(template) - len(template.lstrip())
    core_end = len(template.rstrip())
    for before in _BEFORE:
        for after in _AFTER:
            encoded = tokenizer(before + template + after, add_special_tokens=False, return_offsets_mapping=True)
            begin, end = len(before), len(before) + len(template)
            inside = [
                (token, a, b)
                for token, (a, b) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
                if a >= begin and b <= end and b > a
            ]
            if inside and inside[0][1] - begin <= core_start and inside[-1][2] - begin >= core_end:
                found.add(tuple(token for token, _, _ in inside))
    return sorted(found, key=lambda ids: (-len(ids), ids))


def find(ids: np.ndarray, candidates: Iterable[tuple[int, ...]]) -> list[tuple[int, int]]:
    """(begin, end) of each match of any candidate in `ids`, in order; of overlapping ones the first, longest stays."""
    spans = []
    for candidate in candidates:
        n = len(candidate)
        if n <= len(ids):
            windows = np.lib.stride_tricks.sliding_window_view(ids, n)
            spans += [(int(at), int(at) + n) for at in np.flatnonzero((windows == candidate).all(axis=1))]
    spans.sort(key=lambda span: (span[0], -span[1]))
    kept: list[tuple[int, int]] = []
    for span in spans:
        if not kept or span[0] >= kept[-1][1]:
            kept.append(span)
    return kept


def missing_rows(collator: DataCollatorForCompletionOnlyLM, dataset: Iterable[dict[str, Any]]) -> dict[str, list[int]]:
    """Rows by what the collator finds in them: `found`, `not found`, `nothing left to train` (row numbers)."""
    report: dict[str, list[int]] = {"found": [], "not found": [], "nothing left to train": []}
    for index, row in enumerate(dataset):
        try:
            trained = any(
                label != collator.ignore_index for label in collator.labels_for(row["input_ids"], index=index)
            )
            report["found" if trained else "nothing left to train"].append(index)
        except ResponseTemplateError:
            report["not found"].append(index)
    return report
