"""The command line as torchrun starts it, where rank 1 is not like the others: another version, or another text."""

import os
import sys

from ssmax import cli
from ssmax.runs import folder

if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if os.environ["RANK"] == "1":
        if what == "version":
            folder.__version__ = "9.9.9"
        else:
            arguments[arguments.index("--corpus") + 1] = what
    cli.main(arguments)
