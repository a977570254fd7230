"""What is wrong or remarkable in a data set: one finding per kind, with its count, example rows and remedy."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from preftune.config.errors import UserError
from preftune.data.kinds import ERROR, KINDS, NOTE, SKIP, WARNING

EXAMPLES = 3


@dataclass
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


class RowFault(ValueError):
    """Why one row cannot be used: the code of its finding, and what exactly is wrong."""

    def __init__(self, code: str, detail: str):
        super().__init__(detail)
        self.code = code


@dataclass
class Findings:
    """Findings being collected by code, and the rows that are left out: counted, and written to `skipped_file`."""

    skipping: bool = False  # with it, errors of single rows are notes
    skipped_file: str | None = None
    skipped: int = 0
    found: dict[str, Finding] = field(default_factory=dict)

    def add(
        self,
        code: str,
        where: Iterable[str] = (),
        detail: str = "",
        *,
        count: int = 1,
        of: int | None = None,
        says: str = "",
    ) -> None:
        """Count `count` more of `code`; the places `where` (file:line) become examples while there is room."""
        kind = KINDS[code]
        found = self.found.setdefault(code, Finding(code, kind.severity, 0, None, kind.says, [], kind.remedy))
        found.count, found.of, found.says = found.count + count, of or found.of, says or found.says
        places = islice(where, EXAMPLES - len(found.examples))
        found.examples += [f"{place}: {detail}" if detail else place for place in places]

    def leave_out(self, origin: str, fault: RowFault, row: str) -> None:
        """Count a row that cannot be used, and write it down; of several processes the first begins the file anew."""
        self.add(fault.code, [origin], str(fault))
        self.skipped += 1
        if self.skipped_file and os.environ.get("RANK", "0") == "0":
            path = Path(self.skipped_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w" if self.skipped == 1 else "a", encoding="utf-8") as file:
                said = {"origin": origin, "code": fault.code, "detail": str(fault), "row": row}
                file.write(json.dumps(said) + "\n")

    def all(self) -> list[Finding]:
        """The findings, errors first."""
        left_out = {"severity": NOTE, "remedy": "left out, and written to the file of skipped rows"}
        findings = [
            replace(each, **left_out) if self.skipping and SKIP in each.remedy else each for each in self.found.values()
        ]
        return sorted(findings, key=lambda finding: (ERROR, WARNING, NOTE).index(finding.severity))

    def stop_on_errors(self) -> None:
        """Raise DataError, with all errors in its text, where there is one."""
        errors = [finding for finding in self.all() if finding.severity == ERROR]
        if errors:
            count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
            text = "\n  ".join([f"{count} in the data (nothing was run):", *(error.line() for error in errors)])
            raise DataError(text, self.all())
