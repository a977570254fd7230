"""Rows of data sets on the Hugging Face hub, or of its local cache."""

from collections.abc import Iterator
from pathlib import Path

import datasets
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

from preftune.data.findings import DataError
from preftune.data.formats import Read
from preftune.models import hub
from preftune.models.hub import cached_commit


def rows(path: str, name: str | None, revision: str | None, split: str | None, streaming: bool) -> Iterator[Read]:
    """The rows of a split, its place in the split as their line: `owner/name/train:12`.

    Raises DataError where the hub does not give the data set, or where it has no such configuration or split.
    """
    hub.require(path, "data.path", revision, "dataset")
    try:
        found = datasets.load_dataset(path, name, revision=revision, split=split, streaming=streaming)
        offline_is_right(found, path, revision)
        for number, row in enumerate(found, start=1):
            yield Read(f"{path}/{split}:{number}", row)
    except ValueError as error:  # no such configuration or split: datasets lists those that there are
        said = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"data.path={path} (configuration {name}, split {split}): {said}. data.name names the configuration, "
            "data.train_split and data.eval_split the splits"
        ) from None
    except Exception as error:
        raise DataError(hub.why(error, path, "data.path", revision, "dataset")) from None


def offline_is_right(found, path: str, revision: str | None) -> None:
    """Raise OfflineModeIsEnabled where datasets took another revision, its latest, than was asked for."""
    if revision and constants.HF_HUB_OFFLINE and getattr(found, "cache_files", None):
        commit = cached_commit(path, revision, "dataset")
        if not any(commit in Path(file["filename"]).parts for file in found.cache_files):
            raise OfflineModeIsEnabled("the local cache holds another revision")
