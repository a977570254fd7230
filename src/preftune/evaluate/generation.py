"""What a model says: its greedy answers, answers drawn from it, and the KL divergence that these measure."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from preftune.data.token_checks import options
from preftune.models.tokenizer import stop_tokens, token_ids

BATCH = 64  # prompts: a small model reads its weights for each token, however many answers it draws
SCORED = 8  # answers at a time, with log-probs of the whole vocabulary
# The model's own distribution and nothing else: no cut of the tail, no penalty, whatever its generation config says
PLAIN_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


class Prompt(list):
    """The messages of a prompt, with what the chat template is given beside them (tools, arguments)."""

    def __init__(self, messages: list[dict], options: dict):
        super().__init__(messages)
        self.options = options


def prompts(rows: Dataset, count: int | None = None) -> list[Prompt]:
    """The prompts of the first `count` rows (None: of all), to be answered as the trainer renders them."""
    batch = rows[:count]
    return [Prompt(*each) for each in zip(batch["prompt"], options(batch), strict=True)]


def answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict]],
    max_new_tokens: int = 64,
    bf16: bool = False,
) -> list[str]:
    """The model's greedy answer to each prompt (a message list), cut after `max_new_tokens`."""
    found = []
    with multiplied_in_bf16(model) if bf16 else nullcontext():
        for start in tqdm(range(0, len(prompts), BATCH), desc="answering", unit="batch", leave=False):
            rows = generated(model, tokenizer, prompts[start : start + BATCH], max_new_tokens, do_sample=False)
            found += [tokenizer.decode(ids, skip_special_tokens=True).strip() for _, ids in rows]
    return found


def sampled(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict]],
    max_new_tokens: int,
    bf16: bool,
    seed: int,
) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) in tokens, an answer to each prompt drawn from the model at temperature 1, EOS included."""
    drawn = []
    with torch.random.fork_rng(), multiplied_in_bf16(model) if bf16 else nullcontext():
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(prompts), BATCH), desc="drawing answers", unit="batch", leave=False):
            batch = prompts[start : start + BATCH]
            drawn += generated(model, tokenizer, batch, max_new_tokens, **PLAIN_SAMPLING)
    return drawn


@contextmanager
def multiplied_in_bf16(model: torch.nn.Module) -> Iterator[None]:
    """bf16 autocast, with the weights of linear layers cast once: it would cast all of them anew for each token."""
    layers = [each for each in model.modules() if type(each) is torch.nn.Linear and each.weight.dtype is torch.float32]
    weights = [layer.weight for layer in layers]
    try:
        for layer in layers:
            layer.weight = torch.nn.Parameter(layer.weight.detach().bfloat16(), requires_grad=False)
        with torch.autocast(model.device.type, torch.bfloat16):
            yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = weight


@torch.no_grad()
def generated(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict]],
    max_new_tokens: int,
    **sampling: object,
) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) in tokens for each prompt of a batch; an answer is cut behind its end."""
    beside = [getattr(prompt, "options", {}) for prompt in prompts]
    rows = [
        token_ids(tokenizer, list(p), add_generation_prompt=True, **o) for p, o in zip(prompts, beside, strict=True)
    ]
    length, ends = max(map(len, rows)), stop_tokens(tokenizer)
    ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    training = model.training
    model.eval()
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
        **sampling,
    )
    model.train(training)
    new = output[:, length:].tolist()
    return [(row, _to_end(answer, ends)) for row, answer in zip(rows, new, strict=True)]


def _to_end(answer: list[int], ends: list[int]) -> list[int]:
    return next((answer[: place + 1] for place, token in enumerate(answer) if token in ends), answer)


@dataclass(frozen=True)
class Divergence:
    """KL(policy ‖ reference) in nats per answer, its standard error, and in nats per token; tokens per answer."""

    answer: float
    error: float | None  # None where there is one answer
    token: float
    tokens: float


@torch.no_grad()
def divergence(
    policy: torch.nn.Module, reference: Callable, drawn: list[tuple[list[int], list[int]]], bf16: bool
) -> Divergence:
    """KL(policy ‖ reference) over `drawn`, (prompt, answer) pairs that were drawn from the policy.

    `reference` is a function that gives a context manager of the reference model, which may be the policy with its
    adapter off. The estimator is Rao-Blackwellized Monte Carlo (Amini et al. 2025, arXiv:2504.10637): over answers
    drawn from the policy, the mean of Σ_t KL(π(·|x, y<t) ‖ π_ref(·|x, y<t)), each term exact over the vocabulary. It is
    unbiased as Σ log π/π_ref is, never negative, and of less variance. Answers are cut, so it is the divergence of
    their first tokens.
    """
    totals = []
    for start in tqdm(range(0, len(drawn), SCORED), desc="KL to the reference", unit="batch", leave=False):
        rows = drawn[start : start + SCORED]
        ours = next_tokens(policy, rows, bf16)
        with reference() as other:
            theirs = next_tokens(other, rows, bf16)
        totals += [(p.exp() * (p - q)).sum(-1).sum().item() for p, q in zip(ours, theirs, strict=True)]
    each, count = torch.tensor(totals, dtype=torch.float64), sum(len(answer) for _, answer in drawn)
    error = each.std().item() / math.sqrt(len(each)) if len(each) > 1 else None
    return Divergence(each.mean().item(), error, each.sum().item() / count, count / len(each))


def next_tokens(model: torch.nn.Module, rows: list[tuple[list[int], list[int]]], bf16: bool) -> list[torch.Tensor]:
    """For each (prompt, answer): log-probs of every token at each position of the answer, in float32."""
    together = [prompt + answer for prompt, answer in rows]
    length, first = max(map(len, together)), min(len(prompt) for prompt, _ in rows) - 1
    ids = torch.tensor([row + row[-1:] * (length - len(row)) for row in together], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in together], device=model.device)
    with multiplied_in_bf16(model) if bf16 else nullcontext():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=length - first).logits
    cut = length - logits.size(1)  # 0 where a model knows no logits_to_keep
    return [
        of_row[len(prompt) - 1 - cut : len(prompt) + len(answer) - 1 - cut].float().log_softmax(-1)
        for of_row, (prompt, answer) in zip(logits, rows, strict=True)
    ]
