"""One function makes a user's line of an error, and chooses the exit status."""

import errno
import signal

import pytest

from ssmax.errors import Damaged, RunFailed, Stopped, UserError
from ssmax.runs.failures import failures, line_of

KEPT = "finished stages are kept"
AGAIN = f"the same command continues, {KEPT}"
LINES = [
    (UserError("a is b"), "a is b", 2),
    (RunFailed("a went"), "a went", 1),
    (Stopped(signal.SIGTERM), f"stopped by SIGTERM; {AGAIN}", 143),
    (ModuleNotFoundError("No module", name="datasets"), "the package 'datasets' is missing; ", 2),
    (ModuleNotFoundError("Could not import module 'X'"), "Could not import module 'X'", 2),
    (ImportError("needs torch>=2.6"), "needs torch>=2.6", 2),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), "a.txt: No such file or directory", 2),
    (OSError(errno.ENOSPC, "No space left on device", "a.txt"), f"a.txt: No space left on device; {AGAIN}", 1),
    (OSError(errno.EIO, "Input/output error"), f"the output folder: Input/output error; {AGAIN}", 1),
    (ConnectionResetError("reset"), f"reset; {AGAIN}", 1),
    (RuntimeError("PytorchStreamWriter failed writing file"), f"No space left on device; {AGAIN}", 1),
    (OSError("1024 requested and 0 written"), f"No space left on device; {AGAIN}", 1),
    (MemoryError("9 bytes"), f"MemoryError: 9 bytes; {AGAIN}", 1),
    (RuntimeError("two\nlines"), f"RuntimeError: two lines; {KEPT}", 1),
]


@pytest.mark.parametrize(("error", "line", "status"), LINES, ids=lambda x: type(x).__name__)
def test_a_line_and_a_status(error, line, status):
    got, code = line_of(error)
    assert got.startswith(line)
    assert code == status


@pytest.mark.parametrize(("error", "line", "status"), [case for case in LINES if isinstance(case[0], Exception)])
def test_a_stage_raises_the_same_line_after_its_name(error, line, status):
    with pytest.raises((UserError, RunFailed)) as found, failures("a stage: "):
        raise error
    assert str(found.value).startswith(f"a stage: {line}")
    assert line_of(found.value) == (str(found.value), status)


def test_a_damaged_file_stays_one_and_another_error_may_be_told():
    with pytest.raises(Damaged, match=r"^a: b$"), failures("a: "):
        raise Damaged("b")
    with pytest.raises(RunFailed, match=r"^rank 1 is gone$"), failures("", lambda error: RunFailed("rank 1 is gone")):
        raise ValueError
