"""The textbook table of the losses: what each makes of given sequence log-probs, in plain Python.

Log-probs are natural logs summed over an answer's tokens. `logratio` is the DPO paper's log-ratio difference,
log(π/π_ref)(chosen) − log(π/π_ref)(rejected); β times it is the margin of the implicit rewards.
"""

import json
import math
from collections.abc import Iterable

SERIES = ("chosen", "rejected", "ref_chosen", "ref_rejected")


def log_sigmoid(x: float) -> float:
    """log σ(x), without overflow for any finite x."""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    """σ(x), without overflow for any finite x."""
    return math.exp(log_sigmoid(x))


def dpo(logratio: float, beta: float) -> float:
    """arXiv:2305.18290, eq. 7: −log σ(β·logratio)."""
    return -log_sigmoid(beta * logratio)


def ipo(logratio: float, beta: float) -> float:
    """arXiv:2310.12036, eq. 17, on sums as the paper writes it (TRL takes means per token): (logratio − 1/(2β))²."""
    error = logratio - 1 / (2 * beta)
    return error * error  # ** 2 raises where a float overflows


def hinge(logratio: float, beta: float) -> float:
    """arXiv:2305.10425 in the form of 2309.06657: max(0, 1 − β·logratio)."""
    return max(0.0, 1 - beta * logratio)


def robust(logratio: float, beta: float, label_smoothing: float) -> float:
    """arXiv:2403.00409, section 3.1: DPO's loss, unbiased where a share `label_smoothing` of the pairs is flipped."""
    clean, flipped = dpo(logratio, beta), dpo(-logratio, beta)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def row(
    chosen: list[float],
    rejected: list[float],
    ref_chosen: list[float],
    ref_rejected: list[float],
    beta: float,
    label_smoothing: float,
) -> dict:
    """One β over all pairs: losses as means, and rewards, margins and gradient weights per pair.

    A gradient weight is the σ(r̂(rejected) − r̂(chosen)) of the DPO paper's gradient (section 4), which stands beside a
    factor β: 0.5 where policy and reference agree, towards 1 where the policy ranks the pair wrongly.
    """
    above = [policy - ref for policy, ref in zip(chosen, ref_chosen, strict=True)]
    below = [policy - ref for policy, ref in zip(rejected, ref_rejected, strict=True)]
    logratios = [up - down for up, down in zip(above, below, strict=True)]
    return {
        "beta": beta,
        "loss": {
            "dpo": mean(dpo(x, beta) for x in logratios),
            "ipo": mean(ipo(x, beta) for x in logratios),
            "hinge": mean(hinge(x, beta) for x in logratios),
            "robust": mean(robust(x, beta, label_smoothing) for x in logratios),
        },
        "chosen_rewards": [beta * x for x in above],
        "rejected_rewards": [beta * x for x in below],
        "margins": [beta * x for x in logratios],
        "gradient_weights": [sigmoid(-beta * x) for x in logratios],
    }


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def problems(given: dict) -> list[str]:
    """What is wrong with the values of conf/mechanics.yaml's keys, one line each, naming the key."""
    found = []
    for key in (*SERIES, "beta"):
        values = as_list(given[key])
        bad = [value for value in values if not is_number(value)]
        if not values:
            found.append(f"{key}: an empty list; give at least one number")
        elif bad:
            found.append(f"{key}: {bad[0]!r} is not a finite number")
        elif key == "beta" and min(values) <= 0:
            found.append(f"beta: {min(values)} is not above 0")
        elif key != "beta" and max(values) > 0:
            found.append(f"{key}: {max(values)} is above 0, and a log-prob never is")
    lengths = {key: len(as_list(given[key])) for key in SERIES}
    if not found and len(set(lengths.values())) > 1:
        found.append(
            "one number per pair in each list; got " + ", ".join(f"{n} in {key}" for key, n in lengths.items())
        )
    if not is_number(given["label_smoothing"]) or not 0 <= given["label_smoothing"] < 0.5:
        found.append(f"label_smoothing: {given['label_smoothing']!r} is not in [0, 0.5)")
    if given["format"] not in ("table", "json"):
        found.append(f"format: {given['format']!r} is not one of table, json")
    return found


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def report(given: dict) -> str:
    """The rows for every β of checked values, as JSON or as tables."""
    series = [as_list(given[key]) for key in SERIES]
    rows = [row(*series, beta=beta, label_smoothing=given["label_smoothing"]) for beta in as_list(given["beta"])]
    if given["format"] == "json":
        return json.dumps(rows, indent=2)
    return tables(rows, given["label_smoothing"])


def tables(rows: list[dict], label_smoothing: float) -> str:
    """Two tables for reading: the mean over the pairs for every β, then every pair."""
    per_pair = ("chosen_rewards", "rejected_rewards", "margins", "gradient_weights")
    names = ["reward chosen", "reward rejected", "margin", "gradient weight"]
    losses = list(rows[0]["loss"])
    count = len(rows[0]["margins"])
    means = [[f"{r['beta']:g}", *r["loss"].values(), *(mean(r[key]) for key in per_pair)] for r in rows]
    title = f"Mean over {count} pairs" if count > 1 else "One pair"
    text = [f"{title} (robust: label_smoothing {label_smoothing}; ipo: on sums, target 1/(2·beta))", ""]
    text += aligned(["beta", *losses, *names], means)
    if count > 1:
        pairs = [[f"{r['beta']:g}", str(i + 1), *(r[key][i] for key in per_pair)] for r in rows for i in range(count)]
        text += ["", "Each pair", "", *aligned(["beta", "pair", *names], pairs)]
    return "\n".join(text)


def aligned(header: list[str], rows: list[list]) -> list[str]:
    """Lines of a table with right-aligned columns under a header."""
    cells = [header, *([x if isinstance(x, str) else f"{x:.4f}" for x in cells] for cells in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
