"""Which versions of other packages this one works with; whoever needs one of them checks it first."""

import re

__all__ = ["SUPPORTED", "require"]

# Lowest, and the first that is not supported; pyproject.toml says the same.
SUPPORTED = {"torch": ((2, 7), None), "transformers": ((5, 10), (6, 0))}


def require(package: str, version: str) -> None:
    """Raise ImportError, with the supported range, where a package's version is outside of it."""
    lowest, above = SUPPORTED[package]
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < lowest or (above is not None and found >= above):
        wanted = f">={_dotted(lowest)}" + ("" if above is None else f",<{above[0]}")
        raise ImportError(
            f"ssmax needs {package}{wanted}, found {package} {version}; pip install '{package}{wanted}'", name=package
        )


def _dotted(version):
    return ".".join(map(str, version))
