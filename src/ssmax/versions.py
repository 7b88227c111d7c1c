"""Supported versions of other packages. A module that needs a package checks its version first."""

import re

__version__ = "0.1.0"

# How to install this package with its extra NAME, for messages. The package is on no package index yet, and somebody else could
# publish code under its name there. Change this when it is released.
INSTALL = "pip install '.[NAME]' in a clone of ssmax"
# Lowest, and the first that is not supported; pyproject.toml says the same.
SUPPORTED = {"torch": ((2, 6), None), "transformers": ((5, 10), (6, 0))}
# transformers 5.10 does not load with torch 2.6.
TORCH_OF_TRANSFORMERS = (2, 7)


def require(package: str, version: str, lowest: tuple[int, int] | None = None) -> None:
    """Raise ImportError if a package's version is not supported, or is below `lowest`. The error names the supported range."""
    least, above = SUPPORTED[package]
    lowest = least if lowest is None else lowest
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < lowest or (above is not None and found >= above):
        wanted = f">={_dotted(lowest)}" + ("" if above is None else f",<{above[0]}")
        raise ImportError(
            f"ssmax needs {package}{wanted}, found {package} {version}; pip install '{package}{wanted}'", name=package
        )


def _dotted(version):
    return ".".join(map(str, version))
