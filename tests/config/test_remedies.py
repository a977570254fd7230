"""Every override that a message, a finding or a doc's remedy writes out can be typed: some recipe takes it."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest

from preftune.config.command_line import command_line

SOURCES = sorted((Path(__file__).parents[2] / "src" / "preftune").rglob("*.py"))
OVERRIDE = re.compile(
    r"(?<![\w/.`{-])((?:data|train|loss|lora|model|hardware|gate|health|fastpath|fit_check|sample_steps|samples|tracking)"
    r"(?:\.[a-z_0-9]+)*=(?:\{[^}]*\}|\[[^\]]*\]|[^\s,;:)`'\"]+))"
)
TO_FILL_IN = re.compile(r"\{\}|<|…|[A-Z]{3,}|\[$")  # what the user is to replace, and what the program has filled in
BESIDE = {"train.eval_steps": ["train.eval_strategy=steps"]}  # what the same message writes out too
# what this folder or machine has not
ELSEWHERE = ("there is no", "needs", "must be given", "does not work on CPU", "is not installed")


def documented(tree: ast.AST) -> set[ast.AST]:
    """The docstrings of a module."""
    kinds = (ast.Module, ast.FunctionDef, ast.ClassDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    return {body[0].value for body in bodies if isinstance(body[0], ast.Expr)}


def texts(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = documented(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
            yield node.value


def written() -> list[str]:
    found = {each.rstrip(".") for path in SOURCES for text in texts(path) for each in OVERRIDE.findall(text)}
    return sorted(each for each in found if not TO_FILL_IN.search(each))


def refused(recipe: str, override: str) -> str:
    """What a recipe answers to an override; empty where it takes it."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            command_line(recipe, [override, *BESIDE.get(override.partition("=")[0], [])])
        except SystemExit:
            return said.getvalue()
    return ""


def test_remedies_are_found():
    assert {"gate.on_fail=warn", "loss=dpo_norm", "data.columns={prompt: null}"} <= set(written())


@pytest.mark.parametrize("override", written())
def test_what_is_written_out_can_be_typed(override):
    answers = (refused(recipe, override) for recipe in ("dpo", "kto", "orpo", "sft", "rloo"))
    assert any(not answer or any(word in answer for word in ELSEWHERE) for answer in answers), refused("dpo", override)
