"""Where a worker runs one request: in the store's folder itself, or beside a bucket, with local
copies of what it needs.

A bucket's worker sees only local paths. Inputs are fetched when the stage's turn comes, the log is
put where the driver can read it, and a checkpoint survives the loss of the machine because it is
sent after it was written:

    STORE/scratch/KEY/checkpoint.json   name -> object and sha256; written last, so half a
                                        checkpoint is never taken for whole
    STORE/scratch/KEY/ID/...            the files of one checkpoint
"""

import contextlib
import json
import logging
import shutil
import threading
import uuid
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ebbline.cluster.store.artifacts import Store
from ebbline.cluster.store.sources import fetch_source
from ebbline.tasks.errors import StoreError
from ebbline.tasks.files import is_unfinished
from ebbline.tasks.identity import file_digest, folder_files
from ebbline.tasks.progress import PROGRESS
from ebbline.tasks.stage import Report, Request

PROGRESS_EVERY_S = 5.0
CHECKPOINT = "checkpoint.json"
_log = logging.getLogger(__name__)


def workplace(request: Request, rank: int = 0, world_size: int = 1) -> "Workplace":
    """The place of a request that the runner wrote; its `out` says in which store."""
    root, kind, key, attempt, _ = request.out.rsplit("/", 4)
    store = Store(root, request.cache_gb)
    made = Workplace if store.cache is None else BucketWorkplace
    return made(store, store.root / kind / key / attempt, request, rank, world_size)


class Workplace:
    """In a folder there is nothing to do: the request's own paths are good on every machine that
    shares it.
    """

    def __init__(
        self, store: Store, attempt: Path, request: Request, rank: int, world_size: int
    ) -> None:
        self.store, self.attempt, self.request = store, attempt, request
        self.rank, self.world_size = rank, world_size

    def prepared(self) -> Request:
        """The request with everything that it reads on this machine."""
        return self.request

    def saved(self) -> None:
        """A checkpoint lies in the scratch folder."""

    def ended(self, report: Report) -> Report:
        """Give back what the stage held; the report as the driver may read it."""
        return report


class BucketWorkplace(Workplace):
    """Several processes of one machine (a gang) share a workplace; the one with rank 0 speaks for
    all.
    """

    def __init__(
        self, store: Store, attempt: Path, request: Request, rank: int, world_size: int
    ) -> None:
        self._asked = request
        here = replace(
            request,
            out=str(attempt / "payload"),
            log=str(attempt / "log"),
            scratch=str(store.scratch(request.key)),
        )
        super().__init__(store, attempt, here, rank, world_size)
        self._held = ExitStack()
        self._done = threading.Event()
        self._teller: threading.Thread | None = None

    def prepared(self) -> Request:
        assert self.store.cache is not None
        for entry in (self.attempt, self.store.scratch(self.request.key)):
            self._held.enter_context(self.store.cache.hold(entry))
        for folder in ("payload", "log"):
            (self.attempt / folder).mkdir(parents=True, exist_ok=True)
        inputs = {name: self._fetched(location) for name, location in self._asked.inputs.items()}
        if self.rank == 0:  # it alone reads and writes a gang's checkpoint
            self._fetch_checkpoint()
            self._teller = threading.Thread(target=self._tell, daemon=True)
            self._teller.start()
        return replace(self.request, inputs=inputs)

    def _fetched(self, location: str) -> str:
        """An input's local path; what is no part of the store (a hub snapshot) stays as it is."""
        if not location.startswith(f"{self.store.place.at}/"):
            return location
        assert self.store.cache is not None
        path = self.store.local(location)
        parts = path.relative_to(self.store.root).parts
        if parts[0] == "sources":
            self._held.enter_context(self.store.cache.hold(self.store.root / "sources" / parts[1]))
            return str(fetch_source(self.store, path))
        artifact = self.store.open(parts[0], parts[1])
        if artifact.folder != self.store.root.joinpath(*parts[:3]):
            raise StoreError(
                f"{parts[0]} {parts[1][:12]} was made again by another attempt meanwhile; "
                "run the study again"
            )
        self._held.enter_context(self.store.cache.hold(artifact.folder))
        self.store.fetch(artifact, artifact.below("/".join(parts[4:])))
        return str(path)

    def saved(self) -> None:
        if self.rank != 0:
            return
        try:
            self._send_checkpoint()
        except StoreError as error:  # the training goes on; without a network its end will say so
            _log.warning(
                "the checkpoint of %s %s was not sent: %s",
                self.request.kind,
                self.request.key[:12],
                error,
            )

    def _send_checkpoint(self) -> None:
        place, prefix, scratch = (
            self.store.place,
            f"scratch/{self.request.key}",
            self.store.scratch(self.request.key),
        )
        fresh = uuid.uuid4().hex[:12]
        files = {
            name: sha for name, sha in folder_files(scratch).items() if not is_unfinished(name)
        }
        old = [
            entry.name
            for entry in place.entries(prefix)
            if not entry.name.endswith(f"/{CHECKPOINT}")
        ]
        for name in files:
            place.send(scratch / name, f"{prefix}/{fresh}/{name}")
        place.write(f"{prefix}/{CHECKPOINT}", json.dumps({"id": fresh, "files": files}).encode())
        place.delete(old)

    def _fetch_checkpoint(self) -> None:
        assert self.store.cache is not None
        place, prefix, scratch = (
            self.store.place,
            f"scratch/{self.request.key}",
            self.store.scratch(self.request.key),
        )
        text = place.read(f"{prefix}/{CHECKPOINT}")
        if text is None:
            return
        said = json.loads(text)
        where, files = f"{prefix}/{said['id']}", dict(said["files"])
        if not {f"{where}/{name}" for name in files} <= {
            entry.name for entry in place.entries(where)
        }:
            # An attempt that was given up, and was still sending its own, took them for old ones.
            _log.warning(
                "the checkpoint of %s %s has lost files: it starts over",
                self.request.kind,
                self.request.key[:12],
            )
            return
        with self.store.cache.alone(scratch):
            for name, sha in files.items():
                path = scratch / name
                if path.exists() and file_digest(path) != sha:
                    path.unlink()  # of another checkpoint
        self.store.cache.fetch(
            scratch,
            files,
            lambda: self.store.sizes(where),
            lambda name, path: place.receive(f"{where}/{name}", path),
        )

    def _tell(self) -> None:
        """Put the progress where the driver sees it, every few seconds while it changes."""
        said = b""
        while not self._done.wait(PROGRESS_EVERY_S):
            path = Path(self.request.log) / PROGRESS
            with contextlib.suppress(OSError):  # being replaced at this moment
                if path.exists() and (now := path.read_bytes()) != said:
                    said = now
                    try:
                        self.store.note(self.attempt, path.name, said)
                    except (
                        StoreError
                    ) as error:  # a courtesy: the commit needs the store, and will say it
                        _log.warning(
                            "the progress of %s %s was not put: %s",
                            self.request.kind,
                            self.request.key[:12],
                            error,
                        )

    def ended(self, report: Report) -> Report:
        self._done.set()
        if self._teller is not None:
            self._teller.join()
        try:
            if self.rank == 0 or report.error is not None:
                report = self._told(report)
        finally:
            self._held.close()
        if self.store.cache is not None:
            self.store.cache.trim()
        return report

    def _told(self, report: Report) -> Report:
        """Send the log; a failed attempt's files go, as nobody will read them. Local paths become
        the store's in what is said.
        """
        log, name = (
            Path(self.request.log),
            f"{self.attempt.relative_to(self.store.root).as_posix()}/log",
        )
        try:
            for path in sorted(log.rglob("*")) if log.exists() else ():
                if path.is_file():
                    self.store.place.send(path, f"{name}/{path.relative_to(log).as_posix()}")
        except StoreError as error:
            _log.warning(
                "the log of %s %s was not sent: %s", self.request.kind, self.request.key[:12], error
            )
        if report.error is None:
            return report
        if self.rank == 0:  # who else shares its folder on one machine ends with it
            shutil.rmtree(self.attempt, ignore_errors=True)
        here, there = str(self.attempt), self.store.url(self.attempt)
        return replace(report, error=report.error.replace(here, there))
