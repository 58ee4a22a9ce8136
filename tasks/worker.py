"""The one entry of every worker: `run_stages` runs a batch of requests in this process and reports on each.

The same function runs inline, in a Ray task, on each member of a gang, and from `python -m tasks request.json`. The
requests of a batch share what is loaded; a request that fails does not stop those behind it.
"""

import contextlib
import json
import platform
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tasks.errors import DiskFull, EbblineError, Leaving
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
from tasks.stage import Report, Request

ERROR = "error.txt"
Run = Callable[..., None]  # (spec of its kind, inputs: Mapping[str, Path], out: Path, ctx: Context)


def run_stages(
    requests: Sequence[Request], rank: int = 0, world_size: int = 1, leaving: Callable[[], bool] = lambda: False
) -> Iterator[Report]:
    """Run each request in turn; yield its report as soon as its files are written. Never raises for a failed stage.

    Once `leaving` says that the machine is about to go, no further request is begun: each is reported as Leaving.
    """
    residents = Residents()
    try:
        for request in requests:
            yield _run(request, residents, rank, world_size, leaving)
    finally:
        residents.clear()


def _run(request: Request, residents: Residents, rank: int, world_size: int, leaving: Callable[[], bool]) -> Report:
    started = time.monotonic()
    try:
        if leaving():
            raise Leaving("the machine is about to go; this stage had not begun")
        spec = request.parsed_spec()
        inputs = {name: resolve(location) for name, location in request.inputs.items()}
        progress = _progress_file(Path(request.log) / "progress.json") if rank == 0 else _silent
        ctx = request.context(residents=residents, rank=rank, world_size=world_size, progress=progress, leaving=leaving)
        _set_threads(request.threads)
        run_function(spec)(spec, inputs, Path(request.out), ctx)
    except Exception as error:  # noqa: BLE001  # the boundary: a failed stage becomes a report, and the batch goes on
        residents.clear()  # a model that a failure left half changed must not be measured by the next request
        with contextlib.suppress(OSError):  # on a full disk the report below says so
            (Path(request.log) / ERROR).write_text(traceback.format_exc())
        name, reason = described(error, Path(request.log))
        return Report(request.key, time.monotonic() - started, reason, name, traceback.format_exc())
    return Report(key=request.key, seconds=time.monotonic() - started, environment=_environment(request))


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

    def write(done: int, total: int, note: str) -> None:
        nonlocal last
        if time.monotonic() - last < 0.5 and done != total:
            return
        last = time.monotonic()
        fresh = path.with_suffix(".tmp")
        # Progress is a courtesy: a full disk shows up where results are written, not here.
        with contextlib.suppress(OSError):
            fresh.write_text(json.dumps({"done": done, "total": total, "note": note, "seconds": last - started}))
            fresh.replace(path)

    return write


def _silent(done: int, total: int, note: str) -> None:
    return None


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch  # only a worker has torch; the driver process never imports it

        torch.set_num_threads(threads)


def _environment(request: Request) -> dict[str, object]:
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return {
        "device": request.device,
        "host": platform.node(),
        "python": platform.python_version(),
        "peak_memory_gb": round(peak_gb, 3),
    }
