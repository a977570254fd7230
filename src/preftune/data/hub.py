"""Rows of data sets on the Hugging Face hub, or of its local cache."""

from collections.abc import Iterator

import datasets
from datasets.exceptions import DatasetNotFoundError

from preftune.data.findings import DataError
from preftune.data.formats import Read


def rows(path: str, name: str | None, revision: str | None, split: str | None, streaming: bool) -> Iterator[Read]:
    """The rows of a split, its place in the split as their line: `owner/name/train:12`.

    Raises DataError where the hub does not give the data set, or where it has no such configuration or split.
    """
    try:
        found = datasets.load_dataset(path, name, revision=revision, split=split, streaming=streaming)
    except (OSError, DatasetNotFoundError) as error:
        raise DataError(
            f"data.path={path}: not a file or folder here, not in the local hub cache, and the hub does not give it "
            f"({type(error).__name__}). Where there is a network: `hf download --repo-type dataset {path} --local-dir "
            "FOLDER`, then data=file data.path=FOLDER"
        ) from None
    except ValueError as error:  # no such configuration or split: datasets lists those that there are
        raise DataError(f"data.path={path}, data.name={name}, data.train_split={split}: {error}") from None
    for number, row in enumerate(found, start=1):
        yield Read(f"{path}/{split}:{number}", row)
