"""Signals during an import."""

import subprocess
import sys

STUBBORN = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
except BaseException as error:
    raise ImportError("a package turns what interrupts its import into an error of its own") from error
print("imported")
"""
PROGRAM = """
import time
from ssmax.errors import Stopped
from ssmax.runs import signals

signals.install()
try:
    import stubborn
    time.sleep(60)
except Stopped as stopped:
    print("stopped by", stopped.args[0])
"""


def test_a_signal_waits_for_the_end_of_an_import(tmp_path):
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["imported", "stopped by 15"]
