"""The home: a folder with the store that all studies share and one folder for each study.

HOME/store/                      artifacts, by kind and key, unless the profile names another store
HOME/id                          the name of this home in a shared store or database
HOME/adapters/SHA256/            copies of the studies' own adapters
HOME/cluster.yaml                the profile of the cluster (optional)
HOME/studies/NAME/study.json     the study, with its latest budget
HOME/studies/NAME/driver.lock    the driver that holds the study now
HOME/studies/NAME/file           the path of the study file of the last run
HOME/studies/NAME/spending.jsonl the cost of all runs so far
HOME/studies/NAME/results.cache  results of finished points, safe to delete
HOME/studies/NAME/points_name    its name in its own database, when it was renamed since
HOME/studies/NAME/...            the points' database, tables, figures, report and W&B mirror

Invariant: the folder's name is the study's name, so renaming the folder renames the study.
"""

import fcntl
import json
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from ebbline.cluster.profile import Profile
from ebbline.cluster.store.artifacts import Store
from ebbline.cluster.store.retention import OWNERS
from ebbline.sweeps.study.database import WAIT_HINT, Hold, PointDatabase, shared_url, sqlite_url
from ebbline.sweeps.study.reading.field_faults import faults
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import read_profile
from ebbline.tasks.errors import StudyError, StudyHeld
from ebbline.tasks.files import remove_stale, write_whole
from ebbline.tasks.identity import digest
from ebbline.tasks.paths import is_inside

FILE = "file"
LONGEST_PATH = 4096
SHOWN_FAULTS = 3  # of a stored study that cannot be read
POINTS_NAME = "points_name"
MIRROR_LOCK = Path("wandb", "mirror.lock")  # held by the W&B mirror of a study


class Home:
    """The root folder of a user's studies."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        if self.root.is_file():
            raise StudyError(f"{root} is a file, and a home is a folder; name another --home")
        self.profile = read_profile(self.root / "cluster.yaml")
        self.store = store_of(self.root, self.profile)

    def path(self, study: str) -> Path:
        """The folder of a study, for readers: it may not exist."""
        return self.root / "studies" / study

    def folder(self, study: str) -> Path:
        """The folder of a study, for writers: it is made when it does not exist."""
        path = self.path(study)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def studies(self) -> list[str]:
        """The names of the studies that a driver of this home has begun."""
        return sorted(path.parent.name for path in self.root.glob("studies/*/study.json"))

    def database(self, study: str) -> PointDatabase:
        """Where a study's points are kept. Raises StudyError when the URL of the shared database is
        invalid.
        """
        url = shared_url(self.profile.storage)
        if url is None:
            name = self._kept_text(self.path(study) / POINTS_NAME, "its name in its database")
            return PointDatabase(sqlite_url(self.path(study) / "optuna.db"), name or study)
        store = self.profile.store or ""
        return PointDatabase(url, f"{study}@{digest(store if '://' in store else self.id)[:12]}")

    def named(self, name: str) -> str:
        """The argument for ebbline.sweeps.study.study_file.load: for a study of this home its file
        of the last run, else `name` unchanged.
        """
        return self._kept_file(name) or name if is_plain(name) else name

    def run_from(self, file: Path) -> str | None:
        """The study whose last run was from this file; None for another file."""
        for name in self.studies():
            if self._kept_file(name) == str(file.resolve()):
                return name
        return None

    def _kept_file(self, name: str) -> str | None:
        """The path of the file of a study's last run; None if it is not known. Raises StudyError if
        the record of it is damaged.
        """
        return self._kept_text(self.path(name) / FILE, "the path of the study's file")

    def _kept_text(self, path: Path, what: str) -> str | None:
        if not path.is_file():
            return None
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            text = "\0"
        if any(ord(letter) < 32 for letter in text) or len(text) > LONGEST_PATH:
            raise StudyError(
                f"{path} is damaged: it must hold {what}. Remove it, and name the study's file "
                "in the next command"
            )
        return text

    def keep_file(self, study: str, source: Path) -> None:
        """Record the file that a study is run from."""
        path = str(source.resolve())
        write_whole(self.folder(study) / FILE, lambda fresh: fresh.write_text(path, "utf-8"))

    @property
    def digests(self) -> Path | None:
        """The cache of content digests of local models and data; None where there is no home, so
        that looking makes none.
        """
        return self.root / "digests.json" if self.exists else None

    @property
    def exists(self) -> bool:
        """Whether the folder is a home: it has a profile, a study or a store."""
        return any(
            (self.root / name).exists() for name in ("cluster.yaml", "studies", "store", "id")
        )

    def has_run(self, study: str) -> bool:
        """Whether a driver of this home has begun the study."""
        return (self.path(study) / "study.json").exists()

    def require(self, study: str) -> None:
        """Check that the study exists, without making a folder for a mistyped name or home.

        Raises StudyError when the study was not begun here and no shared database can have it from
        another home.
        """
        shared = self.root.is_dir() and shared_url(self.profile.storage) is not None
        if not self.has_run(study) and not shared:
            raise StudyError(
                f"no study {study!r} in {self.root}; `ebbline run` begins it there, or "
                "name the --home that has it"
            )

    def kept(self, study: str) -> str:
        """The latest stored study as JSON, with its present name; empty before its first run."""
        path = self.path(study) / "study.json"
        return renamed(path.read_text("utf-8"), study) if path.exists() else ""

    def begun(self, study: str) -> Study | None:
        """The latest stored study; None before its first run.

        Raises StudyError, which names the file, when it cannot be read.
        """
        path = self.path(study) / "study.json"
        if not path.exists():
            return None
        file = self._kept_file(study)
        folder = Path(file).parent if file else Path.cwd()
        try:
            text = self.kept(study)
            return Study.model_validate_json(text, context={"folder": folder})
        except (ValidationError, UnicodeDecodeError, OSError) as error:
            lines = (
                [f"  {line}" for line in faults(error, Study)]
                if isinstance(error, ValidationError)
                else [f"  {error}"]
            )
            raise StudyError(
                f"{path} cannot be read ({type(error).__name__}):\n"
                + "\n".join(lines[:SHOWN_FAULTS])
                + "\nRestore the file, or move the study's folder away if nobody needs its "
                "results. Other studies of this home are not affected"
            ) from None

    def keep(self, study: str, text: str) -> None:
        """Store a study's JSON atomically (see ebbline.sweeps.study.view)."""
        write_whole(self.folder(study) / "study.json", lambda fresh: fresh.write_text(text))

    @property
    def known_id(self) -> str | None:
        """`id` for readers: None for a home that has none yet."""
        return self.id if (self.root / "id").exists() else None

    @property
    def id(self) -> str:
        """The name of this home in a shared store or database. It moves with the folder."""
        path = self.root / "id"
        if not path.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            remove_stale(path)
            fresh = self.root / f".id.{uuid.uuid4().hex[:8]}"
            try:
                fresh.write_text(uuid.uuid4().hex)
                with suppress(FileExistsError):  # another driver was first
                    os.link(fresh, path)
            finally:
                fresh.unlink(missing_ok=True)
        return path.read_text()

    @contextmanager
    def driving(self, study: str) -> Iterator[Hold]:
        """Hold the study inside a `with`. Raises StudyHeld with the holder's name when another
        driver holds it.

        The lock belongs to the kernel, and in a shared database to the database too. Both release
        it when the process ends.
        """
        path = self.folder(study) / "driver.lock"
        with path.open("a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                raise StudyHeld(
                    f"another driver holds study {study!r}: "
                    f"{handle.read().strip() or 'another process'}{WAIT_HINT}"
                ) from None
            driver = (
                f"process {os.getpid()} on {platform.node()} since "
                f"{time.strftime('%Y-%m-%d %H:%M:%S')}{_slurm_job()}"
            )
            handle.truncate(0)
            handle.write(driver)
            handle.flush()
            with self.database(study).driving(study, driver) as hold:
                # `store gc` must know every home that may need an artifact.
                self.store.place.create(f"{OWNERS}/{self.id}.json", b"{}")
                yield hold
            handle.truncate(0)

    def holder(self, study: str) -> str | None:
        """The driver that holds a study now, or None."""
        path = self.path(study) / "driver.lock"
        if path.exists():
            with path.open() as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return handle.read().strip()
        return self.database(study).holder()


def _slurm_job() -> str:
    """The Slurm job that this process is in, for a driver's name."""
    job = os.environ.get("SLURM_JOB_ID")
    return f" in Slurm job {job}" if job else ""


def is_plain(name: str) -> bool:
    """Whether a text can be the name of a folder of `studies`."""
    return is_inside(name) and "/" not in name


def renamed(text: str, name: str) -> str:
    """A study's JSON under this name. A damaged text is unchanged: its reader names the fault."""
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        if isinstance(found, dict) and found.get("study", name) != name:
            return json.dumps({**found, "study": name}, indent=1)
    return text


def store_of(root: Path, profile: Profile) -> Store:
    """The profile's store: a bucket by URL, or a folder (a relative one starts at the home);
    HOME/store when it names none.
    """
    place = profile.store or "store"
    if "://" in place:
        return Store(place, profile.cache_gb)
    try:
        folder = root / Path(place).expanduser()
        store = Store(folder, profile.cache_gb)
    except RuntimeError as error:  # an unknown user, or links in a circle
        raise StudyError(
            f"the store {place} of {root} cannot be found ({error}); write the whole path of a "
            "folder as `store` in cluster.yaml"
        ) from None
    if folder.is_file():
        raise StudyError(f"the store {folder} is a file; move it away, or name another folder")
    return store
