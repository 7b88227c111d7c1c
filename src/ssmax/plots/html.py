"""A report as one HTML page that opens offline, with figures beside it. It is made again only if its rows changed."""

import base64
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { margin-bottom: 0 } h2 { margin-top: 2em } .sub { color: #666; margin-top: .2em }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; vertical-align: top; padding: .4em .7em; border-bottom: 1px solid #ddd }
.holds { color: #00703c; font-weight: 600 } .not { color: #b3261e; font-weight: 600 } .open { color: #777; font-weight: 600 }
figure { margin: 2em 0 } figure img { max-width: 100% } figcaption { color: #555 } pre { background: #f6f6f6; padding: 1em; overflow-x: auto }
"""


ROOMS = ("compare", "evaluation", "paper", "plots")  # whose code reports are made with


def state_of(folder: Path) -> str:
    """Return a hash of what a report is made from: the folder's rows, and the code of ssmax that draws them."""
    sources = (path for room in ROOMS for path in sorted((Path(__file__).parent.parent / room).rglob("*.py")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in [folder / "rows.jsonl", *sources])).hexdigest()


def is_made_from(page: Path, state: str) -> bool:
    """Return whether the page exists and was made from that state."""
    return page.exists() and state in page.read_text()


def document(name: str, state: str, body: str) -> str:
    """Return an HTML page in the style of the reports that needs no other file."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="made-from" content="{state}"><title>ssmax: {escaped(name)}</title><style>{STYLE}</style>
{body}
</html>
"""


def figures_html(images: Sequence[tuple[str, bytes]]) -> str:
    """Return captions and SVG images as HTML."""
    return "".join(
        f"<figure><img alt='{escaped(caption)}' src='data:image/svg+xml;base64,{base64.b64encode(image).decode()}'>"
        f"<figcaption>{escaped(caption)}</figcaption></figure>"
        for caption, image in images
    )


def escaped(value: Any) -> str:
    """Return a value as escaped HTML text."""
    return html.escape(str(value), quote=True)
