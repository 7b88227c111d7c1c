"""SIGTERM and Ctrl-C: a training first saves a checkpoint at the end of its step; everything else stops where it is."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ssmax.errors import Stopped

__all__ = ["asked_to_stop", "check", "deferred", "install"]

# torchrun passes on the Ctrl-C that its ranks got from the terminal as well: one wish, not two.
SAME_WISH = 2.0

_deferred = False
_asked: tuple[int, float] | None = None


def install(*, deferred: bool = False) -> None:
    """Let SIGTERM and Ctrl-C raise Stopped, or with deferred only be remembered, for check and asked_to_stop."""
    global _deferred
    _deferred = deferred
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _receive)


@contextmanager
def deferred() -> Iterator[None]:
    """Only remember a signal inside, for whoever asks; a second one stops at once."""
    global _deferred
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before


def asked_to_stop() -> bool:
    """Whether a signal came that did not stop anything yet."""
    return _asked is not None


def check() -> None:
    """Raise Stopped where a signal came."""
    if _asked is not None:
        raise Stopped(_asked[0])


def _receive(number, frame):
    global _asked
    now = time.monotonic()
    again = _asked is not None and now - _asked[1] > SAME_WISH
    _asked = _asked or (number, now)
    if again or not _deferred:
        raise Stopped(number)
