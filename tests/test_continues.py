"""Kill anything at any moment: the same command finishes the study, runs no finished stage again,
and ends with the same table.

A real driver process on a real Ray cluster with bitsandbytes training, on random-weight models so
that a run takes seconds.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest

from ebbline.analysis.results.tables import MEASURED_COLUMNS
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.identity import content_digest
from tests.postgres import Postgres
from tests.tiny import Pair, conversations, write_chats, write_lines

pytestmark = pytest.mark.cluster

STUDY = """
study: tiny
question: Does it continue?
models:
  7b:
    base: {{path: {{path: {base}, sha256: {base_sha}}}}}
    aligned: {{path: {{path: {aligned}, sha256: {aligned_sha}}}}}
    quantisation: nf4
    dtype: float32
data:
  pool: {{path: {{path: {chats}, sha256: {chats_sha}}}}}
  settings: {{size: 48}}
train: {{learning_rate: 1e-2, epochs: 8, global_batch: 8, max_tokens: 64}}
axes:
  train.rank: [2, 4]
  data.size: [32, 48]
  apply.threshold: [null, 0.1, 0.3]
suites:
  refusal:
    prompts: {{path: {{path: {prompts}, sha256: {prompts_sha}}}}}
    measure: {{kind: refusal, max_new_tokens: 4}}
  task:
    prompts: {{path: {{path: {prompts}, sha256: {prompts_sha}}}}}
    measure: {{kind: task, max_new_tokens: 4}}
objectives: [refusal_rate, task_accuracy]
search: {{sampler: tpe, points: 9, order: in_turn, window: 4, seed: 1}}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Path:
    folder = tmp_path_factory.mktemp("study")
    chats = write_chats(folder / "chats.jsonl", 48)
    rows = [
        {"id": str(i), "prompt": turns[0]["content"], "answer": turns[1]["content"]}
        for i, turns in enumerate(conversations(16, 9))
    ]
    prompts = write_lines(folder / "prompts.jsonl", rows)
    named = {"base": pair.base, "aligned": pair.aligned, "chats": chats, "prompts": prompts}
    path = folder / "tiny.yaml"
    path.write_text(
        STUDY.format(
            **named, **{f"{name}_sha": content_digest(place) for name, place in named.items()}
        )
    )
    return path


@pytest.fixture(scope="module")
def undisturbed(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a run that nobody disturbed, in one process: what Ray, a bucket and kills must
    not change.
    """
    home = tmp_path_factory.mktemp("undisturbed")
    finish(study, home, "--executor", "inline")
    return home


def start(study: Path, home: Path, *options: str) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "ebbline.cli",
        "run",
        str(study),
        "--home",
        str(home),
        "--no-wandb",
        *options,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(study: Path, home: Path, *options: str) -> str:
    process = start(study, home, *options)
    printed, _ = process.communicate(timeout=480)
    assert process.returncode == 0, printed
    return printed


def table(home: Path) -> pd.DataFrame:
    frame = pd.read_parquet(home / "studies" / "tiny" / "results.parquet")
    return frame.drop(columns=list(MEASURED_COLUMNS))


def records(home: Path) -> dict[Path, tuple[int, int]]:
    """Every record there is, with what would change if it were written again."""
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in (home / "store").glob("*/*/record.json")
    }


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", what: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        if process.poll() is not None:
            raise AssertionError(
                "the driver ended before "
                f"{what}:\n{process.stdout.read() if process.stdout else ''}"
            )
        assert time.monotonic() < deadline, f"no {what} in 240 s"
        time.sleep(0.05)


def descendants(process: "subprocess.Popen[str]", name: str) -> Iterator[psutil.Process]:
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if name in " ".join(child.cmdline()):
                yield child
        except psutil.NoSuchProcess:
            continue


def workers_of(driver: "subprocess.Popen[str]") -> list[psutil.Process]:
    return [*descendants(driver, "ray::_"), *descendants(driver, "ray::IDLE")]


def kill_driver(study: Path, home: Path, moment: int) -> None:
    """Start a driver, and kill it once there are so many records; its workers must go with it."""
    driver = start(study, home)
    # Records of an earlier run may be enough: the driver has to have workers too, or there is
    # nothing to outlive it.
    wait_for(
        lambda: len(records(home)) >= moment and bool(workers_of(driver)),
        driver,
        f"{moment} records and a worker",
    )
    workers = workers_of(driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(workers, timeout=240)
    assert not alive, f"workers that outlived a killed driver: {[child.name() for child in alive]}"


def kill_ray(study: Path, home: Path, moment: int) -> None:
    """Start a driver, and kill Ray under it once there are so many records; the driver must end by
    itself, and not as if it were done.
    """
    driver = start(study, home)
    wait_for(lambda: len(records(home)) >= moment, driver, f"{moment} records")
    next(descendants(driver, "raylet/raylet")).kill()
    printed, _ = driver.communicate(timeout=480)
    assert driver.returncode != 0, printed


def test_a_head_that_is_killed_as_ray_starts_is_a_lost_cluster(study: Path, tmp_path: Path) -> None:
    """Only here Ray's core would end the driver by itself, with code 1 and its own words."""
    driver = start(study, tmp_path)
    wait_for(lambda: any(True for _ in descendants(driver, "gcs_server")), driver, "a head")
    next(descendants(driver, "gcs_server")).kill()
    printed, _ = driver.communicate(timeout=240)
    assert driver.returncode == 75, printed
    assert "the same command" in printed and "Traceback" not in printed


def finish_with_a_killed_worker(study: Path, home: Path) -> None:
    driver = start(study, home)
    wait_for(lambda: any(True for _ in descendants(driver, "ray::_batch")), driver, "worker")
    next(descendants(driver, "ray::_batch")).kill()
    printed, _ = driver.communicate(timeout=480)
    assert driver.returncode == 0, printed


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_driver_ray_and_worker_killed_one_after_another_end_with_the_same_table(
    study: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Only here a whole study outlives kills of its driver, of Ray and of a worker."""
    # One home for all of them: each start of Ray takes longer than the stages do, and every kill
    # finds the others' leavings.
    kill_driver(study, tmp_path, 2)
    kill_ray(study, tmp_path, 5)
    kill_driver(study, tmp_path, 9)
    kill_driver(study, tmp_path, 20)
    before = records(tmp_path)
    finish_with_a_killed_worker(study, tmp_path)
    after = records(tmp_path)
    assert {path: stamp for path, stamp in after.items() if path in before} == before, (
        "a finished stage was run again"
    )
    pd.testing.assert_frame_equal(table(tmp_path), table(undisturbed))


def test_second_driver_says_who_holds_the_study_and_leaves(study: Path, tmp_path: Path) -> None:
    """Only here two drivers want one study."""
    first = start(study, tmp_path, "--executor", "inline")
    wait_for(lambda: bool(records(tmp_path)), first, "record")
    second = start(study, tmp_path)
    printed, _ = second.communicate(timeout=240)
    assert second.returncode == 4
    assert f"process {first.pid}" in printed
    os.kill(first.pid, signal.SIGINT)
    printed, _ = first.communicate(timeout=240)
    assert first.returncode == 130, printed


@pytest.mark.long
def test_a_killed_run_on_a_bucket_and_a_database_goes_on_to_the_table_of_one_on_a_disk(
    study: Path, undisturbed: Path, bucket: str, postgres: Postgres, tmp_path: Path
) -> None:
    """Only here a study on Ray has its store in a bucket and its points in PostgreSQL, and is
    killed.
    """
    store = Store(bucket)
    (tmp_path / "cluster.yaml").write_text(f"store: {bucket}\nstorage: {postgres.url}\n")
    driver = start(study, tmp_path)
    wait_for(lambda: len(in_bucket(store)) >= 8, driver, "8 records")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = in_bucket(store)
    finish(study, tmp_path)
    assert before.items() <= in_bucket(store).items(), "a finished stage was run again"
    assert not (tmp_path / "store").exists() and not list(tmp_path.rglob("optuna.db"))
    pd.testing.assert_frame_equal(table(tmp_path), table(undisturbed))


def in_bucket(store: Store) -> dict[str, object]:
    """Every record in a bucket, with when it was written."""
    return {
        entry.name: entry.modified
        for entry in store.place.entries()
        if entry.name.endswith("/record.json")
    }
