"""Run directories written by hand, in the form that docs/report.md names, so that each test knows their numbers."""

import json

import pytest
from omegaconf import OmegaConf

CONFIG = {
    "loss": {"trainer": "trl.DPOTrainer", "view": "paired", "loss_type": ["sigmoid"], "beta": 0.1},
    "train": {"learning_rate": 1e-4, "seed": 42},
    "data": {"path": "prefs.jsonl", "eval_split": None, "eval_fraction": 0.25, "max_rows": None},
    "health": {"action": "warn", "margin_max": 20.0, "accuracy_chance": 0.55, "chosen_fall": 1.0, "kl_max": 0.5},
    "gate": {"max_perplexity": 10.0, "on_fail": "stop"},
    "output_dir": "run",
}
START = {
    "name": "start",
    "perplexity": 9.0,
    "logp_accuracy": 0.5,
    "logps_chosen_per_token": -2.2,
    "logps_rejected_per_token": -2.2,
}


def buckets(*accuracies, pairs=40):
    names = ("4–12", "13–30", "31–90")
    return [
        {"tokens": name, "pairs": pairs, "accuracy": accuracy, "logp_accuracy": 0.6}
        for name, accuracy in zip(names, accuracies, strict=False)
    ]


@pytest.fixture
def a_run(tmp_path):
    """a_run("one", rows=[…], accuracy=0.9, …): that run directory. None leaves a file out."""

    def write(
        name="run", rows=(), accuracy=0.9, lengths=(0.9, 0.9, 0.9), findings=(), config=None, held_out=None, **files
    ):
        run = tmp_path / name
        run.mkdir(parents=True)
        changed = OmegaConf.merge(CONFIG, config or {}, {"output_dir": str(run)})
        (run / "config.yaml").write_text(OmegaConf.to_yaml(changed), encoding="utf-8")
        last = next((row for row in reversed(rows) if "eval_loss" in row), {})
        after = START | {"name": "after dpo", "by_length": buckets(*lengths)}
        after |= {f"logps_{s}_per_token": last.get(f"eval_logps/{s}_per_token", -2.2) for s in ("chosen", "rejected")}
        if accuracy is not None:
            after |= {"reward_accuracy": accuracy, "reward_margin": 2.0}
        summary = {
            "snapshots": [START, after],
            "samples": [{"prompt": "Why?", "before": "Well, who can say.", "after": "Because."}],
            "held_out": last if held_out is None else held_out,
            "perplexity": 9.0,
            "seconds": 75.0,
        }
        written = {
            "manifest.json": {"created": "2026-01-01T00:00:00", "choices": {"loss": "dpo", "model": "tiny"}},
            "summary.json": summary,
            "findings.json": list(findings),
            "data_findings.json": [],
        } | {key.replace("_json", ".json"): value for key, value in files.items()}
        for file, value in written.items():
            if value is not None:
                (run / file).write_text(json.dumps(value), encoding="utf-8")
        if rows:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (run / "metrics.jsonl").write_text(lines, encoding="utf-8")
        return run

    return write
