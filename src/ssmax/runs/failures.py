"""Turns errors into one line for the user: UserError for bad input, RunFailed for a run that failed."""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ssmax.errors import RunFailed, UserError

__all__ = ["failures", "is_full", "out_of_memory", "user_errors"]

# Words of safetensors and torch.save for a full disk.
NO_SPACE = ("os error 28", "PytorchStreamWriter failed writing", "unexpected pos")
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
        if isinstance(told, (UserError, RunFailed)):
            raise type(told)(f"{where}{told}") from error
        again = ", the same command continues" if isinstance(error, OSError | MemoryError) or is_full(error) else ""
        raise RunFailed(f"{where}{_reason(error)}; finished stages are kept{again}") from error


def _reason(error):
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if is_full(error):
        return "No space left on device"
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400)
