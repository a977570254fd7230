"""What is wrong with a composed configuration: missing values, keys, types, files, combinations; before torch."""

from collections.abc import Iterator

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from preftune.config import hardware, resolvers, stages  # noqa: F401  (the first two register resolvers)
from preftune.config.errors import UserError
from preftune.config.keys import Known, trainers
from preftune.config.problems import Problem, render
from preftune.config.renamed import OURS
from preftune.config.rules import conflicts
from preftune.config.schema import lacking_here, missing_files, own_key_problems, unwritable_places
from preftune.config.stages import ADAPTERS, READ_BY_US, RESERVED, Stage, sections
from preftune.config.values import complaint

EXAMPLES = {"data.path": "prefs.jsonl", "model.path": "./my-model"}
OUTSIDE_A_RUN = ("HydraConfig was not set", "Unsupported interpolation type hydra")


class ConfigError(UserError):
    """A configuration that cannot work; the message is the table of its problems."""


def require(cfg: DictConfig) -> None:
    """Raise ConfigError where `check` finds a problem: for code that composes a config without a command line."""
    if problems := check(cfg):
        raise ConfigError(render(problems))


def check(cfg: DictConfig, here: bool = False) -> list[Problem]:
    """Everything that is wrong with a composed config, as far as it can be told without importing torch.

    `here`: whether it will run on this machine, so that what the machine lacks is wrong too.
    """
    problems: list[Problem] = []
    config = resolved(cfg, problems)
    found, faults = stages.read(config, trainers())
    problems += faults
    known = Known(cfg, found)
    for stage in found:
        problems += fill(stage, known)
    problems += adapter_problems(config, known)
    problems += own_key_problems(config)
    for stage in found:
        problems += conflicts(stage)
    problems += missing_files(config)
    problems += unwritable_places(config)
    problems += lacking_here(config) if here else []
    return list(dict.fromkeys(problems))


def resolved(node: DictConfig, problems: list[Problem], path: str = "") -> dict:
    """The config as plain dicts, interpolations resolved; what is missing or unresolvable is told and left out."""
    plain = {}
    for name in node:
        key = f"{path}{name}"
        if OmegaConf.is_missing(node, name):
            problems.append(Problem(key, f"must be given; for example {key}={EXAMPLES.get(key, '<value>')}"))
            continue
        try:
            value = node[name]
            if isinstance(value, DictConfig):
                plain[name] = resolved(value, problems, f"{key}.")
            else:
                plain[name] = OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value
        except OmegaConfBaseException as error:
            if not any(text in str(error) for text in OUTSIDE_A_RUN):
                written_as = OmegaConf.to_container(node, resolve=False)[name]
                problems.append(Problem(key, f"{written_as} cannot be resolved: {str(error).splitlines()[0]}"))
    return plain


def fill(stage: Stage, known: Known) -> Iterator[Problem]:
    """Put the arguments of the stage's sections into it; yield the keys that it does not take, values of a wrong type
    and arguments that two sections give."""
    origin: dict[str, str] = {}
    for path, section in sections(stage):
        for name, value in stages.node(stage.config, path).items():
            key = f"{path}.{name}"
            if name in RESERVED[section] or (name in READ_BY_US and name not in stage):
                continue
            if name not in stage:
                yield Problem(key, known.advise(key))
            elif name in OURS and (given := known.misplaced(key)):
                yield Problem(key, f"is set by {given}: write that")
            elif origin.setdefault(name, section) != section:
                yield Problem(key, f"stands in {stage.keys[name]} too; keep one of them")
            elif problem := complaint(stage.fields[name].wants, key, value, stage.fields[name].default):
                stage.invalid.add(name)
                yield problem
            else:
                stage.args[name] = value
                stage.invalid.discard(name)
            stage.keys[name] = key


def adapter_problems(config: dict, known: Known) -> Iterator[Problem]:
    """Keys and types under lora and lora.quantization, against peft's and transformers' own classes."""
    for path in ADAPTERS:
        try:
            stages.adapter_class(path, config)
        except LookupError as error:
            yield Problem("lora.peft_type", f"peft has no such type; one of {error.args[0]}")
            continue
        for name, value in stages.node(config, path).items():
            key, argument = f"{path}.{name}", known.arguments(path).get(name)
            if name in RESERVED.get(path, ()):
                continue
            if argument is None:
                yield Problem(key, known.advise(key))
            elif problem := complaint(argument.wants, key, value, argument.default):
                yield problem
