"""Which groups feed which trainer: the sections of a config, the class that each is checked against, the arguments."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from preftune.config.problems import Problem, closest
from preftune.config.trainer_fields import UNREAD, Field, exported, fields, members

# Keys that stand in a group beside the arguments, and are preftune's own
RESERVED = {
    "train": (),
    "loss": ("trainer", "view", "task", "needs_sft", "rate", "gamma_beta_ratio", "balance_labels", "rewards"),
    "hardware": ("memory_gb", "tflops", "engine", "nproc", "nodes", "node_rank", "rendezvous"),
    "lora": ("quantization",),
}
SELECTIVE = "selective"
WIDER = {"gradient_checkpointing": f"bool | Literal[{SELECTIVE!r}]"}  # arguments that take more here than with TRL
READ_BY_US = ("max_length",)  # of `train`, also where the trainer has no such argument: held-out pairs are scored by it
ADAPTERS = ("lora", "lora.quantization", "bema")  # sections that feed no trainer


class InvalidArgument(Exception):
    """A rule asked for an argument that is wrong by itself: what it would say rests on nothing."""


def adapter_class(section: str, config: dict) -> str:
    """The class that a section of ADAPTERS feeds: peft's configuration of `lora.peft_type`, or the libraries' own.

    Raises LookupError, with the types that there are, where peft has no such type.
    """
    if section != "lora":
        return {"bema": "trl.BEMACallback"}.get(section, "transformers.BitsAndBytesConfig")
    given, classes = str(node(config, "lora").get("peft_type") or "LORA").upper(), exported("peft")
    if given in (types := members("peft", "PeftType")):
        named = f"{given.replace('_', '')}config".lower()
        return f"peft.{next(name for name in classes if name.lower() == named)}"
    raise LookupError(", ".join(sorted(types)))


@dataclass
class Stage:
    """One trainer of a run: `prefix` is "" or "sft.", `args` its arguments, `keys` where each was written.

    `config` is the whole configuration, resolved, as plain dicts. `faulty` arguments are not among args.
    """

    prefix: str
    trainer: str
    fields: dict[str, Field]
    config: dict
    args: dict[str, object] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    invalid: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def __getitem__(self, name: str) -> object:
        """The argument's value, or TRL's default; None where the trainer has no such argument.

        Raises InvalidArgument where what was given is wrong by itself.
        """
        if name in self.invalid:
            raise InvalidArgument(name)
        default = self.fields[name].default if name in self.fields else None
        return self.args.get(name, None if default is UNREAD else default)

    def key(self, name: str) -> str:
        """Where the argument was written, or would be."""
        return self.keys.get(name) or f"{self.prefix}{home(self.fields[name])}.{name}"

    def problem(self, name: str, text: str) -> Problem:
        """A problem with one of the arguments, by the key where it was written."""
        return Problem(self.key(name), text)

    def section(self, name: str) -> dict:
        """A section of the configuration that is no trainer's argument, such as data; empty where there is none."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def loss_types(self) -> list[str]:
        """loss_type as a list: DPO takes several, the others one or have none."""
        given = self["loss_type"]
        return given if isinstance(given, list) else [given] if given else []

    @property
    def view(self) -> str | None:
        """Which rows the trainer eats: paired, margins, unpaired, demonstrations or prompts."""
        return node(self.config, f"{self.prefix}loss").get("view")


def home(argument: Field) -> str:
    """The section that an argument belongs to, where no file names it: a trainer's own stand under loss."""
    return "train" if argument.owner in ("TrainingArguments", "_BaseConfig") else "loss"


def prefixes(config: dict) -> list[str]:
    """The stages of a config by their prefix: "sft." and "", each where its loss names a trainer."""
    found = [name for name, below in config.items() if isinstance(below, dict) and "trainer" in node(below, "loss")]
    return [f"{name}." for name in found] + [""] * ("trainer" in node(config, "loss"))


def config_class(trainer: str) -> str:
    """The dotted path of the config class that stands beside a trainer class: trl.DPOTrainer → trl.DPOConfig."""
    return f"{trainer.removesuffix('Trainer')}Config"


def arguments(trainer: str) -> dict[str, Field]:
    """What a trainer's config class takes, and what preftune takes beside. Raises LookupError: no such class."""
    found = fields(config_class(trainer))
    wider = {name: ast.parse(wanted, mode="eval").body for name, wanted in WIDER.items() if name in found}
    return found | {name: replace(found[name], annotation=annotation) for name, annotation in wider.items()}


def read(config: dict, choices: dict[str, str]) -> tuple[list[Stage], list[Problem]]:
    """The stages of a config, without arguments yet; `choices` are the trainers that files of conf/loss name."""
    stages, problems = [], []
    for prefix in prefixes(config):
        trainer = node(config, f"{prefix}loss")["trainer"]
        try:
            stages.append(Stage(prefix, trainer, arguments(str(trainer)), config))
        except LookupError:
            near = closest(str(trainer), set(choices.values()))
            hint = f"; did you mean {near}?" if near else ""
            problems.append(Problem(f"{prefix}loss.trainer", f"{config_class(str(trainer))} is not to be found{hint}"))
    return stages, problems


def sections(stage: Stage) -> Iterator[tuple[str, str]]:
    """The sections that feed a stage, as (path in the config, name of the section), the later laid over the earlier."""
    yield "train", "train"
    if stage.prefix:
        yield f"{stage.prefix}train", "train"
    yield f"{stage.prefix}loss", "loss"
    yield "hardware", "hardware"


def node(config: dict, path: str) -> dict:
    """The mapping at a dotted path; empty where there is none."""
    found: object = config
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
