"""Errors that the user can set right: they say how, and are printed without a traceback."""

import contextlib
import sys


class UserError(ValueError):
    """Base of the errors whose message is meant for the user: config, data, model, run directory."""

    exit_code = 1


class Stopped(UserError):
    """A guard stopped the run: its finding stands in findings.json, and what was computed is kept."""

    exit_code = 3


class Interrupted(UserError):
    """A signal ended the run; what was computed is kept. The exit code is the shell's own for it: 128 + signal."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number


@contextlib.contextmanager
def plainly():
    """End the program with the message alone where a UserError is raised; everything else keeps its traceback."""
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
