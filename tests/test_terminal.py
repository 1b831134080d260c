"""No text of a user, a model or a file is markup or a control sequence, and every terminal gets what it can show."""

import ast
import io
import subprocess
import sys

import pytest
from helpers import ROOT
from rich.table import Table
from rich.text import Text

from ma_sft.errors import MaSftError
from ma_sft.utils import console, guard, say, visible

HOSTILE = "[/foo] [bold]x :smile: \x1b[31mred\x1b]0;title\x07 \x9b2J \u202eedoc\u2066 \r\x08 \ud800 [link=file:///etc]y"


def obeyed(text):
    return [character for character in text if character in "\x1b\x07\x08\r\x9b\u202e\u2066\ud800"]


def test_what_a_terminal_obeys_is_shown_as_its_escape():
    assert visible("a\x1b[2J\tb\n\u202ec") == "a\\x1b[2J\tb\n\\u202ec"
    assert visible("नमस्ते 👩‍💻 שלום") == "नमस्ते 👩‍💻 שלום"  # joiners make letters


@pytest.mark.parametrize("where", ["line", "text", "cell", "title", "header", "caption"])
def test_nothing_is_markup_anywhere_on_the_console(where):
    table = Table(title=HOSTILE if where == "title" else "t", caption=HOSTILE if where == "caption" else "c")
    table.add_column(HOSTILE if where == "header" else "h")
    table.add_row(HOSTILE)
    shown = {"line": HOSTILE, "text": Text(HOSTILE)}.get(where, table)
    screen = console(file=io.StringIO(), width=400)
    screen.print(shown)
    said = screen.file.getvalue()
    assert not obeyed(said)
    bell = "" if where == "text" else "\\x07"  # a Text of rich drops it by itself
    assert f"[/foo] [bold]x :smile: \\x1b[31mred\\x1b]0;title{bell} \\x9b2J \\u202eedoc\\u2066" in said


def test_errors_and_lines_obey_nothing(capsys):
    def fail():
        raise MaSftError(HOSTILE)

    say(HOSTILE)
    assert guard(fail) == 2
    assert not obeyed("".join(capsys.readouterr()))


def test_only_the_terminal_module_prints():
    """Everything that is shown goes through `say` and `console`, so that the tests above hold for all of it."""
    for path in (ROOT / "ma_sft").rglob("*.py"):
        if path.name == "utils.py" or "reference" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", None)
            own = name == "print" and isinstance(called, ast.Attribute)  # of what `console` gave
            assert own or name not in ("print", "Console", "input") or "visible(" in ast.unparse(node) or (
                name == "input" and all(isinstance(a, ast.Constant) for a in node.args)
            ), f"{path}:{node.lineno}: say() or console() of ma_sft.utils"  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_cannot_show_a_character_shows_its_escape(encoding):
    code = (
        "from ma_sft.utils import guard, say, console\n"
        "from rich.table import Table\n"
        "def show():\n"
        "    say('中文 → … \\u2713'); table = Table('中'); table.add_row('█ é \\ud800'); console().print(table)\n"
        "    raise __import__('ma_sft').MaSftError('中文')\n"
        "raise SystemExit(guard(show))"
    )
    environment = {"PATH": "", "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 2, done.stderr.decode()
    assert done.stderr.decode(encoding).splitlines() == ["error: \\u4e2d\\u6587"]
    said = done.stdout.decode(encoding)
    dots = "…" if encoding == "cp1252" else "\\u2026"
    assert said.startswith(f"\\u4e2d\\u6587 \\u2192 {dots} \\u2713")
    assert "+---" in said  # frames in ASCII
