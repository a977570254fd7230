"""README.md of an exported model: what it was trained on, how, with what result, and from what."""

import json
import re
from pathlib import Path

from huggingface_hub import ModelCardData
from omegaconf import OmegaConf

from preftune.evaluate.subjects import CONFIG, MANIFEST, Subject, stages
from preftune.report import terminal
from preftune.report.rendering import render

SECRETS = [  # what may stand in a URL or an option that the user typed, and in no card
    (re.compile(r"//[^/@\s]+@"), "//"),
    (re.compile(r"\?[^\s|)`]*"), ""),
    (re.compile(r"\b(hf_|sk-|ghp_|github_pat_)\w[\w-]{6,}"), "***"),
]


def text(subject: Subject, name: str, base: str, check: list[str]) -> str:
    """The card in Markdown, with the hub's front matter and what `check` found."""
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", subject.start.path) and not Path(subject.start.path).exists()
    kind = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["preftune", "trl"]}
    front = ModelCardData(base_model=subject.start.path if on_hub else None, **kind)
    quantized = "quantization" in subject.lora
    onto = "the quantized weights that it was trained over, dequantized" if quantized else "its base"
    if quantized and base == "original":
        onto = "the full-precision weights, although it was trained over quantized ones"
    run = of_run(subject) if subject.run else None
    values = {"name": name, "subject": subject, "run": run, "onto": onto, "check": check}
    return redacted(render("card.md.jinja", card_data=front.to_yaml(), **values))


def redacted(card: str) -> str:
    """The card without passwords, queries and tokens of URLs."""
    for pattern, instead in SECRETS:
        card = pattern.sub(instead, card)
    return card


def of_run(subject: Subject) -> dict:
    """The files of the run that trained the model, and the manifests of the stages behind it, oldest first."""
    snapshots = read(subject.run / "summary.json").get("snapshots") or []
    pipeline = stages(subject.run.parent) if (subject.run.parent / CONFIG).exists() else []
    upto = pipeline[: pipeline.index(subject.run) + 1] if subject.run in pipeline else [subject.run]
    return {
        "cfg": OmegaConf.to_container(subject.cfg),
        "manifest": read(subject.run / MANIFEST),
        "snapshots": snapshots,
        "rows": terminal.rows(snapshots),
        "lineage": [read(stage / MANIFEST) for stage in upto],
    }


def read(path: Path) -> dict:
    """A JSON file of the run; empty where it has none, as an unfinished run has no summary."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
