"""Safe LoRA against the plain definition, on modules in memory and on whole adapters from the disk:
`make bench-project`.

Baseline: the formula as the public implementation computes it, in float32: V = W_aligned - W_base,
C = V V^T / ||V||_F formed, C (B A) formed, and the cosine of the two flattened d_out x d_in
matrices. It is given float32 weights and products of the same library on the same threads, and
forms C once for all adapters. Floor: one read of both weights.

Every measurement is a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ebbline.commands.project import project as project_adapters
from ebbline.tasks.defences.projectors import Update, Workspace, alignment_basis, gate, project
from ebbline.tasks.headers.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ebbline.tasks.models.weights import Checkpoint
from tests.benchmarks import record

SHAPES = ((1024, 1024), (4096, 4096), (11008, 4096), (28672, 8192))
REPEATS = 5
GIB = 1024**3
LLAMA_7B = {"hidden": 4096, "key_value": 4096, "intermediate": 11008, "layers": 32}
LLAMA_70B = {"hidden": 8192, "key_value": 1024, "intermediate": 28672, "layers": 80}


def weights(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(base, aligned): random weights, and the same moved by a hundredth of their size."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(rows, columns, generator=generator).to(dtype)
    return base, torch.randn(rows, columns, generator=generator).mul_(0.01).add_(base).to(dtype)


def updates(rows: int, columns: int, rank: int, adapters: int) -> list[Update]:
    generator = torch.Generator().manual_seed(1)
    return [
        Update(
            torch.randn(rank, columns, generator=generator),
            torch.randn(rows, rank, generator=generator),
        )
        for _ in range(adapters)
    ]


def by_definition(
    base: torch.Tensor, aligned: torch.Tensor, own: Sequence[Update]
) -> tuple[list[float], float, float]:
    """The baseline: (cosines, seconds to form C, seconds an adapter)."""
    started = time.perf_counter()
    v = aligned - base
    c = v @ v.T / torch.linalg.matrix_norm(v)
    formed = time.perf_counter() - started
    cosines = []
    for update in own:
        before = update.lora_B_OR @ update.lora_A_RI
        after = c @ before
        cosines.append(
            float(torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), dim=0))
        )
    return cosines, formed, (time.perf_counter() - started - formed) / len(own)


def exact_cosine(base: torch.Tensor, aligned: torch.Tensor, update: Update) -> float:
    """The truth to compare with: V, C B and the Gram matrices in float64."""
    v = aligned.double() - base.double()
    b = update.lora_B_OR.double()
    cosine, _ = gate(v @ (v.T @ b) / torch.linalg.vector_norm(v), b, update.lora_A_RI)
    assert cosine is not None
    return cosine


def timed(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each run, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times


@contextmanager
def peak_memory(row: dict[str, Any]) -> Iterator[None]:
    """Adds the process's peak resident memory over the block, less what was resident before it."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    yield
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    row["extra_memory_gb"] = round((peak - before) / GIB, 3)
    row["peak_memory_gb"] = round(peak / GIB, 3)


def touch(tensors: Sequence[torch.Tensor]) -> None:
    """Reads every byte once, as fast as this library can."""
    for tensor in tensors:
        tensor.view(-1).view(torch.int64).sum()


def measure_module(case: Mapping[str, Any]) -> dict[str, Any]:
    """One side on one module in memory."""
    rows, columns, rank, adapters = case["rows"], case["columns"], case["rank"], case["adapters"]
    torch.set_num_threads(case["threads"])
    base, aligned = weights(rows, columns, torch.float32)
    own, row = updates(rows, columns, rank, adapters), dict(case)
    with peak_memory(row):
        if case["side"] == "reference":
            cosines, formed, each = by_definition(base, aligned, own)
            row |= {
                "seconds": formed + adapters * each,
                "to_form_C_s": formed,
                "each_adapter_s": each,
                "cosine": cosines[0],
            }
        elif case["side"] == "floor":
            row |= _median(timed(lambda: touch((base, aligned)), REPEATS))
        else:
            space = Workspace()
            row |= _median(timed(lambda: project("module", base, aligned, own, space), REPEATS))
    if case["side"] == "ebbline":
        row["cosine"] = project("module", base, aligned, own)[0].cosine
        row["exact_cosine"] = exact_cosine(base, aligned, own[0])
    return row


def _median(times_s: Sequence[float]) -> dict[str, Any]:
    return {"seconds": statistics.median(times_s), "spread": record.spread(times_s)}


def measure_basis(case: Mapping[str, Any]) -> dict[str, Any]:
    """The exact projector's factorisation of one module: ours, or the whole singular value
    decomposition in float32.
    """
    torch.set_num_threads(case["threads"])
    base, aligned = weights(case["rows"], case["columns"], torch.float32)
    row, started = dict(case), time.perf_counter()
    with peak_memory(row):
        if case["side"] == "reference":
            torch.linalg.svd(aligned - base, full_matrices=False)
        else:
            row["columns_kept"] = alignment_basis("module", base, aligned, 0.9).shape[1]
    return row | {"seconds": time.perf_counter() - started}


def projections_of(shape: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """The seven projections of a Llama layer: name -> (d_out, d_in)."""
    hidden, key_value, intermediate = shape["hidden"], shape["key_value"], shape["intermediate"]
    attention = {
        "q_proj": (hidden, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, hidden),
    }
    mlp = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return {f"self_attn.{name}": size for name, size in attention.items()} | {
        f"mlp.{name}": size for name, size in mlp.items()
    }


def write_models(folder: Path, shape: Mapping[str, int], layers: int) -> None:
    """FOLDER/base and FOLDER/aligned in bfloat16, a shard a layer."""
    for name in ("base", "aligned"):
        (folder / name).mkdir(parents=True)
    index = {}
    for layer in range(layers):
        shards: dict[str, dict[str, torch.Tensor]] = {"base": {}, "aligned": {}}
        for module, size in projections_of(shape).items():
            tensor = f"model.layers.{layer}.{module}.weight"
            shards["base"][tensor], shards["aligned"][tensor] = weights(*size, torch.bfloat16)
            index[tensor] = f"layer-{layer}.safetensors"
        for name, tensors in shards.items():
            save_file(tensors, folder / name / f"layer-{layer}.safetensors")
    for name in ("base", "aligned"):
        (folder / name / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": index})
        )
        (folder / name / "config.json").write_text("{}")


def write_adapters(
    folder: Path, shape: Mapping[str, int], layers: int, rank: int, count: int
) -> list[Path]:
    """PEFT adapters of random A and B for every projection."""
    generator, made = torch.Generator().manual_seed(2), []
    for number in range(count):
        out, tensors = folder / f"rank{rank}" / f"adapter-{number}", {}
        out.mkdir(parents=True)
        for layer in range(layers):
            for module, (d_out, d_in) in projections_of(shape).items():
                stem = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator)
                tensors[f"{stem}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator)
        save_file(tensors, out / ADAPTER_WEIGHTS)
        (out / ADAPTER_CONFIG).write_text(
            json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank})
        )
        made.append(out)
    return made


def drop_from_cache(folder: Path) -> None:
    """Makes the next read of every file in a folder come from the disk."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_disk(case: Mapping[str, Any]) -> dict[str, Any]:
    """One side on a whole adapter, from files to files."""
    folder, layers = Path(case["folder"]), case["layers"]
    torch.set_num_threads(case["threads"])
    row = {key: value for key, value in case.items() if key != "folder"}
    own = sorted((folder / f"rank{case['rank']}").iterdir())[: case["adapters"]]
    models = [Checkpoint(folder / name) for name in ("base", "aligned")]
    if case["cold"]:
        drop_from_cache(folder)
    started = time.perf_counter()
    with peak_memory(row):
        if case["side"] == "floor":
            for tensor in models[0].names:
                touch([model.read(tensor) for model in models])
        elif case["side"] == "reference":
            _reference_adapter(folder, own[0], layers)
        else:
            with TemporaryDirectory(dir=folder) as out:
                project_adapters(own, folder / "base", folder / "aligned", Path(out) / "projected")
    return row | {"seconds": time.perf_counter() - started}


def _reference_adapter(folder: Path, adapter: Path, layers: int) -> None:
    """Both models loaded whole, in float32, then module by module."""
    models = []
    for name in ("base", "aligned"):
        loaded: dict[str, torch.Tensor] = {}
        for layer in range(layers):
            with safe_open(folder / name / f"layer-{layer}.safetensors", framework="pt") as file:
                loaded |= {tensor: file.get_tensor(tensor).float() for tensor in file.keys()}  # noqa: SIM118
        models.append(loaded)
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        for tensor in models[0]:
            stem = "base_model.model." + tensor.removesuffix(".weight")
            update = Update(
                file.get_tensor(f"{stem}.lora_A.weight"), file.get_tensor(f"{stem}.lora_B.weight")
            )
            by_definition(models[0][tensor], models[1][tensor], [update])


MEASURES = {"module": measure_module, "basis": measure_basis, "disk": measure_disk}


def measured(**case: Any) -> dict[str, Any]:
    """A case, measured in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_project", "--case", json.dumps(case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    label = {
        key: value
        for key, value in row.items()
        if key in ("measure", "side", "rows", "columns", "rank", "adapters", "threads")
    }
    print(
        f"{' '.join(f'{key}={value}' for key, value in label.items())}: {row['seconds']:.4g} s",
        file=sys.stderr,
        flush=True,
    )
    return row


def fits(rows: int, columns: int) -> bool:
    """Whether the baseline has room: both weights, V, C, and B A and C B A (all float32)."""
    needed = 4 * (5 * rows * columns + 2 * rows * rows)
    return needed < 0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def modules_in_memory(shapes: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """For each shape, rank, number of adapters and threads: the two sides and the floor, as one
    row.

    The baseline is measured with one adapter of rank 8. More adapters cost it that much again, less
    C; a higher rank costs it only a wider B A, so its time for rank 64 is understated a little.
    """
    for rows, columns in shapes:
        for threads in (1, 2):
            where = {"measure": "module", "rows": rows, "columns": columns, "threads": threads}
            floor = measured(**where, side="floor", rank=1, adapters=1)
            base = (
                measured(**where, side="reference", rank=8, adapters=1)
                if fits(rows, columns)
                else None
            )
            if base is None:
                print(
                    f"{rows} x {columns}: the baseline needs more memory than there is, so "
                    "it is skipped",
                    file=sys.stderr,
                )
            for rank in (8, 64):
                for adapters in (1, 8, 32):
                    yield joined(
                        measured(**where, side="ebbline", rank=rank, adapters=adapters), floor, base
                    )


def joined(
    ours: Mapping[str, Any], floor: Mapping[str, Any], base: Mapping[str, Any] | None
) -> dict[str, Any]:
    truth = ours["exact_cosine"]
    base_s = (
        None if base is None else base["to_form_C_s"] + ours["adapters"] * base["each_adapter_s"]
    )
    return {
        "module": f"{ours['rows']} x {ours['columns']}",
        **{key: ours[key] for key in ("rank", "adapters", "threads", "seconds", "spread")},
        "floor_s": floor["seconds"],
        "reference_s": base_s,
        "extra_memory_gb": ours["extra_memory_gb"],
        "reference_extra_memory_gb": None if base is None else base["extra_memory_gb"],
        "cosine_error": abs(ours["cosine"] - truth),
        "reference_cosine_error": None
        if base is None or ours["rank"] != base["rank"]
        else abs(base["cosine"] - truth),
        "reference_over_ebbline": None if base_s is None else base_s / ours["seconds"],
        "over_floor": ours["seconds"] / floor["seconds"],
    }


def adapters_on_disk(folder: Path, layers: int) -> Iterator[dict[str, Any]]:
    """Whole adapters of a 7B-shaped model of a few layers, from cold files to files."""
    write_models(folder, LLAMA_7B, layers)
    for rank in (8, 64):
        write_adapters(folder, LLAMA_7B, layers, rank, 32)
    os.sync()
    where = {"measure": "disk", "folder": str(folder), "layers": layers, "cold": True}
    for threads in (1, 2):
        floors = [
            measured(**where, side="floor", rank=8, adapters=1, threads=threads) for _ in range(3)
        ]
        floor_s = statistics.median(row["seconds"] for row in floors)
        base = (
            measured(**where, side="reference", rank=8, adapters=1, threads=threads)
            if threads > 1
            else None
        )
        for rank in (8, 64):
            for adapters in (1, 8, 32):
                runs = [
                    measured(**where, side="ebbline", rank=rank, adapters=adapters, threads=threads)
                    for _ in range(3)
                ]
                seconds = statistics.median(row["seconds"] for row in runs)
                yield {
                    "adapter": f"{layers} layers, 7B shape",
                    "rank": rank,
                    "adapters": adapters,
                    "threads": threads,
                    "seconds": seconds,
                    "spread": record.spread([row["seconds"] for row in runs]),
                    "floor_s": floor_s,
                    "reference_s": base["seconds"]
                    if base is not None and (rank, adapters) == (8, 1)
                    else None,
                    "peak_memory_gb": max(row["peak_memory_gb"] for row in runs),
                    "reference_peak_memory_gb": base["peak_memory_gb"]
                    if base is not None and (rank, adapters) == (8, 1)
                    else None,
                    "over_floor": seconds / floor_s,
                    "seconds_for_all_32_layers": seconds * LLAMA_7B["layers"] / layers,
                }


def largest_models(folder: Path) -> Iterator[dict[str, Any]]:
    """One and two layers of the 70B shape: memory must not grow with the layers, so 80 of them need
    what two need.
    """
    for layers in (1, 2):
        inside = folder / f"layers-{layers}"
        write_models(inside, LLAMA_70B, layers)
        write_adapters(inside, LLAMA_70B, layers, 8, 1)
        os.sync()
        where = {
            "measure": "disk",
            "folder": str(inside),
            "layers": layers,
            "cold": True,
            "rank": 8,
            "adapters": 1,
            "threads": 2,
        }
        runs = [measured(**where, side="ebbline") for _ in range(3)]
        seconds = statistics.median(row["seconds"] for row in runs)
        yield {
            "adapter": f"{layers} layer{'s' * (layers > 1)}, 70B shape",
            "rank": 8,
            "adapters": 1,
            "threads": 2,
            "seconds": seconds,
            "spread": record.spread([row["seconds"] for row in runs]),
            "peak_memory_gb": max(row["peak_memory_gb"] for row in runs),
            "seconds_for_all_80_layers": seconds * LLAMA_70B["layers"] / layers,
        }


def exact_bases() -> Iterator[dict[str, Any]]:
    for rows, columns in ((1024, 1024), (4096, 4096)):
        where = {"measure": "basis", "rows": rows, "columns": columns, "threads": 2}
        ours, base = measured(**where, side="ebbline"), measured(**where, side="reference")
        yield {
            "basis": f"{rows} x {columns}",
            "energy": 0.9,
            "columns_kept": ours["columns_kept"],
            "seconds": ours["seconds"],
            "reference_s": base["seconds"],
            "reference_over_ebbline": base["seconds"] / ours["seconds"],
            "extra_memory_gb": ours["extra_memory_gb"],
            "reference_extra_memory_gb": base["extra_memory_gb"],
        }


def ratios(
    modules: Sequence[Mapping[str, Any]],
    disk: Sequence[Mapping[str, Any]],
    bases: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in modules:
        module = row["module"].replace(" ", "")
        name = f"{module}_rank{row['rank']}_{row['adapters']}_adapters_{row['threads']}_threads"
        if row["reference_over_ebbline"] is not None:
            found[f"time_reference_over_ebbline_{name}"] = row["reference_over_ebbline"]
        found[f"time_over_memory_floor_{name}"] = row["over_floor"]
    for row in disk:
        name = f"rank{row['rank']}_{row['adapters']}_adapters_{row['threads']}_threads"
        found[f"time_over_disk_floor_{name}"] = row["over_floor"]
        if row["reference_s"] is not None:
            found[f"time_reference_over_ebbline_adapter_{name}"] = (
                row["reference_s"] / row["seconds"]
            )
            found[f"peak_memory_reference_over_ebbline_adapter_{name}"] = (
                row["reference_peak_memory_gb"] / row["peak_memory_gb"]
            )
    for row in bases:
        found[f"time_svd_over_ebbline_basis_{row['basis'].replace(' ', '')}"] = row[
            "reference_over_ebbline"
        ]
    return found


def seconds(value: float) -> str:
    return (
        f"{value * 1e3:.1f} ms"
        if value < 1
        else f"{value:.2f} s"
        if value < 100
        else f"{value / 60:.1f} min"
    )


def times(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


COLUMNS: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(
        ("module", "basis", "adapter", "rank", "adapters", "threads", "columns_kept", "spread"), str
    ),
    **dict.fromkeys(
        (
            "seconds",
            "floor_s",
            "reference_s",
            "seconds_for_all_32_layers",
            "seconds_for_all_80_layers",
        ),
        seconds,
    ),
    **dict.fromkeys(("reference_over_ebbline", "over_floor"), times),
    **dict.fromkeys(
        (
            "extra_memory_gb",
            "reference_extra_memory_gb",
            "peak_memory_gb",
            "reference_peak_memory_gb",
        ),
        lambda v: f"{v:.2f}",
    ),
    **dict.fromkeys(("cosine_error", "reference_cosine_error"), lambda v: f"{v:.1e}"),
}


def shown(rows: Sequence[Mapping[str, Any]]) -> str:
    return record.table(
        rows,
        {
            name: show
            for name, show in COLUMNS.items()
            if any(row.get(name) is not None for row in rows)
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", help="measure one case and print it (what each process of the benchmark runs)"
    )
    parser.add_argument(
        "--part",
        choices=("memory", "disk", "both"),
        default="both",
        help="modules in memory, adapters on the disk, or both",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="a disk with 20 GB free for the files that are read (default: a temporary one)",
    )
    parser.add_argument(
        "--layers", type=int, default=4, help="layers of the 7B-shaped pair on the disk"
    )
    parser.add_argument(
        "--shapes", type=int, default=len(SHAPES), help="how many of the shapes, from the smallest"
    )
    given = parser.parse_args()
    if given.case:
        case = json.loads(given.case)
        print(json.dumps(MEASURES[case["measure"]](case)))
        return
    if given.part in ("memory", "both"):
        modules, bases = list(modules_in_memory(SHAPES[: given.shapes])), list(exact_bases())
        publish("project_memory", (modules, bases), ratios(modules, [], bases))
    if given.part in ("disk", "both"):
        with TemporaryDirectory(dir=given.folder) as folder:
            disk = list(adapters_on_disk(Path(folder) / "small", given.layers))
        with TemporaryDirectory(dir=given.folder) as folder:
            large = list(largest_models(Path(folder)))
        publish("project_disk", (disk, large), ratios([], disk, []))


def publish(
    name: str, tables: Sequence[Sequence[Mapping[str, Any]]], found: Mapping[str, float]
) -> None:
    for rows in tables:
        print(shown(rows), end="\n\n")
    path = record.write(
        name,
        "make bench-project",
        ("torch", "safetensors"),
        [row for rows in tables for row in rows],
        found,
    )
    print(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
