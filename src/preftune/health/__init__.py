"""Whether a run is right: proved before its first step, watched while it trains, and said in findings.json."""
