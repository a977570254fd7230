"""Errors that the user can set right: they say how, and are printed without a traceback."""

import contextlib


class UserError(ValueError):
    """Base of the errors whose message is meant for the user: config, data, model, run directory."""


@contextlib.contextmanager
def plainly():
    """End the program with the message alone where a UserError is raised; everything else keeps its traceback."""
    try:
        yield
    except UserError as error:
        raise SystemExit(str(error)) from None
