"""The artifact store: key -> what a stage produced. It lies in a folder, or in a bucket of
S3-compatible storage.

    STORE/KIND/KEY/record.json          present if and only if the artifact is complete; written
                                        last, once
    STORE/KIND/KEY/ATTEMPT/payload/     the files, immutable once recorded
    STORE/KIND/KEY/ATTEMPT/log/         request.json, progress, errors: of the attempt, not content
    STORE/KIND/KEY/dropped.json         the files that retention removed; the record outlives them
    STORE/scratch/KEY/                  checkpoints of unfinished stages
    STORE/sources/CONTENT/              (in a bucket) models and data from the driver's machine

Each attempt writes into a folder of its own and the record names the one that counts, so a commit
moves nothing: it is one conditional put. Two workers that finish the same key at once both succeed
and the first record stands. A folder without a record is an attempt that was cut off; nothing that
another attempt makes depends on it.

A bucket's attempts are written on the worker's own disk, in its cache, and sent when they are done.
"""

import json
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebbline.cluster.store.bucket import Bucket
from ebbline.cluster.store.cache import Cache, cache_folder
from ebbline.cluster.store.places import Folder, StorePlace, unwritable
from ebbline.tasks.errors import Differs, Incomplete, StoreError
from ebbline.tasks.identity import digest, digest_files, folder_files, part_digest

RECORD = "record.json"
DROPPED = "dropped.json"
QUARANTINE = "aside"  # the folder of what was moved away, as stores have it that were made before
CACHE_GB = 100.0
READERS = 16


@dataclass(frozen=True, slots=True)
class Artifact:
    """A complete result. `hashed` is what its key was made from, `files` maps each relative path to
    its sha256.

    `folder` is its attempt's place on this machine; of a bucket's artifact it holds what has been
    fetched so far.
    """

    key: str
    kind: str
    content: str
    files: Mapping[str, str]
    hashed: Mapping[str, Any]
    provenance: Mapping[str, Any]
    folder: Path
    store: "Store" = field(compare=False, repr=False)

    @property
    def path(self) -> Path:
        """The payload's folder with everything in it."""
        return self.store.fetch(self, tuple(self.files))

    def file(self, name: str) -> Path:
        """One file of the payload; nothing else is fetched for it."""
        return self.store.fetch(self, (name,)) / name

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def content_of(self, part: str) -> str:
        return part_digest(self.files, part)

    def below(self, part: str) -> tuple[str, ...]:
        """The names of a part's files: one, or those of a folder; all when `part` is empty."""
        return tuple(
            name for name in self.files if not part or name == part or name.startswith(f"{part}/")
        )


class Store:
    """Artifacts by key. Cheap to make; a folder's holds no state of its own, a bucket's remembers
    the records it has read.
    """

    def __init__(self, location: Path | str, cache_gb: float = CACHE_GB) -> None:
        self.place: StorePlace = (
            Bucket(str(location)) if "://" in str(location) else Folder(Path(location))
        )
        self.cache: Cache | None = None
        self.cache_gb = cache_gb
        if isinstance(self.place, Folder):
            self.root = self.place.root
        else:
            self.cache = Cache(cache_folder(), cache_gb)
            self.root = self.cache.root / digest(self.place.at)[:12]
        self._known: dict[tuple[str, str], Artifact] = {}

    def find(self, kind: str, key: str) -> Artifact | None:
        """The complete artifact of a key, or None. Raises StoreError when its record is damaged."""
        known = self._known.get((kind, key))
        if known is not None:
            return known
        text = self.place.read(f"{kind}/{key}/{RECORD}")
        if text is None:
            return None
        artifact = self._parsed(kind, key, text)
        if self.cache is not None:  # a record never changes, and a bucket is far away
            self._known[kind, key] = artifact
        return artifact

    def _parsed(self, kind: str, key: str, text: bytes) -> Artifact:
        try:
            record = json.loads(text, object_pairs_hook=_sharing_strings)
            return Artifact(
                key=record["key"],
                kind=record["kind"],
                content=record["content"],
                files=record["files"],
                hashed=record["hashed"],
                provenance=record["provenance"],
                folder=self.root.joinpath(kind, key, record["attempt"]),
                store=self,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"the record {self.place.at}/{kind}/{key}/{RECORD} is damaged ({error})."
                " `ebbline store verify --mend` moves it away; its stage is then made again"
            ) from error

    def open(self, kind: str, key: str) -> Artifact:
        """Like `find`, but raises Incomplete when there is no such artifact."""
        artifact = self.find(kind, key)
        if artifact is None:
            raise Incomplete(
                f"the {kind} artifact {key[:12]} is not in {self.place.at}; run the study "
                "to make it"
            )
        return artifact

    def all(self, kind: str) -> Iterator[Artifact]:
        """Every complete artifact of a kind, in key order."""
        keys = self.place.below(kind)
        if self.cache is None:
            found: Iterator[Artifact | None] = (self.find(kind, key) for key in keys)
            yield from (artifact for artifact in found if artifact is not None)
            return
        with ThreadPoolExecutor(READERS) as pool:
            yield from (
                artifact
                for artifact in pool.map(lambda key: self.find(kind, key), keys)
                if artifact is not None
            )

    def begin(self, kind: str, key: str) -> Path:
        """A fresh folder on this machine for one attempt, with empty `payload` and `log` in it."""
        folder = self.root / kind / key / uuid.uuid4().hex[:12]
        if self.cache is not None:
            self.cache.folder(self.root.name)
        try:
            (folder / "payload").mkdir(parents=True)
            (folder / "log").mkdir()
        except OSError as error:
            raise (
                self.place.explained(error)
                if isinstance(self.place, Folder)
                else unwritable(self.place.at, error)
            ) from error
        return folder

    def url(self, *parts: str | Path) -> str:
        """Where something of this store lies, as any machine can name it: below the folder's path,
        or the bucket's URL.

        A path stands for what lies there in a bucket's cache.
        """
        names = [
            part.relative_to(self.root).as_posix() if isinstance(part, Path) else part
            for part in parts
        ]
        return "/".join([self.place.at, *names])

    def local(self, url: str) -> Path:
        """The opposite of `url`: where on this machine it lies, or would."""
        return self.root / url.removeprefix(self.place.at).lstrip("/")

    def scratch(self, key: str) -> Path:
        """Where on this machine the attempts at a key keep their checkpoints; emptied when the key
        is committed.
        """
        return self.root / "scratch" / key

    def log(self, attempt: Path, name: str) -> bytes | None:
        """A file of an attempt's log, from wherever the attempt runs; None while there is none."""
        return self.place.read(f"{attempt.relative_to(self.root).as_posix()}/log/{name}")

    def note(self, attempt: Path, name: str, data: bytes) -> None:
        """Write a file of an attempt's log where everybody can see it."""
        if isinstance(self.place, Folder):  # a log need not survive a power cut
            try:
                (attempt / "log" / name).write_bytes(data)
            except OSError as error:
                raise self.place.explained(error) from error
        else:
            self.place.write(f"{attempt.relative_to(self.root).as_posix()}/log/{name}", data)

    def commit(
        self, attempt: Path, hashed: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> Artifact:
        """Declare an attempt complete. The first to commit a key wins; a later one gets the first
        one's artifact.

        A later one also gives back what retention has dropped of the first. Raises StoreError when
        the payload is empty or `hashed` is not what the attempt's key was made from, Differs when
        what was dropped came out otherwise.
        """
        key, kind = attempt.parent.name, attempt.parent.parent.name
        if digest(dict(hashed)) != key:
            raise StoreError(
                f"{kind} {key[:12]} was made from something else than it was asked for; "
                "nothing was committed"
            )
        files = folder_files(attempt / "payload")
        if not files:
            raise StoreError(f"{kind} {key[:12]} produced no files; nothing was committed")
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
        if self.find(kind, key) is None:
            for name in files:
                self.place.send(
                    attempt / "payload" / name, f"{kind}/{key}/{attempt.name}/payload/{name}"
                )
            self.place.create(f"{kind}/{key}/{RECORD}", text)
        stands = self.open(kind, key)
        # A create that was answered too late may be repeated by the library and find its own
        # record: that is no loss.
        if stands.folder != attempt:
            self._give_back(stands, attempt, files)
            self.discard(attempt)
        self.empty_scratch(key)
        return stands

    def _give_back(self, stands: Artifact, attempt: Path, files: Mapping[str, str]) -> None:
        dropped = self.dropped(stands)
        for name in sorted(dropped):
            if files.get(name) != stands.files[name]:
                raise Differs(_difference(stands, name))
        for name in sorted(dropped):
            self.place.send(attempt / "payload" / name, self._name(stands, name))
        if dropped:
            self.place.delete([f"{stands.kind}/{stands.key}/{DROPPED}"])

    def dropped(self, artifact: Artifact) -> frozenset[str]:
        """The files that retention has removed; what else is missing is damage."""
        text = self.place.read(f"{artifact.kind}/{artifact.key}/{DROPPED}")
        return frozenset(json.loads(text)["files"]) if text is not None else frozenset()

    def drop(self, artifact: Artifact, names: frozenset[str]) -> None:
        """Remove files of a payload and keep its record. The marker comes first, so that a cut-off
        drop is no damage.
        """
        marker = {"files": sorted(self.dropped(artifact) | names)}
        self.place.write(f"{artifact.kind}/{artifact.key}/{DROPPED}", json.dumps(marker).encode())
        self.place.delete([self._name(artifact, name) for name in sorted(names)])
        if self.cache is not None:
            for name in names:
                (artifact.folder / "payload" / name).unlink(missing_ok=True)

    def quarantine(self, kind: str, key: str) -> str:
        """Move all that a key has to `aside/`, its record first, so that its stage is made again;
        says where it went.
        """
        to = f"{QUARANTINE}/{kind}/{key}-{uuid.uuid4().hex[:6]}"
        names = sorted(
            (entry.name for entry in self.place.entries(f"{kind}/{key}")),
            key=lambda name: not name.endswith(f"/{RECORD}"),
        )
        for name in names:
            self.place.move(name, to + name.removeprefix(f"{kind}/{key}"))
        self._known.pop((kind, key), None)
        shutil.rmtree(self.root / kind / key, ignore_errors=True)
        return to

    def discard(self, attempt: Path) -> None:
        """Remove an attempt that lost, or ended without a result worth keeping, with its log."""
        self.place.delete(
            [entry.name for entry in self.place.entries(attempt.relative_to(self.root).as_posix())]
        )
        shutil.rmtree(attempt, ignore_errors=True)
        with suppress(OSError):  # other attempts, or the record
            attempt.parent.rmdir()

    def empty_scratch(self, key: str) -> None:
        if self.cache is not None:
            self.place.delete([entry.name for entry in self.place.entries(f"scratch/{key}")])
        shutil.rmtree(self.scratch(key), ignore_errors=True)

    def fetch(self, artifact: Artifact, names: tuple[str, ...]) -> Path:
        """The payload's folder on this machine with these files in it. Raises StoreError when the
        store has lost one.
        """
        payload = artifact.folder / "payload"
        if self.cache is None:
            return payload
        self.cache.keep(artifact.folder)
        prefix = artifact.folder.relative_to(self.root).as_posix() + "/payload"
        wanted = {name: artifact.files[name] for name in names if name in artifact.files}
        self.cache.fetch(
            payload,
            wanted,
            lambda: self.sizes(prefix),
            lambda name, path: self.place.receive(f"{prefix}/{name}", path),
        )
        return payload

    def free_bytes(self) -> int | None:
        """What the disk under the store has left; None for a bucket, which has no end."""
        if self.cache is not None:
            return None
        there = next(folder for folder in (self.root, *self.root.parents) if folder.exists())
        return shutil.disk_usage(there).free

    def sizes(self, prefix: str) -> dict[str, int]:
        """Name below a folder's name -> bytes, of all that lies there."""
        return {
            entry.name.removeprefix(f"{prefix}/"): entry.size
            for entry in self.place.entries(prefix)
        }

    def _name(self, artifact: Artifact, file: str) -> str:
        return f"{artifact.folder.relative_to(self.root).as_posix()}/payload/{file}"


def _sharing_strings(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a record. Records repeat each other's names, settings and inputs, and a driver
    holds very many of them.
    """
    return {
        sys.intern(name): sys.intern(value) if isinstance(value, str) else value
        for name, value in pairs
    }


def _difference(stands: Artifact, name: str) -> str:
    device, host = (
        stands.provenance.get(what, f"an unknown {what}") for what in ("device", "host")
    )
    return (
        f"{stands.kind} {stands.key[:12]}: {name} had been dropped to save space, and made "
        "again it is another file than the one on record"
        f" (made on {device}, {host}). What was measured from the one on record cannot be "
        "said of the new one. Either run where it was"
        " first made, or give it up with"
        f" `ebbline store forget {stands.kind} {stands.key}`: it and what was measured "
        "from it are then made again"
    )
