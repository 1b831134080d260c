"""The errors that a user meets. Each is a `ValueError`, and its message is one line that can be acted on."""


class MaSftError(ValueError):
    """Base of every error that ma_sft raises on purpose; the command line prints it without a traceback."""


class FormatError(MaSftError):
    """A raw row that cannot become a conversation; the message names source, row and field."""


class TemplateError(MaSftError):
    """A conversation that a chat template cannot render, or a template that does not fit the tokenizer."""


class ResponseTemplateError(MaSftError):
    """A row in which the response template's token ids do not occur."""


class RecipeError(MaSftError):
    """A recipe with an unknown key, a wrong value or settings that contradict each other."""


class LabelError(MaSftError):
    """Training data whose labels are wrong or missing; found before the first step."""
