"""The command line: ssmax reproduce, train, prepare, evaluate, convert, calibrate, inspect, bench, export, demo."""

import dataclasses
import os
import select
import signal
import sys
import warnings
from typing import Any

import tyro

from ssmax.cli.experiments import Prepare, Reproduce, Train, parse_recipe
from ssmax.cli.misplaced import check_values
from ssmax.cli.models import Bench, Calibrate, Convert, Demo, Evaluate, Export, Inspect
from ssmax.cli.options import parse
from ssmax.errors import LeftOut, RunFailed, Stopped, UserError
from ssmax.runs import signals
from ssmax.runs.failures import line_of
from ssmax.versions import __version__

COMMANDS: dict[str, Any] = {
    "reproduce": Reproduce,
    "train": Train,
    "prepare": Prepare,
    "evaluate": Evaluate,
    "convert": Convert,
    "calibrate": Calibrate,
    "inspect": Inspect,
    "bench": Bench,
    "export": Export,
    "demo": Demo,
}


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, run the command, and exit.

    The exit status is 2 for bad input, 1 for a failed run, 130 for Ctrl-C, 143 for SIGTERM, and 141
    if the reader of the output has gone away.
    """
    try:
        try:
            status = _run(parsed(sys.argv[1:] if arguments is None else arguments))
        except SystemExit as end:  # raised by tyro for --help and for errors
            status = end.code
        sys.stdout.flush()
    except BrokenPipeError:
        if not _close_unread():
            raise
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def parsed(arguments: list[str]) -> Any:
    """Return the command with its options; exit after --help, --version and errors."""
    try:
        check_values(COMMANDS, arguments)
        return _parse(arguments)
    except UserError as error:
        sys.exit(_say(*line_of(error)))


def _parse(arguments: list[str]) -> Any:
    name, *rest = arguments or [""]
    if name in ("--version", "-V"):
        print(f"ssmax {__version__}")
        sys.exit()
    if name not in COMMANDS:
        return tyro.extras.subcommand_cli_from_dict(
            {name: _summary(command) for name, command in COMMANDS.items()},
            prog="ssmax",
            description="Scalable-Softmax (arXiv 2501.19399): attention that stays sharp at any context length.\n\n"
            "ssmax COMMAND --help shows the options of a command, ssmax --version the version.",
            args=arguments,
        )
    command, prog = COMMANDS[name], f"ssmax {name}"
    return parse_recipe(command, rest, prog) if hasattr(command, "recipe") else parse(command, rest, prog)


def _summary(command: Any) -> Any:
    """Return a command without options, for the list of commands."""
    return dataclasses.make_dataclass("Summary", [], namespace={"__doc__": command.__doc__.splitlines()[0]})


def _run(command: Any) -> int:
    signals.install()
    try:
        with warnings.catch_warnings():
            _show_left_out()
            command.run()
    except BrokenPipeError:
        raise
    except (UserError, RunFailed, Stopped, ImportError, OSError) as error:
        return _say(*line_of(error, getattr(command, "again", "")))
    return 0


def _say(message: str, status: int) -> int:
    print(f"ssmax: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def _show_left_out() -> None:
    """Print each LeftOut warning as one line, and other warnings as usual."""
    as_ever = warnings.showwarning

    def show(message, category, *place, **more):
        if issubclass(category, LeftOut):
            _say(str(message), 0)
        else:
            as_ever(message, category, *place, **more)

    warnings.simplefilter("always", LeftOut)
    warnings.showwarning = show


def _close_unread() -> bool:
    """Redirect streams without a reader to os.devnull, so that the exit is quiet; return whether there was one."""
    nowhere, unread = os.open(os.devnull, os.O_WRONLY), []
    for stream in (sys.stdout, sys.stderr):
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            os.dup2(nowhere, stream.fileno())
            unread.append(stream)
    os.close(nowhere)
    return bool(unread)
