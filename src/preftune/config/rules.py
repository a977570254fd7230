"""Values that are right by themselves and cannot work together. A rule is a function from a stage to its problems."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from preftune.config.problems import Problem
from preftune.config.ranges import adapter_numbers, default_rate, label_smoothing, numbers
from preftune.config.stages import SELECTIVE, InvalidArgument, Stage, node
from preftune.config.values import written


def conflicts(stage: Stage) -> Iterator[Problem]:
    """What every rule says of a stage; a rule that meets a faulty argument says nothing."""
    for rule in RULES:
        try:
            yield from rule(stage)
        except InvalidArgument:
            continue


def one_weight_a_loss(stage: Stage) -> Iterator[Problem]:
    weights, losses = stage["loss_weights"], stage.loss_types
    if weights is not None and len(weights) != len(losses):
        example = f"{stage.key('loss_weights')}={written([1.0] * len(losses))}"
        counts = f"{len(weights)} weight{'s'[: len(weights) != 1]} for {len(losses)} loss_type{'s'[: len(losses) != 1]}"
        yield stage.problem("loss_weights", f"gives {counts}; for example {example}")


def f_divergence(stage: Stage) -> Iterator[Problem]:
    """TRL names the losses that allow another divergence in the argument's help, and nowhere else before it runs."""
    kind = stage["f_divergence_type"]
    if kind is None or kind == stage.fields["f_divergence_type"].default:
        return
    sentence = stage.fields["f_divergence_type"].help.partition("non-default value:")[2].split(".")[0]
    allowed = re.findall(r"`'(\w+)'`", sentence)
    for name in stage.loss_types:
        if allowed and name not in allowed:
            text = f"{kind} does not go with loss_type {name}; it goes with {', '.join(allowed)}"
            yield stage.problem("f_divergence_type", text)


def weighting(stage: Stage) -> Iterator[Problem]:
    """TRL: losses that sort their samples would give each pair another pair's weight."""
    for name in stage.loss_types:
        if stage["use_weighting"] and name in ("aot", "aot_unpaired"):
            yield stage.problem(
                "use_weighting", f"does not go with loss_type {name}, which sorts the pairs; leave it out"
            )


def one_precision(stage: Stage) -> Iterator[Problem]:
    for half, brain in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if stage[half] and stage["use_cpu"]:
            yield stage.problem(half, f"does not work on CPU; leave it out (there {stage.key(brain)} does)")
        elif stage[half] and stage[brain]:
            keys = stage.key(half), stage.key(brain)
            yield stage.problem(half, f"excludes {keys[1]}; for float16 write {keys[0]}=true {keys[1]}=false")


def checkpointing(stage: Stage) -> Iterator[Problem]:
    """transformers 5 has two names for one thing, and lets the new one win in silence."""
    old, new = (stage.args.get(f"{word}_checkpointing") for word in ("gradient", "activation"))
    if old is not None and new is not None and old != new:
        text = (
            f"is {written(new)} and {stage.key('gradient_checkpointing')}, its older name, is {written(old)}; give one"
        )
        yield stage.problem("activation_checkpointing", text)
    reentrant = (stage["gradient_checkpointing_kwargs"] or {}).get("use_reentrant")
    if old == SELECTIVE and reentrant:
        yield stage.problem("gradient_checkpointing", "does not go with use_reentrant: true; leave one of them out")
    if old == SELECTIVE and stage.section("hardware").get("engine") == "zero3" and stage.section("lora"):
        yield stage.problem("gradient_checkpointing", "TRL needs reentrant ones for adapters under ZeRO-3; write true")


def schedule(stage: Stage) -> Iterator[Problem]:
    given = stage["lr_scheduler_kwargs"] or {}
    if stage["lr_scheduler_type"] == "warmup_stable_decay" and "num_decay_steps" not in given:
        kwargs = f"'{stage.key('lr_scheduler_kwargs')}={{num_decay_steps: 100}}'"
        yield stage.problem("lr_scheduler_type", f"warmup_stable_decay needs the steps of its decay: {kwargs}")
    if "with_min_lr" in str(stage["lr_scheduler_type"]) and not {"min_lr", "min_lr_rate"} & given.keys():
        kwargs = f"'{stage.key('lr_scheduler_kwargs')}={{min_lr_rate: 0.1}}'"
        yield stage.problem("lr_scheduler_type", f"{stage['lr_scheduler_type']} needs its lowest rate: {kwargs}")


def liger(stage: Stage) -> Iterator[Problem]:
    if stage["use_liger_kernel"] and importlib.util.find_spec("liger_kernel") is None:
        yield stage.problem("use_liger_kernel", "liger-kernel is not installed: pip install liger-kernel")


def moving_reference(stage: Stage) -> Iterator[Problem]:
    if not stage["sync_ref_model"]:
        return
    if stage["precompute_ref_log_probs"]:
        fixed = stage.key("precompute_ref_log_probs")
        yield stage.problem("sync_ref_model", f"moves the reference, and {fixed} fixes it; write {fixed}=false")
    if stage.section("lora"):
        yield stage.problem("sync_ref_model", "needs a reference model, which an adapter does without; write lora=none")


def streaming(stage: Stage) -> Iterator[Problem]:
    if not stage.section("data").get("streaming"):
        return
    if stage["precompute_ref_log_probs"]:
        key = stage.key("precompute_ref_log_probs")
        yield Problem(
            "data.streaming", f"{key} needs all of the data at once; write {key}=false or data.streaming=false"
        )
    if (stage["max_steps"] or -1) < 0:
        yield Problem("data.streaming", "a stream has no length; write train.max_steps=1000 or data.streaming=false")


def demonstrations(stage: Stage) -> Iterator[Problem]:
    """Demonstrations among the pairs teach something only where the loss has a term for them."""
    data = stage.section("data")
    fraction, path = data.get("sft_fraction", 0), data.get("sft_path")
    if fraction and not path:
        yield Problem("data.sft_fraction", "needs demonstrations; write data.sft_path=<file>, or data.sft_fraction=0")
    if path and not fraction:
        yield Problem("data.sft_path", "is not read with data.sft_fraction=0; write data.sft_fraction=0.1")
    no_term = "precompute_ref_log_probs" in stage and "sft" not in stage.loss_types or stage["cpo_alpha"] == 0
    if fraction and no_term and not stage.prefix:
        yield Problem("data.sft_fraction", "needs an SFT term in the loss; write loss=dpo_sft, loss=orpo or loss=cpo")


def eval_sets(stage: Stage) -> Iterator[Problem]:
    """Names that give metrics of their own (TRL logs eval_loss and eval_nll_loss), and sections that say where."""
    data = stage.section("data")
    sets = node(stage.config, "data.eval_sets")
    for name, given in sets.items():
        key = f"data.eval_sets.{name}"
        if name in ("train", "eval", "nll", "aux") or not re.fullmatch(r"[A-Za-z]\w*", str(name)):
            yield Problem(key, f"its metrics would be eval_{name}_…: name it in letters, digits and _, and not {name}")
        if isinstance(given, dict) and "path" not in given:
            yield Problem(key, "is a section without a path, and needs one")
        for other in (given.keys() - data.keys()) if isinstance(given, dict) else ():
            yield Problem(f"{key}.{other}", "no such key; a set takes the keys of data, such as path and columns")
    if sets and stage.view == "prompts":
        yield Problem("data.eval_sets", f"{stage.trainer} draws its answers and evaluates one set; leave them out")
    if sets and not data.get("eval_split") and (not data.get("eval_fraction") or data.get("streaming")):
        yield Problem("data.eval_sets", "stand beside held-out rows, and there are none; write data.eval_split=<file>")


def averaging(stage: Stage) -> Iterator[Problem]:
    """TRL's callback makes a second model by the class and the config of the first, and averages all its parameters."""
    bema, engine = stage.section("bema"), stage.section("hardware").get("engine") or ""
    if bema and stage.section("lora"):
        yield Problem("bema", "TRL averages whole models and knows no adapters; write lora=none, or leave bema out")
    if bema and engine.startswith(("fsdp", "zero")):
        yield Problem("bema", f"TRL averages no weights that hardware.engine={engine} shards; leave bema out")
    every, steps = bema.get("update_freq", 400), stage["max_steps"] or -1
    if bema and isinstance(every, int) and 0 < steps < every + (bema.get("update_after") or 0):
        yield Problem(
            "bema.update_freq", f"{every} is never reached in train.max_steps={steps}; write {max(steps // 10, 1)}"
        )


def quantized_base(stage: Stage) -> Iterator[Problem]:
    quantization = node(stage.config, "lora.quantization")
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if quantization.get(name)]
    if len(bits) == 2:
        yield Problem("lora.quantization", "load_in_4bit and load_in_8bit exclude each other; set one of them to false")
    if bits and "r" not in stage.section("lora"):
        yield Problem("lora.quantization", "quantized weights cannot be trained in full; write lora=qlora")
    if bits and stage["fp16"] and quantization.get("bnb_4bit_compute_dtype") == "bfloat16":
        key = "lora.quantization.bnb_4bit_compute_dtype"
        yield stage.problem("fp16", f"the quantized layers compute in bfloat16; write {key}=float16")
    if quantization.get("bnb_4bit_quant_type", "nf4") not in ("nf4", "fp4"):
        yield Problem("lora.quantization.bnb_4bit_quant_type", "no such value (one of nf4, fp4)")


def adapted_head(stage: Stage) -> Iterator[Problem]:
    """TRL's DPO and KTO multiply by lm_head.weight themselves, past any adapter on it."""
    targets = stage.section("lora").get("target_modules")
    if "precompute_ref_log_probs" in stage and isinstance(targets, list) and "lm_head" in targets:
        yield Problem("lora.target_modules", f"{stage.trainer} would never train an adapter on lm_head; leave it out")


def evaluations(stage: Stage) -> Iterator[Problem]:
    strategy, data = stage["eval_strategy"], stage.section("data")
    waiting = [name for name in ("load_best_model_at_end", "eval_on_start") if stage[name]]
    waiting += ["lr_scheduler_type"] if stage["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy") else []
    waiting += ["eval_steps"] if stage.args.get("eval_steps") is not None else []
    if data and not data.get("eval_split") and not data.get("eval_fraction"):
        for name in waiting:
            yield stage.problem(
                name, "needs eval data; write data.eval_split=<split or file> or data.eval_fraction=0.1"
            )
    elif strategy == "no":
        for name in waiting:
            yield stage.problem(name, f"needs evaluations; write {stage.key('eval_strategy')}=steps")
    elif strategy != "steps" and "eval_steps" in waiting:
        text = f"has no effect with eval_strategy {strategy}; write {stage.key('eval_strategy')}=steps"
        yield stage.problem("eval_steps", text)


def best_checkpoint(stage: Stage) -> Iterator[Problem]:
    evals, saves = stage["eval_strategy"], stage["save_strategy"]
    if not stage["load_best_model_at_end"] or saves == "best" or evals == "no":
        return
    if evals != saves:
        remedy = f"write {stage.key('save_strategy')}={evals}"
        yield stage.problem("load_best_model_at_end", f"needs save_strategy ({saves}) to be eval_strategy's; {remedy}")
        return
    every, kept = stage["eval_steps"] or stage["logging_steps"], stage["save_steps"]
    if evals == "steps" and every and kept and round(kept * 1e6) % round(every * 1e6):
        want = f"wants a multiple of eval_steps ({written(every)}) with load_best_model_at_end, got {written(kept)}"
        example = f"{stage.key('save_steps')}={written(every * max(1, round(kept / every)))}"
        yield stage.problem("save_steps", f"{want}; for example {example}")


def batches(stage: Stage) -> Iterator[Problem]:
    """KTO pairs each prompt with its neighbour's answer; rows of pairs have no one length that a sampler could read."""
    strategy, neighbours = stage["train_sampling_strategy"], "desirable_weight" in stage and stage["loss_type"] == "kto"
    if neighbours and strategy != "sequential":
        yield stage.problem("train_sampling_strategy", f"KTO's KL term needs sequential, got {strategy}; leave it out")
    if neighbours and stage["per_device_train_batch_size"] == 1:
        example = f"{stage.key('per_device_train_batch_size')}=4"
        yield stage.problem("per_device_train_batch_size", f"KTO's KL term is a mean over the batch; write {example}")
    if not neighbours and strategy in ("group_by_length", "batch_rebalance") and stage.view != "demonstrations":
        text = f"{strategy} fails on pairs in TRL 1.16; leave it out, fastpath sorts by length"
        yield stage.problem("train_sampling_strategy", text)


def drawn_answers(stage: Stage) -> Iterator[Problem]:
    """TRL's trainers that sample: the answers to a prompt share a batch, and each reward has a weight."""
    rewards, weights = node(stage.config, f"{stage.prefix}loss").get("rewards"), stage["reward_weights"]
    if rewards is not None and not rewards:
        yield Problem(f"{stage.prefix}loss.rewards", "wants one or more reward models or functions")
    if rewards and weights and len(weights) != len(rewards):
        example = f"{stage.key('reward_weights')}={written([1.0] * len(rewards))}"
        yield stage.problem("reward_weights", f"gives {len(weights)} for {len(rewards)} rewards; for example {example}")
    if stage["use_vllm"] and importlib.util.find_spec("vllm") is None:
        yield stage.problem("use_vllm", "vllm is not installed: pip install vllm; or leave it out")
    answers, hardware = stage["num_generations"], stage.section("hardware")
    if not answers or (hardware.get("engine") and not stage.config.get("nproc")):
        return
    processes = (stage.config.get("nproc") or 1) * (hardware.get("nodes") or 1)
    steps = stage["steps_per_generation"] or stage["gradient_accumulation_steps"] or 1
    for name, rows in (("train", processes * steps), ("eval", processes)):
        batch, wanted = f"per_device_{name}_batch_size", (stage[f"num_generations_{name}"] or answers)
        if (stage[batch] or 0) * rows % wanted:
            text = f"{stage[batch] * rows} answers are no whole number of prompts with {wanted} answers each; "
            yield stage.problem(batch, f"{text}write {stage.key(batch)}={wanted}")


def loaders(stage: Stage) -> Iterator[Problem]:
    if stage["dataloader_prefetch_factor"] is not None and not stage["dataloader_num_workers"]:
        text = f"needs loader processes; write {stage.key('dataloader_num_workers')}=2"
        yield stage.problem("dataloader_prefetch_factor", text)


def sharding(stage: Stage) -> Iterator[Problem]:
    """What accelerate and DeepSpeed would take as it is and fail on, when the model is there."""
    if stage["parallelism_config"] is not None:
        text = "wants an object of accelerate's, which no YAML holds; leave it out (hardware=fsdp shards a model)"
        yield stage.problem("parallelism_config", text)
    given, key = stage["deepspeed"], stage.key("deepspeed")
    if isinstance(given, str) and not Path(given).expanduser().is_file():
        yield stage.problem("deepspeed", f"there is no file {given}; write hardware=zero3, or a JSON file's path")
    zero = given.get("zero_optimization") if isinstance(given, dict) else None
    if isinstance(given, dict) and not (isinstance(zero, dict) and zero.get("stage") in (0, 1, 2, 3)):
        text = f"is no configuration of DeepSpeed's; write hardware=zero3, or {key}.zero_optimization.stage=2"
        yield stage.problem("deepspeed", text)


def on_its_way_out(stage: Stage) -> Iterator[Problem]:
    """What TRL takes and ignores, or is about to drop, by its own help texts."""
    for name, value in stage.args.items():
        help = stage.fields[name].help
        if value and "Temporarily unavailable" in help:
            yield stage.problem(name, "TRL 1.16 takes it and ignores it; leave it out")
        if value and f"`'{value}'` value is deprecated" in help:
            default = written(stage.fields[name].default)
            yield stage.problem(
                name, f"{value} is deprecated by TRL; write {stage.key(name)}={default}, or leave it out"
            )


def smoothed_by_trl(stage: Stage) -> Iterator[Problem]:
    """transformers smooths labels in a loss that TRL's preference trainers replace."""
    if stage["label_smoothing_factor"] and not stage.trainer.endswith("SFTTrainer"):
        text = f"{stage.trainer.rpartition('.')[2]} ignores it; "
        other = f"write {stage.key('label_smoothing')}" if "label_smoothing" in stage else "leave it out"
        yield stage.problem("label_smoothing_factor", text + other)


def pushing(stage: Stage) -> Iterator[Problem]:
    """The trainer makes its repository before it trains."""
    if not stage["push_to_hub"]:
        return
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    later = "; leave it out, and push what comes of it: python -m recipes.export run=RUN output=DIR push=ID"
    if is_offline_mode():
        yield stage.problem("push_to_hub", f"HF_HUB_OFFLINE is set{later}")
    elif not get_token():
        yield stage.problem("push_to_hub", f"there is no token: set HF_TOKEN{later}")


def no_secret_in_a_file(stage: Stage) -> Iterator[Problem]:
    """What is typed stands in config.yaml, the manifest and W&B."""
    if stage["hub_token"] is not None:
        yield stage.problem("hub_token", "would be written into the run's files: leave it out and set HF_TOKEN instead")


RULES = [
    no_secret_in_a_file,
    pushing,
    smoothed_by_trl,
    numbers,
    adapter_numbers,
    default_rate,
    label_smoothing,
    one_weight_a_loss,
    f_divergence,
    weighting,
    one_precision,
    checkpointing,
    schedule,
    liger,
    moving_reference,
    streaming,
    demonstrations,
    eval_sets,
    averaging,
    quantized_base,
    adapted_head,
    evaluations,
    best_checkpoint,
    batches,
    drawn_answers,
    loaders,
    sharding,
    on_its_way_out,
]
