"""ARCHITECTURE.md keeps its word: where a thing is added, and who imports whom."""

import ast
import os
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


def test_no_file_is_longer_than_350_lines():
    lines = {str(path.relative_to(SOURCE)): len(path.read_text().splitlines()) for path in FILES}
    assert max(lines.values()) <= 350, max(lines, key=lambda name: lines[name])


def test_architecture_is_a_page_that_names_what_is_there():
    root = Path(__file__).parent.parent
    text = (root / "ARCHITECTURE.md").read_text()
    assert len(text.split()) <= 700
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= {word.strip("`/·") for word in text.split() if "/" in word}
