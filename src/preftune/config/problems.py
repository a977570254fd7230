"""What is wrong with a configuration, said in one line each: the key, what it wants, the remedy."""

import difflib
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One fault: the key (or the override as typed), and a phrase that says what is wrong and what to write instead."""

    key: str
    text: str


def render(problems: list[Problem]) -> str:
    """All problems as a table, keys on the left, wrapped to the terminal."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    indent = min(max(len(problem.key) for problem in problems), 34) + 4
    width = max(shutil.get_terminal_size((120, 24)).columns, indent + 40)
    lines = [f"{count} in the configuration (nothing was run):"]
    for problem in problems:
        head = f"  {problem.key}".ljust(indent)
        lines += textwrap.wrap(
            f"{head}{'' if head.endswith(' ') else '  '}{problem.text}",
            width,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
            drop_whitespace=True,
        )
    return "\n".join(lines)


def closest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The shortest candidate that the word begins or ends, else the one most like it, however cased; None without."""
    cased = {candidate.lower(): candidate for candidate in candidates}
    parts = [each for each in cased if each.startswith(word.lower()) or each.endswith(f"_{word.lower()}")]
    matches = sorted(parts, key=len) if len(word) > 2 else []
    matches = matches or difflib.get_close_matches(word.lower(), cased, n=1, cutoff=cutoff)
    return cased[matches[0]] if matches else None


def no_such_choice(typed: str, choices: Iterable[str]) -> str:
    """The phrase for a value that is none of the choices: the nearest one first, then all."""
    choices = list(choices)
    near = closest(typed, choices, cutoff=0.5)
    return f"no such choice{f'; did you mean {near}?' if near else ''} (choices: {', '.join(choices)})"
