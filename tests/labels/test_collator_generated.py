"""Labels of 2,184 generated rows against labels known by construction: which characters, or ids, are answers.

The generator puts a row together from parts and notes which are answers; nothing of ma_sft is asked. A row is either
text that is tokenised whole, so that a border may lie inside a token, or the ids of its parts one after another.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any

import pytest
from helpers import load_tokenizer
from transformers import PreTrainedTokenizerBase

from ma_sft import DataCollatorForCompletionOnlyLM

ROWS = 28  # of each tokenizer, pair of templates, kind of row, with instructions and without
IGNORED = -100

# Response template, instruction template, and what stands before either. `{control}` is a control token.
PAIRS = [
    ("### Assistant:", "### Human:", "\n"),
    ("### Assistant:", "### Human:", " "),
    ("###Answer:", "###Question:", "\n"),
    ("\n### Assistant:", "\n### Human:", ""),
    ("\n#ASSISTANT:\n", "\n#USER:\n", ""),
    ("[/INST]", "[INST]", " "),
    ("{control}assistant\n", "{control}user\n", "\n"),
]
CONTROL = {"smollm2": "<|im_start|>", "qwen3": "<|im_start|>", "llama2": "<s>"}
TEMPLATES = ("response", "instruction")
CONTENT = (
    "Hi", "why?", "2 + 2 = 4.", "def f(x):\n    return x", "回答：好的。", "naïve", "😀", "# Title\n", "- a\n- b", ":",
    "### Summary\n", "#### Assistant: no", "### assistant:", "# ### #", "```\ncode\n```", "a\n\n\nb", "  two  ", "\t",
)  # fmt: skip
LEADS = ("", " ", " ", " ", "  ", "\n", "\n\n", " \n")  # before an answer
EMPTY = ("", "  ", "\n")  # answers (one space is sentencepiece's own before a template, and nobody's)
QUOTES = ('say "{}" now', "say {} now", "x{}", 'what is "{}"?', "see\n{}\nthere", "see\n{} there")


@dataclass
class Row:
    """Parts of a row with their kinds (those of TEMPLATES, "answer", ""), then its tokens with theirs.

    Attributes:
        quotes: a template stands in a question or an answer.
        several_readings: it stands where a person could not tell either that it is quoted.
    """

    parts: list[tuple[str, str]]
    quotes: bool = False
    several_readings: bool = False
    ids: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def runs(self) -> list[tuple[str, int, int]]:
        """(kind, begin, end) of the neighbouring tokens of one kind."""
        lengths = [(kind, len([*run])) for kind, run in groupby(self.kinds)]
        ends = accumulate(length for _, length in lengths)
        return [(kind, end - length, end) for (kind, length), end in zip(lengths, ends, strict=True)]

    def labels(self) -> list[int]:
        return [i if kind == "answer" else IGNORED for i, kind in zip(self.ids, self.kinds, strict=True)]


def content(rng: random.Random) -> str:
    return rng.choice([" ", "\n", ""]).join(rng.choices(CONTENT, k=rng.randint(1, 3)))


def make_row(rng: random.Random, pair: tuple[str, str, str], turns: int) -> Row:
    response, instruction, before = pair
    row = Row([])

    def quote() -> str:
        if rng.random() > 0.15:
            return ""
        how, quoted = rng.choice(QUOTES), rng.choice([response, instruction])
        row.quotes = True
        row.several_readings |= quoted[0] == "\n" or how.startswith("see") or before == " "
        return how.format(quoted)

    for turn in range(turns):
        answer = rng.choice(LEADS) + content(rng) if rng.random() < 0.8 else rng.choice(EMPTY)
        row.parts += [
            (instruction, "instruction"),
            (f" {content(rng)}{quote()}{before}", ""),
            (response, "response"),
            # Without an end token, an answer goes on to the next instruction
            (answer + quote() + (before if turn < turns - 1 else ""), "answer"),
        ]
    return row


def encode_text(tokenizer: PreTrainedTokenizerBase, row: Row) -> Row:
    """Tokenise the text whole; a border's token is the answer's if it has only white space of the template."""
    text = "".join(part for part, _ in row.parts)
    kinds = [kind for part, kind in row.parts for _ in part]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    row.ids = list(encoded["input_ids"])
    for begin, end in encoded["offset_mapping"]:
        while kinds[begin] == "response" and text[begin].isspace() and kinds[end - 1] == "answer":
            begin += 1
        row.kinds.append(kinds[begin] if len(set(kinds[begin:end])) == 1 else "")
    return row


def encode_parts(tokenizer: PreTrainedTokenizerBase, row: Row) -> Row:
    """Tokenise each part by itself; only templates hold control tokens."""
    for part, kind in row.parts:
        ids = tokenizer(part, add_special_tokens=False, split_special_tokens=kind not in TEMPLATES)["input_ids"]
        row.ids += ids
        row.kinds += [kind] * len(ids)
    return row


def may_end_at(tokenizer: PreTrainedTokenizerBase, row: Row, end: int, instruction: str) -> bool:
    """Whether a row without its end token can be told from one that was cut off in the next instruction."""
    text = tokenizer.decode(row.ids[:end])
    begun = any(text.endswith(instruction[:length]) for length in range(1, len(instruction)))
    seen = row.kinds[end - 1] == "instruction" and not text[-1].isspace()
    return not row.several_readings and (seen or not begun)


def generate(
    rng: random.Random,
    tokenizer: PreTrainedTokenizerBase,
    pair: tuple[str, str, str],
    encode: Callable[[PreTrainedTokenizerBase, Row], Row],
    *,
    conversations: bool,
) -> Row:
    row = make_row(rng, pair, rng.randint(1, 4) if conversations else 1)
    control = pair[0].startswith(tuple(CONTROL.values()))
    if control:  # text spells no control token, so nothing is quoted
        row.quotes = row.several_readings = False
    if not conversations:  # the instruction is whatever text stands there
        row.parts[0] = (rng.choice(["", "Below is a task.\n\n### Task:"]), "")
    encode(tokenizer, row)
    if encode is encode_parts and "▁" in tokenizer.convert_ids_to_tokens(row.ids[:1])[0]:
        row.several_readings |= row.quotes  # sentencepiece begins each part with a space, so none begins a line
    # A quotation before the first response is told by that response
    answers = [begin for kind, begin, _ in row.runs() if kind == "answer"]
    end = rng.randint(answers[0] + 1 if row.quotes and answers else 1, len(row.ids))
    end = end if rng.random() < 0.2 else len(row.ids)
    if rng.random() < 0.3 and may_end_at(tokenizer, row, end, pair[1]):
        row.ids, row.kinds = row.ids[:end], row.kinds[:end]
    else:
        row.ids.append(tokenizer.eos_token_id)
        row.kinds.append("answer")
    return row


def given_as_ids(row: Row, template: dict[str, list[int]]) -> Row | None:
    """The row where templates are given as ids; None if it has others in some place, but for what begins the row.

    A token with the end of an answer and the beginning of an instruction is no part of those ids, but the answer's.
    """
    kinds, found = list(row.kinds), []
    for kind, begin, end in row.runs():
        if kind in TEMPLATES and begin:
            found.append(kind)
            if row.ids[begin:end] != template[kind]:
                return None
            if kind == "instruction" and kinds[begin - 1] == "" and kinds[begin - 2] == "answer":
                kinds[begin - 1] = "answer"
    return replace(row, kinds=kinds) if {*found} == {kind for _, kind in row.parts} & {*TEMPLATES} else None


def ids_in_context(
    tokenizer: PreTrainedTokenizerBase, pair: tuple[str, str, str], encode: Callable[..., Row]
) -> dict[str, list[int]]:
    """The ids that the templates have in the middle of a row, which is how a script of TRL 0.x finds them."""
    parts = [("Hi" + pair[2], ""), (pair[0], "response"), (f" Hi{pair[2]}", ""), (pair[1], "instruction"), (" Hi", "")]
    row = encode(tokenizer, Row(parts))
    return {kind: row.ids[begin:end] for kind, begin, end in row.runs() if kind}


@pytest.mark.filterwarnings("ignore:row")
@pytest.mark.parametrize("conversations", [True, False])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: repr(pair[0] + pair[2]))
@pytest.mark.parametrize("name", CONTROL)
def test_no_generated_row_is_labelled_wrong(name, pair, conversations):
    tokenizer, rng = load_tokenizer(name), random.Random(f"{name} {pair} {conversations}")
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    control = pair[0].startswith("{control}")
    pair = tuple(part.format(control=CONTROL[name]) for part in pair)
    as_ids = 0
    for encode in (encode_parts,) if control else (encode_text, encode_parts):
        rows = [generate(rng, tokenizer, pair, encode, conversations=conversations) for _ in range(ROWS)]
        compare(tokenizer, rows, pair[0], pair[1] if conversations else None)
        if encode is encode_text and pair[2] == " ":  # which is a part of the template's first token
            continue
        template = ids_in_context(tokenizer, pair, encode)
        rows = [found for row in rows if (found := given_as_ids(row, template))]
        compare(tokenizer, rows, template["response"], template["instruction"] if conversations else None)
        as_ids += len(rows)
    assert as_ids


def compare(tokenizer: PreTrainedTokenizerBase, rows: list[Row], response: Any, instruction: Any) -> None:
    """The labels of a batch must be right, or the row one that a person could misread too, and reported."""
    if not rows:
        return
    collator = DataCollatorForCompletionOnlyLM(response, instruction, tokenizer=tokenizer, on_missing="mask")
    batch = collator([{"input_ids": row.ids} for row in rows])["labels"].tolist()
    for row, labels in zip(rows, batch, strict=True):
        expected, report = row.labels(), collator.check([{"input_ids": row.ids}])
        assert set(labels[len(row.ids) :]) <= {IGNORED}
        if not (row.quotes and (report.ambiguous or not report.ok)):
            assert labels[: len(row.ids)] == expected, tokenizer.decode(row.ids)
            assert report.ok == (set(expected) != {IGNORED})
