"""mkdocs hook: pages of the repository's root become pages of the site, with their links set right."""

import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
PAGES = ("REPRODUCING.md", "ARCHITECTURE.md", "THREATS.md", "CHANGELOG.md")


def on_files(files, config):
    """Add the root's pages."""
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text, inclusion=InclusionLevel.INCLUDED))
    return files


def on_page_markdown(markdown, page, config, files):
    """Set links that leave docs/: a page of the root is a page of the site, another file is named without a link."""
    up = "../" * page.file.src_uri.count("/")

    def fixed(match):
        label, target = match.groups()
        name, _, anchor = target.partition("#")
        name = name.replace("../", "")
        if name in PAGES:
            return f"[{label}]({up}{name}{'#' + anchor if anchor else ''})"
        return match[0] if not target.startswith("../") or target.startswith(up or "\0") else f"{label} (`{name}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s:]+)\)", fixed, markdown)
