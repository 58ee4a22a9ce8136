"""Workers, cache and checkpoints with a bucket: the results equal a folder's, and interrupted or
concurrent workers do no harm.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebbline.cluster.executors.executor import run_batch
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.cluster.running.runner import Runner
from ebbline.cluster.store import workplace as module
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.errors import Differs, StoreError
from ebbline.tasks.identity import content_digest, digest
from ebbline.tasks.specs import DataSpec, GenerateSpec, TrainSpec
from ebbline.tasks.stage import Part, Report, Request, Stage
from tests.cluster.made import rows, settle, source, stored_request
from tests.s3 import CREDENTIALS
from tests.tiny import write_chats

ROOT = Path(__file__).parents[2]
TRAIN = TrainSpec(
    rank=2, dtype="float32", learning_rate=1e-2, global_batch=4, max_tokens=32, steps=4
)


@pytest.fixture
def store(bucket):
    return Store(bucket)


@pytest.fixture
def chats(tmp_path):
    return write_chats(tmp_path / "chats.jsonl", 24)


def run(store: Store, *stages: Stage) -> Runner:
    runner = Runner(store, InlineExecutor())
    runner.add(stages)
    settle(runner)
    return runner


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A function that makes this process another machine, with an empty cache."""

    def move() -> None:
        monkeypatch.setenv("EBBLINE_CACHE", str(tmp_path / f"cache-{os.urandom(3).hex()}"))

    return move


def test_a_study_in_a_bucket_has_the_keys_and_the_content_of_one_in_a_folder(
    store, bucket, tmp_path, chats, pair, elsewhere
):
    model = source(pair.aligned)
    data = rows(16, rows(20, source(chats)))
    train = Stage(TRAIN, {"model": model, "data": Part(data, DataSpec.ROWS)})
    prompts = source(write_chats(tmp_path / "prompts.jsonl", 1))
    prompts_path = Path(prompts.location)
    prompts_path.write_text('{"prompt": "word1 word2"}\n')
    generation = Stage(
        GenerateSpec(max_new_tokens=4, dtype="float32"),
        {
            "model": model,
            "prompts": source(prompts_path),
            "adapter": Part(train, TrainSpec.ADAPTER),
        },
    )
    runners = [run(Store(tmp_path / "folder"), generation), run(store, generation)]
    artifacts = [
        [runner.artifact(stage) for stage in (data, train, generation)] for runner in runners
    ]
    assert artifacts[0] and all(
        node.state == "done" for runner in runners for node in runner.nodes.values()
    )
    assert [(each.key, each.content) for each in artifacts[0]] == [
        (each.key, each.content) for each in artifacts[1]
    ]
    # A driver on another machine runs no stage, and fetches one file.
    elsewhere()
    rerun = run(Store(bucket), generation)
    assert all(node.reused for node in rerun.nodes.values())
    assert (
        rerun.artifact(generation).file(GenerateSpec.COMPLETIONS).read_bytes()
        == artifacts[0][2].file(GenerateSpec.COMPLETIONS).read_bytes()
    )
    # The JSON files contain no secret and no path of the driver's machine.
    names = [entry.name for entry in store.place.entries() if entry.name.endswith(".json")]
    assert {name.rpartition("/")[2] for name in names} >= {"record.json", "request.json"}
    for name in names:
        text = (store.place.read(name) or b"").decode()
        assert (
            text and CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in text and str(tmp_path) not in text
        ), name


def test_each_source_is_uploaded_once_by_its_content(store, chats):
    run(store, rows(3, source(chats)))
    before = {entry.name: entry.modified for entry in store.place.entries("sources")}
    assert list(before) == [f"sources/{content_digest(chats)}/{chats.name}"]
    run(Store(store.place.at), rows(4, source(chats)))
    assert {entry.name: entry.modified for entry in store.place.entries("sources")} == before


def test_the_command_of_a_failure_reproduces_it(store, chats):
    broken = rows(99, source(chats))
    runner = run(store, broken)
    failure = runner.failure(broken)
    assert failure.command.startswith("ebbline rerun s3://") and "data.size=99" in failure.reason
    shown = subprocess.run(
        [sys.executable, "-m", *failure.command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 1 and "data.size=99" in shown.stderr
    assert b"data.size=99" in store.log(runner.nodes[broken.lineage].attempt, "error.txt")
    assert store.find("data", runner.nodes[broken.lineage].key) is None


def test_a_stage_whose_inputs_cannot_be_fetched_does_not_stop_its_batch(store, chats):
    good = stored_request(store, DataSpec(size=3), {"pool": chats})
    missing = store.url("data", "0" * 64, "abc", "payload", DataSpec.ROWS)
    lost = Request(
        **{
            **vars(good),
            "inputs": {"pool": missing},
            "out": store.url(store.begin("data", good.key) / "payload"),
        }
    )
    (report,) = run_batch([lost])
    assert report.error_type == "Incomplete" and store.place.at in report.error
    assert run_batch([good])[0].error is None


def test_an_input_missing_in_the_store_stops_the_run_and_fails_no_stage(
    store, bucket, chats, elsewhere
):
    first = rows(10, source(chats))
    made = run(store, first).artifact(first)
    store.place.delete(
        [entry.name for entry in store.place.entries(f"data/{made.key}/{made.folder.name}/payload")]
    )
    elsewhere()
    runner, last = Runner(Store(bucket), InlineExecutor()), rows(5, first)
    runner.add([last])
    with pytest.raises(
        StoreError, match=f"{DataSpec.ROWS} of .* is missing in the store.*verify --mend"
    ):
        settle(runner)
    assert runner.failure(last) is None


def test_the_driver_sees_a_stages_progress_while_it_runs(store, pair, chats, monkeypatch):
    monkeypatch.setattr(module, "PROGRESS_EVERY_S", 0.05)
    place = module.workplace(train_request(store, pair, chats))
    request = place.prepare()
    attempt = store.local(store.url(Path(request.out).parent))
    assert store.log(attempt, "progress.json") is None
    Path(request.log, "progress.json").write_text('{"done": 1}')
    deadline = time.monotonic() + 120
    while store.log(attempt, "progress.json") != b'{"done": 1}':
        assert time.monotonic() < deadline
        time.sleep(0.05)
    place.finish(Report(request.key, 0.0, error="lost"))


def train_request(store: Store, pair, chats) -> Request:
    return stored_request(store, TRAIN, {"model": pair.aligned, "data": chats})


def test_a_checkpoint_survives_its_machine_and_the_commit_removes_it(
    store, bucket, pair, chats, elsewhere
):
    place = module.workplace(train_request(store, pair, chats))
    place.prepare()
    scratch = Path(place.request.scratch)
    scratch.mkdir(parents=True)
    for text in ("first", "second"):
        (scratch / "checkpoint.pt").write_text(text)
        (scratch / ".checkpoint.0123abcd.pt").write_text("half")
        place.send_checkpoint()
    place.finish(Report(place.request.key, 0.0, error="lost"))
    assert len(list(store.place.entries("scratch"))) == 2  # one file, and checkpoint.json
    elsewhere()
    other = Store(bucket)
    later = module.workplace(train_request(other, pair, chats))
    scratch = Path(later.prepare().scratch)
    assert {path.name: path.read_text() for path in scratch.iterdir()} == {
        "checkpoint.pt": "second"
    }
    later.finish(Report(later.request.key, 0.0, error="lost"))
    scratch.joinpath("checkpoint.pt").unlink()
    other.place.delete([entry.name for entry in other.place.entries("scratch")])
    (report,) = run_batch([train_request(other, pair, chats)])
    assert report.error is None and not list(other.place.entries("scratch"))


def test_rank_0_of_a_gang_on_several_machines_keeps_the_checkpoint_for_all(
    store, bucket, pair, chats, elsewhere, monkeypatch
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for text in ("begun", "continued"):
        first, second = (
            module.workplace(train_request(store, pair, chats), rank, 2) for rank in (0, 1)
        )
        first.prepare()
        scratch = Path(first.request.scratch)
        if text == "continued":
            assert (scratch / "checkpoint.pt").read_text() == "begun"
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "checkpoint.pt").write_text(text)
        first.send_checkpoint()
        second.send_checkpoint()
        first.finish(Report(first.request.key, 0.0, error="lost"))
        elsewhere()
        store = Store(bucket)


def test_the_error_of_a_gangs_second_member_is_readable_in_the_store(store, pair, chats):
    place = module.workplace(train_request(store, pair, chats), 1, 2)
    log = Path(place.prepare().log)
    (log / "error.txt").write_text("its error")
    report = place.finish(
        Report(place.request.key, 0.0, error=f"its message is in {log / 'error.txt'}")
    )
    assert report.error == f"its message is in {store.url(place.attempt)}/log/error.txt"
    assert store.log(place.attempt, "error.txt") == b"its error" and place.attempt.exists()


def test_after_an_incomplete_upload_the_previous_checkpoint_is_used(
    store, bucket, pair, chats, elsewhere
):
    place = module.workplace(train_request(store, pair, chats))
    place.prepare()
    scratch = Path(place.request.scratch)
    scratch.mkdir(parents=True)
    (scratch / "checkpoint.pt").write_text("whole")
    place.send_checkpoint()
    store.place.write(
        f"scratch/{place.request.key}/later/checkpoint.pt", b"newer, but its list was never written"
    )
    elsewhere()
    request = module.workplace(train_request(Store(bucket), pair, chats)).prepare()
    assert (Path(request.scratch) / "checkpoint.pt").read_text() == "whole"


def test_a_checkpoint_whose_files_a_late_attempt_deleted_is_ignored(
    store, bucket, pair, chats, elsewhere
):
    place = module.workplace(train_request(store, pair, chats))
    place.prepare()
    scratch = Path(place.request.scratch)
    scratch.mkdir(parents=True)
    (scratch / "checkpoint.pt").write_text("whole")
    place.send_checkpoint()
    place.finish(Report(place.request.key, 0.0, error="lost"))
    store.place.delete(
        [entry.name for entry in store.place.entries("scratch") if entry.name.endswith(".pt")]
    )
    elsewhere()
    (report,) = run_batch([train_request(Store(bucket), pair, chats)])
    assert report.error is None


def killed_training(bucket: str, request: str) -> None:
    """A worker whose machine is lost after the upload of its second checkpoint."""
    send, sent = module.BucketWorkplace._send_checkpoint_files, []

    def sending(self):
        send(self)
        sent.append(1)
        if len(sent) == 2:
            os._exit(9)

    module.BucketWorkplace._send_checkpoint_files = sending
    run_batch([Request.from_json(request)])


@pytest.mark.timeout(200)
def test_a_training_whose_machine_was_lost_continues_elsewhere_with_the_same_result(
    store, bucket, pair, chats, elsewhere, tmp_path
):
    request = Request(
        **{
            **vars(train_request(store, pair, chats)),
            "checkpoint_every_s": 0.0,
            "spec": TRAIN.model_dump(mode="json"),
        }
    )
    worker = multiprocessing.get_context("spawn").Process(
        target=killed_training, args=(bucket, request.to_json())
    )
    worker.start()
    worker.join(120)
    assert worker.exitcode == 9 and store.find("train", request.key) is None
    elsewhere()
    other = Store(bucket)
    continued = Request(**{**vars(train_request(other, pair, chats)), "checkpoint_every_s": 0.0})
    (report,) = run_batch([continued])
    assert report.error is None
    undisturbed = Store(tmp_path / "folder")
    run_batch([train_request(undisturbed, pair, chats)])
    assert (
        other.open("train", request.key).content == undisturbed.open("train", request.key).content
    )


def test_dropped_files_are_restored_when_a_stage_reads_them(store, chats):
    check_restoring(store, chats)


@pytest.mark.slow
def test_dropped_files_are_restored_in_a_folder_too(tmp_path, chats):
    check_restoring(Store(tmp_path / "store"), chats)


def check_restoring(store: Store, chats: Path) -> None:
    first, second = rows(10, source(chats)), rows(8, rows(10, source(chats)))
    before = run(store, second)
    made = [before.artifact(stage) for stage in (first, second)]
    for artifact in made:
        store.drop(artifact, frozenset({DataSpec.ROWS}))
    shutil.rmtree(store.root / "data") if store.cache is not None else None
    # No stage reads them, so none runs again.
    idle = run(store, second)
    assert all(node.reused for node in idle.nodes.values()) and store.dropped(made[0])
    third = rows(5, second)
    runner = run(store, third)
    assert runner.artifact(third) is not None and not any(
        store.dropped(artifact) for artifact in made
    )
    assert [runner.artifact(stage) for stage in (first, second)] == made
    assert (
        made[0].file(DataSpec.ROWS).read_text() and content_digest(made[1].path) == made[1].content
    )


def test_a_restored_file_that_differs_stops_the_run_and_fails_no_stage(store, chats):
    first = rows(10, source(chats))
    made = run(store, first).artifact(first)
    store.drop(made, frozenset({DataSpec.ROWS}))
    record = json.loads(store.place.read(f"data/{made.key}/record.json"))
    record["files"] = {DataSpec.ROWS: "0" * 64}
    record["content"] = digest(record["files"])
    del record["sha256"]  # as an earlier version wrote it
    store.place.write(f"data/{made.key}/record.json", json.dumps(record).encode())
    runner = Runner(Store(store.place.at), InlineExecutor())
    last = rows(5, first)
    runner.add([last])
    with pytest.raises(Differs, match="store forget data"):
        settle(runner)
    assert runner.failure(last) is None and runner.failure(first) is None
