"""Values of raw rows: which are text, which are JSON, which are nothing; and how an error shows them."""

import json
import re
from collections.abc import Iterable
from typing import Any

from ma_sft.errors import FormatError

Row = dict[str, Any]
SHOWN_COLUMNS = 20
BLANK = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]*")


class TrackedRow(Row):
    """A row without its nulls that knows which of its columns were read (`used`)."""

    def __init__(self, row: Row) -> None:
        super().__init__({key: value for key, value in row.items() if value is not None})
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.used.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.used.add(key)
        return super().get(key, default)

    def first(self, names: Iterable[str]) -> str | None:
        """The first of these columns that is there; it counts as read only when it is."""
        return next((name for name in names if name in self), None)


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, "", or a list or object without a value in it."""
    if isinstance(value, list | tuple):
        return all(item is None for item in value)
    return value is None or (isinstance(value, str | dict) and not value)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it has spaces and characters without width alone."""
    return BLANK.fullmatch(text) is not None


def plain(value: Any) -> Any:
    """A value from Arrow as the JSON that it was made from, as far as Arrow can tell.

    Arrow gives each object every key that any row has: a null argument of a tool call would be learned. So the nulls of
    objects go, written ones too. Bytes are text, or an object that no format takes for text.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return {"bytes": f"{len(value)}, which are no UTF-8 text"}
    return value


def check_text(text: Any, field: str) -> str:
    """The value, if it is a text that can be trained on.

    Raises:
        FormatError: no text, or one with a NUL or a lone surrogate.
    """
    if not isinstance(text, str):
        raise FormatError(f"field {field!r}: text expected, found {show(text)}")
    if "\0" in text:
        raise FormatError(f"field {field!r} holds a NUL character; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(
            f"field {field!r} holds a lone surrogate at character {error.start}; the text is broken"
        ) from None
    return text


def text_of(row: Row, field: str) -> str:
    """A column's text; errors as `check_text`'s."""
    return check_text(row.get(field), field)


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """An object, none of whose keys stands twice: Python would keep the last and lose the others."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise FormatError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def read_json(text: str | bytes) -> Any:
    """`json.loads`; raises `FormatError` where a key stands twice in one object, `UnicodeDecodeError` without UTF-8."""
    text = text if isinstance(text, str) else text.decode()  # of bytes alone, `json` takes some lines for UTF-16
    return json.loads(text, object_pairs_hook=_once)


def parse_json(text: str, field: str) -> Any:
    """The value of a JSON text; raises `FormatError` naming the field."""
    try:
        return read_json(text)
    except FormatError as error:
        raise FormatError(f"field {field!r}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"field {field!r}: not valid JSON: {error}; found {show(text)}") from None


def from_json(value: Any, field: str, begins: str | tuple[str, ...] = "") -> Any:
    """What a text that begins so holds as JSON, None if it is blank; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(begins):
        return value
    return parse_json(value, field) if value.strip() else None


def are_objects(value: Any) -> bool:
    """Whether a value is a list of JSON objects."""
    return isinstance(value, list | tuple) and all(isinstance(item, dict) for item in value)


def need(row: Row, fields: Iterable[str], format: str) -> None:
    """Raise `FormatError` at the first of these fields that the row lacks."""
    for field in fields:
        if field not in row:
            raise FormatError(f"field {field!r} is missing or null; format {format!r} needs it")


def to_json(value: Any, field: str) -> str:
    """A value as JSON text that can be trained on; raises `FormatError` as `check_text`, and at NaN and infinities."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        raise FormatError(f"field {field!r} holds a number that JSON does not have: {show(value)}") from None
    return check_text(text, field)


def show(value: Any) -> str:
    """A value for an error: its type and its first 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = (text if len(text) <= 60 else text[:60] + "...").encode("utf-8", "backslashreplace").decode()
    return f"{type(value).__name__} {text}"


def show_columns(columns: Iterable[str]) -> str:
    """Columns for an error, at most twenty."""
    names = sorted(columns)
    more = f" and {len(names) - SHOWN_COLUMNS:,} more" if len(names) > SHOWN_COLUMNS else ""
    return f"{names[:SHOWN_COLUMNS]}{more}"
