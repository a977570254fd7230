"""The jobs of a multirun: a directory for each, what is finished is skipped, and the number that a sweeper seeks."""

import hashlib
import json
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from preftune.report import record
from preftune.runs import directory
from preftune.runs.directory import RunError

LONGEST = 120  # characters of a directory's name


def in_sweep() -> bool:
    """Whether this process runs a job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def beside_others() -> bool:
    """Whether other jobs of the sweep run at the same time: each then trains in a process of its own.

    So that one that is killed, by the system for its memory say, does not take its launcher's other jobs with it.
    """
    return in_sweep() and HydraConfig.get().runtime.choices.get("hydra/launcher") != "basic"


def finished_before(cfg: DictConfig) -> bool:
    """Settle the directory of a sweep's job, and say whether it is finished; one begun before goes on (resume).

    An output_dir that all jobs share is the sweep's folder: each job lies below, named by what it does not share with
    the others. So the same command once more does what is left. Raises RunError where what lies there was made of
    other settings.
    """
    if not in_sweep() or "of_job" in OmegaConf.to_container(cfg, resolve=False)["output_dir"]:
        return False
    cfg.output_dir = str(Path(cfg.output_dir) / job_name(HydraConfig.get().job.override_dirname))
    run = Path(cfg.output_dir)
    if not record.begun(run):
        return False
    if (run / "summary.json").exists():
        if changed := directory.changed(cfg, run):
            raise RunError(
                f"{', '.join(changed)} differ from {run}/config.yaml, which is finished. Give the same settings, or "
                "start another sweep: output_dir=ANOTHER"
            )
        print(f"{run}: finished before, skipped", flush=True)
        return True
    cfg.resume = True
    return False


def job_name(overrides: str) -> str:
    """A folder's name for `loss=ipo,loss.beta=0.1`: itself, or where it is long, its beginning and a hash."""
    name = overrides.replace("/", "_").replace(" ", "") or "job"
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def objective(output_dir: str) -> float | None:
    """What a sweeper makes large: the share of held-out pairs in which the chosen answer is preferred at the end.

    By the implicit reward where the loss has a β, else by the log-prob. None where there is no such number.
    """
    path = Path(output_dir) / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    found = summary.get("accuracy_after")
    return summary.get("logp_accuracy_after") if found is None else found
