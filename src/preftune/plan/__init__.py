"""What a run will take, before it runs: memory by part, steps, tokens, padding and time (docs/plan.md)."""

from preftune.plan.advice import plan, require_fits
from preftune.plan.planner import Plan, Planner
from preftune.plan.sizes import PlanError
from preftune.plan.text import lines

__all__ = ["Plan", "PlanError", "Planner", "lines", "plan", "require_fits"]
