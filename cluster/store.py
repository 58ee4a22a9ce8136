"""The artifact store: key -> what a stage produced.

    ROOT/KIND/KEY/record.json          present if and only if the artifact is complete; written last, once
    ROOT/KIND/KEY/ATTEMPT/payload/     the files, immutable once recorded
    ROOT/KIND/KEY/ATTEMPT/log/         request.json, progress, errors: about the attempt, not content
    ROOT/scratch/KEY/                  checkpoints of unfinished stages

Each attempt writes into a folder of its own and the record names the one that counts, so a commit moves nothing: it is
one conditional put. Two workers that finish the same key at once both succeed and the first record stands. A folder
without a record is an attempt that was cut off; nothing that another attempt makes depends on it.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from tasks.errors import Incomplete, StoreError
from tasks.identity import digest, digest_files, folder_files, part_digest

RECORD = "record.json"


@dataclass(frozen=True)
class Artifact:
    """A complete result. `hashed` is what its key was made from, `files` maps each relative path to its sha256."""

    key: str
    kind: str
    content: str
    files: Mapping[str, str]
    hashed: Mapping[str, Any]
    provenance: Mapping[str, Any]
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "payload"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def content_of(self, part: str) -> str:
        return part_digest(self.files, part)


class Store:
    """Artifacts on a local or shared folder. Cheap to make; holds no state of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    @property
    def _records(self) -> LocalStore:
        return LocalStore(prefix=self.root, mkdir=True)

    def find(self, kind: str, key: str) -> Artifact | None:
        """The complete artifact of a key, or None. Raises StoreError when its record is damaged."""
        path = self.root / kind / key / RECORD
        try:
            text = path.read_text()
        except FileNotFoundError:
            return None
        try:
            record = json.loads(text)
            return Artifact(
                key=record["key"],
                kind=record["kind"],
                content=record["content"],
                files=record["files"],
                hashed=record["hashed"],
                provenance=record["provenance"],
                folder=path.parent / record["attempt"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"the record {path} is damaged ({error}). Its stage can be made again: move that folder away and rerun."
            ) from error

    def open(self, kind: str, key: str) -> Artifact:
        """Like `find`, but raises Incomplete when there is no such artifact."""
        artifact = self.find(kind, key)
        if artifact is None:
            raise Incomplete(f"the {kind} artifact {key[:12]} is not in {self.root}; run the study to make it")
        return artifact

    def begin(self, kind: str, key: str) -> Path:
        """A fresh folder for one attempt, with empty `payload` and `log` in it."""
        folder = self.root / kind / key / uuid.uuid4().hex[:12]
        (folder / "payload").mkdir(parents=True)
        (folder / "log").mkdir()
        return folder

    def scratch(self, key: str) -> Path:
        """Where the attempts at a key keep their checkpoints; emptied when the key is committed."""
        return self.root / "scratch" / key

    def commit(self, attempt: Path, hashed: Mapping[str, Any], provenance: Mapping[str, Any]) -> Artifact:
        """Declare an attempt complete. The first to commit a key wins; a later one gets the first one's artifact.

        Raises StoreError when the payload is empty, or `hashed` is not what the attempt's key was made from.
        """
        key, kind = attempt.parent.name, attempt.parent.parent.name
        if digest(dict(hashed)) != key:
            raise StoreError(f"{kind} {key[:12]} was made from something else than it was asked for; nothing was committed")
        files = folder_files(attempt / "payload")
        if not files:
            raise StoreError(f"{kind} {key[:12]} produced no files; nothing was committed")
        for name in files:
            _to_disk(attempt / "payload" / name)
        record = {
            "key": key,
            "kind": kind,
            "attempt": attempt.name,
            "content": digest_files(files),
            "files": files,
            "hashed": dict(hashed),
            "provenance": dict(provenance),
        }
        text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False).encode()
        try:
            obstore.put(self._records, f"{kind}/{key}/{RECORD}", text, mode="create")
        except AlreadyExistsError:
            shutil.rmtree(attempt)
        except BaseError as error:
            raise StoreError(f"the record of {kind} {key[:12]} could not be written to {self.root}: {error}") from error
        _to_disk(self.root / kind / key / RECORD)
        shutil.rmtree(self.scratch(key), ignore_errors=True)
        return self.open(kind, key)

    def all(self, kind: str) -> Iterator[Artifact]:
        """Every complete artifact of a kind, in key order."""
        folder = self.root / kind
        for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
            artifact = self.find(kind, entry.name)
            if artifact is not None:
                yield artifact


def _to_disk(path: Path) -> None:
    # A record must never outlive its payload through a power cut.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
