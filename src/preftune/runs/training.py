"""One training run, from its config to its report."""

import dataclasses
import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from transformers import Trainer, TrainerState

from preftune import fastpath
from preftune.config import check, hardware
from preftune.config.errors import Interrupted, Stopped, advice, brief
from preftune.config.files import write_json
from preftune.config.hardware import peak_memory_gb
from preftune.config.processes import main_process, sharding_engine, world_size
from preftune.config.stages import SELECTIVE
from preftune.data.load import Data
from preftune.evaluate.snapshots import Look, last_evaluation, look, summarize
from preftune.fastpath.checkpointing import keep_products
from preftune.health.end import EndProofs
from preftune.health.findings import Findings
from preftune.health.gate import perplexity_gate
from preftune.health.monitor import Monitor
from preftune.health.start import ProvedStart
from preftune.models import load, sharding
from preftune.models.identity import fingerprint
from preftune.models.load import load_tokenizer, quiet, require_whole
from preftune.models.tokenizer import carry
from preftune.plan import plan, text
from preftune.plan.plan import require_fits
from preftune.report import page, terminal
from preftune.report.record import MODEL_ONLY, way_on
from preftune.runs import checkpoints, directory
from preftune.runs.checkpoints import Seal, carry_on, require_readable, require_resumable, save_whole
from preftune.runs.samples import Samples
from preftune.runs.signals import Interruption
from preftune.runs.tracking import MetricsFile, Progress, Tracker
from preftune.trainers.build import build, load_data, with_metrics


def train(cfg: DictConfig, choices: dict[str, str] | None = None) -> dict:
    """Run one training job and show what it changed: `stage`, then its summary as a table. Returns the summary."""
    summary = stage(cfg, choices)
    print(terminal.table(summary, Path(cfg.output_dir)))
    return summary


def stage(cfg: DictConfig, choices: dict[str, str] | None = None) -> dict:
    """One training job from config to report: checks, data, model, trainer, gate, training, evaluation, files, W&B.

    `choices` names the files that the config was composed of; without it Hydra is asked. Returns what summary.json
    holds. Raises ConfigError, RunError, DataError or ModelError before anything is trained, each with a remedy; Stopped
    where a guard ends the run, Interrupted where a signal does. Whatever ends it, its report is written.
    """
    quiet()
    check.require(cfg)
    choices = choices or chosen_files(cfg)
    with (
        directory.opened(cfg, write_report) as run,
        Interruption() as interruption,
        Tracker(cfg, run, choices) as tracker,
    ):
        findings = Findings(run, tracker.alert)
        try:
            return _trained(cfg, run, choices, tracker, findings, interruption)
        finally:
            tracker.findings(findings.rows())


def write_report(run: Path) -> None:
    """Write report.html; what is wrong with it must not change how the run itself ended."""
    try:
        page.write(run)
    except Exception as error:
        print(f"report: not written ({type(error).__name__}: {error}); python -m recipes.report {run}", file=sys.stderr)


def _trained(
    cfg: DictConfig,
    run: Path,
    choices: dict[str, str],
    tracker: Tracker,
    findings: Findings,
    interruption: Interruption,
) -> dict:
    started = time.time()
    print(hardware.describe() + (", bf16" if cfg.hardware.bf16 else ", float32"))
    if cfg.train.get("save_only_model"):
        print(f"checkpoints: {MODEL_ONLY} leaves optimizer, schedule and random state out: no resume=true from them")
    if cfg.resume:
        require_resumable(run)
    require_whole(cfg.model)
    tokenizer = load_tokenizer(cfg.model)
    data = load_data(cfg, tokenizer)
    print(f"data: {data.line}")
    planned = announce(cfg, data, tokenizer)
    trainer = build_trainer(cfg, data, tokenizer)
    trainer.findings = findings
    with sharding.whole(trainer.model):
        print(f"model: {cfg.model.path}, {load.describe(trainer.model)}")
    print(f"run: {run}" + (f"; {tracker.line}" if tracker.active else ""), flush=True)
    describe_run(cfg, run, trainer, data, choices, tracker)
    looks = [snapshot("start", trainer, data, cfg)]
    gate = pass_gate(cfg, run, data, looks[0], findings)
    monitor = watch(cfg, run, trainer, looks[0], data, choices, tracker, findings)
    proofs = EndProofs(trainer, findings, data.eval_pairs)
    trainer.add_callback(proofs)
    trainer.add_callback(interruption)
    run_training(trainer, resumed_from(cfg, run, trainer))
    end_early(cfg, run, trainer, monitor, interruption)
    held_out = last_evaluation(trainer) if trainer.eval_dataset is not None else {}
    save_whole(run / "model", lambda folder: save(trainer, folder))
    proofs.after_saving(run / "model")
    looks.append(snapshot(f"after {choices.get('loss', 'training')}", trainer, data, cfg))
    summary = summarize(trainer, looks, held_out) | {
        "gate": gate,
        "plan": planned,
        "findings": len(findings.rows()),
        "proofs": [dataclasses.asdict(each) for each in findings.proofs.values()],
        "rolled_back_to": monitor.rolled_back_to,
        "peak_memory_gb": peak_memory_gb(),
        "seconds": round(time.time() - started, 1),
    }
    if main_process():
        write_json(run / "summary.json", summary)
    tracker.summary(summary)
    if monitor.stopped_by:
        raise Stopped(f"Stopped: {monitor.stopped_by}")
    if proofs.failed:
        raise Stopped(f"Stopped: {proofs.failed} The model is in {run}/model.")
    return summary


def save(trainer: Trainer, folder: str) -> None:
    """The model or its adapter with its tokenizer, and the tokens that end an answer, which PEFT leaves out."""
    carry(trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model))
    trainer.save_model(folder)
    generation = getattr(trainer.model, "generation_config", None)
    if generation is not None and main_process():
        with advice("generation_config.json"):  # transformers refuses some that models come with
            generation.save_pretrained(folder)


def build_trainer(cfg: DictConfig, data: Data | None = None, tokenizer=None) -> Trainer:
    """The trainer of a run: TRL's class under the fast path, the metrics and the proof of the first step."""
    tokenizer = tokenizer or load_tokenizer(cfg.model)
    data = data or load_data(cfg, tokenizer)
    trainer_class, settings = get_class(cfg.loss.trainer), dict(cfg.fastpath)
    if settings.pop("enabled"):
        trainer_class = fastpath.trainer_class(trainer_class, **settings)
    measured = with_metrics(trainer_class)
    trainer = build(cfg, data, tokenizer, type(trainer_class.__name__, (ProvedStart, measured), {}))
    if trainer.args.gradient_checkpointing and cfg.hardware.get("gradient_checkpointing") == SELECTIVE:
        keep_products(trainer.model)
    return trainer


def snapshot(name: str, trainer: Trainer, data: Data, cfg: DictConfig) -> Look | None:
    """`summary.look`; None where there are no pairs, or where the model could not be scored or would not answer."""
    with advice(f"held-out pairs ({name})"):
        return look(name, trainer, data, cfg)


def announce(cfg: DictConfig, data: Data, tokenizer) -> dict | None:
    """Say what the run will take, unless fit_check=false. Raises PlanError where that is more than there is."""
    if not cfg.fit_check:
        return None
    try:
        made = plan.plan(cfg, data, tokenizer, world_size=world_size(), sharding=sharding_engine(cfg))
        print("\n".join(text.lines(made)), flush=True)
    except Exception as error:  # it only advises: an architecture, a file or an adapter that it does not know
        print(f"plan: not available ({brief(error)})", file=sys.stderr, flush=True)
        return None
    require_fits(made, cfg)
    return dataclasses.asdict(made)


def describe_run(cfg: DictConfig, run: Path, trainer: Trainer, data: Data, choices: dict, tracker: Tracker) -> None:
    """Write and log what the run is made of: the verdict on its data, its manifest."""
    found = [dataclasses.asdict(finding) for finding in data.findings]
    manifest = directory.manifest(cfg, **identities(cfg, trainer, data, choices))
    if main_process():
        write_json(run / "data_findings.json", found)
        write_json(run / "manifest.json", manifest)
    tracker.data_findings(found)
    tracker.manifest(manifest)


def pass_gate(cfg: DictConfig, run: Path, data: Data, start: Look | None, findings: Findings) -> dict | None:
    """Hold a preference stage to the perplexity of what it starts from; gate.json says what was found.

    Raises Stopped where it is above gate.max_perplexity, unless gate.on_fail=warn.
    """
    if not cfg.loss.needs_sft:
        return None
    if start is None:
        print("gate: not measured, for there are no held-out pairs (data.eval_split, data.eval_fraction)")
        return None
    gate, finding = perplexity_gate(start.scores, data.eval_pairs, cfg.gate)
    if main_process():
        write_json(run / "gate.json", gate)
    print(
        f"gate: perplexity {gate['perplexity']:.2f} on {gate['pairs']} held-out chosen answers (at most "
        f"{cfg.gate.max_perplexity:g}); {gate['strange_count']} of them far outside (gate.json)"
    )
    if finding and cfg.gate.on_fail == "stop":
        findings.stop(finding)
    elif finding:
        findings.add(finding)
    return gate


def watch(
    cfg: DictConfig,
    run: Path,
    trainer: Trainer,
    start: Look | None,
    data: Data,
    choices: dict[str, str],
    tracker: Tracker,
    findings: Findings,
) -> Monitor:
    """Add what sees the training: files, progress, monitor, sample answers, seals of checkpoints."""
    monitor = Monitor(findings, cfg.health)
    callbacks = [
        MetricsFile(run / "metrics.jsonl"),
        Progress(choices.get("loss", "train")),
        monitor,
        Seal(trainer),
    ]
    if cfg.sample_steps and start is not None:
        prompts = data.eval_pairs[: cfg.samples]["prompt"]
        limit = cfg.health.length_drift
        callbacks.append(
            Samples(
                run,
                trainer.processing_class,
                prompts,
                start.answers,
                cfg.sample_steps,
                limit,
                monitor.act,
                tracker.samples,
            )
        )
    for callback in callbacks:
        trainer.add_callback(callback)
    return monitor


def resumed_from(cfg: DictConfig, run: Path, trainer: Trainer) -> Path | None:
    """The checkpoint to go on from, the same on every rank; None: from the beginning."""
    if not cfg.resume:
        return None
    found = checkpoints.newest(run)
    if found and trainer.is_deepspeed_enabled:  # its engine, which saves the model, is made by training alone
        state = TrainerState.load_from_json(str(found / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            found = checkpoints.newest(run, before=state.global_step)
    print(f"resume: {found.name if found else 'no whole checkpoint, from the beginning'}")
    if found:
        require_readable(cfg, found, trainer.args.train_batch_size)
    return found


def run_training(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if there is one. One of the last step is only loaded: Trainer would take a step more."""
    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    carry_on(trainer, checkpoint, state)
    if trainer.args.ignore_data_skip:
        print("resume: train.ignore_data_skip=true: the epoch begins anew, not with the rows that are left of it")
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    checkpoints.restore(trainer, checkpoint)
    trainer.state = state


def end_early(cfg: DictConfig, run: Path, trainer: Trainer, monitor: Monitor, interruption: Interruption) -> None:
    """Raise Interrupted or Stopped where a signal or the monitor ended the training; roll back where that is asked."""
    if interruption.signal is not None:
        step = trainer.state.global_step
        raise Interrupted(
            interruption.signal,
            f"Interrupted: {run}/checkpoint-{step} holds step {step} of {trainer.state.max_steps}. {way_on(cfg)}",
        )
    if monitor.stopped_by is None:
        return
    if cfg.health.action == "rollback" and (good := checkpoints.newest(run, before=monitor.stopped_by.step)):
        checkpoints.restore(trainer, good)
        monitor.rolled_back_to = good.name
        print(f"health: rolled back to {good.name}")
        return
    raise Stopped(f"Stopped: {monitor.stopped_by} The checkpoints in {run} stay.")


def identities(cfg: DictConfig, trainer: Trainer, data: Data, choices: dict[str, str]) -> dict:
    """What the run was made of: config files, data, model weights, reference."""
    with sharding.whole(trainer.model):
        weights = fingerprint(trainer.model)
    return {
        "choices": choices,
        "data": {"path": OmegaConf.to_object(cfg.data)["path"], "fingerprint": data.fingerprint},
        "model": {"path": cfg.model.path, "revision": cfg.model.revision, "weights": weights},
        "reference": reference_of(trainer, cfg),
    }


def reference_of(trainer: Trainer, cfg: DictConfig) -> str:
    """What the rewards are measured against, in words."""
    if not hasattr(trainer, "ref_model"):
        return "none: this loss has no reference"
    if not trainer.starts_as_reference:
        return f"another model, {cfg.model.reference}"
    if getattr(trainer, "precompute_ref_logps", False):
        return "the model before its first step, its log-probs computed beforehand"
    return (
        "the model with its adapter off" if trainer.ref_model is None else "a copy of the model before its first step"
    )


def chosen_files(cfg: DictConfig) -> dict[str, str]:
    """Which file of each group was chosen (loss: ipo, model: mistral7b, …); empty outside a recipe."""
    if not HydraConfig.initialized():
        return {}
    return {k: v for k, v in HydraConfig.get().runtime.choices.items() if k in cfg and v is not None}
