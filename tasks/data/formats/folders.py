"""Folders with data: one file, or a data set as the hub keeps it.

A folder with one data file at its top is that file. Otherwise its files belong to splits, which the
front matter of README.md names, or the files' own names (`data/train-00000-of-00002.parquet`).
Training data is the split `train`, a prompt set the split `test`, or the only split there is. The
files of a split are one set, in the order of their names.
"""

import fnmatch
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml

from ebbline.tasks.data.data_file import FileRow, ending_of
from ebbline.tasks.data.reader import data_files, read_rows
from ebbline.tasks.errors import DataError
from ebbline.tasks.paths import files_below

Split = Literal["train", "test"]
CARD = "README.md"
LONGEST_CARD = 1_000_000  # characters of README.md that are looked at
# Files that describe a data set and hold none of its rows
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_WORD = re.compile(rf"(?:^|[-._/ ])({'|'.join(_SPLIT_WORDS)})(?=[-._/ ]|$)", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)


def read_set(path: Path, split: Split) -> Iterator[FileRow]:
    """The rows of a file, or of a folder's split. The rows of several files are numbered through.

    Raises DataError for a folder whose split is not certain, with the names to choose from.
    """
    last = 0
    for file in files_of(path, split) if path.is_dir() else [path]:
        above = last
        for row in read_rows(file):
            last = above + row.number
            yield replace(row, number=last)


def files_of(folder: Path, split: Split) -> list[Path]:
    """The files of a folder that make up one set."""
    top = [path for path in data_files(folder) if path.name not in DESCRIPTIONS]
    if len(top) == 1:
        return top
    splits = splits_of(folder)
    if not splits:
        raise DataError(_without_data(folder))
    fitting: list[str] = [name for name in splits if name == split] or [
        name for name in splits if name.startswith(split) or len(splits) == 1
    ]
    if len(fitting) == 1:
        return splits[fitting[0]]
    listed = "; ".join(f"{name}: {_listed(folder, files)}" for name, files in splits.items())
    raise DataError(
        f"{folder} holds {sum(map(len, splits.values()))} data files, and which of them are the "
        f"{'training' if split == 'train' else 'prompt'} set is not certain ({listed}); name one "
        "of them"
    )


def _listed(folder: Path, files: list[Path]) -> str:
    names = [path.relative_to(folder).as_posix() for path in files]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def splits_of(folder: Path) -> dict[str, list[Path]]:
    """Split -> its files. A file whose name has no split is one by itself."""
    files = {
        name: path
        for name, path in files_below(folder).items()
        if ending_of(path)
        and path.name not in DESCRIPTIONS
        and not any(part.startswith(".") for part in name.split("/"))
    }
    described = _described(folder, files)
    if described:
        return described
    groups: dict[tuple[str, str], list[Path]] = {}
    for name, path in files.items():
        found = _WORD.findall(name)
        split = _SPLIT_WORDS[found[-1].lower()] if found else name
        # The shards of a set differ in numbers only; train_sft and train_gen are two sets.
        groups.setdefault((split, re.sub(r"\d+", "", name) if found else ""), []).append(path)
    alone = Counter(split for split, _ in groups)
    return {split if alone[split] == 1 else stem: paths for (split, stem), paths in groups.items()}


def _described(folder: Path, files: Mapping[str, Path]) -> dict[str, list[Path]]:
    """The splits that the front matter of README.md names; empty if it names none."""
    configs = _configs(folder / CARD)
    if len(configs) > 1:
        default = [each for each in configs if each.get("default") is True] or [
            each for each in configs if each.get("config_name") == "default"
        ]
        if len(default) != 1:
            named = [str(each.get("config_name")) for each in configs]
            raise DataError(
                f"{folder / CARD} describes {len(configs)} subsets ({', '.join(named[:12])}); name "
                "a file of one of them"
            )
        configs = default
    splits: dict[str, list[Path]] = {}
    for split, pattern in [pair for each in configs for pair in _patterns(each)]:
        found = [path for name, path in files.items() if fnmatch.fnmatchcase(name, pattern)]
        if found:
            known = splits.setdefault(split, [])
            known += [path for path in found if path not in known]
    return splits


def _configs(card: Path) -> list[Mapping[str, Any]]:
    if not card.is_file():
        return []
    with card.open(encoding="utf-8", errors="replace") as file:
        matter = _FRONT_MATTER.match(file.read(LONGEST_CARD))
    try:
        found = yaml.safe_load(matter[1]) if matter else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return []  # the names of the files still tell the splits
    configs = found.get("configs") if isinstance(found, dict) else None
    return [each for each in configs or [] if isinstance(each, dict)]


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(split, pattern) of a subset: `data_files` is a pattern, a list of patterns, or a list of
    {split, path}.
    """
    entries = config.get("data_files")
    for entry in entries if isinstance(entries, list) else [entries]:
        split, paths = ("train", entry) if isinstance(entry, str) else ("", None)
        if isinstance(entry, dict):
            split, paths = str(entry.get("split", "train")), entry.get("path")
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str):
                yield split, path.removeprefix("./").replace("**/", "*")


def _without_data(folder: Path) -> str:
    if any(folder.rglob("*.arrow")):
        return (
            f"{folder} was written by `save_to_disk` of datasets, whose Arrow files ebbline does "
            "not read; write it with `to_parquet`"
        )
    return f"{folder} holds 0 data files"
