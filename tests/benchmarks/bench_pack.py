"""make bench-pack: eight adapters trained as one pack, against one after another on a base that
stays loaded.

Two models (the largest organism, SmolLM2-135M), ranks 4 to 64, the same rows and steps on both
sides, each side a process of its own. "One after another" is ebbline's own engine on a resident
base: what a batch of separate stages does. Time is that of the steps, without loading. Writes
tests/benchmarks/results/pack.json. `make gpu-check` measures a 7B-shaped model on a GPU with the
same sides (tests.benchmarks.gpu_parts).

    python -m tests.benchmarks.bench_pack [--models 70b 135m] [--steps 4] [--runs 3]
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.benchmarks import record

RANKS = (4, 8, 8, 16, 16, 32, 32, 64)
ADAPTERS = len(RANKS)
# Model -> quantisations, rows of a step, tokens of a row. The organism's rows are as long as its
# chats, SmolLM2's short enough for 2 cores.
WORK: dict[str, tuple[tuple[str, ...], int, int]] = {
    "70b": (("none", "nf4"), 8, 32),
    "135m": (("none", "nf4"), 2, 64),
}


def prepare(folder: Path, model: str) -> Path:
    """The folder of a model with its tokenizer; made where it is not there."""
    from tests.benchmarks.bench_evaluate import made as found

    return found(folder / model, model)[0]


def batches(
    rows: int, tokens: int, adapters: int, steps: int, vocabulary: int
) -> list[list[list[Any]]]:
    """Rows by step and adapter: random tokens of the full length, all learnt. Each adapter has rows
    of its own.
    """
    from ebbline.tasks.data.batches import Row

    rng = random.Random(0)

    def row() -> Row:
        ids = [rng.randrange(10, vocabulary) for _ in range(tokens)]
        return Row(ids, ids)

    return [[[row() for _ in range(rows)] for _ in range(adapters)] for _ in range(steps)]


def settings(
    rows: int, tokens: int, adapters: int, quantisation: str, dtype: str = "float32"
) -> list[Any]:
    from ebbline.tasks.specs import TrainSpec

    ranks = [RANKS[number % len(RANKS)] for number in range(adapters)]
    return [
        TrainSpec(
            rank=rank,
            seed=number,
            learning_rate=1e-4 * (1 + number),
            quantisation=quantisation,
            global_batch=rows,
            max_tokens=tokens,
            dtype=dtype,
        )
        for number, rank in enumerate(ranks)
    ]


def packed(
    folder: Path, ctx: Any, specs: Sequence[Any], work: Sequence[Sequence[Any]]
) -> tuple[float, list[float]]:
    """(seconds of the steps, the last loss of each adapter). `ctx` has residents."""
    from ebbline.tasks.training.pack_engine import Member, Pack

    members = [Member(spec, folder, ctx) for spec in specs]
    engine = Pack(members, folder)
    for count, step in enumerate(work):
        if count == 1:  # the first is not timed: it sets up kernels and buffers
            started = now()
        losses = engine.backward(dict(zip(members, step, strict=True)))
        for member in members:
            engine.trainees[member.name].update(member.spec.learning_rate)
    seconds = now() - started
    engine.close()
    return seconds, [losses[member] for member in members]


def one_by_one(
    folder: Path, ctx: Any, specs: Sequence[Any], work: Sequence[Sequence[Any]]
) -> tuple[float, list[float]]:
    from ebbline.tasks.training.engines import SingleDevice

    losses, seconds = [], 0.0
    for number, spec in enumerate(specs):
        engine = SingleDevice(spec, folder, ctx)
        for count, step in enumerate(work):
            if count == 1:
                started = now()
            loss = engine.step(step[number], spec.learning_rate).loss
        seconds += now() - started
        losses.append(loss)
        engine.close()
    return seconds, losses


SIDES = {"packed": packed, "one after another": one_by_one}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def part(given: argparse.Namespace) -> dict[str, Any]:
    """One side in this process, with the numbers that it is compared by."""
    from ebbline.tasks.models.loading import Residents
    from ebbline.tasks.stage import Context

    _, rows, tokens = WORK[given.models[0]]
    vocabulary = json.loads((given.folder / "config.json").read_text())["vocab_size"]
    specs = settings(rows, tokens, given.adapters, given.quantisation)
    work = batches(rows, tokens, given.adapters, given.steps + 1, vocabulary)
    ctx = Context(given.folder, given.folder / "scratch", residents=Residents())
    seconds, losses = SIDES[given.part](given.folder, ctx, specs, work)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return {"seconds": seconds, "losses": losses, "peak_memory_gb": round(peak, 3)}


def compared(model: str, folder: Path, steps: int, runs: int) -> Iterator[dict[str, Any]]:
    quantisations, _, _ = WORK[model]
    weights = prepare(folder, model)
    for quantisation in quantisations:
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(runs):
            for name in SIDES:
                command = [
                    sys.executable,
                    "-m",
                    "tests.benchmarks.bench_pack",
                    "--part",
                    name,
                    "--folder",
                    str(weights),
                ]
                options = {
                    "models": model,
                    "quantisation": quantisation,
                    "adapters": ADAPTERS,
                    "steps": steps,
                }
                command += [
                    word
                    for option, value in options.items()
                    for word in (f"--{option}", str(value))
                ]
                done = subprocess.run(
                    command,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                    env=os.environ | {"HF_HUB_OFFLINE": "1"},
                )
                found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
                print(
                    f"{model} {quantisation} {ADAPTERS} {name}: {found[name][-1]['seconds']:.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
        yield from (row(model, quantisation, ADAPTERS, steps, name, found) for name in found)


def row(
    model: str,
    quantisation: str,
    adapters: int,
    steps: int,
    name: str,
    found: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    _, rows, tokens = WORK[model]
    times = [run["seconds"] for run in found[name]]
    apart = [
        abs(one - other) / other
        for one, other in zip(
            found[name][-1]["losses"], found["one after another"][-1]["losses"], strict=True
        )
    ]
    return {
        "model": model,
        "quantisation": quantisation,
        "adapters": adapters,
        "side": name,
        "seconds": median(times),
        "spread": record.spread(times),
        "steps_per_s": adapters * steps / median(times),
        "tokens_per_s": adapters * steps * rows * tokens / median(times),
        "peak_memory_gb": max(run["peak_memory_gb"] for run in found[name]),
        "largest_loss_difference": max(apart),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=WORK,
        default=["70b", "135m"],
        help="70b: the largest organism; 135m: SmolLM2",
    )
    parser.add_argument(
        "--folder", type=Path, help="where models are made (default: a temporary folder)"
    )
    parser.add_argument(
        "--steps", type=int, default=4, help="timed steps of each adapter, after one that is not"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--part",
        choices=SIDES,
        help="run one side in this process and print what it found (what each side starts)",
    )
    parser.add_argument("--quantisation", default="none")
    parser.add_argument("--adapters", type=int, default=ADAPTERS)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(part(given)))
        return
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as made:
        for model in given.models:
            rows += compared(model, given.folder or Path(made), given.steps, given.runs)
    ratios = {}
    for each in rows:
        if each["side"] == "packed":
            like = [
                other
                for other in rows
                if all(other[name] == each[name] for name in ("model", "quantisation", "adapters"))
            ]
            for other in like:
                if other is not each:
                    packed = f"{each['model']}_{each['quantisation']}_{each['adapters']}_adapters"
                    name = f"time_one_by_one_over_packed_{packed}"
                    ratios[name] = other["seconds"] / each["seconds"]
    shown = {
        name: (lambda value: f"{value:.3g}" if isinstance(value, float) else str(value))
        for name in rows[0]
    }
    print(record.table(rows, shown), end="\n\n")
    path = record.write(
        "pack",
        f"make bench-pack (steps {given.steps}, runs {given.runs})",
        ("torch", "transformers", "peft", "bitsandbytes"),
        rows,
        ratios,
    )
    print(f"wrote {path.relative_to(Path.cwd())}: {ratios}")


if __name__ == "__main__":
    main()
