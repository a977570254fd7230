"""What is wrong or remarkable in a data set: one finding a kind, with its count, example rows and remedy."""

from collections.abc import Iterable
from dataclasses import dataclass

from preftune.config.errors import UserError
from preftune.data.kinds import ERROR, KINDS, NOTE, OF_ROWS, WARNING

EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """One kind of finding in one data set: `count` rows of the `of` looked at, up to three as examples."""

    code: str
    severity: str
    count: int
    of: int | None
    says: str
    examples: list[str]
    remedy: str

    def line(self) -> str:
        """One line: severity, code, count, what it is, where it is seen first, what to do."""
        count = f"{self.count:,}" + (f" of {self.of:,}" if self.of else "")
        seen = f" ({'; '.join(self.examples)})" if self.examples else ""
        return f"{self.severity}: {self.code}, {count}: {self.says}{seen}. {self.remedy}"


class DataError(UserError):
    """Data that must not be trained on, or cannot be had; the text names every error, its rows and what to do."""

    def __init__(self, text: str, findings: Iterable[Finding] = ()):
        super().__init__(text)
        self.findings = list(findings)


def stop_on_errors(findings: list[Finding]) -> None:
    """Raise DataError, with all errors in its text, where there is one."""
    errors = [finding for finding in findings if finding.severity == ERROR]
    if errors:
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        text = "\n  ".join([f"{count} in the data (nothing was run):", *(error.line() for error in errors)])
        raise DataError(text, findings)


class RowFault(ValueError):
    """Why one row cannot be used: the code of its finding, and what exactly is wrong."""

    def __init__(self, code: str, detail: str):
        super().__init__(detail)
        self.code, self.detail = code, detail


class Findings:
    """Findings being collected: counts, and the first examples, by code."""

    def __init__(self):
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}
        self.of: dict[str, int | None] = {}
        self.says: dict[str, str] = {}

    def add(
        self,
        code: str,
        where: str | Iterable[str] = (),
        detail: str = "",
        *,
        count: int = 1,
        of: int | None = None,
        says: str = "",
    ) -> None:
        """Count `count` more of `code`; `where` (file:line, or several) becomes an example while there is room."""
        self.counts[code] = self.counts.get(code, 0) + count
        kept = self.examples.setdefault(code, [])
        for place in [where] if isinstance(where, str) else where:
            if len(kept) == EXAMPLES:
                break
            kept.append(f"{place}: {detail}" if detail else place)
        if of is not None:
            self.of[code] = of
        if says:
            self.says[code] = says

    def all(self, skipping: bool = False) -> list[Finding]:
        """Errors first. With `skipping`, faults of single rows are notes: those rows are left out."""
        findings = []
        for code, count in self.counts.items():
            kind = KINDS[code]
            skipped = skipping and code in OF_ROWS and kind.severity == ERROR
            severity = NOTE if skipped else kind.severity
            remedy = "left out, and written to the file of skipped rows" if skipped else kind.remedy
            says = self.says.get(code, kind.says)
            findings.append(Finding(code, severity, count, self.of.get(code), says, self.examples[code], remedy))
        return sorted(findings, key=lambda finding: (ERROR, WARNING, NOTE).index(finding.severity))
