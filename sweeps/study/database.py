"""Where a study's points are kept: an SQLite file of its own, or a PostgreSQL database that many
studies share.

cluster.yaml or EBBLINE_STORAGE gives the URL of a shared database:
`postgresql://user@host/database`. The URL has no password: PostgreSQL's driver reads it from
PGPASSWORD, PGPASSFILE or ~/.pgpass.

In a shared database the name of a study is `NAME@STORE`, where STORE identifies the store of its
artifacts. Homes with different stores have different studies. A new home with the same store URL
continues the existing study.
"""

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from ebbline.tasks.errors import DatabaseLost, EbblineError, StudyError, StudyHeld

ENVIRONMENT = "EBBLINE_STORAGE"
CONNECT_S = 5
WAIT_HINT = "; `ebbline status` shows its progress. When it has ended, the same command continues"


@dataclass(frozen=True)
class PointDatabase:
    """A database and the name of one study in it. `read_only` connections cannot write."""

    url: str
    name: str
    read_only: bool = False

    def to_read(self) -> "PointDatabase":
        """The same study, with connections that the database makes read-only."""
        if self.shared:
            return replace(self, read_only=True)
        # The file's own name is quoted: SQLite reads it as a URI, to open it read-only.
        query = {"mode": "ro", "uri": "true"}
        return replace(self, url=sqlite_url(f"file:{quote(self._file)}", query), read_only=True)

    @property
    def exists(self) -> bool:
        """Whether the file has a database: the first driver makes it. True for a shared one."""
        file = Path(self._file)
        return self.shared or (file.exists() and (file.is_dir() or file.stat().st_size > 0))

    def make_folder(self) -> None:
        """Make the folder of the file, for a writer."""
        if not self.shared:
            Path(self._file).parent.mkdir(parents=True, exist_ok=True)

    @property
    def _file(self) -> str:
        return str(sqlalchemy.make_url(self.url).database)

    @property
    def shared(self) -> bool:
        return not self.url.startswith("sqlite")

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments for a SQLAlchemy engine of this database."""
        if not self.shared:
            return {}
        only = {"options": "-c default_transaction_read_only=on"} if self.read_only else {}
        return {"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_S, **only}}

    @contextmanager
    def driving(self, study: str, driver: str) -> Iterator["Hold"]:
        """Hold the study in a shared database inside a `with`: the home's file lock does not cover
        other machines.

        Raises StudyHeld with the holder's name when another driver holds it. The lock ends with
        its connection.
        """
        if not self.shared:
            yield Hold(driver, self, None)
            return
        with self.explained():
            engine = sqlalchemy.create_engine(
                self.url,
                poolclass=sqlalchemy.NullPool,
                isolation_level="AUTOCOMMIT",
                **_named(driver),
            )
            connection = engine.connect()
        try:
            with self.explained():
                if not connection.scalar(
                    sqlalchemy.select(sqlalchemy.func.pg_try_advisory_lock(self._number))
                ):
                    raise StudyHeld(
                        f"another driver holds study {study!r}: "
                        f"{self._holder(connection) or 'another process'}{WAIT_HINT}"
                    )
            yield Hold(driver, self, connection)
        finally:
            # `invalidate` also closes a connection that the database has dropped.
            connection.invalidate()
            connection.close()
            engine.dispose()

    def holder(self) -> str | None:
        """The driver that holds the study in a shared database, or None."""
        if not self.shared:
            return None
        with self.explained():
            engine = sqlalchemy.create_engine(
                self.url, poolclass=sqlalchemy.NullPool, **_named("ebbline")
            )
            with engine.connect() as connection:
                return self._holder(connection)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn database errors into DatabaseLost, with the database's message and without the SQL
        statement.
        """
        try:
            yield
        except SQLAlchemyError as error:
            raise self.unusable(error) from error
        except ImportError as error:
            raise StudyError(
                f"a PostgreSQL database needs psycopg, which is not installed ({error}): "
                "pip install 'ebbline[postgres]'"
            ) from error

    def unusable(self, error: BaseException) -> EbblineError:
        """StudyError for a damaged SQLite file; DatabaseLost when a later try may succeed."""
        cause = error.orig if isinstance(error, DBAPIError) else None
        operational = isinstance(cause, sqlite3.OperationalError)  # such as a locked file
        if isinstance(cause, sqlite3.DatabaseError) and not operational:
            return StudyError(
                f"{self._file} is no database any more: {_first_line(error)}. Restore it from a "
                "copy, or move it away: the finished stages are in the store, and the same "
                "command finds them there"
            )
        return DatabaseLost(self.explanation(error))

    def explanation(self, error: BaseException) -> str:
        message = _first_line(error)
        shown = sqlalchemy.make_url(self.url).render_as_string(hide_password=True)
        return (
            f"the database with the study's points, {shown}, cannot be used: {message}. "
            f"Restart it, or correct the address (`storage` in cluster.yaml, or {ENVIRONMENT}) "
            "or the password (PGPASSWORD, PGPASSFILE); the same command continues"
        )

    @property
    def _number(self) -> int:
        """The number of the PostgreSQL lock: 64 bits of the name's sha256."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big", signed=True)

    def _holder(self, connection: sqlalchemy.Connection) -> str | None:
        query = """
            select application_name from pg_locks join pg_stat_activity using (pid)
            where locktype = 'advisory' and granted and objsubid = 1
            and database = (select oid from pg_database where datname = current_database())
            and ((classid::bigint << 32) | objid::bigint) = :number"""
        found: str | None = connection.scalar(sqlalchemy.text(query), {"number": self._number})
        return found


@dataclass(frozen=True)
class Hold:
    """A held study and a description of its driver. `check` raises DatabaseLost when the lock may
    be lost.
    """

    driver: str
    database: PointDatabase
    _connection: sqlalchemy.Connection | None

    def check(self) -> None:
        if self._connection is not None:
            with self.database.explained():
                self._connection.execute(sqlalchemy.text("select 1"))


def sqlite_url(database: Path | str, query: Mapping[str, str] = {}) -> str:
    """The URL of an SQLite database in a file, whatever letters its path has."""
    url = sqlalchemy.URL.create("sqlite", database=str(database), query=query)
    return url.render_as_string()


def shared_url(profile_url: str | None) -> str | None:
    """The URL of the shared database, or None. Raises StudyError for a URL that is not PostgreSQL's
    or has a password.
    """
    given = os.environ.get(ENVIRONMENT) or profile_url
    if given is None:
        return None
    where = ENVIRONMENT if os.environ.get(ENVIRONMENT) else "`storage` in cluster.yaml"
    try:
        url = sqlalchemy.make_url(given)
    except (ArgumentError, ValueError):
        raise StudyError(
            f"{where} is not the URL of a database; write postgresql://user@host:5432/database"
        ) from None
    if url.password is not None or any("password" in name.lower() for name in url.query):
        shown = sqlalchemy.URL.create(
            url.drivername, url.username, None, url.host, url.port, url.database
        ).render_as_string()
        raise StudyError(
            f"{where} holds a password, which would end up in logs and copies: write "
            f"{shown} there, and give the password"
            " in the environment, as PGPASSWORD or in a file that PGPASSFILE names"
        )
    if url.get_backend_name() != "postgresql":
        raise StudyError(
            f"{where} asks for {url.get_backend_name()}; a shared database is "
            "PostgreSQL's, postgresql://user@host/database."
            " Without it each study keeps an SQLite file of its own"
        )
    return url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def _first_line(error: BaseException) -> str:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def _named(driver: str) -> dict[str, Any]:
    # PostgreSQL truncates names at 63 bytes.
    return {"connect_args": {"connect_timeout": CONNECT_S, "application_name": driver[:63]}}
