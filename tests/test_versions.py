"""Versions of torch and transformers that are not supported are refused where they are needed, with the range."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ssmax.versions import SUPPORTED, TORCH_OF_TRANSFORMERS, require

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def test_the_ranges_are_those_of_the_package():
    base, hf = (
        {r.name: r for r in map(Requirement, names)}
        for names in (PROJECT["dependencies"], PROJECT["optional-dependencies"]["hf"])
    )
    assert not hf["torch"].specifier.contains("2.6.9")
    assert hf["torch"].specifier.contains(".".join(map(str, TORCH_OF_TRANSFORMERS)))
    named = {**hf, **base}
    for package, (lowest, above) in SUPPORTED.items():
        dotted = ".".join(map(str, lowest))
        assert named[package].specifier.contains(dotted)
        below = f"{lowest[0]}.{lowest[1] - 1}.9"
        assert not named[package].specifier.contains(below)
        assert above is None or not named[package].specifier.contains(f"{above[0]}.{above[1]}.0")


@pytest.mark.parametrize(
    ("package", "version", "module", "words"),
    [
        ("torch", "2.5.1+cu118", "ssmax.scaling", "ssmax needs torch>=2.6, found torch 2.5.1+cu118"),
        ("torch", "1.13.1", "ssmax.nn", "torch>=2.6"),
        ("torch", "2.6.0", "ssmax.hf", "ssmax needs torch>=2.7, found torch 2.6.0"),
        ("transformers", "5.9.0", "ssmax.hf", "ssmax needs transformers>=5.10,<6, found transformers 5.9.0"),
        ("transformers", "4.57.6", "ssmax.hf", "transformers>=5.10,<6"),
        ("transformers", "6.0.0.dev0", "ssmax.paper.reproduce", "transformers>=5.10,<6"),
    ],
)
def test_another_version_is_refused_at_import_of_what_needs_it(package, version, module, words):
    code = f"import {package}; {package}.__version__ = {version!r}; import ssmax; import {module}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: ssmax needs ")
    assert words in done.stderr


def test_what_does_not_need_transformers_works_without_it():
    code = "import transformers; transformers.__version__ = '4.0'; import ssmax; print(ssmax.matched_scale(1024))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("0.168"), done.stderr


def test_on_the_command_line_it_is_one_line(tmp_path):
    code = (
        "import sys, transformers; transformers.__version__ = '5.9.0'; from ssmax.cli import main; "
        f"main(['train', {str(tmp_path / 'run')!r}])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("ssmax: ssmax needs transformers>=5.10,<6, found transformers 5.9.0")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("version", ["2.6.0", "2.13.0+cpu", "3.0.0a0"])
def test_supported_versions_pass(version):
    require("torch", version)
