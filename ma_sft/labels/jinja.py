"""What the labels take from transformers' inside of chat templates; `tests/labels/test_assumptions.py` names each."""

from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

# The one object that `apply_chat_template` renders for a source, where a clock can be set: nothing public gives it.
compiled = _compile_jinja_template

# Text and generation marks at once; `apply_chat_template(return_assistant_tokens_mask=True)` tokenises the text again.
text_and_marks = render_jinja_template
