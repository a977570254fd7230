"""Errors that the user can set right: they say how, and are printed without a traceback."""

import contextlib
import errno
import os
import sys

PLACES = {  # what a path is, rather than what a program does, makes these fail
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP,
    errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT,
}  # fmt: skip


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


def brief(error: BaseException) -> str:
    """The kind of an error and its first line."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:160]}" if line else type(error).__name__


@contextlib.contextmanager
def advice(what: str):
    """For what only advises: an error that it did not foresee costs one line and never the run.

    What is meant for the user (UserError: a refusal, a guard that stops) goes through.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        print(f"{what}: not available ({brief(error)})", file=sys.stderr, flush=True)


@contextlib.contextmanager
def plainly():
    """End the program with the message alone where a UserError is raised, or a path cannot be read or written.

    Everything else keeps its traceback; with HYDRA_FULL_ERROR=1 the paths do too.
    """
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if error.filename is None or error.errno not in PLACES or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        print(f"{error.filename}: {error.strerror}. Name another place, or make room there", file=sys.stderr)
        raise SystemExit(1) from None
