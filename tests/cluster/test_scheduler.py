"""The scheduler, as properties of a pure function over made-up work."""

import random
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from cluster.executor import Capacity
from cluster.scheduler import SHORTEST_BATCH_S, Busy, Placement, Work, place

capacities = st.builds(Capacity, gpus=st.integers(1, 8), cpus=st.integers(1, 4))
durations = st.sampled_from([0.5, 1.0, 5.0, 19.0, 60.0, 600.0])


@st.composite
def situations(draw, running: bool = True):
    """(ready, running, capacity); nothing runs beyond the capacity."""
    capacity = draw(capacities)
    works = [
        Work(
            key=f"k{index}",
            gpus=draw(st.sampled_from([0, 1, 1, 1, 2, 4])),
            resident=draw(st.sampled_from("abc")),
            seconds=(seconds := draw(durations)),
            path_s=seconds + draw(durations),
        )
        for index in range(draw(st.integers(0, 12)))
    ]
    busy: list[Busy] = []
    for gpus in draw(st.lists(st.sampled_from([0, 1, 2, 4]), max_size=5)) if running else []:
        held = [*busy, Busy(gpus, draw(durations))]
        if sum(job.gpus for job in held) <= capacity.gpus and sum(job.gpus == 0 for job in held) <= capacity.cpus:
            busy = held
    return works, busy, capacity


@given(situations())
def test_capacity_is_never_exceeded_and_a_gang_gets_all_its_gpus_or_none(situation):
    ready, running, capacity = situation
    placed = place(ready, running, capacity)
    assert sum(job.gpus for job in running) + sum(p.gpus for p in placed) <= capacity.gpus
    assert sum(job.gpus == 0 for job in running) + sum(p.gpus == 0 for p in placed) <= capacity.cpus
    by_key = {work.key: work for work in ready}
    for placement in placed:
        assert all(by_key[key].gpus == placement.gpus for key in placement.keys)


@given(situations())
def test_no_stage_starts_twice_and_a_batch_shares_gpus_and_its_base(situation):
    ready, running, capacity = situation
    placed = place(ready, running, capacity)
    assert max(Counter(key for p in placed for key in p.keys).values(), default=1) == 1
    by_key = {work.key: work for work in ready}
    for placement in placed:
        assert placement.keys
        assert len({(by_key[key].gpus, by_key[key].resident) for key in placement.keys}) == 1


@given(situations(), st.randoms(use_true_random=False))
def test_the_order_in_which_work_is_named_does_not_matter(situation, rng: random.Random):
    ready, running, capacity = situation
    expected = place(ready, running, capacity)
    shuffled, busy = rng.sample(ready, len(ready)), rng.sample(running, len(running))
    assert place(shuffled, busy, capacity) == expected


@given(situations())
def test_what_is_given_is_left_as_it_was(situation):
    ready, running, capacity = situation
    before = list(ready), list(running)
    place(ready, running, capacity)
    assert (ready, running) == before


@dataclass
class Machine:
    """A clock and the jobs on it: what an executor would do with the placements."""

    capacity: Capacity
    now: float = 0.0
    jobs: list[tuple[float, Placement]] = field(default_factory=list)
    started: dict[str, float] = field(default_factory=dict)

    def run(self, ready: list[Work], arrivals: list[tuple[float, Work]] | None = None) -> dict[str, float]:
        works = {work.key: work for work in ready}
        waiting, arriving = dict(works), sorted(arrivals or [], key=lambda item: item[0])
        while waiting or self.jobs or arriving:
            while arriving and arriving[0][0] <= self.now:
                work = arriving.pop(0)[1]
                works[work.key] = waiting[work.key] = work
            busy = [Busy(p.gpus, end - self.now) for end, p in self.jobs]
            for placement in place(list(waiting.values()), busy, self.capacity):
                for key in placement.keys:
                    self.started[key] = self.now
                    del waiting[key]
                self.jobs.append((self.now + sum(works[key].seconds for key in placement.keys), placement))
            nexts = [end for end, _ in self.jobs] + [at for at, _ in arriving]
            if not nexts:
                return self.started  # nothing runs and nothing fits: what is left never will
            self.now = min(nexts)
            self.jobs = [(end, p) for end, p in self.jobs if end > self.now]
        return self.started


@given(situations(running=False))
def test_every_stage_that_can_ever_fit_starts_in_the_end(situation):
    ready, _, capacity = situation
    started = Machine(capacity).run(ready)
    assert started.keys() == {work.key for work in ready if work.gpus <= capacity.gpus}


@given(st.integers(2, 8))
def test_a_gang_starts_although_one_gpu_work_keeps_arriving(gpus):
    capacity = Capacity(gpus, 1)
    gang = Work("gang", gpus, "gang", 30.0, 5000.0)
    stream = [(float(at), Work(f"s{at}", 1, "small", 15.0, 100.0)) for at in range(1, 200, 2)]
    started = Machine(capacity).run([Work("first", 1, "small", 15.0, 6000.0), gang], stream)
    assert started["gang"] <= 15.0 + SHORTEST_BATCH_S


def order(work: Work) -> tuple[float, str]:
    return -work.path_s, work.key


def free_at(gpus: int, capacity: Capacity, held: list[Busy]) -> float:
    free = capacity.gpus - sum(job.gpus for job in held)
    if free >= gpus:
        return 0.0
    for job in sorted(held, key=lambda job: job.remaining_s):
        free += job.gpus
        if free >= gpus:
            return job.remaining_s
    return float("inf")


@given(situations())
def test_what_slips_in_front_of_the_first_waiting_gang_never_delays_it(situation):
    ready, running, capacity = situation
    placed = place(ready, running, capacity)
    by_key = {work.key: work for work in ready}
    taken = {key for p in placed for key in p.keys}
    gangs = sorted((w for w in ready if 1 < w.gpus <= capacity.gpus and w.key not in taken), key=order)
    if not gangs:
        return
    first = gangs[0]

    def busy(placements: list[Placement]) -> list[Busy]:
        return [*running, *(Busy(p.gpus, sum(by_key[key].seconds for key in p.keys)) for p in placements)]

    in_front = [p for p in placed if order(by_key[p.keys[0]]) < order(first)]
    reserved_s = free_at(first.gpus, capacity, busy(in_front))
    assert free_at(first.gpus, capacity, busy(placed)) <= reserved_s + 1e-9


def test_the_longest_path_goes_first():
    ready = [Work("short", 1, "a", 5.0, 5.0), Work("long", 1, "b", 5.0, 50.0)]
    assert place(ready, [], Capacity(1, 1)) == [Placement(("long",), 1)]


def test_work_that_fits_before_the_gang_slips_in_and_work_that_does_not_waits():
    gang = Work("gang", 2, "g", 100.0, 1000.0)
    running = [Busy(1, 60.0)]
    assert place([gang, Work("quick", 1, "a", 50.0, 50.0)], running, Capacity(2, 1)) == [Placement(("quick",), 1)]
    assert place([gang, Work("slow", 1, "a", 61.0, 61.0)], running, Capacity(2, 1)) == []


def test_work_without_gpus_is_not_held_up_by_a_waiting_gang():
    ready = [Work("gang", 2, "g", 100.0, 1000.0), Work("copy", 0, "apply", 1.0, 1.0)]
    assert place(ready, [Busy(1, 5.0)], Capacity(2, 1)) == [Placement(("copy",), 0)]


def test_stages_on_one_base_are_spread_over_all_gpus_not_piled_on_one():
    ready = [Work(f"k{i}", 1, "base", 60.0, 60.0) for i in range(8)]
    placed = place(ready, [], Capacity(4, 1))
    assert len(placed) == 4
    assert max(len(p.keys) for p in placed) <= 2


def test_short_stages_on_one_base_share_a_batch():
    ready = [Work(f"k{i}", 1, "base", 1.0, 1.0) for i in range(8)]
    assert [len(p.keys) for p in place(ready, [], Capacity(4, 1))] == [8]


def test_equal_work_is_spread_evenly_over_all_gpus():
    ready = [Work(f"k{i}", 1, "base", 60.0, 60.0) for i in range(8)]
    assert sorted(len(placement.keys) for placement in place(ready, [], Capacity(4, 1))) == [2, 2, 2, 2]
