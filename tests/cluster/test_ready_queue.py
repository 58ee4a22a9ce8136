"""The scheduler's queue, which is kept between decisions, against the specification that reads all
ready stages (tests/cluster/full_reading.py).
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.cluster.executors.executor import Capacity, Host, Needs
from ebbline.cluster.schedule import ready_stage
from ebbline.cluster.schedule.ready_stage import ReadyStage, StagesInOrder
from ebbline.cluster.schedule.scheduler import SHUN_S, Busy, Placement, ReadyQueue
from tests.cluster import full_reading
from tests.cluster.test_scheduler import cached_at, host, situations, work

EXACT = [0.5, 1.0, 5.0, 19.0, 60.0, 600.0]  # sums of these have no rounding


def started(placements: list[Placement]) -> set[str]:
    return {key for placement in placements for key in placement.keys}


@pytest.mark.slow
@given(situations(), cached_at, st.integers(1, 3), st.randoms(use_true_random=False))
def test_a_queue_with_any_history_decides_as_a_reading_of_all_its_stages(
    situation, cached, block, rng: random.Random
):
    ready, running, capacity = situation
    with patch.object(ready_stage, "BLOCK", block):
        queue = ReadyQueue()
        for stage in rng.sample(ready, len(ready)):
            # An earlier estimate of the stage, and another one that started long ago.
            queue.put(replace(stage, seconds=rng.choice(EXACT), path_s=rng.choice(EXACT)))
            queue.put(replace(stage, key=f"old {stage.key}"))
        for stage in rng.sample(ready, len(ready)):
            queue.put(stage)
            queue.remove(f"old {stage.key}")
        expected = full_reading.place(ready, running, capacity, cached)
        assert queue.place(running, capacity, cached) == expected
        assert queue.place(running, capacity, cached) == expected, "a decision changed the queue"


@pytest.mark.slow
@given(situations(), cached_at, st.integers(1, 3), st.sampled_from([0.0, 5.0, SHUN_S]))
def test_a_queue_whose_started_stages_were_removed_decides_as_a_reading_of_the_rest(
    situation, cached, block, later_s
):
    ready, running, capacity = situation
    with patch.object(ready_stage, "BLOCK", block):
        queue = ReadyQueue(ready)
        for key in started(queue.place(running, capacity, cached)):
            queue.remove(key)
        rest = [
            replace(stage, waited_s=stage.waited_s + later_s)
            for stage in ready
            if stage.key in queue
        ]
        assert len(rest) == len(queue)
        assert queue.place([], capacity, cached, later_s) == full_reading.place(
            rest, [], capacity, cached
        )


def large(rng: random.Random, stages: int, plain: bool) -> Iterator[ReadyStage]:
    """Stages with all that the scheduler regards: gangs of which some spread, packs, hosts to
    avoid, labels. Plain ones have few different needs, so that gangs of one line reserve.
    """
    for number in range(stages):
        seconds = rng.choice([5.0, 60.0, 600.0, 3600.0])
        needs = Needs(rng.choice([1, 1, 1, 8]))
        if not plain:
            labels = {"type": "A"} if rng.random() < 0.1 else {}
            needs = Needs(rng.choice([0, 1, 1, 2, 8, 12]), labels, spread=rng.random() < 0.5)
        yield ReadyStage(
            f"k{number:05}",
            needs,
            rng.choice("abcdefgh"),
            seconds,
            seconds + rng.choice([5.0, 60.0, 600.0]),
            frozenset({"h1"}) if rng.random() < 0.1 and not plain else frozenset(),
            rng.choice([0.0, 60.0, 700.0]),
            rng.choice(["", "", "p"]),
            {None: rng.choice([0.1, 0.25, 1.0])},
        )


@pytest.mark.parametrize("seed", range(8))
def test_a_long_queue_decides_as_a_reading_of_all_its_stages(seed):
    rng = random.Random(seed)
    capacity = Capacity(tuple(host(f"h{number}", 8, type="AB"[number % 2]) for number in range(6)))
    running = [
        Busy({f"h{number}": 1}, rng.choice([1.0, 60.0, 900.0]))
        for number in range(6)
        for _ in range(rng.randint(5, 8))
    ]
    ready = list(large(rng, 400 if seed % 2 else 20, plain=seed % 4 > 1))
    assert ReadyQueue(ready).place(running, capacity) == full_reading.place(
        ready, running, capacity
    )


class Counted(ReadyStage):
    """A stage that counts how often a decision reads its duration."""

    reads = 0

    def __getattribute__(self, name: str) -> object:
        if name == "seconds":
            Counted.reads += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize("hosts", [1, 16])
def test_a_decision_reads_few_of_the_ready_stages(hosts):
    """When one GPU falls free, it reads at most a block of each line, and the gangs that wait."""
    stages = [
        Counted(f"k{number:05}", Needs(1), f"m{number % 7}", 60.0 + number % 991, 60.0)
        for number in range(5000)
    ] + [Counted(f"g{number:05}", Needs(8), "large", 3600.0, 7200.0) for number in range(500)]
    capacity = Capacity(tuple(Host(f"h{number:02}", 8, 2) for number in range(hosts)))
    running = [
        Busy({host.name: 1}, 300.0 + number) for host in capacity.hosts for number in range(8)
    ]
    queue = ReadyQueue(stages)
    expected = full_reading.place(stages, running[1:], capacity)
    queue.place(running[1:], capacity)  # sums that are kept are made by the first decision
    Counted.reads = 0
    assert queue.place(running[1:], capacity) == expected
    assert len(expected) == 1
    assert Counted.reads < 8 * (ready_stage.BLOCK + hosts)


@given(
    st.lists(st.tuples(st.sampled_from(EXACT), st.integers(0, 5)), max_size=40),
    st.integers(1, 4),
    st.sampled_from(EXACT),
    st.randoms(use_true_random=False),
)
def test_stages_in_order_are_those_of_a_sorted_list(shapes, block, most_s, rng):
    stages = [
        work(f"k{number}", 1, "a", seconds, path_s)
        for number, (seconds, path_s) in enumerate(shapes)
    ]
    kept = [stage for stage in stages if rng.random() < 0.6]
    with patch.object(ready_stage, "BLOCK", block):
        found = StagesInOrder(stages[: len(stages) // 2])
        for stage in stages[len(stages) // 2 :]:
            found.add(stage)
            assert found.total_s >= stage.seconds and found.shortest_s <= stage.seconds
        for stage in stages:
            if stage not in kept:
                found.remove(stage)
    kept.sort(key=lambda stage: stage.order)
    start = rng.choice([None, *(stage.order for stage in kept)])
    assert len(found) == len(kept) and list(found.after(None)) == kept
    assert list(found.after(start, most_s)) == [
        stage
        for stage in kept
        if stage.seconds <= most_s and (start is None or stage.order > start)
    ]
    if kept:
        assert found.total_s == sum(stage.seconds for stage in kept)
        assert found.shortest_s == min(stage.seconds for stage in kept)


def test_a_stage_that_is_removed_twice_or_was_never_added_is_no_error_of_the_queue():
    queue = ReadyQueue([work("a", 1, "m", 5.0, 5.0)])
    queue.remove("a")
    queue.remove("a")
    queue.remove("b")
    assert len(queue) == 0 and queue.place([], Capacity((host("h0", 8),))) == []
