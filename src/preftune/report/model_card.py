"""README.md of an exported model: what it was trained on, how, with what result, and from what."""

import json
import re
from pathlib import Path

from huggingface_hub import ModelCardData
from omegaconf import OmegaConf

from preftune.evaluate.subjects import CONFIG, MANIFEST, Subject, stages
from preftune.report import terminal
from preftune.report.page import TEMPLATES

SECRETS = [  # what may stand in a URL or an option that the user typed, and in no card
    (re.compile(r"//[^/@\s]+@"), "//"),
    (re.compile(r"\?[^\s|)`]*"), ""),
    (re.compile(r"\b(hf_|sk-|ghp_|github_pat_)\w[\w-]{6,}"), "***"),
]


def text(subject: Subject, name: str, base: str, difference: float) -> str:
    """The card in Markdown, with the hub's front matter; the licence is left to whoever publishes the model."""
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", subject.start.path) and not Path(subject.start.path).exists()
    front = ModelCardData(
        base_model=subject.start.path if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["preftune", "trl"],
    )
    quantized = "quantization" in subject.lora
    onto = "the quantized weights that it was trained over, dequantized" if quantized else "its base"
    if quantized and base == "original":
        onto = "the full-precision weights, although it was trained over quantized ones"
    card = (
        TEMPLATES.overlay(autoescape=False)
        .get_template("card.md.jinja")
        .render(  # Markdown, not HTML
            card_data=front.to_yaml(),
            name=name,
            subject=subject,
            run=of_run(subject) if subject.run else None,
            onto=onto,
            difference=f"{difference:.1e}",
        )
    )
    return redacted(card)


def redacted(card: str) -> str:
    """The card without passwords, queries and tokens of URLs."""
    for pattern, instead in SECRETS:
        card = pattern.sub(instead, card)
    return card


def of_run(subject: Subject) -> dict:
    """Training, data, results, lineage and versions, from the files of the run."""
    cfg = OmegaConf.to_container(subject.cfg)
    manifest, looks = read(subject.run / MANIFEST), read(subject.run / "summary.json").get("looks") or []
    data = manifest.get("data", {})
    return {
        "settings": settings(cfg, manifest),
        "data": {"path": data.get("path", cfg["data"]["path"]), "fingerprint": data.get("fingerprint")},
        "looks": looks,
        "rows": terminal.rows(looks),
        "lineage": lineage(subject),
        "versions": {**manifest.get("versions", {}), "commit": manifest.get("git_commit")},
    }


def settings(cfg: dict, manifest: dict) -> dict:
    """What the run was trained with; None where it has no such setting."""
    loss, train, lora = cfg["loss"], cfg["train"], cfg["lora"]
    bits = "4-bit weights" if lora.get("quantization", {}).get("load_in_4bit") else "8-bit weights"
    return {
        "trainer": loss["trainer"],
        "loss": manifest.get("choices", {}).get("loss") or loss.get("loss_type"),
        "β": loss.get("beta"),
        "learning rate": train["learning_rate"],
        "steps" if train["max_steps"] > 0 else "epochs": max(train["max_steps"], train["num_train_epochs"]),
        "longest row": f"{train['max_length']} tokens",
        "seed": train["seed"],
        "adapter": f"LoRA, r={lora['r']}, alpha={lora['lora_alpha']}" if lora else "none: all weights were trained",
        "trained over": bits if "quantization" in lora else None,
    }


def lineage(subject: Subject) -> list[dict]:
    """The stages behind the model, oldest first: what each started from, by path and hash of its weights."""
    pipeline = stages(subject.run.parent) if (subject.run.parent / CONFIG).exists() else []
    upto = pipeline[: pipeline.index(subject.run) + 1] if subject.run in pipeline else [subject.run]
    return [
        {
            "loss": each.get("choices", {}).get("loss", "training"),
            "created": each.get("created", "undated"),
            "path": each.get("model", {}).get("path"),
            "weights": each.get("model", {}).get("weights"),
            "reference": each.get("reference"),
        }
        for each in (read(stage / MANIFEST) for stage in upto)
    ]


def read(path: Path) -> dict:
    """A JSON file of the run; empty where it has none, as an unfinished run has no summary."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
