"""A bucket's workers, its cache and its checkpoints: equal to a folder's in what they make, and
safe when cut off or side by side.
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
    runner.want(stages)
    settle(runner)
    return runner


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """From here on this process is another machine: its cache is empty."""

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
    said = Stage(
        GenerateSpec(max_new_tokens=4, dtype="float32"),
        {
            "model": model,
            "prompts": source(prompts_path),
            "adapter": Part(train, TrainSpec.ADAPTER),
        },
    )
    found = [run(Store(tmp_path / "folder"), said), run(store, said)]
    artifacts = [[runner.artifact(stage) for stage in (data, train, said)] for runner in found]
    assert artifacts[0] and all(
        node.state == "done" for runner in found for node in runner.nodes.values()
    )
    assert [(each.key, each.content) for each in artifacts[0]] == [
        (each.key, each.content) for each in artifacts[1]
    ]
    # A driver on another machine runs nothing, and reads one file.
    elsewhere()
    again = run(Store(bucket), said)
    assert all(node.reused for node in again.nodes.values())
    assert (
        again.artifact(said).file(GenerateSpec.COMPLETIONS).read_bytes()
        == artifacts[0][2].file(GenerateSpec.COMPLETIONS).read_bytes()
    )
    # Nothing that was written holds a secret or a place of the driver's machine.
    names = [entry.name for entry in store.place.entries() if entry.name.endswith(".json")]
    assert {name.rpartition("/")[2] for name in names} >= {"record.json", "request.json"}
    for name in names:
        text = (store.place.read(name) or b"").decode()
        assert (
            text and CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in text and str(tmp_path) not in text
        ), name


def test_sources_are_sent_once_and_by_content(store, chats):
    run(store, rows(3, source(chats)))
    before = {entry.name: entry.modified for entry in store.place.entries("sources")}
    assert list(before) == [f"sources/{content_digest(chats)}/{chats.name}"]
    run(Store(store.place.at), rows(4, source(chats)))
    assert {entry.name: entry.modified for entry in store.place.entries("sources")} == before


def test_the_command_of_a_failure_shows_it_again(store, chats):
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


def test_a_batch_runs_on_when_the_inputs_of_one_stage_cannot_be_fetched(store, chats):
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


def test_an_input_that_the_store_has_lost_stops_the_run_and_marks_no_stage(
    store, bucket, chats, elsewhere
):
    first = rows(10, source(chats))
    made = run(store, first).artifact(first)
    store.place.delete(
        [entry.name for entry in store.place.entries(f"data/{made.key}/{made.folder.name}/payload")]
    )
    elsewhere()
    runner, last = Runner(Store(bucket), InlineExecutor()), rows(5, first)
    runner.want([last])
    with pytest.raises(
        StoreError, match=f"{DataSpec.ROWS} of .* is not in the store any more.*verify --mend"
    ):
        settle(runner)
    assert runner.failure(last) is None


def test_the_driver_sees_a_stages_progress_while_it_runs(store, pair, chats, monkeypatch):
    monkeypatch.setattr(module, "PROGRESS_EVERY_S", 0.05)
    work = module.workplace(train_request(store, pair, chats))
    request = work.prepared()
    attempt = store.local(store.url(Path(request.out).parent))
    assert store.log(attempt, "progress.json") is None
    Path(request.log, "progress.json").write_text('{"done": 1}')
    deadline = time.monotonic() + 120
    while store.log(attempt, "progress.json") != b'{"done": 1}':
        assert time.monotonic() < deadline
        time.sleep(0.05)
    work.ended(Report(request.key, 0.0, error="lost"))


def train_request(store: Store, pair, chats) -> Request:
    return stored_request(store, TRAIN, {"model": pair.aligned, "data": chats})


def test_a_checkpoint_outlives_the_machine_and_goes_with_the_commit(
    store, bucket, pair, chats, elsewhere
):
    work = module.workplace(train_request(store, pair, chats))
    work.prepared()
    scratch = Path(work.request.scratch)
    scratch.mkdir(parents=True)
    for text in ("first", "second"):
        (scratch / "checkpoint.pt").write_text(text)
        (scratch / ".checkpoint.0123abcd.pt").write_text("half")
        work.saved()
    work.ended(Report(work.request.key, 0.0, error="lost"))
    assert len(list(store.place.entries("scratch"))) == 2  # one file and what lists it
    elsewhere()
    there = Store(bucket)
    later = module.workplace(train_request(there, pair, chats))
    scratch = Path(later.prepared().scratch)
    assert {path.name: path.read_text() for path in scratch.iterdir()} == {
        "checkpoint.pt": "second"
    }
    later.ended(Report(later.request.key, 0.0, error="lost"))
    scratch.joinpath("checkpoint.pt").unlink()
    there.place.delete([entry.name for entry in there.place.entries("scratch")])
    (report,) = run_batch([train_request(there, pair, chats)])
    assert report.error is None and not list(there.place.entries("scratch"))


def test_rank_0_of_a_gang_on_several_machines_keeps_the_checkpoint_of_all(
    store, bucket, pair, chats, elsewhere, monkeypatch
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for told in ("begun", "continued"):
        first, second = (
            module.workplace(train_request(store, pair, chats), rank, 2) for rank in (0, 1)
        )
        first.prepared()
        scratch = Path(first.request.scratch)
        if told == "continued":
            assert (scratch / "checkpoint.pt").read_text() == "begun"
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "checkpoint.pt").write_text(told)
        first.saved()
        second.saved()
        first.ended(Report(first.request.key, 0.0, error="lost"))
        elsewhere()
        store = Store(bucket)


def test_what_a_gang_s_second_member_says_of_its_failure_is_where_everybody_can_read_it(
    store, pair, chats
):
    work = module.workplace(train_request(store, pair, chats), 1, 2)
    log = Path(work.prepared().log)
    (log / "error.txt").write_text("its words")
    report = work.ended(
        Report(work.request.key, 0.0, error=f"its message is in {log / 'error.txt'}")
    )
    assert report.error == f"its message is in {store.url(work.attempt)}/log/error.txt"
    assert store.log(work.attempt, "error.txt") == b"its words" and work.attempt.exists()


def test_a_checkpoint_that_was_sent_in_part_is_the_one_before(
    store, bucket, pair, chats, elsewhere
):
    work = module.workplace(train_request(store, pair, chats))
    work.prepared()
    scratch = Path(work.request.scratch)
    scratch.mkdir(parents=True)
    (scratch / "checkpoint.pt").write_text("whole")
    work.saved()
    store.place.write(
        f"scratch/{work.request.key}/later/checkpoint.pt", b"newer, but its list was never written"
    )
    elsewhere()
    again = module.workplace(train_request(Store(bucket), pair, chats)).prepared()
    assert (Path(again.scratch) / "checkpoint.pt").read_text() == "whole"


def test_a_checkpoint_whose_files_a_late_attempt_took_away_is_none(
    store, bucket, pair, chats, elsewhere
):
    work = module.workplace(train_request(store, pair, chats))
    work.prepared()
    scratch = Path(work.request.scratch)
    scratch.mkdir(parents=True)
    (scratch / "checkpoint.pt").write_text("whole")
    work.saved()
    work.ended(Report(work.request.key, 0.0, error="lost"))
    store.place.delete(
        [entry.name for entry in store.place.entries("scratch") if entry.name.endswith(".pt")]
    )
    elsewhere()
    (report,) = run_batch([train_request(Store(bucket), pair, chats)])
    assert report.error is None


def killed_training(bucket: str, request: str) -> None:
    """A worker whose machine goes when it has sent its second checkpoint."""
    send, sent = module.BucketWorkplace._send_checkpoint, []

    def sending(self):
        send(self)
        sent.append(1)
        if len(sent) == 2:
            os._exit(9)

    module.BucketWorkplace._send_checkpoint = sending
    run_batch([Request.from_json(request)])


@pytest.mark.timeout(200)
def test_a_training_whose_machine_was_lost_goes_on_elsewhere_and_ends_the_same(
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
    there = Store(bucket)
    continued = Request(**{**vars(train_request(there, pair, chats)), "checkpoint_every_s": 0.0})
    (report,) = run_batch([continued])
    assert report.error is None
    undisturbed = Store(tmp_path / "folder")
    run_batch([train_request(undisturbed, pair, chats)])
    assert (
        there.open("train", request.key).content == undisturbed.open("train", request.key).content
    )


def test_what_retention_dropped_is_made_again_when_somebody_has_to_read_it(store, chats):
    check_remaking(store, chats)


@pytest.mark.slow
def test_in_a_folder_too(tmp_path, chats):
    check_remaking(Store(tmp_path / "store"), chats)


def check_remaking(store: Store, chats: Path) -> None:
    first, second = rows(10, source(chats)), rows(8, rows(10, source(chats)))
    before = run(store, second)
    made = [before.artifact(stage) for stage in (first, second)]
    for artifact in made:
        store.drop(artifact, frozenset({DataSpec.ROWS}))
    shutil.rmtree(store.root / "data") if store.cache is not None else None
    # Nobody reads them: nothing is made again, and all keys are known.
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


def test_a_dropped_file_that_comes_out_otherwise_stops_the_run_and_marks_no_stage(store, chats):
    first = rows(10, source(chats))
    made = run(store, first).artifact(first)
    store.drop(made, frozenset({DataSpec.ROWS}))
    record = json.loads(store.place.read(f"data/{made.key}/record.json"))
    record["files"] = {DataSpec.ROWS: "0" * 64}
    record["content"] = digest(record["files"])
    store.place.write(f"data/{made.key}/record.json", json.dumps(record).encode())
    runner = Runner(Store(store.place.at), InlineExecutor())
    last = rows(5, first)
    runner.want([last])
    with pytest.raises(Differs, match="store forget data"):
        settle(runner)
    assert runner.failure(last) is None and runner.failure(first) is None
