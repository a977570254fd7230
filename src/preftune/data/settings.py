"""The `data` section of a config as sources and choices, checked."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from omegaconf import DictConfig, OmegaConf

from preftune.data.findings import DataError
from preftune.data.shapes import COLUMNS, PAIRS_RULES
from preftune.data.sources import Source
from preftune.data.views import UNPAIRED

OF_A_SOURCE = [each.name for each in fields(Source)]


@dataclass(frozen=True)
class Settings:
    """What one run wants of its data."""

    sources: list[Source]
    eval_sources: list[Source]
    sft_sources: list[Source]
    eval_fraction: float
    skipping: bool
    skipped_file: str | None
    streaming: bool
    token_rows: int | None
    sft_fraction: float


def read(data: DictConfig, view: str) -> Settings:
    """The settings of a `data` section. Raises DataError for values that mean nothing, or not for this view."""
    given = {key: data[key] for key in data if key != "skipped_file"}
    given = OmegaConf.to_container(OmegaConf.create(given), resolve=True)
    one_of("data.pairs_rule", given["pairs_rule"], PAIRS_RULES)
    one_of("data.on_bad_rows", given["on_bad_rows"], ("fail", "skip"))
    for name in given["columns"]:
        one_of("data.columns", name, COLUMNS)
    if not 0 <= given["eval_fraction"] < 1:
        raise DataError(f"data.eval_fraction={given['eval_fraction']}: must be at least 0 and below 1")
    sources = sources_of(given["path"], given)
    if given["sft_fraction"]:
        demonstrations_fit(given, view)
    skipping = given["on_bad_rows"] == "skip"
    return Settings(
        sources=sources,
        eval_sources=eval_sources(sources, given["eval_split"]) if given["eval_split"] else [],
        sft_sources=sources_of(given["sft_path"], given | {"columns": {}}) if given["sft_fraction"] else [],
        eval_fraction=given["eval_fraction"],
        skipping=skipping,
        skipped_file=data.skipped_file if skipping else None,
        streaming=given["streaming"],
        token_rows=given["token_rows"],
        sft_fraction=given["sft_fraction"],
    )


def one_of(key: str, value: str | None, choices: Iterable) -> None:
    """Raise DataError where a value is none of the choices."""
    if value not in choices:
        words = ["null" if choice is None else choice for choice in choices]
        near = difflib.get_close_matches(str(value), words, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"{key}: {value} is none of {', '.join(words)}{hint}")


def sources_of(path: str | list, given: dict) -> list[Source]:
    """The sources that a path, or a list of paths and mappings, names; what a mapping leaves out comes from `data`."""
    base = Source(
        path="",
        name=given["name"],
        revision=given["revision"],
        split=given["train_split"],
        columns=given["columns"],
        pairs_rule=given["pairs_rule"],
        max_rows=given["max_rows"],
    )
    sources = []
    for each in path if isinstance(path, list) else [path]:
        named = each if isinstance(each, dict) else {"path": each}
        for name in named:
            one_of("data.path", name, OF_A_SOURCE)
        if "path" not in named:
            raise DataError(f"data.path: a source without a path: {named}")
        sources.append(replace(base, **named))
    return sources


def eval_sources(sources: list[Source], split: str) -> list[Source]:
    """Where held-out rows are: in a file of their own, or in another split of each hub data set.

    Raises DataError where a split is named, and the data lies in files.
    """
    alone = replace(sources[0], path=split, weight=None)
    if alone.is_local() or all(source.is_local() for source in sources) and "/" in split:
        return [alone]
    local = [source.path for source in sources if source.is_local()]
    if local:
        raise DataError(
            f"data.eval_split={split}: {local[0]} is no hub data set and has no splits; name a file of held-out rows: "
            "data.eval_split=eval.jsonl"
        )
    return [replace(source, split=split, weight=None) for source in sources]


def demonstrations_fit(given: dict, view: str) -> None:
    """Raise DataError where demonstrations cannot be mixed into this training."""
    if not given["sft_path"]:
        raise DataError(
            "data.sft_fraction needs demonstrations to mix in: data.sft_path=FILE (messages, or prompt + completion)"
        )
    if view == UNPAIRED:
        raise DataError(
            "data.sft_fraction: this loss learns from labelled answers and has no SFT term. Give demonstrations the "
            "label true in the data itself, or take a loss of pairs with an SFT term: loss=dpo_sft, loss=orpo"
        )
    if given["streaming"]:
        raise DataError("data.sft_fraction mixes whole sets; write data.streaming=false")
