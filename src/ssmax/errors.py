"""Errors that the command line reports in one line: bad input (exit status 2), a failed run (1), a stopped run."""


class UserError(Exception):
    """Bad input. The message says what was wrong, what was expected and what to do."""


class Damaged(UserError, ValueError):
    """A file or folder that has changed since it was written, or was not written to its end."""


class LeftOut(UserWarning):
    """Part of the input could not be used. The message says what, how much and where."""


class RunFailed(Exception):
    """A run could not finish. The message says where, and what is kept."""


class Stopped(BaseException):
    """SIGTERM or Ctrl-C; a training has saved a checkpoint. The argument is the signal's number."""
