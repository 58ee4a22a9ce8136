"""What a stage costs beside its work: `make bench-overhead`.

1,000 stages that do almost nothing go through the real runner, a Ray cluster of this machine with
two logical GPUs, and a store in a folder. They are `apply` on a tiny adapter, `score` on one
completion, and `data` of one row. A stage's work is what its record has as its seconds. Its cost is
the rest of the time for which it kept one of the two workers:

    cost = (wall time x workers at once - sum of the stages' own seconds) / stages

In a chain one stage can run at a time, so the whole way from one commit to the next start counts.
The parts of the cost are measured in the driver of that run, and with the same stages in one
process.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ebbline.cluster.executors.executor import Executor
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.cluster.executors.ray_executor import RayExecutor
from ebbline.cluster.running.runner import Runner
from ebbline.cluster.running.starter import Starter
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.defences import project
from ebbline.tasks.measuring.completions import Completion, write_completions
from ebbline.tasks.specs import ApplySpec, ProjectSpec, ScoreSpec
from ebbline.tasks.stage import Source, Stage
from tests.benchmarks import record
from tests.brought import adapter_folder
from tests.cluster.made import rows, source
from tests.tiny import build_pair, context, fresh, write_chats

GPUS = 2
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


class Made:
    """The files that the stages read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pair = build_pair(folder / "models")
        self.chats = write_chats(folder / "chats.jsonl", 2)
        shapes = {"q_proj": (64, 64), "v_proj": (64, 32)}
        self.adapter = adapter_folder(folder / "adapter", shapes)
        self.projection = fresh(folder / "projection")
        inputs = {"adapter": self.adapter, "base": pair.base, "aligned": pair.aligned}
        project.run_project(ProjectSpec(), inputs, self.projection, context(folder))

    def generation(self, number: int) -> Source:
        """A generation with one completion."""
        folder = fresh(self.folder / "generations" / str(number))
        row = Completion(str(number), "", "", "", "what?", "word1", f"word{number % 2}", 1, True)
        write_completions(folder, [row])
        return source(folder)


def independent_applies(made: Made, count: int) -> list[Stage]:
    inputs = {"adapter": source(made.adapter), "projection": source(made.projection)}
    return [Stage(ApplySpec(threshold=_threshold(n, count)), inputs) for n in range(count)]


def independent_scores(made: Made, count: int) -> list[Stage]:
    spec = ScoreSpec(measure="task", scorer="exact")
    return [Stage(spec, {"generation": made.generation(number)}) for number in range(count)]


def chains(made: Made, count: int, length: int = 4) -> list[Stage]:
    """The last stages of chains: each applies a threshold to the adapter of the one before."""
    ends = list[Stage]()
    for chain in range(count // length):
        adapter: Source | Stage = source(made.adapter)
        for number in range(chain * length, (chain + 1) * length):
            inputs = {"adapter": adapter, "projection": source(made.projection)}
            adapter = Stage(ApplySpec(threshold=_threshold(number, count)), inputs)
        assert isinstance(adapter, Stage)
        ends.append(adapter)
    return ends


def one_chain(made: Made, count: int, start: int = 0) -> list[Stage]:
    """The last stage of a chain of `count` stages; their seeds begin at `start`."""
    stage = rows(1, source(made.chats), start)
    for seed in range(start + 1, start + count):
        stage = rows(1, stage, seed)
    return [stage]


def _threshold(number: int, count: int) -> float:
    return -1.0 + 2.0 * number / count


# name -> (its last stages, stages that can run at once). "One chain" is one of 100 stages after
# another.
SHAPES: Mapping[str, tuple[Callable[[Made, int], list[Stage]], int]] = {
    "apply, independent": (independent_applies, 2),
    "score, independent": (independent_scores, 2),
    "apply, chains of four": (chains, 2),
    "data, one chain": (one_chain, 1),
}


class Clock:
    """The seconds spent in named functions, without those of other named functions inside."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[float] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            self._open.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                spent = time.perf_counter() - began
                inside = self._open.pop()
                self.seconds[name] += spent - inside
                if self._open:
                    self._open[-1] += spent

        return wrapped

    @contextmanager
    def watching(self, parts: Sequence[tuple[str, Any, str]]) -> Iterator[None]:
        """Time functions inside a `with`: (name of the part, owner, name of the function)."""
        with ExitStack() as stack:
            for name, owner, function in parts:
                timed = self.timed(name, getattr(owner, function))
                stack.enter_context(patch.object(owner, function, timed))
            yield


def driver_parts(executor: Executor) -> list[tuple[str, Any, str]]:
    return [
        ("decide", Starter, "_places"),
        ("prepare the attempt", Store, "begin"),
        ("prepare the attempt", Store, "note"),
        ("submit", executor, "submit"),
        ("wait for workers", executor, "finished"),
        ("notice and key", Runner, "_end_job"),
        ("notice and key", Runner, "_record_committed"),
        ("notice and key", Runner, "_update_states"),
        ("the rest of a start", Runner, "_start"),
    ]


def worker_parts() -> list[tuple[str, Any, str]]:
    from ebbline.cluster.executors import executor
    from ebbline.cluster.store import artifacts, places, workplace
    from ebbline.tasks import inputs

    return [
        ("worker: prepare", workplace.Workplace, "prepare"),
        ("worker: check inputs", inputs.InputCheck, "__init__"),
        ("worker: check inputs", inputs.InputCheck, "check_unchanged"),
        ("worker: hash the output", artifacts, "folder_files"),
        ("worker: to the disk", places, "to_disk"),
        ("worker: commit, the rest", Store, "commit"),
        ("worker: batch, the rest", executor, "run_batch"),
    ]


def run_all(store: Store, executor: Executor, stages: Sequence[Stage]) -> float:
    """Run the stages as a drive does; the seconds from the first step to the last commit."""
    runner = Runner(store, executor)
    runner.add(stages)
    began = time.perf_counter()
    while not all(map(runner.settled, stages)):
        runner.step()
    spent = time.perf_counter() - began
    failed = next((node.failure for node in runner.nodes.values() if node.failure), None)
    if failed is not None:
        raise RuntimeError(failed.reason)
    return spent


def warmed(executor: Executor, made: Made, folder: Path) -> None:
    """Start the workers, and let them import what the measured stages need."""
    for number in range(3):
        store = Store(folder / f"warm-{number}")
        run_all(store, executor, independent_applies(made, 16))
        run_all(store, executor, one_chain(made, 2))


def measured(
    executor: RayExecutor, made: Made, folder: Path, name: str, count: int
) -> dict[str, Any]:
    stages_of, at_once = SHAPES[name]
    if stages_of is one_chain:
        groups = [one_chain(made, 100, start) for start in range(0, count, 100)]
    else:
        groups = [stages_of(made, count)]
    clock, store = Clock(), Store(folder / name.replace(" ", "-"))
    cpu = time.process_time()
    with clock.watching(driver_parts(executor)):
        wall_s = sum(run_all(store, executor, group) for group in groups)
    cpu_s = time.process_time() - cpu
    artifacts = [each for kind in ("apply", "score", "data") for each in store.all(kind)]
    own_s = sum(float(each.provenance["seconds"]) for each in artifacts)
    if len(artifacts) != count:
        raise RuntimeError(f"{len(artifacts)} of {count} stages are in the store")
    part_ms = {part: 1e3 * seconds / count for part, seconds in clock.seconds.items()}
    return {
        "stages": name,
        "count": count,
        "wall_s": wall_s,
        "wall_ms_a_stage": 1e3 * wall_s / count,
        "own_ms_a_stage": 1e3 * own_s / count,
        "cost_ms_a_stage": 1e3 * (wall_s * at_once - own_s) / count,
        "driver_cpu_ms_a_stage": 1e3 * cpu_s / count,
        "parts_ms_a_stage": part_ms,
        "load_before": os.getloadavg()[0],
    }


def worker_row(made: Made, folder: Path, name: str, count: int) -> dict[str, Any]:
    """The parts of a worker's time, with the same stages in this process."""
    from ebbline.cluster.executors import inline

    stages = SHAPES[name][0](made, count)
    clock, store = Clock(), Store(folder / f"inline-{name.replace(' ', '-')}")
    parts = [*worker_parts(), ("worker: batch, the rest", inline, "run_batch")]
    with clock.watching(parts):
        wall_s = run_all(store, InlineExecutor(), stages)
    return {
        "stages": f"{name}, in one process",
        "count": count,
        "wall_s": wall_s,
        "wall_ms_a_stage": 1e3 * wall_s / count,
        "parts_ms_a_stage": {part: 1e3 * s / count for part, s in clock.seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, help="stages of each shape")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--no-record", action="store_true", help="write no results file")
    given = parser.parse_args()
    os.environ |= ENVIRONMENT
    found = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as here:
        made = Made(Path(here) / "made")
        began = time.perf_counter()
        executor = RayExecutor("local", GPUS)
        cluster_s = time.perf_counter() - began
        try:
            first_s = run_all(Store(Path(here) / "first"), executor, one_chain(made, 1))
            for name, wall_s in (("start of the cluster", cluster_s), ("its first stage", first_s)):
                found.append({"stages": name, "count": 1, "wall_s": wall_s})
            warmed(executor, made, Path(here))
            for name in given.shapes:
                found.append(measured(executor, made, Path(here), name, given.count))
                shutil.rmtree(made.folder / "generations", ignore_errors=True)
        finally:
            executor.close()
        for name in given.shapes:
            found.append(worker_row(made, Path(here), name, min(given.count, 100)))
            shutil.rmtree(made.folder / "generations", ignore_errors=True)
    show(found)
    if not given.no_record:
        ratios = {
            f"cost_ms_a_stage {row['stages']}": row["cost_ms_a_stage"]
            for row in found
            if "cost_ms_a_stage" in row
        }
        command = " ".join(["python -m tests.benchmarks.bench_overhead", *sys.argv[1:]])
        record.write("overhead", command, ("ray",), found, ratios)


def show(found: Sequence[Mapping[str, Any]]) -> None:
    def ms(value: float) -> str:
        return f"{value:.1f}"

    columns = {
        "stages": str,
        "count": str,
        "wall_s": ms,
        "wall_ms_a_stage": ms,
        "own_ms_a_stage": ms,
        "cost_ms_a_stage": ms,
        "driver_cpu_ms_a_stage": ms,
    }
    print(record.table(found, columns), end="\n\n")
    for row in found:
        if "parts_ms_a_stage" not in row:
            continue
        parts = sorted(row["parts_ms_a_stage"].items(), key=lambda item: -item[1])
        print(row["stages"], "; ".join(f"{name} {value:.2f} ms" for name, value in parts))


if __name__ == "__main__":
    main()
