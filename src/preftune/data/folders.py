"""Folders of data files: the splits that they hold, as the hub's README, save_to_disk or the files' names give them."""

import difflib
import json
from pathlib import Path

from datasets.data_files import FILES_TO_IGNORE, DataFilesDict, EmptyDatasetError, get_data_patterns, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard

from preftune.data.findings import DataError
from preftune.data.formats import READERS, ending

TRAIN = "train"


def splits(folder: Path, name: str | None = None) -> dict[str, list[Path]]:
    """The data files of each split of a folder; `name` is a configuration of its README.

    Where nothing names splits all files are `train`, as are those beside a split that is not to be trained on.
    """
    if (told := folder / "dataset_dict.json").exists():  # written by DatasetDict.save_to_disk
        return {split: saved(folder / split) for split in json.loads(told.read_text())["splits"]}
    if (folder / "state.json").exists():
        return {TRAIN: saved(folder)}
    every = [file for file in sorted(folder.rglob("*")) if file.is_file() and ending(file) in READERS]
    every = [file for file in every if file.name not in FILES_TO_IGNORE]
    patterns = by_readme(folder, name)
    if patterns is None:
        try:
            patterns = get_data_patterns(str(folder))
        except (EmptyDatasetError, FileNotFoundError):
            return {}
    named = DataFilesDict.from_patterns(patterns, base_path=str(folder))
    found = {str(split): [file for file in every if str(file) in set(map(str, each))] for split, each in named.items()}
    found = {split: listed for split, listed in found.items() if listed}
    rest = [file for file in every if file not in sum(found.values(), [])]
    if rest and not any(split.startswith(TRAIN) for split in found):
        found[TRAIN] = rest
    return found


def saved(folder: Path) -> list[Path]:
    """The Arrow files of a data set that save_to_disk wrote."""
    told = json.loads((folder / "state.json").read_text())
    return [folder / each["filename"] for each in told["_data_files"]]


def by_readme(folder: Path, name: str | None) -> dict | None:
    """The patterns of files that a README's `configs` give for each split; None without them. Raises DataError."""
    card = folder / "README.md"
    configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data) if card.exists() else {}
    if not configs:
        return None
    chosen = name or configs.get_default_config_name() or ("default" if "default" in configs else None)
    if chosen not in configs:
        raise DataError(f"data.path={folder} has the configurations {', '.join(configs)}: data.name=NAME chooses one")
    files = configs[chosen].get("data_files")
    return sanitize_patterns(files) if files else None


def of_split(folder: Path, split: str, name: str | None) -> tuple[str, list[Path]]:
    """A split of a folder and its files: the one of that name, or the only one whose name begins with it.

    Raises DataError, with the splits that there are.
    """
    found = splits(folder, name)
    near = [split] if split in found else [each for each in found if each.startswith(split)]
    if len(near) != 1 and found:
        hint = next(iter(near or difflib.get_close_matches(split, found, n=1) or found))
        there = f"data.path={folder} has the splits {', '.join(found)}, and not {split}"
        raise DataError(f"{there}: data.train_split={hint} (or data.eval_split) chooses one")
    return (near[0], found[near[0]]) if near else (split, [])
