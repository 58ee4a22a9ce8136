"""Names that come from data, and the paths that they may become: below their folder, or an error.

Tensor names, index entries, records and links are text that somebody else may have written. Each
becomes a path by `inside` or `files_below`, or not at all.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ebbline.tasks.errors import DataError, ModelError

# What each JSON file of a model folder may name: other files that transformers opens by that name.
_NAMES_FILES = {
    "config.json": "transformers_weights",
    "tokenizer_config.json": "fast_tokenizer_files",
}
INDEX = ".index.json"
HUB = "hub:"  # begins the location of an input that is a snapshot of the hub


def is_inside(name: object) -> bool:
    """Whether a name is a relative path that stays below its folder, on any file system."""
    return (
        isinstance(name, str)
        and name != ""
        and not any(ord(letter) < 32 or letter == "\\" for letter in name)
        and not PurePosixPath(name).is_absolute()
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def inside(folder: Path, name: str, named_by: Path) -> Path:
    """The path of a name below `folder`. Raises ModelError if the name leaves the folder;
    `named_by` is the file that holds it.
    """
    if not is_inside(name):
        raise ModelError(
            f"{named_by} names the file {name!r}, which is not a plain name inside its folder. "
            "Put the file into the folder, and write its name without a path"
        )
    return folder / name


def files_below(folder: Path) -> dict[str, Path]:
    """Relative POSIX name -> path of every file below a folder, sorted by name; files in linked
    folders too.

    Raises DataError for a link that leaves the folder or leads nowhere. A snapshot in the hub's
    cache may link to the blobs of its own repository.
    """
    root = folder.resolve()
    blobs = [above.parent / "blobs" for above in root.parents if above.name == "snapshots"]
    found: dict[str, Path] = {}
    for name, path in _walk(root, "", (root,)):
        if path.is_symlink() and not path.is_dir():
            _require_inside(path, (root, *blobs))
        if path.is_file():
            found[name] = folder / name
    return dict(sorted(found.items(), key=lambda item: PurePosixPath(item[0])))


def _walk(folder: Path, prefix: str, above: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    with os.scandir(folder) as entries:
        listed = list(entries)
    for entry in listed:
        name, path = f"{prefix}{entry.name}", Path(entry.path)
        if not entry.is_dir():
            yield name, path
            continue
        real = path.resolve() if entry.is_symlink() else path
        if entry.is_symlink():
            _require_inside(path, (above[0],))
            if real in above or any(parent.is_relative_to(real) for parent in above):
                raise DataError(f"{path} is a link to a folder around it; remove the link")
        yield from _walk(path, f"{name}/", (*above, real))


def _require_inside(link: Path, roots: tuple[Path, ...]) -> None:
    target = link.resolve()
    if not any(target.is_relative_to(root) for root in roots):
        raise DataError(
            f"{link} is a link to {target}, outside its folder; put a copy in its place "
            "(`cp --remove-destination`), or a hard link"
        )
    if not target.exists():
        raise DataError(f"{link} is a link to {target}, which does not exist; remove the link")


def check_named_files(folder: Path) -> None:
    """Check that the JSON files of a model folder name no file outside the folder. They name the
    shards of an index, and what transformers opens by a name in a config.

    Raises ModelError with the name.
    """
    for path in sorted(folder.glob("*.json")):
        key = "weight_map" if path.name.endswith(INDEX) else _NAMES_FILES.get(path.name)
        if key is None:
            continue
        for name in _texts(_json_object(path).get(key)):
            inside(folder, name, path)


def _json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when it holds none, which its reader reports."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _texts(value: Any) -> list[str]:
    """The text values of a field that holds a text, a list or a mapping."""
    if isinstance(value, dict):
        return _texts(list(value.values()))
    if isinstance(value, list):
        return list(dict.fromkeys(item for item in value if isinstance(item, str)))
    return [value] if isinstance(value, str) else []
