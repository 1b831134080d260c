"""What a row says beside its turns: system message, earlier turns, a text to answer from, tools, template variables."""

from typing import Any

from ma_sft.data.turns import Message, conversation
from ma_sft.data.values import Row, TrackedRow, are_objects, check_text, from_json, is_empty, show, to_json
from ma_sft.errors import FormatError

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "systemInstruction", "meta_instruction")
CONTEXT = ("context", "knowledge", "passage", "background", "document", "documents", "article", "paragraph")
TURNS = frozenset(("messages", "conversations", "conversation"))


def with_context(row: TrackedRow, messages: list[Message]) -> list[Message]:
    """The messages of a row with its columns of context: system message, `history`, a text to answer from.

    Raises:
        FormatError: a context that has no place in these messages.
    """
    messages = _with_text(row, messages)
    start = 1 if messages and messages[0]["role"] == "system" else 0
    messages = [*messages[:start], *_history(row), *messages[start:]]
    systems = [message for key in SYSTEM if key in row for message in _system(row[key], key)]
    for message in systems if start else systems[1:]:
        if message != (messages if start else systems)[0]:
            raise FormatError("two different system messages in one row; leave one out (ignore: [column])")
    return messages if start else [*systems[:1], *messages]


def _system(value: Any, field: str) -> list[Message]:
    if is_empty(value):
        return []
    if isinstance(value, str):
        return conversation(value, field, "system")
    parts = value.get("parts", value.get("content")) if isinstance(value, dict) else value  # Vertex
    return conversation({"role": "system", "content": parts}, field)


def _history(row: TrackedRow) -> list[Message]:
    history = from_json(row.get("history"), "history", begins="[")
    if is_empty(history):
        return []
    if are_objects(history):
        return conversation(history, "history")
    if not isinstance(history, list | tuple) or any(not isinstance(p, list | tuple) or len(p) != 2 for p in history):
        raise FormatError(f"field 'history': a list of [question, answer] pairs expected, found {show(history)}")
    return [
        {"role": role, "content": check_text(text, f"history[{i}]")}
        for i, pair in enumerate(history)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _with_text(row: TrackedRow, messages: list[Message]) -> list[Message]:
    """The question with the text that it asks about before it, where the row has one that was not read yet."""
    for field in filter(row.__contains__, CONTEXT):
        if field in row.used or is_empty(row.get(field)):
            continue
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if len(asked) != 1:
            raise FormatError(
                f"field {field!r}: a text to answer from has no place in a conversation of {len(asked)} questions; "
                f"write it into a message, or leave it out (ignore: [{field}])"
            )
        text = row[field]
        texts = text if isinstance(text, list | tuple) else [text]
        text = "\n\n".join(check_text(part, field) for part in texts)
        question = messages[asked[0]]
        messages = [{**m, "content": f"{text}\n\n{m['content']}"} if m is question else m for m in messages]
    return messages


def to_tools(row: Row) -> str | None:
    """The row's tools as JSON text: a list of JSON schemas, from `tools`, `functions` or its system turn; or None.

    Raises:
        FormatError: not a list of objects, or two different lists.
    """
    request = dict.get(row, "input")  # OpenAI's preferences; looking here is not yet reading the column
    given = {"tools": row.get("tools"), "functions": row.get("functions")}
    given["input.tools"] = request.get("tools") if isinstance(request, dict) else None
    for column in row.keys() & TURNS:
        turns = dict.get(row, column)
        for i, turn in enumerate(turns if isinstance(turns, list | tuple) else ()):
            if isinstance(turn, dict) and turn.get("tools"):
                given[f"{column}[{i}].tools"] = turn["tools"]
    lists = [_schemas(value, field) for field, value in given.items() if not is_empty(value)]
    lists = [found for found in lists if found]
    if any(found != lists[0] for found in lists):
        raise FormatError(f"two different lists of tools, in {' and '.join(k for k, v in given.items() if v)}")
    return to_json(lists[0], "tools") if lists else None


def _schemas(tools: Any, field: str) -> list[dict[str, Any]]:
    tools = from_json(tools, field)
    if not tools:
        return []
    if not are_objects(tools):
        raise FormatError(f"field {field!r}: a list of JSON schemas expected, found {show(tools)}")
    return [schema for tool in tools for schema in _schema(tool, field)]


def _schema(tool: dict[str, Any], field: str) -> list[dict[str, Any]]:
    """OpenAI's form of a schema in OpenAI's older, Anthropic's or Vertex' form; another one as it is."""
    declared = tool.get("functionDeclarations", tool.get("function_declarations"))
    if declared is not None:
        return _schemas(declared, "functions")
    if "input_schema" in tool:
        names = {"name": "name", "description": "description", "input_schema": "parameters"}
        tool = {ours: tool[theirs] for theirs, ours in names.items() if theirs in tool}
    elif field != "functions":
        return [tool]
    return [{"type": "function", "function": tool}]


def to_template_kwargs(row: Row) -> str | None:
    """The row's variables for the chat template, `chat_template_kwargs`, as JSON text; None where it has none.

    Raises:
        FormatError: not an object.
    """
    value = from_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if not value:
        return None
    if not isinstance(value, dict):
        raise FormatError(f"field 'chat_template_kwargs': an object expected, found {show(value)}")
    return to_json(value, "chat_template_kwargs")
