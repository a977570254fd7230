"""Files that are written whole, and the folder of what can be computed again."""

import atexit
import functools
import json
import os
import sys
import tempfile
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name and move into place, so that a reader or a crash never meets half a file."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: Path, value: object) -> None:
    """`write_text` for a JSON value, indented for people."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def cache_dir() -> Path:
    """Where preftune keeps what it can compute again: PREFTUNE_CACHE, else ~/.cache/preftune.

    Where that cannot be written to, a folder of this process alone, with a line that says so.
    """
    return writable(Path(os.environ.get("PREFTUNE_CACHE") or Path.home() / ".cache" / "preftune").expanduser())


@functools.cache
def writable(place: Path) -> Path:
    """`place`, made where it is missing, or the folder of this process where it cannot be written to."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
        return place
    except OSError as error:
        why = f"{place} cannot be written to ({error.strerror})"
        print(f"cache: {why}, so nothing is kept. PREFTUNE_CACHE names another folder", file=sys.stderr)
        scratch = tempfile.TemporaryDirectory(prefix="preftune-")
        atexit.register(scratch.cleanup)
        return Path(scratch.name)
