"""The keys that are preftune's own (model, data, tracking and the top), the files that they name, the machine."""

import ast
import difflib
import functools
import glob
import importlib.util
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from preftune.config import hardware
from preftune.config.keys import leaves
from preftune.config.problems import Problem, closest
from preftune.config.ranges import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, Range
from preftune.config.stages import RESERVED, node
from preftune.config.values import Wants, complaint, wants

# What the keys of base.yaml want whose default does not tell
KINDS = {
    "model.path": "str",
    "model.adapter": "Literal['merge', 'continue']",
    "model.reference": "str | None",
    "model.revision": "str | None",
    "model.dtype": "Literal['float32', 'bfloat16', 'float16']",
    "model.chat_template": "str | None",
    "model.attn_implementation": "str | None",
    "model.eos_token": "str | None",
    "model.pad_token": "str | None",
    "data.path": "str | list",
    "data.name": "str | None",
    "data.revision": "str | None",
    "data.eval_split": "str | None",
    "data.pairs_rule": "Literal['best_worst', 'best_random', 'best_rest', 'neighbours', 'all']",
    "data.verdict": "str | None",
    "data.good_at": "float | None",
    "data.max_rows": "int | None",
    "data.on_bad_rows": "Literal['fail', 'skip']",
    "data.token_rows": "int | None",
    "data.sft_path": "str | list | None",
    "global_batch": "int | None",
    "flop_budget": "float | None",
    "nproc": "int | None",
    "gate.on_fail": "Literal['stop', 'warn']",
    "health.action": "Literal['warn', 'stop', 'rollback']",
    "health.early_stopping": "int | None",
    "sample_steps": "int | None",
    "tracking.report_to": "Literal['wandb', 'trackio', 'none']",
    "tracking.group": "str | None",
    "tracking.run_name": "str | None",
    "fastpath.form": "Literal['packed', 'forked', 'rows', 'off'] | None",
    "fastpath.tokens_per_batch": "int | None",
    "fastpath.reference_cache": "str | None",
}
RANGES = {
    "data.eval_fraction": Range(least=0, below=1),
    "data.sft_fraction": Range(least=0, below=1),
    "data.max_rows": AT_LEAST_1,
    "data.token_rows": AT_LEAST_1,
    "samples": NOT_NEGATIVE,
    "global_batch": AT_LEAST_1,
    "flop_budget": POSITIVE,
    "nproc": AT_LEAST_1,
    "data.assumed.rows": AT_LEAST_1,
    "data.assumed.prompt_tokens": AT_LEAST_1,
    "data.assumed.answer_tokens": AT_LEAST_1,
    "sample_steps": AT_LEAST_1,
    "gate.max_perplexity": Range(least=1),
    "fastpath.bucket_batches": AT_LEAST_1,
    "fastpath.tokens_per_batch": AT_LEAST_1,
    "fastpath.reference_batch_tokens": AT_LEAST_1,
}
EXTRAS = {"parallel": "sweeps", "submitit_local": "cluster", "submitit_slurm": "cluster"}  # by launcher
FILES = (".jsonl", ".json", ".parquet", ".csv", ".jinja", ".gz", ".bz2", ".xz", ".zst")


@functools.cache
def base() -> dict[str, object]:
    """Every key of conf/base.yaml, and the thresholds of conf/health, with its default, by its dotted path."""
    conf = resources.files("preftune.conf")
    loaded = OmegaConf.load(conf / "base.yaml")
    loaded.health = OmegaConf.load(conf / "health" / "default.yaml")
    return dict(leaves(OmegaConf.to_container(loaded, resolve=False)))


def own_key_problems(config: dict) -> Iterator[Problem]:
    """Keys, types and numbers of preftune's own sections, against base.yaml."""
    defaults = base()
    owned = {path.split(".")[0] for path in defaults if "." in path} - {"hydra", *RESERVED}
    for path, value in leaves(config):
        section = path.split(".")[0]
        if section in (*RESERVED, "hydra") or any(path.startswith(f"{mapping}.") for mapping in mappings()):
            continue
        if path not in defaults:
            if section in owned:
                near = closest(path, [each for each in defaults if each.startswith(f"{section}.")])
                yield Problem(path, f"no such key{f'; did you mean {near}?' if near else ''}")
        elif fault := complaint(wanted(path), path, value, None if path in KINDS else defaults[path]):
            yield fault
        elif phrase := RANGES.get(path, Range()).complaint(value):
            yield Problem(path, phrase)


def mappings() -> list[str]:
    """The keys of base.yaml that hold whatever the user writes, such as data.columns."""
    return [path for path, default in base().items() if isinstance(default, dict)]


def wanted(path: str) -> Wants:
    """What one of preftune's own keys wants: as KINDS says, or a value of its default's type."""
    if path in KINDS:
        return wants(ast.parse(KINDS[path], mode="eval").body, lambda name: None)
    return Wants(frozenset({type(base()[path]).__name__}))


def missing_files(config: dict) -> Iterator[Problem]:
    """Local files that do not exist. What looks like a hub id is left to the hub."""
    for key, value in named_files(config):
        path = Path(value).expanduser()
        local = value.startswith(("/", "./", "../", "~")) or path.suffix in FILES
        if "://" in value or not local or path.exists() or glob.glob(str(path), recursive=True):
            continue
        if not path.parent.is_dir() and not glob.has_magic(value):
            yield Problem(key, f"there is no folder {path.parent} (from {Path.cwd()})")
            continue
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1) if path.parent.is_dir() else []
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        yield Problem(key, f"there is no {path.name} in {path.parent.resolve()}{hint}")


def unwritable_places(config: dict) -> Iterator[Problem]:
    """Folders to write into that cannot be made, or not be written to."""
    for key in ("output_dir", "fastpath.reference_cache"):
        section, _, name = key.rpartition(".")
        value = (node(config, section) if section else config).get(name)
        if not isinstance(value, str) or "${" in value:
            continue
        place = Path(value).expanduser().absolute()
        there = next(each for each in (place, *place.parents) if os.path.lexists(each))
        if not there.is_dir():
            what = "is a link to nowhere" if there.is_symlink() and not there.exists() else "is a file"
            yield Problem(key, f"{there} {what}; name a folder")
        elif not os.access(there, os.W_OK):
            yield Problem(key, f"{there} cannot be written to; name another folder")


def named_files(config: dict) -> Iterator[tuple[str, str]]:
    """What may be a file: a path, a list of paths, or a list of {path: …} with weights."""
    for key in ("model.path", "model.chat_template", "data.path", "data.sft_path", "data.eval_split"):
        section, _, name = key.partition(".")
        given = node(config, section).get(name)
        yield from paths_of(key, given)
    for name, given in node(config, "data.eval_sets").items():
        yield from paths_of(f"data.eval_sets.{name}", given)


def paths_of(key: str, given: object) -> Iterator[tuple[str, str]]:
    """The paths in what a key may hold, each with the key."""
    for source in given if isinstance(given, list) else [given]:
        source = source.get("path") if isinstance(source, dict) else source
        if isinstance(source, str):
            yield key, source


def lacking_here(config: dict) -> Iterator[Problem]:
    """What this machine lacks for a run on it: an accelerator, bfloat16 on it, an optional package."""
    settings = node(config, "hardware")
    card = hardware.accelerator()
    if settings.get("use_cpu") is False and card is None:
        yield Problem("hardware.use_cpu", "false needs a GPU, and none is here; write hardware=auto or hardware=cpu")
    if card and not card.bf16 and settings.get("bf16") and not settings.get("use_cpu"):
        yield Problem("hardware.bf16", f"{card.name} has no bfloat16; write hardware.bf16=false hardware.fp16=true")
    tracker = node(config, "tracking").get("report_to")
    if tracker == "trackio" and importlib.util.find_spec("trackio") is None:
        yield Problem("tracking.report_to", "trackio is not installed: pip install 'preftune[trackio]'")


def missing_plugins(whole: DictConfig) -> Iterator[Problem]:
    """A launcher or sweeper of Hydra's that was chosen, and whose package is not installed."""
    for kind, extra in (("launcher", EXTRAS), ("sweeper", {"search": "optuna"})):
        module = whole.hydra[kind]._target_.rpartition(".")[0]
        choice = whole.hydra.runtime.choices[f"hydra/{kind}"]
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            text = f"{module} is not installed: pip install 'preftune[{extra.get(choice, choice)}]'"
            yield Problem(f"hydra/{kind}={choice}", text)
