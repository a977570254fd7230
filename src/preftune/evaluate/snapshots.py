"""What a run changed: snapshots of the model before and after, and the summary that is made of them."""

from dataclasses import dataclass

from omegaconf import DictConfig
from transformers import Trainer

from preftune.data.load import Data
from preftune.evaluate import generation
from preftune.evaluate.kept import Scorer
from preftune.evaluate.pairs import Lend, PairScores, implicit_rewards
from preftune.evaluate.statistics import interval
from preftune.models import sharding


@dataclass(frozen=True)
class Snapshot:
    """A model at one moment: its scores of the held-out pairs, and its answers to the first prompts of these."""

    name: str
    scores: PairScores
    answers: dict[str, str]


def take_snapshot(name: str, trainer: Trainer, data: Data, cfg: DictConfig) -> Snapshot | None:
    """The trainer's model as it is now on held-out pairs; None where the data has no pairs."""
    if data.eval_pairs is None or "task" in cfg.loss:  # a reward model says nothing, and TRL scores its pairs
        return None
    tokenizer, bf16 = trainer.processing_class, bool(cfg.hardware.bf16)
    # where the fast forward trains, it scores
    lend: Lend = "head" if getattr(trainer, "form", None) is None else "none"
    prompts = generation.prompts(data.eval_pairs, cfg.samples)
    # what the trainer's own evaluation has found, if it was of the weights as they are now
    just_evaluated = {} if trainer.args.load_best_model_at_end else getattr(trainer, "evaluated", {})
    with sharding.whole(trainer.model):
        scorer = Scorer(tokenizer, cfg.train.max_length, bf16, lend, cfg.fastpath.reference_cache)
        scores = scorer.score(trainer.model, data.eval_pairs, just_evaluated)
        texts = generation.answers(trainer.model, tokenizer, prompts, bf16=bf16)
    return Snapshot(name, scores, {prompt[-1]["content"]: text for prompt, text in zip(prompts, texts, strict=True)})


def summarize(trainer: Trainer, snapshots: list[Snapshot | None], held_out: dict) -> dict:
    """summary.json: perplexity at the start, accuracies, margins, log-probs at each snapshot, samples, last metrics.

    A stage whose result the next one looks at has the snapshot of its start alone.
    """
    summary = {
        "loss": getattr(trainer.args, "loss_type", None) or trainer._name.lower(),
        "reference_forwards": getattr(trainer, "reference_forwards", None),
        "held_out": held_out,
        "snapshots": [],
        "samples": [],
    }
    if (accuracy := held_out.get("eval_accuracy")) is not None:  # of a reward model
        asked = trainer.eval_dataset
        count = len(asked["eval"] if isinstance(asked, dict) else asked)
        summary |= {"accuracy_after": accuracy, "accuracy_ci": list(interval(accuracy, count)), "pairs": count}
    if None in snapshots:
        return summary
    first, last = snapshots[0], snapshots[-1]
    rows = [{"name": each.name, **each.scores.summary()} for each in snapshots]
    summary |= {"perplexity": rows[0]["perplexity"], "snapshots": rows}
    if len(snapshots) == 1:
        return summary | {"samples": [{"prompt": prompt, "before": text} for prompt, text in first.answers.items()]}
    if beta := getattr(trainer, "beta", None):
        rows[-1] |= implicit_rewards(last.scores, first.scores, beta)
    return summary | {
        "logp_accuracy_before": rows[0]["logp_accuracy"],
        "logp_accuracy_after": rows[1]["logp_accuracy"],
        "accuracy_after": rows[1].get("reward_accuracy"),
        "margin_before": 0.0 if beta else None,  # by construction: policy and reference are one model
        "margin_after": rows[1].get("reward_margin"),
        "samples": [{"prompt": p, "before": a, "after": last.answers[p]} for p, a in first.answers.items()],
    }


def last_evaluation(trainer: Trainer) -> dict:
    """The held-out metrics of the trained model: those of its last step where these were just computed."""
    last = [logs for logs in trainer.state.log_history if logs["step"] == trainer.state.global_step]
    found = [logs for logs in last if any(name.startswith("eval_") for name in logs)]  # one row for each set
    return {name: value for logs in found for name, value in logs.items()} or trainer.evaluate()


def combine(summaries: dict[str, dict]) -> dict:
    """A pipeline's summary: its last training stage's own, seen from the model that the first one started with."""
    first, last = list(summaries.values())[0], list(summaries.values())[-1]
    if first is last or not (first["snapshots"] and last["snapshots"]):  # one stage, or no held-out pairs
        return last | {"stages": summaries}
    start, before = first["snapshots"][0], [*summaries][-2]
    snapshots = [start, {**last["snapshots"][0], "name": f"after {before}"}, *last["snapshots"][1:]]
    answers = zip(first["samples"], last["samples"], strict=True)
    return last | {
        "snapshots": snapshots,
        "logp_accuracy_before": start["logp_accuracy"],
        "samples": [{**new, "before": old["before"]} for old, new in answers],
        "stages": summaries,
    }
