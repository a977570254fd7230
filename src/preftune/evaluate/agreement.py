"""Whether two forms of a model answer alike: greedy answers to the same prompts, and log-probs of the same tokens."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from preftune.config.errors import UserError
from preftune.evaluate.generation import Prompt, generated, next_tokens, prompts
from preftune.evaluate.subjects import Subject

COUNT, TOKENS = 10, 32  # prompts, and the most tokens of an answer
ANY = [Prompt([{"role": "user", "content": "How do I keep bread fresh for a week?"}], {})]


@dataclass(frozen=True)
class Limit:
    """How far apart log-probs may be before it is no rounding: `nats`, and of which tokens."""

    nats: float
    of: str


EXACT = Limit(1e-2, "at any token")  # sums of float32 in another order
HALF = Limit(0.25, "per token on average")  # weights or products of 16 bits or less: single tokens move further


@dataclass(frozen=True)
class Answers:
    """What a model said: `rows` are (prompt, greedy answer) in tokens, `logps` of each row its tokens' log-probs."""

    rows: list[tuple[list[int], list[int]]]
    logps: torch.Tensor  # (tokens of all scored answers,)

    def gaps(self, other: "Answers") -> torch.Tensor:
        """How far the log-probs of each token are apart, in nats."""
        return (self.logps - other.logps).abs()

    def within(self, other: "Answers", limit: Limit) -> bool:
        """Whether rounding explains the difference; NaN is explained by nothing."""
        gaps = self.gaps(other)
        return bool((gaps.max() if limit is EXACT else gaps.mean()) < limit.nats)

    def beside(self, other: "Answers") -> str:
        """How far `other` is from this one, in words."""
        same = sum(mine == theirs for mine, theirs in zip(self.rows, other.rows, strict=True))
        gaps = self.gaps(other)
        apart = f"log-probs differ by {gaps.max():.1e} nats at most, {gaps.mean():.1e} per token on average"
        return f"{same} of {len(self.rows)} greedy answers are the same, {apart}"


def asked(subject: Subject) -> list[Prompt]:
    """Up to ten prompts that the subject's run held out; one of ours where it held none out, or its data is gone."""
    if subject.cfg is None:
        return ANY
    try:
        rows = subject.data(tokenizer=None, max_length=None).eval
    except (UserError, OSError) as error:
        print(f"held-out prompts: not available ({str(error).splitlines()[0]}); asking one of our own")
        return ANY
    return prompts(rows, COUNT) if rows else ANY


@torch.no_grad()
def answers(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, asked: list[Prompt], of: Answers | None = None
) -> Answers:
    """The model's greedy answers, and the log-probs that it gives to them, or to the answers in `of`."""
    rows, found = generated(model, tokenizer, asked, TOKENS, bf16=False, do_sample=False), []
    for prompt, answer in of.rows if of else rows:
        log_probs = next_tokens(model, prompt, answer, bf16=False)
        said = torch.tensor(answer, device=log_probs.device)
        found.append(log_probs.gather(1, said[:, None])[:, 0].cpu())
    return Answers(rows, torch.cat(found))
