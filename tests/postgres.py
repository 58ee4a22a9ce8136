"""A real PostgreSQL for tests, from Debian's packages: on a free port of the loopback, with a
password.

Tests share the run's one (the fixture `postgres`), each with a database of its own; a test that
stops it has its own (`running`).
"""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg

PASSWORD = "only-for-tests"
MISSING = "PostgreSQL is not installed; on Debian: apt-get install postgresql"
NOBODY = ("nobody", "nogroup")


def binaries() -> Path | None:
    """The folder with `initdb` and `pg_ctl`, or None where PostgreSQL is not installed."""
    found = [
        Path(place).resolve().parent
        for name in ("initdb", "pg_ctl")
        if (place := shutil.which(name))
    ]
    places = [*found, *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    return next(
        (place for place in places if (place / "initdb").exists() and (place / "pg_ctl").exists()),
        None,
    )


@dataclass(frozen=True)
class Postgres:
    folder: Path
    bin: Path
    port: int
    database: str = "postgres"

    @property
    def url(self) -> str:
        return f"postgresql://ebbline@127.0.0.1:{self.port}/{self.database}"

    def with_database(self, name: str) -> "Postgres":
        """The same server, with a new empty database."""
        with psycopg.connect(self.url, password=PASSWORD, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # a name made here, not from outside
        return replace(self, database=name)

    def start(self) -> None:
        options = (
            f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        )
        _run(
            str(self.bin / "pg_ctl"),
            "-D",
            str(self.folder / "data"),
            "-w",
            "-l",
            str(self.folder / "log"),
            "-o",
            options,
            "start",
        )

    def stop(self) -> None:
        _run(
            str(self.bin / "pg_ctl"),
            "-D",
            str(self.folder / "data"),
            "-w",
            "-m",
            "immediate",
            "stop",
        )


@contextmanager
def running() -> Iterator[Postgres]:
    """A server of its own; its one user has PASSWORD."""
    found = _made()
    try:
        yield found
        found.stop()
    finally:
        shutil.rmtree(found.folder, ignore_errors=True)


def start(place: Path) -> dict[str, Any]:
    """The run's server, for tests.shared.server."""
    found = _made()
    pid = int((found.folder / "data" / "postmaster.pid").read_text().split()[0])
    return {"pid": pid, "folder": str(found.folder), "bin": str(found.bin), "port": found.port}


def _made() -> Postgres:
    place = binaries()
    assert place is not None, MISSING
    folder = Path(tempfile.mkdtemp(prefix="ebbline-postgres-", dir="/tmp"))
    if os.getuid() == 0:
        shutil.chown(folder, *NOBODY)
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found = Postgres(folder, place, free.getsockname()[1])
    try:
        _run(
            str(place / "initdb"),
            "-D",
            str(folder / "data"),
            "-U",
            "ebbline",
            "-A",
            "scram-sha-256",
            f"--pwfile={folder / 'password'}",
        )
        found.start()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return found


def _run(*command: str) -> None:
    # PostgreSQL refuses to run as root.
    drop = (
        ["setpriv", f"--reuid={NOBODY[0]}", f"--regid={NOBODY[1]}", "--clear-groups"]
        if os.getuid() == 0
        else []
    )
    done = subprocess.run(
        [*drop, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        timeout=300,
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}"
