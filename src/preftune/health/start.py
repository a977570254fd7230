"""Step-0 invariants: what must hold on the first batch, before any weight has moved, whatever model and data.

With the policy equal to the reference every log-ratio is 0, so each loss is a known constant. A wrong reference,
adapter or mask shows here and nowhere else: training on it looks like training.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from preftune.config.errors import advice
from preftune.data.views import BESIDE
from preftune.health.findings import Finding, Findings, Proof
from preftune.models.tokenizer import PROBE, token_ids

LN2 = math.log(2)
# The loss of each of TRL's loss types where all log-ratios are 0, from the formulas of DPOTrainer and KTOTrainer
AT_START: dict[str, Callable] = {
    **dict.fromkeys(("sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired"), lambda args: LN2),
    **dict.fromkeys(("hinge", "apo_zero", "apo_down"), lambda args: 1.0),
    "ipo": lambda args: (1 / (2 * args.beta)) ** 2,
    "bco_pair": lambda args: 2 * LN2,
    "nca_pair": lambda args: 2 * LN2,
    "sppo_hard": lambda args: 0.5 / args.beta**2,
    "discopop": lambda args: 0.5 * LN2 + 0.5,
    "exo_pair": lambda args: -LN2 - 0.5 * (math.log1p(-args.label_smoothing) + math.log(args.label_smoothing)),
    "kto": lambda args: 0.5,  # of a row with weight 1
    "apo_zero_unpaired": lambda args: 0.5,
}
# Nats per token that policy and reference may differ by in an answer of 64 tokens, in float32 and in bf16 or 4 bits;
# rounding averages out over an answer, so one token may differ by √64 times that
EXACT, ROUNDED = 1e-4, 2e-2


class ProvedStart:
    """Mixin for every trainer: checks the first batch of a fresh run, and every step for numbers that are none.

    `findings` is set before training. A fault raises Stopped before the optimizer has moved anything.
    """

    findings: Findings | None = None
    starts_as_reference = True
    frozen_by_model: frozenset[str] = frozenset()  # parameters that the model's own code freezes
    _losses: float | torch.Tensor = 0.0  # since the last step of the optimizer; a sum that is no number stays none
    _unmoved: bool | None = None  # whether no weight has moved yet: warm-up begins with a rate of 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        first = self.findings is not None and self.state.global_step == 0 and not getattr(self, "_proved", False)
        if first:
            self._proved = True
            unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            self._check(check_mask, self, inputs)
            self._check(check_parameters, unwrapped, self.frozen_by_model)
            if with_noise(self.args):
                self._without_noise(inputs)
        with modules_that_run(unwrapped if first else None) as ran:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.findings is not None:
            self._losses += loss
            if self.accelerator.sync_gradients:  # once per step, as the device is waited for
                total, self._losses = float(self._losses), 0.0
                if not math.isfinite(total):
                    self.findings.stop(not_finite("loss", self.state.global_step, total))
        if first:
            if not with_noise(self.args):
                self._prove_reference()
            if logged(self, "frac_reward_zero_std")[-1:] == [1]:
                print("step-0 check: the first answers' rewards are alike, so no gradient is due")
            elif not self.is_deepspeed_enabled:  # DeepSpeed keeps gradients to itself
                self._check(check_gradients, unwrapped, ran)
        self._unmoved = self.state.global_step == 0 if self._unmoved is None else self._unmoved
        if self._unmoved and not with_noise(self.args):
            ties_count_half(self)
        if self.accelerator.sync_gradients and self.optimizer is not None:
            self._unmoved &= not any(group["lr"] for group in self.optimizer.param_groups)
        return loss

    def _without_noise(self, inputs: dict) -> None:
        """Where noise in training was asked for, the policy is compared with its reference in evaluation mode."""
        if not hasattr(self, "ref_model") or not hasattr(self, "logratios_per_token"):
            return
        self.model.eval()
        with advice("step-0 check"), torch.no_grad():
            self._compute_loss(self.model, self._prepare_inputs(inputs), False)
            self._prove_reference()
        self._metrics["eval"].clear()
        self.model.train()

    def _prove_reference(self) -> None:
        self._check(check_reference, self)
        self._check(check_loss, self)

    def _check(self, check: Callable, *arguments: object) -> None:
        with advice("step-0 check"):
            for found in check(*arguments):
                if isinstance(found, Proof):
                    self.findings.prove(found)
                else:
                    self.findings.stop(found)


def ties_count_half(trainer: Trainer) -> None:
    """Before a weight has moved policy and reference are one model: what ranks their answers is rounding, a tie."""
    accuracies = logged(trainer, "rewards/accuracies")
    if accuracies and trainer.starts_as_reference and getattr(trainer, "logratios_per_token", None) is not None:
        accuracies[-1] = 0.5


def logged(trainer: Trainer, metric: str) -> list[float]:
    """The values of a metric that TRL has kept since it last logged."""
    return getattr(trainer, "_metrics", {"train": {}})["train"].get(metric, [])


def not_finite(what: str, step: int, value: float) -> Finding:
    """The finding that a loss or gradient is NaN or infinite: every weight would be, after the next step."""
    meaning = f"The {what} is {value}; the step was not taken, and the last checkpoint is good."
    remedy = (
        "Go on from it with a lower train.learning_rate or train.max_grad_norm, or in float32 (hardware.bf16=false)."
    )
    return Finding(f"{what}_not_finite", step, str(value), "a finite number", meaning, remedy)


def check_reference(trainer: Trainer) -> Iterator[Finding | Proof]:
    """Log-ratios of the first batch that are not 0."""
    ratios = getattr(trainer, "logratios_per_token", None)
    if ratios is None or not trainer.starts_as_reference:  # nothing that is known
        return
    tokens = trainer.scored_tokens.clamp(min=1)
    value = ((ratios * tokens).square().sum() / tokens.sum()).sqrt().item()  # the noise of tokens adds up in squares
    bound = 8 * rounding(trainer)
    if value > bound:
        meaning = (
            "Before the first step the policy differs from its reference (log-ratios of the first batch, root mean "
            "square per token): the rewards would be measured against another model."
        )
        remedy = (
            "Start both from the same weights: an adapter that begins at zero (lora.init_lora_weights=true), no "
            "dropout, the model of the SFT stage as model.path, a reference cache of this very model (recipes.cache)."
        )
        yield Finding("step0_reference", 0, value, bound, meaning, remedy)
    else:
        meaning = f"Log-ratios of {len(ratios)} answers before the first step, root mean square per token."
        yield Proof("policy_is_reference", value, f"at most {bound:.1e}", meaning)


def check_loss(trainer: Trainer) -> Iterator[Finding | Proof]:
    """A loss of the first batch that is not the constant that log-ratios of 0 give."""
    args = trainer.args
    given = getattr(args, "loss_type", None)  # ORPO has none
    types = given if isinstance(given, list) else [given]
    known = AT_START.keys() >= set(types) and not getattr(args, "use_weighting", False)
    if not known or getattr(trainer, "logratios_per_token", None) is None or not trainer.starts_as_reference:
        return
    weights = getattr(args, "loss_weights", None) or [1.0] * len(types)
    wanted = sum(weight * AT_START[name](args) for name, weight in zip(types, weights, strict=True))
    found = trainer.unscaled_loss.item() - routing_loss(trainer)
    if (share := getattr(trainer, "desirable_share", None)) is not None:  # KTO's, for weights of 1
        found /= share * args.desirable_weight + (1 - share) * args.undesirable_weight
    allowed = trainer.beta * 4 * rounding(trainer) * trainer.scored_tokens.float().mean().item() + 1e-4
    if "sppo_hard" in types or "ipo" in types:
        allowed = allowed / trainer.beta**2 + 1e-3
    names = ", ".join(types)
    if abs(found - wanted) > max(allowed, 1e-3 * wanted):
        meaning = f"Before the first step every log-ratio is 0, so the loss must be {wanted:.4f} ({names})."
        remedy = (
            "The reference or the mask is not what the loss takes them for: run with fastpath.enabled=false, and clear "
            "the reference cache (python -m recipes.cache clear=true)."
        )
        yield Finding("step0_loss", 0, found, wanted, meaning, remedy)
    else:
        meaning = f"Loss of the first batch ({names}), all log-ratios 0."
        yield Proof("loss_at_start", found, f"{wanted:.4f}", meaning)


def rounding(trainer: Trainer) -> float:
    """Nats per token that two log-probs of one model may differ by, in an answer of 64 tokens."""
    exact = trainer.accelerator.mixed_precision == "no" and not getattr(trainer.model, "is_quantized", False)
    return EXACT if exact and next(trainer.model.parameters()).dtype == torch.float32 else ROUNDED


def with_noise(args: TrainingArguments) -> bool:
    """Whether the training forward was asked to differ from run to run: NEFTune, or dropout that is left on."""
    return bool(getattr(args, "neftune_noise_alpha", None)) or getattr(args, "disable_dropout", None) is False


def routing_loss(trainer: Trainer) -> float:
    """What TRL has added to the loss for a mixture of experts' balance; 0 elsewhere."""
    mode = "train" if trainer.model.training else "eval"
    logged = trainer._metrics[mode]["aux_loss"][-1:] if getattr(trainer, "aux_loss_enabled", False) else []
    return sum(trainer.router_aux_loss_coef * each for each in logged)


def check_mask(trainer: Trainer, inputs: dict) -> Iterator[Finding | Proof]:
    """Scored tokens that are no answer: none, not in one piece, not behind the prompt, without the answer's end."""
    rows = [] if scores_otherwise(trainer.args) else list(scored_rows(inputs))
    given = set(BESIDE) & set(getattr(trainer.train_dataset, "column_names", None) or ())
    opening = [] if given else opening_of_answers(trainer.processing_class)
    one_piece = "labels" not in inputs  # a demonstration may have several answers
    for row, (ids, scored) in enumerate(rows):
        for value, what in mask_errors(ids, scored, one_piece, opening, trainer.processing_class):
            meaning = f"Row {row} of the first batch: {value} {what}."
            remedy = (
                "Look at the chat template (model.chat_template) and at python -m recipes.inspect_data; raise "
                "train.max_length where the prompt fills it."
            )
            yield Finding("step0_mask", 0, value, "the answer and nothing else", meaning, remedy)
    if rows:
        count, total = sum(int(scored.sum()) for _, scored in rows), sum(len(ids) for ids, _ in rows)
        value = f"{count:,} of {total:,} tokens in {len(rows)} rows"
        yield Proof("answers_alone_are_scored", value, "each answer and its end", "Trained tokens of the first batch.")


def mask_errors(
    ids: torch.Tensor, scored: torch.Tensor, one_piece: bool, opening: list[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, str]]:
    """(what, what is wrong with it) of one row: `ids` and `scored` of shape (tokens,), without padding."""
    starts = (scored & ~scored.roll(1)).nonzero().flatten().tolist()
    if not scored.any():
        yield "no token", "is scored: the prompt fills train.max_length"
    elif scored[0]:
        yield "the whole row", "is scored: the prompt would be trained too"
    elif one_piece and len(starts) > 1:
        yield "scattered tokens", "are scored: the mask has holes"
    elif not scored[-1]:
        yield "the answer's end", "is not scored: the model would never learn to stop"
    for start in starts if opening else []:
        before = ids[max(0, start - len(opening)) : start].tolist()
        if before != opening:
            wanted = f"stands before the scored tokens, where {tokenizer.decode(opening)!r} should"
            yield repr(tokenizer.decode(before)), wanted


def scores_otherwise(args: TrainingArguments) -> bool:
    """Whether SFT was asked to train on more or less than the answers, or its rows are no longer apart."""
    asked = getattr(args, "completion_only_loss", None) is False or getattr(args, "assistant_only_loss", False)
    return asked or getattr(args, "packing", False) or getattr(args, "padding_free", False)


def scored_rows(inputs: dict) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids, whether each is scored) of each row of a batch, without its padding, as its trainer masks it."""
    for side in ("", "chosen_", "rejected_"):
        if f"{side}input_ids" not in inputs or not {f"{side}labels", "completion_mask"} & inputs.keys():
            continue
        ids, labels = inputs[f"{side}input_ids"].cpu(), inputs.get(f"{side}labels")
        scored = inputs["completion_mask"].bool() if labels is None else labels != -100
        attended = inputs.get(f"{side}attention_mask", torch.ones_like(ids)).bool().cpu()
        for row, mask, seen in zip(ids, scored.cpu(), attended, strict=True):
            yield row[seen], mask[seen]


def opening_of_answers(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a chat template puts between a question and its answer; empty where it has none of its own."""
    asked, opened = (token_ids(tokenizer, PROBE[:1], add_generation_prompt=each) for each in (False, True))
    if opened[: len(asked)] != asked or token_ids(tokenizer, PROBE)[: len(opened)] != opened:
        return []  # what stands before an answer depends on the row
    return opened[len(asked) :]


def check_parameters(model: torch.nn.Module, frozen: frozenset[str] = frozenset()) -> Iterator[Finding | Proof]:
    """Parameters that should move and do not, that should not and do, or are in float16."""
    wanted = meant_to_move(model) - frozen
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    remedy = "Give LoRA's settings in lora.*, or lora=none for full fine-tuning, and freeze nothing by hand."
    if not moving:
        yield Finding("step0_trainable", 0, "0 parameters", "> 0", "Nothing would be trained.", remedy)
    for code, names, meaning in (
        ("step0_frozen", wanted - moving, "that should move are frozen"),
        ("step0_trainable", moving - wanted, "that LoRA leaves alone would be trained"),
    ):
        if names:
            meaning = f"{len(names)} parameters {meaning}, first {min(names)}."
            yield Finding(code, 0, f"{len(names)}: {min(names)}, …", "0 parameters", meaning, remedy)
    if moving == wanted:
        count = f"{len(moving)} tensors"
        yield Proof("trained_parameters", count, count, "What an optimizer step moves.")
    half = [name for name, each in model.named_parameters() if each.dtype == torch.float16 and name in moving]
    if half:
        meaning = "Weights that are trained are in float16: small gradients vanish in it, and log-prob sums overflow."
        remedy = "model.dtype=float32 (or bfloat16 on a GPU that has it)."
        yield Finding("step0_float16", 0, f"{len(half)} parameters", "float32 or bfloat16", meaning, remedy)


def meant_to_move(model: torch.nn.Module) -> set[str]:
    """The parameters that full fine-tuning, or PEFT's active adapter, means to train."""
    named = dict(model.named_parameters())
    if not isinstance(model, PeftModel):
        return set(named)
    active, biased = model.active_adapter, getattr(model.active_peft_config, "bias", "none") != "none"
    kinds = adapter_parts(model)
    return {
        name
        for name, parameter in named.items()
        if (kinds & set(name.split(".")) and active in name.split("."))
        or f"modules_to_save.{active}" in name
        or (biased and name.endswith("bias") and parameter.requires_grad)
    }


def adapter_parts(model: torch.nn.Module) -> set[str]:
    """What PEFT calls the parts of its adapters: lora_A and lora_B, vera_lambda_d, …; none without an adapter."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return {part for layer in layers for part in layer.adapter_layer_names}


@contextlib.contextmanager
def modules_that_run(model: torch.nn.Module | None) -> Iterator[set[str]]:
    """The names of the modules that run meanwhile: experts without tokens and towers without input do not."""
    ran: set[str] = set()
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules() if model is not None else ():
            hooks.callback(module.register_forward_hook(lambda *_, name=name: ran.add(name)).remove)
        yield ran


def check_gradients(model: torch.nn.Module, ran: set[str]) -> Iterator[Finding | Proof]:
    """Gradients that are not finite, or that are missing or zero for half of what is trained."""
    moving = {name: each for name, each in model.named_parameters() if each.requires_grad}
    judged = {name: each for name, each in moving.items() if name.rpartition(".")[0] in ran} or moving
    norms = {name: 0.0 if p.grad is None else p.grad.detach().float().norm().item() for name, p in judged.items()}
    if broken := [name for name, norm in norms.items() if not math.isfinite(norm)]:
        yield not_finite("gradient", 0, norms[broken[0]])
    # A zero-initialised LoRA B gets a gradient and passes none on to its A, so one part of each adapter moves at first
    parts = adapter_parts(model)
    sides: dict[str, float] = {}
    for name, norm in norms.items():
        place = ".".join(itertools.takewhile(lambda each: each not in parts, name.split(".")))
        sides[place] = max(sides.get(place, 0.0), norm)
    dead = [place for place, norm in sides.items() if norm == 0]
    if dead and 2 * len(dead) >= len(sides):
        remedy = (
            "The loss does not reach these weights: run with fastpath.enabled=false and "
            "hardware.gradient_checkpointing=false; for 4-bit weights upgrade bitsandbytes."
        )
        value = f"{len(dead)} of {len(sides)} without"
        yield Finding("step0_gradient", 0, value, "0", f"No gradient reaches {dead[0]}.", remedy)
    else:
        value = f"{len(sides) - len(dead)} of {len(sides)} modules"
        yield Proof("gradients_arrive", value, "more than half, all finite", "Trained modules that a gradient reached.")
    if dead:
        print(f"step-0 check: no gradient reached {len(dead)} of {len(sides)} trained modules, first {dead[0]}")
