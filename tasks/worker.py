"""The one entry of every worker: `run_stages` runs a batch of requests in this process and reports on each.

The same function runs inline, in a Ray task, on each member of a gang, and from `python -m tasks request.json`. The
requests of a batch share what is loaded; a request that fails does not stop those behind it.
"""

import contextlib
import json
import logging
import platform
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from tasks import memory
from tasks.errors import DiskFull, EbblineError, Leaving, OutOfMemory
from tasks.models import Residents, resolve
from tasks.specs import (
    ApplySpec,
    ConvertSpec,
    DataSpec,
    EvaluateSpec,
    GenerateSpec,
    JudgeSpec,
    LanguageSpec,
    OrganismSpec,
    ProjectSpec,
    ScoreSpec,
    Spec,
    SubspaceSpec,
    TrainSpec,
)
from tasks.stage import Context, Report, Request

_log = logging.getLogger(__name__)
ERROR = "error.txt"
Run = Callable[..., None]  # (spec of its kind, inputs: Mapping[str, Path], out: Path, ctx: Context)


def _as_it_is(request: Request) -> Request:
    return request


def _nothing(request: Request) -> None:
    return None


def run_stages(
    requests: Iterable[Request],
    rank: int = 0,
    world_size: int = 1,
    prepare: Callable[[Request], Request] = _as_it_is,
    saved: Callable[[Request], None] = _nothing,
    leaving: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """Run each request in turn; yield its report as soon as its files are written. Never raises for a failed stage.

    `prepare` is called when a request's turn comes, and may bring its inputs to this machine; `saved` after each checkpoint.
    Once `leaving` says that the machine is about to go, no further request is begun: each is reported as Leaving.
    """
    residents = Residents()
    try:
        for request in requests:
            yield _run(request, residents, rank, world_size, prepare, saved, leaving)
    finally:
        residents.clear()


def _run(
    request: Request,
    residents: Residents,
    rank: int,
    world_size: int,
    prepare: Callable[[Request], Request],
    saved: Callable[[Request], None],
    leaving: Callable[[], bool],
) -> Report:
    started = time.monotonic()
    try:
        if leaving():
            raise Leaving("the machine is about to go; this stage had not begun")
        request = prepare(request)
        spec = request.parsed_spec()
        progress = _progress_file(Path(request.log) / "progress.json") if rank == 0 else _silent
        # A download is a sign of life: it grows by the second, so that what it says is never the same twice.
        inputs = {
            name: resolve(location, lambda: progress(0, 1, f"fetching {name}, {time.monotonic() - started:.0f} s"))  # noqa: B023
            for name, location in request.inputs.items()
        }
        ctx = request.context(
            residents=residents, rank=rank, world_size=world_size, progress=progress, leaving=leaving, saved=lambda: saved(request)
        )
        _set_threads(request.threads)
        ctx, predicted_gb = laid_out(spec, inputs, ctx, request.memory_gb)
        _forget_peak(ctx.device)
        run_function(spec)(spec, inputs, Path(request.out), ctx)
    except Exception as error:  # noqa: BLE001  # the boundary: a failed stage becomes a report, and the batch goes on
        residents.clear()  # a model that a failure left half changed must not be measured by the next request
        with contextlib.suppress(OSError):  # on a full disk the report below says so
            (Path(request.log) / ERROR).write_text(traceback.format_exc())
        name, reason = described(error, Path(request.log))
        smaller = error.micro_batch if isinstance(error, OutOfMemory) else None
        return Report(request.key, time.monotonic() - started, reason, name, traceback.format_exc(), smaller=smaller)
    return Report(key=request.key, seconds=time.monotonic() - started, environment=_environment(ctx, predicted_gb))


def described(error: BaseException, log: Path) -> tuple[str, str]:
    """(type, one-line reason) of a failure, fit for reports and W&B.

    The words of a foreign exception may quote a prompt or a completion, so they stay in the attempt's log, and the reason
    says where. A full disk is a type of its own: it is no fault of the stage.
    """
    if "No space left on device" in str(error):
        return DiskFull.__name__, f"no space left for {log.parent}; free some, and the same command continues"
    if isinstance(error, EbblineError | OSError | MemoryError | ImportError):
        return type(error).__name__, f"{type(error).__name__}: {error}" if not isinstance(error, EbblineError) else str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return type(error).__name__, f"{type(error).__name__} at {place}; its message and traceback are in {log / ERROR}"


def run_function(spec: Spec) -> Run:
    # Imported here, so that a worker that only copies tensors never pays for lm-eval or deepspeed.
    match spec:
        case LanguageSpec():
            from tasks import language

            return language.run
        case OrganismSpec():
            from tasks import organism

            return organism.run
        case ConvertSpec():
            from tasks import convert

            return convert.run
        case DataSpec():
            from tasks import data

            return data.run
        case TrainSpec():
            from tasks import train

            return train.run
        case SubspaceSpec():
            from tasks import subspace

            return subspace.run
        case ProjectSpec():
            from tasks import project

            return project.run_project
        case ApplySpec():
            from tasks import project

            return project.run_apply
        case GenerateSpec():
            from tasks import generate

            return generate.run
        case JudgeSpec():
            from tasks import judge

            return judge.run
        case ScoreSpec():
            from tasks import score

            return score.run
        case EvaluateSpec():
            from tasks import evaluate

            return evaluate.run
    raise TypeError(f"{type(spec).__name__} has no run function; add it to tasks.worker")


def _progress_file(path: Path) -> Callable[[int, int, str], None]:
    started, last = time.monotonic(), 0.0
    first: tuple[int, float] | None = None  # where this attempt began to count: one that was resumed does not begin at 0

    def write(done: int, total: int, note: str) -> None:
        nonlocal last, first
        if done > 0 and first is None:
            first = done - 1, time.monotonic()
        if time.monotonic() - last < 0.5 and done != total:
            return
        last = time.monotonic()
        fresh = path.with_suffix(".tmp")
        # Progress is a courtesy: a full disk shows up where results are written, not here.
        with contextlib.suppress(OSError):
            own, since = (done - first[0], first[1]) if first else (0, started)
            said = {"done": done, "total": total, "note": note, "seconds": last - started, "own": own, "own_seconds": last - since}
            fresh.write_text(json.dumps(said))
            fresh.replace(path)

    return write


def _silent(done: int, total: int, note: str) -> None:
    return None


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch  # only a worker has torch; the driver process never imports it

        torch.set_num_threads(threads)


def laid_out(spec: Spec, inputs: Mapping[str, Path], ctx: Context, memory_gb: float | None) -> tuple[Context, float | None]:
    """The Context with a training's layout in it, and the GB it is predicted to allocate on each GPU; None where that is not known.

    A training whose micro-batch nobody chose gets the largest that fits, if the GPU's memory is known. Raises TrainingError, before
    anything is loaded, when not even one row fits.
    """
    path = inputs["model"] / "config.json" if "model" in inputs else None
    if not isinstance(spec, TrainSpec) or path is None or not path.exists():  # a model that is none is an error when it is loaded
        return ctx, None
    config = json.loads(path.read_text())
    if not memory.predictable(config, spec):
        return ctx, None
    if ctx.device != "cpu" and memory_gb is None:
        import torch  # only a worker has torch

        memory_gb = torch.cuda.get_device_properties(ctx.device).total_memory / memory.GB
    if ctx.micro_batch is None and memory_gb is not None and spec.global_batch % ctx.world_size == 0:
        layout = memory.fitting(config, spec, ctx.world_size, memory_gb)
        ctx = replace(ctx, micro_batch=layout.micro_batch, zero_stage=layout.zero_stage or ctx.zero_stage)
    share = max(1, spec.global_batch // ctx.world_size)
    stage = ctx.zero_stage if ctx.world_size > 1 else 0
    layout = memory.Layout(ctx.world_size, stage, min(ctx.micro_batch or share, share), ctx.recomputes)
    return ctx, memory.predict(memory.shape_of(config), spec, layout).allocated_gb


def _forget_peak(device: str) -> None:
    if device != "cpu":
        import torch  # only a worker has torch

        torch.cuda.reset_peak_memory_stats()


def _environment(ctx: Context, predicted_gb: float | None) -> dict[str, object]:
    """What an attempt's record keeps of where it ran. `peak_memory_gb` is this process's on the host, since it began."""
    environment: dict[str, object] = {
        "device": ctx.device,
        "host": platform.node(),
        "python": platform.python_version(),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 3),
    }
    if predicted_gb is not None:
        environment["predicted_memory_gb"] = round(predicted_gb, 3)
    if ctx.device != "cpu":
        import torch  # only a worker has torch

        peak_gb = torch.cuda.max_memory_allocated() / memory.GB
        environment["peak_gpu_memory_gb"] = round(peak_gb, 3)
        warn_of_a_wrong_prediction(predicted_gb, peak_gb)
    return environment


def warn_of_a_wrong_prediction(predicted_gb: float | None, peak_gb: float) -> None:
    if predicted_gb is not None and abs(predicted_gb - peak_gb) > 0.2 * peak_gb:
        _log.warning("this training was predicted to allocate %.1f GB on each GPU and allocated %.1f GB", predicted_gb, peak_gb)
