"""How well swapped labels are found: a fifth of a data set's labels swapped on purpose, then ranked by a model's doubt.

`python -m benchmarks.label_noise embedded://smollm2`; other data: `… MODEL prefs.jsonl 400 256` (rows, max_length).
"""

import sys
import tempfile
import time

import numpy as np
from omegaconf import OmegaConf

from preftune.data.label_noise import reading, swap_probabilities
from preftune.data.load import load
from preftune.data.set_checks import couples_in_order
from preftune.models.load import load_model, load_tokenizer

SWAPPED = 0.2


def main(model="embedded://tiny", path="pkg://preftune.data.demo/train.jsonl", rows="448", max_length="256"):
    base = OmegaConf.load("conf/base.yaml")
    changes = {"path": path, "eval_fraction": 0.0, "max_rows": int(rows), "on_bad_rows": "skip"}
    base.output_dir = tempfile.mkdtemp()
    base.data, base.model.path = OmegaConf.merge(base.data, changes), model
    base.data.skipped_file = f"{base.output_dir}/skipped.jsonl"
    pairs = load(base.data, "paired", None, None, 0).train
    pairs = pairs.add_column("origin", pairs["id"][:])
    started = time.time()
    network = load_model(base.model, OmegaConf.create({}), use_cpu=True)
    features = reading(network, load_tokenizer(base.model), pairs, int(max_length))
    print(f"{len(pairs)} pairs of {path} read by {model} in {time.time() - started:.0f} s")
    areas, hits = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        swapped = rng.permutation(len(pairs)) < SWAPPED * len(pairs)
        doubts = swap_probabilities(np.where(swapped[:, None], -features, features))
        areas.append(couples_in_order(doubts, swapped)[0])
        hits.append(swapped[np.argsort(-doubts)[: swapped.sum()]].mean())
    print(f"area under the ROC curve {np.mean(areas):.3f} ± {np.std(areas):.3f} over 10 draws (chance: 0.5)")
    print(f"of the {SWAPPED:.0%} most doubtful pairs {np.mean(hits):.0%} were swapped (chance: {SWAPPED:.0%})")


if __name__ == "__main__":
    main(*sys.argv[1:])
