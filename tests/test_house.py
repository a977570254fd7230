"""The order of the rooms: each imports from those before it alone, and no imports form a circle."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ["config", "models", "data", "trainers", "fastpath", "evaluate", "health", "plan", "report", "runs", "launch"]
ROOMS += ["pipeline"]
SOURCES = sorted((ROOT / "src" / "preftune").rglob("*.py"))
MODULES = {path: ".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in SOURCES}
MODULES |= {
    path: f"{path.parent.name}.{path.stem}" for name in ("recipes", "benchmarks") for path in (ROOT / name).glob("*.py")
}
NAMES = {name.removesuffix(".__init__") for name in MODULES.values()}


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= within & NAMES or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & NAMES


def room(module: str) -> str:
    return (module.split(".") + [""])[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: MODULES[path])
def test_a_room_imports_from_those_before_it(path):
    own = room(MODULES[path])
    later = ROOMS[ROOMS.index(own) + 1 :] if own in ROOMS else []
    assert not [module for module in imported(path) if room(module) in later]


def test_no_imports_form_a_circle():
    below = {name.removesuffix(".__init__"): imported(path) - {name} for path, name in MODULES.items()}
    while free := {name for name, uses in below.items() if not uses & below.keys()}:
        below = {name: uses for name, uses in below.items() if name not in free}
    assert not below


def test_few_modules_are_in_no_room():
    assert sorted(path.stem for path in (ROOT / "src" / "preftune").glob("*.py")) == ["__init__", "command"]
    assert {path.name for path in (ROOT / "src" / "preftune").iterdir() if path.is_dir()} - {"__pycache__"} == set(
        ROOMS
    )


def test_functions_are_short_and_take_few_parameters():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                taken = [each for each in node.args.args + node.args.kwonlyargs if each.arg not in ("self", "cls")]
                assert node.end_lineno - node.lineno < 50 and len(taken) <= 6, f"{path}: {node.name}"


def test_the_documentation_is_short():
    """What a program writes does not count: models.md, and tables between their comments."""
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md") if path.stem != "models"]
    written = [re.sub(r"<!-- table:.*?<!-- end of .*?-->", "", page, flags=re.DOTALL) for page in pages]
    assert sum(len(page.split()) for page in written) <= 12_000
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
