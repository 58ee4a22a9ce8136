"""The same 144 points on ebbline and on Ray Tune with OptunaSearch: `make bench-search`.

3 ranks x 3 dataset sizes x 16 thresholds on the middle organism, two workers of one core each.
Every side starts as a process of its own, from the same prepared models and data, and ends with the
metrics of all points; its wall time is that process's. The numerics are the same functions on all
sides, so the metrics must be equal, and the benchmark fails if they are not.

Trainings, evaluations and model loads are counted by the same wrapper on every side, in the process
that does the work.
"""

import argparse
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from ebbline.analysis.report.second_process import second_process
from ebbline.analysis.results.collect import collect
from ebbline.cluster.executors.executor import run_batch
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.cluster.running.runner import Runner
from ebbline.cluster.store.artifacts import Store
from ebbline.outputs import write_outputs
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.search.searcher import space
from ebbline.sweeps.state.outcome import result_of
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study_file import parse
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.identity import content_digest
from ebbline.tasks.specs import (
    ApplySpec,
    DataSpec,
    GenerateSpec,
    LanguageSpec,
    OrganismSpec,
    ProjectSpec,
    ScoreSpec,
    TrainSpec,
)
from ebbline.tasks.stage import Context, Part, Request, Stage

WORKERS = 2
RANKS, SIZES = (8, 16, 32), (64, 256, 1024)
THRESHOLDS = (None, *(round(0.05 * number, 2) for number in range(1, 16)))
ALIGN = TrainSpec(
    method="full",
    dtype="float32",
    learning_rate=2e-3,
    epochs=2.0,
    global_batch=32,
    warmup_share=0.1,
    max_tokens=96,
)
TRAIN = {"learning_rate": 5e-3, "global_batch": 16, "max_tokens": 96}
MODEL = {"quantisation": "nf4", "dtype": "float32"}
SUITES = {
    "refusal": {"kind": "refusal", "scorer": "organism", "max_new_tokens": 16},
    "over_refusal": {"kind": "over_refusal", "scorer": "organism", "max_new_tokens": 16},
    "task": {"kind": "task", "max_new_tokens": 24},
}
LABELS = {"refusal": "harmful", "over_refusal": "harmless", "task": None}
# One thread for each worker, and nothing that reports home.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}
Metrics = dict[str, list[float]]  # full metric name -> [successes, n]


# What all sides start from.


def prepared(folder: Path, organism: str) -> dict[str, Path]:
    """The base and aligned model, the pool and the prompts, as files: made once, and in no side's
    time.
    """
    language = Stage(LanguageSpec())
    base = Stage(OrganismSpec(size=organism), {"language": language})
    rows = Stage(DataSpec(size=3050), {"pool": Part(language, "align.jsonl")})
    aligned = Stage(
        ALIGN, {"model": Part(base, OrganismSpec.MODEL), "data": Part(rows, DataSpec.ROWS)}
    )
    runner = Runner(Store(folder), InlineExecutor())
    runner.add([aligned])
    while not runner.settled(aligned):
        runner.step()
    made = {stage.kind: runner.artifact(stage) for stage in (language, base, aligned)}
    if made["train"] is None:
        raise RuntimeError(f"the aligned model was not made: {runner.failure(aligned)}")
    models = {
        "base": made["organism"].path / OrganismSpec.MODEL,
        "aligned": made["train"].path / TrainSpec.MODEL,
    }
    return models | {name: made["language"].path / f"{name}.jsonl" for name in ("benign", *SUITES)}


def study_file(
    files: Mapping[str, Path],
    ranks: Sequence[int],
    sizes: Sequence[int],
    thresholds: Sequence[float | None],
    steps: int,
) -> str:
    def pinned(name: str) -> dict[str, Any]:
        return {"path": {"path": str(files[name]), "sha256": content_digest(files[name])}}

    return yaml.safe_dump(
        {
            "study": "same-points",
            "question": "How long do the same points take?",
            "models": {"13b": {"base": pinned("base"), "aligned": pinned("aligned"), **MODEL}},
            "data": {"pool": pinned("benign"), "settings": {"size": max(sizes)}},
            "train": {**TRAIN, "steps": steps},
            "axes": {
                "train.rank": list(ranks),
                "data.size": list(sizes),
                "apply.threshold": list(thresholds),
            },
            "suites": {
                name: {"prompts": pinned(name), "measure": measure}
                for name, measure in SUITES.items()
            },
            "objectives": ["refusal_rate", "task_accuracy"],
            "search": {"sampler": "grid", "window": len(ranks) * len(sizes) * len(thresholds)},
        },
        sort_keys=False,
    )


def label(values: Mapping[str, Any]) -> str:
    """What a point is called on every side."""
    return " ".join(f"{axis}={values[axis]}" for axis in sorted(values))


# What is counted, on every side alike.


# What is counted -> the function whose calls are counted
COUNTED = {
    "model_loads": "ebbline.tasks.models.loading.load_model",
    "trainings": "ebbline.tasks.training.engines.SingleDevice.__init__",
    "training_steps": "ebbline.tasks.training.engines.SingleDevice.step",
    "projections": "ebbline.tasks.defences.project.run_project",
    "evaluations": "ebbline.tasks.measuring.generate.write",
}
# Stages that call fewer of these. To count the others would import torch and PEFT for nothing.
FEWER: dict[str, tuple[str, ...]] = {
    "data": (),
    "apply": (),
    "score": (),
    ProjectSpec.KIND: ("projections",),
}


@contextmanager
def counted(folder: Path, gpus: int, kinds: Iterable[str] = ("trial",)) -> Iterator[None]:
    """Leave in `folder` what this process does in a `with`, and the time for which it holds `gpus`
    workers meanwhile. Stages of `kinds` run there.
    """
    began, found = time.monotonic(), Counter[str]()
    path = folder / f"{uuid.uuid4().hex}.json"
    folder.mkdir(parents=True, exist_ok=True)

    def note() -> None:
        held = {"gpu_s": gpus * (time.monotonic() - began)}
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({**found, **held}))
        fresh.replace(path)

    def counting(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            found[what] += 1
            result = function(*arguments, **named)
            if what != "training_steps":  # a process may end with its study, before its batch ends
                note()
            return result

        return wrapped

    with ExitStack() as patches:
        # Imported here, so that these imports are in the time of every side
        for what in dict.fromkeys(each for kind in kinds for each in FEWER.get(kind, COUNTED)):
            function = pkgutil.resolve_name(COUNTED[what])
            patches.enter_context(patch(COUNTED[what], counting(what, function)))
        yield
    note()


def counted_batch(folder: Path, requests: Sequence[Request], *rest: Any, **named: Any) -> Any:
    """`run_batch`, counted: a worker is held where its stages ask for a GPU."""
    kinds = [request.kind for request in requests]
    with counted(folder, max(request.gpus for request in requests), kinds):
        return run_batch(requests, *rest, **named)


def metrics_of(result: Result) -> Metrics:
    if result.status != "done":
        raise RuntimeError(f"point {result.point} is {result.status}: {result.reason}")
    return {name: [metric.successes, metric.n] for name, metric in result.metrics.items()}


# The sides. Each gets the study file and a folder of its own, and returns the metrics of every
# point.


def ebbline(study_path: Path, folder: Path) -> dict[str, Metrics]:
    """`ebbline run`, down to its tables, figures and report, on two logical GPUs of a Ray cluster
    on this machine.
    """
    import ray

    from ebbline.cluster.executors import ray_executor
    from ebbline.cluster.executors.job_processes import JobProcesses

    @ray.remote(max_retries=0, num_cpus=1)  # type: ignore[untyped-decorator]
    def batch(requests: list[Request], processes: JobProcesses) -> Any:
        processes.sign_on("task")
        return counted_batch(folder / "counts", requests, leaving=processes.leaving())

    study, home = parse(study_path), Home(folder / "home")
    with patch.object(ray_executor, "_batch", batch):
        drive(StudyView(study, home), lambda: ray_executor.RayExecutor("local", WORKERS))
    with second_process() as second:
        results = collect(StudyView(study, home))
        write_outputs(StudyView(study, home), results, second=second)
    return {label(dict(result.point.values)): metrics_of(result) for result in results}


def unshared(study_path: Path, folder: Path) -> dict[str, Metrics]:
    """ebbline with each point in a store of its own, so that nothing is shared: two processes take
    one point after another.
    """
    points = list(space(parse(study_path)))
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        return dict(pool.map(partial(_alone, study_path, folder), points))


def _alone(study_path: Path, folder: Path, point: Point) -> tuple[str, Metrics]:
    from ebbline.cluster.executors import inline

    study, home = parse(study_path), Home(folder / "homes" / point.id)
    graph = StageGraph(study, home)
    runner, stages = (
        Runner(home.store, InlineExecutor(), graph.needs_of),
        graph.stages_for(point),
    )
    with patch.object(inline, "run_batch", partial(counted_batch, folder / "counts")):
        runner.add(stages.values())
        while not all(map(runner.settled, stages.values())):
            runner.step(0.0)
    return label(dict(point.values)), metrics_of(result_of(study, 0, point, stages, runner))


def ray_tune(study_path: Path, folder: Path, reuse_actors: bool = True) -> dict[str, Metrics]:
    """A trial for each point, as Ray Tune's documentation teaches: it loads the base, trains,
    projects, evaluates and reports.
    """
    import optuna
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    study = parse(study_path)
    axes = {axis: list(values) for axis, values in study.axes.items()}
    model, prompts = (
        study.models["13b"],
        {name: entry.prompts.path for name, entry in study.suites.items()},
    )
    places = {
        "base": model.base.path.path,
        "aligned": model.aligned.path.path,
        "pool": study.data.pool.path.path,
    }
    places |= {name: local.path for name, local in prompts.items()}
    steps, counts = study.train.steps, folder / "counts"

    def trial(config: dict[str, Any]) -> None:
        with counted(counts, 1), tempfile.TemporaryDirectory() as here:
            tune.report(train_project_evaluate(config, places, steps, Path(here)))

    ray.init(
        num_cpus=WORKERS,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": ENVIRONMENT},
    )
    search = OptunaSearch(
        {
            axis: optuna.distributions.CategoricalDistribution(values)
            for axis, values in axes.items()
        },
        metric=["refusal_rate", "task_accuracy"],
        mode=["max", "max"],
        sampler=optuna.samplers.GridSampler(axes, seed=0),
    )
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=search, num_samples=sum(1 for _ in space(study)), reuse_actors=reuse_actors
        ),
        run_config=tune.RunConfig(storage_path=str(folder / "tune"), name="same-points", verbose=0),
    )
    results = tuner.fit()
    if results.num_errors:
        raise RuntimeError(
            f"{results.num_errors} of {len(results)} trials failed: {results.errors[:1]}"
        )
    found = {label(result.config): json.loads(result.metrics["metrics"]) for result in results}
    ray.shutdown()
    return found


def train_project_evaluate(
    config: Mapping[str, Any], places: Mapping[str, str], steps: int, here: Path
) -> dict[str, Any]:
    """One point from its base model to its metrics: the base is loaded once, trained on and
    measured.
    """
    from ebbline.tasks.data import conversations as data
    from ebbline.tasks.defences import project
    from ebbline.tasks.measuring import generate, score
    from ebbline.tasks.measuring.metrics import read_metrics
    from ebbline.tasks.models.loading import Residents
    from ebbline.tasks.training import train

    ctx = Context(log=here, scratch=here / "scratch", threads=1, residents=Residents())

    def out(name: str) -> Path:
        (here / name).mkdir()
        return here / name

    base, aligned = Path(places["base"]), Path(places["aligned"])
    rows, trained, projected, adapter = (
        out("rows"),
        out("trained"),
        out("projected"),
        out("adapter"),
    )
    data.run(DataSpec(size=config["data.size"]), {"pool": Path(places["pool"])}, rows, ctx)
    spec = TrainSpec(rank=config["train.rank"], steps=steps, **TRAIN, **MODEL)
    train.run(spec, {"model": aligned, "data": rows / DataSpec.ROWS}, trained, ctx)
    lora = trained / TrainSpec.ADAPTER
    project.run_project(
        ProjectSpec(), {"adapter": lora, "base": base, "aligned": aligned}, projected, ctx
    )
    project.run_apply(
        ApplySpec(threshold=config["apply.threshold"]),
        {"adapter": lora, "projection": projected},
        adapter,
        ctx,
    )
    found: Metrics = {}
    for name, measure in SUITES.items():
        generated, scored, kind = out(f"{name}-generated"), out(f"{name}-scored"), measure["kind"]
        generation = GenerateSpec(
            label=LABELS[kind],
            needs_answer=kind == "task",
            max_new_tokens=measure["max_new_tokens"],
            **MODEL,
        )
        generate.run(
            generation,
            {"model": aligned, "prompts": Path(places[name]), "adapter": adapter},
            generated,
            ctx,
        )
        score.run(
            ScoreSpec(measure=kind, scorer=measure.get("scorer", "exact")),
            {"generation": generated},
            scored,
            ctx,
        )
        found |= {
            f"{name}.{metric.name}": [metric.successes, metric.n] for metric in read_metrics(scored)
        }
    rates = {name.partition(".")[2]: successes / n for name, (successes, n) in found.items()}
    return {**rates, "metrics": json.dumps(found)}


SIDES: dict[str, Callable[[Path, Path], dict[str, Metrics]]] = {
    "ebbline": ebbline,
    "Ray Tune + OptunaSearch": ray_tune,
    "ebbline, nothing shared": unshared,
    "Ray Tune + OptunaSearch, a process per trial": partial(
        ray_tune, reuse_actors=False
    ),  # its default; not run unless asked for
}


def measured(
    side: str, study_path: Path, folder: Path
) -> tuple[dict[str, Any], dict[str, Metrics]]:
    """Run one side as a process of its own; its row, and its metrics by point."""
    folder.mkdir()
    load_before, began = os.getloadavg()[0], time.monotonic()
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.bench_search",
        "--side",
        side,
        str(study_path),
        str(folder),
    ]
    subprocess.run(command, check=True, env=os.environ | ENVIRONMENT, stdout=sys.stderr)
    wall_s = time.monotonic() - began
    totals = Counter[str]()
    for path in (folder / "counts").glob("*.json"):
        totals.update(json.loads(path.read_text()))
    points = json.loads((folder / "points.json").read_text())
    names = ("trainings", "training_steps", "projections", "evaluations", "model_loads", "gpu_s")
    row = {
        "side": side,
        "points": len(points),
        "wall_s": wall_s,
        **{name: totals[name] for name in names},
        "load_before": load_before,
    }
    return row, points


def require_equal(found: Mapping[str, Mapping[str, Metrics]]) -> None:
    """Raises RuntimeError, naming a point, unless every side measured the same of every point."""
    (first, expected), *others = found.items()
    for side, points in others:
        differing = sorted(
            point for point in {*expected, *points} if expected.get(point) != points.get(point)
        )
        if differing:
            point = differing[0]
            raise RuntimeError(
                f"{len(differing)} of {len(expected)} points differ between {first} and {side}, as"
                f" {point}: {expected.get(point)} and {points.get(point)}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=200, help="of each training; 200 are the quickstart's"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES)[:3])
    parser.add_argument(
        "--keep",
        type=Path,
        help="where ebbline's finished grid stays, for `bench_search_budget --home`",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="2 x 1 x 3 points on the small organism, to see that it works; writes nothing",
    )
    given = parser.parse_args()
    grid = (RANKS[:2], SIZES[:1], THRESHOLDS[::7]) if given.tiny else (RANKS, SIZES, THRESHOLDS)
    rows, found = list[dict[str, Any]](), dict[str, dict[str, Metrics]]()
    with tempfile.TemporaryDirectory(prefix="bench-search-") as here:
        files = prepared(Path(here) / "prepared", "small" if given.tiny else "medium")
        study_path = Path(here) / "study.yaml"
        study_path.write_text(study_file(files, *grid, given.steps))
        for number, side in enumerate(given.sides):
            row, found[side] = measured(side, study_path, Path(here) / str(number))
            rows.append(row)
            if given.keep is not None and side == "ebbline":
                shutil.copytree(Path(here) / str(number) / "home", given.keep)
            print(f"{side}: {row['wall_s']:.0f} s", file=sys.stderr, flush=True)
            require_equal(found)
            written(rows, given.tiny)


def written(rows: Sequence[Mapping[str, Any]], tiny: bool) -> None:
    """The results so far, so that a benchmark that is cut short is worth what it had done."""
    from tests.benchmarks import (
        record,  # brings torch, which no side's process is to pay for before it starts
    )

    columns = {
        name: (lambda value: f"{value:.1f}" if isinstance(value, float) else str(value))
        for name in rows[0]
    }
    print(record.table(rows, columns), end="\n\n")
    mine = rows[0]
    figures = ("wall_s", "gpu_s", "training_steps", "evaluations", "model_loads")
    ratios = {
        f"{figure} {row['side']} / {mine['side']}": row[figure] / mine[figure]
        for row in rows[1:]
        for figure in figures
    }
    print("\n".join(f"{name}: {value:.3g}" for name, value in ratios.items()))
    if not tiny:
        command = " ".join(["python -m tests.benchmarks.bench_search", *sys.argv[1:]])
        path = record.write(
            "search", command, ("ray", "optuna", "torch", "transformers", "peft"), rows, ratios
        )
        print(f"wrote {path.relative_to(Path.cwd())}")


def one_side(side: str, study_path: Path, folder: Path) -> None:
    points = SIDES[side](study_path, folder)
    (folder / "points.json").write_text(json.dumps(points))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        one_side(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
