"""Held-out answers: generate them in batches, see whether they stop by themselves, compare them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ma_sft.template import ChatEncoder, Message


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text, and whether it ended with an end-of-turn token rather than at the limit."""

    text: str
    stopped: bool


@dataclass(frozen=True)
class Score:
    """Shares of a set of answers, each in [0, 1]."""

    exact_match: float
    eos_rate: float


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a turn: the chat template's end-of-turn token (EOS without a template) and the model's own."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    end = ChatEncoder(tokenizer).end_token_id if tokenizer.chat_template else tokenizer.eos_token_id
    return list(dict.fromkeys([end, *own]))


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[list[Message]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    desc: str = "generating",
) -> list[Answer]:
    """Greedy answers to the conversations in `prompts`, in their order.

    Prompts are encoded as training encodes them, sorted by length and padded on the left.
    """
    ends = end_token_ids(model, encoder.tokenizer)
    ids = [encoder.encode_prompt(messages) for messages in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    answers: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    with tqdm(total=len(ids), desc=desc) as bar:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            width = len(ids[chunk[0]])
            rows = [[ends[0]] * (width - len(ids[i])) + ids[i] for i in chunk]
            mask = [[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chunk]
            output: list[list[int]] = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0],
            )[:, width:].tolist()
            for i, row in zip(chunk, output, strict=True):
                end = next((at for at, token in enumerate(row) if token in ends), None)
                text = str(encoder.tokenizer.decode(row[:end], skip_special_tokens=True))
                answers[i] = Answer(text, end is not None)
            bar.update(len(chunk))
    model.train(was_training)
    return [answers[i] for i in range(len(ids))]


def exact_match(answer: str, reference: str) -> bool:
    """Whether two answers are the same: as JSON values if the reference is JSON, else as stripped text."""
    expected, found = _as_json(reference), _as_json(answer)
    return bool(expected == found if expected is not None else answer.strip() == reference.strip())


def score(answers: Sequence[Answer], references: Sequence[str]) -> Score:
    """Share of exact matches and of answers that stopped by themselves."""
    matches = [exact_match(a.text, r) for a, r in zip(answers, references, strict=True)]
    return Score(sum(matches) / len(matches), sum(a.stopped for a in answers) / len(answers))


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
