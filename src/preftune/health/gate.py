"""The perplexity gate: whether a checkpoint knows its chosen answers well enough to learn a preference over them."""

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
    value, limit = scores.perplexity(), settings.max_perplexity
    far = outliers(scores, settings.tail)
    listed = [
        {"prompt": row["prompt"][-1]["content"], "chosen": said(row["chosen"][-1]), "logps_per_token": far[i]}
        for i, row in zip(far, pairs.select(list(far)[:LISTED]), strict=False)
    ]
    report = {"perplexity": value, "max_perplexity": limit, "passed": value <= limit, "pairs": len(scores.chosen)}
    report |= {"outliers": listed, "outlier_count": len(far)}
    if value <= limit:
        return report, None
    meaning = (
        f"The perplexity of the held-out chosen answers is {value:.1f}: the model has not learned them, and a "
        "preference stage would learn noise."
    )
    remedy = (
        "Train it on them first (python -m recipes.sft_dpo, more epochs or a higher sft.train.learning_rate), or go "
        "on all the same with gate.on_fail=warn, or raise gate.max_perplexity if such answers are short or full of "
        "facts."
    )
    return report, Finding("perplexity", 0, value, limit, meaning, remedy)


def outliers(scores: PairScores, tail: float) -> dict[int, float]:
    """{row: log-prob per token} of chosen answers over `tail` standard deviations below the mean, the worst first."""
    per_token = scores.chosen / scores.chosen_tokens
    if len(per_token) < 3:
        return {}
    bound = per_token.mean() - tail * per_token.std()
    return {row: per_token[row].item() for row in per_token.argsort().tolist() if per_token[row] < bound}
