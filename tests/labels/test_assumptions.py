"""What `ma_sft/labels/apply_template.py` takes for granted of transformers, each by its name."""

from helpers import load_tokenizer

from ma_sft.labels.apply_template import compiled

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
