"""16 thresholds of one adapter, measured by three suites as a group and one by one: part of
`make bench-evaluate`.

The middle organism, the adapter of one training and the suites are those of `bench_search`. Both
sides run in this process on a model that is already loaded, so only measuring is timed: CPU
seconds, which other work on the machine hardly changes. The artifacts of both sides must have equal
bytes, or the benchmark fails.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaForCausalLM

from ebbline.tasks.data import conversations
from ebbline.tasks.defences import project
from ebbline.tasks.measuring import generate
from ebbline.tasks.measuring.grouped import generations
from ebbline.tasks.models.loading import Residents
from ebbline.tasks.specs import ApplySpec, DataSpec, GenerateSpec, ProjectSpec, TrainSpec
from ebbline.tasks.stage import Context
from ebbline.tasks.training import train
from tests.benchmarks import record
from tests.benchmarks.bench_search import LABELS, MODEL, SUITES, THRESHOLDS, TRAIN, prepared

QUANTISATIONS = ("nf4", "none")
Side = Callable[[Sequence[generations.Member]], None]


def settings(folder: Path) -> dict[str, Path]:
    """The model, the prompts and the adapter at each threshold, as files."""
    files = prepared(folder / "prepared", "medium")
    made = {name: folder / name for name in ("rows", "trained", "projected")}
    for each in made.values():
        each.mkdir()
    ctx = Context(log=folder, scratch=folder / "scratch", residents=Residents())
    conversations.run(DataSpec(size=256), {"pool": files["benign"]}, made["rows"], ctx)
    spec = TrainSpec(rank=16, steps=200, **TRAIN, **MODEL)
    data = made["rows"] / DataSpec.ROWS
    train.run(spec, {"model": files["aligned"], "data": data}, made["trained"], ctx)
    adapter = made["trained"] / TrainSpec.ADAPTER
    models = {name: files[name] for name in ("base", "aligned")}
    project.run_project(ProjectSpec(), {"adapter": adapter, **models}, made["projected"], ctx)
    for threshold in THRESHOLDS:
        out = folder / f"apply-{threshold}"
        out.mkdir()
        inputs = {"adapter": adapter, "projection": made["projected"]}
        project.run_apply(ApplySpec(threshold=threshold), inputs, out, ctx)
    return files


def members(
    folder: Path, files: dict[str, Path], out: Path, residents: Residents, quantisation: str
) -> list[generations.Member]:
    """A generation for each threshold and suite."""
    found = []
    for threshold in THRESHOLDS:
        for suite, measure in SUITES.items():
            spec = GenerateSpec(
                label=LABELS[measure["kind"]],
                needs_answer=measure["kind"] == "task",
                max_new_tokens=measure["max_new_tokens"],
                dtype="float32",
                quantisation=quantisation,
            )
            place = out / f"{threshold}-{suite}"
            place.mkdir(parents=True)
            inputs = {
                "model": files["aligned"],
                "prompts": files[suite],
                "adapter": folder / f"apply-{threshold}",
            }
            ctx = Context(log=out, scratch=out / "scratch", residents=residents)
            found.append(generations.Member(spec, inputs, place, ctx))
    return found


def grouped(asked: Sequence[generations.Member]) -> None:
    if len(list(generations.run(asked))) != len(asked):
        raise RuntimeError("not every setting could be measured in a group")


def one_by_one(asked: Sequence[generations.Member]) -> None:
    for member in asked:
        generate.run(member.spec, member.inputs, member.out, member.ctx)


SIDES: dict[str, Side] = {"a group": grouped, "one by one": one_by_one}


def measured(folder: Path, files: dict[str, Path], quantisation: str, runs: int) -> list[Any]:
    """A row for each side."""
    residents, times = Residents(), {side: list[float]() for side in SIDES}
    residents.model(files["aligned"], quantisation, "float32", "cpu")
    passes = dict.fromkeys(SIDES, 0)
    for run in range(runs):
        artifacts = {}
        for side, function in SIDES.items():
            out = folder / f"out-{quantisation}-{run}-{side}"
            asked = members(folder, files, out, residents, quantisation)
            with counted(passes, side):
                began = time.process_time()
                function(asked)
                times[side].append(time.process_time() - began)
            artifacts[side] = {
                (member.out.name, path.name): path.read_bytes()
                for member in asked
                for path in member.out.iterdir()
            }
        if artifacts["a group"] != artifacts["one by one"]:
            raise RuntimeError("the sides wrote other bytes")
    return [
        {
            "settings": f"{len(THRESHOLDS)} thresholds, {quantisation}",
            "side": side,
            "cpu_s_per_setting": statistics.median(times[side]) / len(THRESHOLDS),
            "spread": record.spread(times[side]),
            "forward_passes": passes[side] // runs,
        }
        for side in SIDES
    ]


@contextmanager
def counted(passes: dict[str, int], side: str) -> Iterator[None]:
    """Count the model's forward passes."""
    forward = LlamaForCausalLM.forward

    @wraps(forward)
    def counting(*arguments: Any, **named: Any) -> Any:
        passes[side] += 1
        return forward(*arguments, **named)

    with patch.object(LlamaForCausalLM, "forward", counting):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Any] = []
    with TemporaryDirectory(prefix="bench-settings-") as here:
        files = settings(Path(here))
        for quantisation in QUANTISATIONS:
            rows += measured(Path(here), files, quantisation, given.runs)
    columns: dict[str, Callable[[Any], str]] = {
        name: (lambda value: f"{value:.3f}" if isinstance(value, float) else str(value))
        for name in rows[0]
    }
    print(record.table(rows, columns), end="\n\n")
    ratios = {
        f"cpu_s one by one / a group, {alone['settings']}": alone["cpu_s_per_setting"]
        / together["cpu_s_per_setting"]
        for together, alone in zip(rows[::2], rows[1::2], strict=True)
    }
    print("\n".join(f"{name}: {value:.3g}" for name, value in ratios.items()))
    command = " ".join(["python -m tests.benchmarks.bench_settings", *sys.argv[1:]])
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    path = record.write("settings", command, packages, rows, ratios)
    print(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
