"""The tests' own limits: a test that hangs ends with all that it started, grandchildren that lost their parent too."""

import subprocess
import sys
import time

import psutil
from helpers import ROOT
from patience import PATIENCE

HANGS = """
import subprocess, sys

def test_hangs(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(321.5)'])"
    subprocess.run([sys.executable, "-c", code])
"""


def test_a_hanging_test_ends_with_the_whole_tree(tmp_path):
    (tmp_path / "test_hangs.py").write_text(HANGS)
    flags = ["-q", "-p", "no:cacheprovider", "-p", "patience", "--timeout", f"{PATIENCE:.1f}", "--rootdir", "."]
    command = [sys.executable, "-m", "pytest", *flags, "."]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT / "tests"), "PATH": ""}, capture_output=True, text=True
    )
    assert "Timeout" in done.stdout + done.stderr and done.returncode == 1, done.stdout + done.stderr
    assert time.monotonic() - start < 300 * PATIENCE
    assert not [p for p in psutil.process_iter(["cmdline"]) if "time.sleep(321.5)" in str(p.info["cmdline"])]
