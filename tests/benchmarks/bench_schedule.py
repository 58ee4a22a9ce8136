"""A mixed queue of 10,000 stages on 8, 64 and 1,024 GPUs, scheduled six ways on a virtual clock:
`make bench-schedule`.

70% are trainings on one GPU of 5 to 60 minutes, 25% evaluations on one GPU of 1 to 15 minutes, 5%
trainings of gangs of eight GPUs of 1 to 6 hours; lognormal, cut off at these ends. An evaluation
reads from one of the trainings that stand before it in the queue. Hosts have eight GPUs. Every side
gets the same stages in the same order, an evaluation once its training is done, and is charged
nothing for starting one. What the baselines are: docs/benchmarks.md.
"""

import argparse
import gc
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from ebbline.cluster.executors.executor import Capacity, Host, Needs
from ebbline.cluster.running.runner import Runner
from ebbline.cluster.schedule.scheduler import Busy, Placement, ReadyQueue, ReadyStage
from ebbline.cluster.schedule.simulate import Choose, Step, bound_s, simulate
from ebbline.cluster.store.artifacts import Store
from tests.benchmarks import record
from tests.cluster import full_reading
from tests.cluster.test_ready_nodes import Holding, failed
from tests.cluster.test_ready_nodes import ready as made_ready

GPUS = (8, 64, 1024)
STAGES = 10_000
NOISE = 0.3  # sigma of the lognormal factor by which a noisy estimate is wrong
CPUS_A_GPU = (
    12  # as eight-GPU machines are rented today; Ray Tune's number of pending trials follows it
)
QUEUES = (1_000, 10_000, 100_000)
ONE_PENDING = "Ray Tune, searcher"
LIMITED = "Ray Tune, searcher, max_concurrent = GPUs"
MANY_PENDING = "Ray Tune, no searcher"
ONE, GANG = Needs(1), Needs(8)


def queue(seed: int, stages: int, noise: float = 0.0) -> list[Step]:
    """The steps in the order in which they are asked for."""
    rng, errors = random.Random(seed), random.Random(seed + 1)
    kinds = (
        ["train"] * (stages * 70 // 100)
        + ["evaluate"] * (stages * 25 // 100)
        + ["gang"] * (stages * 5 // 100)
    )
    rng.shuffle(kinds)
    steps: list[Step] = []
    trainings: list[Step] = []
    for number, kind in enumerate(kinds):
        low_s, high_s = {"train": (300, 3600), "evaluate": (60, 900), "gang": (3600, 6 * 3600)}[
            kind
        ]
        middle_s = (low_s * high_s) ** 0.5
        seconds = middle_s * rng.lognormvariate(0.0, 0.6)
        while not low_s <= seconds <= high_s:
            seconds = middle_s * rng.lognormvariate(0.0, 0.6)
        expected_s = seconds * errors.lognormvariate(0.0, noise)
        read = rng.choice(trainings) if kind == "evaluate" and trainings else None
        base = "70b" if kind == "gang" else read.resident if read else rng.choice(["7b", "13b"])
        # A 4-bit 70B model fits one GPU, so what its gang trained is measured on one, as any other.
        after = (read.key,) if read else ()
        step = Step(
            f"{number:06}", GANG if kind == "gang" else ONE, base, expected_s, seconds, after
        )
        steps.append(step)
        if kind != "evaluate":
            trainings.append(step)
    return steps


def hosts(gpus: int) -> Capacity:
    return Capacity(
        tuple(Host(f"host{number:03}", 8, 8 * CPUS_A_GPU) for number in range(gpus // 8))
    )


def in_order(
    most_pending: int | None = None,
    overtake: bool = False,
    most_alive: int | None = None,
    emptiest: bool = True,
) -> Choose:
    """A scheduler that takes the first `most_pending` stages in the order they came, each where it
    fits.

    Without `overtake` it stops at the first that does not fit. `most_alive` bounds the pending and
    the running together. `emptiest` puts each on the host with the most free GPUs, as Ray scores
    hosts for placement groups; else on the fullest.
    """

    def choose(
        ready: Sequence[ReadyStage],
        running: Sequence[Busy],
        capacity: Capacity,
        cached: Mapping[str, frozenset[str]],
    ) -> list[Placement]:
        free = {host.name: host.gpus for host in capacity.hosts}
        for job in running:
            for name, gpus in job.hosts.items():
                free[name] -= gpus
        placed: list[Placement] = []
        passed = 0
        blocked = 9
        for work in ready:
            alive = len(running) + len(placed) + passed
            if (
                passed >= (most_pending or len(ready))
                or alive >= (most_alive or alive + 1)
                or max(free.values()) == 0
            ):
                break
            able = (
                [name for name, left in free.items() if left >= work.gpus]
                if work.gpus < blocked
                else []
            )
            if able:
                name = (
                    max(able, key=lambda each: (free[each], each))
                    if emptiest
                    else min(able, key=lambda each: (free[each], each))
                )
                free[name] -= work.gpus
                placed.append(Placement((work.key,), work.needs, {name: work.gpus}))
            elif not overtake:
                break
            else:
                passed += 1
                blocked = min(blocked, work.gpus)
        return placed

    return choose


def sides(capacity: Capacity) -> dict[str, tuple[Choose | None, float]]:
    """Name -> (how it chooses, the noise of its estimates). None is ebbline's queue."""
    cpus = capacity.gpus * CPUS_A_GPU
    return {
        "ebbline": (None, 0.0),
        "ebbline, noisy estimates": (None, NOISE),
        "first in, first out": (in_order(emptiest=False), 0.0),
        ONE_PENDING: (in_order(most_pending=1), 0.0),
        LIMITED: (in_order(overtake=True, most_alive=capacity.gpus), 0.0),
        MANY_PENDING: (in_order(most_pending=max(200, int(1.1 * cpus)), overtake=True), 0.0),
    }


def measured(side: str, gpus: int, seed: int, stages: int) -> dict[str, Any]:
    """One whole queue scheduled by one side. A decision's milliseconds are those of a core."""
    capacity = hosts(gpus)
    choose, noise = sides(capacity)[side]
    steps = queue(seed, stages, noise)
    trace = simulate(steps, capacity, choose)
    assert not trace.never and len(trace.spans) == stages, (
        f"{side}: {len(trace.never)} stages never ran"
    )
    waits_h = [
        (span.start_s - span.ready_s) / 3600
        for span in trace.spans
        if sum(span.hosts.values()) == 8
    ]
    took_ms = [1000 * decision.took_s for decision in trace.decisions]
    print(
        f"{gpus} GPUs, {side}, seed {seed}: {trace.makespan_s / 3600:.1f} h",
        file=sys.stderr,
        flush=True,
    )
    return {
        "makespan_over_bound": trace.makespan_s / bound_s(steps, capacity),
        "makespan_h": trace.makespan_s / 3600,
        "gpu_utilisation": trace.utilisation,
        "mean_gang_wait_h": statistics.mean(waits_h),
        "longest_gang_wait_h": max(waits_h),
        "decisions": len(took_ms),
        "mean_ms_a_decision": statistics.mean(took_ms),
        "worst_ms_a_decision": max(took_ms),
        "ms_a_stage": sum(took_ms) / stages,
    }


def growth(gpus: int, runs: int) -> Iterator[dict[str, Any]]:
    """What one decision costs with so many stages in the queue: on idle hosts, and with one free
    GPU. And what it costs to put a stage into the queue, once, and to decide the same by reading
    all stages, without a queue.
    """
    capacity = hosts(gpus)
    held = [
        Busy({host.name: 1}, 600.0 + 30.0 * number)
        for host in capacity.hosts
        for number in range(8)
    ][1:]
    for stages, (state, running) in itertools.product(
        QUEUES, {"idle": [], "one GPU free": held}.items()
    ):
        works = [
            ReadyStage(step.key, step.needs, step.resident, step.expected_s, step.expected_s)
            for step in queue(0, stages)
        ]
        before = time.thread_time()
        ready = ReadyQueue(works)
        put_s = time.thread_time() - before
        took_s, started = [], 0
        for _ in range(runs):
            before = time.thread_time()
            started = sum(len(placement.keys) for placement in ready.place(running, capacity))
            took_s.append(time.thread_time() - before)
        middle_ms = 1000 * statistics.median(took_s)
        reading_s = []
        for _ in range(3):
            fresh = [replace(stage) for stage in works]
            before = time.thread_time()
            full_reading.place(fresh, running, capacity)
            reading_s.append(time.thread_time() - before)
        yield {
            "part": "one decision",
            "gpus": gpus,
            "hosts": state,
            "ready": stages,
            "started": started,
            "ms_a_decision": middle_ms,
            "ms_a_stage_started": middle_ms / started,
            "ms_reading_all": 1000 * statistics.median(reading_s),
            "us_to_put_a_stage": 1e6 * put_s / stages,
            "spread": record.spread(took_s),
        }


def longer(seconds: Callable[..., float]) -> Callable[..., float]:
    """Estimates with which each stage is a batch of its own."""
    return lambda *stage: 700.0 + seconds(*stage)


def turns(runs: int) -> Iterator[dict[str, Any]]:
    """What a start of stages costs the driver with so many ready: queue, estimates, decision, and
    the request of the stage that starts. A host has eight GPUs, each stage needs one.
    """
    for stages in QUEUES[:2]:
        executor = Holding(gpus=8)
        with tempfile.TemporaryDirectory() as folder:
            runner = Runner(Store(Path(folder)), executor, needs_of=lambda stage: ONE)
            runner.estimates._seconds = longer(runner.estimates._seconds)  # type: ignore[method-assign]
            runner.add(made_ready(stages))
            before = time.thread_time()
            runner._start()
            yield {
                "part": "one turn",
                "ready": stages,
                "case": "all stages are new",
                "started": 8,
                "ms_a_turn": 1000 * (time.thread_time() - before),
            }
            for case in ("no GPU free", "one GPU free", "one GPU free, estimates changed"):
                took_s = []
                for _ in range(runs):
                    if case != "no GPU free":
                        runner._end_job(failed(executor.jobs.pop(0)))
                    if case.endswith("changed"):
                        runner.estimates._predictions.clear()
                    before = time.thread_time()
                    runner._start()
                    took_s.append(time.thread_time() - before)
                yield {
                    "part": "one turn",
                    "ready": stages,
                    "case": case,
                    "started": 0 if case == "no GPU free" else 1,
                    "ms_a_turn": 1000 * statistics.median(took_s),
                }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stages", type=int, default=STAGES)
    given = parser.parse_args()
    # Torch came with `record`; a driver has none, and its collector need not walk through it
    gc.freeze()
    seeds = range(1, given.seeds + 1)
    decisions = [row for gpus in given.gpus for row in growth(gpus, runs=5)]
    shown = {
        name: (lambda value: f"{value:.3g}" if isinstance(value, float) else str(value))
        for name in decisions[0]
        if name != "part"
    }
    print(record.table(decisions, shown), end="\n\n")
    of_driver = list(turns(runs=9))
    shown = {name: shown["ready"] for name in of_driver[0] if name != "part"}
    print(record.table(of_driver, shown), end="\n\n")
    tasks = [
        (side, gpus, seed, given.stages)
        for gpus in given.gpus
        for side in sides(hosts(gpus))
        for seed in seeds
    ]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = dict(zip(tasks, pool.map(measured, *zip(*tasks, strict=True)), strict=True))
    rows = []
    for gpus in given.gpus:
        for side in sides(hosts(gpus)):
            runs = [found[side, gpus, seed, given.stages] for seed in seeds]
            middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            makespans_h = [run["makespan_h"] for run in runs]
            rows.append(
                {
                    "part": "queue",
                    "gpus": gpus,
                    "side": side,
                    "seeds": len(seeds),
                    **middle,
                    "spread": record.spread(makespans_h),
                }
            )
    columns = {
        name: (lambda value: f"{value:.3f}" if isinstance(value, float) else str(value))
        for name in rows[0]
        if name != "part"
    }
    print(record.table(rows, columns), end="\n\n")
    of = {(row["gpus"], row["side"]): row for row in rows}
    ratios = {
        f"makespan_over_bound_{gpus}_gpus": of[gpus, "ebbline"]["makespan_over_bound"]
        for gpus in given.gpus
    }
    for gpus in given.gpus:
        mine = of[gpus, "ebbline, noisy estimates"]["makespan_h"]
        ratios[f"makespan_over_bound_noisy_estimates_{gpus}_gpus"] = of[
            gpus, "ebbline, noisy estimates"
        ]["makespan_over_bound"]
        ratios[f"makespan_ray_tune_one_pending_over_ebbline_noisy_{gpus}_gpus"] = (
            of[gpus, ONE_PENDING]["makespan_h"] / mine
        )
        ratios[f"makespan_ray_tune_many_pending_over_ebbline_noisy_{gpus}_gpus"] = (
            of[gpus, MANY_PENDING]["makespan_h"] / mine
        )
    command = " ".join(["python -m tests.benchmarks.bench_schedule", *sys.argv[1:]])
    path = record.write("schedule_simulated", command, (), rows + decisions + of_driver, ratios)
    print(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
