"""Labels found from ids: right on what TRL 0.x had right, loud where it trained on nothing."""

import pytest
import torch
from conftest import TOKENIZERS, load_tokenizer

from ma_sft import DataCollatorForCompletionOnlyLM, ResponseTemplateError
from ma_sft.collator import missing_rows

TEXT = "###Question: What is 2+2?\n###Answer: It is 4."


def ids_of(tokenizer, text):
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def trained(tokenizer, collator, ids):
    labels = collator.labels_for(ids)
    assert all(label in (-100, i) for label, i in zip(labels, ids, strict=True))
    return tokenizer.decode([label for label in labels if label != -100])


@pytest.mark.parametrize("template", ["###Answer:", "\n###Answer:", "###Answer: "])
def test_string_template_matches_as_it_stands_in_the_text(tokenizer, template):
    collator = DataCollatorForCompletionOnlyLM(template, tokenizer=tokenizer)
    answer = trained(tokenizer, collator, ids_of(tokenizer, TEXT))
    assert answer.strip() == "It is 4." + tokenizer.eos_token


def test_bare_encoding_alone_would_not_match_in_llama2():
    tokenizer = load_tokenizer("llama2")
    bare = tokenizer("###Answer:", add_special_tokens=False)["input_ids"]
    with pytest.raises(ResponseTemplateError) as error:
        DataCollatorForCompletionOnlyLM(bare, tokenizer=tokenizer).labels_for(ids_of(tokenizer, TEXT), index=7)
    message = str(error.value)
    assert "row 7" in message and str(bare) in message and "nearest" in message and "\n" not in message


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_turn_with_an_instruction_template(name):
    tokenizer = load_tokenizer(name)
    text = "### Human: Hi\n### Assistant: Hello\n### Human: Bye\n### Assistant: So long"
    collator = DataCollatorForCompletionOnlyLM("### Assistant:", "### Human:", tokenizer=tokenizer)
    answer = trained(tokenizer, collator, ids_of(tokenizer, text))
    assert "Hello" in answer and "So long" in answer and answer.endswith(tokenizer.eos_token)
    assert "Hi" not in answer and "Bye" not in answer
    only_last = DataCollatorForCompletionOnlyLM("### Assistant:", tokenizer=tokenizer)
    assert "Hello" not in trained(tokenizer, only_last, ids_of(tokenizer, text))


def test_end_token_is_trained_where_it_is_the_pad_token_too():
    tokenizer = load_tokenizer("smollm2")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [{"input_ids": ids_of(tokenizer, TEXT)}, {"input_ids": ids_of(tokenizer, TEXT + " Really, it is.")}]
    batch = DataCollatorForCompletionOnlyLM("###Answer:", tokenizer=tokenizer)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    for row, mask, labels in zip(rows, batch["attention_mask"], batch["labels"], strict=True):
        real = labels[mask.bool()]
        assert len(real) == len(row["input_ids"]) and real[-1] == tokenizer.eos_token_id
        assert (labels[~mask.bool()] == -100).all()


def test_row_without_the_template():
    tokenizer = load_tokenizer("qwen3")
    rows = [{"input_ids": ids_of(tokenizer, TEXT)}, {"input_ids": ids_of(tokenizer, "###Question: Cut o")}]
    rows.append({"input_ids": tokenizer("###Question: x\n###Answer:")["input_ids"]})
    collator = DataCollatorForCompletionOnlyLM("###Answer:", tokenizer=tokenizer)
    assert missing_rows(collator, rows) == {"found": [0], "not found": [1], "nothing left to train": [2]}
    with pytest.raises(ResponseTemplateError, match="row 1"):
        collator(rows)
    lenient = DataCollatorForCompletionOnlyLM("###Answer:", tokenizer=tokenizer, on_missing="mask")
    batch = lenient(rows)
    assert (batch["labels"][1] == -100).all() and lenient.missing == 1


def test_old_script_arguments():
    tokenizer = load_tokenizer("qwen3")
    ids = tokenizer.encode("\n###Answer:", add_special_tokens=False)[1:]
    collator = DataCollatorForCompletionOnlyLM(
        ids, tokenizer=tokenizer, mlm=False, pad_to_multiple_of=16, ignore_index=-1
    )
    batch = collator([{"input_ids": ids_of(tokenizer, TEXT)}])
    assert batch["input_ids"].shape[1] % 16 == 0
    assert set(batch["labels"][0, :5].tolist()) == {-1}


def test_padding_free_keeps_rows_apart():
    tokenizer = load_tokenizer("qwen3")
    rows = [{"input_ids": ids_of(tokenizer, TEXT)}, {"input_ids": ids_of(tokenizer, TEXT + " Yes.")}]
    batch = DataCollatorForCompletionOnlyLM("###Answer:", tokenizer=tokenizer, padding_free=True)(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert batch["position_ids"][0].tolist() == [*range(lengths[0]), *range(lengths[1])]
    assert batch["input_ids"].shape == (1, sum(lengths))
    assert (batch["labels"] != -100).sum() > 0 and "attention_mask" not in batch
    assert isinstance(batch["labels"], torch.Tensor)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_same_labels_as_the_encoder_on_the_same_conversation(name):
    from ma_sft import tokenize_conversation

    tokenizer = load_tokenizer(name)
    messages = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}]
    encoded = tokenize_conversation(messages, tokenizer, template="question-answer")
    collator = DataCollatorForCompletionOnlyLM("###Answer:", tokenizer=tokenizer)
    assert collator.labels_for(encoded["input_ids"]) == encoded["labels"]
