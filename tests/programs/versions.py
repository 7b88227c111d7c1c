"""make versions: every claimed Python with the pinned packages, and the oldest and the newest supported torch and transformers.

Each has a venv of its own. The Pythons are python3.11 and so on, as found on the PATH, or named by PYTHONS="PATH PATH ...".
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLAIMED = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith("Programming Language :: Python :: 3.")]
PACKAGES = {
    "oldest": ["torch==2.7.0", "transformers==5.10.1"],
    "newest": ["torch", "transformers>=5.10,<6"],
}
TESTS = ["scaling", "functional", "sharp", "chunks", "nn", "laws", "hf", "damage", "versions"]


def version(python):
    """Return "3.11" for a Python of this version, None where there is none or where it does not start."""
    show = "import sys; print(*sys.version_info[:2], sep='.')"
    found = shutil.which(python) and subprocess.run([python, "-c", show], capture_output=True, text=True).stdout
    return found.strip() if found else None


def pythons():
    """Return the claimed versions and the interpreter of each, None where there is none."""
    given = os.environ.get("PYTHONS", "").split()
    candidates = [*given, *(f"python{claimed}" for claimed in CLAIMED), sys.executable]
    return {claimed: next((p for p in candidates if version(p) == claimed), None) for claimed in CLAIMED}


def test(name, interpreter, install, tests):
    """Install and test in a venv; return whether that failed, and a line about it."""
    python = ROOT / ".venvs" / name / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", python.parent.parent], check=True)
    if subprocess.run([python, "-m", "pip", "install", "--quiet", *install], cwd=ROOT).returncode:
        return True, f"{name}: could not be installed"
    show = (
        "import platform, torch, transformers as t; print(platform.python_version(), torch.__version__, t.__version__)"
    )
    installed = subprocess.run([python, "-W", "ignore", "-c", show], capture_output=True, text=True, check=True).stdout
    done = subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    line = "Python {}, torch {}, transformers {}".format(*installed.split())
    return done.returncode != 0, f"{name}: {line}: {done.stdout.strip().splitlines()[-1]}"


def main():
    """Install, test, and print a table; return 1 where a version failed or has no interpreter."""
    found = pythons()
    results = [
        (True, f"Python {claimed}: not found; put python{claimed} on the PATH, or name it in PYTHONS")
        for claimed, python in found.items()
        if python is None
    ]
    pinned = ["--constraint", "constraints.txt", "--editable", ".[dev]"]
    (*numerical, compiling) = (str(next((ROOT / "tests").rglob(f"test_{name}.py"))) for name in [*TESTS, "compile"])
    results += [
        test(f"python{claimed}", python, pinned, [*numerical, compiling]) for claimed, python in found.items() if python
    ]
    more = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "packaging", "--editable", ".[lab]"]
    # A library's own deprecations are warnings of that version, not faults of ours.
    results += [
        test(name, sys.executable, ["--upgrade", *pins, *more], ["-W", "default", *numerical])
        for name, pins in PACKAGES.items()
    ]
    print("\n".join(line for _, line in results))
    return any(failed for failed, _ in results)


if __name__ == "__main__":
    sys.exit(main())
