"""The command line, in a process of its own and in this one."""

import subprocess
import sys
from pathlib import Path

import pytest
from faults import PATIENCE

from ssmax import cli

SSMAX = str(Path(sys.executable).with_name("ssmax"))


def run(*arguments, **options):
    return subprocess.run([SSMAX, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE, **options)


def call(capsys, *arguments):
    """Run the command in this process; return its status, output and errors."""
    with pytest.raises(SystemExit) as status:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status.value.code, captured.out, captured.err
