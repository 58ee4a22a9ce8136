"""The scheduler's properties, on generated stages and clusters."""

import copy
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.cluster.executors.executor import Capacity, Host, Needs
from ebbline.cluster.schedule.labels import selected
from ebbline.cluster.schedule.scheduler import (
    AGEING,
    LONGEST_BATCH_S,
    SHORTEST_BATCH_S,
    SHUN_S,
    Busy,
    Placement,
    ReadyStage,
    impossible,
    place,
)

durations = st.sampled_from([0.5, 1.0, 5.0, 19.0, 60.0, 600.0])
selectors = st.dictionaries(
    st.just("type"), st.sampled_from(["A", "!A", "in(A,B)", "!in(A,B)"]), max_size=1
)
names = ("h0", "h1", "h2", "h3")


def host(name: str, gpus: int, cpus: int = 2, **labels: str) -> Host:
    return Host(name, gpus, cpus, labels)


def needs(gpus: int) -> Needs:
    return Needs(gpus)


def work(
    key: str, gpus: int, resident: str, seconds: float, path_s: float, **more: object
) -> ReadyStage:
    return ReadyStage(key, Needs(gpus), resident, seconds, path_s, **more)  # type: ignore[arg-type]


@st.composite
def clusters(draw) -> Capacity:
    return Capacity(
        tuple(
            Host(
                name,
                gpus=draw(st.integers(0, 8)),
                cpus=draw(st.integers(0, 3)),
                labels=draw(st.dictionaries(st.just("type"), st.sampled_from("ABC"), max_size=1)),
                draining=draw(st.sampled_from([False, False, False, True])),
            )
            for name in names[: draw(st.integers(1, 4))]
        )
    )


@st.composite
def situations(draw, running: bool = True, shun: bool = True):
    """(ready, running, capacity); the running jobs fit in the capacity."""
    capacity = draw(clusters())
    works = [
        ReadyStage(
            key=f"k{index}",
            needs=Needs(
                draw(st.sampled_from([0, 1, 1, 1, 2, 4, 8])), draw(selectors), draw(st.booleans())
            ),
            resident=draw(st.sampled_from("abc")),
            seconds=(seconds := draw(durations)),
            path_s=seconds + draw(durations),
            shun=draw(st.frozensets(st.sampled_from(names), max_size=2)) if shun else frozenset(),
            waited_s=draw(durations),
            pack=draw(st.sampled_from(["", "p", "q"])),
            shares={None: draw(st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 1.0]))},
        )
        for index in range(draw(st.integers(0, 14)))
    ]
    busy: list[Busy] = []
    for name, gpus in (
        draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from([0, 1, 2, 4])), max_size=8))
        if running
        else []
    ):
        held = [*busy, Busy({name: gpus}, draw(durations))]
        if any(each.name == name for each in capacity.hosts) and fits(held, [], capacity):
            busy = held
    return works, busy, capacity


def fits(running: Sequence[Busy], placed: Sequence[Placement], capacity: Capacity) -> bool:
    gpus: Counter[str] = Counter()
    slots: Counter[str] = Counter()
    for hosts in [job.hosts for job in running] + [placement.hosts for placement in placed]:
        for name, held in hosts.items():
            gpus[name] += held
            slots[name] += held == 0
    return all(
        gpus[each.name] <= each.gpus and slots[each.name] <= each.cpus for each in capacity.hosts
    )


cached_at = st.dictionaries(st.sampled_from(names), st.frozensets(st.sampled_from("abc")))


@pytest.mark.slow
@given(situations(), cached_at)
def test_no_hosts_gpus_or_slots_are_exceeded(situation, cached):
    ready, running, capacity = situation
    assert fits(running, place(ready, running, capacity, cached), capacity)


@pytest.mark.slow
@given(situations(), cached_at)
def test_a_gang_gets_all_its_gpus_or_none_on_one_host_unless_it_may_spread(situation, cached):
    ready, running, capacity = situation
    by_key = {each.key: each for each in ready}
    for placement in place(ready, running, capacity, cached):
        assert all(by_key[key].needs == placement.needs for key in placement.keys)
        assert sum(placement.hosts.values()) == placement.needs.gpus
        assert len(placement.hosts) == 1 or placement.needs.spread
        assert placement.needs.gpus == 0 or all(gpus > 0 for gpus in placement.hosts.values())


@pytest.mark.slow
@given(situations(), cached_at)
def test_labels_are_respected_and_a_draining_host_gets_nothing(situation, cached):
    ready, running, capacity = situation
    hosts = {each.name: each for each in capacity.hosts}
    for placement in place(ready, running, capacity, cached):
        for name in placement.hosts:
            assert not hosts[name].draining
            assert selected(placement.needs.labels, hosts[name].labels)


@pytest.mark.slow
@given(situations(), cached_at)
def test_no_stage_starts_twice_and_a_batch_has_one_resident_model(situation, cached):
    ready, running, capacity = situation
    placed = place(ready, running, capacity, cached)
    assert max(Counter(key for p in placed for key in p.keys).values(), default=1) == 1
    by_key = {each.key: each for each in ready}
    for placement in placed:
        assert placement.keys
        assert len({by_key[key].resident for key in placement.keys}) == 1


@pytest.mark.slow
@given(situations(), cached_at, st.randoms(use_true_random=False))
def test_the_input_order_is_irrelevant(situation, cached, rng: random.Random):
    ready, running, capacity = situation
    expected = place(ready, running, capacity, cached)
    hosts = Capacity(tuple(rng.sample(capacity.hosts, len(capacity.hosts))))
    assert (
        place(rng.sample(ready, len(ready)), rng.sample(running, len(running)), hosts, cached)
        == expected
    )


@pytest.mark.slow
@given(situations(), cached_at)
def test_the_arguments_are_not_modified(situation, cached):
    arguments = (*situation, cached)
    before = copy.deepcopy(arguments)
    place(*arguments)
    assert arguments == before


@dataclass
class VirtualCluster:
    """A virtual clock that runs the placements like a runner. `true_s` gives the real seconds of a
    stage.
    """

    capacity: Capacity
    true_s: Callable[[ReadyStage], float] = field(default=lambda each: each.seconds)
    now: float = 0.0
    jobs: list[tuple[float, float, Placement]] = field(default_factory=list)
    started: dict[str, float] = field(default_factory=dict)

    def run(
        self, ready: Sequence[ReadyStage], arrivals: Sequence[tuple[float, ReadyStage]] = ()
    ) -> Mapping[str, float]:
        works = {each.key: each for each in ready}
        waiting = dict.fromkeys(works, 0.0)
        arriving = sorted(arrivals, key=lambda item: item[0])
        while waiting or self.jobs or arriving:
            while arriving and arriving[0][0] <= self.now:
                at, each = arriving.pop(0)
                works[each.key], waiting[each.key] = each, at
            busy = [Busy(p.hosts, max(1.0, expected - self.now)) for _, expected, p in self.jobs]
            aged = [
                replace(works[key], waited_s=self.now - since) for key, since in waiting.items()
            ]
            for placement in place(aged, busy, self.capacity):
                for key in placement.keys:
                    self.started[key] = self.now
                    del waiting[key]
                end = self.now + sum(self.true_s(works[key]) for key in placement.keys)
                self.jobs.append(
                    (end, self.now + sum(works[key].seconds for key in placement.keys), placement)
                )
            nexts = [end for end, _, _ in self.jobs] + [at for at, _ in arriving]
            if not nexts:
                return self.started  # nothing runs and nothing fits: the rest can never start
            self.now = min(nexts)
            self.jobs = [job for job in self.jobs if job[0] > self.now]
        return self.started


@pytest.mark.slow
@given(situations(running=False), st.sampled_from([0.1, 1.0, 30.0]))
def test_every_possible_stage_finally_starts_even_with_wrong_estimates(situation, wrong):
    ready, _, capacity = situation
    started = VirtualCluster(capacity, lambda each: wrong * each.seconds).run(ready)
    staying = Capacity(tuple(each for each in capacity.hosts if not each.draining))
    assert started.keys() == {each.key for each in ready if impossible(each, staying) is None}


@pytest.mark.slow
@given(st.integers(2, 8), st.sampled_from([1, 2]))
def test_a_gang_starts_although_one_gpu_stages_keep_arriving(gpus, hosts):
    capacity = Capacity(tuple(host(name, gpus) for name in names[:hosts]))
    gang = work("gang", gpus, "gang", 30.0, 5000.0)
    stream = [(at / hosts, work(f"s{at}", 1, "small", 15.0, 100.0)) for at in range(1, 400)]
    first = [work(f"first{number}", 1, "small", 15.0, 6000.0) for number in range(hosts * gpus)]
    started = VirtualCluster(capacity).run([*first, gang], stream)
    assert started["gang"] <= 15.0 + SHORTEST_BATCH_S


@given(st.integers(1, 8), st.sampled_from([0.5, 15.0]))
def test_a_stage_starts_although_more_critical_stages_keep_arriving(gpus, expected_s):
    """Also if every arriving stage takes far longer than expected."""
    capacity = Capacity((host("h0", gpus),))
    # A stage that arrives after this time goes behind the one that waits since the start.
    late_s = (500.0 - 100.0) / AGEING
    true_s = 15.0 * gpus + 1.0  # a little more than the GPUs can run
    waiting = work("waiting", gpus, "own", 30.0, 100.0)
    stream = [
        (float(at), work(f"s{at:04}", 1, f"r{at}", expected_s, 500.0))
        for at in range(1, int(2 * late_s), 15)
    ]
    started = VirtualCluster(capacity, lambda _: true_s).run(
        [work("first", 1, "a", 15.0, 1000.0), waiting], stream
    )
    assert started["waiting"] <= late_s * true_s / (15.0 * gpus) + 3 * true_s


def order(each: ReadyStage) -> tuple[float, str]:
    return -each.path_s - AGEING * each.waited_s, each.key


def soonest_s(gang: ReadyStage, capacity: Capacity, held: Sequence[Busy]) -> float:
    """The earliest start of the gang if no other stage started: on one host, or on all hosts if it
    may spread.
    """
    able = [
        each
        for each in capacity.hosts
        if not each.draining and selected(gang.needs.labels, each.labels)
    ]
    choices = [[each] for each in able] + ([able] if gang.needs.spread else [])
    best_s = math.inf
    for hosts in choices:
        here = {each.name for each in hosts}
        for when_s in sorted({0.0, *(job.remaining_s for job in held)}):
            used = sum(
                gpus
                for job in held
                if job.remaining_s > when_s
                for name, gpus in job.hosts.items()
                if name in here
            )
            if sum(each.gpus for each in hosts) - used >= gang.gpus:
                best_s = min(best_s, when_s)
    return best_s


@given(situations(shun=False), cached_at)
def test_backfilled_stages_never_delay_the_first_waiting_gang(situation, cached):
    ready, running, capacity = situation
    placed = place(ready, running, capacity, cached)
    by_key = {each.key: each for each in ready}
    started = {key for p in placed for key in p.keys}
    staying = Capacity(tuple(each for each in capacity.hosts if not each.draining))
    gangs = sorted(
        (
            each
            for each in ready
            if each.gpus > 1 and each.key not in started and impossible(each, staying) is None
        ),
        key=order,
    )
    if not gangs:
        return

    def busy(placements: Sequence[Placement]) -> list[Busy]:
        return [
            *running,
            *(Busy(p.hosts, sum(by_key[key].seconds for key in p.keys)) for p in placements),
        ]

    in_front = [p for p in placed if order(by_key[p.keys[0]]) < order(gangs[0])]
    assert soonest_s(gangs[0], capacity, busy(placed)) <= soonest_s(
        gangs[0], capacity, busy(in_front)
    )


@pytest.mark.slow
@given(situations(), cached_at)
def test_no_gpu_idles_while_only_one_gpu_stages_wait(situation, cached):
    ready, running, capacity = situation
    singles = [replace(each, needs=Needs(1), shun=frozenset()) for each in ready]
    placed = place(singles, running, capacity, cached)
    waiting = len(singles) > sum(len(p.keys) for p in placed)
    free = capacity.gpus - sum(
        gpus
        for job in [*running, *placed]
        for name, gpus in job.hosts.items()
        if name in staying(capacity)
    )
    assert not (waiting and free)


def staying(capacity: Capacity) -> set[str]:
    return {each.name for each in capacity.hosts if not each.draining}


@given(st.integers(1, 40), st.integers(1, 4), st.sampled_from([0.5, 2.0, 20.0]))
def test_idle_gpus_share_short_stages_where_a_start_is_cheap(count, gpus, shortest_s):
    """No batch is longer than its GPU's part of the work, or than what a start is worth."""
    ready = [work(f"k{number:02}", 1, "model", 0.5, 0.5) for number in range(count)]
    placed = place(ready, [], Capacity((host("h", gpus),)), shortest_batch_s=shortest_s)
    most = max(0.5, shortest_s, 0.5 * count / gpus)
    assert all(0.5 * len(each.keys) <= most for each in placed)
    if len(placed) < gpus:
        assert sum(len(each.keys) for each in placed) == count
        assert all(0.5 * (len(each.keys) + 1) > shortest_s for each in placed[:-1])


def test_the_longest_path_goes_first():
    ready = [work("short", 1, "a", 5.0, 5.0), work("long", 1, "b", 5.0, 50.0)]
    assert place(ready, [], Capacity.one_host(1, 1)) == [
        Placement(("long",), needs(1), {"here": 1})
    ]


def test_a_stage_that_has_waited_long_enough_goes_before_a_longer_path():
    old = work("old", 1, "a", 5.0, 5.0, waited_s=46.0 / AGEING)
    assert place([work("long", 1, "b", 5.0, 50.0), old], [], Capacity.one_host(1, 1)) == [
        Placement(("old",), needs(1), {"here": 1})
    ]


def test_only_stages_that_end_before_the_gang_starts_are_backfilled():
    gang = work("gang", 2, "g", 100.0, 1000.0)
    running, capacity = [Busy({"here": 1}, 60.0)], Capacity.one_host(2, 1)
    assert place([gang, work("quick", 1, "a", 50.0, 50.0)], running, capacity) == [
        Placement(("quick",), needs(1), {"here": 1})
    ]
    assert place([gang, work("slow", 1, "a", 61.0, 61.0)], running, capacity) == []


def test_nothing_is_backfilled_where_a_job_is_overdue():
    gang = work("gang", 2, "g", 100.0, 1000.0)
    assert (
        place(
            [gang, work("quick", 1, "a", 0.5, 0.5)],
            [Busy({"here": 1}, 1.0)],
            Capacity.one_host(2, 1),
        )
        == []
    )


def test_a_long_stage_starts_on_hosts_without_a_reservation():
    gang, slow = work("gang", 4, "g", 100.0, 1000.0), work("slow", 1, "a", 600.0, 600.0)
    running = [Busy({"h0": 1}, 60.0), Busy({"h1": 2}, 90.0)]
    assert place([gang, slow], running, Capacity((host("h0", 4), host("h1", 4)))) == [
        Placement(("slow",), needs(1), {"h1": 1})
    ]


def test_long_stages_start_only_on_gpus_that_the_gang_does_not_need():
    gang = work("gang", 3, "g", 100.0, 1000.0)
    slow = [work(f"slow{number}", 1, f"r{number}", 600.0, 600.0) for number in range(2)]
    assert place([gang, *slow], [Busy({"h0": 2}, 60.0)], Capacity((host("h0", 4),))) == [
        Placement(("slow0",), needs(1), {"h0": 1})
    ]


def test_two_gangs_reserve_two_hosts():
    gangs = [work(f"gang{number}", 4, "g", 700.0, 1000.0) for number in range(2)]
    running = [Busy({"h0": 1}, 60.0), Busy({"h1": 1}, 90.0)]
    capacity = Capacity((host("h0", 4), host("h1", 4)))
    assert place([*gangs, work("slow", 1, "a", 100.0, 100.0)], running, capacity) == []
    assert place([*gangs, work("quick", 1, "a", 80.0, 80.0)], running, capacity) == [
        Placement(("quick",), needs(1), {"h1": 1})
    ]


def test_a_gang_that_may_spread_uses_several_hosts_only_if_it_fits_on_none():
    capacity = Capacity((host("h0", 2), host("h1", 4)))
    gang = ReadyStage("gang", Needs(4, spread=True), "g", 10.0, 10.0)
    assert place([gang], [], capacity)[0].hosts == {"h1": 4}
    assert place([gang], [Busy({"h1": 1}, 60.0)], capacity)[0].hosts == {"h1": 3, "h0": 1}
    assert place([replace(gang, needs=Needs(4))], [Busy({"h1": 1}, 60.0)], capacity) == []


def test_a_one_gpu_stage_goes_to_the_fullest_host():
    capacity = Capacity((host("h0", 4), host("h1", 4), host("h2", 4)))
    running = [Busy({"h1": 1}, 60.0), Busy({"h2": 2}, 60.0)]
    assert place([work("k", 1, "a", 600.0, 600.0)], running, capacity)[0].hosts == {"h2": 1}


def test_a_host_with_the_model_is_preferred_to_a_slightly_fuller_one_unless_it_is_empty():
    capacity, ready = Capacity((host("h0", 8), host("h1", 8))), [work("k", 1, "a", 60.0, 60.0)]
    has_model = {"h0": frozenset("a")}
    assert place(ready, [Busy({"h0": 3}, 60.0), Busy({"h1": 3}, 60.0)], capacity, has_model)[
        0
    ].hosts == {"h0": 1}
    assert place(ready, [Busy({"h0": 3}, 60.0), Busy({"h1": 4}, 60.0)], capacity, has_model)[
        0
    ].hosts == {"h0": 1}
    assert place(ready, [Busy({"h0": 3}, 60.0), Busy({"h1": 6}, 60.0)], capacity, has_model)[
        0
    ].hosts == {"h1": 1}
    assert place(ready, [Busy({"h1": 1}, 60.0)], capacity, has_model)[0].hosts == {"h1": 1}


@given(st.integers(1, 8), st.sampled_from([1, 2, 8]), st.sampled_from(names))
def test_among_equal_hosts_the_one_with_the_model_is_chosen(free, gpus, near):
    capacity = Capacity(tuple(host(name, 8) for name in names))
    running = [Busy({name: 8 - free}, 60.0) for name in names if free < 8]
    for placement in place(
        [work("k", gpus, "a", 60.0, 60.0)], running, capacity, {near: frozenset("a")}
    ):
        assert placement.hosts == {near: gpus}


def test_a_lost_stage_waits_for_another_host_for_a_limited_time():
    capacity, busy = Capacity((host("h0", 1), host("h1", 1))), [Busy({"h1": 1}, 60.0)]
    lost = work("k", 1, "a", 60.0, 60.0, shun=frozenset({"h0"}))
    assert place([lost], [], capacity)[0].hosts == {"h1": 1}
    assert place([lost], busy, capacity) == []
    assert place([replace(lost, waited_s=SHUN_S)], busy, capacity)[0].hosts == {"h0": 1}


def test_a_stage_that_was_lost_on_all_hosts_may_use_them_again():
    lost = work("k", 1, "a", 60.0, 60.0, shun=frozenset({"h0", "gone"}))
    assert place([lost], [], Capacity((host("h0", 1),)))[0].hosts == {"h0": 1}
    assert place(
        [lost], [], Capacity((host("h0", 1), host("h1", 0), Host("h2", 4, 1, draining=True)))
    )[0].hosts == {"h0": 1}


def test_a_waiting_gang_does_not_delay_stages_without_gpus():
    ready = [work("gang", 2, "g", 100.0, 1000.0), work("copy", 0, "apply", 1.0, 1.0)]
    assert place(ready, [Busy({"here": 1}, 5.0)], Capacity.one_host(2, 1)) == [
        Placement(("copy",), needs(0), {"here": 0})
    ]


def test_stages_with_one_model_are_spread_evenly_over_all_gpus():
    ready = [work(f"k{i}", 1, "base", 60.0, 60.0) for i in range(8)]
    assert [len(p.keys) for p in place(ready, [], Capacity.one_host(4, 1))] == [2, 2, 2, 2]


def test_short_stages_with_one_model_share_a_batch():
    ready = [work(f"k{i}", 1, "base", 1.0, 1.0) for i in range(8)]
    assert [len(p.keys) for p in place(ready, [], Capacity.one_host(4, 1))] == [8]


def test_a_batch_has_a_longest_duration():
    ready = [work(f"k{i:03}", 1, "base", 60.0, 60.0) for i in range(500)]
    assert [60.0 * len(p.keys) for p in place(ready, [], Capacity.one_host(2, 1))] == [
        LONGEST_BATCH_S
    ] * 2


def trainings(
    count: int,
    share: float = 0.25,
    seconds: float = 3600.0,
    pack: str = "p",
    gpu_type: str | None = None,
) -> list[ReadyStage]:
    return [
        work(f"{pack}{index:02}", 1, "base", seconds, seconds, pack=pack, shares={gpu_type: share})
        for index in range(count)
    ]


def sizes_of(placed: Sequence[Placement]) -> list[int]:
    return [len(placement.keys) for placement in placed]


def test_as_many_trainings_of_a_pack_start_together_as_fit_on_the_gpu():
    assert sizes_of(place(trainings(6), [], Capacity.one_host(1, 1))) == [4]
    assert sizes_of(place(trainings(6, share=0.6), [], Capacity.one_host(1, 1))) == [1]
    assert sizes_of(place(trainings(6, share=1 / 3), [], Capacity.one_host(1, 1))) == [3], (
        "three shares of a third fit"
    )
    mixed = [*trainings(2, 0.5), *trainings(3, 0.25, pack="q")]
    assert sizes_of(place(mixed, [], Capacity.one_host(2, 1))) == [2, 3], (
        "only trainings with the same pack share a GPU"
    )


def test_a_pack_leaves_work_for_every_other_gpu():
    assert sizes_of(place(trainings(8, 0.1), [], Capacity.one_host(2, 1))) == [4, 4]
    assert sizes_of(place(trainings(3, 0.1), [], Capacity.one_host(2, 1))) == [2, 1]
    assert sizes_of(place(trainings(4, 0.1), [], Capacity.one_host(8, 1))) == [1, 1, 1, 1]
    busy = [Busy({"here": 1}, 9e3)]
    assert sizes_of(place(trainings(8, 0.1), busy, Capacity.one_host(2, 1))) == [4], (
        "the other half waits for the other GPU"
    )


def test_the_size_of_a_pack_depends_on_the_gpu_type():
    ready = [replace(each, shares={"A100": 0.25, "L4": 1.0}) for each in trainings(8)]
    hosts = Capacity(
        (
            Host("a", 1, 1, {"ray.io/accelerator-type": "A100"}),
            Host("l", 1, 1, {"ray.io/accelerator-type": "L4"}),
        )
    )
    placed = {
        next(iter(placement.hosts)): len(placement.keys) for placement in place(ready, [], hosts)
    }
    assert placed == {"a": 4, "l": 1}


def test_a_pack_that_would_delay_a_waiting_gang_is_smaller():
    gang, busy = work("gang", 2, "big", 60.0, 1e6), [Busy({"here": 1}, 250.0)]
    assert sizes_of(place([gang, *trainings(8, 0.1, 100.0)], busy, Capacity.one_host(2, 1))) == [2]


def test_short_packs_share_a_batch_like_all_short_stages():
    (placement,) = place(trainings(6, seconds=2.0), [], Capacity.one_host(1, 1))
    assert len(placement.keys) == 6 and placement.keys[:4] == ("p00", "p01", "p02", "p03")


long_trainings = st.tuples(
    st.sampled_from(["", "p", "q"]),
    st.sampled_from([LONGEST_BATCH_S, 3 * LONGEST_BATCH_S]),
    st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 1.0]),
)


@given(st.lists(long_trainings, min_size=1, max_size=14), st.integers(1, 3))
def test_the_trainings_of_a_pack_fit_together_on_the_gpu(shapes, gpus):
    """Each training is as long as a batch may be, so several on one GPU are a pack."""
    ready = [
        work(f"k{index:02}", 1, "base", seconds, seconds, pack=pack, shares={None: share})
        for index, (pack, seconds, share) in enumerate(shapes)
    ]
    by_key = {each.key: each for each in ready}
    for placement in place(ready, [], Capacity.one_host(gpus, 1)):
        works = [by_key[key] for key in placement.keys]
        assert len({each.pack for each in works}) == 1 and (len(works) == 1 or works[0].pack)
        assert sum(each.shares[None] for each in works) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        (Needs(8), ["needs 8 GPUs on one host", "the largest has 4", "spread: true"]),
        (Needs(9, spread=True), ["9 GPUs at once", "together have 8"]),
        (Needs(1, {"type": "H100"}), ["no host is labelled type: H100", "type: A100"]),
        (Needs(1, {"zone": "in(a,b)"}), ["zone: in(a,b)", "no host has such a label"]),
        (Needs(0, {"type": "A100"}), ["no host with these labels has one"]),
    ],
)
def test_an_impossible_stage_has_a_message_with_the_reason_and_the_remedy(needs, words):
    capacity = Capacity((Host("h0", 4, 0, {"type": "A100"}), Host("h1", 4, 2)))
    message = impossible(ReadyStage("k", needs, "a", 1.0, 1.0), capacity)
    assert message is not None
    assert all(word in message for word in words), message


@pytest.mark.slow
@given(situations(running=False))
def test_exactly_the_possible_stages_start_on_an_empty_cluster(situation):
    ready, _, capacity = situation
    remaining = Capacity(tuple(each for each in capacity.hosts if not each.draining))
    for each in ready:
        assert bool(place([each], [], capacity)) == (impossible(each, remaining) is None)
