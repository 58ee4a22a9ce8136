"""Ray in the jobs of a real Slurm: two nodes of this machine, started by `ebbline slurm`."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.cluster.executors import slurm_node, this_machine
from ebbline.cluster.executors.slurm_node import TOKEN, address, ray_start, start, wait
from ebbline.cluster.executors.this_machine import VISIBLE
from ebbline.commands.slurm.queue import ENDED
from ebbline.sweeps.drive.live import read_live, read_timeline
from ebbline.tasks.errors import ClusterLost, StudyError
from tests import slurm as real
from tests.cluster.test_visible_devices import LISTED
from tests.slurm import Slurm
from tests.test_terminal import written
from tests.tiny import Pair

SHOW_GPUS = """
import sys
from pathlib import Path
from ebbline.cluster.executors.slurm_node import ray_start
command = ray_start(Path(sys.argv[1]), "10.0.0.1:6379", int(sys.argv[2]), 0)
print(*(part for part in command if part.startswith(("--num-", "--temp-dir", "--head"))))
"""
COSTS = ("seconds", "gpu_hours", "cost_usd")
NVIDIA_SMI = f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if reason := real.why_not():
        pytest.skip(reason)
    with real.running() as found:
        yield found


@pytest.fixture
def login(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Slurm, with its commands and its configuration in this process's environment."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return slurm


def small(folder: Path, pair: Pair, epochs: float, thresholds: list[Any]) -> Path:
    path = written(folder, pair, epochs)
    whole = yaml.safe_load(path.read_text())
    whole["axes"]["apply.threshold"] = thresholds
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


def submit(file: Path, home: Path, *options: str) -> str:
    """Submit a study on both nodes; the number of its job."""
    done = CliRunner().invoke(
        app,
        [
            *("slurm", str(file), "--home", str(home), "--submit", "--json"),
            *("--nodes", "2", "--logical-gpus", "1", *options, "--", "--no-wandb"),
        ],
    )
    assert done.exit_code == 0, done.output
    return str(json.loads(done.output)["job"])


def ended(slurm: Slurm, job: str, home: Path, timeout_s: float) -> str:
    """Wait until a job has ended; returns its log."""
    deadline = time.monotonic() + timeout_s
    log = home / "studies" / "tiny" / "log" / f"slurm-{job}.log"
    while (state := slurm.state(job)) not in ENDED:
        assert time.monotonic() < deadline, (state, log.read_text() if log.exists() else "")
        time.sleep(0.2)
    assert state == "COMPLETED", log.read_text()
    return log.read_text()


@pytest.mark.cluster
def test_a_job_runs_a_study_on_both_nodes_and_leaves_nothing_there(
    login: Slurm, pair: Pair, tmp_path: Path
) -> None:
    """Only this test in `make test` has sbatch, srun and Ray on the nodes of a real Slurm."""
    file, home = small(tmp_path, pair, 1, [None]), tmp_path / "home"
    job = submit(file, home, "--time", "10")
    arguments = [str(file), "--home", str(home)]
    twice = CliRunner().invoke(app, ["slurm", *arguments, "--submit"])
    assert twice.exit_code == 1 and f"job {job} is " in twice.output
    log = ended(login, job, home, 240)
    folder = home / "studies" / "tiny"
    (row,) = csv.DictReader((folder / "results.csv").open())
    assert row["status"] == "done", log
    live = read_live(folder)
    assert live is not None and len(live.hosts) == 2 and live.driver.endswith(f"Slurm job {job}")
    assert {line.outcome for line in read_timeline(folder)} == {"done"}
    assert not list(Path("/tmp").glob(f"ebbline-{job}-*")) and not list(folder.rglob(TOKEN))
    again = CliRunner().invoke(app, ["slurm", *arguments, "--submit"])
    assert again.exit_code == 0 and "there is nothing to run" in again.output


@pytest.mark.process
def test_the_gpus_of_a_step_are_those_that_slurm_gives_it(login: Slurm, tmp_path: Path) -> None:
    """Slurm sets the variable here, not the test."""
    (tmp_path / TOKEN).touch()
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    command = [
        *("srun", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--cpus-per-task=3"),
        *("env", f"PATH={tmp_path}:{real.PATH}", sys.executable, "-c", SHOW_GPUS, str(tmp_path)),
    ]
    head, worker = sorted(login.call(*command, "2").splitlines())
    assert head.startswith("--head --num-gpus=2 --num-cpus=3 --temp-dir=/tmp/ebbline-")
    assert worker.startswith("--num-gpus=2 --num-cpus=3 --temp-dir=/tmp/ebbline-")
    assert head.rpartition("=")[2] != worker.rpartition("=")[2], "two nodes on one machine"
    lacking = subprocess.run([*command, "3"], env=os.environ, capture_output=True, text=True)
    assert lacking.returncode != 0 and "was given 3 GPUs, but a process there sees 2" in (
        lacking.stderr
    )


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_job_that_its_time_limit_ends_twice_has_the_table_of_an_undisturbed_run(
    login: Slurm, pair: Pair, tmp_path: Path
) -> None:
    """Only this test lets a real time limit end jobs: Slurm's smallest one is a minute."""
    timing = tmp_path / "timing"
    timing.mkdir()
    undisturbed(small(timing, pair, 200, [None]), timing / "home")
    (train,) = (
        each for each in read_timeline(timing / "home/studies/tiny") if each.kind == "train"
    )
    # Longer than what two starts of 2 minutes leave after Ray's start and before the interrupt
    epochs = 200 * 150.0 / (train.ended - train.started)
    file, home = small(tmp_path, pair, round(epochs), [None, 0.999]), tmp_path / "home"
    home.mkdir()
    (home / "cluster.yaml").write_text("checkpoint_every_s: 5\n")
    job = submit(file, home, "--time", "2", "--lead", "60")
    log = ended(login, job, home, 1500)
    assert int(login.job(job)["Restarts"]) >= 2, log
    assert log.count("the job is requeued") >= 2 and "exit code 0" in log
    undisturbed(file, tmp_path / "other")
    assert table(home) == table(tmp_path / "other")


def undisturbed(file: Path, home: Path) -> None:
    arguments = ["run", str(file), "--home", str(home), "--executor", "inline", "--no-wandb"]
    done = subprocess.run(
        [sys.executable, "-m", "ebbline", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def table(home: Path) -> list[dict[str, str]]:
    """The rows of results.csv without their costs. The keys that stay cover what stages wrote."""
    with (home / "studies" / "tiny" / "results.csv").open() as handle:
        return [
            {name: value for name, value in row.items() if not name.startswith(COSTS)}
            for row in csv.DictReader(handle)
        ]


# --- a node, without Slurm


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The command that starts Ray on a node with the GPUs of LISTED."""
    (tmp_path / TOKEN).touch()
    monkeypatch.setattr(this_machine.shutil, "which", lambda name: name)
    listed = subprocess.CompletedProcess([], 0, LISTED, "")
    monkeypatch.setattr(this_machine.subprocess, "run", lambda *command, **settings: listed)

    def started(asked: int, visible: str | None, logical: int = 0, **more: str) -> list[str]:
        monkeypatch.delenv(VISIBLE, raising=False)
        if visible is not None:
            monkeypatch.setenv(VISIBLE, visible)
        environment = {"SLURMD_NODENAME": "n1", "SLURM_JOB_ID": "7", **os.environ, **more}
        return ray_start(tmp_path, "10.0.0.1:6379", asked, logical, environment)

    return started


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, 2),
        ("0", 1),
        ("1", 1),
        ("0,1", 2),
        ("GPU-8977aaaa-d72c-4106-c12f-20bd9faed9f6", 1),
        ("MIG-33a5c2c0-1111-5555-9999-aaaaaaaaaaaa", 1),
        ("MIG-33a5c2c0-1111-5555-9999-aaaaaaaaaaaa,MIG-44b6d3d1-1111-5555-9999-aaaaaaaaaaaa", 2),
        ("MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/0", 1),
    ],
)
def test_ray_gets_the_gpus_that_slurm_shows(
    node: Callable[..., list[str]], visible: str | None, gpus: int
) -> None:
    assert f"--num-gpus={gpus}" in node(gpus, visible)


@pytest.mark.parametrize("visible", ["", "NoDevFiles", "-1", "7", "0,0"])
def test_a_node_that_shows_fewer_gpus_than_it_was_given_is_an_error(
    node: Callable[..., list[str]], visible: str
) -> None:
    """A run on the CPU instead would take weeks."""
    with pytest.raises(StudyError, match=f"node n1 .* 1 GPU, .* sees 0 .*{visible!r}"):
        node(1, visible)


def test_a_study_on_cpus_gets_logical_gpus_on_any_node(node: Callable[..., list[str]]) -> None:
    assert "--num-gpus=3" in node(0, "", logical=3)


def test_only_the_first_node_is_the_head(node: Callable[..., list[str]]) -> None:
    head = node(1, "0", SLURM_NODEID="0", SLURM_CPUS_ON_NODE="6")
    other = node(1, "0", SLURM_NODEID="1")
    assert "--head" in head and "--port=6379" in head and "--num-cpus=6" in head
    assert "--head" not in other and "--address=10.0.0.1:6379" in other
    assert {"--temp-dir=/tmp/ebbline-7-0"} <= {*head} and "--temp-dir=/tmp/ebbline-7-1" in other


def test_a_node_that_does_not_see_the_home_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="must be on a file system that all nodes share"):
        ray_start(tmp_path / "elsewhere", "10.0.0.1:6379", 0, 1, {"SLURMD_NODENAME": "n1"})


def test_the_token_can_be_read_by_its_owner_alone_and_is_another_one_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_node, "_own_address", lambda environment: "10.0.0.1")
    head = address(tmp_path / "job", {})
    token = tmp_path / "job" / TOKEN
    before = token.read_text()
    assert head.startswith("10.0.0.1:") and token.stat().st_mode & 0o777 == 0o600
    assert len(before) == 64
    address(tmp_path / "job", {})
    assert token.read_text() != before


def test_a_wait_for_nodes_ends_when_srun_has_ended(tmp_path: Path) -> None:
    with pytest.raises(ClusterLost, match="srun ended before Ray had 2 nodes"):
        wait(tmp_path, "127.0.0.1:1", 2, pid=2**22 + 1)


def test_a_node_does_not_start_ray_without_what_the_job_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    monkeypatch.setattr(slurm_node.signal, "signal", lambda *arguments: None)
    with pytest.raises(StudyError, match="node n2 does not see"):
        start(tmp_path, "127.0.0.1:1", 1, 0)
