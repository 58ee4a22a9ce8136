"""Offline runs reach a server: W&B's own client pushes to a real HTTP server on the loopback."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ebbline.analysis.wandb.memory import Memory
from ebbline.analysis.wandb.push import push
from ebbline.analysis.wandb.runs import Mirror
from ebbline.cluster.profile import Profile
from ebbline.sweeps.study.study import Study
from tests.analysis.conftest import result
from tests.wandb_server import Run, WandbServer, serving

pytestmark = pytest.mark.usefixtures("no_wandb_login")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's folder with five offline runs: four points and the study's own."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def folder(kept: Path, study: Study, tmp_path: Path) -> Path:
    if not (kept / "wandb").exists():
        mirror = Mirror(study, kept, "offline", "0123456789abcdef", Profile(wandb_points=4))
        done = mirror.update(
            [result(number, rank=number + 1, refusal=0.1 * number) for number in range(6)], []
        )
        mirror.close()
        assert done.error is None
    shutil.copytree(kept, tmp_path / "study", symlinks=True)
    return tmp_path / "study"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with serving() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


def waiting(folder: Path) -> list[Path]:
    return list(Memory(folder, "offline").waiting())


def pushed(folder: Path, **more: Any) -> Any:
    return push(folder, waiting(folder), 4, lambda done: None, folder / "log" / "sync.log", **more)


@pytest.mark.process
def test_pushed_runs_hold_what_was_kept(
    folder: Path, server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert len(waiting(folder)) == 5
    done = pushed(folder)
    assert (done.pushed, done.left, done.why) == (5, 0, ""), (
        folder / "log" / "sync.log"
    ).read_text()
    assert server.unknown == [] and not list((tmp_path / "here").iterdir())
    points = [run for run in server.runs.values() if run.fields["jobType"] == "point"]
    assert sorted(run.summary["refusal/refusal_rate"] for run in points) == [0.0, 0.1, 0.2, 0.3]
    assert sorted(run.config["train"]["value"]["rank"] for run in points) == [1, 2, 3, 4]
    assert all(run.exit_code == 0 for run in server.runs.values())

    own = server.runs["ebb-012345"]
    assert [own.history[line]["finished"] for line in range(6)] == [1, 2, 3, 4, 5, 6]
    assert own.config["_wandb"]["value"]["visualize"]["points"]["panel_config"][
        "fieldSettings"
    ] == {
        "x": "refusal rate",
        "y": "task accuracy",
    }
    table = json.loads(own.files[own.summary["points_table"]["path"]])
    assert {"point", "model", "rank", "refusal rate", "refusal rate low", "on frontier"} <= set(
        table["columns"]
    )
    assert [row[table["columns"].index("rank")] for row in table["data"]] == [1, 2, 3, 4, 5, 6]
    assert not any(run.fields.get("host") for run in server.runs.values())
    for private in (str(folder), str(folder.parent), str(Path.home()), sys.executable):
        assert not [body for body in server.bodies if private.encode() in body], private


@pytest.mark.process
def test_a_pushed_run_is_not_pushed_twice(folder: Path, server: WandbServer) -> None:
    pushed(folder)
    assert waiting(folder) == []
    requests = len(server.operations)
    assert (pushed(folder).pushed, len(server.operations)) == (0, requests)


def finished_in(run: Run) -> list[int]:
    """The points finished, as the rows of a study's run have them; its charts have rows too."""
    return [row["finished"] for _, row in sorted(run.history.items()) if "finished" in row]


@pytest.mark.process
def test_an_interrupted_run_is_resent_with_the_same_content(
    folder: Path, server: WandbServer
) -> None:
    pushed(folder)
    before = {id: (run.history, run.summary) for id, run in server.runs.items()}
    for marker in folder.glob("wandb/offline-run-*/*.synced"):
        marker.unlink()
    assert pushed(folder).pushed == 5
    assert {id: (run.history, run.summary) for id, run in server.runs.items()} == before


@pytest.mark.process
def test_a_run_that_was_interrupted_within_its_history_has_duplicate_first_rows(
    folder: Path, server: WandbServer
) -> None:
    """W&B's client appends to the server's rows, as docs/wandb.md states.

    This test fails once the client no longer does.
    """
    pushed(folder)
    cut = server.runs["ebb-012345"]
    for line in [line for line in cut.history if line >= 5]:
        del cut.history[line]
    cut.exit_code = None
    for marker in folder.glob("wandb/offline-run-*/*.synced"):
        marker.unlink()
    assert pushed(folder).pushed == 5
    assert finished_in(cut) == [
        1,
        2,
        3,
        4,
        5,
        1,
        2,
        3,
        4,
        5,
        6,
    ]


@pytest.mark.process
def test_later_results_are_added_to_the_pushed_run(
    folder: Path, server: WandbServer, study: Study
) -> None:
    pushed(folder)
    results = [result(number, rank=number + 1, refusal=0.1 * number) for number in range(8)]
    mirror = Mirror(study, folder, "offline", "0123456789abcdef", Profile(wandb_points=4))
    mirror.update(results, [])
    mirror.close()
    assert (len(waiting(folder)), pushed(folder).pushed) == (1, 1)
    own = server.runs["ebb-012345"]
    assert [row["finished"] for _, row in sorted(own.history.items()) if "hypervolume" in row] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
    ]
    assert len(json.loads(own.files[own.summary["points_table"]["path"]])["data"]) == 8


@pytest.mark.process
def test_an_online_mirror_counts_pushed_rows_as_shown(folder: Path, server: WandbServer) -> None:
    assert not Memory(folder, "online").rows("ebb-012345")
    pushed(folder)
    assert Memory(folder, "online").rows("ebb-012345") == 6


@pytest.mark.process
def test_several_are_pushed_at_once(folder: Path, server: WandbServer) -> None:
    server.together = 2
    pushed(folder)
    assert 2 <= server.most_at_work <= 4


@pytest.mark.process
def test_a_kill_in_the_middle_is_continued(folder: Path, server: WandbServer) -> None:
    code = (
        "import sys; from pathlib import Path; from ebbline.analysis.wandb.memory import "
        "Memory; from ebbline.analysis.wandb.push import push;"
        "folder = Path(sys.argv[1]);"
        "push(folder, list(Memory(folder, 'offline').waiting()), 1, lambda done: "
        "print(done, flush=True), folder / 'sync.log')"
    )
    server.slow_s = 1.0
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert int(process.stdout.readline()) < 5
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    server.slow_s = 0.0
    left = len(waiting(folder))
    assert 0 < left < 5
    for _ in range(1200):  # W&B's service may end shortly after the process that it serves
        done = pushed(folder)
        if not done.why.startswith("another"):
            break
        time.sleep(0.1)
    assert (done.pushed, done.left) == (left, 0)
    rows = finished_in(server.runs["ebb-012345"])
    assert rows[-6:] == [1, 2, 3, 4, 5, 6], "resent from the first row"
    assert rows[:-6] == [1, 2, 3, 4, 5, 6][: len(rows) - 6], (
        "W&B's client appends, if the kill came within the history"
    )
    assert len(server.runs) == 5


@pytest.mark.process
def test_a_push_to_a_silent_server_ends(folder: Path, server: WandbServer) -> None:
    server.slow_s = 60.0
    done = pushed(folder, stalled_s=4.0)
    assert (done.pushed, done.left, done.why) == (0, 5, "no run was pushed for 4 s")


def test_a_study_has_one_push_at_a_time(folder: Path, server: WandbServer) -> None:
    import fcntl

    with (folder / "wandb" / "push.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert pushed(folder).why == "another process is pushing these runs"
    assert server.operations == []
