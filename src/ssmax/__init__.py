"""ssmax: attention that stays sharp at any context length (Scalable-Softmax, arXiv 2501.19399).

SSMax is query scaling: fold m = s log n + b into the query, and every attention kernel computes it.
The hard part is n, the number of keys that a query sees. Importing this package loads no heavy
package, not even torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ssmax.versions import __version__ as __version__

_HOMES = {
    "scalable_softmax": "ssmax.scaling",
    "visible_keys": "ssmax.visible",
    "matched_scale": "ssmax.scaling",
    "attention": "ssmax.functional",
    "ScreenedKeys": "ssmax.sharp.keys",
    "SSMaxScale": "ssmax.nn",
    "parameter_groups": "ssmax.nn",
    "convert": "ssmax.conversion",
    "revert": "ssmax.conversion",
    "converted": "ssmax.conversion",
    "fold": "ssmax.hf",
    "calibrate": "ssmax.calibration",
}
_PACKAGES = ("evaluation", "hf")

__all__ = [*_HOMES, *_PACKAGES]

if TYPE_CHECKING:
    from ssmax import evaluation as evaluation
    from ssmax import hf as hf
    from ssmax.calibration import calibrate as calibrate
    from ssmax.conversion import convert as convert
    from ssmax.conversion import converted as converted
    from ssmax.conversion import revert as revert
    from ssmax.functional import attention as attention
    from ssmax.hf import fold as fold
    from ssmax.nn import SSMaxScale as SSMaxScale
    from ssmax.nn import parameter_groups as parameter_groups
    from ssmax.scaling import matched_scale as matched_scale
    from ssmax.scaling import scalable_softmax as scalable_softmax
    from ssmax.sharp.keys import ScreenedKeys as ScreenedKeys
    from ssmax.visible import visible_keys as visible_keys


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return import_module(f"ssmax.{name}")
    raise AttributeError(f"module 'ssmax' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
