"""The demo's page: one HTML file that opens offline, with its numbers inside."""

import json
from importlib.resources import files
from typing import Any

__all__ = ["page"]


def page(facts: dict[str, Any]) -> str:
    """Return the page; facts become its data, escaped so that no text can end the script."""
    data = json.dumps(facts).replace("<", "\\u003c")
    return files("ssmax.demo").joinpath("page.html").read_text(encoding="utf-8").replace("__FACTS__", data)
