"""ARCHITECTURE.md keeps its word: where a thing is added, and who imports whom."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssmax

SOURCE = Path(ssmax.__file__).parent
FILES = {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}
EXPORTED = set(ssmax.__all__) - {"evaluation", "hf"}


def test_a_thing_of_each_kind_comes_from_one_place(tmp_path):
    program = Path(__file__).parent / "programs" / "toys.py"
    support = os.pathsep.join([str(program.parent.parent / "support"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", program, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": support})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("toy says hello")


def imports(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nobody_inside_comes_through_the_front_door_or_takes_a_private_name(path):
    for node in imports(FILES[path]) if path != SOURCE / "__init__.py" else ():
        names = {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            assert "ssmax" not in names
            continue
        if node.module == "ssmax":
            assert not names & EXPORTED
        if (node.module or "").startswith("ssmax"):
            assert not [name for name in names if name.startswith("_") and name != "__version__"]


PYTHONS = {"_exit", "_getframe", "_processes", "_replace"}  # of the standard library, three of them documented


def foreign(tree):
    """Private names of other packages that a file reads: attributes of anything but the file's own objects, and names as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.value, ast.Call):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            yield owner not in ("self", "cls") and node.attr
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr", "setattr")
        ):
            yield isinstance(node.args[1], ast.Constant) and node.args[1].value
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("ssmax"):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_private_names_of_other_packages_stand_in_one_file_for_each(path):
    if path in (SOURCE / "private.py", SOURCE / "hf" / "private.py", SOURCE / "hf" / "portable" / "pieces.py"):
        return
    found = [name for name in foreign(FILES[path]) if name and re.match("_[a-zA-Z]", name) and "ssmax" not in name]
    own = {node.name for node in ast.walk(FILES[path]) if isinstance(node, ast.FunctionDef)}
    assert not set(found) - own - PYTHONS


def test_no_file_is_longer_than_350_lines():
    lines = {str(path.relative_to(SOURCE)): len(path.read_text().splitlines()) for path in FILES}
    assert max(lines.values()) <= 350, max(lines, key=lambda name: lines[name])


def test_architecture_is_a_page_that_names_what_is_there():
    root = Path(__file__).parent.parent
    text = (root / "ARCHITECTURE.md").read_text()
    assert len(text.split()) <= 700
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= {word.strip("`/·") for word in text.split() if "/" in word}
