"""Identity: what makes two stages the same stage.

Everything that is hashed goes through `digest` (values) or `digest_files` (content). Both return
lower-case hex sha256. `digest` rejects any value whose bytes could differ between two processes or
two machines.
"""

import contextlib
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ebbline.tasks.errors import DataError, UnstableValue
from ebbline.tasks.files import cache_folder, write_whole
from ebbline.tasks.paths import check_named_files, files_below

# A file that changed less than this before it was read may change again under the same times.
SETTLED_NS = 2_000_000_000
KEPT_BYTES = 32_000_000
KEPT_FILES = 10_000


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
    """Relative POSIX path -> sha256 for every file below a folder, sorted by path. Raises DataError
    for a link that leaves the folder.
    """
    return {name: file_digest(path) for name, path in files_below(folder).items()}


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


def stamp_of(path: Path) -> str:
    """A text that changes whenever a file is written or replaced. Its change time, unlike its
    modification time, cannot be set back.
    """
    stat = path.stat()
    times = f"{stat.st_mtime_ns}|{stat.st_ctime_ns}"
    return f"{stat.st_dev}|{stat.st_ino}|{stat.st_size}|{times}"


class FileDigests:
    """sha256 of files, each read once while its stamp stays. `known` maps stamps to digests. Files
    that changed in the last `settled_ns` are read each time.

    `kept` returns a JSON file where all processes of a machine keep the digests of files of
    KEPT_BYTES or more.
    """

    def __init__(
        self, known: Mapping[str, str], settled_ns: int, kept: Callable[[], Path] | None = None
    ) -> None:
        self.known, self._settled_ns, self._kept = dict(known), settled_ns, kept
        self._lock = threading.Lock()
        self._noted: dict[Path, str] | None = None

    @contextlib.contextmanager
    def noted(self) -> Iterator[Mapping[Path, str]]:
        """The files that are asked for inside the `with`, each with its stamp."""
        before, self._noted = self._noted, {}
        try:
            yield self._noted
        finally:
            self._noted = before

    def of(
        self,
        path: Path,
        compute: Callable[[Path], str] | None = None,
        began: str | None = None,
    ) -> str:
        """The sha256 of a file. `compute` gives it if it is not known; `began` is the file's stamp
        when the computation began, if that was before this call.
        """
        stamp, stat = stamp_of(path), path.stat()
        if self._noted is not None:
            self._noted[path] = stamp
        kept = self._kept if stat.st_size >= KEPT_BYTES else None
        if stamp not in self.known and kept is not None:
            self.known = {**_cached(kept()), **self.known}
        found = self.known.get(stamp)
        if found is None:
            settled = time.time_ns() - stat.st_ctime_ns > self._settled_ns
            found = (compute or file_digest)(path)
            if settled and stamp_of(path) == (began or stamp):
                self.known[stamp] = found
                if kept is not None:
                    self._keep(kept(), stamp, found)
        return found

    def _keep(self, file: Path, stamp: str, sha: str) -> None:
        with self._lock, contextlib.suppress(OSError):  # it only saves time
            newest = list({**_cached(file), stamp: sha}.items())[-KEPT_FILES:]
            write_whole(file, lambda fresh: fresh.write_text(json.dumps(dict(newest))))


# The files that this process has read.
READ = FileDigests({}, SETTLED_NS, lambda: cache_folder() / "digests.json")


def content_digest(path: Path, cache: Path | None = None) -> str:
    """The content digest of a local file or folder.

    `cache` (a JSON file) keeps the digest of each file by its stamp, so a 140 GB checkpoint is
    hashed once. Raises DataError if nothing is there, the folder is empty or a link leaves it, and
    ModelError if the folder is a model that names a file outside.
    """
    if not path.exists():
        raise DataError(f"there is no file or folder at {path}")
    cached = _cached(cache)
    digests = READ if cache is None else FileDigests(cached, 0)
    # So that a stage on this machine need not hash the file again
    compute = None if cache is None else READ.of
    if path.is_file():
        result = digests.of(path, compute)
    else:
        check_named_files(path)
        files = {name: digests.of(file, compute) for name, file in files_below(path).items()}
        if not files:
            raise DataError(f"the folder {path} is empty")
        result = digest_files(files)
    if cache is not None and digests.known != cached:
        write_whole(cache, lambda fresh: fresh.write_text(json.dumps(digests.known)))
    return result


def _cached(cache: Path | None) -> dict[str, str]:
    """The digests in a cache; none if it is absent or damaged, because it can be made again."""
    try:
        found = {} if cache is None else json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
