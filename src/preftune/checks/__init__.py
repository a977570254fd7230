"""Everything that can be wrong with a configuration, said at once, in under a second, before torch is imported.

`command_line` reads what was typed, `check` and `require` a composed config. Names and types come from TRL's,
transformers' and peft's own source; what cannot work together from small rules in combinations.py.
"""

from preftune import hardware, resolvers  # noqa: F401  (their resolvers must stand before a config is resolved)
from preftune.checks.command_line import command_line
from preftune.checks.config import ConfigError, check, require
from preftune.checks.problems import Problem, render
from preftune.checks.stages import RESERVED, SELECTIVE

__all__ = ["RESERVED", "SELECTIVE", "ConfigError", "Problem", "check", "command_line", "render", "require"]
