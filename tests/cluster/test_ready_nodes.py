"""The driver's queue of ready stages: what is read at a turn, and what reaches the scheduler."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from ebbline.cluster.executors.executor import Capacity, Executor, Finished, Host, Job, Needs
from ebbline.cluster.running.ready_nodes import READ_AGAIN
from ebbline.cluster.running.runner import Runner
from ebbline.cluster.schedule.costs import GpuTypes, Unmetered
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.specs import ProjectSpec
from ebbline.tasks.stage import Report, Request, Source, Stage
from tests.cluster.made import rows, source
from tests.tiny import write_chats

MODEL = Source("m" * 64, "/nowhere/llama-7b")


class Holding(Executor):
    """One host whose jobs end when a test ends them."""

    device, own_processes = "cpu", False

    def __init__(self, gpus: int = 1) -> None:
        self.gpus, self.jobs = gpus, list[Job]()

    def capacity(self) -> Capacity:
        return Capacity((Host("here", self.gpus, 2),))

    def submit(self, batch: Sequence[Request], needs: Needs, hosts: Mapping[str, int]) -> Job:
        keys = tuple(request.key for request in batch)
        self.jobs.append(Job(f"job-{len(self.jobs)}", keys, needs.gpus, hosts))
        return self.jobs[-1]

    def finished(self, timeout_s: float) -> Sequence[Finished]:
        return ()

    def cancel(self, job: Job) -> None:
        pass

    def close(self) -> None:
        pass


def ready(count: int) -> list[Stage]:
    """Stages without inputs that must be made first."""
    return [
        Stage(
            ProjectSpec(),
            {"adapter": Source(f"{number:064x}", "/a"), "base": MODEL, "aligned": MODEL},
        )
        for number in range(count)
    ]


def failed(job: Job) -> Finished:
    return Finished(job, tuple(Report(key, 1.0, error="a reason") for key in job.keys))


@pytest.fixture
def executor() -> Holding:
    return Holding()


@pytest.fixture
def runner(tmp_path: Path, executor: Holding) -> Runner:
    return Runner(Store(tmp_path / "store"), executor, needs_of=lambda stage: Needs(1))


def test_a_turn_reads_few_of_the_ready_stages(runner, executor):
    count = 4 * READ_AGAIN
    asked = []
    runner.estimates.seconds = lambda stage, needs: asked.append(stage.lineage) or 700.0
    runner.add(ready(count))
    runner.step(0.0)
    assert len(executor.jobs) == 1 and len(set(asked)) == count
    for turn in range(3):
        asked.clear()
        runner._end_job(failed(executor.jobs[-1]))
        runner.step(0.0)
        assert len(executor.jobs) == turn + 2
        assert len(set(asked)) <= READ_AGAIN + 2


def test_changed_estimates_reach_every_ready_stage_within_some_turns(runner, executor):
    stages = ready(3 * READ_AGAIN)
    expected = dict.fromkeys((stage.lineage for stage in stages), 700.0)
    runner.estimates.seconds = lambda stage, needs: expected[stage.lineage]
    runner.add(stages)
    runner.step(0.0)
    last = max(runner._starter.ready.nodes.values(), key=lambda node: node.key)
    expected[last.stage.lineage] = 900.0
    for _ in range(3):
        runner.step(0.0)
    runner._end_job(failed(executor.jobs[-1]))
    runner.step(0.0)
    assert executor.jobs[-1].keys == (last.key,)


def test_a_downstream_stage_that_is_added_later_makes_its_input_more_critical(
    runner, executor, tmp_path
):
    pools = [source(write_chats(tmp_path / f"{name}.jsonl", 6 + name)) for name in range(2)]
    first, second = (rows(5, pool) for pool in pools)
    runner.estimates.seconds = lambda stage, needs: 700.0
    runner.add(ready(1))
    runner.step(0.0)
    runner.add([first, second])
    runner.step(0.0)
    later = max((first, second), key=lambda stage: runner.nodes[stage.lineage].key)
    runner.add([rows(3, later)])
    runner._end_job(failed(executor.jobs[0]))
    runner.step(0.0)
    assert executor.jobs[1].keys == (runner.nodes[later.lineage].key,)


class Purse(Unmetered):
    """A meter whose limit a test changes."""

    def __init__(self) -> None:
        self.limit_s, self.asked = 100.0, 0

    def affords(self, gpus: GpuTypes, seconds: float) -> bool:
        self.asked += 1
        return seconds <= self.limit_s


def test_a_rejected_stage_is_considered_again_when_a_job_has_ended(tmp_path):
    executor, meter = Holding(gpus=2), Purse()
    runner = Runner(
        Store(tmp_path / "store"), executor, needs_of=lambda stage: Needs(1), meter=meter
    )
    stages = ready(3)
    costs = dict(zip((stage.lineage for stage in stages), (700.0, 90.0, 800.0), strict=True))
    runner.estimates.seconds = lambda stage, needs: costs[stage.lineage]
    runner.add(stages)
    runner.step(0.0)
    cheap = runner.nodes[stages[1].lineage]
    assert [job.keys for job in executor.jobs] == [(cheap.key,)]
    assert len(runner.unaffordable) == 2 and not runner.starved
    meter.limit_s, asked = 750.0, meter.asked
    runner.step(0.0)
    assert meter.asked == asked, "nothing has ended"
    runner._end_job(failed(executor.jobs[0]))
    runner.step(0.0)
    assert executor.jobs[1].keys == (runner.nodes[stages[0].lineage].key,)
    assert runner.unaffordable == {runner.nodes[stages[2].lineage].key}
    runner._end_job(failed(executor.jobs[1]))
    runner.step(0.0)
    assert runner.starved


def test_a_stage_that_is_no_longer_ready_is_not_started(runner, executor):
    runner.estimates.seconds = lambda stage, needs: 700.0
    runner.add(ready(3))
    runner.step(0.0)
    gone, kept = runner._starter.ready.nodes.values()
    runner._fail([gone], "a reason")
    runner._end_job(failed(executor.jobs[0]))
    runner.step(0.0)
    assert [job.keys for job in executor.jobs[1:]] == [(kept.key,)]
    assert not runner._starter.ready.nodes and not runner._starter.ready.queue.keys()
