"""W&B runs on disk, read back as `wandb leet` reads them."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def read_offline(folder: Path) -> list[dict]:
    """The records of `<run>/wandb/offline-run-…` in order, each with a `type` and, under that name, its content."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(Path(folder).resolve())]
    with tempfile.TemporaryDirectory() as scratch:  # where W&B's command line keeps a log of its own
        shown = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=True)
    return [json.loads(line) for line in shown.stdout.splitlines()]
