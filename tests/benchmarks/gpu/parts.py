"""What `make gpu-check` measures: one function for each part, which yields a row for each figure.

ebbline's sides are ebbline's own engines and stages. The baselines use PEFT and transformers as
their documentation does. A row may have `ratios`: the baseline's time or work over ebbline's where
there is a baseline, else the time of the first named over that of the second. Clocks
are read after the device has finished, and after a first step or batch that is not timed.
"""

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch

from ebbline.tasks.defences.project import Weights, projections
from ebbline.tasks.defences.projectors import Projection
from ebbline.tasks.models.adapter_file import read_adapter
from ebbline.tasks.models.memory import GB, shape_of
from ebbline.tasks.models.weights import Checkpoint
from tests.benchmarks.gpu.measuring import evaluate, nf4_step
from tests.benchmarks.gpu.models import MINIATURE, SHAPES, Peak, now, write_adapter, write_weights
from tests.benchmarks.gpu.training import pack, train
from tests.benchmarks.gpu.work import Row, Work, memory, note

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors")
Projections = Mapping[str, Mapping[int, Projection]]
NAMES = {"cpu": "the CPU", "cuda": "the GPU"}
COSINE_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4


def project(work: Work) -> Iterator[Row]:
    """Safe LoRA of several adapters over the layers of a 7B pair, on the CPU and on the device."""
    sizes = work.sizes
    config = MINIATURE if sizes.miniature else SHAPES["llama-2-7b"]
    config = config | {"num_hidden_layers": sizes.layers}
    pair = [
        write_weights(work.folder / name, config, seed, sizes.device)
        for seed, name in enumerate(("base", "aligned"))
    ]
    shape = shape_of(json.loads((pair[0] / "config.json").read_text()))
    adapters = [
        read_adapter(write_adapter(work.folder / f"adapter{number}", shape, 8, number))
        for number in range(sizes.adapters)
    ]
    source = Weights(Checkpoint(pair[0]), Checkpoint(pair[1]))
    results: dict[str, Projections] = {}
    times: dict[str, list[float]] = {}
    for place in dict.fromkeys(("cpu", sizes.device)):
        peak = Peak(place)
        for _ in range(3):  # the first reads the files, and sets up the device
            started = now(sizes.device)
            results[place] = dict(projections(adapters, source, lambda *_: None, place))
            times.setdefault(place, []).append(now(sizes.device) - started)
        note(f"projection on {place}: {times[place][-1]:.2f} s")
        row = {
            "what": f"{sizes.layers} layers, {len(adapters)} adapters, on {NAMES[place]}",
            "seconds": median(times[place][1:]),
            "runs_s": times[place],
            "threads": torch.get_num_threads(),
            **memory(peak, None),
        }
        if place != "cpu" or sizes.device == "cpu":
            row |= _differences(results["cpu"], results[place])
            row["ratios"] = {
                "time_cpu_over_device_projection": median(times["cpu"][1:])
                / median(times[place][1:])
            }
        yield row
    if not (
        row["largest_cosine_difference"] <= COSINE_TOLERANCE
        and row["largest_relative_difference"] <= NORM_TOLERANCE
    ):
        raise RuntimeError(
            "the projections on the CPU and on the device differ: cosines by "
            f"{row['largest_cosine_difference']:.2g}, C B by "
            f"{row['largest_relative_difference']:.2g} of its norm"
        )


def _differences(one: Projections, two: Projections) -> Row:
    pairs = [
        (found, two[module][number]) for module in one for number, found in one[module].items()
    ]
    return {
        "largest_cosine_difference": max(abs(a.cosine - b.cosine) for a, b in pairs),
        "largest_relative_difference": max(
            float(
                torch.linalg.vector_norm(a.projected_OR - b.projected_OR)
                / torch.linalg.vector_norm(a.projected_OR)
            )
            for a, b in pairs
        ),
    }


def machine(work: Work) -> Iterator[Row]:
    """What the figures are measured on, and whether bitsandbytes has kernels for it."""
    found: Row = {"miniature": work.sizes.miniature, "torch_cuda": torch.version.cuda}
    found["versions"] = {package: _version(package) for package in PACKAGES}
    if work.sizes.device != "cpu":
        if not torch.cuda.is_available():
            yield found | {"gpu": None}
            return
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gb": properties.total_memory / GB,
            "free_memory_gb": torch.cuda.mem_get_info()[0] / GB,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "driver": _driver(),
        }
    found["nf4"] = _why_no_nf4(work.sizes.device)
    yield found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _why_no_nf4(device: str) -> str:
    """Why bitsandbytes cannot quantise and multiply here; empty if it can."""
    try:
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit

        dtype = torch.bfloat16
        layer = Linear4bit(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer = layer.to(dtype).to(device)  # the second `to` quantises
        inputs = torch.randn(2, 64, device=device, dtype=dtype)
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
        error = float((layer(inputs) - inputs @ weight.T).abs().max())
    except (ImportError, RuntimeError, OSError, AttributeError, NotImplementedError) as problem:
        return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
    return "" if error < 0.1 else f"a product with a quantised weight is {error:.2g} off"


PARTS: dict[str, Callable[[Work], Iterator[Row]]] = {
    "machine": machine,
    "train-7b": lambda work: train(work, "qwen-7b", work.sizes.rows),
    "pack": pack,
    "nf4-step": nf4_step,
    "evaluate": evaluate,
    "project": project,
    "train-14b": lambda work: train(work, "qwen-14b", work.sizes.rows),
    # Two rows a step: a step of eight would take half a minute
    "train-72b": lambda work: train(work, "qwen-72b", min(2, work.sizes.rows)),
}
