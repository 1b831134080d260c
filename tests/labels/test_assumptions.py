"""What `ma_sft/labels/apply_template.py` takes for granted of transformers, each by its name."""

from helpers import load_tokenizer

from ma_sft.labels.apply_template import compiled, text_and_marks

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "Nix?"}, {"role": "assistant", "content": "No."}]


def test_compile_jinja_template_gives_the_object_that_apply_chat_template_renders():
    template = "{{ what_a_test_put_there }}{{ messages[0].content }}"
    tokenizer = load_tokenizer("qwen3")
    names = compiled(template).globals
    names["what_a_test_put_there"] = "seen: "
    text = tokenizer.apply_chat_template(MESSAGES, chat_template=template, tokenize=False)
    del names["what_a_test_put_there"]
    assert text == "seen: Nix?"
    assert tokenizer.apply_chat_template(MESSAGES, chat_template=template, tokenize=False) == "Nix?"


def test_render_jinja_template_gives_the_text_and_where_its_marks_are():
    (text,), (marks,) = text_and_marks([MESSAGES], None, chat_template=MARKED, return_assistant_tokens_mask=True)
    assert text == "Nix? No." and [text[begin:end] for begin, end in marks] == ["No."]
    tokenizer = load_tokenizer("qwen3")
    own = tokenizer.apply_chat_template(
        MESSAGES, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
    )
    assert own["input_ids"] == tokenizer(text)["input_ids"]
    said = [i for i, mark in zip(own["input_ids"], own["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(said).strip() == "No."
