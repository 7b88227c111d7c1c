"""The guides' examples run, page by page, as a reader would type them."""

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
