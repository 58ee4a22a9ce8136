"""Identity: what makes two stages the same stage.

Everything that is hashed goes through `digest` (values) or `digest_files` (content). Both return
lower-case hex sha256. `digest` rejects any value whose bytes could differ between two processes or
two machines.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from ebbline.tasks.errors import DataError, UnstableValue
from ebbline.tasks.files import write_whole


def canonical(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII. Raises UnstableValue for a value
    that JSON does not preserve.
    """
    _check(value, "value")
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def digest(value: object) -> str:
    """sha256 of the canonical JSON of `value`. Raises UnstableValue for sets, paths, NaN, bytes and
    objects.
    """
    return hashlib.sha256(canonical(value).encode("ascii")).hexdigest()


def _check(value: object, where: str) -> None:
    # Exact types: an enum is also a str, a bool is also an int and a numpy float is also a float,
    # but their JSON differs.
    if value is None or type(value) in (bool, int, str):
        return
    if type(value) is float:
        if not math.isfinite(value):
            raise UnstableValue(
                f"{where} is {value}; only finite numbers can be hashed. Leave the field "
                "out, or use null."
            )
        return
    if type(value) in (list, tuple):
        # mypy does not narrow by the exact type above.
        for index, item in enumerate(value):  # type: ignore[arg-type, var-annotated]
            _check(item, f"{where}[{index}]")
        return
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise UnstableValue(
                    f"{where} has the key {key!r} ({type(key).__name__}); keys must be text."
                )
            _check(item, f"{where}.{key}")
        return
    raise UnstableValue(
        f"{where} is a {type(value).__name__}, which has no stable hash.  "
        "Pass text, numbers, lists or dicts."
    )


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def folder_files(folder: Path) -> dict[str, str]:
    """Relative POSIX path -> sha256 for every file below a folder, sorted by path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): file_digest(p) for p in paths}


def digest_files(files: Mapping[str, str]) -> str:
    """The content digest of a folder, from its files' digests. A folder and its copy elsewhere have
    the same digest.
    """
    return digest(dict(files))


def part_digest(files: Mapping[str, str], part: str) -> str:
    """The content digest of one file or sub-folder of a folder that is given by its files' digests.
    Raises DataError if the folder has no such part.
    """
    if part in files:
        return files[part]
    below = {
        name.removeprefix(part + "/"): sha
        for name, sha in files.items()
        if name.startswith(part + "/")
    }
    if not below:
        raise DataError(f"no file or folder {part!r} among {sorted(files)[:8]}")
    return digest_files(below)


def content_digest(path: Path, cache: Path | None = None) -> str:
    """The content digest of a local file or folder.

    `cache` (a JSON file) keeps the digest of each file by its path, size and modification time, so
    a 140 GB checkpoint is hashed once. Raises DataError if nothing is there or the folder is empty.
    """
    if not path.exists():
        raise DataError(f"there is no file or folder at {path}")
    cached: dict[str, str] = (
        json.loads(cache.read_text()) if cache is not None and cache.exists() else {}
    )
    digests = dict(cached)

    def sha(file: Path) -> str:
        stat = file.stat()
        stamp = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if stamp not in digests:
            digests[stamp] = file_digest(file)
        return digests[stamp]

    if path.is_file():
        result = sha(path)
    else:
        files = {
            p.relative_to(path).as_posix(): sha(p) for p in sorted(path.rglob("*")) if p.is_file()
        }
        if not files:
            raise DataError(f"the folder {path} is empty")
        result = digest_files(files)
    if cache is not None and digests != cached:
        write_whole(cache, lambda fresh: fresh.write_text(json.dumps(digests)))
    return result
