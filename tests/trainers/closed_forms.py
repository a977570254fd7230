"""The losses as the papers write them: pure functions of log-probs, with no trainer in sight.

Each function is named for its file in conf/loss and takes that file's hyperparameters by keyword. Log-probs are natural
logs, summed over the answer's tokens, of shape (pairs,) or (rows,).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

SIDES = ("chosen", "rejected", "ref_chosen", "ref_rejected")


@dataclass
class Pairs:
    """A batch of preference pairs."""

    chosen: Tensor  # log π(chosen | prompt)
    rejected: Tensor
    ref_chosen: Tensor  # log π_ref(chosen | prompt)
    ref_rejected: Tensor
    chosen_tokens: Tensor  # |chosen|
    rejected_tokens: Tensor
    dialogue: Tensor  # log π(prompt and chosen), from the second token on
    dialogue_tokens: Tensor
    # per answer of a side: its tokens' log p, and log Σ p² over the vocabulary
    tokens: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @property
    def up(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def down(self) -> Tensor:
        return self.rejected - self.ref_rejected


@dataclass
class Rows:
    """A batch of single answers."""

    answer: Tensor  # log π(answer | prompt)
    tokens: Tensor
    ref_answer: Tensor | None = None
    mismatched: Tensor | None = None  # log π(another row's answer | prompt)
    ref_mismatched: Tensor | None = None
    label: Tensor | None = None  # True: desirable


def dpo(p: Pairs, beta: float) -> Tensor:
    """arXiv:2305.18290, eq. 7."""
    return -logsigmoid(beta * (p.up - p.down)).mean()


def ipo(p: Pairs, beta: float) -> Tensor:
    """arXiv:2310.12036, eq. 17, with log-ratios per token in place of sums (TRL's form, confirmed by its authors)."""
    return ((p.up / p.chosen_tokens - p.down / p.rejected_tokens - 1 / (2 * beta)) ** 2).mean()


def hinge(p: Pairs, beta: float) -> Tensor:
    """arXiv:2305.10425, section 2, in the form of 2309.06657's hinge-norm."""
    return (1 - beta * (p.up - p.down)).clamp(min=0).mean()


def robust(p: Pairs, beta: float, label_smoothing: float) -> Tensor:
    """arXiv:2403.00409, section 3.1."""
    clean, flipped = -logsigmoid(beta * (p.up - p.down)), -logsigmoid(beta * (p.down - p.up))
    return (((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)).mean()


def cdpo(p: Pairs, beta: float, label_smoothing: float) -> Tensor:
    """Conservative DPO (Mitchell 2023): cross-entropy against labels that are right with 1 − label_smoothing."""
    margin = beta * (p.up - p.down)
    return (-(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)).mean()


def apo_zero(p: Pairs, beta: float) -> Tensor:
    """arXiv:2408.06266, eq. 7, plus 1."""
    return (1 - torch.sigmoid(beta * p.up) + torch.sigmoid(beta * p.down)).mean()


def apo_down(p: Pairs, beta: float) -> Tensor:
    """arXiv:2408.06266, eq. 8, plus 1."""
    return (1 + torch.sigmoid(beta * p.up) - torch.sigmoid(beta * (p.up - p.down))).mean()


def sppo(p: Pairs, beta: float) -> Tensor:
    """arXiv:2405.00675, eq. 4.7 with win rates 1 and 0 and η = 1/beta."""
    eta = 1 / beta
    return ((p.up - eta * (1 - 1 / 2)) ** 2 + (p.down - eta * (0 - 1 / 2)) ** 2).mean()


def nca(p: Pairs, beta: float) -> Tensor:
    """arXiv:2402.05369, section 4.1, for K = 2 answers."""
    up, down = beta * p.up, beta * p.down
    return (-logsigmoid(up) - (logsigmoid(-up) + logsigmoid(-down)) / 2).mean()


def bco(p: Pairs, beta: float) -> Tensor:
    """arXiv:2404.04656, section 4, with reward shift δ = 0."""
    return (-logsigmoid(beta * p.up) - logsigmoid(-beta * p.down)).mean()


def exo(p: Pairs, beta: float, label_smoothing: float) -> Tensor:
    """arXiv:2402.00856, eq. 16: KL(policy's preference ‖ (1 − ε, ε))."""
    policy = torch.softmax(beta * torch.stack([p.up, p.down]), dim=0)
    target = torch.tensor([[1 - label_smoothing], [label_smoothing]], dtype=policy.dtype)
    return (policy * (policy.log() - target.log())).sum(0).mean()


def aot(p: Pairs, beta: float) -> Tensor:
    """arXiv:2406.05882, section 3, paired: the policy's margins above the reference's, quantile by quantile."""
    policy, reference = (p.chosen - p.rejected).sort().values, (p.ref_chosen - p.ref_rejected).sort().values
    return -logsigmoid(beta * (policy - reference)).mean()


def discopop(p: Pairs, beta: float, discopop_tau: float) -> Tensor:
    """arXiv:2406.08414, eq. 5."""
    margin = beta * (p.up - p.down)
    gate = torch.sigmoid(margin / discopop_tau)
    return (-(1 - gate) * logsigmoid(margin) + gate * torch.exp(-margin)).mean()


def dpo_norm(p: Pairs, beta: float) -> Tensor:
    """arXiv:2411.15124, length-normalised DPO."""
    return -logsigmoid(beta * (p.up / p.chosen_tokens - p.down / p.rejected_tokens)).mean()


def dpo_sft(p: Pairs, beta: float, loss_weights: list[float]) -> Tensor:
    """arXiv:2404.19733, DPO + NLL, the NLL as a mean over the tokens of all chosen answers."""
    return loss_weights[0] * dpo(p, beta) + loss_weights[1] * nll(p.chosen, p.chosen_tokens)


def mpo(p: Pairs, beta: float, loss_weights: list[float]) -> Tensor:
    """arXiv:2411.10442, eqs. 1 to 5, the reward shift δ = 0."""
    parts = dpo(p, beta), bco(p, beta), nll(p.chosen, p.chosen_tokens)
    return sum(weight * part for weight, part in zip(loss_weights, parts, strict=True))


def ld_dpo(p: Pairs, beta: float, ld_alpha: float) -> Tensor:
    """arXiv:2409.06411, eq. 10: log-probs of the tokens that both lengths have, and ld_alpha of the rest."""
    margins = []
    for up, down, ref_up, ref_down in zip(*(p.tokens[side] for side in SIDES), strict=True):
        both = min(len(up[0]), len(down[0]))
        cut = [each[0][:both].sum() + ld_alpha * each[0][both:].sum() for each in (up, down, ref_up, ref_down)]
        margins.append(cut[0] - cut[2] - cut[1] + cut[3])
    return -logsigmoid(beta * torch.stack(margins)).mean()


def wpo(p: Pairs, beta: float) -> Tensor:
    """arXiv:2406.11827, eq. 2, with the weight alignment of section 3.2."""
    weights = [
        torch.stack([(logps - squares).mean().exp() for logps, squares in p.tokens[side]]).detach()
        for side in SIDES[:2]
    ]
    return (-logsigmoid(beta * (p.up - p.down)) * weights[0] * weights[1]).mean()


def tr_dpo(p: Pairs, beta: float) -> Tensor:
    """arXiv:2404.09656, section 3: DPO against the reference as it is at this step."""
    return dpo(p, beta)


def js_dpo(p: Pairs, beta: float) -> Tensor:
    """arXiv:2309.16240, table 1: f′(t) = log(2t / (t + 1))."""
    up, down = (math.log(2) + each - torch.log1p(each.exp()) for each in (p.up, p.down))
    return -logsigmoid(beta * (up - down)).mean()


def aot_unpaired(p: Pairs, beta: float) -> Tensor:
    """arXiv:2406.05882, section 3, unpaired: chosen log-ratios above rejected ones, quantile by quantile."""
    return -logsigmoid(beta * (p.up.sort().values - p.down.sort().values)).mean()


def alphapo(p: Pairs, beta: float, gamma_beta_ratio: float, alpha: float) -> Tensor:
    """arXiv:2501.03884, eq. 6, on the mean log-probs of SimPO."""
    up, down = (
        (1 - (-alpha * logps / tokens).exp()) / alpha
        for logps, tokens in ((p.chosen, p.chosen_tokens), (p.rejected, p.rejected_tokens))
    )
    return -logsigmoid(beta * (up - down - gamma_beta_ratio)).mean()


def cpo(p: Pairs, beta: float, cpo_alpha: float) -> Tensor:
    """arXiv:2401.08417, eq. 3 and the NLL term."""
    return -logsigmoid(beta * (p.chosen - p.rejected)).mean() + cpo_alpha * nll(p.chosen, p.chosen_tokens)


def simpo(p: Pairs, beta: float, gamma_beta_ratio: float) -> Tensor:
    """arXiv:2405.14734, eq. 6, with γ = gamma_beta_ratio·β."""
    margin = beta * p.chosen / p.chosen_tokens - beta * p.rejected / p.rejected_tokens
    return -logsigmoid(margin - gamma_beta_ratio * beta).mean()


def orpo(p: Pairs, beta: float) -> Tensor:
    """arXiv:2403.07691, eqs. 6 and 7, on mean log-probs per token; the NLL over the whole dialogue."""
    chosen, rejected = (p.chosen / p.chosen_tokens).exp(), (p.rejected / p.rejected_tokens).exp()
    odds_ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    return nll(p.dialogue, p.dialogue_tokens) - beta * logsigmoid(odds_ratio.log()).mean()


def kto(r: Rows, beta: float, desirable_weight: float, undesirable_weight: float) -> Tensor:
    """arXiv:2402.01306, eq. 7, less its constant λ_y: λ·(1 − σ(±β(r − z₀))), z₀ a batch's KL estimate of at least 0."""
    reward, z0 = r.answer - r.ref_answer, (r.mismatched - r.ref_mismatched).mean().clamp(min=0).detach()
    good = desirable_weight * (1 - torch.sigmoid(beta * (reward - z0)))
    bad = undesirable_weight * (1 - torch.sigmoid(beta * (z0 - reward)))
    return torch.where(r.label, good, bad).mean()


def sft(r: Rows) -> Tensor:
    """Next-token NLL of the answers."""
    return nll(r.answer, r.tokens)


def nll(logps: Tensor, tokens: Tensor) -> Tensor:
    """Mean over the tokens of a batch, not over its rows."""
    return -logps.sum() / tokens.sum()


# What a loss is before the first step, where policy and reference are one model, as a function of its file's values.
AT_STEP_0 = {
    "dpo": lambda loss: math.log(2),
    "ipo": lambda loss: (1 / (2 * loss.beta)) ** 2,
    "hinge": lambda loss: 1,
    "robust": lambda loss: math.log(2),
    "kto": lambda loss: (loss.desirable_weight + loss.undesirable_weight) / 4,  # as many good rows as bad ones
    "apo_zero": lambda loss: 1,
    "apo_down": lambda loss: 1,
    "sppo": lambda loss: 1 / (2 * loss.beta**2),
    "nca": lambda loss: 2 * math.log(2),
    "bco": lambda loss: 2 * math.log(2),
    "exo": lambda loss: -math.log(2) - math.log(loss.label_smoothing * (1 - loss.label_smoothing)) / 2,
    "aot": lambda loss: math.log(2),
    "discopop": lambda loss: (math.log(2) + 1) / 2,
    "dpo_norm": lambda loss: math.log(2),
    "ld_dpo": lambda loss: math.log(2),
    "tr_dpo": lambda loss: math.log(2),
    "js_dpo": lambda loss: math.log(2),
    "aot_unpaired": lambda loss: math.log(2),
}
