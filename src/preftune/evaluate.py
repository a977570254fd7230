"""What a model thinks of held-out pairs, and what it says: log-probs, perplexity, accuracies, sample answers."""

import contextlib
import math
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

BATCH = 8  # pairs


@dataclass(frozen=True)
class PairScores:
    """Log-probs of n held-out pairs, each tensor of shape (n,): sums in nats over the completion, and its tokens."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    def perplexity(self) -> float:
        """Per-token perplexity of the chosen answers: exp(−Σ log π / Σ tokens)."""
        return math.exp(-(self.chosen.sum() / self.chosen_tokens.sum()).item())

    def logp_accuracy(self) -> float:
        """How often the chosen answer has the higher mean log-prob per token; needs no reference."""
        chosen, rejected = self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens
        return (chosen > rejected).float().mean().item()

    def summary(self) -> dict[str, float]:
        """The figures above, and the mean log-prob of an answer: its sum, and per token over all answers."""
        return {
            "perplexity": self.perplexity(),
            "logp_accuracy": self.logp_accuracy(),
            "logps_chosen": self.chosen.mean().item(),
            "logps_rejected": self.rejected.mean().item(),
            "logps_chosen_per_token": (self.chosen.sum() / self.chosen_tokens.sum()).item(),
            "logps_rejected_per_token": (self.rejected.sum() / self.rejected_tokens.sum()).item(),
        }


def implicit_rewards(policy: PairScores, reference: PairScores, beta: float) -> dict[str, float]:
    """Accuracy and margin of the implicit reward β·(log π − log π_ref) (Rafailov et al. 2023) on the same pairs."""
    margins = beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))
    return {"reward_accuracy": (margins > 0).float().mean().item(), "reward_margin": margins.mean().item()}


@torch.no_grad()
def score(model, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, max_length: int, bf16: bool, fused: bool = False):
    """The PairScores of `model` on rows of message lists (prompt, chosen, rejected), cut to `max_length` tokens.

    `fused`: whether the model's forward takes `fused_lm_head` already, as a trainer's does; it is lent one otherwise.
    """
    sides = [[_tokens(tokenizer, pair, side, max_length) for side in ("chosen", "rejected")] for pair in pairs]
    order = sorted(range(len(sides)), key=lambda i: sum(len(ids) for ids, _ in sides[i]))
    sums, counts = torch.zeros(2, len(sides), dtype=torch.float64), torch.zeros(2, len(sides), dtype=torch.float64)
    with _evaluating(model, fused):
        for start in tqdm(range(0, len(order), BATCH), desc="scoring held-out pairs", unit="batch", leave=False):
            chunk = order[start : start + BATCH]
            rows = [
                sides[i][side] for side in (0, 1) for i in chunk
            ]  # as TRL's trainers: all chosen, then all rejected
            batch = _pad(rows, tokenizer.pad_token_id, model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                log_probs = model(**batch, use_cache=False, fused_lm_head=True).log_probs
            sums[:, chunk] = log_probs.double().sum(1).cpu().view(2, -1)
            counts[:, chunk] = (batch["labels"][:, 1:] != -100).double().sum(1).cpu().view(2, -1)
    return PairScores(*sums, *counts.clamp(min=1))


@contextlib.contextmanager
def _evaluating(model, fused: bool):
    """The model in evaluation mode, lent TRL's fused LM head unless it has one: log-probs without logits."""
    head = model.get_base_model() if isinstance(model, PeftModel) else model
    before, training = vars(head).get("forward"), model.training
    if not fused:
        add_fused_lm_head(head)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if not fused:
            del head.forward
            if before is not None:
                head.forward = before


@torch.no_grad()
def answers(
    model, tokenizer: PreTrainedTokenizerBase, prompts: list[list[dict]], max_new_tokens: int = 64
) -> list[str]:
    """The model's greedy answer to each prompt (a message list), cut after `max_new_tokens`."""
    training = model.training
    model.eval()
    texts = []
    for prompt in prompts:
        ids = torch.tensor([_ids(tokenizer, prompt, add_generation_prompt=True)], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts.append(tokenizer.decode(output[0, ids.size(1) :], skip_special_tokens=True).strip())
    model.train(training)
    return texts


def _tokens(tokenizer: PreTrainedTokenizerBase, pair: dict, side: str, max_length: int) -> tuple[list[int], int]:
    """(ids, start): prompt and answer as one row, and where the answer begins, which is where TRL lets it begin."""
    prompt = _ids(tokenizer, pair["prompt"], add_generation_prompt=True)
    whole = _ids(tokenizer, pair["prompt"] + pair[side])
    start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    return whole[:max_length], start


def _ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def _pad(rows: list[tuple[list[int], int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Right-padded (batch, length) ids, mask, and labels that leave out the prompt."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows])
    labels = ids.masked_fill(mask == 0, -100)
    for i, (_, start) in enumerate(rows):
        labels[i, :start] = -100
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
