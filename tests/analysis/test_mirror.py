"""The W&B mirror: its offline runs, that it resumes, and that a broken W&B delays nothing.

No test connects beyond the loopback: runs are offline, or the server is a closed or silent local
port.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from ebbline.analysis.report.attempts import Attempts
from ebbline.analysis.results.costs import growth
from ebbline.analysis.results.wording import HOST
from ebbline.analysis.wandb.memory import Memory
from ebbline.analysis.wandb.mirror import alone, follow, start, stop, trainings_of
from ebbline.analysis.wandb.pages import RunPage, pages, run_id
from ebbline.analysis.wandb.runs import STEPS_A_POINT, Mirror, chosen_mode
from ebbline.cluster.profile import GpuType, Profile
from ebbline.cluster.store.artifacts import Artifact, Store
from ebbline.commands.run import _let_go
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.identity import digest
from tests.analysis.conftest import REFUSAL, TASK, failed, result
from tests.wandb_server import serving

pytestmark = pytest.mark.usefixtures("no_wandb_login")

HOME_ID = "0123456789abcdef"
EBB = "ebb-012345"  # the study's own run


@pytest.fixture
def training(tmp_path: Path) -> Artifact:
    hashed = {
        "kind": "train",
        "version": 1,
        "spec": {"rank": 8, "learning_rate": 0.0002},
        "inputs": {},
    }
    store = Store(tmp_path / "store")
    attempt = store.begin("train", digest(hashed))
    (attempt / "payload" / "curve.csv").write_text(
        "step,loss,learning_rate,tokens\n1,2.5,0.0002,512\n2,1.25,0.0001,500\n"
    )
    return store.commit(attempt, hashed, {"seconds": 3.0})


def shown(folder: Path) -> dict[str, dict[str, Any]]:
    """Run id -> content of its newest offline log, by W&B's own reader."""
    found = {}
    for log in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        command = [
            sys.executable,
            "-m",
            "wandb",
            "leet",
            "inspect",
            "--summary",
            "--json",
            str(log),
        ]
        read = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
        found[read["run_id"]] = read
    return found


def records(folder: Path, id: str) -> list[dict[str, Any]]:
    """The records of a run's newest offline log."""
    log = sorted((folder / "wandb").glob(f"offline-run-*/run-{id}.wandb"))[-1]
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    return [
        json.loads(line)
        for line in subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.splitlines()
    ]


def table(folder: Path, id: str, named: dict[str, Any]) -> dict[str, Any]:
    """The table that a run's summary references."""
    (path,) = [
        log.parent / "files" / named["path"]
        for log in sorted((folder / "wandb").glob(f"offline-run-*/run-{id}.wandb"))[-1:]
    ]
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _job(number: int, end_s: float, gpus: int) -> list[dict[str, Any]]:
    """An hour of one GPU, or half an hour of two, for the last stage of a point."""
    key, start_s = f"{number:064x}", end_s - 3600.0 / gpus
    started = {
        "start": f"j{number}",
        "gpus": [[None, gpus]],
        "hosts": {"h": gpus},
        "keys": [key],
        "s": start_s,
    }
    return [started, {"end": f"j{number}", "s": end_s}]


@pytest.mark.process
def test_offline_runs_hold_points_trainings_and_the_study(
    study: Study, training: Artifact, tmp_path: Path
) -> None:
    results = [
        result(0, refusal=0.4),
        failed(1, "out of memory"),
        Result(2, result(2, rank=2).point, "running"),
    ]
    mirror = Mirror(study, tmp_path, "offline", HOME_ID)
    done = mirror.update(results, [training])
    mirror.close()
    assert (done.shown, done.left, done.error) == (3, 0, None)

    runs = shown(tmp_path)
    point, broken = (runs[f"{EBB}-{found.point.id}"] for found in results[:2])
    assert set(runs) == {EBB, f"{EBB}-{training.key[:12]}", point["run_id"], broken["run_id"]}
    assert point["config"] == {
        "model": "small",
        "train": {"rank": 8},
        "data": {"size": 100},
        "apply": {"threshold": None},
    }
    assert point["summary"]["stages"] == dict(results[0].keys)
    assert point["summary"]["refusal/refusal_rate"] == 0.4
    assert point["summary"]["refusal/refusal_rate_n"] == 200
    assert point["summary"]["refusal/refusal_rate_low"] < 0.4
    assert (broken["exit_code"], broken["summary"]["reason"]) == (1, "out of memory")
    curve = runs[f"{EBB}-{training.key[:12]}"]
    assert (curve["summary"]["loss"], curve["step"], curve["config"]["train"]["rank"]) == (
        1.25,
        2,
        8,
    )
    assert runs[EBB]["step"] // STEPS_A_POINT == 1
    assert runs[EBB]["summary"]["hypervolume"] == pytest.approx(0.4 * 0.5)
    assert runs[EBB]["summary"]["frontier"] == [0]
    assert "40.0 [33.5, 46.9]" in runs[EBB]["notes"]


@pytest.mark.process
def test_runs_have_only_tables_as_files_and_no_path_or_host_of_this_machine(
    study: Study, training: Artifact, tmp_path: Path
) -> None:
    mirror = Mirror(study, tmp_path, "offline", HOME_ID)
    mirror.update(
        [result(0), failed(1, f"TrainingError: no such file {tmp_path}/store/x.json")], [training]
    )
    mirror.close()
    kept = [
        path
        for path in (tmp_path / "wandb").rglob("*")
        if path.is_file() and "files" in path.relative_to(tmp_path).parts
    ]
    assert kept and all(path.name.endswith(".table.json") for path in kept)
    logs = list((tmp_path / "wandb").rglob("*.wandb"))
    assert len(logs) == 4 and any(b"x.json" in log.read_bytes() for log in logs), (
        "the logs hold the text unencoded"
    )
    kept += logs
    for private in (str(tmp_path), str(Path.home()), sys.executable):
        assert not [path for path in kept if private.encode() in path.read_bytes()], private
    runs = [record["run"] for record in records(tmp_path, EBB) if "run" in record]
    assert runs and not any(run.get("host") for run in runs)


def test_hosts_of_the_study_are_removed_from_reasons(study: Study, tmp_path: Path) -> None:
    ended = {
        "kind": "train",
        "label": "t",
        "key": "k",
        "host": "gpu-12/0123",
        "gpus": 1,
        "started": 0.0,
        "ended": 1.0,
        "outcome": "lost",
    }
    (tmp_path / "timeline.jsonl").write_text(json.dumps(ended) + "\n")
    shown: list[RunPage] = []
    mirror = Mirror(study, tmp_path, "offline", HOME_ID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror, "_show", shown.append)
        assert mirror.update([failed(0, "the node gpu-12 was lost")], []).error is None
    assert [page.summary["reason"] for page in shown] == [f"the node {HOST} was lost"]


def test_studies_of_the_same_name_in_two_homes_have_different_runs(
    study: Study, training: Artifact
) -> None:
    ids = [
        {page.id for page in pages(study, [result(0)], [training], Profile(), home)}
        for home in (HOME_ID, "f" * 32)
    ]
    assert len(ids[0]) == len(ids[1]) == 2 and not ids[0] & ids[1]
    assert run_id(study, HOME_ID) != run_id(study, "f" * 32)


@pytest.mark.process
def test_the_study_run_has_its_frontier_points_and_growth_of_the_hypervolume(
    study: Study, tmp_path: Path
) -> None:
    ledger = (
        {"driver": "a", "s": 0.0},
        *(line for number in (1, 0) for line in _job(number, 3600.0 * (2 - number), 1)),
        {"driver": "b", "s": 0.0},
        *_job(2, 1800.0, 2),
    )
    (tmp_path / "spending.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledger))
    results = [
        result(0, refusal=0.2, task=0.5),
        result(1, refusal=0.4, task=0.5),
        result(2, model="medium", refusal=0.3, task=0.6),
    ]
    mirror = Mirror(
        study, tmp_path, "offline", HOME_ID, Profile(gpus={"other": GpuType(usd_per_hour=2.0)})
    )
    assert mirror.update(results, []).error is None
    mirror.close()

    own = records(tmp_path, EBB)
    history = [record["history"]["item"] for record in own if record["type"] == "history"]
    grown = [row for row in history if "hypervolume" in row]
    assert [row["finished"] for row in grown] == [1, 2, 3]
    assert [row["hours"] for row in grown] == pytest.approx([1.0, 2.0, 2.5])
    assert [row["gpu_hours"] for row in grown] == pytest.approx([1.0, 2.0, 3.0])
    assert [row["hypervolume"] for row in grown] == pytest.approx(
        [0.4 * 0.5, 0.4 * 0.5, 0.4 * 0.5 + 0.3 * 0.1]
    )
    assert [row["hypervolume/over_usd"] for row in grown] == pytest.approx(
        [each.corrected for each in growth(results, [REFUSAL, TASK], tmp_path)]
    )
    steps = {
        record["metric"]["name"]: record["metric"].get("step_metric")
        for record in own
        if "name" in record.get("metric", {})
    }
    assert (steps["hypervolume/over_hours"], steps["hypervolume/over_gpu_hours"]) == (
        "hours",
        "gpu_hours",
    )

    summary = shown(tmp_path)[EBB]["summary"]
    points, lines = (
        table(tmp_path, EBB, summary[f"{chart}_table"]) for chart in ("points", "frontier")
    )
    assert [
        dict(zip(points["columns"], row, strict=True))["on frontier"] for row in points["data"]
    ] == [False, True, True]
    assert lines["data"] == [[0.3, "medium", 0.6], [0.4, "small", 0.5]]
    drawn = {
        record["config"]["update"][key]["panel_config"]["panelDefId"]
        for record in own
        # Fmt: skip
        if record["type"] == "config"
        for key in record["config"]["update"]
        if "visualize" in key
    }
    assert drawn == {"wandb/scatter/v0", "wandb/lineseries/v0"}


@pytest.mark.process
def test_points_beyond_the_limit_are_rows_of_their_trainings_run(
    study: Study, training: Artifact, tmp_path: Path
) -> None:
    keys = {"train[seed=0]": training.key}
    results = [
        Result(n, result(n, threshold=0.1 * n).point, "done", result(n).metrics, keys=keys)
        for n in range(4)
    ]
    mirror = Mirror(study, tmp_path, "offline", HOME_ID, Profile(wandb_points=1))
    assert (
        mirror.update(
            [*results[:3], Result(3, results[3].point, "running", keys=keys)], [training]
        ).shown
        == 2
    )
    assert mirror.update(results, [training]).shown == 1
    mirror.close()
    runs = shown(tmp_path)
    assert set(runs) == {EBB, f"{EBB}-{results[0].point.id}", f"{EBB}-{training.key[:12]}"}
    curve = runs[f"{EBB}-{training.key[:12]}"]
    rows = table(tmp_path, curve["run_id"], curve["summary"]["points"])
    assert [row[rows["columns"].index("threshold")] for row in rows["data"]] == pytest.approx(
        [0.1, 0.2, 0.3]
    )
    assert not [
        record
        for record in records(tmp_path, curve["run_id"])
        if "loss" in record.get("history", {}).get("item", {})
    ]
    assert len(table(tmp_path, EBB, runs[EBB]["summary"]["points_table"])["data"]) == 4


@pytest.mark.process
def test_a_training_that_only_later_points_use_is_a_row_of_the_study_without_a_run(
    study: Study, training: Artifact, tmp_path: Path
) -> None:
    first = [
        Result(n, result(n, threshold=0.1 * n).point, "done", result(n).metrics) for n in range(2)
    ]
    late = Result(
        2, result(2, rank=2).point, "done", result(2).metrics, keys={"train[seed=0]": training.key}
    )
    mirror = Mirror(study, tmp_path, "offline", HOME_ID, Profile(wandb_points=2))
    assert mirror.update([*first, late], [training]).error is None
    mirror.close()
    runs = shown(tmp_path)
    assert set(runs) == {EBB, *(f"{EBB}-{each.point.id}" for each in first)}
    rows = table(tmp_path, EBB, runs[EBB]["summary"]["trainings_table"])
    assert rows["columns"] == ["training", "first point", "steps", "last loss"]
    assert rows["data"] == [[training.key[:12], 2, 2, 1.25]]
    earlier = Result(
        1, first[1].point, "done", first[1].metrics, keys=late.keys
    )  # then the training has its own run
    assert training.key[:12] in "".join(
        page.id
        for page in pages(study, [earlier, late], [training], Profile(wandb_points=2), HOME_ID)
    )


@pytest.mark.process
def test_a_restart_shows_only_new_results(study: Study, training: Artifact, tmp_path: Path) -> None:
    first = Mirror(study, tmp_path, "offline", HOME_ID)
    assert first.update([result(0)], [training]).shown == 2
    first.close()
    second = Mirror(study, tmp_path, "offline", HOME_ID)
    assert second.update([result(0)], [training]).shown == 0
    assert second.update([result(0), result(1, refusal=0.9)], [training]).shown == 1
    second.close()
    assert shown(tmp_path)[EBB]["step"] // STEPS_A_POINT == 2


@pytest.mark.process
def test_after_a_mirror_died_the_next_one_shows_the_study(study: Study, tmp_path: Path) -> None:
    died = Mirror(study, tmp_path, "offline", HOME_ID)
    died.update([result(0)], [])
    second = Mirror(study, tmp_path, "offline", HOME_ID)
    assert second.update([result(0)], []).shown == 0
    second.close()
    died.close()
    assert len(list((tmp_path / "wandb").glob("offline-run-*-ebb*"))) == 3


@pytest.mark.process
def test_a_failed_point_that_finishes_later_is_shown_twice(study: Study, tmp_path: Path) -> None:
    broken = failed(0)
    mirror = Mirror(study, tmp_path, "offline", HOME_ID)
    assert mirror.update([broken], []).shown == 1
    assert mirror.update([Result(0, broken.point, "done", result(0).metrics)], []).shown == 1
    mirror.close()


@pytest.mark.process
def test_a_run_that_was_only_shown_offline_is_new_to_a_server(study: Study, tmp_path: Path) -> None:
    mirror = Mirror(study, tmp_path, "offline", HOME_ID)
    mirror.update([result(0)], [])
    mirror.close()
    assert Memory(tmp_path, "offline").rows(EBB) == 1
    assert Memory(tmp_path, "online").rows(EBB) == 0


@pytest.mark.process
def test_a_training_whose_files_were_dropped_is_shown_without_its_curve(
    study: Study, training: Artifact, tmp_path: Path
) -> None:
    training.store.drop(training, frozenset({"curve.csv"}))
    assert Mirror(study, tmp_path, "offline", HOME_ID).update([], [training]).error is None


def test_trainings_are_found_by_the_stages_name(training: Artifact, tmp_path: Path) -> None:
    keys = {"train[seed=0]": training.key, "train[seed=1]": "0" * 64, "refusal[seed=0]": "1" * 64}
    twice = [Result(n, result(n).point, "done", result(n).metrics, keys=keys) for n in (0, 1)]
    assert trainings_of(twice, Store(tmp_path / "store")) == [training]


def test_a_disabled_mirror_writes_nothing(study: Study, tmp_path: Path) -> None:
    assert Mirror(study, tmp_path, "disabled", HOME_ID).update([result(0)], []).shown == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process  # W&B may run git to locate the program
def test_the_mode_is_wandb_mode_or_follows_the_login(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_mode({"WANDB_MODE": "disabled"}) == "disabled"
    assert chosen_mode({"WANDB_MODE": "dryrun"}) == "offline"
    assert chosen_mode({"WANDB_MODE": "online"}) == "online"
    assert chosen_mode({}) == "offline"


def _online(study: Study, folder: Path, port: int, call_s: float = 4.0) -> tuple[int, int, str]:
    """Runs an update against a local port.

    It needs its own process, because wandb keeps the first server that it uses.
    """
    code = (
        "import sys; from pathlib import Path; from ebbline.sweeps.study.study import Study;"
        "from ebbline.analysis.wandb.runs import Mirror; from tests.analysis.conftest "
        "import result;"
        "study = Study.model_validate_json(sys.stdin.read());"
        f"mirror = Mirror(study, Path({str(folder)!r}), 'online', '0123456789abcdef', "
        f"bound_s={call_s + 1}, call_s={call_s});"
        "done = mirror.update([result(0), result(1, refusal=0.9)], []); mirror.close(); "
        "print(done.shown, done.left, done.error)"
    )
    environment = os.environ | {
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": "0" * 40,
    }
    ran = subprocess.run(
        [sys.executable, "-c", code],
        input=study.model_dump_json(),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    count, left, error = ran.stdout.split(maxsplit=2)
    return int(count), int(left), error.strip()


@pytest.mark.process
def test_an_absent_server_is_reported_within_the_time_limit(study: Study, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    count, left, error = _online(study, tmp_path, port)
    assert (count, left) == (0, 2) and "deadline exceeded" in error


@pytest.mark.process
def test_a_silent_server_is_reported_within_the_time_limit(study: Study, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        count, left, error = _online(study, tmp_path, silent.getsockname()[1])
    assert (count, left) == (0, 2) and "deadline exceeded" in error


def test_every_call_of_wandb_has_the_mirror_s_timeout(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("wandb.init", lambda settings, **_: calls.append(settings))
    done = Mirror(study, tmp_path, "offline", HOME_ID, call_s=7.0).update(
        [result(0), result(1)], []
    )
    assert (done.shown, done.left) == (0, 2) and len(calls) == 1, (
        "the first failure ends the update"
    )
    assert [
        getattr(calls[0], name) for name in ("init_timeout", "finish_timeout", "x_service_wait")
    ] == [7.0] * 3


@pytest.mark.process
def test_an_online_server_has_all_shown_results(study: Study, tmp_path: Path) -> None:
    with serving() as server:
        found = _online(study, tmp_path, server.server_address[1], call_s=120.0)
    assert found == (2, 0, "None")
    assert server.unknown == []
    assert sorted(run.fields["jobType"] for run in server.runs.values()) == ["point", "study"]
    own = server.runs[EBB]
    assert [
        row["hypervolume"] for row in own.history.values() if "hypervolume" in row
    ] == pytest.approx([0.25, 0.45])
    assert set(own.config["_wandb"]["value"]["visualize"]) == {"points", "frontier"}
    assert json.loads(own.files[own.summary["points_table"]["path"]])["data"]
    assert list(Memory(tmp_path, "online").waiting()) == []


@pytest.mark.process
def test_the_process_ends_when_its_input_closes(study: Study, tmp_path: Path) -> None:
    path = tmp_path / "ebb.yaml"
    path.write_text(yaml.safe_dump(study.model_dump(mode="json", exclude_unset=True)))
    log = tmp_path / "mirror.log"
    process = start(str(path), tmp_path / "home", log)
    assert process.poll() is None
    assert stop(process, 120.0), log.read_text()
    assert "mirroring ebb, offline" in log.read_text()


def test_a_study_has_one_mirror_at_a_time(tmp_path: Path) -> None:
    with alone(tmp_path) as first, alone(tmp_path) as second:
        assert (first, second) == (True, False)
    with alone(tmp_path) as later:
        assert later


def test_the_next_mirror_waits_for_the_one_of_an_earlier_run(tmp_path: Path) -> None:
    """So it shows what that one did not."""
    first = alone(tmp_path)
    first.__enter__()
    end = threading.Timer(0.3, lambda: first.__exit__(None, None, None))
    end.start()
    with alone(tmp_path, wait_s=30.0) as second:
        assert second
    end.join()


@pytest.mark.process
def test_a_run_lets_its_mirror_go_without_waiting_for_it(tmp_path: Path) -> None:
    """It goes on when its input has closed. Only one that has ended with an error is a failure."""
    log, done = tmp_path / "mirror.log", tmp_path / "done"
    log.write_text("mirroring\nno such server\n")

    def mirror(code: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)

    slow = mirror(f"import sys; sys.stdin.read(); open({str(done)!r}, 'w').write('all')")
    broken, quick = mirror("raise SystemExit(1)"), mirror("")
    broken.wait(), quick.wait()
    attempts = Attempts()
    assert not _let_go(slow, log, attempts) and not attempts.failed and not done.exists()
    assert slow.wait(60) == 0 and done.read_text() == "all"
    assert _let_go(quick, log, attempts) and not attempts.failed
    assert not _let_go(broken, log, attempts)
    assert attempts.failed == {"the W&B mirror": "no such server"}


def test_the_remaining_results_are_shown_before_the_mirror_ends(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [result(number, rank=number + 1) for number in range(3)]
    shown: list[str] = []
    monkeypatch.setattr("ebbline.analysis.wandb.mirror.collect", lambda view: results)
    monkeypatch.setattr("ebbline.analysis.wandb.mirror._closed_within", lambda seconds: True)
    monkeypatch.setattr(
        Mirror,
        "_show",
        lambda self, page: (
            shown.append(page.id),
            self._memory.remember(page.id, page.stamp, 0, "x"),
        ),
    )
    monkeypatch.setattr(Mirror, "_show_study", lambda self, results, status: None)
    ticks = iter(range(1000))
    monkeypatch.setattr("ebbline.analysis.wandb.runs.time.monotonic", lambda: float(next(ticks)))
    assert follow(
        StudyView(study, Home(tmp_path)), Mirror(study, tmp_path, "offline", HOME_ID, bound_s=1.0)
    )
    assert len(shown) == 3


@pytest.mark.process
def test_the_process_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, ebbline.analysis.wandb.mirror, wandb; assert not {'torch', 'ray'} & "
        "set(sys.modules), 'torch or ray was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_any_error_is_reported_and_not_raised(
    study: Study, training: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no service\nwith details below")

    monkeypatch.setattr(Mirror, "_open", broken)
    done = Mirror(study, tmp_path, "offline", HOME_ID).update([result(0)], [])
    assert (done.shown, done.left, done.error) == (0, 1, "RuntimeError: no service")
    (training.path / "curve.csv").write_text("step,loss\nnot a number,1\n")
    assert "Damaged" in str(
        Mirror(study, tmp_path, "offline", HOME_ID).update([], [training]).error
    )


def test_the_config_of_a_point_names_its_defence_and_its_knob(study: Study) -> None:
    values = {"defence": "scale", "scale.factor": 0.5, "train.penalty": "asft"}
    ended = Result(0, Point.of("small", values), "failed", reason="it failed")
    (page,) = pages(study, [ended], [], Profile(), HOME_ID)
    assert page.config == {
        "model": "small",
        "defence": "scale",
        "scale": {"factor": 0.5},
        "train": {"penalty": "asft"},
    }
