"""python -m ssmax: the command line, as torchrun starts it."""

from ssmax.cli import main

if __name__ == "__main__":
    main()
