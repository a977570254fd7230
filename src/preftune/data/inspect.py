"""What there is to know about a data set before it is trained on: inspect() reads, checks and measures it."""

from dataclasses import dataclass, field

from datasets import Dataset
from omegaconf import DictConfig

from preftune.data import bias, settings
from preftune.data.bias import WordFigures
from preftune.data.findings import Finding
from preftune.data.kinds import ERROR
from preftune.data.load import examine
from preftune.data.set_checks import SetFigures
from preftune.data.shapes import DEMONSTRATIONS, PAIRS
from preftune.data.token_checks import Row, TokenFigures


@dataclass(frozen=True)
class Token:
    """One token of the row that is shown: its text, whether it is scored, whether train.max_length cuts it off."""

    text: str
    scored: bool
    cut: bool


@dataclass
class Inspection:
    """The rows of a data set that were read, kept and held out, its figures by kind, and the findings."""

    path: str
    shape: str
    read: int
    kept: int
    held_out: int
    skipped: int
    max_length: int | None
    findings: list[Finding] = field(repr=False)
    sets: dict[str, SetFigures] = field(default_factory=dict)
    words: dict[str, WordFigures] = field(default_factory=dict)
    tokens: TokenFigures | None = None
    example: dict[str, list[Token]] = field(default_factory=dict)
    example_origin: str = ""
    pairs: Dataset | None = field(default=None, repr=False)  # those to train on, with their origins

    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == ERROR]


def inspect(data: DictConfig, view: str | None, tokenizer, max_length: int | None, seed: int) -> Inspection:
    """Look at the data that a `data` section describes, as `view` or in the form nearest to its own.

    What is wrong with the data is in the findings; DataError is raised only for a section that means nothing, or names
    data that is not there.
    """
    want = settings.read(data, view)
    found = examine(want, view, tokenizer, max_length, seed)
    words = {}
    if "no_rows" not in found.findings.counts:
        judged = {kind: rows for kind, rows in found.parts.by_kind().items() if kind != DEMONSTRATIONS}
        words = {kind: bias.check(rows, kind, found.findings) for kind, rows in judged.items()}
    shown = found.tokens.shown if found.tokens else None
    return Inspection(
        path=", ".join(source.line() for source in want.sources),
        shape=found.parts.shapes(),
        read=sum(each.read for each in found.parts.tables),
        kept=0 if found.train is None else len(found.train),
        held_out=0 if found.held_out is None else len(found.held_out),
        skipped=found.skipped.count,
        max_length=max_length,
        findings=found.findings.all(want.skipping),
        sets=found.sets,
        words={kind: figures for kind, figures in words.items() if figures},
        tokens=found.tokens,
        example=decoded(shown, tokenizer, max_length) if shown else {},
        example_origin=shown.origin if shown else "",
        pairs=found.parts.by_kind().get(PAIRS),
    )


def decoded(row: Row, tokenizer, max_length: int | None) -> dict[str, list[Token]]:
    """A row token by token: its prompt, which no trainer scores, and its answers, which it does."""
    room = max_length or len(row.prompt) + max(map(len, row.answers.values()))
    parts = {"prompt": [Token(tokenizer.decode([token]), False, at >= room) for at, token in enumerate(row.prompt)]}
    for column, ids in row.answers.items():
        fit = max(room - len(row.prompt), 0)
        parts[column] = [Token(tokenizer.decode([token]), at < fit, at >= fit) for at, token in enumerate(ids)]
    return parts
