"""What the command line says in one line: the user can mend it (exit status 2), or the run failed (1) or was stopped."""


class UserError(Exception):
    """Bad input: says what was wrong, what was expected and what to do."""


class Damaged(UserError, ValueError):
    """A file or folder that is not what was once written: says which."""


class LeftOut(UserWarning):
    """Part of the input that could not be used: says what, how much and where."""


class RunFailed(Exception):
    """A run that could not finish: says where, and what is kept."""


class Stopped(BaseException):
    """SIGTERM or Ctrl-C, once what can be saved is saved; the argument is the signal's number."""
