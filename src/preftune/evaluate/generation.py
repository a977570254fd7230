"""What a model says: its greedy answers, answers drawn from it, and the KL divergence that these measure."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from datasets import Dataset
from torch.nn import Module
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import pad

from preftune.data.messages import Messages
from preftune.data.token_checks import options
from preftune.models.tokenizer import stop_tokens, token_ids

BATCH = 64  # prompts: a small model reads its weights for each token, however many answers it draws
# The model's own distribution and nothing else: no cut of the tail, no penalty, whatever its generation config says
PLAIN_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
InTokens = tuple[list[int], list[int]]  # a prompt and an answer to it, in tokens


class Prompt(list):
    """The messages of a prompt, with what the chat template is given beside them (tools, arguments)."""

    def __init__(self, messages: Messages, options: dict):
        super().__init__(messages)
        self.options = options


def prompts(rows: Dataset, count: int | None = None) -> list[Prompt]:
    """The prompts of the first `count` rows (None: of all), to be answered as the trainer renders them."""
    batch = rows[:count]
    return [Prompt(*each) for each in zip(batch["prompt"], options(batch), strict=True)]


def answers(
    model: Module, tokenizer: PreTrainedTokenizerBase, prompts: list[Messages], max_tokens: int = 64, bf16: bool = False
) -> list[str]:
    """The model's greedy answer to each prompt (a message list), cut after `max_tokens`."""
    rows = generated(model, tokenizer, prompts, max_tokens, bf16, do_sample=False)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for _, ids in rows]


def sampled(
    model: Module, tokenizer: PreTrainedTokenizerBase, prompts: list[Messages], max_tokens: int, bf16: bool, seed: int
) -> list[InTokens]:
    """(prompt, answer) in tokens, an answer to each prompt drawn from the model at temperature 1, EOS included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return generated(model, tokenizer, prompts, max_tokens, bf16, **PLAIN_SAMPLING)


@contextmanager
def computing(model: Module, bf16: bool) -> Iterator[None]:
    """bf16 autocast where it is wanted. It keeps its casts of weights that require gradients alone, so on a CPU all of
    them do for the time: frozen ones would be cast anew for each token, which takes a GPU less than it has memory."""
    kept = model.parameters() if bf16 and model.device.type == "cpu" else ()
    frozen = [each for each in kept if each.is_floating_point() and not each.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


@torch.no_grad()
def generated(
    model: Module, tokenizer: PreTrainedTokenizerBase, asked: list[Messages], max_tokens: int, bf16: bool, **how: object
) -> list[InTokens]:
    """(prompt, answer) in tokens for each prompt; an answer is cut behind its end. `how`: what `generate` takes."""
    prompts = [token_ids(tokenizer, list(p), add_generation_prompt=True, **getattr(p, "options", {})) for p in asked]
    ends, found, training = stop_tokens(tokenizer), [], model.training
    how |= {"use_cache": True, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    model.eval()
    with computing(model, bf16):
        told = "drawing answers" if how.get("do_sample") else "answering"
        for start in tqdm(range(0, len(prompts), BATCH), told, unit="batch", leave=False, disable="streamer" in how):
            rows = prompts[start : start + BATCH]
            ids = pad([torch.tensor(row) for row in rows], tokenizer.pad_token_id, "left").to(model.device)
            mask = pad([torch.ones(len(row), dtype=torch.long) for row in rows], 0, "left").to(model.device)
            output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, **how)
            new = output[:, ids.size(1) :].tolist()
            found += [(row, _to_end(answer, ends)) for row, answer in zip(rows, new, strict=True)]
    model.train(training)
    return found


def _to_end(answer: list[int], ends: list[int]) -> list[int]:
    return next((answer[: place + 1] for place, token in enumerate(answer) if token in ends), answer)


@torch.no_grad()
def divergence(policy: Module, reference: Callable, drawn: list[InTokens], bf16: bool) -> dict[str, float | None]:
    """KL(policy ‖ reference) over `drawn`, (prompt, answer) pairs that were drawn from the policy.

    In nats per answer, its standard error (None of one answer), in nats per token, and the tokens per answer.
    `reference` is a function that gives a context manager of the reference model, which may be the policy with its
    adapter off. The estimator is Rao-Blackwellized Monte Carlo (Amini et al. 2025, arXiv:2504.10637): over answers
    drawn from the policy, the mean of Σ_t KL(π(·|x, y<t) ‖ π_ref(·|x, y<t)), each term exact over the vocabulary. It is
    unbiased as Σ log π/π_ref is, never negative, and of less variance. Answers are cut, so it is the divergence of
    their first tokens.
    """
    totals = []
    with computing(policy, bf16):  # around all, so that autocast keeps the casts of both models' weights
        for prompt, answer in tqdm(drawn, desc="KL to the reference", unit="answer", leave=False):
            log_policy = next_tokens(policy, prompt, answer, bf16)
            with reference() as other:
                log_reference = next_tokens(other, prompt, answer, bf16)
            totals.append((log_policy.exp() * (log_policy - log_reference)).sum(-1).sum().item())
    each, count = torch.tensor(totals, dtype=torch.float64), sum(len(answer) for _, answer in drawn)
    error = each.std().item() / math.sqrt(len(each)) if len(each) > 1 else None
    mean, tokens = each.mean().item(), count / len(each)
    return {"kl": mean, "kl_error": error, "kl_per_token": each.sum().item() / count, "kl_tokens": tokens}


def next_tokens(model: Module, prompt: list[int], answer: list[int], bf16: bool) -> torch.Tensor:
    """Log-probs of every token at each position of the answer, (len(answer), vocabulary), in float32."""
    ids = torch.tensor([prompt + answer], device=model.device)
    keep = {"logits_to_keep": len(answer) + 1} if model._supports_logits_to_keep() else {}
    with computing(model, bf16):
        logits = model(input_ids=ids, use_cache=False, **keep).logits
    return logits[0, -len(answer) - 1 : -1].float().log_softmax(-1)
