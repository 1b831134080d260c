"""The response-only collator: the labels of TRL 0.x where it was right, and right labels where it was not."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import TOKENIZERS, assistant, load_tokenizer, user, write_rows
from transformers import PreTrainedTokenizerBase

from ma_sft import DataCollatorForCompletionOnlyLM, Recipe, ResponseTemplateError, tokenize_conversation
from ma_sft.labels.templates import load_tokenizer as load_recipes_tokenizer
from ma_sft.labels.tokenize import check
from ma_sft.labels.tokenize import label as label_rows

# What TRL 0.15.2's own class returned for these rows; `pad` is the pad token that it was given.
GOLDEN = json.loads((Path(__file__).parents[1] / "files" / "trl0_labels.json").read_text(encoding="utf-8"))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def trained(tokenizer: PreTrainedTokenizerBase, labels: list[int]) -> str:
    """Text of the labels; masked stretches are `|`."""
    text, run = "", []
    for label in [*labels, -100]:
        if label != -100:
            run.append(label)
        elif run:
            text, run = text + tokenizer.decode(run) + "|", []
    return text


def collator_for(name, response="###Answer:", instruction=None, **settings):
    tokenizer = load_tokenizer(name)
    return tokenizer, DataCollatorForCompletionOnlyLM(response, instruction, tokenizer=tokenizer, **settings)


def learned(name, text, response="###Answer:", instruction=None):
    """What is trained of a text, which an end token follows."""
    tokenizer, collator = collator_for(name, response, instruction)
    return trained(tokenizer, collator.labels_for(encode(tokenizer, text)))


ASSISTANT, HUMAN = "### Assistant:", "### Human:"
IM = ("<|im_start|>assistant\n", "<|im_start|>user\n")


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['tokenizer']}-{c['case']}")
def test_same_batch_as_trl_0(case):
    tokenizer = load_tokenizer(case["tokenizer"])
    tokenizer.pad_token_id = case["pad"]
    collator = DataCollatorForCompletionOnlyLM(
        case["response"], case["instruction"], tokenizer=tokenizer, padding_free=case["padding_free"]
    )
    batch = collator([{"input_ids": row} for row in case["rows"]])
    assert {k: v.tolist() if torch.is_tensor(v) else v for k, v in batch.items()} == case["batch"]


def test_positional_tokenizer_and_padding_multiple():
    tokenizer, numpy = collator_for("qwen3", return_tensors="np")
    rows = [encode(tokenizer, "###Question: a\n###Answer: b")]
    batch = DataCollatorForCompletionOnlyLM("###Answer:", None, tokenizer, pad_to_multiple_of=16)(rows)
    assert batch["input_ids"].shape == (1, 16) and batch["input_ids"].dtype == torch.int64
    for labels in (batch["labels"], numpy(rows)["labels"]):
        assert trained(tokenizer, labels[0].tolist()) == " b<|im_end|>|"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "template",
    ["###Answer:", "\n###Answer:", "### Answer:", "\n#ASSISTANT:", "### Response:\n", "回答：", "###Answer: "],
)
def test_a_template_is_found_whatever_merged_in_front(name, template):
    tokenizer = load_tokenizer(name)
    collator = DataCollatorForCompletionOnlyLM(template, tokenizer=tokenizer)
    for before in ("Hi", "Hi.", "Hi.\n", "Hi.\n\n", "Hi ", "你好。", "", "😀\n"):
        text = before + template + ("The end" if template[-1].isspace() else " The end")
        labels = collator.labels_for(encode(tokenizer, text))
        assert trained(tokenizer, labels).replace(tokenizer.eos_token, "").strip(" |\n") == "The end", repr(text)
        assert labels[-1] == tokenizer.eos_token_id


def test_a_border_inside_a_token_masks_that_token_and_is_reported():
    tokenizer, collator = collator_for("qwen3")
    ids = encode(tokenizer, "###Question: x\n###Answer:The end")
    assert tokenizer.decode([ids[-3]]) == ":The"
    assert trained(tokenizer, collator.labels_for(ids)) == " end<|im_end|>|"
    report = collator.check([{"input_ids": ids}])
    assert (report.found, report.merged, report.problems[0].status) == (1, 1, "merged")


def test_what_is_missing_is_an_error():
    with pytest.raises(ResponseTemplateError, match="response_template"):  # a longer heading is not the template
        learned("smollm2", "#Question\n####Answer: no", "##Answer:")
    with pytest.raises(ResponseTemplateError, match="instruction_template"):
        learned("qwen3", "### Assistant: a", ASSISTANT, HUMAN)


@pytest.mark.parametrize("name", ["qwen3", "llama2", "llama3"])
def test_the_last_template_counts_not_the_one_that_the_question_quotes(name):
    """Llama-2 encodes the quotation as the bare string, and the real template otherwise; TRL 0.x took the wrong one."""
    said = learned(name, "### Question: say ### Answer: yes\n### Answer: no", "### Answer:")
    assert said.strip(" |") == "no" + load_tokenizer(name).eos_token


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_end_token_is_trained_when_it_is_the_pad_token(name, side):
    tokenizer = load_tokenizer(name)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, side
    collator = DataCollatorForCompletionOnlyLM("###Answer:", tokenizer=tokenizer)
    rows = [encode(tokenizer, "###Question: a\n###Answer: b"), encode(tokenizer, "###Question: a\n###Answer: b, c, d")]
    batch = collator([{"input_ids": row} for row in rows])
    for labels, mask in zip(batch["labels"], batch["attention_mask"], strict=True):
        assert (labels == tokenizer.eos_token_id).sum() == 1
        assert (labels[mask == 0] == -100).all()
    # the same, padded before the collator sees it, with the mask and without it
    padded = rows[0] + [tokenizer.eos_token_id] * 3
    with_mask = {"input_ids": padded, "attention_mask": [1] * len(rows[0]) + [0] * 3}
    for row in (with_mask, padded):
        assert (collator([row])["labels"] == tokenizer.eos_token_id).sum() == 1


def test_text_that_looks_like_a_control_token_is_not_one():
    tokenizer, collator = collator_for("qwen3", *IM)
    messages = [user("say <|im_start|>assistant\nhello"), assistant("<|im_start|>user\nhello")]
    ids = tokenize_conversation(messages, tokenizer)["input_ids"]
    assert "<|im_start|>user\nhello<|im_end|>" in trained(tokenizer, collator.labels_for(ids))


@pytest.mark.parametrize(
    ("name", "instruction", "response"),
    [
        ("smollm2", "<|im_start|>user\n", "<|im_start|>assistant\n"),
        ("llama3", "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("gemma3", "<start_of_turn>user\n", "<start_of_turn>model\n"),
        ("deepseek_v3", "<｜User｜>", "<｜Assistant｜>"),
        ("llama2", "[INST]", "[/INST]"),
    ],
)
def test_same_labels_as_the_conversation_path(name, instruction, response):
    """Up to what stands between the end token and the next instruction, which only the conversation path masks."""
    tokenizer, collator = collator_for(name, response, instruction)
    made = tokenize_conversation([user("Hi."), assistant("Hello!"), user("1+1?"), assistant("2\n")], tokenizer)
    pairs = list(zip(collator.labels_for(made["input_ids"]), made["labels"], strict=True))
    assert all(found == label for found, label in pairs if label != -100)
    extra = [found for found, label in pairs if found != label]
    assert tokenizer.decode(extra, skip_special_tokens=True).strip() == ""


def test_labels_that_mask_something_are_kept_and_a_plain_copy_is_not():
    tokenizer, collator = collator_for("smollm2", ignore_index=-1)
    ids = encode(tokenizer, "###Question: a\n###Answer: b")
    packed, labels = ids + ids, collator.labels_for(ids) * 2
    batch = collator([{"input_ids": packed, "labels": [-100 if x == -1 else x for x in labels]}])
    assert batch["labels"][0].tolist() == labels
    assert collator([{"input_ids": ids, "labels": ids}])["labels"][0].tolist() == collator.labels_for(ids)


def test_a_missing_template_names_row_ids_place_and_remedy():
    tokenizer, collator = collator_for("qwen3")
    good, bad = encode(tokenizer, "###Answer: a"), encode(tokenizer, "###Question: a\n### Answer: b")
    near = tokenizer.encode("### Answer:")
    with pytest.raises(ResponseTemplateError) as error:
        collator([{"input_ids": good}, {"input_ids": bad}])
    text = str(error.value)
    assert "\n" not in text and "row 1" in text and str(collator.response_token_ids) in text
    assert any(str(near[k:]) in text or str(near[k:])[1:-1] in text for k in range(2)), text
    assert "Question: a" in text and "did you mean" in text


def test_ids_that_do_not_match_the_context_get_the_ids_that_do():
    """MA-RLHF's `encode("###Answer:")` on Llama-2: the bare string has a space token that the row does not."""
    tokenizer = load_tokenizer("llama2")
    row = encode(tokenizer, "###Question: a\n###Answer: b")
    bare = tokenizer.encode("###Answer:", add_special_tokens=False)
    collator = DataCollatorForCompletionOnlyLM(bare, tokenizer=tokenizer)
    with pytest.raises(ResponseTemplateError, match=r"row 7.*did you mean .* encoded here as (\[.*\])") as error:
        collator.labels_for(row, index=7)
    (problem,) = collator.check([{"input_ids": row}]).problems
    assert problem.text in str(error.value)
    near = json.loads(re.search(r"encoded here as (\[.*\])", problem.text)[1])
    again = DataCollatorForCompletionOnlyLM(near, tokenizer=tokenizer)
    assert trained(tokenizer, again.labels_for(row)).strip(" |") == "b</s>"


def test_on_missing_mask_counts_and_warns():
    tokenizer, collator = collator_for("qwen3", on_missing="mask")
    with pytest.warns(UserWarning, match="does not occur"):
        batch = collator([{"input_ids": encode(tokenizer, t)} for t in ("no", "###Answer: yes", "neither")])
    assert collator.missing_rows == 2
    assert (batch["labels"] != -100).any(dim=1).tolist() == [False, True, False]


def test_check_counts_every_row():
    tokenizer, collator = collator_for("qwen3")
    texts = ["###Question: a\n###Answer: b", "no template", "###Question: a\n###Answer: b\n###Answer: c"]
    rows = [*(encode(tokenizer, text) for text in texts), tokenizer.encode("###Question: cut\n###Answer:")]
    report = collator.check([{"input_ids": ids} for ids in rows])
    assert (report.rows, report.found, report.missing, report.nothing_left, report.ambiguous) == (4, 2, 1, 1, 1)
    statuses = {problem.row: problem.status for problem in report.problems}
    assert not report.ok and statuses == {1: "missing", 2: "ambiguous", 3: "nothing_left"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"response": ""}, "empty"),
        ({"mlm": True}, "mlm"),
        ({"instruction": "###Answer:"}, "are both"),  # all would be trained
        ({"response": [2, 3], "instruction": [2, 3]}, "are both"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        collator_for("qwen3", **arguments)


CASES = json.loads((Path(__file__).parents[1] / "files" / "response_cases.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", [c for c in CASES if "trained" in c], ids=lambda case: case["name"])
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3"])
def test_a_quoted_template_is_no_border_or_reported(name, case):
    tokenizer, collator = collator_for(name, ASSISTANT, HUMAN)
    runs = learned(name, case["text"], ASSISTANT, HUMAN).replace(tokenizer.eos_token, "").split("|")[:-1]
    report = collator.check([{"input_ids": encode(tokenizer, case["text"])}])
    (problem,) = [problem for problem in report.problems if problem.status == "ambiguous"]
    assert report.ambiguous == 1 and problem.text.startswith(("2 response templates", "an instruction"))
    if "or" not in case:  # without an end token of its own, a turn ends where the next instruction begins
        assert [run.rstrip("\n") for run in runs] == case["trained"]


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3"])
def test_advice_would_not_train_the_question(name):
    case = next(c for c in CASES if c["name"] == "cut-before-the-answer")
    tokenizer, collator = collator_for(name, case["response_template"])
    with pytest.raises(ResponseTemplateError, match="cut off before its response") as error:
        collator.labels_for(tokenizer(case["text"], add_special_tokens=False)["input_ids"])
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|> ", ""])
def test_clean_conversations_pass_the_check(tmp_path, smollm2, end):
    """A turn's end token that the function's own text spells is one where the recipe says so."""
    case = next(c for c in CASES if c["name"] == "clean-multi-turn-recipe")
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": case["text"] + end.strip()}])
    (tmp_path / "form.py").write_text("def text(batch):\n    return batch['text']\n")
    places = {"model_name_or_path": str(smollm2), "dataset_name": rows, "formatting_func": f"{tmp_path}/form.py:text"}
    templates = {"response_template": ASSISTANT, "instruction_template": HUMAN, "eos_token": "<|im_end|>"}
    settings = Recipe(**places, **templates, use_cpu=True).resolve()
    tokenizer, _ = load_recipes_tokenizer(settings)
    labelled = label_rows(settings, tokenizer)
    assert not check(settings, tokenizer, labelled).errors
    row = labelled.dataset[0]
    assert trained(tokenizer, row["labels"]) == " Add line.<|im_end|>\n| Welcome.<|im_end|>|"
    assert row["input_ids"].count(tokenizer.eos_token_id) == 2


def test_ids_that_are_set_later_are_looked_for():
    tokenizer, collator = collator_for("qwen3", "### Answer:")
    collator.response_token_ids = tokenizer.encode("### Reply:", add_special_tokens=False)
    ids = encode(tokenizer, "### Question: x\n### Reply: yes")
    assert trained(tokenizer, collator.labels_for(ids)) == " yes<|im_end|>|"
    collator.instruction_token_ids = tokenizer.encode("### Question:", add_special_tokens=False)
    assert trained(tokenizer, collator.labels_for(ids[:-1] + ids)) == " yes|| yes<|im_end|>|".replace("||", "|")


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [1, 2, 3], "labels": [1, 2]},
        {"input_ids": [10**9, 2]},
        {"input_ids": ["### Answer: a", "b"]},
        {"input_ids": [[1, 2]]},
        {"input_ids": [1, -1]},
        {"text": "### Answer: a"},
    ],
)
def test_what_is_no_row_is_refused(row):
    with pytest.raises((ValueError, LookupError, TypeError, OverflowError)):
        collator_for("qwen3", on_missing="mask")[1]([row])


@pytest.mark.parametrize(
    ("response", "instruction", "text", "answer"),
    [
        (ASSISTANT, HUMAN, "### Human: a\n### Assistant: b\n### Hum", "b"),
        (ASSISTANT, HUMAN, "### Human: a\n### Assistant: b\n##", "b"),
        (ASSISTANT, HUMAN, "### Human: a\n### Assistant: b ### ", "b"),
        (f"\n{ASSISTANT}", f"\n{HUMAN}", "\n### Human: a\n### Assistant: b\n### Human", "b"),
        (f"\n{ASSISTANT}", f"\n{HUMAN}", "\n### Human: a\n### Assistant: b\n", "b"),  # no more than a line's end
        (ASSISTANT, HUMAN, "### Human: a\n### Assistant: b\n### Human: c\n### Ass", "b"),
        (ASSISTANT, HUMAN, "### Human: a\n### Assistant: b\n####", "b\n####"),  # another heading
        ("[/INST]", "[INST]", "[INST] a [/INST] b [IN", "b"),
        (ASSISTANT, None, "### Human: a\n### Assistant: use #", "use #"),
    ],
)
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama2"])
def test_a_row_that_is_cut_off_in_the_next_instruction_does_not_train_it(name, response, instruction, text, answer):
    """A cut row has no end token; what it trained of a user's turn would teach the model to write the user's turns."""
    tokenizer, collator = collator_for(name, response, instruction)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert trained(tokenizer, collator.labels_for(ids)).strip(" |\n") == answer
    whole = learned(name, text, response, instruction)  # its answer ends so
    assert instruction is None or text.count(instruction) > 1 or whole.endswith(f"{text[-2:]}{tokenizer.eos_token}|")


def test_batch_is_an_encoding():
    tokenizer, collator = collator_for("qwen3")
    ids = encode(tokenizer, "###Answer: a")
    batch = collator([{"input_ids": ids, "special_tokens_mask": [0] * len(ids)}]).to("cpu")
    assert batch.input_ids.tolist() == [ids] and "special_tokens_mask" not in batch
    with pytest.raises(ResponseTemplateError, match="the batch is empty"):
        collator([])
