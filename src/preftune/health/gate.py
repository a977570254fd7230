"""The perplexity gate: whether a checkpoint knows its chosen answers well enough to learn a preference over them."""

import math

from datasets import Dataset
from omegaconf import DictConfig

from preftune.data.messages import said
from preftune.evaluate.pairs import PairScores
from preftune.health.findings import Finding

LISTED = 5


def perplexity_gate(scores: PairScores, pairs: Dataset, settings: DictConfig) -> tuple[dict, Finding | None]:
    """What gate.json holds, and the finding where the gate is shut.

    `scores`: of the held-out `pairs` by the model that the stage starts from; `settings`: conf/base.yaml, `gate`. The
    perplexity is exp of the mean negative log-prob per token of the chosen answers. A model that has not learned them
    gives DPO nothing to rank: it raises the chosen only by pressing on the rejected (Rafailov et al. 2023, section 4,
    starts from SFT on the chosen answers for this reason).
    """
    value = scores.perplexity()
    far = outliers(scores, settings.tail)
    report = {
        "perplexity": value,
        "max_perplexity": settings.max_perplexity,
        "passed": value <= settings.max_perplexity,
        "pairs": len(scores.chosen),
        "outliers": [
            {
                "prompt": pairs[row]["prompt"][-1]["content"],
                "chosen": said(pairs[row]["chosen"][-1]),
                "logps_per_token": per_token,
            }
            for row, per_token in far[:LISTED]
        ],
        "outlier_count": len(far),
    }
    if report["passed"]:
        return report, None
    return report, Finding(
        "perplexity",
        0,
        value,
        settings.max_perplexity,
        f"The perplexity of the held-out chosen answers is {value:.1f}: the model has not learned them, and a "
        "preference stage would learn noise.",
        "Train it on them first (python -m recipes.sft_dpo, more epochs or a higher sft.train.learning_rate), or go "
        "on all the same with gate.on_fail=warn, or raise gate.max_perplexity if such answers are short or full of "
        "facts.",
    )


def outliers(scores: PairScores, tail: float) -> list[tuple[int, float]]:
    """(row, log-prob per token) of the chosen answers over `tail` standard deviations below the mean, worst first."""
    per_token = scores.chosen / scores.chosen_tokens
    if len(per_token) < 3 or math.isnan(spread := per_token.std().item()):
        return []
    bound = per_token.mean().item() - tail * spread
    rows = [(row, value) for row, value in enumerate(per_token.tolist()) if value < bound]
    return sorted(rows, key=lambda item: item[1])
