"""Points in a real PostgreSQL: the same proposals as on SQLite, one driver at a time, and one clear
error when the database stops.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest
import yaml
from optuna.exceptions import StorageInternalError

from ebbline.options import LOST
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.search.searcher import StudySearcher, all_points, reaching
from ebbline.sweeps.state.trials import opened, settings_mark
from ebbline.sweeps.study.database import PointDatabase, shared_url
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import DatabaseLost, StudyError, StudyHeld
from tests.postgres import MISSING, PASSWORD, Postgres, binaries, running
from tests.sweeps.made import Imagined, outcome, study, written

AXES = {
    "axes": {"train.rank": [2, 4, 8], "data.size": [16, 32], "apply.threshold": [None, 0.3, 0.5]}
}
SEARCH = {**AXES, "search": {"sampler": "tpe", "window": 3, "points": 10}}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def own_postgres(monkeypatch):
    """A server that only this test uses and may stop."""
    if binaries() is None:
        pytest.skip(MISSING)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    with running() as found:
        yield found


def home_at(root: Path, postgres: Postgres, **profile: str) -> Home:
    root.mkdir(parents=True, exist_ok=True)
    (root / "cluster.yaml").write_text(yaml.safe_dump({"storage": postgres.url, **profile}))
    return Home(root)


def follow(found, storage: PointDatabase, restart_every: int = 1000):
    """Search to the end, oldest point first, with a new searcher (as after a kill) after every
    `restart_every` steps.
    """
    while True:
        searcher = StudySearcher(found, storage)
        in_flight = list(searcher.in_flight())
        for _ in range(restart_every):
            if (
                len(in_flight) < found.search.window
                and (new := searcher.ask(Imagined())) is not None
            ):
                in_flight.append(new)
            elif in_flight:
                number, point = in_flight.pop(0)
                searcher.tell(number, outcome(number, point))
            else:
                return all_points(found, storage)


def test_a_repeatedly_killed_search_on_postgres_proposes_the_points_of_one_on_sqlite(
    tmp_path, postgres
):
    found = study(tmp_path, SEARCH)
    plain = follow(found, Home(tmp_path / "sqlite").database("tiny"))
    assert len(plain) == 10
    assert (
        follow(found, home_at(tmp_path / "one", postgres).database("tiny"), restart_every=3)
        == plain
    )


def test_homes_with_different_stores_have_different_studies_and_a_shared_store_shares_them(
    tmp_path, postgres
):
    one, other = (home_at(tmp_path / name, postgres).database("tiny") for name in ("one", "other"))
    assert one.name != other.name and one == Home(tmp_path / "one").database("tiny")
    shared = [
        home_at(tmp_path / name, postgres, store="s3://bucket/store").database("tiny")
        for name in ("third", "fourth")
    ]
    assert shared[0] == shared[1] and shared[0].name not in (one.name, other.name)
    found = study(tmp_path, SEARCH)
    StudySearcher(found, shared[0]).ask(Imagined())
    assert len(all_points(found, shared[1])) == 1 and all_points(found, one) == []
    begun = StudyView(
        found, home_at(tmp_path / "third", postgres, store="s3://bucket/store")
    ).begun_as()
    assert settings_mark(shared[1]) == begun and settings_mark(one) is None
    with pytest.raises(
        StudyError, match="'tiny' was begun in the shared database, as 'tiny@.*with other settings"
    ):
        StudySearcher(study(tmp_path, {**SEARCH, "seeds": [1]}), shared[1])
    StudySearcher(study(tmp_path, {**SEARCH, "budget": {"hours": 1.0}}), shared[1])


HOLD = """
import sys, time
from pathlib import Path
from ebbline.sweeps.study.home import Home
with Home(Path(sys.argv[1])).driving("tiny"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_homes_that_share_a_store_are_held_apart_by_the_database(tmp_path, postgres, bucket):
    home, same = (home_at(tmp_path / name, postgres, store=bucket) for name in ("one", "two"))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home.root)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(
                StudyHeld, match=rf"another driver holds study 'tiny': process {holder.pid} on "
            ),
            same.driving("tiny"),
        ):
            raise AssertionError("two drivers")
        assert f"process {holder.pid} " in same.holder("tiny")
        command = [
            sys.executable,
            "-m",
            "ebbline.cli",
            "run",
            str(written(tmp_path)),
            "--home",
            str(same.root),
            "--no-wandb",
        ]
        second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert second.returncode == 4 and f"process {holder.pid}" in second.stderr, second.stderr
    finally:
        holder.kill()
        holder.wait()
    deadline = time.monotonic() + 120
    while same.holder("tiny") is not None:
        assert time.monotonic() < deadline
    with same.driving("tiny"):
        pass


def test_a_restarted_database_ends_the_run_with_one_error_and_the_next_goes_on(
    tmp_path, own_postgres
):
    home, found = home_at(tmp_path / "home", own_postgres), study(tmp_path, SEARCH)
    storage = home.database("tiny")
    plain = follow(found, Home(tmp_path / "sqlite").database("tiny"))
    restarted = False
    with (
        pytest.raises(DatabaseLost, match="the same command continues"),
        home.driving("tiny") as hold,
        reaching(storage),
    ):
        searcher = StudySearcher(found, storage)
        for _ in range(3):
            hold.check()
            searcher.ask(Imagined())
        own_postgres.stop()
        own_postgres.start()
        restarted = True
        hold.check()
    assert restarted
    assert follow(found, storage) == plain


def test_a_database_that_stops_within_a_proposal_is_one_error_too(
    tmp_path, own_postgres, monkeypatch
):
    home, found = home_at(tmp_path / "home", own_postgres), study(tmp_path, SEARCH)
    storage = home.database("tiny")
    searcher = StudySearcher(found, storage)
    own_postgres.stop()
    try:
        with pytest.raises(DatabaseLost, match="cannot be used: "), reaching(storage):
            searcher.ask(Imagined())
        tries, connect = [], psycopg.connect
        monkeypatch.setattr(
            psycopg, "connect", lambda *at, **how: tries.append(how) or connect(*at, **how)
        )
        with pytest.raises(DatabaseLost, match=r"127\.0\.0\.1.*cannot be used"):
            drive(StudyView(found, home), lambda: pytest.fail("an executor was made"))
        assert len(tries) == 1, "it is tried once only"
    finally:
        own_postgres.start()


def test_status_works_on_postgres_and_its_error_does_not_repeat_the_password(tmp_path, postgres):
    home = home_at(tmp_path / "home", postgres)
    StudySearcher(study(tmp_path, SEARCH), home.database("tiny")).ask(Imagined())
    command = [
        sys.executable,
        "-m",
        "ebbline.cli",
        "status",
        str(tmp_path / "study.yaml"),
        "--home",
        str(home.root),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and "0 points done, 1 in flight" in done.stdout, done.stderr
    environ = {**os.environ, "PGPASSWORD": "wrong-secret"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=environ
    )
    assert (
        done.returncode == LOST
        and "password authentication failed" in done.stderr
        and "PGPASSFILE" in done.stderr
    )
    assert (
        "wrong-secret" not in "".join((done.stdout + done.stderr).split())
        and "Traceback" not in done.stderr
    )


def test_the_database_rejects_writes_of_a_reader(tmp_path, postgres):
    home = home_at(tmp_path / "home", postgres)
    StudySearcher(study(tmp_path, SEARCH), home.database("tiny")).ask(Imagined())
    storage = opened(home.database("tiny").to_read())
    number = storage.get_study_id_from_name(home.database("tiny").name)
    assert len(storage.get_all_trials(number)) == 1
    with pytest.raises(StorageInternalError) as failed:
        storage.set_study_user_attr(number, "mine", 1)
    assert "read-only transaction" in str(failed.value.__cause__)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hush@host/db",
        "postgresql+psycopg://me:hu%40sh@host:5/db",
        "postgresql://me@host/db?password=hush",
    ],
)
def test_a_password_in_the_url_is_an_error_that_does_not_repeat_it(url, monkeypatch):
    with pytest.raises(
        StudyError,
        match=r"holds a password.*write postgresql.*://me@host(:5)?/db there.*PGPASSWORD",
    ) as caught:
        shared_url(url)
    assert "hush" not in str(caught.value) and "hu%40sh" not in str(caught.value)
    monkeypatch.setenv("EBBLINE_STORAGE", url)
    with pytest.raises(StudyError, match="^EBBLINE_STORAGE holds a password"):
        shared_url(None)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://me@host/db", "asks for mysql"),
        ("sqlite:///x.db", "asks for sqlite"),
        ("here", "is not the URL of a database"),
    ],
)
def test_a_url_that_is_not_postgres_is_an_error(url, message):
    with pytest.raises(StudyError, match=message):
        shared_url(url)
    assert shared_url(None) is None
