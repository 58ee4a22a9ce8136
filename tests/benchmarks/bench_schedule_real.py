"""24 stages that really run on three Ray nodes of four logical GPUs, scheduled by ebbline and by
Ray Tune: part of `make bench-schedule`.

20 stages on one GPU and two gangs of four sleep for their GPU time, as the machine has fewer cores
than GPUs; two on one GPU train a tiny model. All are ready from the start. ebbline's side is its
scheduler and its Ray executor; only what a process does with a
request is replaced, by the sleep. Ray Tune's side is a trial with a PlacementGroupFactory for each
stage. Every stage has a process of its own, as on real GPUs, and writes down when it worked.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
from ray import tune
from ray.cluster_utils import Cluster
from ray.tune.search import BasicVariantGenerator, Searcher
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ebbline.cluster.executors import ray_executor
from ebbline.cluster.executors.executor import Capacity, Host, Needs
from ebbline.cluster.executors.job_processes import JobProcesses
from ebbline.cluster.executors.ray_executor import RayExecutor
from ebbline.cluster.schedule.scheduler import Busy, ReadyQueue, ReadyStage
from ebbline.cluster.schedule.simulate import Choose, Step, bound_s, simulate
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Report, Request
from tests.benchmarks import record
from tests.benchmarks.bench_schedule import NOISE, in_order
from tests.cluster.made import stored_request
from tests.tiny import build_pair, write_chats

NODES, GPUS_A_NODE = 3, 4
SLEEPS, TRAININGS, GANGS = 20, 2, 2
ONE_S, GANG_S = (2.0, 20.0), (15.0, 20.0)
CAPACITY = Capacity(tuple(Host(f"host{number}", GPUS_A_NODE, 2) for number in range(NODES)))
# What the executor sets for stages on logical GPUs.
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True)
class Entry:
    """A stage of the queue: what the schedulers know of it, and the request for its process."""

    step: Step
    request: Request


def worked(
    requests: Sequence[Request],
    rank: int = 0,
    world_size: int = 1,
    leaving: Callable[[], bool] = lambda: False,
    gpu_type: str | None = None,
) -> tuple[Report, ...]:
    """Sleep or train, in place of `run_batch`, and write down from when to when: what a process
    does on both sides.
    """
    reports: list[Report] = []
    for request in requests:
        started = time.time()
        if request.kind == "sleep":
            time.sleep(request.spec["seconds"])
            reports.append(Report(request.key, request.spec["seconds"]))
        else:
            from ebbline.cluster.executors.executor import (
                run_batch,  # here, so that a process that sleeps is not charged for it
            )

            reports += run_batch([request])
        if rank == 0:
            path = Path(request.log) / "span.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps([started, time.time()]))
    return tuple(reports)


# With a GPU of its own in the declaration, Ray ends the process after the task, as it does on real
# GPUs.
@ray.remote(max_retries=0, num_cpus=1, num_gpus=1)  # type: ignore[untyped-decorator]
def _sleeping_batch(requests: list[Request], processes: JobProcesses) -> tuple[Report, ...]:
    processes.sign_on("task")
    return worked(requests)


@ray.remote(max_retries=0, num_cpus=0)  # type: ignore[untyped-decorator]
def _sleeping_gang(requests: list[Request], processes: JobProcesses) -> tuple[Report, ...]:
    from ebbline.cluster.executors.gang import run_gang

    processes.sign_on("task")
    return run_gang(requests, processes, worked)


def ebbline(queue: Sequence[Entry], address: str) -> float:
    """Run the queue as a driver does, with estimates as known beforehand; the moment when the
    scheduler first had it.
    """
    with (
        patch.object(ray_executor, "_batch", _sleeping_batch),
        patch.object(ray_executor, "_gang", _sleeping_gang),
    ):
        executor = RayExecutor(address)
        try:
            requests = {entry.step.key: entry.request for entry in queue}
            expected_s = {entry.step.key: entry.step.expected_s for entry in queue}
            ready = ReadyQueue(
                ReadyStage(step.key, step.needs, step.resident, step.expected_s, step.expected_s)
                for step in (entry.step for entry in queue)
            )
            running: dict[str, tuple[Mapping[str, int], float]] = {}
            began, since = time.time(), time.monotonic()
            while ready or running:
                now = time.monotonic()
                busy = [Busy(hosts, max(1.0, end - now)) for hosts, end in running.values()]
                for placement in ready.place(busy, executor.capacity(), now_s=now - since):
                    job = executor.submit(
                        [requests[key] for key in placement.keys], placement.needs, placement.hosts
                    )
                    seconds = sum(expected_s[key] for key in placement.keys)
                    running[job.id] = placement.hosts, now + seconds
                    for key in placement.keys:
                        ready.remove(key)
                for done in executor.finished(0.5):
                    if done.lost or any(report.error for report in done.reports):
                        raise RuntimeError(f"a stage did not run: {done}")
                    del running[done.job.id]
            return began
        finally:
            executor.close()


class _InOrder(Searcher):  # type: ignore[misc]
    """A searcher that suggests the queue's entries in their order."""

    def __init__(self, entries: int) -> None:
        super().__init__(metric="done", mode="max")
        self._left = iter(range(entries))

    def suggest(self, trial_id: str) -> dict[str, int] | str:
        return next(({"entry": entry} for entry in self._left), Searcher.FINISHED)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass


@ray.remote(max_retries=0, num_cpus=1, num_gpus=1)  # type: ignore[untyped-decorator]
def _tune_member(text: str, rank: int, size: int) -> None:
    import torch.distributed

    request = Request.from_json(text)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{request.scratch}", rank=rank, world_size=size
    )
    torch.distributed.barrier()
    worked([request], rank, size)
    torch.distributed.destroy_process_group()


def ray_tune(queue: Sequence[Entry], address: str, folder: Path, searcher: bool) -> float:
    """Run the queue as trials, each with its placement group; the moment when `fit` was called."""
    texts = [entry.request.to_json() for entry in queue]
    sizes = [entry.step.needs.gpus for entry in queue]

    def trial(config: dict[str, int]) -> None:
        text, size = texts[config["entry"]], sizes[config["entry"]]
        if size == 1:
            worked([Request.from_json(text)])
        else:
            group = get_current_placement_group()
            at = [
                PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
                for rank in range(size)
            ]
            ray.get(
                [
                    _tune_member.options(scheduling_strategy=at[rank]).remote(text, rank, size)
                    for rank in range(size)
                ]
            )
        tune.report({"done": 1})

    def resources(config: dict[str, int]) -> tune.PlacementGroupFactory:
        size = sizes[config["entry"]]
        one = {"CPU": 1, "GPU": 1}
        # The trial of a gang needs nothing itself, as the task that starts a gang of ebbline's.
        return tune.PlacementGroupFactory(
            [one] if size == 1 else [{}, *[one] * size], strategy="STRICT_PACK"
        )

    ray.init(
        address=address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": VARIABLES},
    )
    try:
        tuner = tune.Tuner(
            tune.with_resources(trial, resources=resources),
            param_space={} if searcher else {"entry": tune.grid_search(list(range(len(queue))))},
            tune_config=tune.TuneConfig(
                search_alg=_InOrder(len(queue)) if searcher else BasicVariantGenerator(),
                num_samples=len(queue) if searcher else 1,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(storage_path=str(folder), name="tune", verbose=0),
        )
        began = time.time()
        results = tuner.fit()
        if results.num_errors or len(results) != len(queue):
            raise RuntimeError(
                f"{results.num_errors} of {len(results)} trials failed: {results.errors[:1]}"
            )
        return began
    finally:
        ray.shutdown()


def steps(training_s: float, stretch: float) -> list[Step]:
    """The same 24 each time, sleeping `stretch` times as long.

    Each needs a base of its own, so that ebbline starts one at a time, as Ray Tune does.
    """
    rng = random.Random(0)

    def drawn_s(low_s: float, high_s: float) -> float:
        return stretch * min(
            high_s, max(low_s, (low_s * high_s) ** 0.5 * rng.lognormvariate(0.0, 0.6))
        )

    one = [
        Step(f"sleep{number:02}", Needs(1), f"sleep{number}", seconds := drawn_s(*ONE_S), seconds)
        for number in range(SLEEPS)
    ]
    trainings = [
        Step(f"train{number}", Needs(1), f"train{number}", training_s, training_s)
        for number in range(TRAININGS)
    ]
    gangs = [
        Step(f"gang{number}", Needs(4), f"gang{number}", seconds := drawn_s(*GANG_S), seconds)
        for number in range(GANGS)
    ]
    return one + trainings + gangs


def entries(queue: Sequence[Step], folder: Path, model: Path, rows: Path) -> list[Entry]:
    """The requests of one run, with a store and logs of its own."""
    store = Store(folder / "store")
    found = []
    for step in queue:
        if step.key.startswith("train"):
            spec = TrainSpec(
                rank=1 + int(step.key[-1]),
                dtype="float32",
                learning_rate=2e-2,
                global_batch=8,
                steps=30,
                max_tokens=32,
            )
            request = stored_request(
                store, spec, {"model": model, "data": rows}, gpus=1, device="cpu", threads=1
            )
        else:
            here = folder / step.key
            here.mkdir(parents=True)
            out = here / "sleep" / step.key / "attempt" / "payload"  # as a store has it
            at = {"out": str(out), "log": str(here), "scratch": str(here / "scratch")}
            request = Request(
                step.key, "sleep", {"seconds": step.seconds}, {}, {}, gpus=step.needs.gpus, **at
            )
        found.append(Entry(step, request))
    return found


@contextmanager
def cluster() -> Iterator[str]:
    """The address of a cluster that all runs share, one after the other: each is a job of its own,
    with processes of its own.
    """
    node = {"num_cpus": GPUS_A_NODE + 2, "num_gpus": GPUS_A_NODE}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(NODES - 1):
            made.add_node(**node)
        made.wait_for_nodes()
        yield made.address
    finally:
        made.shutdown()


def longest_first(queue: Sequence[Step]) -> list[Step]:
    return sorted(queue, key=lambda step: -step.seconds)


@dataclass(frozen=True)
class Side:
    """How a queue is given to it, how it runs, and the model of it that the simulated part uses."""

    run: Callable[[Sequence[Entry], str, Path], float]
    model: Choose | None
    given: Callable[[Sequence[Step]], Sequence[Step]] = list
    noise: float = 0.0


def sides() -> dict[str, Side]:
    def mine(queue: Sequence[Entry], address: str, folder: Path) -> float:
        return ebbline(queue, address)

    def one_pending(queue: Sequence[Entry], address: str, folder: Path) -> float:
        return ray_tune(queue, address, folder, searcher=True)

    def many_pending(queue: Sequence[Entry], address: str, folder: Path) -> float:
        return ray_tune(queue, address, folder, searcher=False)

    return {
        "ebbline, noisy estimates": Side(mine, None, noise=NOISE),
        "Ray Tune, searcher": Side(one_pending, in_order(most_pending=1)),
        "Ray Tune, no searcher": Side(many_pending, in_order(overtake=True)),
        "ebbline": Side(mine, None),
        "Ray Tune, no searcher, sorted by hand": Side(
            many_pending, in_order(overtake=True), given=longest_first
        ),
    }


def measured(
    name: str, side: Side, queue: Sequence[Step], seed: int, address: str, model: Path, rows: Path
) -> dict[str, float]:
    """One queue on one side, once. Seconds of the wall clock, from when the side has the queue to
    when the last stage ended.
    """
    errors = random.Random(1000 + seed)
    expected = [
        replace(step, expected_s=step.seconds * errors.lognormvariate(0.0, side.noise))
        for step in side.given(queue)
    ]
    with tempfile.TemporaryDirectory(prefix="bench-schedule-") as here:
        made = entries(expected, Path(here), model, rows)
        load_before = os.getloadavg()[0]
        began = side.run(made, address, Path(here))
        spans = {
            entry.step.key: json.loads((Path(entry.request.log) / "span.json").read_text())
            for entry in made
        }
    makespan_s = max(end for _, end in spans.values()) - began
    bound, model_s = (
        bound_s(expected, CAPACITY),
        simulate(expected, CAPACITY, side.model).makespan_s,
    )
    held_s = sum(step.needs.gpus * (spans[step.key][1] - spans[step.key][0]) for step in expected)
    found = {
        "makespan_s": makespan_s,
        "bound_s": bound,
        "makespan_over_bound": makespan_s / bound,
        "gpu_utilisation": held_s / (makespan_s * CAPACITY.gpus),
        "longest_gang_wait_s": max(
            (spans[step.key][0] - began for step in expected if step.needs.gpus > 1), default=0.0
        ),
        "first_start_s": min(start for start, _ in spans.values()) - began,
        "simulated_s": model_s,
        "overhead_s": makespan_s - model_s,
        "training_s": max(
            end - start for key, (start, end) in spans.items() if key.startswith("train")
        ),
        "load_before": load_before,
    }
    print(
        f"{name}, order {seed}: {makespan_s:.1f} s, bound {bound:.1f} s, load {load_before:.1f}",
        file=sys.stderr,
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=2,
        help="each shuffles the queue anew, and gives it to every side",
    )
    parser.add_argument(
        "--stretch",
        type=float,
        default=1.0,
        help="longer sleeps, where starting a process takes long",
    )
    parser.add_argument("--sides", nargs="+", choices=list(sides()), default=list(sides()))
    given = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides()}
    with tempfile.TemporaryDirectory(prefix="bench-schedule-") as here, cluster() as address:
        model, rows = build_pair(Path(here)).aligned, write_chats(Path(here) / "rows.jsonl", 48)
        # How long a training takes by itself, with its imports, in a fresh process as all the
        # others.
        training = [step for step in steps(10.0, 1.0) if step.key == "train0"]
        alone = measured(
            "one training by itself", sides()["ebbline"], training, 0, address, model, rows
        )
        for seed in range(1, given.runs + 1):
            queue = steps(alone["training_s"], given.stretch)
            random.Random(seed).shuffle(queue)
            for name in given.sides:
                side = sides()[name]
                found[name].append(measured(name, side, queue, seed, address, model, rows))
                written(found)


def written(found: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """The results so far, so that a benchmark that is cut short is worth what it had done."""
    done = {name: runs for name, runs in found.items() if runs}
    table = []
    for name, runs in done.items():
        middle = {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}
        spread = record.spread([run["makespan_s"] for run in runs])
        table.append({"part": "real", "side": name, "runs": len(runs), **middle, "spread": spread})
    columns = {
        name: (lambda value: f"{value:.3g}" if isinstance(value, float) else str(value))
        for name in table[0]
        if name != "part"
    }
    print(record.table(table, columns), end="\n\n")
    of = {row["side"]: row["makespan_s"] for row in table}
    mine = "ebbline, noisy estimates"
    ratios = {
        f"makespan {name} / {mine}": of[name] / of[mine]
        for name in of
        if name.startswith("Ray Tune") and mine in of
    }
    ratios |= {f"makespan {row['side']} / bound": row["makespan_over_bound"] for row in table}
    each = [
        {"part": "one run", "side": name, "order": order, **run}
        for name, runs in done.items()
        for order, run in enumerate(runs, 1)
    ]
    command = " ".join(["python -m tests.benchmarks.bench_schedule_real", *sys.argv[1:]])
    path = record.write("schedule_real", command, ("ray", "torch"), table + each, ratios)
    print(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
