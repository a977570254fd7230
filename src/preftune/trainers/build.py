"""Config groups in, one TRL trainer out."""

import copy
import dataclasses
import inspect
import sys
import traceback
from collections.abc import Collection
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from peft import PeftConfig
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import RewardTrainer

from preftune.config.errors import UserError
from preftune.config.processes import world_size
from preftune.config.stages import READ_BY_US, RESERVED, SELECTIVE
from preftune.data.findings import DataError
from preftune.data.load import Data, load
from preftune.models import adapters
from preftune.models.load import (
    ModelError,
    continued,
    disable_dropout,
    load_adapter,
    load_model,
    load_processor,
    location,
    peft_config,
    require_trainable,
)
from preftune.models.tokenizer import carry
from preftune.trainers import engine, fits, rewards
from preftune.trainers.averages import Averages
from preftune.trainers.engine import require_processes
from preftune.trainers.evaluation_means import EvaluationMeans
from preftune.trainers.global_batch import accumulation
from preftune.trainers.metrics import PerTokenMeans, PerTokenMetrics, Throughput
from preftune.trainers.template_tokens import TemplateTokens

LIBRARIES = ("trl", "transformers", "peft", "accelerate")


def trainer_arguments(cfg: DictConfig) -> dict:
    """The keyword arguments of the trainer's config class: `train`, `loss` and `hardware` in one, with no key twice.

    Raises ValueError where two groups give the same key.
    """
    merged = {}
    for group in ("train", "loss", "hardware"):
        given = OmegaConf.to_container(cfg[group], resolve=True)
        given = {key: value for key, value in given.items() if key not in RESERVED[group]}
        if twice := merged.keys() & given.keys():
            raise ValueError(f"{', '.join(sorted(twice))}: given in {group} and in another group of trainer arguments")
        merged |= given
    if merged.get("gradient_checkpointing") == SELECTIVE:  # TRL knows true and false alone
        merged["gradient_checkpointing"] = True
    return merged | {"gradient_accumulation_steps": accumulation(cfg, world_size())}


class SettingsError(UserError):
    """Settings that TRL, transformers or PEFT refuse, in their own words."""


class BestIsMeasured(TrainerCallback):
    """Ends a run whose `metric_for_best_model` no evaluation has, in a line; Trainer would end in a KeyError."""

    def __init__(self, sets: Collection[str] = ()):
        self.sets = sets

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        wanted = args.metric_for_best_model
        if wanted and any(wanted.removeprefix("eval_").startswith(f"{name}_") for name in self.sets):
            return  # each set is evaluated by itself
        if wanted and metrics and "eval_loss" in metrics and not {wanted, f"eval_{wanted}"} & metrics.keys():
            found = ", ".join(sorted(metrics))
            raise SettingsError(f"train.metric_for_best_model={wanted}: no evaluation has it; there are {found}")


def build(cfg: DictConfig, data: Data, tokenizer: PreTrainedTokenizerBase, trainer_class: type) -> Trainer:
    """The trainer that `cfg` describes, its reference ready: `trainer_class`, made over the class of `loss.trainer`.

    TRL's config class stands beside its trainer class under TRL's own rule (XTrainer, XConfig).
    Raises ModelError and DataError where the model or the data cannot be used, SettingsError where a library refuses.
    """
    try:
        return _build(cfg, data, tokenizer, trainer_class)
    except (ValueError, ImportError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        library = frame.f_globals.get("__name__", "").partition(".")[0]
        if isinstance(error, UserError) or library not in LIBRARIES:
            raise
        raise SettingsError(f"{library} refuses these settings: {' '.join(str(error).split())}") from error


def _build(cfg: DictConfig, data: Data, tokenizer: PreTrainedTokenizerBase, trainer_class: type) -> Trainer:
    args_class = get_class(cfg.loss.trainer.removesuffix("Trainer") + "Config")
    arguments = fitted_arguments(cfg, data, trainer_class, args_class)
    evaluated = None if arguments["eval_strategy"] == "no" else data.eval
    if evaluated is not None and data.eval_sets:
        evaluated = DatasetDict(eval=evaluated, **data.eval_sets)
    args = args_class(
        output_dir=cfg.output_dir,
        run_name=Path(cfg.output_dir).name,
        report_to=cfg.tracking.report_to,
        project=cfg.tracking.project,  # Trackio's; W&B's is given by tracking.py
        # A loss that is no number ends the run, so none need be filtered, which would wait for the device in every step
        **{"logging_first_step": True, "logging_nan_inf_filter": False, **arguments, "disable_tqdm": True},
    )
    require_processes(args.world_size)
    scored_by = rewards.arguments(cfg, data)
    set_seed(args.seed)  # of a reward model's new head, as TRL draws it
    model, task = policy(cfg), cfg.loss.get("task")
    fits.require(model, tokenizer, cfg, data)
    if args.gradient_checkpointing and not model.supports_gradient_checkpointing:
        args.gradient_checkpointing = args.activation_checkpointing = False  # the second is transformers' new name
        print(f"gradient checkpointing: off, which {type(model).__name__} does not support")
    carry(tokenizer, model)
    frozen = frozenset(name for name, each in model.named_parameters() if not each.requires_grad)
    if getattr(args, "disable_dropout", False) and (count := disable_dropout(model)):
        print(f"dropout: off in {count} modules more than TRL's disable_dropout reaches")
    trainer = trainer_class(
        model=model,
        args=args,
        processing_class=load_processor(cfg.model, tokenizer) if data.images else tokenizer,
        train_dataset=data.train,
        eval_dataset=evaluated,
        peft_config=None if continued(cfg.model) else adapter(cfg.lora, model, task),
        **own_reference(model, cfg, arguments),
        **scored_by,
    )
    say_left_out(trainer, data, evaluated)
    require_a_batch(trainer)
    engine.require(cfg, trainer.accelerator)
    trainer.frozen_by_model = frozen
    trainer.starts_as_reference = cfg.model.reference is None
    engine.release(trainer)
    set_callbacks(trainer, cfg, data)
    return trainer


def set_callbacks(trainer: Trainer, cfg: DictConfig, data: Data) -> None:
    """Take transformers' printing callbacks off, and put on those that `cfg` asks for."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(BestIsMeasured(data.eval_sets))
    if cfg.health.early_stopping and trainer.args.eval_strategy != "no":
        trainer.add_callback(EarlyStoppingCallback(cfg.health.early_stopping))
    if cfg.bema:
        trainer.add_callback(Averages(**cfg.bema))


def fitted_arguments(cfg: DictConfig, data: Data, trainer_class: type, args_class: type) -> dict:
    """`trainer_arguments` as this trainer takes them, for these rows and this engine."""
    arguments = trainer_arguments(cfg)
    if data.eval is not None and not evaluates(trainer_class):
        print("held-out rows: TRL's trainer cannot evaluate; held-out pairs are scored before and after training")
    if data.eval is None or not evaluates(trainer_class):
        arguments["eval_strategy"] = "no"
    fit_to_data(arguments, cfg, data)
    arguments |= early_stopping(cfg, arguments) | engine.arguments(cfg) | rewards.template_arguments(data, cfg)
    if data.images and not sees_images(trainer_class):
        raise DataError(
            f"the rows hold images, and TRL's {trainer_class.__name__} reads none; DPO's losses, loss=kto and "
            "python -m recipes.sft do. Text alone: data.columns={images: null}"
        )
    known = {each.name for each in dataclasses.fields(args_class)}
    if "chat_template_kwargs" in arguments.keys() - known:
        raise DataError(f"{trainer_class.__name__} takes no template arguments: leave chat_template_kwargs out")
    return {name: value for name, value in arguments.items() if name not in READ_BY_US or name in known}


def policy(cfg: DictConfig) -> torch.nn.Module:
    """The model to train: an adapter that is continued, or a whole model. Raises ModelError where it cannot be."""
    where = (cfg.model, cfg.lora, bool(cfg.hardware.use_cpu))
    goes_on, task = continued(cfg.model), cfg.loss.get("task")
    model = load_adapter(*where, trainable=True) if goes_on else load_model(*where, task=task)
    require_trainable(model, cfg.model.path, bool(cfg.lora))
    if "num_generations" in cfg.loss and cfg.loss.beta and not cfg.lora and adapters.base_of(location(cfg.model)):
        raise ModelError(
            f"model.path={cfg.model.path} is an adapter, and TRL loads the reference of full fine-tuning anew by its "
            "path: python -m recipes.export it first, or lora=lora"
        )
    return model


def fit_to_data(arguments: dict, cfg: DictConfig, data: Data) -> None:
    """Set the arguments that hang on the rows: KTO's weights by its labels, a reference that an adapter would move."""
    if "balance_labels" in cfg.loss and cfg.loss.balance_labels and data.kto_weights:
        arguments |= {key: arguments[key] * weight for key, weight in data.kto_weights.items()}
        print(f"KTO weights: {', '.join(f'{key} {arguments[key]:g}' for key in data.kto_weights)}")
    if data.images and arguments.get("precompute_ref_log_probs"):
        arguments["precompute_ref_log_probs"] = False
        print("reference: scored in every step, for TRL computes none beforehand where rows hold images")
    elif arguments.get("precompute_ref_log_probs") is False and (moved := moves_base(cfg.lora)):
        arguments["precompute_ref_log_probs"] = isinstance(data.train, Dataset) and cfg.model.reference is None
        print(f"reference: lora.{moved[0]} trains base weights, so the reference is the model before its first step")


def adapter(lora: DictConfig, model: torch.nn.Module, task: str | None = None) -> PeftConfig | None:
    """`lora` as PEFT takes it (`models.load.peft_config`); None for full fine-tuning.

    With the task of a reward model PEFT trains its new head in full.
    """
    if not lora:
        return None
    given = OmegaConf.to_container(lora, resolve=True) | ({"task_type": task} if task else {})
    given.pop("quantization", None)
    wanted, names = given.get("target_modules"), [name for name, _ in model.named_modules()]
    for target in wanted if isinstance(wanted, list) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            print(f"lora.target_modules: no module is named {target}")
    return peft_config(given, model)


def say_left_out(trainer: Trainer, data: Data, evaluated: Dataset | DatasetDict | None) -> None:
    """Print how many rows the trainer has left out, since their prompt alone fills train.max_length."""
    why = "whose prompt alone fills train.max_length={}: no answer token is left to train on"
    if isinstance(trainer, RewardTrainer):
        why = "which are longer than train.max_length={}: TRL's reward trainer takes whole answers alone"
    several = evaluated if isinstance(evaluated, dict) else {"": evaluated}
    kept = trainer.eval_dataset if isinstance(evaluated, dict) else {"": trainer.eval_dataset}
    held_out = [(f"held-out {name}".strip(), rows, kept[name]) for name, rows in several.items()]
    for name, before, after in [("training", data.train, trainer.train_dataset), *held_out]:
        if isinstance(before, Dataset) and not getattr(trainer.args, "packing", False) and len(after) < len(before):
            print(
                f"left out: {len(before) - len(after):,} of {len(before):,} {name} rows, "
                + why.format(trainer.args.max_length)
            )


def require_a_batch(trainer: Trainer) -> None:
    """Raise DataError where train.dataloader_drop_last would drop every row; say where processes share rows."""
    if not isinstance(trainer.train_dataset, Dataset):
        return
    rows, processes = len(trainer.train_dataset), trainer.accelerator.num_processes
    batch = trainer.args.per_device_train_batch_size * processes
    if not rows:
        raise DataError(f"train.max_length={trainer.args.max_length} leaves no row to train on: raise it")
    if trainer.args.dataloader_drop_last and rows < batch:
        raise DataError(
            f"train.dataloader_drop_last=true drops all {rows} rows, for a batch has {batch}: "
            "train.dataloader_drop_last=false"
        )
    if rows < processes:
        print(f"rows: {rows} for {processes} processes, so some rows count twice in a step")


def early_stopping(cfg: DictConfig, arguments: dict) -> dict:
    """The trainer arguments that keep the best checkpoint by held-out accuracy (SFT: loss); none without the option."""
    if not cfg.health.early_stopping or arguments["eval_strategy"] == "no":
        return {}
    best = {"demonstrations": "loss", "prompts": "reward"}.get(cfg.loss.view, "rewards/accuracies")
    best = "accuracy" if cfg.loss.get("task") else best
    return {
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{best}",
        "greater_is_better": best != "loss",
        "save_strategy": arguments["eval_strategy"],
        "save_steps": arguments.get("eval_steps") or arguments["save_steps"],
    }


def own_reference(model: torch.nn.Module, cfg: DictConfig, arguments: dict) -> dict:
    """The reference, where it is not the policy as it starts and TRL would find none or another one.

    `model.reference` names another model. With an online reference it is a copy of the model in full fine-tuning (TRL
    would load one anew by name, without our revision and merges), and beside an adapter that moves base weights.
    Raises ModelError where the loss has no reference.
    """
    if cfg.model.reference is not None:
        if "precompute_ref_log_probs" not in arguments:
            raise ModelError(f"model.reference={cfg.model.reference}: this loss has no reference; leave it out")
        other = OmegaConf.merge(cfg.model, {"path": cfg.model.reference, "revision": None})
        return {"ref_model": load_model(other, cfg.lora, bool(cfg.hardware.use_cpu))}
    beforehand = arguments.get("precompute_ref_log_probs")  # None: a loss without that choice
    sharded = cfg.hardware.engine == "fsdp" and not cfg.lora  # TRL shards a reference for the pass beforehand too
    apart = beforehand is False or (beforehand and sharded)
    if not apart or (cfg.lora and not moves_base(cfg.lora)):
        return {}
    return {"ref_model": copy.deepcopy(model)}


def moves_base(lora: DictConfig) -> list[str]:
    """The settings of an adapter that train weights beside it: with the adapter off the model is not the start."""
    found = [key for key in ("modules_to_save", "trainable_token_indices") if lora.get(key)]
    return found + (["bias"] if lora.get("bias", "none") != "none" else [])


def draws(trainer_class: type) -> bool:
    """Whether a trainer draws the answers that it trains on."""
    return "reward_funcs" in inspect.signature(trainer_class).parameters


def evaluates(trainer_class: type) -> bool:
    """Whether a trainer can evaluate rows: one that draws its answers must have a way of its own."""
    return not draws(trainer_class) or trainer_class.prediction_step is not Trainer.prediction_step


def sees_images(trainer_class: type) -> bool:
    """Whether TRL's trainer reads rows with images: those that do have a collator for them, or draw answers."""
    modules = [sys.modules[each.__module__] for each in trainer_class.__mro__ if each.__module__.startswith("trl.")]
    return draws(trainer_class) or any("ForVision" in name for module in modules for name in vars(module))


def with_metrics(trainer_class: type) -> type:
    """`trainer_class` with preftune's metrics beside TRL's, by what the class computes."""
    if draws(trainer_class):  # it makes its batches itself, and logs all about them
        return trainer_class
    mixins = {
        "_compute_loss": PerTokenMetrics,
        "get_batch_loss_metrics": PerTokenMeans,
        "tokenize_row": TemplateTokens,
    }
    added = [mixin for method, mixin in mixins.items() if hasattr(trainer_class, method)] or [EvaluationMeans]
    return type(trainer_class.__name__, (Throughput, *added, trainer_class), {})


def load_data(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The checked train and eval rows of `cfg` in the form that its trainer takes."""
    reader = load_processor(cfg.model, tokenizer)
    return load(cfg.data, view=cfg.loss.view, tokenizer=reader, max_length=cfg.train.max_length, seed=cfg.train.seed)
