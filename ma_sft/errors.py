"""The errors that a user meets. Each is a `ValueError`, and its message is one line that can be acted on."""

import traceback
from pathlib import Path


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


class RunError(MaSftError):
    """A run that cannot start or go on: launcher and machine do not fit, processes disagree, the loss is no number."""


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop, with the exit code that the one who asked expects."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def failed_in(where: Path | str, error: BaseException) -> str:
    """What failed in a user's own file or module: with the line there, if it is a file, and in one line."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{error.filename}, line {error.lineno}: SyntaxError: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(where)]
    kind = "" if isinstance(error, MaSftError) else f"{type(error).__name__}: "
    return f"{where}{f', line {lines[-1]}' if lines else ''}: {kind}{error}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says anything; the name of its kind if none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """All that an error says, in one line."""
    return " ".join(str(error).split())
