"""Turns errors into one line for the user: UserError for bad input, RunFailed for a run that failed."""

import errno
import signal
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ssmax.errors import RunFailed, Stopped, UserError
from ssmax.versions import INSTALL

KEPT = "finished stages are kept"
AGAIN = f"the same command continues, {KEPT}"
# The machine's own failures, which may be gone when the same command runs again.
OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN}

# Words of safetensors, torch.save and numpy for a full disk.
NO_SPACE = (
    "os error 28",
    "PytorchStreamWriter failed writing",
    "unexpected pos",
    "requested and",
    "problem writing element",
)
# Words of torch for memory that has run out, on a CPU and on an accelerator.
NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "No executable batch size")


def is_full(error: BaseException) -> bool:
    """Return whether an error says that a disk is full."""
    return any(sign in str(error) for sign in NO_SPACE)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError raised in the block, which names the argument, into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def line_of(error: BaseException, again: str = AGAIN) -> tuple[str, int]:
    """Return the line that the user reads of an error, and the exit status.

    Args:
        error: any error.
        again: what is kept, which is said after a signal and after the machine's own failures. Empty
            where nothing is said.

    Returns:
        The line, and 2 for what the user can mend, 1 for a run that failed, 128 plus a signal's
        number.
    """
    if isinstance(error, (UserError, RunFailed)):
        return str(error), 2 if isinstance(error, UserError) else 1
    left = f"; {again}" if again else ""
    if isinstance(error, Stopped):
        return f"stopped by {signal.Signals(error.args[0]).name}{left}", 128 + error.args[0]
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name!r} is missing; {INSTALL.replace('NAME', 'lab')} brings it", 2
    if isinstance(error, ImportError):
        return str(error), 2
    if is_full(error):
        return f"No space left on device{left}", 1
    if isinstance(error, OSError):
        what = f"{error.filename or 'the output folder'}: {error.strerror}" if error.strerror else str(error)
        passes = error.errno in OF_THE_MACHINE or isinstance(error, ConnectionError | TimeoutError)
        return (f"{what}{left}", 1) if passes else (what, 2)
    what = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
    return f"{what}; {again if isinstance(error, MemoryError) else KEPT}", 1


@contextmanager
def failures(where: str, explained: Callable[[Exception], Exception] = lambda error: error) -> Iterator[None]:
    """Turn any error in a stage into a UserError or RunFailed of one line.

    Args:
        where: text before the line, such as the stage's name.
        explained: returns the error to report for a caught one, such as the rank that caused it.
    """
    try:
        yield
    except Exception as error:  # a worker's traceback does not help the user; finished stages are kept
        told = explained(error)
        line, status = line_of(told)
        kind = type(told) if isinstance(told, UserError) else UserError if status == 2 else RunFailed
        raise kind(f"{where}{line}") from error
