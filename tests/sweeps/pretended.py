"""A cluster on a virtual clock that runs no stage: each stage commits a few bytes that depend on
its settings.

Driver, search, runner, scheduler and store are real. A test can set the order in which stages end.
"""

import hashlib
import json
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ebbline.cluster.executors.executor import Capacity, Finished, Host, Job, Needs
from ebbline.cluster.schedule.simulate import SimulatedExecutor
from ebbline.cluster.store.artifacts import Store
from ebbline.cluster.store.follow_ups import requests_after
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.controls.registry import control_named
from ebbline.tasks.defences.gate import ModuleRow, chosen, read_rows, write_rows
from ebbline.tasks.defences.methods.registry import method_named
from ebbline.tasks.identity import content_digest
from ebbline.tasks.kinds import parsed_spec, request_payload
from ebbline.tasks.measuring.metrics import Metric, write_metrics, write_samples
from ebbline.tasks.specs import (
    AdapterSpec,
    ApplySpec,
    DataSpec,
    DefendSpec,
    GenerateSpec,
    LanguageSpec,
    MeasureSpec,
    OrganismSpec,
    ProjectSpec,
    ScoreSpec,
    TrainSpec,
)
from ebbline.tasks.stage import Report, Request
from tests.sweeps.made import study

RANKS = {"train.rank": [2, 4], "apply.threshold": [None, 0.2, 0.4]}

MODULES = tuple(f"layers.{layer}.q_proj" for layer in range(6))
ITEMS = 2000
LANGUAGE = (
    "align.jsonl",
    "benign.jsonl",
    "refusal.jsonl",
    "task.jsonl",
)  # files of the invented language that test studies name


class Pretended(SimulatedExecutor):
    """`seconds` gives the duration of a request on the virtual clock; `fails` gives the error and
    its type for a request that fails.
    """

    def __init__(
        self,
        store: Store,
        gpus: int = 8,
        seconds: Callable[[Request], float] = lambda request: 10.0,
        fails: Callable[[Request], tuple[str, str] | None] = lambda request: None,
        ended: Callable[[int], None] = lambda committed: None,
    ) -> None:
        super().__init__(
            Capacity((Host("here", gpus, 8),)), lambda key: seconds(self.requests[key])
        )
        self._committed, self._fails, self._ended = 0, fails, ended
        self._store, self.requests = store, dict[str, Request]()
        self.most_at_work = 0

    def submit(self, batch: Sequence[Request], needs: Needs, hosts: Mapping[str, int]) -> Job:
        self.requests |= {request.key: request for request in batch}
        return super().submit(batch, needs, hosts)

    def finished(self, timeout_s: float) -> Sequence[Finished]:
        return [self._end(each) for each in super().finished(math.inf)]

    def _end(self, finished: Finished) -> Finished:
        reports = [report for key in finished.job.keys for report in self.commit(key)]
        return Finished(finished.job, tuple(reports), finished.lost)

    def commit(self, key: str) -> list[Report]:
        """Write and commit what a stage makes, and the stages that follow it in its batch."""
        reports, keys = [], deque([key])
        while keys:
            key = keys.popleft()
            request = self.requests[key]
            fault = self._fails(request)
            if fault is not None:
                reports.append(Report(key, 1.0, error=fault[0], error_type=fault[1]))
                continue
            out = Path(request.out)
            self.write(request, out)
            provenance = self.provenance(request)
            made = self._store.commit(out.parent, request_payload(request), provenance)
            added = {each.key: each for each in requests_after(request, made)}
            self.requests |= added
            keys.extendleft(reversed(added))
            self._committed += 1
            self._ended(self._committed)
        return reports

    def write(self, request: Request, out: Path) -> None:
        """Write the files of a stage."""
        pretend(request, out)

    def provenance(self, request: Request) -> dict[str, Any]:
        """What the record of a stage says about how it ran."""
        return {
            "seconds": 10.0,
            "gpus": request.gpus,
            "gpu_type": None,
            "device": "simulated",
            "host": "here",
        }


def pretend(request: Request, out: Path) -> None:
    """Write the files of a stage that other code reads. A larger adapter learns more and refuses
    less.
    """
    spec, inputs = (
        parsed_spec(request),
        {name: Path(path) for name, path in request.inputs.items()},
    )
    match spec:
        case LanguageSpec():
            for name in LANGUAGE:
                (out / name).write_text(name)
        case OrganismSpec() | TrainSpec(method="full"):
            (out / spec.MODEL).mkdir()
            (out / spec.MODEL / "weights").write_text(request.key)
        case DataSpec():
            (out / spec.ROWS).write_text(f"{spec.size}\n")
        case TrainSpec():
            (out / spec.ADAPTER).mkdir()
            strength = (
                math.log2(spec.rank + 1) / 8 * math.log2(int(inputs["data"].read_text()) + 1) / 8
            )
            (out / spec.ADAPTER / "adapter").write_text(
                json.dumps({"key": request.key, "strength": strength, "seed": spec.seed})
            )
        case AdapterSpec():
            (out / spec.ADAPTER).mkdir()
            (out / spec.ADAPTER / "adapter").write_text(
                json.dumps({"key": request.contents["source"], "strength": 0.6, "seed": 0})
            )
        case ProjectSpec() | MeasureSpec():
            rng = random.Random(inputs["adapter"].joinpath("adapter").read_text())
            write_rows(
                {name: ModuleRow(round(rng.uniform(0.1, 0.8), 4), 1.0) for name in MODULES},
                out / spec.COSINES,
            )
        case ApplySpec():
            rows = read_rows(inputs["projection"] / ProjectSpec.COSINES)
            projected = chosen(rows, spec.threshold, spec.modules)
            adapter = json.loads((inputs["adapter"] / "adapter").read_text())
            (out / "adapter").write_text(
                json.dumps(
                    {**adapter, "share": len(projected) / len(rows), "taken": sorted(projected)}
                )
            )
            (out / spec.CHOSEN).write_text(json.dumps(sorted(projected)))
        case DefendSpec():
            rows = read_rows(inputs["measurement"] / ProjectSpec.COSINES)
            method = method_named(spec.method)
            taken = method.chosen(rows, spec.knobs)
            if spec.control is not None:
                taken = control_named(spec.control).chosen(taken, rows, spec.draw or 0)
            adapter = json.loads((inputs["adapter"] / "adapter").read_text())
            share = len(taken) / len(MODULES) * method.strength(spec.knobs)
            (out / spec.ADAPTER).mkdir()
            (out / spec.ADAPTER / "adapter").write_text(
                json.dumps({**adapter, "share": share, "taken": sorted(taken)})
            )
            (out / spec.ADAPTER / spec.CHOSEN).write_text(json.dumps(sorted(taken)))
            (out / spec.EFFECTS).write_text("{}")
        case GenerateSpec():
            adapter = inputs.get("adapter")
            adapter_state = (
                json.loads((adapter / "adapter").read_text())
                if adapter
                else {"key": "", "strength": 0.0, "share": 0.0}
            )
            (out / spec.COMPLETIONS).write_text(
                json.dumps({**adapter_state, "what": inputs["prompts"].name})
            )
            (out / spec.PROMPTS).write_text(
                json.dumps({"format": "rows", "rows": ITEMS, "asked": ITEMS, "sha256": "0" * 64})
            )
        case ScoreSpec():
            completions = json.loads((inputs["generation"] / GenerateSpec.COMPLETIONS).read_text())
            left = completions["strength"] * (1 - completions["share"]) ** 0.5
            rate = 1 - left**2 if spec.measure == "refusal" else left
            noise = (
                int(
                    hashlib.sha256(json.dumps([completions, spec.measure]).encode()).hexdigest()[
                        :4
                    ],
                    16,
                )
                / 65536
                - 0.5
            )
            right = min(ITEMS, max(0, round(ITEMS * (rate + 0.02 * noise))))
            write_metrics(
                out,
                [
                    Metric(
                        "refusal_rate" if spec.measure == "refusal" else "task_accuracy",
                        right,
                        ITEMS,
                    )
                ],
            )
            write_samples(out, [])
        case _:
            raise TypeError(f"nothing is pretended for {request.kind}")


ROWS = {
    "pool.jsonl": {"instruction": "How is the marsh today?", "output": "Calm and green."},
    "prompts.jsonl": {"prompt": "How is the marsh today?", "answer": "calm"},
}


def changes(folder: Path, **others: Any) -> dict[str, Any]:
    """Changes that make tests.sweeps.made.WHOLE a study of two sizes with placeholder files as
    models and data.
    """
    named = {}
    for name in ("base", "aligned", "large-base", "large-aligned", "pool.jsonl", "prompts.jsonl"):
        (folder / name).write_text(json.dumps(ROWS[name]) if name in ROWS else name)
        named[name] = {
            "path": {"path": str(folder / name), "sha256": content_digest(folder / name)}
        }
    return {
        "models": {
            "7b": {"base": named["base"], "aligned": named["aligned"]},
            "70b": {
                "base": named["large-base"],
                "aligned": named["large-aligned"],
                "gpus": 4,
                "axes": {"train.rank": [8]},
            },
        },
        "data": {"pool": named["pool.jsonl"], "settings": {"size": 16}},
        "train": {"global_batch": 8},
        "suites": {
            name: {"prompts": named["prompts.jsonl"], "measure": {"kind": name}}
            for name in ("refusal", "task")
        },
        **others,
    }


def small(folder: Path, **others: Any) -> Study:
    """The same study without its largest size, by default as a grid over RANKS."""
    plain = changes(folder, **{"axes": RANKS, "search": {"sampler": "grid"}, **others})
    plain["models"].pop("70b")
    return study(folder, plain)
