"""The monitor: judges every logged row by the rules, and warns, stops or rolls back as health.action says."""

import math

import torch
from omegaconf import DictConfig
from transformers import TrainerCallback, TrainerControl

from preftune.config.errors import advice
from preftune.health import rules
from preftune.health.findings import Finding, Findings
from preftune.health.start import not_finite


class Monitor(TrainerCallback):
    """Reads what TRL and preftune log. `stopped_by` is the finding that ended the training, if one did."""

    def __init__(self, findings: Findings, limits: DictConfig):
        self.findings, self.limits = findings, limits
        self.history: rules.History | None = None
        self.stopped_by: Finding | None = None
        self.rolled_back_to: str | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.history = rules.History(state.max_steps, args.learning_rate)
        for row in state.log_history:  # of a resumed run
            self._keep(row)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """A gradient that is no number stops the run before the optimizer carries it into every weight."""
        one = next((each.grad for each in model.parameters() if each.grad is not None), None)
        if one is not None and not torch.isfinite(one).all():  # clipping has spread a NaN over all of them
            self.findings.stop(not_finite("gradient", state.global_step, float("nan")))

    @advice("health")
    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.history is None or not logs or "train_runtime" in logs:
            return
        self._keep({"step": state.global_step, **logs})
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            self.findings.stop(not_finite("gradient", state.global_step, logs["grad_norm"]))
        for finding in rules.judged(self.history, self.limits) if self.history.train else ():
            self.act(finding, control)

    def act(self, finding: Finding, control: TrainerControl) -> None:
        """Add a new finding and do with the run what health.action says."""
        if finding.code in self.findings:
            return
        self.findings.add(finding)
        if self.limits.action != "warn":
            self.stopped_by = self.stopped_by or finding
            control.should_training_stop = True

    def _keep(self, row: dict) -> None:
        if any(name.startswith("eval_") for name in row):
            self.history.held_out.append({name.removeprefix("eval_"): value for name, value in row.items()})
        elif "loss" in row:
            self.history.train.append(row)
