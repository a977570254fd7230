"""Whether a run is right: proved before its first step, watched while it trains, and said in findings.json."""

from preftune.health.end import EndProofs
from preftune.health.findings import Finding, Findings, Proof
from preftune.health.gate import perplexity_gate
from preftune.health.monitor import Monitor
from preftune.health.start import ProvedStart

__all__ = ["EndProofs", "Finding", "Findings", "Monitor", "Proof", "ProvedStart", "perplexity_gate"]
