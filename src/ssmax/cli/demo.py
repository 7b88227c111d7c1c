"""ssmax demo: shows the effect of SSMax in a minute."""

import dataclasses
from pathlib import Path
from typing import Annotated

from ssmax.cli.options import option

__all__ = ["Demo"]


@dataclasses.dataclass(frozen=True)
class Demo:
    """Show what SSMax changes, in a minute: two small models that ship with the package read long texts.

    Prints loss by position, needles found and the attention of the best head. Leaves a page with a
    slider over the context length. Downloads nothing.

    Example: ssmax demo --out demo.html
    """

    out: Annotated[Path, option("Page to write, an HTML file that opens offline.")] = Path("ssmax-demo.html")

    def run(self) -> None:
        """Run it."""
        from ssmax.demo.run import demo  # loads torch and transformers

        print("\n".join(demo(self.out)))
