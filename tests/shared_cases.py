"""The cases of ../shared/cases, and the tiny checkpoints that its models.py writes; a test is skipped without them."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parents[2] / "shared" / "cases"


def case(name: str) -> Path:
    """The file or folder `name` of the cases."""
    if not (CASES / name).exists():
        pytest.skip(f"needs ../shared/cases/{name}")
    return CASES / name


def checkpoints(folder: Path) -> Path:
    """The folder with base-eos, chatml-bos, bos-in-template and gpt2short."""
    subprocess.run([sys.executable, case("models.py"), folder], check=True, capture_output=True)
    return folder
