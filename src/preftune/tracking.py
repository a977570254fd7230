"""Where a run's metrics go: <run>/metrics.jsonl always, Weights & Biases as the machine allows it, one line a step."""

import json
import netrc
import os
import time
from pathlib import Path
from urllib.parse import urlparse

from omegaconf import DictConfig, OmegaConf
from tqdm.auto import tqdm
from transformers import TrainerCallback

LOGIN_SECONDS = 20  # a key without a network would block for about 100 s
SHOWN = {  # what the line of a logging step says, in this order
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "logps/chosen_per_token": "chosen/token",
    "logps/rejected_per_token": "rejected/token",
    "mean_token_accuracy": "token accuracy",
    "grad_norm": "grad norm",
    "learning_rate": "lr",
}


class MetricsFile(TrainerCallback):
    """One JSON object a line for what is logged: step, seconds since the start, and the metrics by TRL's names."""

    def __init__(self, path: Path):
        self.path, self.started = path, time.time()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            row = {"step": state.global_step, "seconds": round(time.time() - self.started, 3), **logs}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


class Progress(TrainerCallback):
    """A progress bar with one line a logging step, in the place of Trainer's bar and its printed dictionaries."""

    def __init__(self, title: str):
        self.title, self.bar = title, None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", leave=False)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        held_out = any(key.startswith("eval_") for key in logs)
        values = {key.removeprefix("eval_"): value for key, value in logs.items()}
        shown = "  ".join(f"{label} {values[key]:.3g}" for key, label in SHOWN.items() if key in values)
        tqdm.write(
            f"{self.title} step {state.global_step}/{state.max_steps}{'  held-out' if held_out else ''}  {shown}"
        )

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


class Tracker:
    """The W&B run of one training job: started before the trainer, finished at the job's end, whatever ends it."""

    def __init__(self, cfg: DictConfig, run: Path, choices: dict[str, str]):
        self.run, self.active = run, cfg.tracking.report_to == "wandb" and int(os.environ.get("RANK", 0)) == 0
        if not self.active:
            return
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")  # else a kill loses the first 15 s
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode, self.line = wandb_mode()
        names = [choices[key] for key in ("model", "data", "loss") if key in choices]
        settings = {
            "project": cfg.tracking.project,
            "group": cfg.tracking.group or "-".join(names[:2]) or None,
            "tags": [*names, *cfg.tracking.tags],
            "name": cfg.tracking.run_name or run.name,
            "dir": str(run),
            "config": OmegaConf.to_container(cfg, resolve=True),
        }
        try:
            wandb.init(mode=mode, settings=wandb.Settings(init_timeout=LOGIN_SECONDS), **settings)
        except wandb.errors.CommError as error:
            self.line = f"W&B does not answer ({type(error).__name__}): offline"
            wandb.init(mode="offline", **settings)
        if wandb.run.settings._offline:
            self.line += f"; send it later with `wandb sync {Path(wandb.run.dir).parent}`"

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.active:
            import wandb

            wandb.finish(exit_code=0 if kind is None else 1)


def wandb_mode() -> tuple[str, str]:
    """(mode, why) for wandb.init: WANDB_MODE if set, online where a key is found, else offline. Never asks."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode, f"W&B {mode} (WANDB_MODE)"
    host = urlparse(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    if os.environ.get("WANDB_API_KEY") or known:
        return "online", "W&B online"
    return "offline", "W&B offline: no API key found (WANDB_API_KEY, or `wandb login`)"
