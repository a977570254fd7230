"""Which keys a config may have, and what was meant by one that it may not."""

import contextlib
import functools
import re
from collections.abc import Iterator
from importlib import resources

from omegaconf import DictConfig, OmegaConf

from preftune.config.problems import closest
from preftune.config.renamed import KEYS, OURS
from preftune.config.stages import ADAPTERS, RESERVED, Stage, adapter_class, config_class, home, sections
from preftune.config.trainer_fields import Field, fields

# Mappings of any keys
OPEN = ("architecture", "chat_template_kwargs", "columns", "eval_sets", "export", "judge", "kwargs")


def leaves(node: dict, path: str = "") -> Iterator[tuple[str, object]]:
    """Every key of a nested dict by its dotted path, with its value; an empty mapping is a leaf too."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


class Known:
    """The keys that a composed config has, and those that its trainers, peft and bitsandbytes would take besides."""

    def __init__(self, cfg: DictConfig, found: list[Stage]):
        self.trained = {path: stage.fields for stage in found for path, _ in sections(stage)}
        self.sections = [*self.trained, *ADAPTERS]
        self.config = OmegaConf.to_container(cfg, resolve=False)
        paths = [path for path, _ in leaves(OmegaConf.to_container(cfg, resolve=False))]
        self.leaves = {path for path in paths if not self._is_unknown(path)}
        self.nodes = {path.rsplit(".", depth)[0] for path in paths for depth in range(1, path.count(".") + 1)}

    def arguments(self, section: str) -> dict[str, Field]:
        """The arguments that a section takes, from the source of the class that it feeds; none for other sections."""
        if section in ADAPTERS:
            with contextlib.suppress(LookupError):  # a peft_type that there is not, which check.py reports
                return fields(adapter_class(section, self.config))
        return self.trained.get(section, {})

    def allows(self, path: str) -> bool:
        """Whether a key may be set: it stands in the config, or is an argument (or lies in one that is a mapping)."""
        if path in self.leaves or path in self.nodes or self.is_open(path.rpartition(".")[0]):
            return True
        section, name, below = self._split(path)
        argument = self.arguments(section).get(name)
        if argument is None:
            return False
        return not below or argument.wants.anything or "dict" in argument.wants.kinds

    def is_open(self, path: str) -> bool:
        """Whether a path is that of a mapping that takes any key: `data.columns`."""
        return path.rpartition(".")[2] in OPEN and (path in self.leaves or path in self.nodes)

    def misplaced(self, path: str) -> str | None:
        """The key where an argument stands already, or that preftune sets it by; None in its own place."""
        section, name, below = self._split(path)
        if path in self.leaves or section not in self.trained or below:
            return None
        stage = section.rpartition(".")[0]
        for other in (f"{stage}.train", f"{stage}.loss") if stage else ("train", "loss", "hardware"):
            if f"{other}.{name}" in self.leaves:
                return f"{other}.{name}"
        place = OURS.get(name)
        return place if place in self.leaves or place in self.nodes else None

    def candidates(self) -> list[str]:
        """Every key that may be set, an argument at the one place where it stands or belongs."""
        placed = {path.rpartition(".")[2] for path in self.leaves}
        more = [
            f"{section}.{name}"
            for section in self.sections
            for name, argument in self.arguments(section).items()
            if name not in placed
            and (section in ADAPTERS or section.rpartition(".")[2] == home(argument))
            and name not in OURS
        ]
        return sorted(self.leaves) + more

    def advise(self, path: str) -> str:
        """What to write instead of a key that does not exist."""
        section, _, name = path.rpartition(".")
        if name in KEYS:
            return KEYS[name]
        candidates = self.candidates()
        by_name = {candidate.rpartition(".")[2]: candidate for candidate in reversed(candidates)}
        beside = [candidate for candidate in candidates if candidate.rpartition(".")[0] == section]
        by_name |= {candidate.rpartition(".")[2]: candidate for candidate in beside}
        beside = [candidate.rpartition(".")[2] for candidate in beside]
        near = name if name in by_name else closest(name, beside, cutoff=0.8)
        if not near and section in self.trained and (choices := choices_taking(name)):
            listed = ", ".join(f"loss={choice}" for choice in choices[:5]) + (", …" if choices[5:] else "")
            if re.search(r"(^|_)ref_", name):
                return f"this loss has no reference model: leave it out, or choose one that has ({listed})"
            return f"not an argument of this loss; it belongs to {listed}"
        near = (
            near
            or closest(name, beside)
            or closest(name, by_name, cutoff=0.75)
            or closest(path, candidates, cutoff=0.7)
        )
        if near:
            return f"no such key; did you mean {by_name.get(near, near)}?"
        there = [leaf.removeprefix(f"{section}.") for leaf in self.leaves if leaf.startswith(f"{section}.")]
        if section and there:
            return f"no such key; {section} has {', '.join(sorted(there))}"
        return f"no such key; there are {', '.join(sorted({leaf.split('.')[0] for leaf in self.leaves}))}"

    def _is_unknown(self, path: str) -> bool:
        """Whether a file sets a key that the section's class does not have."""
        section, name, _ = self._split(path)
        reserved = RESERVED.get(section.rpartition(".")[2], ())
        return section in self.sections and name not in reserved and name not in self.arguments(section)

    def _split(self, path: str) -> tuple[str, str, bool]:
        """The section, the argument, and whether the path goes on below it."""
        parts = path.split(".")
        for length in range(len(parts) - 1, 0, -1):
            section = ".".join(parts[:length])
            if section in self.sections:
                return section, parts[length], length + 1 < len(parts)
        return path.rpartition(".")[0], parts[-1], False


def choices_taking(name: str) -> list[str]:
    """The choices of loss whose trainer has an argument of this name."""
    return [choice for choice, trainer in trainers().items() if name in fields(config_class(trainer))]


@functools.cache
def trainers() -> dict[str, str]:
    """The trainer that each file of conf/loss names, by the file's name; read as text, for YAML is slow to parse."""
    texts = {path.name[:-5]: path.read_text() for path in (resources.files("preftune.conf") / "loss").iterdir()}

    def trainer(choice: str) -> str | None:
        if found := re.search(r"^trainer: *(\S+)", texts.get(choice, ""), re.M):
            return found[1]
        below = re.search(r"^defaults: *\[(\w+)", texts.get(choice, ""), re.M)
        return trainer(below[1]) if below else None

    return {choice: found for choice in sorted(texts) if (found := trainer(choice))}
