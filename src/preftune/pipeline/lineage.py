"""Lineage: what a stage of a pipeline was made from, so that it is kept just as long as it would come out the same."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash
from omegaconf import DictConfig, OmegaConf

from preftune.config.files import write_json
from preftune.config.keys import leaves
from preftune.config.schema import named_files
from preftune.data.sources import Source, files
from preftune.models.load import location
from preftune.runs import checkpoints

FILE = "lineage.json"
# Sections and keys that do not change what a stage learns
NO_INPUTS = ("output_dir", "resume", "tracking", "health", "gate", "samples", "sample_steps", "pipeline", "fit_check")
SAID_AND_KEPT = ("logging_steps", "save_strategy", "save_steps", "save_total_limit", "eval_strategy", "eval_steps")
STILL_COUNTS = "health.early_stopping"
OF_THE_PLACE = ("data.skipped_file", "model.path", "fastpath.reference_cache", "fastpath.reference_cache_gb")


@dataclass(frozen=True)
class Artifact:
    """A model that a stage starts from or leaves: its folder, adapter or id, and the hash of its weights."""

    path: str
    digest: str


def artifact(path: str | Path) -> Artifact:
    """The model in a folder, by the hashes of its weights; elsewhere (a hub id, embedded://…) by its name."""
    folder = Path(location(OmegaConf.create({"path": str(path)})))
    if not folder.is_dir():
        return Artifact(str(path), str(path))
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return Artifact(str(path), together(f"{file.name} {checkpoints.digest(file)}" for file in weights))


def together(parts: Iterable[str]) -> str:
    """One hash of several strings."""
    return xxhash.xxh3_128_hexdigest("".join(f"{part}\0" for part in parts).encode())


def inputs(cfg: DictConfig, parent: Artifact) -> dict[str, object]:
    """What a training stage depends on: the weights it starts from, its data files, and every setting that counts."""
    config = OmegaConf.to_container(cfg, resolve=True)
    settings = {key: value for key, value in leaves(config) if counts(key)}
    data = {f"the content of {path}": content(path) for key, path in named_files(config) if not key.startswith("model")}
    return {"parent": parent.digest, **data, **settings}


def counts(key: str) -> bool:
    """Whether a key changes what a stage learns, and not only where it is done and what is said of it."""
    section, _, name = key.partition(".")
    told = section in NO_INPUTS or key in OF_THE_PLACE or (section == "train" and name in SAID_AND_KEPT)
    return key == STILL_COUNTS or not told


def content(path: str) -> str:
    """The hash of a local file or of all data files of a folder or glob; a hub id is its own."""
    if not Source(path).is_local():
        return path
    return together(f"{name} {checkpoints.digest(file)}" for file, name in files(path))


def stage_status(folder: Path, made_of: dict[str, object]) -> tuple[str, list[str]]:
    """(state, what changed) of a stage's folder: new, unfinished, kept (finished, of the same inputs) or outdated."""
    try:
        before = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return ("outdated" if (folder / "manifest.json").exists() else "new"), ["its lineage"]
    now = json.loads(json.dumps(made_of))
    changed = sorted(key for key in before["inputs"] | now if before["inputs"].get(key) != now.get(key))
    if changed:
        return "outdated", changed
    return ("kept" if before["finished"] else "unfinished"), []


def record(folder: Path, made_of: dict[str, object], output: Artifact | None = None) -> None:
    """Write <folder>/lineage.json: what the stage is made of, and once it is finished, the hash of what it left."""
    known = {"finished": output is not None, "output": output and output.digest, "inputs": made_of}
    write_json(folder / FILE, known)


def set_aside(folder: Path) -> Path:
    """Move an outdated stage out of the way; nothing is deleted. Returns its new place."""
    aside = folder.with_name(f"{folder.name}-replaced-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.rename(aside)
    return aside
