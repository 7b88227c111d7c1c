"""python -m ssmax: the command line, as torchrun starts it."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C while it is loaded ends it without a traceback."""
    try:
        from ssmax.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
