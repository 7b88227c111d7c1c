"""ssmax demo: the paper's effect in a minute."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["Demo"]


@dataclasses.dataclass(frozen=True)
class Demo:
    """Show what SSMax changes, in a minute: two small trained models that ship with the package, read far past their training length.

    Prints loss by position, needles found and the attention of the best head, and leaves a page with a slider over the
    context length. Nothing is downloaded. Example: ssmax demo --out demo.html
    """

    out: Annotated[Path, tyro.conf.arg(help="The page, an HTML file that opens offline.")] = Path("ssmax-demo.html")

    def run(self) -> None:
        """Run it."""
        from ssmax.demo.run import demo  # loads torch and transformers

        print("\n".join(demo(self.out)))
