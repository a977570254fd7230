"""Errors that the user can set right: they say how, and are printed without a traceback."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

PLACES = {  # what a path is, rather than what a program does, makes these fail
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP,
    errno.ENAMETOOLONG,
}  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TORN = "inline_container.cc"  # where torch.save complains of a file that ends before what it wrote


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


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, as Python, torch or safetensors say it, means that there is no room to write."""
    words = (TORN, *(os.strerror(number) for number in FULL))
    return getattr(error, "errno", None) in FULL or any(each in str(error) for each in words)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, as torch raises it on a GPU or a CPU, means that a device's memory is full."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


@contextlib.contextmanager
def advice(what: str) -> Iterator[None]:
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
def report_user_errors() -> Iterator[None]:
    """End the program with the message alone where a UserError is raised, a path cannot be used, or the disk is full.

    Everything else keeps its traceback; with HYDRA_FULL_ERROR=1 the paths do too.
    """
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        named = isinstance(error, OSError) and error.filename is not None and error.errno in PLACES
        if os.environ.get("HYDRA_FULL_ERROR") or not (named or disk_is_full(error)):
            raise
        told = f"{error.filename}: {error.strerror}. Name another place" if named else "the disk is full: make room"
        print(told, file=sys.stderr)
        raise SystemExit(1) from None


class LaunchError(UserError):
    """Why the processes that were asked for cannot be started, or are not those that run."""
