"""One training run, from its config to its report."""

import contextlib
import dataclasses
import shutil
import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase, Trainer, TrainerState

from preftune import fastpath
from preftune.config import check, hardware
from preftune.config.errors import Interrupted, Stopped, advice, brief
from preftune.config.files import write_json
from preftune.config.hardware import forget_peak, peak_memory_gb, resident_gb
from preftune.config.processes import main_process, sharding_engine, world_size
from preftune.config.stages import SELECTIVE
from preftune.data.load import Data
from preftune.evaluate import generation
from preftune.evaluate.snapshots import Snapshot, last_evaluation, summarize, take_snapshot
from preftune.fastpath.checkpointing import keep_products
from preftune.health.end import EndProofs
from preftune.health.findings import Findings
from preftune.health.gate import perplexity_gate
from preftune.health.monitor import Monitor
from preftune.health.start import ProvedStart
from preftune.models import adapters, load, sharding
from preftune.models.identity import fingerprint
from preftune.models.load import continued, load_tokenizer, location, quiet
from preftune.models.tokenizer import carry
from preftune.plan import plan, text
from preftune.plan.plan import require_fits
from preftune.report import terminal
from preftune.report.record import MODEL_ONLY, way_on
from preftune.runs import checkpoints, directory
from preftune.runs.checkpoints import Seal, carry_on, require_readable, require_resumable, save_whole
from preftune.runs.samples import Samples
from preftune.runs.signals import Interruption
from preftune.runs.tracking import MetricsFile, Pace, Progress, Tracker
from preftune.runs.work import Counted, Work
from preftune.trainers.build import build, load_data, with_metrics


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training holds from its first line to its last: the config, the folder, and who is told what happens."""

    cfg: DictConfig
    path: Path
    choices: dict[str, str]  # which file of each group was chosen
    tracker: Tracker
    findings: Findings
    interruption: Interruption
    looks_back: bool = True  # at what it has trained; the next stage of a pipeline does, before it trains that further

    def write(self, name: str, value: object) -> None:
        """A file of the run, as JSON, by the main process alone."""
        if main_process():
            write_json(self.path / name, value)


def train(cfg: DictConfig, choices: dict[str, str] | None = None) -> dict:
    """Run one training job and show what it changed: `stage`, then its summary as a table. Returns the summary."""
    summary = stage(cfg, choices)
    print(terminal.table(summary, Path(cfg.output_dir)))
    return summary


def stage(cfg: DictConfig, choices: dict[str, str] | None = None, looks_back: bool = True) -> dict:
    """One training job from config to report: checks, data, model, trainer, gate, training, evaluation, files, W&B.

    `choices` names the files that the config was composed of; without it Hydra is asked. `looks_back`: whether the
    held-out pairs are scored and answered after training as before it. Returns what summary.json holds. Raises
    ConfigError, RunError, DataError or ModelError before anything is trained, each with a remedy; Stopped where a guard
    ends the run, Interrupted where a signal does. Whatever ends it, its report is written.
    """
    quiet()
    check.require(cfg)
    choices = choices or chosen_files(cfg)
    with (
        directory.opened(cfg, write_report) as path,
        Interruption() as interruption,
        Tracker(cfg, path, choices) as tracker,
    ):
        run = Run(cfg, path, choices, tracker, Findings(path, tracker.alert), interruption, looks_back)
        try:
            return carried_out(run)
        finally:
            tracker.findings(run.findings.rows())


def write_report(run: Path) -> None:
    """Write report.html; what is wrong with it must not change how the run itself ended."""
    from preftune.report import page  # matplotlib takes half a second, which other ranks and the start are spared

    try:
        page.write(run)
    except Exception as error:
        print(f"report: not written ({type(error).__name__}: {error}); python -m recipes.report {run}", file=sys.stderr)


def carried_out(run: Run) -> dict:
    """The steps of a run in their order; returns its summary, which summary.json and W&B then hold."""
    started = time.time()
    forget_peak()
    tokenizer, data = prepare(run)
    planned, idle = announce(run.cfg, data, tokenizer), resident_gb()
    work = Work(run.cfg.flop_budget) if run.cfg.flop_budget else None
    with work or contextlib.nullcontext():  # the reference may be scored here
        trainer = build_trainer(run.cfg, data, tokenizer)
    trainer.work, trainer.findings = work, run.findings
    describe(run, trainer, data)
    snapshots = [snapshot("start", trainer, data, run.cfg)]
    gate = pass_gate(run, data, snapshots[0])
    monitor, pace = watch(run, trainer, data, snapshots[0]), Pace(held_out_rows(trainer))
    trainer.add_callback(pace)
    proofs = EndProofs(trainer, run.findings, data.eval_pairs)
    trainer.add_callback(proofs)
    trainer.add_callback(run.interruption)
    fit(trainer, resumed_from(run, trainer))
    end_early(run, trainer, monitor)
    measured = None if run.cfg.resume else compare_with_plan(planned, trainer, pace, peak_memory_gb() - idle)
    held_out = last_evaluation(trainer) if trainer.eval_dataset is not None else {}
    save_whole(run.path / "model", lambda folder: save(trainer, folder))
    proofs.after_saving(run.path / "model")
    if run.looks_back:
        snapshots.append(snapshot(f"after {run.choices.get('loss', 'training')}", trainer, data, run.cfg))
    summary = summarize(trainer, snapshots, held_out) | {
        "gate": gate,
        "plan": planned,
        "measured": measured,
        "findings": len(run.findings.rows()),
        "proofs": [dataclasses.asdict(each) for each in run.findings.proofs.values()],
        "rolled_back_to": monitor.rolled_back_to,
        "flop": trainer.state.total_flos if work else None,
        "peak_memory_gb": peak_memory_gb(),
        "seconds": round(time.time() - started, 1),
    }
    run.write("summary.json", summary)
    run.tracker.summary(summary)
    if monitor.stopped_by:
        raise Stopped(f"Stopped: {monitor.stopped_by}")
    if proofs.failed:
        raise Stopped(f"Stopped: {proofs.failed} The model is in {run.path}/model.")
    return summary


def prepare(run: Run) -> tuple[PreTrainedTokenizerBase, Data]:
    """The tokenizer and the checked rows of a run. Raises RunError, ModelError or DataError where it cannot start."""
    cfg = run.cfg
    print(hardware.describe() + (", bf16" if cfg.hardware.bf16 else ", float32"))
    if cfg.train.get("save_only_model"):
        print(f"checkpoints: {MODEL_ONLY} leaves optimizer, schedule and random state out: no resume=true from them")
    if cfg.resume:
        require_resumable(run.path)
    if continued(cfg.model):  # what it was made with stands in the place of what `lora` says
        quantization = {"quantization": cfg.lora.quantization} if "quantization" in cfg.lora else {}
        cfg.lora = adapters.settings(location(cfg.model), cfg.model.revision) | quantization
        print(f"model: training goes on with the adapter {cfg.model.path}; its own settings, not lora's")
    tokenizer = load_tokenizer(cfg.model)
    data = load_data(cfg, tokenizer)
    print(f"data: {data.line}")
    return tokenizer, data


def save(trainer: Trainer, folder: str) -> None:
    """The model or its adapter with its tokenizer, and the tokens that end an answer, which PEFT leaves out."""
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)  # of a processor
    carry(tokenizer, trainer.accelerator.unwrap_model(trainer.model))
    trainer.save_model(folder)
    if main_process():
        shutil.rmtree(Path(folder) / "ref", ignore_errors=True)  # TRL's copy of an adapter that was continued
    generation = getattr(trainer.model, "generation_config", None)
    if generation is not None and main_process():
        with advice("generation_config.json"):  # transformers refuses some that models come with
            generation.save_pretrained(folder)


def build_trainer(cfg: DictConfig, data: Data | None = None, tokenizer: PreTrainedTokenizerBase = None) -> Trainer:
    """The trainer of a run: TRL's class under the fast path, the metrics and the proof of the first step."""
    tokenizer = tokenizer or load_tokenizer(cfg.model)
    data = data or load_data(cfg, tokenizer)
    trainer_class, settings = get_class(cfg.loss.trainer), dict(cfg.fastpath)
    if settings.pop("enabled"):
        trainer_class = fastpath.trainer_class(trainer_class, **settings)
    measured = with_metrics(trainer_class)
    trainer = build(cfg, data, tokenizer, type(trainer_class.__name__, (ProvedStart, Counted, measured), {}))
    if trainer.args.gradient_checkpointing and cfg.hardware.get("gradient_checkpointing") == SELECTIVE:
        keep_products(trainer.model)
    return trainer


def snapshot(name: str, trainer: Trainer, data: Data, cfg: DictConfig) -> Snapshot | None:
    """`take_snapshot`; None where there are no pairs, or where the model could not be scored or would not answer."""
    with advice(f"held-out pairs ({name})"):
        return take_snapshot(name, trainer, data, cfg)


def announce(cfg: DictConfig, data: Data, tokenizer: PreTrainedTokenizerBase) -> dict | None:
    """Say what the run will take, unless fit_check=false. Raises PlanError where that is more than there is."""
    if not cfg.fit_check:
        return None
    if data.images:
        print("plan: not available (rows with images are not counted)")
        return None
    try:
        made = plan.plan(cfg, data, tokenizer, world_size=world_size(), sharding=sharding_engine(cfg))
        print("\n".join(text.lines(made)), flush=True)
    except Exception as error:  # it only advises: an architecture, a file or an adapter that it does not know
        print(f"plan: not available ({brief(error)})", file=sys.stderr, flush=True)
        return None
    require_fits(made, cfg)
    return dataclasses.asdict(made)


def compare_with_plan(planned: dict | None, trainer: Trainer, pace: Pace, memory_gb: float) -> dict | None:
    """What a training took beside what was planned for it: memory above the idle process, and seconds.

    `seconds_by_first_steps` is what its first steps said; None where it was too short.
    """
    seconds = [row["train_runtime"] for row in trainer.state.log_history if "train_runtime" in row]
    if planned is None or not seconds:
        return None
    parts = planned["memory_gb"]
    memory = parts["total"] - (parts["other"] if trainer.args.device.type == "cuda" else 0)  # which PyTorch never sees
    expected = planned["seconds"] - planned["reference"]["seconds"]
    corrected = f" ({text.duration(pace.seconds)} by its first steps)" if pace.seconds else ""
    print(
        f"plan: {memory:.1f} GB and {text.duration(expected)} of training planned{corrected}, {memory_gb:.1f} GB and "
        f"{text.duration(seconds[-1])} measured"
    )
    by_first_steps = pace.seconds and round(pace.seconds, 1)
    found = {"memory_gb": round(memory_gb, 3), "seconds": round(seconds[-1], 1)}
    return found | {"seconds_by_first_steps": by_first_steps}


def held_out_rows(trainer: Trainer) -> int:
    """The rows of all held-out sets; 0 where they have no length."""
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    return sum(len(each) for each in sets.values() if hasattr(each, "__len__"))


def describe(run: Run, trainer: Trainer, data: Data) -> None:
    """Print, write and log what the run is made of: model, folder, the verdict on its data, its manifest."""
    with sharding.whole(trainer.model):
        print(f"model: {run.cfg.model.path}, {load.describe(trainer.model)}")
        weights = fingerprint(trainer.model)
    print(f"run: {run.path}" + (f"; {run.tracker.line}" if run.tracker.active else ""), flush=True)
    found = [dataclasses.asdict(finding) for finding in data.findings]
    manifest = directory.manifest(
        run.cfg,
        choices=run.choices,
        data={"path": OmegaConf.to_object(run.cfg.data)["path"], "fingerprint": data.fingerprint},
        model={"path": run.cfg.model.path, "revision": run.cfg.model.revision, "weights": weights} | joined(run.cfg),
        reference=reference_of(trainer, run.cfg),
    )
    run.write("data_findings.json", found)
    run.write("manifest.json", manifest)
    run.tracker.data_findings(found)
    run.tracker.manifest(manifest)


def joined(cfg: DictConfig) -> dict:
    """Of a run that starts from an adapter: its base, and how they were joined."""
    base = adapters.base_of(location(cfg.model), cfg.model.revision)
    return {} if base is None else {"base": base[0], "base_revision": base[1], "adapter": cfg.model.adapter}


def reference_of(trainer: Trainer, cfg: DictConfig) -> str:
    """What the rewards are measured against, in words."""
    if not hasattr(trainer, "ref_model"):
        return "none: this loss has no reference"
    if not trainer.starts_as_reference:
        return f"another model, {cfg.model.reference}"
    if getattr(trainer, "precompute_ref_logps", False):
        return "the model before its first step, its log-probs computed beforehand"
    if continued(cfg.model):
        return "a copy of the adapter before its first step"
    return (
        "the model with its adapter off" if trainer.ref_model is None else "a copy of the model before its first step"
    )


def pass_gate(run: Run, data: Data, start: Snapshot | None) -> dict | None:
    """Hold a preference stage to the perplexity of what it starts from; gate.json says what was found.

    Raises Stopped where it is above gate.max_perplexity, unless gate.on_fail=warn.
    """
    if not run.cfg.loss.needs_sft:
        return None
    if start is None:
        why = "rows hold images" if data.images else "there are no held-out pairs (data.eval_split, data.eval_fraction)"
        print(f"gate: not measured, for {why}")
        return None
    limits = run.cfg.gate
    gate, finding = perplexity_gate(start.scores, data.eval_pairs, limits)
    run.write("gate.json", gate)
    print(
        f"gate: perplexity {gate['perplexity']:.2f} on {gate['pairs']} held-out chosen answers (at most "
        f"{limits.max_perplexity:g}); {gate['outlier_count']} of them far outside (gate.json)"
    )
    if finding and limits.on_fail == "stop":
        run.findings.stop(finding)
    elif finding:
        run.findings.add(finding)
    return gate


def watch(run: Run, trainer: Trainer, data: Data, start: Snapshot | None) -> Monitor:
    """Add what sees the training: files, progress, monitor, sample answers, seals of checkpoints."""
    monitor = Monitor(run.findings, run.cfg.health)
    callbacks = [
        MetricsFile(run.path / "metrics.jsonl"),
        Progress(run.choices.get("loss", "train"), silent=run.cfg.train.get("disable_tqdm", False)),
        monitor,
        Seal(trainer),
    ]
    if run.cfg.sample_steps and start is not None:
        prompts = generation.prompts(data.eval_pairs, run.cfg.samples)
        callbacks.append(Samples(run, monitor, trainer.processing_class, prompts, start.answers))
    for callback in callbacks:
        trainer.add_callback(callback)
    return monitor


def resumed_from(run: Run, trainer: Trainer) -> Path | None:
    """The checkpoint to go on from, the same on every rank; None: from the beginning."""
    if not run.cfg.resume:
        return None
    found = checkpoints.newest(run.path)
    if found and trainer.is_deepspeed_enabled:  # its engine, which saves the model, is made by training alone
        state = TrainerState.load_from_json(str(found / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            found = checkpoints.newest(run.path, before=state.global_step)
    print(f"resume: {found.name if found else 'no whole checkpoint, from the beginning'}")
    if found:
        require_readable(run.cfg, found, trainer.args.train_batch_size)
    return found


def fit(trainer: Trainer, checkpoint: Path | None) -> None:
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


def end_early(run: Run, trainer: Trainer, monitor: Monitor) -> None:
    """Raise Interrupted or Stopped where a signal or the monitor ended the training; roll back where that is asked."""
    if run.interruption.signal is not None:
        step = trainer.state.global_step
        raise Interrupted(
            run.interruption.signal,
            f"Interrupted: {run.path}/checkpoint-{step} holds step {step} of {trainer.state.max_steps}. "
            f"{way_on(run.cfg)}",
        )
    if monitor.stopped_by is None:
        return
    if run.cfg.health.action == "rollback" and (good := checkpoints.newest(run.path, monitor.stopped_by.step)):
        checkpoints.restore(trainer, good)
        monitor.rolled_back_to = good.name
        trainer.state.global_step = int(good.name.split("-")[1])  # whose evaluation is the result's
        print(f"health: rolled back to {good.name}")
        return
    raise Stopped(f"Stopped: {monitor.stopped_by} The checkpoints in {run.path} stay.")


def chosen_files(cfg: DictConfig) -> dict[str, str]:
    """Which file of each group was chosen (loss: ipo, model: mistral7b, …); empty outside a recipe."""
    if not HydraConfig.initialized():
        return {}
    return {k: v for k, v in HydraConfig.get().runtime.choices.items() if k in cfg and v is not None}
