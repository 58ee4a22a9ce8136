"""`ebbline slurm`: its settings, the script's text, and the script's decisions.

Here Slurm's commands and the run are pretended; tests/cluster/test_slurm.py has the real ones.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.cluster.profile import SlurmSettings, slurm_seconds
from ebbline.commands.slurm import queue, submit
from ebbline.commands.slurm.queue import JOB, queued_job
from ebbline.commands.slurm.script import for_study, sbatch_options
from ebbline.commands.slurm.submit import with_flags
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study_file import read_profile
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import ClusterLost, StudyError
from tests.sweeps.made import study, written
from tests.sweeps.pretended import Pretended

WITH_GANG = {"models/7b/gpus": 4, "train/global_batch": 8}


def slurm(folder: Path, *options: str) -> Any:
    command = ["slurm", str(written(folder)), "--home", str(folder / "home"), *options]
    return CliRunner().invoke(app, command)


# --- settings


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("2-12", 60 * 3600),
        ("1-00:30", 88200),
        ("1-02:03:04", 93784),
    ],
)
def test_a_time_limit_is_read_as_slurm_reads_it(time: str, seconds: int) -> None:
    assert slurm_seconds(time) == seconds


@given(st.integers(1, 40 * 86400))
def test_the_default_lead_is_before_any_time_limit_and_leaves_most_of_it(seconds: int) -> None:
    hours, rest = divmod(seconds, 3600)
    settings = SlurmSettings(time=f"{hours}:{rest // 60}:{rest % 60}")
    assert 1 <= settings.lead <= max(1, min(300, seconds // 4))


def test_a_time_without_quotes_is_an_error_that_names_file_and_line(tmp_path: Path) -> None:
    """YAML reads it as 86400."""
    path = tmp_path / "cluster.yaml"
    path.write_text("slurm:\n  time: 24:00:00\n")
    with pytest.raises(StudyError, match='line 2: .*write it in quotes, as "24:00:00"') as error:
        read_profile(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("written_as", "message"),
    [
        ("time: 86400", 'write it in quotes, as "24:00:00"'),
        ("time: tomorrow", "is not a time limit"),
        ('time: "1:00"\n  lead_s: 60', "less than the time"),
        ("gpus_per_node: a100", "must be a number or TYPE:NUMBER"),
        ("gpus_per_node: 1\n  logical_gpus: 1", "not both"),
        ("sbatch: [constraint=a100]", "one option of sbatch"),
        ("setup: export HF_TOKEN=hf_abc", "HF_TOKEN has a value here"),
        ("sbatch: ['--export=ALL,WANDB_API_KEY=abc']", "WANDB_API_KEY has a value here"),
        ("partitions: gpu", "did you mean 'partition'"),
    ],
)
def test_an_invalid_setting_of_the_profile_is_an_error_that_names_file_and_field(
    tmp_path: Path, written_as: str, message: str
) -> None:
    (tmp_path / "cluster.yaml").write_text(f"slurm:\n  {written_as}\n")
    with pytest.raises(StudyError) as error:
        read_profile(tmp_path / "cluster.yaml")
    field = written_as.partition(":")[0]
    assert str(tmp_path / "cluster.yaml") in str(error.value) and "slurm" in str(error.value)
    assert message in str(error.value) or f"slurm.{field}: Extra inputs" in str(error.value)


def test_a_secret_from_the_environment_or_a_file_is_accepted() -> None:
    SlurmSettings(
        setup='source ~/.ebbline-env\nexport HF_TOKEN="$MY_TOKEN"\nSSH_KEY=~/.ssh/id\nKEY='
    )


def test_flags_replace_the_profile_and_options_of_sbatch_are_added() -> None:
    kept = SlurmSettings(partition="gpu", gpus_per_node="a100:4", sbatch=("--exclusive",))
    settings = with_flags(kept, {"nodes": 3, "logical_gpus": 2, "sbatch": ("--qos=low",)})
    assert (settings.partition, settings.nodes, settings.gpus) == ("gpu", 3, 2)
    assert settings.gpus_per_node is None and settings.sbatch == ("--exclusive", "--qos=low")
    with pytest.raises(StudyError, match="time: 'soon' is not a time limit"):
        with_flags(kept, {"time": "soon"})


def test_a_node_gets_the_gpus_of_the_largest_model_and_cores_for_them(tmp_path: Path) -> None:
    gang = study(tmp_path, WITH_GANG)
    settings = for_study(SlurmSettings(), gang)
    assert (settings.gpus, settings.cpus_per_node) == (4, 10)
    assert "--gpus-per-node=4" in sbatch_options(settings, "tiny", tmp_path)
    with pytest.raises(StudyError, match=r"models\.7b\.gpus is 4, and a node has 2"):
        for_study(SlurmSettings(nodes=2, gpus_per_node="a100:2"), gang)
    spread = study(tmp_path, {**WITH_GANG, "models/7b/spread": True})
    assert for_study(SlurmSettings(nodes=2), spread).gpus == 2
    for_study(SlurmSettings(nodes=2, gpus_per_node="2"), spread)
    with pytest.raises(StudyError, match="1 nodes have 2"):
        for_study(SlurmSettings(gpus_per_node="2"), spread)


def test_a_study_on_cpus_asks_slurm_for_no_gpu(tmp_path: Path) -> None:
    done = slurm(tmp_path, "--logical-gpus", "2", "--dry-run")
    assert done.exit_code == 0 and "--gpus-per-node" not in done.output
    assert "RAY=(--logical-gpus=2)" in done.output and "--cpus-per-task=6" in done.output


# --- the command


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path) -> None:
    done = slurm(
        tmp_path,
        *("--dry-run", "--partition", "gpu", "--time", "2:00:00", "--memory", "64G"),
        *("--sbatch=--constraint=a100", "--nodes", "2", "--", "--no-wandb"),
    )
    assert done.exit_code == 0, done.output
    head = [line for line in done.output.splitlines() if line.startswith("#SBATCH")]
    assert head == [
        f"#SBATCH {option}"
        for option in (
            "--job-name=ebbline-tiny",
            "--partition=gpu",
            "--nodes=2",
            "--ntasks-per-node=1",
            "--cpus-per-task=4",
            "--gpus-per-node=1",
            "--mem=64G",
            "--time=2:00:00",
            "--signal=B:USR1@300",
            "--open-mode=append",
            f"--output={tmp_path.resolve()}/home/studies/tiny/log/slurm-%j.log",
            "--requeue",
            "--constraint=a100",
        )
    ]
    assert "--no-wandb)" in done.output and not list(tmp_path.rglob("slurm.sbatch"))


def test_without_submit_the_script_is_written_and_the_next_command_named(tmp_path: Path) -> None:
    done = slurm(tmp_path, "--time", "60", "--json")
    found = json.loads(done.output)
    path = tmp_path / "home" / "studies" / "tiny" / "slurm.sbatch"
    assert found["wrote"] == str(path.resolve()) and found["job"] is None and path.is_file()
    assert f"submit it: sbatch {path.resolve()}" in slurm(tmp_path).output


def test_options_that_the_script_sets_are_an_error(tmp_path: Path) -> None:
    done = slurm(tmp_path, "--", "--address=auto")
    assert done.exit_code == 1 and "--address=auto cannot be given to the run" in done.output


def test_a_study_that_has_ended_is_not_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = StudyView(study(tmp_path, {"axes/train.rank": [2]}), Home(tmp_path / "home"))
    drive(view, lambda: Pretended(view.home.store))
    monkeypatch.setattr(submit, "_sbatch", lambda path: pytest.fail("it was submitted"))
    file, home = str(tmp_path / "study.yaml"), str(tmp_path / "home")
    done = CliRunner().invoke(app, ["slurm", file, "--home", home, "--submit"])
    assert done.exit_code == 0 and done.output == (
        "tiny: all its points are done; there is nothing to run\n"
    )


def test_a_study_that_has_a_job_is_not_submitted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "_sbatch", lambda path: "17")
    assert "submitted as job 17" in slurm(tmp_path, "--submit").output
    answers(monkeypatch, "PENDING|BeginTime\n")
    done = slurm(tmp_path, "--submit")
    assert done.exit_code == 1 and "job 17 is PENDING (BeginTime)" in done.output
    command = ["status", str(written(tmp_path)), "--home", str(tmp_path / "home")]
    shown, printed = (
        CliRunner().invoke(app, [*command, *more]).output for more in ([], ["--json"])
    )
    assert "slurm: job 17 is PENDING (BeginTime)" in shown
    job = {"number": "17", "state": "PENDING", "reason": "BeginTime"}
    assert json.loads(printed)["slurm"] == job


def answers(monkeypatch: pytest.MonkeyPatch, printed: str, code: int = 0) -> None:
    """Let squeue print this."""
    done = subprocess.CompletedProcess([], code, printed, "")
    monkeypatch.setattr(queue.shutil, "which", lambda name: name)
    monkeypatch.setattr(queue.subprocess, "run", lambda *command, **settings: done)


@pytest.mark.parametrize(
    ("printed", "code", "found"),
    [
        ("RUNNING|None\n", 0, "job 17 is RUNNING"),
        ("COMPLETED|None\n", 0, None),
        ("TIMEOUT|TimeLimit\n", 0, None),
        ("", 0, None),
        ("", 1, None),
    ],
)
def test_a_job_that_slurm_no_longer_runs_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, code: int, found: str | None
) -> None:
    assert queued_job(tmp_path) is None
    (tmp_path / JOB).write_text("17\n")
    answers(monkeypatch, printed, code)
    job = queued_job(tmp_path)
    assert (None if job is None else str(job)) == found


def test_a_lost_cluster_has_an_exit_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*arguments: Any, **options: Any) -> None:
        raise ClusterLost("the head has not answered")

    monkeypatch.setattr(submit, "submit_study", lost)
    assert slurm(tmp_path).exit_code == 75


# --- the script's decisions, with pretended commands

PRETENDED = """#!/bin/bash
case "$(basename "$0") $*" in
  *slurm_node\\ address*) mkdir -p "$5"; touch "$5/token"; echo "10.0.0.1:6379" ;;
  *slurm_node\\ wait*) exit ${WAIT_CODE:-0} ;;
  srun*) exec sleep 60 ;;
  scancel*) pkill -TERM -P "$PPID" -x sleep ;;
  scontrol*) echo "$*" >>"$RECORD"; kill -TERM "$PPID" ;;
  *ebbline\\ run*)
    interrupted() {
      echo INT >>"$RECORD"
      n=$((n + 1)); [ $n -lt "${STOPS_AT:-1}" ] || exit ${STOP_CODE:-130}
    }
    trap interrupted INT
    echo run >>"$RECORD"
    [ -z "$LASTS" ] || for ((i = 0; i < 600; i++)); do sleep 0.05; done
    exit ${RUN_CODE:-0} ;;
esac
"""


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Starts the script of a study in a folder with a space, with pretended commands."""
    folder = tmp_path / "a home"
    (folder / "bin").mkdir(parents=True)
    for name in ("python", "srun", "scontrol", "scancel"):
        (folder / "bin" / name).write_text(PRETENDED)
        (folder / "bin" / name).chmod(0o755)
    done = slurm(folder, "--python", str(folder / "bin" / "python"), "--time", "10", "--lead", "4")
    assert done.exit_code == 0, done.output
    path = folder / "home" / "studies" / "tiny" / "slurm.sbatch"
    path.write_text(path.read_text().replace("PAUSE=10", "PAUSE=0"))

    def start(**settings: str) -> "subprocess.Popen[str]":
        environment = {
            **os.environ,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "RECORD": str(folder / "record"),
            **settings,
        }
        return subprocess.Popen(
            # A process that a script started in the background ignores SIGINT, and so do its own
            ["env", "--default-signal=INT", "bash", str(path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def record(process: "subprocess.Popen[str]", folder: Path) -> tuple[int, list[str], str]:
    """The exit code of a job, what its commands recorded, and its log."""
    printed, errors = process.communicate(timeout=60)
    path = folder / "a home" / "record"
    return process.returncode, path.read_text().split("\n")[:-1], printed + errors


@pytest.mark.process
@pytest.mark.parametrize(
    ("code", "tries"), [(0, 1), (3, 1), (5, 1), (1, 1), (2, 1), (4, 3), (75, 3), (137, 3)]
)
def test_an_exit_code_of_the_run_decides_between_the_end_and_another_try(
    job: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, code: int, tries: int
) -> None:
    ended, recorded, log = record(job(RUN_CODE=str(code)), tmp_path)
    assert (ended, recorded) == (code, ["run"] * tries), log
    studies = tmp_path / "a home" / "home" / "studies" / "tiny"
    assert not list(studies.rglob("token")) and (studies / JOB).read_text() == "7\n"


@pytest.mark.process
def test_a_cluster_that_does_not_start_is_tried_three_times(
    job: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    (tmp_path / "a home" / "record").touch()
    ended, recorded, log = record(job(WAIT_CODE="1"), tmp_path)
    assert (ended, recorded, log.count("of 3)")) == (75, [], 3), log


def until_run(folder: Path) -> None:
    path, deadline = folder / "a home" / "record", time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.process
@pytest.mark.parametrize(
    ("settings", "code", "recorded"),
    [
        ({}, -15, ["run", "INT", "requeue 7"]),
        # Running stages took too long: the second interrupt stops them
        ({"STOPS_AT": "2"}, -15, ["run", "INT", "INT", "requeue 7"]),
        # The study ended while it drained
        ({"STOP_CODE": "0"}, 0, ["run", "INT"]),
        ({"STOP_CODE": "3"}, 3, ["run", "INT"]),
        # The most requeues
        ({"SLURM_RESTART_COUNT": "100"}, 130, ["run", "INT"]),
    ],
)
def test_near_the_time_limit_the_run_is_interrupted_and_the_job_requeued(
    job: Callable[..., "subprocess.Popen[str]"],
    tmp_path: Path,
    settings: dict[str, str],
    code: int,
    recorded: list[str],
) -> None:
    process = job(LASTS="yes", **settings)
    until_run(tmp_path)
    process.send_signal(signal.SIGUSR1)
    ended, found, log = record(process, tmp_path)
    assert (ended, found) == (code, recorded), log
    assert ("sbatch" in log) == (code == 130), "it says how to continue"


@pytest.mark.process
def test_the_script_is_valid_for_any_home_and_setup(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s $HOME "x"'
    folder.mkdir()
    (folder / "setup.sh").write_text("module() { echo $1; }\nmodule load\n")
    done = slurm(folder, "--dry-run", "--setup", str(folder / "setup.sh"))
    assert done.exit_code == 0 and "\nmodule load\n\nSCRIPT=" in done.output
    checked = subprocess.run(
        [
            "bash",
            "-c",
            'eval "$(sed -n \'/^SCRIPT/,/^RUN/p\')"; printf "%s\\n" "$FOLDER" "${RUN[@]}"',
        ],
        input=done.output,
        capture_output=True,
        text=True,
    )
    lines = checked.stdout.splitlines()
    home = str(folder.resolve() / "home")
    assert lines[0] == f"{home}/studies/tiny"
    assert lines[1:] == [
        *(sys.executable, "-P", "-m", "ebbline", "run", str(folder.resolve() / "study.yaml")),
        *("--home", home),
    ]
    shellcheck = shutil.which("shellcheck")
    if shellcheck is not None:
        assert not subprocess.run([shellcheck, "-"], input=done.output, text=True).returncode
