"""Checks that each forward of a converted attention used its scale. Code that replaced it would compute plain softmax."""

import threading
from typing import Any

from ssmax.private import drop_hook, set_hook

__all__ = ["forget", "note", "noticed_any", "require", "unwatch", "watch"]


# For each thread: module, the last one that noted itself, and any, whether there was one. torch.compile traces writes to this
# class; those to a subclass are lost.
_last = threading.local()


def note(module: Any) -> None:
    """Record that the attention of this module uses its scale now."""
    _last.module, _last.any = module, True


def forget() -> None:
    """Forget which modules noted themselves on this thread."""
    _last.any = False


def noticed_any() -> bool:
    """Return whether a module noted itself on this thread since forget."""
    return getattr(_last, "any", False)


def watch(module: Any) -> None:
    """Call require after each forward of a module."""
    set_hook(module, "ssmax", require)


def unwatch(module: Any) -> None:
    """Undo watch."""
    drop_hook(module, "ssmax")


def require(module: Any, inputs: Any, output: Any) -> None:
    """Raise ValueError unless the module was the last that noted itself. A module notes itself after those inside it."""
    attended, _last.module = getattr(_last, "module", None), None
    if attended is not module:
        name = getattr(module, "ssmax_base", type(module)).__name__
        raise ValueError(
            f"{name} was converted to SSMax, and its forward did not use its scale, so that it was plain softmax: its forward was "
            "replaced (by a library that patches models?), or its fused attention is off. Undo that, or ssmax.revert(model)"
        )
