"""The arguments of TRL's, transformers' and peft's own classes, read from their source.

Importing them takes five to nine seconds and torch; reading their files with `ast` takes milliseconds, and follows
whatever version is installed. tests/config/test_fields.py proves the reading equal to `dataclasses.fields`.
"""

import ast
import functools
import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path

from preftune.config.values import Wants, wants

UNREAD = object()  # a default that is computed when the class is made, not written as a literal


@dataclass(frozen=True)
class Field:
    """One argument: its name, its default (or UNREAD), its help, the class that first names it, where it is written."""

    name: str
    default: object
    help: str
    owner: str
    module: "Module"
    annotation: ast.expr | None
    metadata: dict

    @functools.cached_property
    def wants(self) -> Wants:
        """What it accepts; read when it is asked for, since most arguments of a class are never given."""
        wanted = wants(self.annotation, lambda name: _enum(self.module, name))
        if isinstance(self.metadata.get("const"), bool):  # `--fsdp` alone means True, whatever the annotation says
            wanted = wanted.or_bool()
        listed = self.metadata.get("choices")
        return wanted.among(listed if isinstance(listed, list) else _choices_in_help(self.help))


@dataclass(frozen=True)
class Module:
    """A source file: its dotted name (the package's own for an __init__.py), whether it is a package, its text."""

    name: str
    is_package: bool
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


@functools.cache
def fields(dotted: str) -> dict[str, Field]:
    """The arguments of a class by its dotted path: a dataclass's fields, or else those of its `__init__`.

    Raises LookupError where no such class is found.
    """
    module, name = dotted.rpartition(".")[::2]
    return _class_fields(*definition(module, name))


@functools.cache
def exported(package: str) -> set[str]:
    """The names that a package's __init__.py takes from its own modules."""
    froms = (each for each in ast.walk(_module(package).tree) if isinstance(each, ast.ImportFrom) and each.level)
    return {alias.asname or alias.name for each in froms for alias in each.names}


@functools.cache
def members(package: str, name: str) -> set[str]:
    """The values of an enumeration of strings."""
    _, node = definition(package, name)
    return {
        each.value.value for each in node.body if isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant)
    }


def definition(module_name: str, name: str) -> tuple[Module, ast.ClassDef]:
    """The class statement behind a name, through any number of re-exports.

    Raises LookupError where the module or the name is not found.
    """
    module = _module(module_name)
    if re.search(rf"\b{name}\b", module.text):
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
        for each in ast.walk(module.tree):
            for alias in each.names if isinstance(each, ast.ImportFrom) else ():
                if (alias.asname or alias.name) == name:
                    return definition(_absolute(module, each), alias.name)
    raise LookupError(f"{module_name}.{name}")


@functools.cache
def _module(name: str) -> Module:
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)  # of a top package only: it imports nothing
    if spec is None or spec.origin is None:
        raise LookupError(name)
    base = Path(spec.origin).parent.joinpath(*rest)
    for path, is_package in ((base / "__init__.py", True), (base.with_suffix(".py"), False)):
        if path.is_file():
            return Module(name, is_package, path.read_text(encoding="utf-8"))
    raise LookupError(name)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return str(node.module)
    parts = module.name.split(".")
    kept = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _class_fields(module: Module, node: ast.ClassDef) -> dict[str, Field]:
    if any(isinstance(each, ast.FunctionDef) and each.name == "__init__" for each in node.body):
        return _parameters(module, node)
    inherited = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name):
            try:
                inherited |= _class_fields(*definition(module.name, base.id))
            except LookupError:  # object, Enum, a name of the standard library
                continue
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return inherited
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            field = _field(module, node, statement)
            if field is not None:
                first = inherited.get(field.name, field)
                inherited[field.name] = replace(field, owner=first.owner)
    return inherited


def _field(module: Module, owner: ast.ClassDef, statement: ast.AnnAssign) -> Field | None:
    if "ClassVar" in ast.unparse(statement.annotation):
        return None
    default, metadata = _literal(statement.value), {}
    if isinstance(statement.value, ast.Call) and ast.unparse(statement.value.func).endswith("field"):
        options = {keyword.arg: keyword.value for keyword in statement.value.keywords}
        if _literal(options.get("init")) is False:
            return None
        default = _default(options)
        if isinstance(options.get("metadata"), ast.Dict):
            entries = zip(options["metadata"].keys, options["metadata"].values, strict=True)
            metadata = {_literal(key): _literal(value) for key, value in entries}
    help = metadata["help"] if isinstance(metadata.get("help"), str) else ""
    return Field(statement.target.id, default, help, owner.name, module, statement.annotation, metadata)


def _default(options: dict[str, ast.expr]) -> object:
    if "default" in options:
        return _literal(options["default"])
    factory = options.get("default_factory")
    if isinstance(factory, ast.Lambda):
        return _literal(factory.body)
    if isinstance(factory, ast.Name):
        return {"list": [], "dict": {}}.get(factory.id, UNREAD)
    return UNREAD


def _literal(node: ast.expr | None) -> object:
    try:
        return ast.literal_eval(node) if node is not None else UNREAD
    except ValueError:
        return UNREAD


def _choices_in_help(help: str) -> tuple[str, ...]:
    """The values that a help text enumerates ("Possible values are `'a'`, `'b'`."): TRL's only list of some choices."""
    listed = re.search(r"Possible values are:?\s+(.*?)\.(?:\s|$)", help)
    return tuple(re.findall(r"`'?(\w+)'?`", listed[1])) if listed else ()


def _enum(module: Module, name: str) -> tuple[str, ...] | None:
    """The values of an enum that an annotation names; None where the name is no enum."""
    try:
        _, node = definition(module.name, name)
    except LookupError:
        return None
    if not any("Enum" in ast.unparse(base) for base in node.bases):
        return None
    values = [_literal(statement.value) for statement in node.body if isinstance(statement, ast.Assign)]
    return tuple(value for value in values if isinstance(value, str))


def _parameters(module: Module, node: ast.ClassDef) -> dict[str, Field]:
    """The parameters of a plain class's `__init__`; without annotations, a default says what type it wants."""
    signature = next(each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__").args
    names = signature.args[1:]
    defaults = [None] * (len(names) - len(signature.defaults)) + signature.defaults
    found = {}
    for argument, default in zip(names + signature.kwonlyargs, defaults + signature.kw_defaults, strict=True):
        value = _literal(default)
        kind = None if value is None or value is UNREAD else type(value).__name__
        annotation = argument.annotation or (ast.Name(kind) if kind in ("bool", "int", "float", "str") else None)
        found[argument.arg] = Field(argument.arg, value, "", node.name, module, annotation, {})
    return found
