"""The check finds each way in which labels go wrong, and the preview shows it."""

import json
import re

import numpy as np
import pytest
from datasets import Dataset
from helpers import TOKENIZERS, assistant, load_tokenizer, system, user, write_rows
from rich.console import Console

from ma_sft import DataCollatorForCompletionOnlyLM, LabelError, Recipe
from ma_sft.labels import check as check_module
from ma_sft.labels.check import AT_RANDOM, BY_SHAPE, EACH_SHAPE, check_dataset, draw_sample
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.labels.preview import pieces, preview_text
from ma_sft.labels.templates import load_tokenizer as load_recipes_tokenizer
from ma_sft.labels.tokenize import label
from ma_sft.packing.truncation import truncate
from ma_sft.pages.preview import preview_html
from ma_sft.training.prepare import check_as_trained

CHATS = [
    ("Hi", "Hello! 你好😀"),
    ("1+1?", "2", "2+2?", "4"),
    ("What is <|im_end|> or </s>?", "A token\nor two."),
]


def chat(*texts: str) -> list[dict[str, object]]:
    return [(user, assistant)[n % 2](text) for n, text in enumerate(texts)]


def labelled(name: str, **settings) -> tuple[Dataset, Dataset, ChatEncoder]:
    encoder = ChatEncoder(load_tokenizer(name), **settings)
    conversations = Dataset.from_dict({"messages": [chat(*texts) for texts in CHATS]})
    return tokenised(encoder, conversations), conversations, encoder


def tokenised(encoder: ChatEncoder, conversations: Dataset) -> Dataset:
    # Without a fingerprint `datasets` would pickle the whole vocabulary to make one
    settings = {"batched": True, "with_indices": True, "new_fingerprint": "tokenised"}
    return conversations.map(encoder.tokenize_batch, remove_columns=conversations.column_names, **settings)


def test_several_processes_find_what_one_finds():
    encoder = ChatEncoder(load_tokenizer("smollm2"))
    conversations = Dataset.from_list([{"messages": chat(f"q{n}", f"a{n}"), "origin": f"line {n}"} for n in range(250)])
    wrong = broken(tokenised(encoder, conversations), 170, without_a_token)
    tokenizer = encoder.tokenizer
    one, two = (check_dataset(wrong, tokenizer, conversations=conversations, num_proc=n).to_json() for n in (1, 2))
    assert one == two and "line 170: " in one and json.loads(one)["verified_rows"] == 250


def codes(findings) -> set[str]:
    return {finding.code for finding in findings}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_right_labels_pass_and_are_counted(name):
    rows, conversations, encoder = labelled(name)
    report = check_dataset(rows, encoder.tokenizer, conversations=conversations)
    assert report.errors == [] and report.mismatches == 0
    assert report.rows == len(rows) and report.turns == report.compared_turns == sum(rows["turns"])
    assert report.tokens == sum(map(len, rows["input_ids"]))
    assert report.trained_tokens == sum(label != -100 for row in rows["labels"] for label in row)
    assert sum(report.histogram.values()) == report.rows
    data = json.loads(report.to_json())
    assert data["ok"] is True and data["rows"] == len(rows) and 0 < data["trained_share"] < 1


def broken(rows: Dataset, row: int, change) -> Dataset:
    """The rows with one of them changed; `change` takes ids and labels and gives both."""
    columns = rows.select_columns(["input_ids", "labels"]).to_dict()
    columns["input_ids"][row], columns["labels"][row] = change(columns["input_ids"][row], columns["labels"][row])
    return Dataset.from_dict(columns)


def without_a_token(ids, labels):
    return ids[:4] + ids[5:], labels[:4] + labels[5:]


@pytest.mark.parametrize(
    ("name", "code", "change", "words"),
    [
        ("smollm2", "no labels", lambda ids, labels: (ids, [-100] * len(ids)), ()),
        ("smollm2", "foreign labels", lambda ids, labels: (ids, [*labels[1:], -100]), ()),
        ("smollm2", "missing end token", lambda ids, labels: (ids[:-2], labels[:-2]), ()),
        ("smollm2", "unlike inference", without_a_token, ()),
        ("llama3", "double BOS", lambda ids, labels: ([ids[0], *ids], [-100, *labels]), ()),
        # The first differing token is shown
        ("qwen3", "unlike inference", lambda ids, labels: ([*ids[:1], 12, *ids[2:]], labels), ("token 1", "'user'")),
    ],
)
def test_each_wrong_row_is_an_error_with_its_number(name, code, change, words):
    rows, conversations, encoder = labelled(name)
    report = check_dataset(broken(rows, 1, change), encoder.tokenizer, conversations=conversations)
    (finding,) = [finding for finding in report.errors if finding.code == code]
    assert finding.rows == [1] and all(each in finding.message for each in (*words, *["(12)"] * bool(words)))
    with pytest.raises(LabelError, match=code):
        report.raise_errors()
    assert json.loads(report.to_json())["ok"] is False


def kept(lengths: list[int], limit: int, overflow: str = "cut"):
    """What packing's policy leaves of rows of these lengths, by itself."""
    return truncate(np.array(lengths), lambda row: [], limit, overflow)


def test_what_max_length_cuts_is_a_warning_until_nothing_is_left():
    rows, _, encoder = labelled("smollm2")
    lengths = [len(ids) for ids in rows["input_ids"]]
    longest = int(np.argmax(lengths))
    limit = lengths[longest] - 2
    report = check_dataset(rows, encoder.tokenizer, max_length=limit, kept=kept(lengths, limit))
    assert (report.cut_rows, report.cut_turns, report.lost_rows) == (sum(n > limit for n in lengths), 1, 0)
    assert report.errors == []
    assert next(f for f in report.warnings if f.code == "cut turns").rows == [longest]
    report = check_dataset(rows, encoder.tokenizer, max_length=3, kept=kept(lengths, 3))
    assert report.lost_rows == len(rows) and codes(report.errors) == {"nothing to train"}


def check_recipe(folder, rows, **recipe):
    """The check of a recipe's rows, as `ma-sft check` runs it."""
    path = write_rows(folder / "rows.jsonl", rows)
    settings = Recipe(dataset_name=path, use_cpu=True, **recipe).resolve()
    tokenizer, _ = load_recipes_tokenizer(settings)
    return check_as_trained(settings, tokenizer, label(settings, tokenizer))


@pytest.mark.parametrize(
    ("settings", "codes"),
    [
        ({"overflow": "cut"}, {"nothing to train"}),
        ({"overflow": "drop"}, {"nothing to train"}),
        *(({"overflow": overflow}, set()) for overflow in ("keep_answer", "keep_end", "split")),
        ({"truncation_mode": "keep_end"}, set()),
        ({"packing": True, "packing_strategy": "bfd_split", "padding_free": True}, set()),
    ],
)
def test_a_prompt_longer_than_max_length_is_counted_as_it_is_trained(tmp_path, smollm2, settings, codes):
    row = {"messages": chat("why? " * 100, "So.")}
    report = check_recipe(tmp_path, [row], model_name_or_path=str(smollm2), max_length=64, **settings)
    assert {finding.code for finding in report.errors} == codes
    if not codes:
        assert (report.turns, report.lost_rows, report.cut_turns, report.proven_turns) == (1, 0, 0, 1)
        assert report.trained_tokens == 3


def test_a_finding_names_lines_of_the_file_though_rows_are_shuffled(tmp_path, smollm2):
    rows = [{"messages": chat(f"q{n}", f"a{n}")} for n in range(40)]
    rows[6]["messages"] = chat("q", "a", "and?")
    rows[29]["messages"] = chat("q", "a", "and then?")
    report = check_recipe(tmp_path, rows, model_name_or_path=str(smollm2))
    (finding,) = [finding for finding in report.warnings if finding.code == "unanswered question"]
    assert {*finding.places} == {f"{tmp_path}/rows.jsonl:{line}" for line in (7, 30)} and finding.rows != [6, 29]
    assert finding.count == 2 and "rows.jsonl:7" in str(finding) and "rows.jsonl:30" in str(finding)
    assert json.loads(report.to_json())["findings"][-1]["places"] == finding.places


def shown(what) -> str:
    console = Console(force_terminal=True, width=200, color_system="standard", legacy_windows=False)
    with console.capture() as capture:
        console.print(what)
    return capture.get().rstrip()


def test_the_verdict_says_what_was_proven_and_what_was_not(smollm2):
    rows, conversations, encoder = labelled("smollm2")
    tokenizer, lengths = encoder.tokenizer, [len(ids) for ids in rows["input_ids"]]

    def said(conversations=conversations, **settings):
        report = check_dataset(rows, tokenizer, conversations=conversations, **settings)
        return report.verdict, shown(report).splitlines()[-1]

    verdict, line = said()
    assert verdict == "every label is right: all 3 rows were verified" and "\x1b[32m" in line
    verdict, line = said(kept=kept(lengths, max(lengths) - 2))
    assert "right, but turns lose their end (1): all 3 rows" in verdict and "\x1b[33m" in line
    verdict, _ = said(kept=kept(lengths, sorted(lengths)[1], "drop"))
    assert verdict == "every label is right: all 2 rows were verified"  # those that are trained
    verdict, line = said(conversations.select([0, 0, 0]), sample=None)
    assert verdict == "labels are wrong" and "\x1b[1;31m" in line
    assert "not proven: no row was verified" in said(None)[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [("smollm2", "'You are a helpful AI assistant named SmolLM"), ("gptoss", "'You are ChatGPT, a"), ("qwen3", None)],
)
def test_text_that_the_template_writes_by_itself_is_said_once(name, text):
    tokenizer = load_tokenizer(name)
    chats = [chat("Hi", "Hello"), [system("Be brief."), *chat("a", "b")], chat("c", "d")]
    conversations = Dataset.from_dict({"messages": chats})
    rows = tokenised(ChatEncoder(tokenizer), conversations)
    warnings = check_dataset(rows, tokenizer, conversations=conversations).warnings
    found = [finding for finding in warnings if finding.code == "default system prompt"]
    assert [(finding.count, finding.rows) for finding in found] == ([(2, [0, 2])] if text else [])
    assert all(text in finding.message and finding.message.count("You are") == 1 for finding in found)


def test_duplicates_special_text_and_turns_without_label_are_warnings():
    rows, _, encoder = labelled("qwen3", history="mask")
    columns = rows.to_dict()
    twice = Dataset.from_dict({key: values + values[:1] for key, values in columns.items()})
    twice = twice.map(lambda row, i: {"untrained": ["rewritten"] if i == 1 else []}, with_indices=True)
    report = check_dataset(twice, encoder.tokenizer)
    assert report.errors == [] and report.duplicate_rows == 1 and report.special_text == {"<|im_end|>": 1}
    assert report.untrained_turns == {"rewritten": 1}
    assert codes(report.warnings) == {"duplicate rows", "special-token text", "untrained turns"}


def test_the_collators_report_becomes_findings():
    tokenizer = load_tokenizer("smollm2")
    collator = DataCollatorForCompletionOnlyLM("###Answer:", tokenizer=tokenizer, on_missing="mask")
    texts = ["###Question: a\n###Answer: b", "###Question: a\n### Answer: b"]
    ids = [[*tokenizer(t)["input_ids"], tokenizer.eos_token_id] for t in texts]
    with pytest.warns(UserWarning):
        rows = Dataset.from_dict({"input_ids": ids, "labels": [collator.labels_for(row) for row in ids]})
    for place, columns in (("row 1", rows), ("texts.csv:7", rows.add_column("origin", ["texts.csv:3", "texts.csv:7"]))):
        report = check_dataset(columns, tokenizer, template_report=collator.check(rows))
        (finding,) = [f for f in report.errors if f.code == "response template missing"]
        assert (finding.rows, finding.places) == ([1], [place]) and f"{place}: response_template" in finding.message
        assert "did you mean response_template='### Answer:'" in finding.message


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_the_row_cut_up(name):
    rows, _, encoder = labelled(name)
    for row in rows:
        shown = pieces(row["input_ids"], row["labels"], encoder.tokenizer)
        assert [i for piece in shown for i in piece.ids] == row["input_ids"]
        on = [label != -100 for label in row["labels"]]
        assert [piece.trained for piece in shown for _ in piece.ids] == on
    text = "".join(p.text for p in pieces(rows[0]["input_ids"], rows[0]["labels"], encoder.tokenizer) if p.trained)
    assert "Hello! 你好😀" in text and "\ufffd" not in text


def test_html_shows_trained_text_boxes_control_tokens_and_escapes():
    tokenizer = load_tokenizer("smollm2")
    (example,) = ChatEncoder(tokenizer).encode([chat("<script>alert(1)</script>", "<b>no</b>")])[0]
    page = preview_html([{"input_ids": example.input_ids, "labels": example.labels}], tokenizer, title="a & b")
    body = page[page.index("<pre ") :]
    assert "<script" not in page and "<b>" not in page and "a &amp; b" in page
    assert "http" not in page.replace("http-equiv", "") and "src=" not in page and "prefers-color-scheme" in page
    spans = re.findall(r'<span(?: class="([tc ]+)")? title="[\d, ]+">([^<]*)</span>', body)
    assert "".join(text for kind, text in spans if "t" in kind) == "&lt;b&gt;no&lt;/b&gt;&lt;|im_end|&gt;"
    assert [kind for kind, text in spans if text == "&lt;|im_end|&gt;"] == ["c", "c", "t c"]


def test_terminal_marks_trained_tokens_and_takes_no_escapes_from_data():
    tokenizer = load_tokenizer("smollm2")
    (example,) = ChatEncoder(tokenizer).encode([chat("\x1b[31mred", "fine")])[0]
    rows = [{"input_ids": example.input_ids, "labels": example.labels}]
    output = shown(preview_text(rows, tokenizer, borders=True))
    assert "\x1b[31mred" not in output and "│" in output
    assert re.search(r"\x1b\[1;32mfine", output) and re.search(r"\x1b\[2mred", output)


def test_a_sample_is_not_called_every_label_and_finds_a_row_that_ends_unlike_all_others(monkeypatch):
    tokenizer, odd = load_tokenizer("smollm2"), 151
    chats = [chat(f"q{n}", f"a{n}") for n in range(300)]
    ids = [tokenizer.apply_chat_template(turns, return_dict=False) for turns in chats]
    at = [len(tokenizer.apply_chat_template(c[:1], add_generation_prompt=True, return_dict=False)) for c in chats]

    def checked(at, shapes=None, **settings):
        labels = [[-100] * begin + row[begin:-1] + [-100] for row, begin in zip(ids, at, strict=True)]
        rows = Dataset.from_dict({"input_ids": ids, "labels": labels, **({"shape": shapes} if shapes else {})})
        return check_dataset(rows, tokenizer, conversations=Dataset.from_dict({"messages": chats}), **settings)

    assert checked(at).verdict.startswith("every label is right: all 300")
    report = checked(at, sample=10)
    assert report.proven and report.verdict == f"no wrong label was found: {report.verified}"
    assert 10 <= report.verified_rows < 20 and report.verified.endswith("--all verifies every row")
    assert report.verified.startswith(f"{report.verified_rows} of 300 rows were verified: 10 at random, and of 1 of 1")
    at[odd] -= 2  # the header is trained
    report = checked(at, sample=10)
    assert 11 <= report.verified_rows <= 20 and "of 2 of 2 shapes up to 5 each" in report.verified
    (finding,) = report.errors
    assert finding.code == "unlike inference" and finding.rows == [odd]
    monkeypatch.setattr(check_module, "BY_SHAPE", 5)
    report = checked(at, [str(n) for n in range(300)], sample=10)  # as where each conversation has many calls
    assert f"10 at random, and of {report.verified_rows} of 300 shapes up to 5 each" in report.verified


def test_every_shape_stands_in_the_sample_and_no_more_of_it_than_it_lacks():
    shapes = np.repeat(np.arange(4, dtype=np.uint64), [50_000, 100, 30, 3])
    chosen = draw_sample(shapes, 1_000)
    counts = np.bincount(shapes[chosen].astype(int))
    assert (counts[1:] >= [EACH_SHAPE, EACH_SHAPE, 3]).all() and counts[3] == 3
    assert 1_000 <= len(chosen) <= 1_000 + 3 * EACH_SHAPE + 3
    assert draw_sample(shapes, 1_000).tolist() == chosen.tolist() and (np.diff(chosen) > 0).all()
    assert len(draw_sample(np.arange(20_000, dtype=np.uint64), 1_000)) <= BY_SHAPE + 1_000  # each of its own shape


def test_a_fault_in_half_a_percent_of_rows_is_in_the_sample_with_99_percent():
    found = [bool((draw_sample(np.zeros(20_000, dtype=np.uint64), AT_RANDOM) % 200 == k).any()) for k in range(200)]
    assert sum(found) >= 196
