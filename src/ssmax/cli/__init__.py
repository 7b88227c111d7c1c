"""The command line: ssmax reproduce, train, prepare, evaluate, convert, calibrate, inspect, bench."""

import errno
import signal
import sys
from typing import Any

import tyro

from ssmax import signals
from ssmax.cli.experiments import Prepare, Reproduce, Train
from ssmax.cli.models import Bench, Calibrate, Convert, Evaluate, Inspect
from ssmax.errors import RunFailed, Stopped, UserError

__all__ = ["main"]

EXTRAS = "pip install 'ssmax[lab]'"


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; exit status 2 for what the user can mend, 1 for a failed run, 130 and 143 for Ctrl-C and SIGTERM."""
    command = tyro.extras.subcommand_cli_from_dict(
        {
            "reproduce": Reproduce,
            "train": Train,
            "prepare": Prepare,
            "evaluate": Evaluate,
            "convert": Convert,
            "calibrate": Calibrate,
            "inspect": Inspect,
            "bench": Bench,
        },
        prog="ssmax",
        description="Scalable-Softmax (arXiv 2501.19399): attention that holds at any context length.",
        args=arguments,
    )
    signals.install()
    sys.exit(_run(command))


def _run(command: Any) -> int:
    resumes = isinstance(command, (Reproduce, Train, Prepare, Evaluate))
    again = "the same command continues, finished stages are kept" if resumes else "nothing was written"
    try:
        command.run()
    except UserError as error:
        return _say(str(error), 2)
    except RunFailed as error:
        return _say(str(error), 1)
    except Stopped as stopped:
        return _say(f"stopped by {signal.Signals(stopped.args[0]).name}; {again}", 128 + stopped.args[0])
    except ModuleNotFoundError as error:
        return _say(f"the package {error.name!r} is missing; {EXTRAS} brings it", 2)
    except ImportError as error:
        return _say(str(error), 2)
    except OSError as error:
        status = 1 if error.errno == errno.ENOSPC else 2
        return _say(f"{error.filename or 'the output folder'}: {error.strerror or error}; {again}", status)
    return 0


def _say(message: str, status: int) -> int:
    print(f"ssmax: {' '.join(message.split())}", file=sys.stderr)
    return status
