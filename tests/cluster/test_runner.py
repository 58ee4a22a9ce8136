"""The runner on real, cheap stages: no stage runs twice, and each failure has a reason and a
command that reproduces it.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Literal

import pytest

from ebbline.cluster.executors.executor import (
    ACCELERATOR_TYPE,
    Capacity,
    Finished,
    Host,
    Job,
    Loss,
    Needs,
)
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.cluster.profile import GpuType, Profile
from ebbline.cluster.running import runner as runners
from ebbline.cluster.running import starter as starters
from ebbline.cluster.running import timing as timings
from ebbline.cluster.running.nodes import Node
from ebbline.cluster.running.runner import Runner
from ebbline.cluster.schedule.costs import GpuTypes, Unmetered
from ebbline.cluster.schedule.needs import default_needs, resident
from ebbline.cluster.schedule.scheduler import ReadyQueue
from ebbline.cluster.store.artifacts import Store
from ebbline.cluster.store.resolver import Resolver, contents_of
from ebbline.tasks.errors import ClusterLost, DiskFull, EndpointDown, StoreError, StudyError
from ebbline.tasks.identity import digest
from ebbline.tasks.measuring.completions import Completion, write_completions
from ebbline.tasks.specs import ApplySpec, DataSpec, GenerateSpec, JudgeSpec, ProjectSpec, TrainSpec
from ebbline.tasks.stage import Part, Request, Source, Stage, key_payload
from tests.clock import Clock
from tests.cluster.made import rows, settle, source
from tests.tiny import write_chats

PATIENCE = Profile(tries=3, backoff_s=0.01, hang_after_s=1.0)


class Counting(InlineExecutor):
    """The inline executor; it records the keys of its batches."""

    def __init__(self, gpus: int = 1) -> None:
        super().__init__(gpus)
        self.batches: list[tuple[str, ...]] = []

    def submit(self, batch: Sequence[Request], needs: Needs, hosts: Mapping[str, int]) -> Job:
        job = super().submit(batch, needs, hosts)
        self.batches.append(job.keys)
        return job

    @property
    def keys(self) -> list[str]:
        return [key for batch in self.batches for key in batch]


class Losing(Counting):
    """Loses the first `times` jobs, like a dying node: they end without reports."""

    def __init__(self, times: int, blame: Literal["stage", "memory"] = "stage") -> None:
        super().__init__()
        self.left, self.blame = times, blame
        self.killed: list[tuple[str, ...]] = []

    def submit(self, batch: Sequence[Request], needs: Needs, hosts: Mapping[str, int]) -> Job:
        self.killed += [request.killed for request in batch]
        return super().submit(batch, needs, hosts)

    def finished(self, timeout_s: float) -> Sequence[Finished]:
        if self.left and self._waiting:
            self.left -= 1
            job, _ = self._waiting.pop(0)
            return [Finished(job, (), lost=Loss("WorkerCrashedError: the worker died", self.blame))]
        return super().finished(timeout_s)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def pool(tmp_path) -> Source:
    return source(write_chats(tmp_path / "pool.jsonl", 20))


def ran(store: Store, *stages: Stage, executor: Counting | None = None) -> tuple[Runner, Counting]:
    executor = executor or Counting()
    runner = Runner(store, executor, profile=PATIENCE)
    runner.add(stages)
    settle(runner)
    return runner, executor


def test_a_chain_runs_in_order_with_the_right_content(store, pool):
    last = rows(3, rows(5, rows(10, pool)))
    runner, executor = ran(store, last)
    assert len(executor.keys) == 3
    assert len((runner.artifact(last).path / DataSpec.ROWS).read_text().splitlines()) == 3
    assert not runner.nodes[last.lineage].reused and runner.idle


def test_another_runner_does_not_rerun_stages_in_the_store(store, pool):
    last = rows(3, rows(5, pool))
    first, _ = ran(store, last)
    second, executor = ran(store, rows(3, rows(5, pool)))
    assert executor.keys == []
    assert second.artifact(last) == first.artifact(last)
    assert all(node.reused for node in second.nodes.values())


def test_a_file_that_moved_is_the_same_input_and_a_changed_one_is_not(store, pool, tmp_path):
    ran(store, rows(5, pool))
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(Path(pool.location).read_bytes())
    assert ran(store, rows(5, source(moved)))[1].keys == []
    assert len(ran(store, rows(5, source(write_chats(moved, 20, seed=1))))[1].keys) == 1


def test_two_lineages_with_one_key_run_once(store, tmp_path):
    one_row = source(write_chats(tmp_path / "one.jsonl", 1))
    # One row in two orders: different stages with equal content, so their readers have one key.
    above = [rows(1, one_row, seed=seed) for seed in (0, 1)]
    below = [rows(1, stage, seed=5) for stage in above]
    assert below[0].lineage != below[1].lineage
    runner, executor = ran(store, *below)
    assert len(executor.keys) == 3
    assert runner.artifact(below[0]) == runner.artifact(below[1])


def test_a_stage_whose_inputs_have_equal_content_is_not_rerun(store, tmp_path):
    one_row = source(write_chats(tmp_path / "one.jsonl", 1))
    ran(store, rows(1, rows(1, one_row), seed=5))
    changed = rows(1, rows(1, one_row, seed=7), seed=5)
    runner, executor = ran(store, changed)
    assert len(executor.keys) == 1, "only the changed stage runs"
    assert runner.nodes[changed.lineage].reused


def test_a_key_hashes_only_the_part_that_is_read(store, pool):
    whole = rows(20, pool)
    runner, _ = ran(store, whole)
    made = runner.artifact(whole)
    read = contents_of(rows(5, whole), runner.artifact)["pool"]
    assert read == made.content_of(DataSpec.ROWS) != made.content


def test_a_shared_upstream_stage_runs_once(store, pool):
    shared = rows(10, pool)
    _, executor = ran(store, *(rows(size, rows(10, pool)) for size in (1, 2, 3)), shared)
    assert len(executor.keys) == 4


def test_adding_a_stage_twice_runs_it_once(store, pool):
    stage = rows(5, pool)
    runner, executor = ran(store, stage)
    runner.add([rows(5, pool), stage])
    settle(runner)
    assert len(executor.keys) == 1 and len(runner.nodes) == 1


def test_each_downstream_node_is_listed_once_without_comparing_nodes(store, pool, monkeypatch):
    shared = rows(10, pool)
    twice = Stage(
        DataSpec(size=12, mix_share=0.5),
        {name: Part(shared, DataSpec.ROWS) for name in ("pool", "mix")},
    )
    monkeypatch.setattr(
        Node, "__eq__", lambda self, other: pytest.fail("a node was compared with another")
    )
    runner = Runner(store, Counting())
    runner.add([twice, *(rows(size, shared) for size in range(1, 6))])
    downstream = runner.nodes[shared.lineage].downstream
    assert len(downstream) == 6 and len({id(node) for node in downstream}) == 6


def test_adding_stages_does_not_check_the_waiting_ones(store, pool, monkeypatch):
    shared = rows(10, pool)
    runner, checked = Runner(store, Counting()), list[Stage]()
    monkeypatch.setattr(
        runners,
        "contents_of",
        lambda stage, artifact: checked.append(stage) or contents_of(stage, artifact),
    )
    runner.add(rows(size, shared) for size in range(1, 9))
    checked.clear()
    runner.add([rows(9, shared)])
    assert {stage.lineage for stage in checked} == {rows(9, shared).lineage}
    settle(runner)
    assert runner.counts["data"] == Counter(done=10)


def counted(runner: Runner) -> dict[str, Counter[str]]:
    """The counts of the runner's nodes, computed from their states."""
    counts: dict[str, Counter[str]] = {}
    for node in runner.nodes.values():
        state = "reused" if node.state == "done" and node.reused else node.state
        counts.setdefault(node.stage.kind, Counter())[state] += 1
    return counts


def test_the_counts_always_equal_those_of_the_nodes(store, pool, tmp_path):
    ran(store, rows(10, pool))
    whole = store.open("data", next(artifact.key for artifact in store.all("data")))
    store.drop(whole, frozenset(whole.files))  # so that its stage is rerun
    one_row = source(write_chats(tmp_path / "one.jsonl", 1))
    duplicates = [rows(1, rows(1, one_row, seed=seed), seed=5) for seed in (0, 1)]
    failing = rows(3, rows(99, pool))
    runner = Runner(store, Losing(1), profile=PATIENCE)
    runner.add([rows(10, pool), rows(4, rows(10, pool)), *duplicates, failing])
    while runner.unsettled():
        assert runner.counts == counted(runner)  # in a Counter a missing count equals 0
        runner.step()
    assert runner.counts == counted(runner)
    assert runner.counts["data"]["failed"] == 2 and runner.settlements == len(runner.nodes)


def test_a_failure_fails_its_downstream_stages_and_no_other(store, pool):
    broken = rows(99, pool)
    below, further, other = rows(3, broken), rows(2, rows(3, broken)), rows(4, pool)
    runner, executor = ran(store, further, below, other)
    assert len(executor.keys) == 2
    own = runner.failure(broken)
    assert own.reason.startswith("data: data.size=99") and own.command.startswith("ebbline rerun ")
    for stage in (below, further):
        assert runner.failure(stage).reason == f"needs data, which failed: {own.reason}"
        assert runner.failure(stage).inherited and runner.failure(stage).command == own.command
    assert not own.inherited
    assert runner.failure(other) is None and runner.artifact(other) is not None
    assert runner.settled(further)


@pytest.mark.process
def test_the_command_of_a_failure_reproduces_it(store, pool):
    broken = rows(99, pool)
    runner, _ = ran(store, broken)
    command = runner.failure(broken).command.split()
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "data.size=99" in done.stderr


def test_a_stage_added_after_its_duplicate_failed_fails_with_the_same_reason(store, pool):
    runner, executor = ran(store, rows(99, pool))
    late = rows(2, rows(99, pool))
    runner.add([late])
    settle(runner)
    assert "data.size=99" in runner.failure(late).reason and len(executor.keys) == 1


def test_the_next_runner_retries_a_failed_stage(store, tmp_path):
    path = write_chats(tmp_path / "pool.jsonl", 3)
    ran(store, rows(5, source(path)))
    runner, executor = ran(store, rows(5, source(write_chats(path, 8))))
    assert len(executor.keys) == 1 and all(node.state == "done" for node in runner.nodes.values())


def test_a_lost_job_is_retried(store, pool):
    stage = rows(5, pool)
    runner, executor = ran(store, stage, executor=Losing(PATIENCE.tries - 1))
    assert runner.artifact(stage) is not None
    assert len(executor.keys) == PATIENCE.tries and len(set(executor.keys)) == 1


def test_a_stage_that_is_lost_every_time_fails_with_the_reason(store, pool):
    stage = rows(5, pool)
    runner, executor = ran(store, stage, executor=Losing(100))
    assert len(executor.keys) == PATIENCE.tries
    assert (
        runner.failure(stage).reason
        == f"data: lost {PATIENCE.tries} times (WorkerCrashedError: the worker died)"
    )
    assert runner.failure(stage).command.startswith("ebbline rerun ")


def test_a_training_that_is_killed_for_memory_learns_of_each_attempt_that_was(store, pool):
    """With a global batch of 4 two kills halve, and do not use up its tries."""
    spec = TrainSpec(rank=4, global_batch=4, max_tokens=32)
    stage = Stage(spec, {"model": Source("m" * 64, "/nowhere"), "data": pool})
    runner, executor = ran(store, stage, executor=Losing(100, "memory"))
    assert [len(attempts) for attempts in executor.killed] == [0, 1, 2, 2, 2]
    assert executor.killed[1] == executor.killed[2][:1] and len(set(executor.killed[2])) == 2
    assert runner.failure(stage).reason.startswith(f"train: lost {PATIENCE.tries} times")


def test_a_job_that_is_lost_after_its_commit_counts_as_done(store, pool):
    class Late(Counting):
        def finished(self, timeout_s: float) -> Sequence[Finished]:
            return [
                Finished(done.job, (), lost=Loss("died after the last commit"))
                for done in super().finished(timeout_s)
            ]

    stage = rows(5, pool)
    runner, executor = ran(store, stage, executor=Late())
    assert runner.artifact(stage) is not None and len(executor.keys) == 1


def test_the_loss_of_a_batch_is_charged_to_its_current_stage_only(store, pool):
    # Three stages in one batch: a job that dies at the first stage does not charge the other two.
    model = Source("m" * 64, "/nowhere")
    stages = [
        Stage(ProjectSpec(), {"adapter": Source(c * 64, "/a"), "base": model, "aligned": model})
        for c in "abc"
    ]
    executor = Losing(1)
    runner = Runner(store, executor)
    runner.add(stages)
    runner.step(0.0)
    assert len(executor.batches) == 1 and len(executor.batches[0]) == 3
    assert sorted(runner._setup.retry_policy.lost(key) for key in executor.batches[0]) == [0, 0, 1]


class Silent(Counting):
    """Two hosts, and jobs that run without progress until they are cancelled. With `lost` they are
    lost at once.
    """

    def __init__(self, lost: Loss | None = None) -> None:
        super().__init__()
        self.hosts, self.lost, self.grows = [Host("here", 2, 1), Host("there", 2, 1)], lost, False
        self.jobs: list[Job] = []
        self.cancelled: list[Job] = []
        self.expected: list[Needs] = []
        self.queued = False

    def begun(self, job: Job) -> bool:
        return not self.queued

    def capacity(self) -> Capacity:
        return Capacity(tuple(self.hosts), self.grows)

    def submit(self, batch: Sequence[Request], needs: Needs, hosts: Mapping[str, int]) -> Job:
        self.jobs.append(super().submit(batch, needs, hosts))
        return self.jobs[-1]

    def finished(self, timeout_s: float) -> Sequence[Finished]:
        ended, self._waiting = (
            ([self._waiting[0]], self._waiting[1:])
            if self.lost and self._waiting
            else ([], self._waiting)
        )
        return [Finished(job, (), self.lost) for job, _ in ended]

    def cancel(self, job: Job) -> None:
        self.cancelled.append(job)
        super().cancel(job)

    def expect(self, queue: Sequence[tuple[Needs, float]]) -> None:
        self.expected = [needs for needs, _ in queue]


def step_for(runner: Runner, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120.0
    while not condition():
        assert time.monotonic() < deadline
        runner.step(0.01)


@pytest.mark.slow
def test_a_job_without_progress_is_cancelled_and_retried_until_its_tries_are_used(store, pool):
    executor, stage = Silent(), rows(5, pool)
    runner = Runner(store, executor, profile=PATIENCE)
    runner.add([stage])
    step_for(runner, lambda: runner.settled(stage))
    assert executor.cancelled == executor.jobs and len(executor.jobs) == PATIENCE.tries
    assert "lost 3 times (cancelled after 1 s without progress)" in runner.failure(stage).reason


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A virtual clock for the runner and its parts."""
    clock = Clock()
    for module in (runners, starters, timings):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_job_with_progress_is_not_cancelled(store, pool, clock):
    executor, stage = Silent(), rows(5, pool)
    runner = Runner(store, executor, profile=PATIENCE)
    runner.add([stage])
    while clock.now < 2.5 * PATIENCE.hang_after_s:
        runner.step(0.0)
        path = runner.nodes[stage.lineage].attempt / "log" / "progress.json"
        path.write_text(json.dumps({"done": 1, "total": 9, "note": "", "seconds": clock.now}))
        clock.sleep(0.1)
    assert executor.cancelled == [] and len(executor.jobs) == 1


def test_progress_of_any_stage_of_a_batch_is_progress_of_the_job(store, pool, clock):
    """A group of generations reports the progress of its later members."""
    executor, stages = Silent(), [rows(5, pool), rows(6, pool)]
    runner = Runner(store, executor, profile=PATIENCE)
    runner.add(stages)
    runner.step(0.0)
    first, second = (runner.nodes[stage.lineage] for stage in stages)
    for item in runner.running.values():
        item.keys[:] = [first.key, second.key]
    while clock.now < 2.5 * PATIENCE.hang_after_s:
        path = second.attempt / "log" / "progress.json"
        path.write_text(json.dumps({"done": 1, "total": 9, "note": "", "seconds": clock.now}))
        runner.step(0.0)
        clock.sleep(0.1)
    assert executor.cancelled == []


def test_a_job_that_waits_for_resources_does_not_count_as_hung(store, pool, clock):
    executor, stage = Silent(), rows(5, pool)
    runner, executor.queued = Runner(store, executor, profile=PATIENCE), True
    runner.add([stage])
    while clock.now < 2.5 * PATIENCE.hang_after_s:
        runner.step(0.0)
        clock.sleep(0.1)
    assert executor.cancelled == [] and len(executor.jobs) == 1
    executor.queued, began = False, clock.now
    while not executor.cancelled:
        runner.step(0.0)
        clock.sleep(0.1)
    assert PATIENCE.hang_after_s < clock.now - began < 2 * PATIENCE.hang_after_s


def test_duplicates_share_one_attempt(store, tmp_path):
    one_row = source(write_chats(tmp_path / "one.jsonl", 1))
    above = [rows(1, one_row, seed=seed) for seed in (0, 1)]
    below = [rows(1, stage, seed=5) for stage in above]
    for stage in above:
        ran(store, stage)
    executor = Silent()
    runner = Runner(store, executor, profile=PATIENCE)
    runner.add(below)
    runner.step(0.0)
    first, second = (runner.nodes[stage.lineage] for stage in below)
    assert len(executor.jobs) == 1 and first.key == second.key
    assert first.attempt is not None and first.attempt == second.attempt


def test_a_stage_added_while_its_duplicate_runs_starts_no_second_job(store, tmp_path):
    one_row = source(write_chats(tmp_path / "one.jsonl", 1))
    above = [rows(1, one_row, seed=seed) for seed in (0, 1)]
    first, second = (rows(1, stage, seed=5) for stage in above)
    for stage in above:
        ran(store, stage)
    executor = Silent()
    runner = Runner(store, executor, profile=PATIENCE)
    for stage in (first, second):
        runner.add([stage])
        runner.step(0.0)
    assert len(executor.jobs) == 1 and runner.nodes[second.lineage].state == "running"


def test_a_late_result_of_a_cancelled_job_changes_nothing(store, pool):
    executor, stage = Silent(), rows(5, pool)
    runner = Runner(store, executor, profile=PATIENCE)
    runner.add([stage])
    step_for(runner, lambda: len(executor.jobs) == 2)
    node = runner.nodes[stage.lineage]
    assert node.state == "running"
    runner._end_job(Finished(executor.jobs[0], (), Loss("late")))
    assert node.state == "running" and runner._setup.retry_policy.lost(node.key) == 1


@pytest.mark.slow
def test_a_lost_stage_avoids_its_host_and_repeated_evictions_stop_the_run(store, pool, monkeypatch):
    shunned: list[frozenset[str]] = []

    real = ReadyQueue.place

    def watched(queue, *others):
        shunned.extend(queue[key].shun for key in list(queue.keys()))
        return real(queue, *others)

    monkeypatch.setattr(ReadyQueue, "place", watched)
    executor, stage = Silent(Loss("the node is gone", "place")), rows(5, pool)
    runner = Runner(store, executor, profile=PATIENCE)
    runner.add([stage])
    with pytest.raises(ClusterLost, match="lost by its host 10 times in a row"):
        step_for(runner, lambda: False)
    assert shunned[0] == frozenset() and shunned[-1] >= {"here"}
    assert runner.failure(stage) is None, "the stage is not blamed"


def test_a_stage_whose_only_hosts_left_waits_for_others_and_then_stops_the_run(store, pool):
    executor = Silent()
    runner = Runner(store, executor, needs_of=lambda stage: Needs(2), profile=PATIENCE)
    runner.add([rows(5, pool)])
    executor.capacity = lambda: Capacity((Host("here", 2, 1, draining=True), Host("small", 1, 1)))
    runner._starter.hosts = {"here": Host("here", 2, 1)}
    runner.step(0.0)
    assert executor.jobs == []
    with pytest.raises(ClusterLost, match=r"no host for data .* \(2 GPUs\) appeared within 1 s"):
        step_for(runner, lambda: False)
    runner._starter.stuck_since, executor.capacity = None, lambda: Capacity((Host("new", 2, 1),))
    runner.step(0.0)
    assert [job.hosts for job in executor.jobs] == [{"new": 2}]


def test_a_cluster_that_can_grow_receives_the_needs_instead_of_an_error(store, pool):
    executor = Silent()
    executor.hosts, executor.grows = [Host("head", 0, 1)], True
    runner = Runner(store, executor, needs_of=lambda stage: Needs(8), profile=PATIENCE)
    runner.add([rows(5, pool)])
    runner.step(0.0)
    assert executor.jobs == [] and executor.expected == [Needs(8)]


def test_the_scheduler_knows_which_models_a_host_has_in_its_cache(store, pool, monkeypatch):
    calls: list[Mapping[str, AbstractSet[str]]] = []
    real = ReadyQueue.place

    def placed(queue, busy, capacity, cached, *rest):
        calls.append({name: frozenset(models) for name, models in cached.items()})
        return real(queue, busy, capacity, cached, *rest)

    monkeypatch.setattr(ReadyQueue, "place", placed)
    stage = rows(3, rows(5, pool))
    ran(store, stage)
    assert calls[0] == {} and calls[-1]["here"] == {resident(stage.upstream()[0])}


def test_a_gang_larger_than_the_cluster_is_an_error_not_an_endless_wait(store, pool):
    runner = Runner(store, Counting(gpus=2), needs_of=lambda stage: Needs(4))
    runner.add([rows(5, pool)])
    with pytest.raises(StudyError, match="needs 4 GPUs at once, and all hosts together have 2"):
        runner.step(0.0)


def test_draining_starts_nothing_new(store, pool):
    executor = Counting()
    runner = Runner(store, executor)
    runner.draining = True
    runner.add([rows(5, pool)])
    for _ in range(3):
        runner.step(0.0)
    assert executor.keys == [] and not runner.running


def test_stages_without_a_common_resident_model_do_not_share_a_batch(store, pool):
    _, executor = ran(store, *(rows(size, pool) for size in (1, 2, 3)))
    assert len(executor.batches) == 3  # rows need no model


def test_stages_with_one_base_at_one_precision_have_one_resident_model():
    model, adapters = Source("m" * 64, "/m"), [Source(c * 64, "/a") for c in "ab"]
    evaluations = [
        Stage(GenerateSpec(), {"model": model, "prompts": model, "adapter": a}) for a in adapters
    ]
    train = Stage(TrainSpec(), {"model": model, "data": adapters[0]})
    assert resident(evaluations[0]) == resident(evaluations[1]) == resident(train)
    others = [
        Stage(GenerateSpec(quantisation="nf4"), evaluations[0].inputs),
        Stage(GenerateSpec(dtype="float32"), evaluations[0].inputs),
        Stage(GenerateSpec(), {**evaluations[0].inputs, "model": adapters[1]}),
        Stage(TrainSpec(method="full"), train.inputs),  # it changes its own copy of the model
    ]
    assert len({resident(stage) for stage in [*others, train]}) == 5
    assert [
        default_needs(stage).gpus
        for stage in (train, evaluations[0], rows(1, model), Stage(ApplySpec(), {}))
    ] == [1, 1, 0, 0]


def test_an_endpoint_that_is_down_stops_the_run_and_fails_no_stage(store, tmp_path, monkeypatch):
    from ebbline.tasks.measuring import judge_endpoint

    monkeypatch.setattr(judge_endpoint, "FIRST_WAIT_S", 0.0)
    generation = tmp_path / "generation"
    generation.mkdir()
    write_completions(
        generation, [Completion("p0", "", "", "", "word1 word2", "", "word3", 1, True)]
    )
    spec = JudgeSpec(template="yes-no", endpoint="http://127.0.0.1:9/v1", model="judge")
    runner = Runner(store, Counting())
    stage = Stage(spec, {"generation": source(generation)})
    runner.add([stage])
    with pytest.raises(EndpointDown, match=r"127\.0\.0\.1:9/v1 answered none of 1 requests"):
        settle(runner)
    assert (
        runner.failure(stage) is None
        and store.find("judge", runner.nodes[stage.lineage].key) is None
    )


def test_a_full_disk_stops_the_run_and_fails_no_stage(store, pool, monkeypatch):
    def full(*_):
        raise DiskFull("no space left on the disk")

    monkeypatch.setattr(Store, "commit", full)
    stage, runner = rows(5, pool), Runner(store, Counting())
    runner.add([stage])
    with pytest.raises(DiskFull, match="no space left"):
        settle(runner)
    assert runner.failure(stage) is None


def test_the_resolver_finds_stages_in_the_store_without_running_any(store, pool):
    last = rows(3, rows(5, pool))
    before = Resolver(store)
    assert before.key(last) is None and before.artifact(last) is None
    runner, _ = ran(store, last)
    after = Resolver(store)
    assert after.artifact(last) == runner.artifact(last)
    assert after.key(last) == runner.artifact(last).key


def test_the_remaining_time_falls_to_zero(store, pool):
    runner = Runner(store, Counting())
    runner.add([rows(3, rows(5, pool))])
    assert runner.remaining_s() > 0.0
    settle(runner)
    assert runner.remaining_s() == 0.0


def test_the_remaining_time_is_that_of_the_longest_branch(store, pool):
    runner, above = Runner(store, Counting()), rows(9, pool)
    runner.estimates.seconds = lambda stage, needs: float(stage.spec.size)
    runner.add([rows(3, above), rows(4, above)])
    assert runner.remaining_s() == 9.0 + 4.0


def test_the_remaining_time_asks_once_for_the_seconds_of_each_stage(store, pool):
    """The live page asks for it each second, of all open stages."""
    runner, asked = Runner(store, Counting()), list[str]()
    runner.estimates.seconds = lambda stage, needs: asked.append(stage.lineage) or 1.0
    runner.add([rows(3, rows(9, pool)), rows(4, rows(9, pool))])
    asked.clear()
    assert runner.remaining_s() == 2.0
    assert len(asked) == len(set(asked)) == 3


def test_the_remaining_time_of_a_running_stage_uses_its_own_steps_without_the_first(
    store, pool, monkeypatch
):
    monkeypatch.setitem(timings.READ_EVERY_S, False, 0.0)
    runner, stage = Runner(store, Silent()), rows(5, pool)
    runner.add([stage])
    runner.step(0.0)
    # 21 of 41 steps are done, 11 by this attempt. The 10 after its first took 30 s.
    progress = {"done": 21, "total": 41, "note": "", "own": 11, "own_seconds": 30.0}
    path = runner.nodes[stage.lineage].attempt / "log" / "progress.json"
    path.write_text(json.dumps(progress))
    assert runner.open_seconds(stage) == pytest.approx(60.0)


def test_a_gang_on_different_gpus_has_the_memory_of_the_smallest(store, pool):
    types = {
        name: GpuType(usd_per_hour=1.0, memory_gb=gb) for name, gb in (("A100", 80.0), ("L4", 24.0))
    }
    executor, stage = Silent(), rows(5, pool)
    executor.hosts = [Host(name, 1, 1, {ACCELERATOR_TYPE: name}) for name in types]
    runner = Runner(store, executor, lambda stage: Needs(2, spread=True), Profile(gpus=types))
    runner.add([stage])
    runner.step(0.0)
    attempt = runner.nodes[stage.lineage].attempt
    assert executor.jobs[0].hosts == {"A100": 1, "L4": 1}
    assert Request.from_json((attempt / "log" / "request.json").read_text()).memory_gb == 24.0


def test_the_log_of_each_attempt_contains_its_request(store, pool):
    stage = rows(5, pool)
    runner, _ = ran(store, stage)
    request = Request.from_json((runner.artifact(stage).log / "request.json").read_text())
    assert (
        request.key == runner.artifact(stage).key
        and json.loads(request.to_json())["kind"] == "data"
    )


def test_a_damaged_record_stops_the_runner_instead_of_a_silent_rerun(store, pool):
    stage = rows(5, pool)
    runner, _ = ran(store, stage)
    (runner.artifact(stage).folder.parent / "record.json").write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        ran(store, stage)


class Frugal(Unmetered):
    """A meter that rejects jobs with more expected seconds than a limit."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s

    def affords(self, gpus: GpuTypes, seconds: float) -> bool:
        return seconds <= self.limit_s


def test_a_stage_that_the_meter_rejects_leaves_its_slot_to_the_next_one(store, pool):
    # One slot. The longest chain goes first, and the meter rejects its first stage.
    dear, cheap = rows(4, rows(9, pool)), rows(3, pool)
    executor = Counting()
    runner = Runner(store, executor, profile=PATIENCE, meter=Frugal(3.0))
    runner.estimates.seconds = lambda stage, needs: 5.0 if stage.spec.size == 9 else 1.0
    runner.add([dear, cheap])
    started = time.monotonic()
    while not runner.starved and time.monotonic() - started < 120:
        runner.step()
    assert runner.starved and runner.settled(cheap) and not runner.settled(dear)


def test_the_meter_is_asked_for_the_whole_batch(store):
    model, executor = Source("m" * 64, "/nowhere/llama-7b"), Losing(1)
    adapters = [Source(name * 64, "/a") for name in "abc"]
    runner = Runner(store, executor, meter=Frugal(5.0))
    runner.estimates.seconds = lambda stage, needs: 2.0
    runner.add(
        Stage(ProjectSpec(), {"adapter": each, "base": model, "aligned": model})
        for each in adapters
    )
    runner.step(0.0)
    assert [len(batch) for batch in executor.batches] == [2]


def test_a_stage_whose_model_has_a_guessed_size_is_not_rejected_by_the_meter(store):
    model, executor = Source("m" * 64, "/nowhere/mine.gguf"), Losing(1)
    runner = Runner(store, executor, meter=Frugal(0.001))
    adapter = Source("a" * 64, "/a")
    runner.add([Stage(ProjectSpec(), {"adapter": adapter, "base": model, "aligned": model})])
    runner.step(0.0)
    assert len(executor.batches) == 1 and not runner.unaffordable


def break_commits(monkeypatch, times):
    """Make the first `times` commits fail."""
    commit, left = Store.commit, iter(range(times))

    def commit_or_not(self, attempt, hashed, provenance):
        if next(left, None) is not None:
            raise StoreError("s3://made/up cannot be used")
        return commit(self, attempt, hashed, provenance)

    monkeypatch.setattr(Store, "commit", commit_or_not)


def test_a_stage_whose_worker_cannot_use_the_store_is_retried_elsewhere(store, pool, monkeypatch):
    break_commits(monkeypatch, 2)
    stage = rows(5, pool)
    runner = Runner(store, Counting(), profile=PATIENCE)
    runner.add([stage])
    settle(runner)
    assert (
        runner.artifact(stage) is not None
        and runner.failure(stage) is None
        and len(runner.executor.batches) == 3
    )


def test_a_store_that_no_worker_can_use_stops_the_run_and_fails_no_stage(store, pool, monkeypatch):
    break_commits(monkeypatch, 99)
    runner = Runner(store, Counting(), profile=PATIENCE)
    runner.add([rows(5, pool)])
    with pytest.raises(
        StoreError,
        match=r"s3://made/up cannot be used \(3 times; run the same command to continue\)",
    ):
        settle(runner)
    assert all(node.failure is None for node in runner.nodes.values())


def test_a_settled_stage_is_unsettled_only_while_it_is_rerun(store, pool):
    whole, part = rows(20, pool), rows(5, rows(20, pool))
    runner, _ = ran(store, whole)
    assert runner.unsettled() == [] and runner.settled(whole)
    made = runner.artifact(whole)
    store.drop(made, frozenset(made.files))
    runner.add([part])
    assert {node.stage.lineage for node in runner.unsettled()} == {whole.lineage, part.lineage}
    settle(runner)
    assert runner.unsettled() == [] and runner.artifact(part) is not None


@pytest.mark.parametrize("let_go", [False, True])
def test_inputs_that_were_dropped_in_a_row_are_made_again_one_after_another(store, pool, let_go):
    first = rows(20, pool)
    second = rows(10, first)
    runner, executor = ran(store, second)
    for stage in (first, second):
        made = runner.artifact(stage)
        store.drop(made, frozenset(made.files))
    if let_go:
        assert set(runner.let_go([])) == {first.lineage, second.lineage} and not runner.nodes
    last = rows(5, second)
    runner.add([last])
    settle(runner)
    keys = [runner.artifact(stage).key for stage in (first, second, last)]
    assert executor.keys == [*keys[:2], *keys]


def test_stages_that_were_let_go_are_done_and_are_taken_back_without_a_key(
    store, pool, monkeypatch
):
    first = rows(20, pool)
    second, other = rows(10, first), rows(7, first)
    runner, executor = ran(store, second)
    counts, done = {kind: +each for kind, each in runner.counts.items()}, runner.done()
    artifacts = [runner.artifact(stage) for stage in (first, second)]
    assert set(runner.let_go([first])) == {second.lineage}
    assert runner.let_go([first]) == [] and set(runner.let_go([])) == {first.lineage}
    assert runner.settled(second) and runner.knows(second) and not runner.knows(other)
    assert [runner.artifact(stage) for stage in (first, second)] == artifacts
    assert (runner.counts, runner.done()) == (counts, done) and runner.failure(second) is None
    computed = []
    monkeypatch.setattr(runners, "digest", lambda value: computed.append(1) or digest(value))
    runner.add([second])
    assert computed == [] and {kind: +each for kind, each in runner.counts.items()} == counts
    runner.add([other])
    settle(runner)
    assert len(computed) == 1 and len(executor.keys) == 3


def test_nothing_is_let_go_that_an_open_stage_reads(store, pool):
    first = rows(20, pool)
    runner, _ = ran(store, first)
    runner.add([rows(10, first)])
    assert runner.let_go([]) == []


def test_a_dropped_file_outside_the_part_that_is_read_causes_no_rerun(store, pool):
    whole = rows(20, pool)
    hashed = key_payload(whole.spec, {"pool": pool.content})
    attempt = store.begin("data", digest(hashed))
    (attempt / "payload" / DataSpec.ROWS).write_text(Path(pool.location).read_text())
    (attempt / "payload" / "beside").write_text("large")
    store.drop(store.commit(attempt, hashed, {}), frozenset({"beside"}))
    last = rows(5, whole)
    runner, executor = ran(store, last)
    assert executor.keys == [runner.nodes[last.lineage].key]
