"""A finding: something about a run that its owner must know, what it means, and what to do."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from preftune.config.errors import Stopped
from preftune.config.files import write_json
from preftune.config.processes import main_process


@dataclass(frozen=True)
class Finding:
    """One of the codes of docs/health.md, at an optimizer step (0: before training), in the units of its metric."""

    code: str
    step: int
    value: float | str
    threshold: float | str
    meaning: str
    remedy: str

    def __str__(self) -> str:
        seen = f"{self.value:.4g}" if isinstance(self.value, float) else str(self.value)
        bound = f"threshold {self.threshold:g}" if isinstance(self.threshold, float) else f"wanted {self.threshold}"
        return f"{self.code} at step {self.step} ({seen}, {bound}): {self.meaning} {self.remedy}"


@dataclass(frozen=True)
class Proof:
    """Something that must hold and was measured to hold: its number, what that had to be, what it is of."""

    name: str
    value: float | str
    wanted: str
    meaning: str


class Findings:
    """The findings of a run, each code once, in <run>/findings.json from the first moment on (empty: healthy).

    Beside them stand in proofs.json the proofs of what must hold, each with its number.
    """

    def __init__(self, run: Path, tell: Callable[[dict], None] = lambda finding: None):
        self.path, self.tell, self.all = run / "findings.json", tell, []
        self.proofs: dict[str, Proof] = {}
        self._write("findings.json", self.all)

    def prove(self, proof: Proof) -> None:
        """Keep a proof, in the place of an earlier one of its name."""
        self.proofs[proof.name] = proof
        self._write("proofs.json", self.proofs.values())

    def __contains__(self, code: str) -> bool:
        return any(finding.code == code for finding in self.all)

    def add(self, finding: Finding, aloud: bool = True) -> None:
        """Keep, print and pass on a finding, unless its code was found before."""
        if finding.code in self:
            return
        self.all.append(finding)
        self._write("findings.json", self.all)
        if main_process():
            if aloud:
                tqdm.write(f"health: {finding}")
            self.tell(dataclasses.asdict(finding))

    def stop(self, finding: Finding) -> None:
        """`add`, and raise Stopped."""
        self.add(finding, aloud=False)
        raise Stopped(f"Stopped: {finding}")

    def rows(self) -> list[dict]:
        """What findings.json holds."""
        return [dataclasses.asdict(finding) for finding in self.all]

    def _write(self, name: str, entries: Iterable[Finding | Proof]) -> None:
        if main_process():
            write_json(self.path.with_name(name), [dataclasses.asdict(each) for each in entries])
