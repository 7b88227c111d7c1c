"""SIGTERM and Ctrl-C: a training first saves a checkpoint, a measurement ends its piece, an import ends; all else stops at once."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ssmax.errors import Stopped

# Seconds in which two signals count as one: ranks get Ctrl-C from the terminal, and once more from torchrun.
SAME_WISH = 2.0
# Seconds after which a signal that came during an import is looked at again.
SOON = 0.05

_deferred = False
_asked: tuple[int, float] | None = None


def install(*, deferred: bool = False) -> None:
    """Let SIGTERM and Ctrl-C raise Stopped. With deferred they are only remembered, for check and asked_to_stop;
    a second one, after two seconds, raises.

    Stopped waits for the end of an import: packages turn what interrupts their imports into errors of
    their own, or ignore it.
    """
    global _deferred
    _deferred = deferred
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, _receive)


@contextmanager
def deferred() -> Iterator[None]:
    """Only remember a signal inside the block, for check and asked_to_stop. A second signal stops at once."""
    global _deferred
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before


def asked_to_stop() -> bool:
    """Return whether a signal has come."""
    return _asked is not None


def check() -> None:
    """Raise Stopped if a signal has come."""
    if _asked is not None:
        raise Stopped(_asked[0])


def _receive(number, frame):
    global _asked
    now = time.monotonic()
    again = _asked is not None and now - _asked[1] > SAME_WISH
    _asked = _asked or (number, now)
    if _deferred and not again:
        return
    if _in_import(frame):
        signal.setitimer(signal.ITIMER_REAL, SOON)  # SIGALRM calls this again
        return
    raise Stopped(_asked[0])


def _in_import(frame) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None
