"""A mirror that goes on through an outage: its own process recovers, nothing is lost or twice.

Each test has a mirror in a process of its own, with runs open as the fault begins, against the
server of tests/wandb_server.py.
"""

import subprocess
from pathlib import Path

import pytest

from ebbline.sweeps.study.study import Study
from tests.analysis.mirror_process import MirrorProcess
from tests.analysis.test_mirror import EBB
from tests.wandb_server import WandbServer, serving

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_wandb_login")]
POINTS = 3


def shown_once(server: WandbServer) -> bool:
    """Whether the server has each point as a run, and each step of the growth once, in order."""
    own = server.runs[EBB]
    grown = [row["finished"] for _, row in sorted(own.history.items()) if "hypervolume" in row]
    points = [run for run in server.runs.values() if run.fields["jobType"] == "point"]
    ended = {run.exit_code for run in server.runs.values()}
    return (grown, len(points), ended) == (list(range(1, POINTS + 1)), POINTS, {0})


def test_a_key_that_expires_while_runs_are_open_stops_nothing_for_good(
    study: Study, tmp_path: Path
) -> None:
    """W&B's client refuses a run for ever once it could not begin it; the mirror goes on."""
    with serving() as server:
        mirror = MirrorProcess(study, tmp_path, server)
        assert mirror.update(1) is None
        server.always = 401
        assert "401" in str(mirror.update(2)) and "401" in str(mirror.update(2))
        server.always = None
        assert mirror.update(POINTS) is None
        mirror.close()
        assert shown_once(server)


def test_after_an_hour_without_a_network_everything_is_shown_once(
    study: Study, tmp_path: Path
) -> None:
    """The hour is compressed: each of two updates runs into its time limit."""
    with serving() as server:
        mirror = MirrorProcess(study, tmp_path, server)
        assert mirror.update(1) is None
        server.always = "dropped"
        assert mirror.update(2) is not None and mirror.update(2) is not None
        server.always = None
        assert mirror.update(POINTS) is None
        mirror.close()
        assert shown_once(server)


def test_clocks_that_are_hours_off_and_jump_change_nothing(study: Study, tmp_path: Path) -> None:
    """The mirror's clock goes 6 h ahead, then 6 h back; the server's is 6 h behind."""
    with serving() as server:
        server.clock_s = -6 * 3600.0
        mirror = MirrorProcess(study, tmp_path, server)
        for points, clock_s in enumerate((6 * 3600, -6 * 3600, 0), 1):
            mirror.tell(f"clock {clock_s}")
            assert mirror.update(points) is None
        mirror.close()
        assert shown_once(server)


def may_mount() -> bool:
    return subprocess.run(["unshare", "-Urm", "true"], check=False).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="this machine lets no user mount a file system")
def test_a_disk_that_fills_under_the_mirror_loses_nothing_once_it_has_space(
    study: Study, tmp_path: Path
) -> None:
    with serving() as server:
        mirror = MirrorProcess(study, tmp_path / "small", server, small_disk=True)
        assert mirror.update(1) is None
        assert "No space left" in mirror.tell("fill")
        assert "space left" in str(mirror.update(2))
        mirror.tell("free")
        assert mirror.update(POINTS) is None
        mirror.close()
        assert shown_once(server)
