"""Faults of the disk, of the clock and by kills: what was there before is there after."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from ebbline.analysis.results.collect import collect
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.view import StudyView
from tests.hostile.killed import OPERATIONS
from tests.sweeps.made import study
from tests.sweeps.pretended import Pretended

ROOT = Path(__file__).parents[2]


def _found_by(module: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.hostile.{module}", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _found_by("killed", tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed; on Debian: apt-get install strace")
    attached = subprocess.run(
        ["sh", "-c", "sleep 1 & strace -o /dev/null -p $!"],
        capture_output=True,
        text=True,
    )
    if "attached" not in attached.stderr:
        pytest.skip(f"strace may not attach to a process here: {attached.stderr.strip()}")
    return _found_by("syscalls", tmp_path_factory.mktemp("traced"))


@pytest.mark.process
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kill_at_any_write_a_full_disk_and_a_read_only_one_lose_nothing(
    outcome: dict[str, Any], operation: str
) -> None:
    found = outcome[operation]
    assert found["lost"] == []
    assert found["kills"] >= 2 and found["limits"] >= 5 and found["refusals"] == 1


@pytest.mark.process
@pytest.mark.timeout(900)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kill_or_an_error_at_any_system_call_loses_nothing_and_leaves_nothing(
    traced: dict[str, Any], operation: str
) -> None:
    """Only here the system itself fails, at each call of every thread: 40 s."""
    found = traced[operation]
    assert found["lost"] == []
    assert found["kills"] >= 1 and found["errors"] >= 3


@pytest.mark.process
@pytest.mark.timeout(900)
def test_full_and_read_only_disks_and_homes_of_another_user_lose_nothing(tmp_path: Path) -> None:
    """Only here are real mounts and a second user: 70 s."""
    unshare = ["unshare", "--mount"]
    allowed = [*unshare, "mount", "-t", "tmpfs", "none", "/mnt"]
    if os.geteuid() or subprocess.run(allowed, capture_output=True).returncode:
        pytest.skip("only root with mounts of its own can fill a disk and be another user")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's may not be read by others
        done = subprocess.run(
            [*unshare, sys.executable, "-m", "tests.hostile.other_places", folder],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=800,
        )
    assert done.returncode == 0, done.stderr
    wrong = {case: found for case, found in json.loads(done.stdout).items() if found}
    assert wrong == {}


def _driven(folder: Path) -> list[tuple[str, str, dict[str, float | None]]]:
    home = Home(folder / "home")
    found = study(folder, {"axes": {"train.rank": [2], "apply.threshold": [None, 0.3]}})
    view = StudyView(found, home)
    drive(view, lambda: Pretended(home.store))
    return [
        (str(each.point), each.status, {name: value.value for name, value in each.metrics.items()})
        for each in collect(view)
    ]


@pytest.mark.slow
def test_a_clock_that_goes_backwards_changes_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    expected = _driven(tmp_path / "one")
    now = [time.time()]

    def backwards() -> float:
        now[0] -= 3600.0
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    assert _driven(tmp_path / "two") == expected
