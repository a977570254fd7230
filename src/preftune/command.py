"""The console command: `preftune RECIPE …` is `python -m recipes.RECIPE …`."""

import ast
import importlib.util
import pkgutil
import runpy
import sys
from importlib.metadata import version
from pathlib import Path


def recipes() -> dict[str, str]:
    """Every recipe and the first line of its docstring, read without running it."""
    folder = Path(importlib.util.find_spec("recipes").origin).parent
    names = sorted(module.name for module in pkgutil.iter_modules([str(folder)]))
    return {name: ast.get_docstring(ast.parse((folder / f"{name}.py").read_text())).splitlines()[0] for name in names}


def usage() -> str:
    """All recipes, one line each."""
    lines = [f"  {name:<14}{line}" for name, line in recipes().items()]
    return "\n".join(
        ["preftune RECIPE [group=choice …] [key=value …]     preftune RECIPE --help shows its keys", "", *lines]
    )


def main() -> None:
    """Run the recipe that is named first; exit code 2 where there is none of that name."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("--help", "-h", "help"):
        print(usage())
    elif name in ("--version", "-V"):
        print(f"preftune {version('preftune')}")
    elif name in recipes():
        sys.argv = [f"preftune {name}", *arguments]
        runpy.run_module(f"recipes.{name}", run_name="__main__")
    else:
        print(f"preftune {name}: no such recipe\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
