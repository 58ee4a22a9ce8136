"""The check that a stage's inputs are what its key names, while the stage reads them.

Files under LARGE_BYTES are compared before the stage begins. Larger ones are hashed in threads
while the stage runs (`background_digests`), because weights take about as long to hash as to read.
Damage ends a running stage at its next report of progress. A stage ends only when all its inputs
are compared.

When the stage has ended, stamps are compared, so a file that was written meanwhile is found.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, ParamSpec

from ebbline.tasks.background_digests import BackgroundDigests, Hash
from ebbline.tasks.errors import Damaged
from ebbline.tasks.identity import READ, digest_files, file_digest, stamp_of
from ebbline.tasks.paths import check_named_files, files_below

LARGE_BYTES = 32_000_000
GIT_DIGITS = 40
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
P = ParamSpec("P")
_REMEDIES = {
    "record": "`ebbline store verify --mend` moves it, and what was made from it, to quarantine; "
    "the next run makes them again",
    "pin": "Restore it, or pin the new content with `ebbline pin`",
    "hub": "Delete it from the hub's cache; the next run fetches it again",
}


@dataclass(frozen=True)
class ExpectedInput:
    """What one input must be: its digest `content`, or the digest of each of its `files`.

    `source` names what lists them. A `record` of the store lists all files of a folder. The `hub`'s
    cache names each file by its digest. A `pin` has only the digest of the whole.
    """

    path: Path
    content: str
    source: Literal["record", "pin", "hub"] = "pin"
    files: Mapping[str, str] | None = None

    @staticmethod
    def of_hub(path: Path) -> "ExpectedInput":
        """A snapshot, or one file of it. Files that are no links to a blob have no known digest."""
        blobs = {name: file.resolve().name for name, file in _listed(path).items()}
        known = {name: blob for name, blob in blobs.items() if _BLOB.fullmatch(blob)}
        return ExpectedInput(path, "", "hub", known)


class InputCheck:
    """Compares the inputs of one stage with what they must be.

    The constructor compares the small files, and starts to hash the large ones. It and all methods
    raise Damaged with the name of the file and a remedy.
    """

    def __init__(self, inputs: Mapping[str, ExpectedInput]) -> None:
        self._stamps: dict[Path, str] = {}
        self._background = BackgroundDigests()
        self._digests: dict[Path, Future[str]] = {}
        self._waiting: list[tuple[ExpectedInput, dict[str, Path]]] = []
        for expected in inputs.values():
            files = _listed(expected.path) if expected.path.exists() else {}
            if expected.source == "hub":
                _require_links(expected, files)
            else:
                _require_listed(expected, files)
            self._stamps |= {path: stamp_of(path) for path in files.values()}
            for path in files.values():
                if path not in self._digests:
                    self._digests[path] = self._digest(expected, path)
            self._waiting.append((expected, files))
        self.compare()

    def _digest(self, expected: ExpectedInput, path: Path) -> "Future[str]":
        by_git = expected.source == "hub" and len(path.resolve().name) == GIT_DIGITS
        if path.stat().st_size < LARGE_BYTES or self._stamps[path] in READ.known:
            known: Future[str] = Future()
            known.set_result(_git_digest(path) if by_git else READ.of(path))
            return known
        return self._background.add(path, _git_hash if by_git else None)

    def compare(self) -> None:
        """Compare the inputs that are hashed by now. A running stage calls this often."""
        for item in list(self._waiting):
            expected, files = item
            digests = {name: self._digests[path] for name, path in files.items()}
            if all(digest.done() for digest in digests.values()):
                self._waiting.remove(item)
                try:
                    _compare(expected, {name: each.result() for name, each in digests.items()})
                except FileNotFoundError as error:
                    raise Damaged(
                        f"{error.filename} was removed while a stage read it; put it back, and "
                        "run the same command again"
                    ) from None
                except Damaged:
                    if expected.source == "hub":
                        raise
                    # The remembered digests may be what is damaged.
                    _compare(expected, {name: file_digest(path) for name, path in files.items()})

    def stop(self) -> None:
        """Hash no more. The attempt ends without a result."""
        self._background.stop()

    def finish(self) -> None:
        """Wait until all inputs are hashed, and compare them."""
        self._background.finish()
        self.compare()

    def check_unchanged(self) -> None:
        """Check that no input was written since it was compared. The stage has ended."""
        for path, stamp in self._stamps.items():
            if not path.exists() or self._was_written(path, stamp):
                raise Damaged(
                    f"{path} was changed while a stage read it, so nothing was kept of that stage. "
                    "Let nothing write to it, and run the same command again"
                )

    def _was_written(self, path: Path, stamp: str) -> bool:
        now = stamp_of(path)
        if now == stamp:
            return False
        # A hard link or new access rights move only the change time.
        same_times = now.rpartition("|")[0] == stamp.rpartition("|")[0]
        return not same_times or READ.of(path) != self._digests[path].result()

    def before(self, report: Callable[P, None]) -> Callable[P, None]:
        """A function that compares what is hashed by now, and then calls `report`."""

        def compare_and_report(*args: P.args, **kwargs: P.kwargs) -> None:
            self.compare()
            report(*args, **kwargs)

        return compare_and_report


def _listed(path: Path) -> dict[str, Path]:
    """Name -> path of the files of an input. A file has its own name."""
    return files_below(path) if path.is_dir() else {path.name: path}


def _require_listed(expected: ExpectedInput, files: Mapping[str, Path]) -> None:
    """Check that the files that a record lists are there, and no other that a reader would find."""
    if expected.path.is_dir():
        check_named_files(expected.path)
    if expected.files is not None:
        missing, foreign = (
            expected.files.keys() - files.keys(),
            files.keys() - expected.files.keys(),
        )
        if missing:
            _damaged(expected, min(missing), "is missing")
        if foreign:
            _damaged(expected, min(foreign), "is not in the record of its folder")
    elif not files:
        _damaged(expected, "", "is missing or empty")


def _require_links(expected: ExpectedInput, files: Mapping[str, Path]) -> None:
    """Check that no file of a snapshot was written in the place of a link to a blob, as editors do.
    A cache without links has none, and the desktop's hidden files are read by nobody.
    """
    foreign = [name for name, file in files.items() if not file.is_symlink()]
    shown = [name for name in foreign if not name.rpartition("/")[2].startswith(".")]
    if shown and len(foreign) < len(files):
        _damaged(expected, shown[0], "is no link to a blob, as the other files of its snapshot are")


def _compare(expected: ExpectedInput, digests: Mapping[str, str]) -> None:
    if expected.files is not None:
        for name, sha in digests.items():
            recorded = expected.files.get(name, sha)
            if sha != recorded:
                problem = f"has the digest {sha[:12]}, not {recorded[:12]}"
                _damaged(expected, name, f"{problem} as in its record")
        return
    found = next(iter(digests.values())) if expected.path.is_file() else digest_files(digests)
    if found != expected.content:
        problem = f"its sha256 is {found}, the study has {expected.content}"
        _damaged(expected, "", f"differs from its pin: {problem}")


def _damaged(expected: ExpectedInput, name: str, problem: str) -> None:
    path = expected.path / name if name and expected.path.is_dir() else expected.path
    raise Damaged(f"{path} {problem}. {_REMEDIES[expected.source]}")


def _git_hash(path: Path) -> Hash:
    """The hash by which git names a file's content, before its first byte."""
    prefix = f"blob {path.stat().st_size}\0".encode()
    return hashlib.sha1(prefix, usedforsecurity=False)


def _git_digest(path: Path) -> str:
    sha = _git_hash(path)
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            sha.update(memoryview(block))
    return sha.hexdigest()
