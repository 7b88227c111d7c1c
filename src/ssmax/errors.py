"""What the command line says in one line: the user can mend it (exit status 2), or the run failed (1)."""


class UserError(Exception):
    """Bad input: says what was wrong, what was expected and what to do."""


class RunFailed(Exception):
    """A run that could not finish: says where, and what is kept."""
