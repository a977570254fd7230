"""Where a run's metrics go: <run>/metrics.jsonl always, W&B as the machine allows it, one line per step."""

import json
import math
import os
import re
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from tqdm.auto import tqdm
from transformers import TrainerCallback

from preftune.config.errors import advice, brief
from preftune.config.files import write_text
from preftune.config.hardware import wandb_mode
from preftune.config.processes import main_process
from preftune.plan.text import duration
from preftune.report.record import metrics

LOGIN_SECONDS = 20  # a key without a network would block for about 100 s
FINISH_SECONDS = 120  # the same at the end; what was not sent by then stays on disk
TABLES = {  # what is logged as a table, as tables/<name>, and its columns
    "data_findings": ("code", "severity", "count", "of", "says", "examples", "remedy"),
    "findings": ("code", "step", "value", "threshold", "meaning", "remedy"),
    "samples": ("step", "prompt", "before", "answer", "tokens"),
}
TITLE = 64  # characters of an alert's title that W&B takes
SHOWN = {  # what the line of a logging step says, in this order
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "logps/chosen_per_token": "chosen/token",
    "logps/rejected_per_token": "rejected/token",
    "mean_token_accuracy": "token accuracy",
    "accuracy": "accuracy",
    "margin": "margin",
    "reward": "reward",
    "kl": "KL",
    "completions/mean_length": "tokens per answer",
    "grad_norm": "grad norm",
    "learning_rate": "lr",
}


class MetricsFile(TrainerCallback):
    """One JSON object per line for what is logged: step, seconds since the start, and the metrics by TRL's names."""

    def __init__(self, path: Path):
        self.path, self.started = path, time.time()

    def on_train_begin(self, args, state, control, **kwargs):
        """Of a run that goes on from a checkpoint, leave out what was logged after it: those steps come again."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = [row for row in metrics(self.path.parent) if row["step"] <= state.global_step]
        self.started -= kept[-1]["seconds"] if kept else 0
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            row = {"step": state.global_step, "seconds": round(time.time() - self.started, 3), **logs}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


class Progress(TrainerCallback):
    """A progress bar with one line per logging step, in the place of Trainer's bar and its printed dictionaries.

    The bar says how the training rows stand: margin, accuracy and tokens per second.
    """

    def __init__(self, title: str, silent: bool = False):
        self.title, self.silent, self.bar = title, silent, None
        self.seen: tuple[float, float] | None = None  # seconds, tokens at the last logging step

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.title,
                unit="step",
                leave=False,
                disable=self.silent,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        losses = [key for key in logs if re.match("eval_.*loss$", key)]
        plain = "eval_" if any(key.startswith("eval_") for key in logs) else ""
        prefix = min(losses, key=len, default=plain).removesuffix("loss")  # eval_; of data.eval_sets.ood eval_ood_
        held_out = "  held-out " + prefix[5:-1] if prefix else ""
        values = {key.removeprefix(prefix): value for key, value in logs.items()}
        shown = "  ".join(f"{label} {values[key]:.3g}" for key, label in SHOWN.items() if key in values)
        tqdm.write(f"{self.title} step {state.global_step}/{state.max_steps}{held_out.rstrip()}  {shown}")
        if self.bar is not None and not held_out:
            self.bar.set_postfix_str(self.progress_suffix(logs, state.num_input_tokens_seen))

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()

    def progress_suffix(self, logs: dict, tokens_seen: int = 0) -> str:
        """What the bar ends with. Tokens a second are the trainer's own, or counted from its tokens and the clock."""
        says = [f"{SHOWN[key]} {logs[key]:.3g}" for key in ("rewards/margins", "rewards/accuracies") if key in logs]
        speed = logs.get("tokens_per_second")
        now, tokens = time.monotonic(), logs.get("num_tokens") or tokens_seen
        if speed is None and tokens and self.seen is not None:
            speed = (tokens - self.seen[1]) / max(now - self.seen[0], 1e-9)
        self.seen = (now, tokens)
        return ", ".join([*says, f"{speed:,.0f} tokens/s"] if speed else says)


class Pace(TrainerCallback):
    """How long the training will take, by its own first steps: the plan knows no more than what a device should do.

    `seconds` is None until that is known, and in runs too short to say. The first step, which is slow, is left out. A
    row of the `held_out` that are evaluated takes a third of a row that is trained, which runs backward too.
    """

    LEAST, MOST = 2, 20  # steps that are measured: a tenth of all

    def __init__(self, held_out: int = 0):
        self.held_out, self.first, self.since, self.seconds = held_out, 0, 0.0, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.first = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        steps, done = state.max_steps - self.first, state.global_step - self.first - 1
        measured = min(max(self.LEAST, steps // 10), self.MOST)
        if done == 0:
            self.since = time.monotonic()
        elif done == measured and steps >= 3 * measured:
            evaluations = {"epoch": math.ceil(state.num_train_epochs), "steps": steps // (state.eval_steps or steps)}
            held_out = self.held_out * evaluations.get(args.eval_strategy, 0) / 3
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            self.seconds = (time.monotonic() - self.since) / measured * (steps + held_out / rows)
            if state.is_world_process_zero:
                tqdm.write(f"plan: {duration(self.seconds)} of training, by the first {done + 1} steps")


class Tracker:
    """The W&B run of one training job: started before the trainer, finished at the job's end, whatever ends it.

    Where metrics go elsewhere, and on every rank but the first, it does nothing and neither do its methods. `line` says
    where the run went and, offline, how to send it.
    """

    def __init__(self, cfg: DictConfig, run: Path, choices: dict[str, str]):
        self.run, self.active = run, cfg.tracking.report_to == "wandb" and main_process()
        self.line, self.sampled = "", []
        if self.active and os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
            print("W&B: off (WANDB_DISABLED); metrics.jsonl and report.html hold what it would show")
            self.active = False
            os.environ["WANDB_MODE"] = "disabled"
        if self.active:
            self.active = False
            with advice("W&B"):
                self._start(cfg, run, choices)
                self.active = True
            if not self.active:
                os.environ["WANDB_MODE"] = "disabled"  # TRL's own callback would try once more

    def _start(self, cfg: DictConfig, run: Path, choices: dict[str, str]) -> None:
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")  # else a kill loses the first 15 s
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode, self.line = wandb_mode()
        names = [choices[key] for key in ("model", "data", "loss") if key in choices]
        settings = {
            "project": cfg.tracking.project,
            "group": cfg.tracking.group or "-".join(names[:2]) or None,
            "tags": [*names, *cfg.tracking.tags],
            "name": cfg.tracking.run_name or run_name(run),
            "dir": str(run),
            # the names of the chosen files beside the groups: DPO's losses differ in a list, which no chart groups by
            "config": OmegaConf.to_container(cfg, resolve=True) | {"choices": choices},
        }
        # disable_code: uncommitted changes are nobody else's; the commit is in the manifest
        common = {"disable_code": True, "finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
        try:
            self.wandb = wandb.init(
                mode=mode, settings=wandb.Settings(init_timeout=LOGIN_SECONDS, **common), **settings
            )
        except wandb.errors.CommError as error:
            self.line = f"W&B did not take the run ({type(error).__name__}): offline"
            self.wandb = wandb.init(mode="offline", settings=wandb.Settings(**common), **settings)
        if self.wandb.settings._offline:
            self.line += f"; send it later with `wandb sync {self.folder}`"

    @property
    def folder(self) -> Path:
        """Where W&B keeps the run on this machine."""
        return Path(self.wandb.dir).parent

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not self.active:
            return
        try:
            self.wandb.finish(exit_code=exit_code(error))
        except Exception as error:  # a network, a full disk: nothing of it is worth the run
            print(f"W&B did not take the whole run ({brief(error)}); send it with `wandb sync {self.folder}`")

    @advice("W&B")
    def manifest(self, manifest: dict) -> None:
        """What made the run (runs.manifest), as one more group of the config, so that runs can be filtered by it."""
        if self.active:
            self.wandb.config.update({"manifest": manifest}, allow_val_change=True)

    @advice("W&B")
    def summary(self, summary: dict) -> None:
        """summary.json: its single values under their names there, its answers as the last rows of `samples`."""
        if not self.active:
            return
        self.wandb.summary.update({k: v for k, v in summary.items() if isinstance(v, (bool, int, float, str))})
        step = self.wandb.summary.get("train/global_step")
        answered = [row | {"answer": row["after"]} for row in summary.get("samples") or [] if "after" in row]
        if answered and step not in {row["step"] for row in self.sampled}:
            self.samples(step, answered)

    @advice("W&B")
    def data_findings(self, findings: list[dict]) -> None:
        """The data's verdict as a table; without rows where nothing was found."""
        self._table("data_findings", findings)

    @advice("W&B")
    def findings(self, findings: list[dict]) -> None:
        """All findings of the run's health as a table; without rows where it is healthy."""
        self._table("findings", findings)

    @advice("W&B")
    def alert(self, finding: dict) -> None:
        """One finding, as it is made, as an alert that W&B mails or posts as its user has it set."""
        if self.active:
            values = f"step {finding['step']}: {finding['value']} (threshold {finding['threshold']})"
            text = f"{values}. {finding['meaning']} {finding['remedy']}"
            self.wandb.alert(finding["code"][:TITLE], text, "WARN", wait_duration=1)

    @advice("W&B")
    def samples(self, step: int, rows: list[dict]) -> None:
        """Answers at one step (prompt, before, answer), added to one table, which keeps those of all steps."""
        if self.active:
            self.sampled += [row | {"step": step} for row in rows]
            self._table("samples", self.sampled, step)

    def _table(self, name: str, rows: list[dict], step: int | None = None) -> None:
        """Log a table anew with all of its rows: W&B shows a run's last one, and its history the earlier ones.

        Online, W&B is asked for the table's name first; without a network that costs 19 s and raises nothing.
        """
        if not self.active:
            return
        import wandb

        cells = [[plain(row.get(column)) for column in TABLES[name]] for row in rows]
        table = wandb.Table(columns=list(TABLES[name]), data=cells, allow_mixed_types=True)
        try:
            self.wandb.log({f"tables/{name}": table} | ({} if step is None else {"train/global_step": step}))
        except wandb.Error as error:  # a key that is no longer taken must not end a training run
            print(f"W&B did not take tables/{name} ({error}); its rows are in {self.run} as well")


def plain(value: object) -> object:
    """A table's cell: numbers and texts as they are, anything else as its text."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)


def run_name(run: Path) -> str:
    """The run directory's name; a stage of a pipeline also bears the pipeline's."""
    return f"{run.parent.name}/{run.name}" if (run.parent / "config.yaml").exists() else run.name


def exit_code(error: BaseException | None) -> int:
    """The code that W&B shows for how a job ended: that of the process, 0 where nothing went wrong."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(bool(error.code))
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 0 if error is None else getattr(error, "exit_code", 1)
