"""What a run's summary says of its held-out pairs."""

from preftune.report.record import Record, finite


def last_look(record: Record) -> dict:
    """The model after training on the held-out pairs, as summary.json has it; empty where it was not looked at."""
    looks = record.summary.get("looks") or [{}]
    return looks[-1]


def accuracy(look: dict) -> float | None:
    """The share of pairs whose chosen answer has the higher implicit reward; None where the run has no rewards."""
    return finite(look.get("reward_accuracy"))


def pairs(look: dict) -> int | None:
    """How many pairs there were, from the length buckets."""
    return sum(int(bucket["pairs"]) for bucket in look.get("by_length") or []) or None


def accuracy_name(look: dict) -> str:
    """By length, a run without rewards (SFT) has the accuracy by log-prob per token alone."""
    return "logp_accuracy" if accuracy(look) is None else "accuracy"


def evenly_by_length(look: dict) -> float | None:
    """The accuracy if all buckets of length held as many pairs: the mean of the buckets' accuracies."""
    name = accuracy_name(look)
    shares = [share for each in look.get("by_length") or [] if (share := finite(each.get(name))) is not None]
    return sum(shares) / len(shares) if shares else None
