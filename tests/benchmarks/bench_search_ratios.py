"""The points of `make bench-search` for three ratios of training to evaluation, on a virtual clock:
`python -m tests.benchmarks.bench_search_ratios`.

ebbline's side is a grid study with the real driver, runner, scheduler and store; only its stages do
not run, but take virtual seconds. Ray Tune's side takes the same trials in order, each on the next
free worker: a load, a training, a projection and an evaluation of every suite. Both take the same
seconds for the same work. Generations that ebbline measures as a group take what
`bench_settings` found; at 7B a group gains nothing here, because the published rates are of full
batches. Neither side is charged for starting processes, for the cluster, for the driver's own work,
or for tables, figures and the report.

The first of the three is the study that `make bench-search` runs for real. So its ratio shows how
far the simulation is from the measurement.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ebbline.cluster.executors.executor import Capacity, Finished, Host, Job, Needs
from ebbline.cluster.schedule.simulate import Step, simulate
from ebbline.cluster.store.artifacts import Store
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study_file import parse
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.defences.gate import ModuleRow, write_rows
from ebbline.tasks.identity import content_digest
from ebbline.tasks.measuring.grouped.requests import in_groups
from ebbline.tasks.specs import GenerateSpec, ProjectSpec, TrainSpec
from ebbline.tasks.stage import Report, Request
from tests.benchmarks import record
from tests.benchmarks.bench_schedule import in_order
from tests.benchmarks.bench_search import RANKS, SIZES, THRESHOLDS
from tests.sweeps.pretended import ROWS, Pretended

WORKERS = (2, 8)
COSINES = (0.25, 0.63)  # of the organisms' adapters
ORGANISM_LOAD_S, ORGANISM_PROJECT_S = 0.3, 0.05  # of the middle organism, measured

# Published rates of a 7B model on one A100 80 GB, tokens a second:
TRAINED = 2340.0  # QLoRA, Int4, rows of 2,048 tokens (the README of Qwen 1.0)
READ = 5273.0  # vLLM with a LoRA adapter of rank 8, prompts and completions together
# Assumptions about tokens
ROW, PROMPT, COMPLETION = 512, 40, 128
COMPLETIONS = {"refusal": 520, "over_refusal": 250}  # AdvBench, XSTest's safe prompts
MMLU, SUBJECTS, MMLU_QUESTION = 14042, 57, 110
HELLASWAG, HELLASWAG_ROW, HELLASWAG_ENDING = 10042, 100, 30
MODEL_S = 13.5  # to read 13.5 GB of weights at 1 GB a second


@dataclass(frozen=True)
class Work:
    """The virtual seconds of one study, whose trainings have `settings`.

    `train_s` has the seconds of a training by its rows, `suites` those of one setting measured
    alone. Each generation beyond the first of a group takes `further` of these. `others` are the
    suites' seconds where a trial measures as lm-eval does by itself.
    """

    name: str
    settings: Mapping[str, int]
    train_s: Mapping[int, float]
    project_s: float
    load_s: float
    suites: Mapping[str, float]
    modules: int
    further: float = 1.0
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean_train_s(self) -> float:
        return sum(self.train_s.values()) / len(self.train_s)

    @property
    def evaluate_s(self) -> float:
        return sum(self.suites.values())


def organism() -> Work:
    """The study of `make bench-search`, by the seconds of its trials' parts on a busy machine."""
    alone_s, group_s = (_settings_s(side) for side in ("one by one", "a group"))
    # 16 settings of a group take what one takes, and 15 times what a further one takes
    further = (16 * group_s / alone_s - 1) / 15
    trial_s = next(
        row["gpu_s"] / row["points"]
        for row in _rows("search")
        if row["side"] == "Ray Tune + OptunaSearch"
    )
    train_s = trial_s - alone_s - ORGANISM_LOAD_S - ORGANISM_PROJECT_S
    return Work(
        "as `make bench-search` is",
        {"steps": 200},
        dict.fromkeys(SIZES, train_s),
        ORGANISM_PROJECT_S,
        ORGANISM_LOAD_S,
        dict.fromkeys(("refusal", "over_refusal", "task"), alone_s / 3),
        modules=28,
        further=further,
    )


def large(name: str, epochs: int, choices: bool) -> Work:
    """A 7B model on A100s, with or without MMLU and HellaSwag beside the completions."""
    suites = {each: n * (PROMPT + COMPLETION) / READ for each, n in COMPLETIONS.items()}
    others = dict(suites)
    if choices:
        # ebbline reads the five shots once a subject, and ten shots once for four endings
        suites["mmlu"] = (MMLU + 5 * SUBJECTS) * MMLU_QUESTION / READ
        others["mmlu"] = MMLU * 6 * MMLU_QUESTION / READ
        shots = 10 * HELLASWAG_ROW + HELLASWAG_ROW - HELLASWAG_ENDING
        suites["hellaswag"] = HELLASWAG * (shots + 4 * HELLASWAG_ENDING) / READ
        others["hellaswag"] = HELLASWAG * 4 * (shots + HELLASWAG_ENDING) / READ
    return Work(
        name,
        {"epochs": epochs},
        {rows: rows * epochs * ROW / TRAINED for rows in SIZES},
        project_s=2 * MODEL_S,
        load_s=MODEL_S,
        suites=suites,
        modules=224,
        others=others if choices else {},
    )


def _settings_s(side: str) -> float:
    return next(
        float(row["cpu_s_per_setting"])
        for row in _rows("settings")
        if row["side"] == side and row["settings"].endswith("nf4")
    )


def _rows(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((record.RESULTS / f"{name}.json").read_text())["rows"]
    return rows


# ebbline's side


class Virtual(Pretended):
    """A cluster of one host on a virtual clock, whose stages take the seconds of `work`.

    A job loads the model once if a stage of it needs one. Generations of a job are measured in the
    groups in which a worker measures them.
    """

    own_processes = True  # so the scheduler batches as it does on a cluster

    def __init__(self, store: Store, work: Work, workers: int) -> None:
        super().__init__(store, workers, lambda request: self.seconds[request.key])
        self.work, self.seconds = work, dict[str, float]()
        self.held_s, self.counts = 0.0, dict[str, int]()
        self.reports: dict[str, list[Report]] = {}  # of stages whose job still runs

    def submit(self, batch: Sequence[Request], needs: Needs, hosts: Mapping[str, int]) -> Job:
        seconds = {request.key: self._alone(request) for request in batch}
        waiting = [[[request] for request in batch], []]
        for members in in_groups(lambda: waiting.pop(0) if len(waiting) > 1 else []):
            for number, request in enumerate(members):
                if number > 0:
                    seconds[request.key] *= self.work.further
        if any(request.kind in (TrainSpec.KIND, GenerateSpec.KIND) for request in batch):
            seconds[batch[0].key] += self.work.load_s
        self.seconds |= seconds
        self.held_s += needs.gpus * sum(seconds.values())
        for request in batch:
            self.counts[request.kind] = self.counts.get(request.kind, 0) + 1
        return super().submit(batch, needs, hosts)

    def finished(self, timeout_s: float) -> Sequence[Finished]:
        """The jobs that ended with the next stages. These are committed now, as a worker does, so
        that stages behind them can start while their job still runs.
        """
        for _, key in self.advance():
            self.reports[key] = self.commit(key)
        done, self._finished = self._finished, []
        return [
            Finished(each.job, tuple(itertools.chain(*map(self.reports.pop, each.job.keys))))
            for each in done
        ]

    def _alone(self, request: Request) -> float:
        match request.kind:
            case TrainSpec.KIND:
                rows = int((Path(request.inputs["data"])).read_text())
                return self.work.train_s[rows]
            case ProjectSpec.KIND:
                return self.work.project_s
            case GenerateSpec.KIND:
                return self.work.suites[Path(request.inputs["prompts"]).stem]
            case _:
                return 0.0

    def write(self, request: Request, out: Path) -> None:
        if request.kind != ProjectSpec.KIND:
            super().write(request, out)
            return
        rng = np.random.default_rng(int(request.key[:8], 16))
        cosines = rng.uniform(*COSINES, self.work.modules)
        write_rows(
            {
                f"layers.{number}.q_proj": ModuleRow(round(float(cosine), 5), 1.0)
                for number, cosine in enumerate(cosines)
            },
            out / ProjectSpec.COSINES,
        )

    def provenance(self, request: Request) -> dict[str, Any]:
        seconds = self.seconds.get(request.key, 0.0)
        return super().provenance(request) | {"seconds": seconds, "load": request.load}


def study_file(folder: Path, work: Work) -> Path:
    texts = {"base": "base", "aligned": "aligned", "pool.jsonl": json.dumps(ROWS["pool.jsonl"])}
    for suite in work.suites:  # equal prompts would be measured once
        texts[f"{suite}.jsonl"] = json.dumps({**ROWS["prompts.jsonl"], "prompt": suite})
    for name, text in texts.items():
        (folder / name).write_text(text)

    def pinned(name: str) -> dict[str, Any]:
        return {"path": {"path": str(folder / name), "sha256": content_digest(folder / name)}}

    study = {
        "study": "same-points",
        "question": "How long do the same points take?",
        "models": {"7b": {"base": pinned("base"), "aligned": pinned("aligned")}},
        "data": {"pool": pinned("pool.jsonl"), "settings": {"size": max(SIZES)}},
        "train": dict(work.settings),
        "axes": {
            "train.rank": list(RANKS),
            "data.size": list(SIZES),
            "apply.threshold": list(THRESHOLDS),
        },
        "suites": {
            name: {
                "prompts": pinned(f"{name}.jsonl"),
                "measure": {"kind": "refusal" if name == "refusal" else "task"},
            }
            for name in work.suites
        },
        "objectives": ["refusal.refusal_rate", f"{list(work.suites)[-1]}.task_accuracy"],
        "search": {"sampler": "grid", "window": len(RANKS) * len(SIZES) * len(THRESHOLDS)},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def ebbline(work: Work, workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path, home = study_file(Path(folder), work), Home(Path(folder) / "home")
        made: list[Virtual] = []

        def executor() -> Virtual:
            made.append(Virtual(home.store, work, workers))
            return made[-1]

        progress = drive(StudyView(parse(path), home), executor)
        wrong = [result for result in progress.results if result.status != "done"]
        if wrong:
            raise RuntimeError(f"{len(wrong)} points are not done, as {wrong[0]}")
        (virtual,) = made
        return {
            "points": progress.completed,
            "wall_s": virtual.now_s,
            "worker_s": virtual.held_s,
            "trainings": virtual.counts[TrainSpec.KIND],
            "evaluations": virtual.counts[GenerateSpec.KIND],
        }


# Ray Tune's side


def ray_tune(work: Work, workers: int, suites: Mapping[str, float]) -> dict[str, Any]:
    trials = [
        work.load_s + work.train_s[rows] + work.project_s + sum(suites.values())
        for _ in RANKS
        for rows in SIZES
        for _ in THRESHOLDS
    ]
    steps = [
        Step(f"{number:03}", Needs(1), "7b", seconds, seconds)
        for number, seconds in enumerate(trials)
    ]
    trace = simulate(steps, Capacity((Host("here", workers, workers),)), in_order(most_pending=1))
    return {
        "points": len(trials),
        "wall_s": trace.makespan_s,
        "worker_s": sum(trials),
        "trainings": len(trials),
        "evaluations": len(trials) * len(suites),
    }


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    works = (
        organism(),
        large("7B, ten epochs, completions only", epochs=10, choices=False),
        large("7B, three epochs, completions, MMLU and HellaSwag", epochs=3, choices=True),
    )
    for work in works:
        for workers in WORKERS:
            mine = ebbline(work, workers)
            sides = {"ebbline": mine, "Ray Tune": ray_tune(work, workers, work.suites)}
            if work.others:
                sides["Ray Tune, lm-eval by itself"] = ray_tune(work, workers, work.others)
            for side, found in sides.items():
                over = {name: found[name] / mine[name] for name in ("wall_s", "worker_s")}
                rows.append(
                    {
                        "study": work.name,
                        "T/E": work.mean_train_s / work.evaluate_s,
                        "workers": workers,
                        "side": side,
                        **found,
                        "wall_over_ebbline": over["wall_s"],
                        "worker_over_ebbline": over["worker_s"],
                    }
                )
                if side != "ebbline":
                    name = f"{side} / ebbline, {work.name}, {workers} workers"
                    ratios |= {f"{each} {name}": value for each, value in over.items()}
    columns = {
        name: (lambda value: f"{value:.3g}" if isinstance(value, float) else str(value))
        for name in rows[0]
    }
    print(record.table(rows, columns), end="\n\n")
    measured = json.loads((record.RESULTS / "search.json").read_text())["ratios"]
    for name, value in measured.items():
        if name.startswith(("wall_s Ray Tune + OptunaSearch /", "gpu_s Ray Tune + OptunaSearch /")):
            print(f"measured, {name}: {value}")
            ratios[f"measured {name}"] = value
    command = " ".join(["python -m tests.benchmarks.bench_search_ratios", *sys.argv[1:]])
    path = record.write("search_ratios", command, (), rows, ratios)
    print(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
