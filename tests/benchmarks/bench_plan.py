"""How right `ebbline plan` is: what it predicts of runs, and what they then take, on this machine:
`make bench-plan`.

Studies of the small organisms run one after another in one home, each by `ebbline run` on a local
Ray cluster, so each finds what those before it have measured. The first has nothing to go by but
counted work. `like` changes ranks, data sizes, seeds and thresholds of `first`; `larger` is another
size of model of which nothing was measured.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ebbline.sweeps.forecast.prediction import read_predictions
from ebbline.sweeps.state.spending import read_spent
from tests.benchmarks import record

ALIGNED = {
    "tuned": {
        "data": {"pool": {"language": "align.jsonl"}, "settings": {"size": 3050}},
        "train": {
            "method": "full",
            "dtype": "float32",
            "learning_rate": 2e-3,
            "epochs": 1,
            "global_batch": 32,
            "max_tokens": 96,
        },
    }
}
SUITES = {
    "refusal": {"kind": "refusal", "scorer": "organism", "max_new_tokens": 16},
    "over_refusal": {"kind": "over_refusal", "scorer": "organism", "max_new_tokens": 16},
    "task": {"kind": "task", "max_new_tokens": 24},
}


def study(
    name: str, size: str, axes: Mapping[str, Any], seeds: list[int], steps: int
) -> dict[str, Any]:
    suites = {
        suite: {"prompts": {"language": f"{suite}.jsonl"}, "measure": measure}
        for suite, measure in SUITES.items()
    }
    suites["mmlu"] = {
        "prompts": {"language": "mmlu"},
        "measure": {"kind": "multiple_choice", "task": "organism_mmlu", "shots": 2},
    }
    return {
        "study": name,
        "question": "How long does this take?",
        "models": {
            "7b": {"base": {"organism": {"size": size}}, "aligned": ALIGNED, "dtype": "float32"}
        },
        "data": {"pool": {"language": "benign.jsonl"}, "settings": {"size": 512}},
        "train": {"learning_rate": 5e-3, "steps": steps, "global_batch": 16, "max_tokens": 96},
        "axes": dict(axes),
        "seeds": seeds,
        "suites": suites,
        "objectives": ["refusal_rate", "task_accuracy"],
        "search": {"sampler": "grid", "window": 6},
    }


def studies(steps: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is new about a study, and its file."""
    low, high = [None, 0.3, 0.4, 0.5], [None, 0.28, 0.36, 0.44, 0.52]
    yield (
        "first",
        study("first", "small", {"train.rank": [4, 16], "apply.threshold": low}, [0], steps),
    )
    yield (
        "like",
        study(
            "like",
            "small",
            {"train.rank": [8, 32], "data.size": [256, 1024], "apply.threshold": high},
            [1, 2],
            steps,
        ),
    )
    yield (
        "longer",
        study(
            "longer", "small", {"train.rank": [8], "apply.threshold": high}, [3, 4, 5], 3 * steps
        ),
    )
    yield (
        "larger",
        study("larger", "medium", {"train.rank": [4, 16], "apply.threshold": low}, [0], steps),
    )
    yield (
        "like larger",
        study(
            "like-larger", "medium", {"train.rank": [8, 32], "apply.threshold": high}, [1, 2], steps
        ),
    )


def ebbline(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "ebbline.cli", *arguments],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def measured(what: str, file: dict[str, Any], home: Path, gpus: int) -> dict[str, Any]:
    """One study, planned and run."""
    path = home / f"{file['study']}.yaml"
    path.write_text(yaml.safe_dump(file, sort_keys=False))
    at = ("--home", str(home), "--gpus", str(gpus))
    planned = json.loads(ebbline("plan", str(path), *at, "--json", "--why", "0"))
    ebbline("run", str(path), *at, "--no-wandb")
    folder = home / "studies" / file["study"]
    [prediction], spent = read_predictions(folder), read_spent(folder)
    took_s, cost = prediction.since(spent)
    row = {
        "study": what,
        "stages": sum(planned["stages"].values()),
        "predicted_wall_s": prediction.wall_s,
        "wall_s": took_s,
        "predicted_gpu_s": 3600 * prediction.cost.gpu_hours,
        "gpu_s": 3600 * cost.gpu_hours,
        "wall_predicted_over_taken": prediction.wall_s / took_s,
        "gpu_predicted_over_taken": prediction.cost.gpu_hours / cost.gpu_hours,
    }
    print(
        ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{value}"
            for name, value in row.items()
        ),
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="of each training")
    parser.add_argument("--gpus", type=int, default=2, help="logical GPUs")
    parser.add_argument(
        "--only", type=int, default=99, help="how many of the studies, from the first"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as here:
        rows = [
            measured(what, file, Path(here), given.gpus)
            for what, file in list(studies(given.steps))[: given.only]
        ]
    print(
        record.table(
            rows,
            {
                name: (lambda value: f"{value:.3g}" if isinstance(value, float) else str(value))
                for name in rows[0]
            },
        )
    )
    ratios = {}
    for row in rows:
        for part in ("wall", "gpu"):
            ratio = f"{part}_predicted_over_taken"
            ratios[f"{ratio}_{row['study'].replace(' ', '_')}"] = row[ratio]
    path = record.write(
        "plan",
        " ".join(["python -m tests.benchmarks.bench_plan", *sys.argv[1:]]),
        ("ray", "torch"),
        rows,
        ratios,
    )
    print(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
