"""Where a study's points are kept: an SQLite file of its own, or a PostgreSQL database that many
studies share.

A shared database is asked for by URL, in cluster.yaml or EBBLINE_STORAGE:
`postgresql://user@host/database`. It never holds a password: that comes from PGPASSWORD, PGPASSFILE
or ~/.pgpass, which the driver of PostgreSQL reads by itself.

In a shared database a study is called `NAME@STORE`, where STORE stands for the store that its
artifacts are in. So two homes with stores of their own have studies of their own, and a new home
that names the same store by URL continues the study that is there.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from ebbline.tasks.errors import DatabaseLost, StudyError, StudyHeld

ENVIRONMENT = "EBBLINE_STORAGE"
CONNECT_S = 5
MEANWHILE = (
    "; `ebbline status` shows how far it is, and once it has ended the same command continues"
)


@dataclass(frozen=True)
class Storage:
    """A database and the name of one study in it. With `read_only`, nothing can be written through
    its connections.
    """

    url: str
    name: str
    read_only: bool = False

    def to_read(self) -> "Storage":
        """The same study, through connections that the database itself keeps from writing."""
        if self.shared:
            return replace(self, read_only=True)
        url = sqlalchemy.URL.create(
            "sqlite", database=f"file:{quote(self._file)}", query={"mode": "ro", "uri": "true"}
        )
        return replace(self, url=url.render_as_string(), read_only=True)

    @property
    def there(self) -> bool:
        """False while nothing was ever written: the first driver makes a study's file. A shared
        database is always there.
        """
        return self.shared or Path(self._file).exists()

    @property
    def _file(self) -> str:
        return str(sqlalchemy.make_url(self.url).database)

    @property
    def shared(self) -> bool:
        return not self.url.startswith("sqlite")

    @property
    def settings(self) -> dict[str, Any]:
        """What an engine of this database is made with."""
        if not self.shared:
            return {}
        only = {"options": "-c default_transaction_read_only=on"} if self.read_only else {}
        return {"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_S, **only}}

    @contextmanager
    def driving(self, study: str, driver: str) -> Iterator["Hold"]:
        """Hold the study in a shared database, for the length of a `with`: a home's own lock does
        not reach another machine's.

        Raises StudyHeld, naming the holder, when somebody else does. The lock is the connection's
        and goes with it.
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
                        f"study {study!r} is being driven already, by "
                        f"{self._holder(connection) or 'another process'}{MEANWHILE}"
                    )
            yield Hold(driver, self, connection)
        finally:
            # It closes a connection that the database has dropped, too; then there is nothing left
            # to give back.
            connection.invalidate()
            connection.close()
            engine.dispose()

    def holder(self) -> str | None:
        """Who drives the study in a shared database, or None."""
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
        """Turn whatever a database does wrong into one error, with its words and without its
        statement.
        """
        try:
            yield
        except SQLAlchemyError as error:
            raise DatabaseLost(self.told(error)) from error
        except ImportError as error:
            raise StudyError(
                f"a PostgreSQL storage needs psycopg, which is not installed ({error}): "
                "pip install 'ebbline[postgres]'"
            ) from error

    def told(self, error: BaseException) -> str:
        cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        words = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        shown = sqlalchemy.make_url(self.url).render_as_string(hide_password=True)
        return (
            f"the database with the study's points, {shown}, cannot be used: {words}. "
            "Start it again or mend the address"
            f" (`storage` in cluster.yaml, or {ENVIRONMENT}) or the password (PGPASSWORD, "
            "PGPASSFILE); the same command continues"
        )

    @property
    def _number(self) -> int:
        """What PostgreSQL calls the lock: 64 bits of the name's sha256."""
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
    """A study that is held, and the words for who holds it. `check` raises DatabaseLost when the
    lock may be somebody else's by now.
    """

    driver: str
    storage: Storage
    _connection: sqlalchemy.Connection | None

    def check(self) -> None:
        if self._connection is not None:
            with self.storage.explained():
                self._connection.execute(sqlalchemy.text("select 1"))


def shared_url(profile_url: str | None) -> str | None:
    """The URL of the shared database, if one is asked for. Raises StudyError for one that is no
    PostgreSQL's, or has a password.
    """
    given = os.environ.get(ENVIRONMENT) or profile_url
    if given is None:
        return None
    where = ENVIRONMENT if os.environ.get(ENVIRONMENT) else "`storage` in cluster.yaml"
    try:
        url = sqlalchemy.make_url(given)
    except (ArgumentError, ValueError):
        raise StudyError(
            f"{where} is no database's URL; it is written postgresql://user@host:5432/database"
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


def _named(driver: str) -> dict[str, Any]:
    # PostgreSQL cuts a name at 63 bytes.
    return {"connect_args": {"connect_timeout": CONNECT_S, "application_name": driver[:63]}}
