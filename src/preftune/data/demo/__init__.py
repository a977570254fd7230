"""The preference data set that preftune ships: answer directly and completely, at once, in plain sentences."""

import json
from pathlib import Path

HERE = Path(__file__).parent
TRAIN = HERE / "train.jsonl"
EVAL = HERE / "eval.jsonl"


def read(path: Path) -> list[dict]:
    """The pairs in TRAIN or EVAL, in file order; prompt, chosen and rejected are lists of messages."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def unpaired(rows: list[dict]) -> list[dict]:
    """The thumbs-up/down view: two rows a pair, its chosen answer with label True and its rejected one with False.

    The two stand side by side; shuffle before training with KTO, which reads a batch in order.
    """
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]


def demonstrations(rows: list[dict]) -> list[dict]:
    """The SFT view: each prompt with its chosen answer as the completion."""
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
