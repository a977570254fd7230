"""README.md of an exported model: what it was trained on, how, with what result, and from what."""

import json
import re
from pathlib import Path

from omegaconf import OmegaConf

from preftune.evaluate.subjects import CONFIG, MANIFEST, Subject, stages
from preftune.report.terminal import ROWS

SECRETS = [  # what may stand in a URL or an option that the user typed, and in no card
    (re.compile(r"//[^/@\s]+@"), "//"),
    (re.compile(r"\?[^\s|)`]*"), ""),
    (re.compile(r"\b(hf_|sk-|ghp_|github_pat_)\w[\w-]{6,}"), "***"),
]


def text(subject: Subject, name: str, base: str, difference: float) -> str:
    """The card in Markdown, with the hub's front matter; the licence is left to whoever publishes the model."""
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [preftune, trl]"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", subject.start.path) and not Path(subject.start.path).exists():
        front.insert(0, f"base_model: {subject.start.path}")
    parts = ["---", *front, "---", f"# {name}", ""]
    parts += of_run(subject) if subject.run else [f"A copy of `{subject.name}`; nothing is known of a run behind it."]
    if subject.adapter:
        parts += ["", *how_merged(subject, base, difference)]
    parts += ["", "## Licence", ""]
    parts += ["Not stated: it follows from the licences of the model that this one started from and of the data.", ""]
    return redacted("\n".join(parts))


def redacted(card: str) -> str:
    """The card without passwords, queries and tokens of URLs."""
    for pattern, instead in SECRETS:
        card = pattern.sub(instead, card)
    return card


def of_run(subject: Subject) -> list[str]:
    """Training, data, results, lineage and versions, from the files of the run."""
    cfg = OmegaConf.to_container(subject.cfg)
    manifest, summary = read(subject.run / "manifest.json"), read(subject.run / "summary.json")
    loss, train, lora = cfg["loss"], cfg["train"], cfg["lora"]
    settings = {
        "trainer": loss["trainer"],
        "loss": manifest.get("choices", {}).get("loss") or loss.get("loss_type"),
        "β": loss.get("beta"),
        "learning rate": train["learning_rate"],
        "steps" if train["max_steps"] > 0 else "epochs": max(train["max_steps"], train["num_train_epochs"]),
        "longest row": f"{train['max_length']} tokens",
        "seed": train["seed"],
        "adapter": f"LoRA, r={lora['r']}, alpha={lora['lora_alpha']}" if lora else "none: all weights were trained",
    }
    if "quantization" in lora:
        settings["trained over"] = "4-bit weights" if lora["quantization"].get("load_in_4bit") else "8-bit weights"
    data = manifest.get("data", {})
    return [
        f"Trained by preftune with `{loss['trainer']}`.",
        "",
        "## Training",
        "",
        *listed(settings),
        "",
        "## Data",
        "",
        *listed({"path": data.get("path", cfg["data"]["path"]), "fingerprint": data.get("fingerprint")}),
        "",
        *results(summary),
        "## Lineage",
        "",
        *lineage(subject),
        "",
        "## Versions",
        "",
        *listed({**manifest.get("versions", {}), "commit": manifest.get("git_commit")}),
    ]


def results(summary: dict) -> list[str]:
    """The looks at held-out pairs as a table; nothing where the data had none."""
    looks = summary.get("looks") or []
    if not looks:
        return []
    lines = ["## Results on held-out pairs", "", f"| | {' | '.join(look['name'] for look in looks)} |"]
    lines.append("|---|" + "---:|" * len(looks))
    for key, (label, form) in ROWS.items():
        if any(key in look for look in looks):
            cells = [format(look[key], form) if key in look else "–" for look in looks]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def lineage(subject: Subject) -> list[str]:
    """The stages behind the model, oldest first: what each started from, by path and hash of its weights."""
    pipeline = stages(subject.run.parent) if (subject.run.parent / CONFIG).exists() else []
    upto = pipeline[: pipeline.index(subject.run) + 1] if subject.run in pipeline else [subject.run]
    return [
        f"{place}. {each.get('choices', {}).get('loss', 'training')}, {each.get('created', 'undated')}: from "
        f"`{each.get('model', {}).get('path')}` (weights {each.get('model', {}).get('weights')}); reference: "
        f"{each.get('reference')}"
        for place, each in enumerate((read(stage / MANIFEST) for stage in upto), start=1)
    ]


def how_merged(subject: Subject, base: str, difference: float) -> list[str]:
    """Which weights the adapter was added to, and how far the result is from the adapter itself."""
    quantized = "quantization" in subject.lora
    onto = "the quantized weights that it was trained over, dequantized" if quantized else "its base"
    if quantized and base == "original":
        onto = "the full-precision weights, although it was trained over quantized ones"
    return [
        "## Merge",
        "",
        f"The adapter was added to {onto}. Log-probs of a short dialogue differ from the adapter's own by "
        f"{difference:.1e} nats at most.",
    ]


def listed(values: dict) -> list[str]:
    """One line a value; what is not known is left out."""
    return [f"- {name}: {value}" for name, value in values.items() if value is not None]


def read(path: Path) -> dict:
    """A JSON file of the run; empty where it has none, as an unfinished run has no summary."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
