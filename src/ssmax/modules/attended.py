"""Checks that each forward of a converted attention used its scale. Code that replaced it would compute plain softmax."""

import threading
from collections.abc import Mapping
from typing import Any

from torch.fx import Proxy

# For each thread: module, the last one that noted itself; watch, the last watch that passed; and inside, the converted module whose
# forward runs. This is no subclass of threading.local, since torch.compile loses writes to one.
_last = threading.local()


def note(module: Any) -> None:
    """Record that the attention of this module uses its scale now."""
    _last.module = module


def enter(module: Any) -> Any:
    """Record that the forward of this module runs now, or None, and return which one ran before."""
    before, _last.inside = getattr(_last, "inside", None), module
    return before


def runs(module: Any) -> bool:
    """Return whether the forward of this module runs, and no forward of another converted module inside it."""
    return getattr(_last, "inside", None) is module


class Watch:
    """A hook after the forwards of a module that is, or holds, a converted attention. A failed watch raises ValueError.

    It passes if the module noted itself, or if the last watch that passed is one of those inside.

    Attributes:
        inside: watches of the next modules inside that hold converted attention. Copies of a module
            share them.

    Args:
        counts: whether this module runs in each forward of the modules around it, so that they may rely on it.
    """

    def __init__(self, counts: bool = True):
        self.inside: list[Watch] = []
        self.counts = counts

    def __deepcopy__(self, memo: Any) -> "Watch":
        return self  # the modules around know it, and it keeps nothing of a forward

    def __call__(self, module: Any, inputs: Any, output: Any) -> None:
        """Check one forward."""
        passed = getattr(_last, "watch", None)
        if not any(inner is passed for inner in self.inside) and not self.excuses(module):
            require(module, inputs, output)
        if self.counts:
            _last.module, _last.watch = None, self

    def excuses(self, module: Any) -> bool:
        """Return whether this forward may have passed by all watched modules inside."""
        return False


def require(module: Any, inputs: Any, output: Any) -> None:
    """Raise ValueError unless the module was the last that noted itself. A module notes itself after those inside it."""
    attended, _last.module = getattr(_last, "module", None), None
    if attended is not module and not _is_recorded(module, output):
        name = getattr(module, "ssmax_base", type(module)).__name__
        held = "" if getattr(module, "ssmax", None) is not None else "holds attention that "
        raise ValueError(
            f"{name} {held}was converted to SSMax, and its forward did not use its scale, so it was plain softmax. A library may have "
            "replaced a forward, or fused attention is off. Undo that, or call ssmax.revert(model)"
        )


def _is_recorded(module, output):
    """Return whether torch.fx only recorded this forward, and in it the call of a part that holds converted attention.

    Such a part, which torch.fx calls a leaf, does not run while it is recorded. It is checked when
    the record runs.
    """
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else (output,)
    )
    proxy = next((value for value in values if isinstance(value, Proxy)), None)
    if proxy is None:
        return False
    tracer: Any = proxy.tracer
    leaves = [tracer.root.get_submodule(node.target) for node in tracer.graph.nodes if node.op == "call_module"]
    inside = {id(part) for part in module.modules()}
    return any(
        id(leaf) in inside and any(getattr(part, "ssmax", None) is not None for part in leaf.modules())
        for leaf in leaves
    )
