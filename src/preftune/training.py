"""One training run: config groups in, one TRL trainer out, and a run directory that says what happened."""

import copy
import dataclasses
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import datasets
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from preftune import checks, evaluate, fastpath, hardware, metrics, models, report, runs
from preftune.data import Data, load
from preftune.tracking import MetricsFile, Progress, Tracker


def trainer_arguments(cfg: DictConfig) -> dict:
    """The keyword arguments of the trainer's config class: `train`, `loss` and `hardware` in one, with no key twice.

    Raises ValueError where two groups give the same key.
    """
    merged = {}
    for group in ("train", "loss", "hardware"):
        given = OmegaConf.to_container(cfg[group], resolve=True)
        given = {key: value for key, value in given.items() if key not in checks.RESERVED[group]}
        if twice := merged.keys() & given.keys():
            raise ValueError(f"{', '.join(sorted(twice))}: given in {group} and in another group of trainer arguments")
        merged |= given
    return merged


def build_trainer(cfg: DictConfig, data: Data | None = None, tokenizer=None) -> Trainer:
    """The TRL trainer that `cfg` describes, its data loaded and its reference ready.

    `loss.trainer` names the class; its config class stands beside it under TRL's own rule (XTrainer, XConfig).
    Raises ModelError and DataError where the model or the data cannot be used.
    """
    trainer_class = get_class(cfg.loss.trainer)
    args_class = get_class(cfg.loss.trainer.removesuffix("Trainer") + "Config")
    arguments = trainer_arguments(cfg)
    tokenizer = tokenizer or models.load_tokenizer(cfg.model)
    data = data or load_data(cfg, tokenizer)
    if data.eval is None:
        arguments["eval_strategy"] = "no"
    evaluated = None if arguments["eval_strategy"] == "no" else data.eval
    if "balance_labels" in cfg.loss and cfg.loss.balance_labels and data.kto_weights:
        arguments |= {key: arguments[key] * weight for key, weight in data.kto_weights.items()}
        print(f"KTO weights: {', '.join(f'{key} {arguments[key]:g}' for key in data.kto_weights)}")
    args = args_class(
        output_dir=cfg.output_dir,
        run_name=Path(cfg.output_dir).name,
        report_to=cfg.tracking.report_to,
        logging_first_step=True,
        disable_tqdm=True,  # Progress shows one bar of our own
        **arguments,
    )
    model = models.load_model(cfg.model, cfg.lora, args.use_cpu)
    adapter = {key: value for key, value in cfg.lora.items() if key != "quantization"}
    trainer = with_metrics(faster(trainer_class, cfg.fastpath))(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=data.train,
        eval_dataset=evaluated,
        peft_config=LoraConfig(**OmegaConf.to_container(OmegaConf.create(adapter))) if cfg.lora else None,
        **own_reference(model, cfg, arguments),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def own_reference(model, cfg: DictConfig, arguments: dict) -> dict:
    """A copy of the model as the reference, where TRL would load one anew by name: without our revision and merges."""
    if cfg.lora or arguments.get("precompute_ref_log_probs") is not False:
        return {}
    return {"ref_model": copy.deepcopy(model)}


def faster(trainer_class: type, settings: DictConfig) -> type:
    """`trainer_class` with preftune's fast path over it, unless `fastpath.enabled` is false."""
    if not settings.enabled:
        return trainer_class
    return fastpath.trainer_class(trainer_class, **{key: settings[key] for key in settings if key != "enabled"})


def with_metrics(trainer_class: type) -> type:
    """`trainer_class` with preftune's metrics beside TRL's, by what the class computes."""
    mixins = {"_compute_loss": metrics.PerTokenMetrics, "get_batch_loss_metrics": metrics.PerTokenMeans}
    for method, mixin in mixins.items():
        if hasattr(trainer_class, method):
            return type(trainer_class.__name__, (mixin, trainer_class), {})
    return trainer_class


def load_data(cfg: DictConfig, tokenizer) -> Data:
    """The checked train and eval rows of `cfg` in the form that its trainer takes."""
    return load(cfg.data, view=cfg.loss.view, tokenizer=tokenizer, max_length=cfg.train.max_length, seed=cfg.train.seed)


def train(cfg: DictConfig, choices: dict[str, str] | None = None) -> dict:
    """Run one training job and show what it changed: `stage`, then its summary as a table. Returns the summary."""
    summary = stage(cfg, choices)
    print(report.table(summary, Path(cfg.output_dir)))
    return summary


def stage(cfg: DictConfig, choices: dict[str, str] | None = None) -> dict:
    """One training job from config to summary: checks, data, model, trainer, evaluation, files, W&B.

    `choices` names the files that the config was composed of; without it Hydra is asked. Returns what summary.json
    holds. Raises ConfigError, RunError, DataError or ModelError before anything is trained, each with a remedy.
    """
    quiet()
    checks.require(cfg)
    started = time.time()
    run = runs.open_run(cfg)
    choices = choices or chosen_files(cfg)
    print(hardware.describe() + (", bf16" if cfg.hardware.bf16 else ", float32"))
    with Tracker(cfg, run, choices) as tracker:
        tokenizer = models.load_tokenizer(cfg.model)
        data = load_data(cfg, tokenizer)
        print(f"data: {data.line}")
        trainer = build_trainer(cfg, data, tokenizer)
        print(f"model: {cfg.model.path}, {models.describe(trainer.model)}")
        print(f"run: {run}" + (f"; {tracker.line}" if tracker.active else ""), flush=True)
        runs.write_json(run / "data_findings.json", [dataclasses.asdict(finding) for finding in data.findings])
        runs.write_json(run / "manifest.json", runs.manifest(cfg, **identities(cfg, trainer, data, choices)))
        looks = [look("start", trainer, data, cfg)]
        trainer.add_callback(MetricsFile(run / "metrics.jsonl"))
        trainer.add_callback(Progress(choices.get("loss", "train")))
        trainer.train(resume_from_checkpoint=runs.checkpoint_to_resume(run, cfg))
        held_out = last_evaluation(trainer) if trainer.eval_dataset is not None else {}
        trainer.save_model(str(run / "model"))
        looks.append(look(f"after {choices.get('loss', 'training')}", trainer, data, cfg))
        summary = summarize(trainer, looks, held_out) | {"seconds": round(time.time() - started, 1)}
        runs.write_json(run / "summary.json", summary)
    return summary


def last_evaluation(trainer: Trainer) -> dict:
    """The held-out metrics of the trained model: those of its last step where these were just computed."""
    for logs in trainer.state.log_history:
        if logs["step"] == trainer.state.global_step and "eval_loss" in logs:
            return logs
    return trainer.evaluate()


@dataclass(frozen=True)
class Look:
    """A model at one moment: its scores of the held-out pairs, and its answers to the first prompts of these."""

    name: str
    scores: evaluate.PairScores
    answers: dict[str, str]


def look(name: str, trainer: Trainer, data: Data, cfg: DictConfig) -> Look | None:
    """The trainer's model as it is now on held-out pairs; None where the data has no pairs."""
    if data.eval_pairs is None:
        return None
    tokenizer = trainer.processing_class
    fused = getattr(trainer, "packed", False)
    scores = evaluate.score(
        trainer.model, tokenizer, data.eval_pairs, cfg.train.max_length, bool(cfg.hardware.bf16), fused
    )
    prompts = data.eval_pairs[: cfg.samples]["prompt"]
    texts = evaluate.answers(trainer.model, tokenizer, prompts)
    return Look(name, scores, {prompt[-1]["content"]: text for prompt, text in zip(prompts, texts, strict=True)})


def summarize(trainer: Trainer, looks: list[Look | None], held_out: dict) -> dict:
    """summary.json: perplexity at the start, accuracies, margins and log-probs at each look, samples, last metrics."""
    summary = {
        "loss": getattr(trainer.args, "loss_type", None) or trainer._name.lower(),
        "reference_forwards": getattr(trainer, "reference_forwards", None),
        "held_out": held_out,
        "looks": [],
        "samples": [],
    }
    if None in looks:
        return summary
    first, last = looks
    rows = [{"name": each.name, **each.scores.summary()} for each in looks]
    if beta := getattr(trainer.args, "beta", None):
        rows[-1] |= evaluate.implicit_rewards(last.scores, first.scores, beta)
    return summary | {
        "perplexity": rows[0]["perplexity"],
        "logp_accuracy_before": rows[0]["logp_accuracy"],
        "logp_accuracy_after": rows[1]["logp_accuracy"],
        "accuracy_after": rows[1].get("reward_accuracy"),
        "margin_before": 0.0 if beta else None,  # by construction: policy and reference are one model
        "margin_after": rows[1].get("reward_margin"),
        "looks": rows,
        "samples": [{"prompt": p, "before": a, "after": last.answers[p]} for p, a in first.answers.items()],
    }


def identities(cfg: DictConfig, trainer: Trainer, data: Data, choices: dict[str, str]) -> dict:
    """What the run was made of: config files, data, model weights, reference."""
    return {
        "choices": choices,
        "data": {"path": OmegaConf.to_object(cfg.data)["path"], "fingerprint": data.fingerprint},
        "model": {"path": cfg.model.path, "revision": cfg.model.revision, "weights": models.fingerprint(trainer.model)},
        "reference": reference_of(trainer),
    }


def reference_of(trainer: Trainer) -> str:
    """What the rewards are measured against, in words."""
    if not hasattr(trainer, "ref_model"):
        return "none: this loss has no reference"
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


def quiet() -> None:
    """One line a decision instead of a wall: the libraries speak up for errors, preftune for the rest."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|peft|trl|accelerate)\b")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("trl", "accelerate", "peft", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
