"""What a model thinks of held-out pairs: log-probs, perplexity, accuracies, and these by the length of the answers."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch.nn import Module
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head, pad

from preftune.evaluate.statistics import at_equal_length
from preftune.fastpath.forward import install_for_scoring

BATCH = 8  # pairs

Lend = Literal["form", "head", "none"]  # to a forward, while it scores: see `log_probs`
Row = tuple[list[int], int]  # token ids of prompt and answer, and where the answer begins


@dataclass(frozen=True)
class PairScores:
    """Log-probs of n held-out pairs, each tensor of shape (n,): sums in nats over the completion, and its tokens."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    def perplexity(self) -> float:
        """Per-token perplexity of the chosen answers: exp(−Σ log π / Σ tokens)."""
        return perplexity(self.chosen, self.chosen_tokens)

    def logp_right(self) -> torch.Tensor:
        """Of each pair, whether the chosen answer has the higher mean log-prob per token: 1.0 or 0.0."""
        return (self.chosen / self.chosen_tokens > self.rejected / self.rejected_tokens).double()

    def logp_accuracy(self) -> float:
        """How often the chosen answer has the higher mean log-prob per token; needs no reference."""
        return self.logp_right().mean().item()

    def by_length(self, **right: torch.Tensor) -> list[dict]:
        """The terciles of the pairs by tokens of an answer (mean of both), shortest first, with the means of `right`.

        An accuracy that falls from bucket to bucket belongs to short answers alone. Fewer than three pairs: fewer rows.
        """
        tokens = (self.chosen_tokens + self.rejected_tokens) / 2
        return [
            {
                "tokens": f"{tokens[rows].min().item():.0f}–{tokens[rows].max().item():.0f}",
                "pairs": len(rows),
                **{name: values[rows].double().mean().item() for name, values in right.items()},
            }
            for rows in tokens.argsort(stable=True).tensor_split(3)
            if len(rows)
        ]

    def summary(self) -> dict:
        """The figures above, and the mean log-prob of an answer: its sum, and per token over all answers."""
        return {
            "perplexity": self.perplexity(),
            "logp_accuracy": self.logp_accuracy(),
            "logps_chosen": self.chosen.mean().item(),
            "logps_rejected": self.rejected.mean().item(),
            "logps_chosen_per_token": (self.chosen.sum() / self.chosen_tokens.sum()).item(),
            "logps_rejected_per_token": (self.rejected.sum() / self.rejected_tokens.sum()).item(),
            "by_length": self.by_length(logp_accuracy=self.logp_right()),
        }


def perplexity(sums: torch.Tensor, tokens: torch.Tensor) -> float:
    """exp(−Σ log π / Σ tokens) of answers with these log-probs and tokens, each of shape (n,)."""
    return math.exp(-(sums.sum() / tokens.sum()).item())


def implicit_rewards(policy: PairScores, reference: PairScores, beta: float) -> dict:
    """Accuracy and margin of the implicit reward β·(log π − log π_ref) (Rafailov et al. 2023) on the same pairs.

    Its `by_length` is the policy's own, with the implicit reward's `accuracy` beside it: it takes that one's place.
    """
    margins = beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))
    right = (margins > 0).double()
    return {
        "reward_accuracy": right.mean().item(),
        "reward_margin": margins.mean().item(),
        "length_controlled_accuracy": at_equal_length(right, policy.chosen_tokens - policy.rejected_tokens),
        "by_length": policy.by_length(logp_accuracy=policy.logp_right(), accuracy=right),
    }


@torch.no_grad()
def log_probs(
    model: Module, tokenizer: PreTrainedTokenizerBase, sides: list[list[Row]], bf16: bool, lend: Lend = "form"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums in nats, tokens), each (k, n), of n rows with k answers each: two of a pair, one of a demonstration.

    `lend`: what its forward is lent meanwhile: TRL's fused head and the fast forward (form), the head alone (head), or
    nothing, as that of a trainer which has both (none).
    """
    order = sorted(range(len(sides)), key=lambda i: sum(len(ids) for ids, _ in sides[i]))
    answers = len(sides[0])
    sums, counts = torch.zeros(2, answers, len(sides), dtype=torch.float64)
    with _evaluating(model, lend):
        for start in tqdm(range(0, len(order), BATCH), desc="scoring held-out pairs", unit="batch", leave=False):
            chunk = order[start : start + BATCH]
            # as TRL's trainers: all chosen, then all rejected
            rows = [sides[i][side] for side in range(answers) for i in chunk]
            batch = _pad(rows, tokenizer.pad_token_id, model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                scored = model(**batch, use_cache=False, fused_lm_head=True).log_probs
            sums[:, chunk] = scored.double().sum(1).cpu().view(answers, -1)
            counts[:, chunk] = (batch["labels"][:, 1:] != -100).double().sum(1).cpu().view(answers, -1)
    return sums, counts.clamp(min=1)


@contextlib.contextmanager
def _evaluating(model: Module, lend: Lend) -> Iterator[None]:
    """The model in evaluation mode, its forward lent what `lend` says, as in `log_probs`."""
    head = model.get_base_model() if isinstance(model, PeftModel) else model
    before, training = vars(head).get("forward"), model.training
    if lend != "none":
        add_fused_lm_head(head)
    if lend == "form":
        install_for_scoring(head)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if lend != "none":
            del head.forward
            if before is not None:
                head.forward = before


def _pad(rows: list[Row], token: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Right-padded (batch, length) ids, mask, and labels that leave out the prompt."""
    ids = [torch.tensor(ids) for ids, _ in rows]
    labels = [each.clone() for each in ids]
    for each, (_, start) in zip(labels, rows, strict=True):
        each[:start] = -100
    masks = [torch.ones_like(each) for each in ids]
    batch = {"input_ids": pad(ids, token), "attention_mask": pad(masks, 0), "labels": pad(labels, -100)}
    return {name: each.to(device) for name, each in batch.items()}
