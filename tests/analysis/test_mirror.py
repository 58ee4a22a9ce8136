"""The W&B mirror: what it shows offline, that it goes on where it was, and that a broken W&B holds nothing up.

Nothing here reaches beyond the loopback: runs are offline, or the server is a closed or silent local port.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.mirror import start, stop, trainings_of
from analysis.wandb_runs import Mirror, chosen_mode
from cluster.store import Artifact, Store
from sweeps.points import Result
from sweeps.study import Study
from tasks.identity import digest
from tests.analysis.conftest import failed, result


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def training(tmp_path: Path) -> Artifact:
    hashed = {"kind": "train", "version": 1, "spec": {"rank": 8, "learning_rate": 0.0002}, "inputs": {}}
    store = Store(tmp_path / "store")
    attempt = store.begin("train", digest(hashed))
    (attempt / "payload" / "curve.csv").write_text("step,loss,learning_rate,tokens\n1,2.5,0.0002,512\n2,1.25,0.0001,500\n")
    return store.commit(attempt, hashed, {"seconds": 3.0})


def shown(folder: Path) -> dict[str, dict[str, Any]]:
    """Run id -> what W&B's own reader finds in its newest offline log."""
    found = {}
    for log in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(log)]
        read = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found[read["run_id"]] = read
    return found


def test_offline_runs_hold_points_trainings_and_the_study(study: Study, training: Artifact, tmp_path: Path) -> None:
    results = [result(0, refusal=0.4), failed(1, "out of memory"), Result(2, result(2, rank=2).point, "running")]
    mirror = Mirror(study, tmp_path, "offline")
    done = mirror.update(results, [training])
    mirror.close()
    assert (done.shown, done.left, done.error) == (3, 0, None)

    runs = shown(tmp_path)
    point, broken = (runs[f"ebb-{found.point.id}"] for found in results[:2])
    assert set(runs) == {"ebb", f"ebb-{training.key[:12]}", point["run_id"], broken["run_id"]}
    assert point["config"]["train"] == {"rank": 8}
    assert point["config"]["stages"] == dict(results[0].keys)
    assert point["summary"]["refusal/refusal_rate"] == 0.4
    assert point["summary"]["refusal/refusal_rate_n"] == 200
    assert point["summary"]["refusal/refusal_rate_low"] < 0.4
    assert (broken["exit_code"], broken["summary"]["reason"]) == (1, "out of memory")
    curve = runs[f"ebb-{training.key[:12]}"]
    assert (curve["summary"]["loss"], curve["step"], curve["config"]["train"]["rank"]) == (1.25, 2, 8)
    assert runs["ebb"]["step"] == 1
    assert runs["ebb"]["summary"]["hypervolume"] == pytest.approx(0.4 * 0.5)
    assert runs["ebb"]["summary"]["frontier"] == [0]
    assert "40.0 [33.5, 46.9]" in runs["ebb"]["notes"]


def test_no_file_goes_with_the_runs(study: Study, training: Artifact, tmp_path: Path) -> None:
    mirror = Mirror(study, tmp_path, "offline")
    mirror.update([result(0)], [training])
    mirror.close()
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file() and "files" in path.parts]
    assert files == []
    logs = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*.wandb"))
    for private in (str(tmp_path), str(Path.home()), sys.executable):
        assert private.encode() not in logs


def test_a_restart_goes_on_and_shows_only_what_is_new(study: Study, training: Artifact, tmp_path: Path) -> None:
    first = Mirror(study, tmp_path, "offline")
    assert first.update([result(0)], [training]).shown == 2
    first.close()
    again = Mirror(study, tmp_path, "offline")
    assert again.update([result(0)], [training]).shown == 0
    assert again.update([result(0), result(1, refusal=0.9)], [training]).shown == 1
    again.close()
    assert shown(tmp_path)["ebb"]["step"] == 2


def test_a_mirror_that_died_shows_the_study_again(study: Study, tmp_path: Path) -> None:
    died = Mirror(study, tmp_path, "offline")
    died.update([result(0)], [])
    again = Mirror(study, tmp_path, "offline")
    assert again.update([result(0)], []).shown == 0
    again.close()
    died.close()
    assert len(list((tmp_path / "wandb").glob("offline-run-*-ebb*"))) == 3


def test_a_failed_point_that_is_finished_later_is_shown_again(study: Study, tmp_path: Path) -> None:
    broken = failed(0)
    mirror = Mirror(study, tmp_path, "offline")
    assert mirror.update([broken], []).shown == 1
    assert mirror.update([Result(0, broken.point, "done", result(0).metrics)], []).shown == 1
    mirror.close()


def test_what_was_shown_offline_is_still_new_to_a_server(study: Study, tmp_path: Path) -> None:
    mirror = Mirror(study, tmp_path, "offline")
    mirror.update([result(0)], [])
    mirror.close()
    assert Mirror(study, tmp_path, "online")._shown() == {}


def test_a_training_whose_files_were_dropped_is_shown_without_its_curve(study: Study, training: Artifact, tmp_path: Path) -> None:
    (training.path / "curve.csv").unlink()
    assert Mirror(study, tmp_path, "offline").update([], [training]).error is None


def test_trainings_are_found_by_the_stages_name(training: Artifact, tmp_path: Path) -> None:
    keys = {"train[seed=0]": training.key, "train[seed=1]": "0" * 64, "refusal[seed=0]": "1" * 64}
    twice = [Result(n, result(n).point, "done", result(n).metrics, keys=keys) for n in (0, 1)]
    assert trainings_of(twice, Store(tmp_path / "store")) == [training]


def test_disabled_touches_nothing(study: Study, tmp_path: Path) -> None:
    assert Mirror(study, tmp_path, "disabled").update([result(0)], []).shown == 0
    assert list(tmp_path.iterdir()) == []


def test_the_mode_is_what_was_asked_or_follows_the_login(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_mode({"WANDB_MODE": "disabled"}) == "disabled"
    assert chosen_mode({"WANDB_MODE": "dryrun"}) == "offline"
    assert chosen_mode({"WANDB_MODE": "online"}) == "online"
    assert chosen_mode({}) == "offline"


def _online(study: Study, folder: Path, port: int) -> tuple[Any, float]:
    """An update against a local port, in a process of its own because wandb keeps the first server that it met."""
    code = (
        "import sys; from pathlib import Path; from sweeps.study import Study;"
        "from analysis.wandb_runs import Mirror; from tests.analysis.conftest import result;"
        "study = Study.model_validate_json(sys.stdin.read());"
        f"mirror = Mirror(study, Path({str(folder)!r}), 'online', bound_s=5, call_s=4);"
        "done = mirror.update([result(0), result(1, refusal=0.9)], []); mirror.close(); print(done.shown, done.left, done.error)"
    )
    environment = os.environ | {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40}
    began = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-c", code], input=study.model_dump_json(), env=environment, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split(maxsplit=2), time.monotonic() - began


def test_an_absent_server_is_reported_and_holds_nothing_up(study: Study, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    (count, left, error), took = _online(study, tmp_path, port)
    assert (count, left) == ("0", "2")
    assert error.strip() not in ("", "None")
    assert took < 25


def test_a_silent_server_is_reported_and_holds_nothing_up(study: Study, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (count, left, error), took = _online(study, tmp_path, silent.getsockname()[1])
    assert (count, left) == ("0", "2")
    assert error.strip() not in ("", "None")
    assert took < 25


def test_the_process_ends_when_its_input_closes(study: Study, tmp_path: Path) -> None:
    path = tmp_path / "ebb.yaml"
    path.write_text(yaml.safe_dump(study.model_dump(mode="json", exclude_unset=True)))
    log = tmp_path / "mirror.log"
    process = start(str(path), tmp_path / "home", log)
    assert process.poll() is None
    assert stop(process, 30.0), log.read_text()
    assert "mirroring ebb, offline" in log.read_text()


def test_the_process_needs_neither_torch_nor_ray() -> None:
    code = "import sys, analysis.mirror, wandb; assert not {'torch', 'ray'} & set(sys.modules), 'torch or ray was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_whatever_breaks_is_reported_and_not_raised(
    study: Study, training: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no service\nwith details below")

    monkeypatch.setattr(Mirror, "_open", broken)
    done = Mirror(study, tmp_path, "offline").update([result(0)], [])
    assert (done.shown, done.left, done.error) == (0, 1, "RuntimeError: no service")
    (training.path / "curve.csv").write_text("step,loss\nnot a number,1\n")
    assert "ValueError" in str(Mirror(study, tmp_path, "offline").update([], [training]).error)
