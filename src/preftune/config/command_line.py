"""The command line of a recipe, checked before Hydra sees it, and rewritten so that Hydra takes what preftune takes."""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import islice

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from preftune.config import stages
from preftune.config.check import check, resolved
from preftune.config.keys import Known, trainers
from preftune.config.problems import Problem, closest, no_such_choice, render
from preftune.config.schema import missing_plugins
from preftune.config.values import written

MOST_VARIANTS = 64  # of a sweep that are looked at
SYNTAX = "[]{}\"'$\\,"  # a value with one of these is meant as more than plain text
REFUSALS = (HydraException, OmegaConfBaseException, ValueError, AssertionError)


def command_line(config_name: str, argv: list[str] | None = None, here: bool = True) -> list[str]:
    """Check a recipe's command line; stop with exit code 2 and every problem on stderr where there is one.

    Returns the arguments as Hydra wants them, and puts them into sys.argv where `argv` is not given: flags first,
    `++` before arguments of the trainer that no file names, no `+` before what is there already. `here` says whether
    the recipe needs what its hardware names.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    args, unknown = get_args_parser().parse_known_intermixed_args(arguments)
    if args.hydra_help or args.shell_completion or args.experimental_rerun:
        return arguments
    options = dashed(arguments, unknown, args.overrides)
    line = Line(args, config_name, here)
    if options or args.overrides or not line.only_shows:
        line.check(options)
    if line.problems:
        if os.environ.get("RANK", "0") == "0":  # one process of many speaks
            print(render(list(dict.fromkeys(line.problems))), file=sys.stderr)
        sys.exit(2)
    overrides = [text for override in args.overrides for text in line.final(override)]
    arguments = [*flags(arguments, args.overrides), *overrides, *line.naming()]
    if argv is None:
        sys.argv[1:] = arguments
    return arguments


def dashed(arguments: list[str], unknown: list[str], overrides: list[str]) -> dict[str, str]:
    """Options in the style of other command lines (`--learning_rate 5e-6`) and the key=value that each stands for.

    argparse gives up on what follows an unknown option: overrides among it join the others, its value leaves them.
    """
    found = {}
    overrides += [each for each in unknown if not each.startswith("-")]
    for option in [each for each in unknown if each.startswith("-")]:
        name, equals, value = option.lstrip("-").partition("=")
        following = next(iter(arguments[arguments.index(option) + 1 :]), "=")
        if not equals and following in overrides and "=" not in following:
            overrides.remove(following)
            option, value = f"{option} {following}", following
        found[option] = f"{name.replace('-', '_')}={value or '…'}"
    return found


def flags(arguments: list[str], overrides: list[str]) -> list[str]:
    """The arguments that are no overrides, in order."""
    left, found = list(overrides), []
    for argument in arguments:
        if argument in left:
            left.remove(argument)
        else:
            found.append(argument)
    return found


class Line:
    """A command line under examination: what Hydra's parser made of it, the problems, what is to be rewritten."""

    def __init__(self, args: argparse.Namespace, config_name: str, here: bool = True):
        setup_globals()  # Hydra's resolvers, `now` and `hydra`
        self.config_name = args.config_name or config_name
        self.only_shows = bool(args.help or args.cfg or args.info)
        self.here = here
        self.problems: list[Problem] = []
        self.rewritten: dict[str, str] = {}
        self.taken_apart: dict[str, list[str]] = {}
        self.composed: dict[tuple[str, ...], DictConfig] = {}
        self.loader = ConfigLoaderImpl(self.search_path(args))
        self.parser = OverridesParser.create(config_loader=self.loader)
        self.overrides = [override for text in args.overrides if (override := self.read(text))]
        modes = [override.value() for override in self.overrides if override.key_or_group == "hydra.mode"]
        self.sweeping = args.multirun or "MULTIRUN" in map(str, modes)

    def search_path(self, args: argparse.Namespace) -> ConfigSearchPath:
        """Where configs are looked for: preftune.conf, and what --config-dir and hydra.searchpath add."""
        path = create_config_search_path(args.config_path or "pkg://preftune.conf")
        folders = []
        if args.config_dir:
            if not os.path.isdir(args.config_dir):
                self.problems.append(Problem("--config-dir", f"there is no folder {args.config_dir}"))
            folders.append(f"file://{os.path.abspath(args.config_dir)}")
        for text in args.overrides:
            if text.startswith("hydra.searchpath=") and (override := self.read(text, OverridesParser.create())):
                folders += override.value()
        for folder in folders:
            path.prepend("command-line", folder, SearchPathQuery(provider="schema"))
        return path

    def read(self, text: str, parser: OverridesParser | None = None) -> Override | None:
        """One override, parsed by itself, so that a bad one does not hide the others.

        Hydra refuses a value with a character such as ~ or ( unless it is quoted: plain text is quoted for the user.
        """
        key, equals, value = text.partition("=")
        quoted = f'{key}="{value}"'
        for attempt in [text, quoted] if equals and not set(value) & set(SYNTAX) else [text]:
            try:
                override = (parser or self.parser).parse_override(attempt)
            except REFUSALS:
                continue
            if attempt != text:
                self.rewritten[text] = quoted
            return override
        remedy = f"quote it, for the shell too: '{quoted}'" if equals else "write key=value"
        remedy = "its brackets do not match" if value[:1] in ("[", "{") and value[-1:] not in "]}" else remedy
        self.problems.append(Problem(text, f"cannot be read; {remedy}"))
        return None

    def final(self, text: str) -> list[str]:
        """What Hydra is given for an override: quoted first, then with its plus signs put right, or key by key."""
        quoted = self.rewritten.get(text, text)
        return self.taken_apart.get(quoted) or [self.rewritten.get(quoted, quoted)]

    def naming(self) -> list[str]:
        """In a sweep, what makes Hydra name each job by what it does not share with the others (preftune.sweep)."""
        alike = [each for each in self.overrides if not each.is_sweep_override()]
        parts = [
            self.parser.parse_override(text) for each in alike for text in self.taken_apart.get(each.input_line, ())
        ]
        shared = {each.key_or_group for each in alike + parts}
        return [f"hydra.job.config.override_dirname.exclude_keys={sorted(shared)}"] if self.sweeping else []

    def check(self, options: dict[str, str]) -> None:
        """Check every variant that a sweep leads to, or the one that there is."""
        if not self.loader.repository.config_exists(self.config_name):
            names = [name for name in self.loader.get_group_options("") if name != "base" and name[0] != "_"]
            self.problems.append(Problem(f"--config-name {self.config_name}", no_such_choice(self.config_name, names)))
            return
        if not self.sweeping:
            for override in [each for each in self.overrides if each.is_sweep_override()]:
                self.overrides.remove(override)
                key, _, value = override.input_line.partition("=")
                remedy = f"add -m to run each; for a list write '{key}=[{value}]', for a text '{key}=\"{value}\"'"
                self.problems.append(Problem(override.input_line, f"is several values: {remedy}"))
        for overrides in islice(self.variants(), MOST_VARIANTS):
            self.variant(overrides, options)
        HydraConfig.instance().cfg = None

    def variants(self) -> Iterator[list[tuple[str, Override]]]:
        """The first job of a sweep, then each other value of each swept key; a pair is what was typed and one value."""
        choices = []
        for override in self.overrides:
            if not override.is_sweep_override():
                choices.append([(override.input_line, override)])
            elif values := list(islice(self.swept(override), MOST_VARIANTS)):
                each = [self.parser.parse_override(f"{override.get_key_element()}={value}") for value in values]
                choices.append([(override.input_line, one) for one in each])
        first = [values[0] for values in choices]
        yield first
        for place, others in enumerate(choices):
            for value in others[1:]:
                yield [*first[:place], value, *first[place + 1 :]]

    def swept(self, override: Override) -> Iterator[str]:
        """The values of a sweep, as far as they can be listed: an interval has none."""
        if isinstance(override.value(), Glob):
            yield from override.value().filter(self.loader.get_group_options(override.key_or_group))
        elif override.is_discrete_sweep():
            yield from override.sweep_string_iterator()

    def variant(self, overrides: list[tuple[str, Override]], options: dict[str, str]) -> None:
        """Check one combination of overrides: choices, then keys, then the composed whole."""
        groups = tuple(text for typed, each in overrides if self.is_group(each) and (text := self.choice(typed, each)))
        whole = self.composed[groups] = self.composed.get(groups) or self.compose(groups)
        HydraConfig.instance().set_config(whole)
        cfg = OmegaConf.masked_copy(whole, [key for key in whole if key != "hydra"])
        known = Known(cfg, stages.read(resolved(cfg, []), trainers())[0])
        for option, meant in options.items():
            self.problems.append(Problem(option, self.undash(meant, known)))
        for typed, override in overrides:
            if override.is_hydra_override():
                self.hydras_own(override, whole)
            elif not self.is_group(override):
                self.lay(typed, override, cfg, known)
        here = self.here and not self.only_shows and whole.hydra.runtime.choices.get("hydra/launcher") == "basic"
        typed_keys = {override.key_or_group for _, override in overrides}
        self.problems += missing_plugins(whole)
        self.problems += [each for each in check(cfg, here=here) if not self.only_shows or each.key in typed_keys]

    def is_group(self, override: Override) -> bool:
        if override.package is not None:
            return True
        return self.loader.repository.group_exists(override.key_or_group) and not isinstance(override.value(), dict)

    def choice(self, typed: str, override: Override) -> str | None:
        """The choice of a group as Hydra wants it; None, and a problem, where there is no such group or choice."""
        group, value, text = override.key_or_group, override.value(), override.input_line
        key = override.get_key_element().lstrip("+~")
        there = self.loader.get_group_options(group) if self.loader.repository.group_exists(group) else []
        if not there and not self.loader.repository.group_exists(group):
            near = closest(group, self.loader.list_groups(""))
            self.problems.append(Problem(text, f"no such group{f'; did you mean {near}?' if near else ''}"))
        elif override.is_delete():
            self.problems.append(
                Problem(text, f"a group cannot be taken out; write {key}=<choice> ({', '.join(there)})")
            )
        elif value is None:
            self.problems.append(Problem(text, f"null is no choice; leave it out (choices: {', '.join(there)})"))
        elif isinstance(value, str) and self.loader.repository.config_exists(f"{group}/{value}"):
            if typed.startswith("+"):
                self.rewritten[typed] = typed.lstrip("+")
            return text.lstrip("+")
        else:
            self.problems.append(Problem(text.lstrip("+"), no_such_choice(str(value), there)))
        return None

    def compose(self, groups: tuple[str, ...]) -> DictConfig:
        """The recipe's config with these choices; one that Hydra refuses is told and left out."""
        held: list[str] = []
        try:
            return self.load(list(groups))
        except REFUSALS:
            for group in groups:
                try:
                    self.load([*held, group])
                    held.append(group)
                except REFUSALS as error:
                    self.problems.append(Problem(group, first_line(error)))
        return self.load(held)

    def load(self, groups: list[str]) -> DictConfig:
        return self.loader.load_configuration(self.config_name, groups, RunMode.RUN, from_shell=False)

    def undash(self, meant: str, known: Known) -> str:
        """What to write instead of an option with dashes."""
        key, _, value = meant.partition("=")
        places = [each for each in known.candidates() if each == key or each.rpartition(".")[2] == key]
        if self.loader.repository.group_exists(key) or places:
            return f"overrides take no dashes; write {(places or [key])[0]}={value}"
        return known.advise(key)

    def hydras_own(self, override: Override, whole: DictConfig) -> None:
        """A typo in a key of Hydra's own; everything else about them is left to Hydra."""
        parent, _, name = override.key_or_group.rpartition(".")
        node = OmegaConf.select(whole, parent, throw_on_resolution_failure=False) if parent else None
        if not self.is_group(override) and not override.is_add() and isinstance(node, DictConfig) and name not in node:
            near = closest(name, map(str, node))
            hint = f"; did you mean {parent}.{near}?" if near else ""
            self.problems.append(Problem(override.key_or_group, f"Hydra has no such key{hint}"))

    def lay(self, typed: str, override: Override, cfg: DictConfig, known: Known) -> None:
        """Lay one override over the config, by Hydra's own hand, if its key may be set."""
        key, bare = override.key_or_group, override.input_line.lstrip("+")
        if fault := misdirected(override, known):
            self.problems.append(Problem(f"~{key}" if override.is_delete() else key, fault))
            return
        there = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        takes_any = known.is_open(key) or isinstance(there, DictConfig) and not there
        if takes_any and isinstance(override.value(), dict):  # Hydra adds keys to a mapping by their paths alone
            self.taken_apart[typed] = [f"++{key}.{name}={written(value)}" for name, value in override.value().items()]
            for text in self.taken_apart[typed]:
                self.lay(text, self.parser.parse_override(text), cfg, known)
            return
        laid = [override]
        if not override.is_delete():
            if key not in known.leaves:
                self.rewritten[typed] = f"++{typed.lstrip('+')}"
            elif typed.startswith("+"):
                self.rewritten.setdefault(typed, typed.lstrip("+"))
            laid = [self.parser.parse_override(f"++{bare}")]
        try:
            ConfigLoaderImpl._apply_overrides_to_config(laid, cfg)
        except REFUSALS as error:
            self.problems.append(Problem(key, first_line(error)))


def misdirected(override: Override, known: Known) -> str | None:
    """Why an override cannot go where it points; None where it can."""
    key, value = override.key_or_group, override.value()
    if not known.allows(key):
        return known.advise(key)
    if override.is_delete():
        section, _, name = key.rpartition(".")
        if name in known.arguments(section) and (key in known.leaves or key in known.nodes):
            return None
        return "cannot be taken out: preftune reads it; leave it as it is, or set it to null"
    if place := known.misplaced(key):
        same = place.rpartition(".")[2] == key.rpartition(".")[2]
        return f"has its place elsewhere: write {place}={written(value)}" if same else f"is set by {place}: write that"
    if key in known.nodes and not isinstance(value, dict):
        example = next(leaf for leaf in sorted(known.leaves) if leaf.startswith(f"{key}."))
        return f"is a section; write one of its keys, such as {example}=<value>"
    return None


def first_line(error: BaseException) -> str:
    """Hydra's own words, without its advice to add a plus sign."""
    return next((line for line in str(error.__cause__ or error).splitlines() if line.strip()), type(error).__name__)
