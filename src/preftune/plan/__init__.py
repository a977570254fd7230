"""What a run will take, before it runs: memory by part, steps, tokens, padding and time (docs/plan.md)."""
