"""Whether a value is what an annotation asks for, and how to say what it asks for."""

import ast
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from preftune.config.problems import Problem, closest
from preftune.config.renamed import VALUES

LONGEST = 80  # characters of a value that are shown
PLAIN = {"bool": bool, "int": int, "float": (int, float), "str": str, "dict": dict, "list": list, "None": type(None)}
SAID = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a float",
    "str": "a string",
    "dict": "a mapping",
    "list": "a list",
    "None": "null",
}
EXAMPLES = {"bool": True, "int": 8, "float": 0.1, "str": "name", "dict": {"name": 1}, "list": ["one", "two"]}
BETTER_EXAMPLES = {"train.learning_rate": 5e-6, "train.max_steps": 100}  # than the defaults
WORDS = {"yes": True, "on": True, "true": True, "1": True, "no": False, "off": False, "false": False, "0": False}


@dataclass(frozen=True)
class Wants:
    """What an argument accepts: kinds (keys of PLAIN), words it is limited to, and what a list holds.

    `anything` stands for an annotation that preftune does not read, such as a class of the library: nothing is refused.
    """

    kinds: frozenset[str] = frozenset()
    words: tuple[str, ...] = ()
    items: "Wants | None" = None
    anything: bool = False

    def __or__(self, other: "Wants") -> "Wants":
        return Wants(
            self.kinds | other.kinds,
            self.words + other.words,
            self.items or other.items,
            self.anything or other.anything,
        )

    def or_bool(self) -> "Wants":
        """The same, and true or false."""
        return replace(self, kinds=self.kinds | {"bool"})

    def among(self, words: Iterable[str]) -> "Wants":
        """The same, limited to these words where strings are accepted (or, failing that, in its list)."""
        words = tuple(words)
        if not words:
            return self
        if "str" not in self.kinds and self.items:
            return replace(self, items=self.items.among(words))
        return replace(self, words=words)

    def accepts(self, value: object) -> bool:
        """Whether the value may be given as it is."""
        if self.anything:
            return True
        if isinstance(value, str) and self.words:
            return any(value == word or ("[" in word and value.startswith(word.split("[")[0])) for word in self.words)
        if isinstance(value, list) and "list" in self.kinds and self.items:
            return all(self.items.accepts(item) for item in value)
        if isinstance(value, bool):
            return "bool" in self.kinds
        return any(isinstance(value, PLAIN[kind]) for kind in self.kinds)

    def __str__(self) -> str:
        kinds = (
            self.kinds - {"None"} - ({"str"} if self.words else set()) - ({"int"} if "float" in self.kinds else set())
        )
        said = [self._list() if kind == "list" else SAID[kind] for kind in SAID if kind in kinds]
        if self.words:
            said.append(f"one of {', '.join(self.words)}" if len(self.words) > 1 else self.words[0])
        return " or ".join(said) or "null"

    def _list(self) -> str:
        inner = self.items
        if inner and inner.words:
            return f"a list of some of {', '.join(inner.words)}"
        names = {"str": "strings", "int": "whole numbers", "float": "floats"}
        named = [names[kind] for kind in names if inner and kind in inner.kinds]
        return f"a list of {named[0]}" if named else "a list"

    def example(self, value: object, default: object) -> object:
        """A value to show: what was meant, as far as it can be told; else the default; else any of the right kind."""
        if "bool" in self.kinds and str(value).lower() in WORDS:
            return WORDS[str(value).lower()]
        if "list" in self.kinds and not isinstance(value, list | dict) and self.items and self.items.accepts(value):
            return [value]
        if "str" in self.kinds and not self.words and isinstance(value, int | float):
            return f"'\"{written(value)}\"'"
        if default is not None and default != [] and self.accepts(default):
            return default
        return next((EXAMPLES[kind] for kind in EXAMPLES if kind in self.kinds), None)


def complaint(wants: Wants, key: str, value: object, default: object) -> Problem | None:
    """What is wrong with a value's type or word; None where it is right."""
    if wants.accepts(value):
        return None
    words = value if isinstance(value, list) else [value]
    for word in words:
        if isinstance(word, str) and (said := VALUES.get((key.rpartition(".")[2], word))):
            return Problem(key, f"{word} {said}")
    listed = wants.words or (wants.items.words if wants.items and isinstance(value, list) else ())
    unknown = next((word for word in words if isinstance(word, str) and word not in listed), None)
    if listed and unknown is not None and not isinstance(value, dict):
        near = closest(unknown, listed)
        full = f" ({wants if wants.words else wants.items})" if len(listed) <= 16 or not near else ""
        return Problem(key, f"no such value {unknown!r}{f'; did you mean {near}?' if near else ''}{full}")
    given = repr(value) if isinstance(value, str) else written(value)
    given = given if len(given) <= LONGEST else f"{given[:LONGEST]}… ({len(given):,} characters)"
    example = wants.example(value, BETTER_EXAMPLES.get(key, default))
    shown = "" if example is None else f"; for example {key}={written(example)}"
    return Problem(key, f"wants {wants}, got {given}{shown}")


def wants(annotation: ast.expr | None, enum: Callable[[str], tuple[str, ...] | None]) -> Wants:
    """What an annotation accepts; `enum` gives the values of an enum by its name, or None."""
    match annotation:
        case ast.Constant(value=None):
            return Wants(frozenset({"None"}))
        case ast.Constant(value=str(text)):
            return wants(ast.parse(text, mode="eval").body, enum)
        case ast.Name(id=name) if name in PLAIN:
            return Wants(frozenset({name}))
        case ast.Name(id=name) if values := enum(name):
            return Wants(frozenset({"str"}), values)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return wants(left, enum) | wants(right, enum)
        case ast.Subscript(value=ast.Name(id=name), slice=inner):
            return _generic(name, inner, enum)
    return Wants(anything=True)


def _generic(name: str, inner: ast.expr, enum: Callable[[str], tuple[str, ...] | None]) -> Wants:
    members = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    match name:
        case "Optional":
            return wants(inner, enum) | Wants(frozenset({"None"}))
        case "Union":
            return _any_of([wants(member, enum) for member in members])
        case "Literal":
            values = [member.value for member in members if isinstance(member, ast.Constant)]
            kinds = frozenset("None" if value is None else type(value).__name__ for value in values)
            return Wants(kinds, tuple(value for value in values if isinstance(value, str)))
        case "list" | "List" | "tuple" | "Tuple" | "Sequence":
            return Wants(frozenset({"list"}), items=_any_of([wants(m, enum) for m in members if not _ellipsis(m)]))
        case "dict" | "Dict" | "Mapping":
            return Wants(frozenset({"dict"}))
    return Wants(anything=True)


def _any_of(members: list[Wants]) -> Wants:
    together = Wants()
    for member in members:
        together = together | member
    return together


def _ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def written(value: object) -> str:
    """A value as one types it on the command line: `true`, `null`, `5e-6`, `[a,b]`."""
    match value:
        case bool() | None:
            return {True: "true", False: "false", None: "null"}[value]
        case float():
            return re.sub(r"e([-+])0*(\d)", lambda m: f"e{m[1].strip('+')}{m[2]}", f"{value:g}" if value else "0.0")
        case list():
            return f"[{','.join(written(item) for item in value)}]"
        case dict():
            return f"{{{','.join(f'{key}:{written(item)}' for key, item in value.items())}}}"
    return str(value)
