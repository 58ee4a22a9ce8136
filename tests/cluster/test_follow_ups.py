"""Follow-ups: small stages that run in the batch of the stage whose output they read."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ebbline.cluster.executors.executor import Finished, Job, Loss, Needs, run_batch
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.cluster.profile import Profile
from ebbline.cluster.running.runner import Runner
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks import kinds
from ebbline.tasks.stage import Request, Source, Stage
from tests.cluster.made import rows, settle, source
from tests.tiny import write_chats


class Recording(InlineExecutor):
    """The inline executor; it records its batches. It can lose a job after its first commit."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[str, ...]] = []
        self.loses = False

    def submit(self, batch: Sequence[Request], needs: Needs, hosts: Mapping[str, int]) -> Job:
        if self.loses:
            batch = [replace(request, follow_ups=()) for request in batch]
        job = super().submit(batch, needs, hosts)
        self.batches.append(job.keys)
        return job

    def finished(self, timeout_s: float) -> Sequence[Finished]:
        found = super().finished(timeout_s)
        if self.loses and found:
            self.loses = False
            return [Finished(each.job, (), Loss("the worker died")) for each in found]
        return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def pool(tmp_path: Path) -> Source:
    return source(write_chats(tmp_path / "pool.jsonl", 20))


@pytest.fixture
def following(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of the kind `data` follow the stage that they read from."""
    follows = replace(kinds.STAGE_KINDS["data"], follows_its_input=True)
    monkeypatch.setitem(kinds.STAGE_KINDS, "data", follows)  # type: ignore[arg-type]


def ran(store: Store, *stages: Stage, loses: bool = False) -> tuple[Runner, Recording]:
    executor = Recording()
    executor.loses = loses
    runner = Runner(store, executor, profile=Profile(backoff_s=0.01))
    runner.add(stages)
    settle(runner)
    return runner, executor


@pytest.mark.process
def test_a_worker_imports_torch_only_for_stages_that_need_it(tmp_path: Path) -> None:
    """Its import takes seconds, before the first training rows can be written."""
    code = f"""
import sys
from pathlib import Path
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.cluster.executors.executor import run_batch
from ebbline.cluster.running.runner import Runner
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.identity import content_digest
from ebbline.tasks.measuring.completions import Completion, write_completions
from ebbline.tasks.specs import DataSpec, ScoreSpec
from ebbline.tasks.stage import Source, Stage
here = Path({str(tmp_path)!r})
(here / "pool.jsonl").write_text('{{"prompt": "a b", "completion": "c d"}}\\n')
(here / "generation").mkdir()
row = Completion("1", "", "", "", "what?", "c", "c", 1, True)
write_completions(here / "generation", [row])
at = lambda name: Source(content_digest(here / name), str(here / name))
data = Stage(DataSpec(size=1), {{"pool": at("pool.jsonl")}})
score = Stage(ScoreSpec(measure="task", scorer="exact"), {{"generation": at("generation")}})
runner = Runner(Store(here / "store"), InlineExecutor())
runner.add([data, score])
while not all(map(runner.settled, [data, score])):
    runner.step(0.0)
print([runner.failure(stage) for stage in (data, score)], "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "[None, None] False\n", done.stdout + done.stderr


def test_a_score_follows_and_no_other_kind_does():
    following = {name for name, kind in kinds.STAGE_KINDS.items() if kind.follows_its_input}
    assert following == {"score"}


def test_a_follow_up_has_no_job_and_the_same_record(store, pool, tmp_path, following):
    first = rows(8, pool)
    second = rows(4, first)
    runner, executor = ran(store, second)
    assert executor.batches == [(runner.nodes[first.lineage].key,)]
    assert runner.counts["data"] == {"done": 2, "waiting": 0, "running": 0, "ready": 0}
    made = runner.artifact(second)
    assert made is not None and made.provenance["gpus"] == 0 and "load" in made.provenance
    request = Request.from_json((made.log / "request.json").read_text())
    assert request.key == made.key and request.inputs["pool"].endswith("payload/data.jsonl")

    executor = Recording()
    plain = Runner(Store(tmp_path / "other"), executor)
    plain.add([first])
    settle(plain)
    plain.add([second])  # its input is done: it is a job of its own
    settle(plain)
    alone = plain.artifact(second)
    assert len(executor.batches) == 2 and alone is not None
    assert (alone.key, alone.content, alone.hashed) == (made.key, made.content, made.hashed)
    assert set(alone.provenance) == set(made.provenance)


def test_the_follow_ups_of_a_batch_run_right_after_their_stages(store, pool, following):
    firsts = [rows(8, pool, seed) for seed in range(3)]
    seconds = [rows(4, first) for first in firsts for _ in range(1)]
    runner, _ = ran(store, *seconds)
    for first, second in zip(firsts, seconds, strict=True):
        made = [runner.nodes[stage.lineage] for stage in (first, second)]
        assert [node.counts_as for node in made] == ["done", "done"]


def test_a_follow_up_that_fails_fails_alone_with_its_log_and_command(store, pool, following):
    good, bad = rows(2, rows(4, pool)), rows(400, rows(4, pool))
    runner, executor = ran(store, good, bad)
    assert len(executor.batches) == 1 and runner.artifact(good) is not None
    failure = runner.failure(bad)
    assert failure is not None and "data.size=400" in failure.reason and not failure.inherited
    assert failure.invalid_input
    attempt = runner.nodes[bad.lineage].attempt
    assert attempt is not None and (attempt / "log" / "error.txt").is_file()
    assert failure.command == f"ebbline rerun {attempt}/log/request.json"


def test_a_follow_up_of_a_lost_job_is_a_job_of_its_own(store, pool, following):
    first = rows(8, pool)
    second = rows(4, first)
    runner, executor = ran(store, second, loses=True)
    keys = [runner.nodes[stage.lineage].key for stage in (first, second)]
    assert executor.batches == [(keys[0],), (keys[1],)]
    assert runner.artifact(second) is not None


def test_a_follow_up_of_a_stage_that_fails_inherits_the_failure(store, pool, following):
    second = rows(4, rows(400, pool))
    runner, _ = ran(store, second)
    failure = runner.failure(second)
    assert failure is not None and failure.inherited


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the attempts that were begun."""
    begin, found = Store.begin, list[str]()

    def noted(store: Store, kind: str, *rest: str) -> Path:
        found.append(kind)
        return begin(store, kind, *rest)

    monkeypatch.setattr(Store, "begin", noted)
    return found


def test_a_follow_up_that_is_in_the_store_does_not_run(store, pool, tmp_path, following, begun):
    stored, _ = ran(store, rows(4, rows(8, pool)))
    # The same rows by another way: the first stage is new, the key of the second is not.
    copy = tmp_path / "copy.jsonl"
    copy.write_text(Path(pool.location).read_text() + "\n")
    second = rows(4, rows(8, source(copy)))
    begun.clear()
    runner, _ = ran(store, second)
    assert len(begun) == 1
    node, first = runner.nodes[second.lineage], second.upstream()[0]
    assert runner.nodes[first.lineage].counts_as == "done"
    assert node.counts_as == "reused" and node.artifact in [
        each.artifact for each in stored.nodes.values()
    ]


def test_duplicates_of_a_follow_up_run_once(store, pool, tmp_path, following, begun):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(Path(pool.location).read_text() + "\n")
    one, other = rows(4, rows(8, pool)), rows(4, rows(8, source(copy)))
    runner, _ = ran(store, one, other)
    assert runner.nodes[one.lineage].key == runner.nodes[other.lineage].key
    assert len(begun) == 3 and runner.artifact(one) == runner.artifact(other)


class Halfway(Recording):
    """Commits the stages of its job in the first call of `finished`, and ends it in the next."""

    halfway = False

    def finished(self, timeout_s: float) -> Sequence[Finished]:
        if self._waiting and not self.halfway:
            self.halfway = True
            run_batch([replace(request, follow_ups=()) for request in self._waiting[0][1]])
            return []
        return super().finished(timeout_s)


@pytest.mark.parametrize("last", [0, 1])
def test_a_stage_with_the_key_of_a_follow_up_waits_for_it(store, pool, tmp_path, following, last):
    """Its own input has the key of the follow-up's input, and so no job."""
    copy = tmp_path / "copy.jsonl"
    copy.write_text(Path(pool.location).read_text() + "\n")
    whole = [rows(20, pool), rows(20, source(copy))]
    ran(store, *whole)
    ends = [rows(4, rows(8, each)) for each in whole]
    executor = Halfway()
    runner = Runner(store, executor)
    runner.add([ends[1 - last], ends[last]])
    runner.step(0.0)
    assert [runner.nodes[end.lineage].state for end in ends] == ["running", "running"]
    settle(runner)
    assert [runner.nodes[end.lineage].counts_as for end in ends] == ["done", "done"]
    assert len(executor.batches) == 1


def test_a_worker_that_cannot_begin_a_follow_up_leaves_it_to_the_driver(
    store, pool, following, monkeypatch
):
    begin = Store.begin

    def full(self, kind, key, attempt=""):
        if attempt:
            raise OSError("no room")
        return begin(self, kind, key)

    monkeypatch.setattr(Store, "begin", full)
    second = rows(4, rows(8, pool))
    runner, executor = ran(store, second)
    assert runner.artifact(second) is not None and len(executor.batches) == 2


class Slow(InlineExecutor):
    """Commits the stages of a batch one by one, each during one call of `finished`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def finished(self, timeout_s: float) -> Sequence[Finished]:
        self.calls += 1
        if not self._waiting:
            return []
        job, batch = self._waiting[0]
        done, *rest = batch
        super().submit([done], Needs(0), {})
        own = self._waiting.pop()
        self._waiting.insert(0, own)
        reports = super().finished(timeout_s)[0].reports
        if rest:
            self._waiting[0] = (job, rest)
            return []
        self._waiting.pop(0)
        return [Finished(job, reports)]


def test_a_commit_of_a_running_batch_is_seen_at_the_next_look(store, pool, monkeypatch):
    """Not at the end of the wait of 0.5 s: the stages that read it start at once."""
    batched = replace(kinds.STAGE_KINDS["data"], resident=lambda spec, stage: "all")
    monkeypatch.setitem(kinds.STAGE_KINDS, "data", batched)  # type: ignore[arg-type]
    executor = Slow()
    runner = Runner(store, executor)
    runner.add([rows(8, pool, seed) for seed in range(3)])
    for number in range(1, 4):
        runner.step()
        assert (executor.calls, runner.settlements) == (number, number)
