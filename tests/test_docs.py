"""The guides' examples run, page by page, as a reader would type them, and numbers in pages are those of the committed rows."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
RUN = "import sys; [exec(page, {'__name__': '__main__'}) for page in sys.argv[1:]]"


def test_examples_of_every_page_run(tmp_path):
    pages = [DOCS / "index.md", *sorted((DOCS / "guides").glob("*.md"))]
    programs = ["\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)) for page in pages]
    assert sum(map(bool, programs)) >= 5
    # One process for all: importing torch and transformers takes longer than the examples.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, *programs],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_numbers_in_pages_and_what_reports_know_of_stored_seeds_are_those_of_the_rows():
    spec = importlib.util.spec_from_file_location("reproduced", DOCS / "reproduced.py")
    reproduced = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reproduced)
    assert reproduced.FILE.read_text() == reproduced.seeds()
    for path in reproduced.PAGES:
        text = path.read_text()
        assert "<!-- end -->" in text
        assert reproduced.page(text) == text, path.name
