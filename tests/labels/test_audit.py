"""The judge on what others prepared: trainers as users of TRL build them, and folders of ids and labels."""

import json

import pytest
from datasets import Dataset
from helpers import assistant, load_tokenizer, user, write_rows
from transformers import DataCollatorForLanguageModeling
from trl import SFTConfig, SFTTrainer

import ma_sft
from ma_sft import LabelError, MaSftError
from ma_sft.cli import main
from ma_sft.labels.audit import audit_folder, unpacked
from ma_sft.labels.verify import runs

CHATS = [
    [
        *(user(f"What is {n} plus {n}?"), assistant(f"It is {n + n},\nnaturally.")),
        *(user("Thanks!"), assistant("You are welcome. " * (n % 3 + 1))),
    ]
    for n in range(8)
]


@pytest.fixture(scope="module")
def model(tiny):
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(tiny)


def trainer(model, folder, *, collator=None, chats=CHATS, template=None, **settings):
    tokenizer = load_tokenizer("smollm2")  # ChatML without a trick, and no training twin
    tokenizer.chat_template = template or tokenizer.chat_template
    args = SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=3, **settings)
    rows = Dataset.from_dict({"messages": chats})
    return SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, data_collator=collator)


# SmolLM2's own template with generation marks, as users write them for assistant_only_loss
MARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ message['content'] + "
    "'<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": True, "padding_free": True, "max_length": 256},
        {"padding_free": True, "max_length": None},
    ],
)
def test_a_right_trainer_is_proven(model, tmp_path, settings):
    mine = trainer(model, tmp_path, template=MARKED, assistant_only_loss=True, **settings)
    report = ma_sft.audit(mine)
    assert report.errors == [] and report.verdict.startswith("every label is right")
    assert report.rows == len(CHATS) and report.proven_turns == 2 * len(CHATS)


UNCLOSED = MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "}}{% endgeneration %}{{ '<|im_end|>\n' }}")
HEADED = MARKED.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' }}",
).replace("{% else %}", "{% else %}{{ '<|im_start|>' + message['role'] + '\n' }}")


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({}, "unlike inference"),  # TRL's default: prompts are trained too
        ({"template": UNCLOSED, "assistant_only_loss": True}, "missing end token"),
        ({"template": HEADED, "assistant_only_loss": True}, "unlike inference"),
    ],
)
@pytest.mark.parametrize("packed", [{}, {"packing": True, "padding_free": True, "max_length": 256}])
def test_each_fault_of_a_trainer_is_found(model, tmp_path, settings, code, packed):
    report = ma_sft.audit(trainer(model, tmp_path, **settings, **packed))
    assert code in {finding.code for finding in report.errors}


def test_a_collator_that_masks_the_end_with_the_padding_is_found(model, tmp_path):
    tokenizer = load_tokenizer("smollm2")
    tokenizer.pad_token = tokenizer.eos_token

    class Collator(DataCollatorForLanguageModeling):
        def __call__(self, rows):
            batch = super().__call__([{"input_ids": row["input_ids"]} for row in rows])
            for n, row in enumerate(rows):
                for at, label in enumerate(row["labels"]):
                    if label == -100:
                        batch["labels"][n, at] = -100
            return batch

    mine = trainer(model, tmp_path, template=MARKED, assistant_only_loss=True, collator=Collator(tokenizer, mlm=False))
    assert any(label != -100 for label in mine.train_dataset[0]["labels"])
    report = ma_sft.audit(mine)
    assert {finding.code for finding in report.errors} == {"missing end token"}


def prepared(chats, change=lambda ids, labels: (ids, labels)):
    tokenizer = load_tokenizer("smollm2")
    rows = []
    for chat in chats:
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        labels = [-100] * len(ids)
        for k in (1, 3):
            begin = len(tokenizer.apply_chat_template(chat[:k], add_generation_prompt=True, return_dict=False))
            end = len(tokenizer.apply_chat_template(chat[: k + 1], return_dict=False)) - 1
            labels[begin:end] = ids[begin:end]
        ids, labels = change(ids, labels)
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return Dataset.from_list(rows)


def audited(folder, rows):
    """The report on a folder in which these rows are saved."""
    rows.save_to_disk(folder / "prepared" / "0123")
    return audit_folder(folder / "prepared", load_tokenizer("smollm2"))


def test_a_folder_is_verified_with_and_without_its_rows(tmp_path, capsys, smollm2):
    rows = write_rows(tmp_path / "rows.jsonl", ({"messages": chat} for chat in CHATS))
    assert audited(tmp_path, prepared(CHATS)).verdict.startswith("every label is right")
    command = ["audit", str(tmp_path / "prepared"), "--tokenizer", str(smollm2), "--rows", rows]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proven"] is True
    other = assistant("It is what it is.")
    write_rows(tmp_path / "rows.jsonl", ({"messages": [chat[0], other, *chat[2:]]} for chat in CHATS))
    assert main(command) == 1  # the data hold another answer than the rows
    shown = capsys.readouterr().out
    assert "unlike the template" in shown and "naturally" in shown


def early(tokens):
    """A change after which each stretch of labels begins so many tokens earlier."""

    def change(ids, labels):
        trained = {at for begin, end in runs(labels) for at in range(begin - tokens, end)}
        return ids, [index if at in trained else -100 for at, index in enumerate(ids)]

    return change


def holed(ids, labels):
    begin, _ = next(runs(labels))
    return ids, [-100 if at == begin + 1 else label for at, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("change", "code", "fault"),
    [
        (lambda ids, labels: (ids, [*labels[1:], -100]), "foreign labels", ""),
        (lambda ids, labels: (ids[1:], labels[1:]), "unlike inference", ""),
        (lambda ids, labels: (ids[:-2], labels[:-2]), "missing end token", ""),
        (lambda ids, labels: ([*ids, ids[-2]], [*labels[:-1], *ids[-1:], ids[-2]]), "trained past the end", ""),
        (lambda ids, labels: (ids, list(ids)), "unlike inference", "user tokens are trained (100% of the row); before"),
        (early(2), "unlike inference", "labels begin 2 tokens early; before message "),
        (early(-1), "", "labels begin 1 tokens late; before message "),
        (holed, "", "tokens inside a turn are not trained; before message "),
        (lambda ids, labels: (ids, [*labels[:-2], -100, -100]), "", "the end token is not trained; "),
    ],
)
def test_each_fault_of_a_folder_is_found_without_its_rows_and_said_in_the_users_words(tmp_path, change, code, fault):
    report = audited(tmp_path, prepared(CHATS, change))
    assert any(f.message.startswith(fault) and f.code.startswith(code) for f in report.errors), report.errors
    assert "wrong" in report.verdict and (not fault or all("(row 0; " in f.message for f in report.errors))


def test_what_cannot_be_read_back_is_not_proven_and_another_models_template_is_found(tmp_path):
    ids = load_tokenizer("smollm2")("Once upon a time.<|im_end|>")["input_ids"]
    report = audited(tmp_path / "text", Dataset.from_dict({"input_ids": [ids], "labels": [ids]}))
    assert report.errors == [] and report.not_proven == {"turns cannot be read back from the ids": 1}
    assert "not proven" in report.verdict
    ids = load_tokenizer("smollm2")("[INST] Hi [/INST] Hello!<|endoftext|>")["input_ids"]
    report = audited(tmp_path / "other", Dataset.from_dict({"input_ids": [ids], "labels": [[-100] * 8 + ids[8:]]}))
    (finding,) = report.errors
    assert finding.code == "unlike inference" and "another template" in finding.message


def test_packs_come_apart_where_their_sequences_begin():
    ids, labels = [[1, 2, 3, 4, 5, 0]], [[-100, 2, 3, -100, 5, -100]]
    right = [([1, 2, 3], [-100, 2, 3]), ([4, 5], [-100, 5])]
    assert [*unpacked({"input_ids": ids, "labels": labels, "position_ids": [[0, 1, 2, 0, 1, 0]]})] == right
    assert [*unpacked({"input_ids": ids, "labels": labels, "attention_mask": [[1, 1, 1, 2, 2, 0]]})] == right
    whole = {"input_ids": [ids[0][:5]], "labels": [labels[0][:5]], "seq_lengths": [[3, 2]]}
    assert [*unpacked(whole)] == right


def test_a_folder_without_data_is_an_error_in_one_line(tmp_path):
    with pytest.raises(LabelError, match="no folder with a saved data set"):
        audit_folder(tmp_path, load_tokenizer("smollm2"))
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "raw")
    with pytest.raises(LabelError, match="no column 'input_ids'; it has text"):
        audit_folder(tmp_path / "raw", load_tokenizer("smollm2"))


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([[1, 2], [1, 2]], [[1, 2], [1]], "row 1: input_ids and labels are no two lists of token ids"),
        ([[1], [2]], [[1], None], "row 1: input_ids and labels are no two lists of token ids"),
        ([[1, -100]], [[1, -100]], "row 0: input_ids and labels are no two lists of token ids"),
        (["abc"], ["abc"], "row 0: input_ids and labels are no two lists of token ids"),
        ([], [], "as a saved data set with a row in each split"),
        ([[1, 2]], [[1, 2]], "has no chat template; name the one of the training"),
    ],
)
def test_what_is_no_prepared_data_is_an_error_in_one_line(tmp_path, ids, labels, message):
    Dataset.from_dict({"input_ids": ids, "labels": labels}).save_to_disk(tmp_path / "prepared")
    tokenizer = load_tokenizer("smollm2")
    tokenizer.chat_template = None
    with pytest.raises(MaSftError, match=message):
        audit_folder(tmp_path / "prepared", tokenizer)
