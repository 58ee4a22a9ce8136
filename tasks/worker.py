"""`run_stages` runs a batch of requests in this process and reports on each.

A study's workers call it through ebbline.cluster.executors.executor.run_batch, which also commits
the artifacts. `ebbline rerun` calls it directly.

It runs inline, in a Ray task, on each member of a gang, and from `ebbline rerun request.json`. The
requests of a batch share the loaded model. Trainings may share a forward pass as a pack, and
generations as a group. A failed request does not stop the requests after it.
"""

import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ebbline.tasks.errors import (
    Damaged,
    DiskFull,
    EbblineError,
    EndpointDown,
    Leaving,
    OutOfMemory,
    TrainingError,
)
from ebbline.tasks.files import is_full, open_private
from ebbline.tasks.headers.hub import HUB, local_path
from ebbline.tasks.inputs import ExpectedInput, InputCheck
from ebbline.tasks.kinds import kind_named, parsed_spec
from ebbline.tasks.measuring.grouped.requests import group_name, in_groups
from ebbline.tasks.models.memory import environment, laid_out, reset_peak_memory
from ebbline.tasks.progress import PROGRESS, ProgressFile
from ebbline.tasks.specs import GenerateSpec, Spec, TrainSpec
from ebbline.tasks.stage import Context, Report, Request
from ebbline.tasks.training.micro_batch import halve_after_kills
from ebbline.tasks.training.packs import in_packs
from ebbline.tasks.usage import Usage

if TYPE_CHECKING:
    from ebbline.tasks.models.loading import Residents

_log = logging.getLogger(__name__)
ERROR, PACK_ERROR = "error.txt", "pack_error.txt"


def _unchanged(request: Request) -> Request:
    return request


def _ignore(request: Request) -> None:
    return None


def _unknown() -> None:
    return None


def run_stages(
    requests: Iterable[Request],
    rank: int = 0,
    world_size: int = 1,
    prepare: Callable[[Request], Request] = _unchanged,
    saved: Callable[[Request], None] = _ignore,
    leaving: Callable[[], bool] = lambda: False,
    residents: "Residents | None" = None,
) -> Iterator[Report]:
    """Run each request in turn and yield its report as soon as its files are written. A failed
    stage gives a report and never raises.

    `prepare` is called before a request runs, and may copy its inputs to this machine. `saved` is
    called after each checkpoint. Once `leaving` returns true, no further request starts: each is
    reported as Leaving. `residents` hold the models, and are cleared at the end; by default new
    ones.
    """
    batch, taken = _Batch(rank, world_size, prepare, saved, leaving, residents), iter(requests)
    try:
        for together in in_groups(lambda: in_packs(taken)):
            if len(together) > 1 or group_name(together[0]):
                yield from batch.run_together(together)
            else:
                yield batch.run_one(together[0])
    finally:
        batch.free()


@dataclass(frozen=True)
class _Turn:
    """A request that is ready to run, with everything that it reads on this machine."""

    request: Request
    spec: Spec
    inputs: Mapping[str, Path]
    ctx: Context
    check: InputCheck


class _Batch:
    """Runs the requests of one batch, one by one or together. They share the loaded model."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        prepare: Callable[[Request], Request],
        saved: Callable[[Request], None],
        leaving: Callable[[], bool],
        residents: "Residents | None",
    ) -> None:
        self._residents = residents
        self._rank, self._world_size = rank, world_size
        self._prepare, self._saved, self._leaving = prepare, saved, leaving
        self._held_model = False

    @property
    def residents(self) -> "Residents | None":
        """The models that this batch keeps. None in a process without torch: a stage that needs
        none must not pay for its import, which takes seconds.
        """
        if self._residents is None and "torch" in sys.modules:
            from ebbline.tasks.models.loading import Residents

            self._residents = Residents()
        return self._residents

    def free(self) -> None:
        """Release the models. A batch of stages without GPUs holds none and skips the garbage
        collection.
        """
        if self._residents is not None and (self._held_model or not self._residents.empty):
            self._residents.clear()
        self._held_model = False

    def run_one(self, request: Request) -> Report:
        started = time.monotonic()
        check: InputCheck | None = None
        try:
            self._import(request)
            started = time.monotonic()
            turn = self._turn(request)
            request, check = turn.request, turn.check
            ctx, predicted_gb = laid_out(turn.spec, turn.inputs, turn.ctx, request.memory_gb)
            if isinstance(turn.spec, TrainSpec):
                most = ctx.micro_batch or turn.spec.global_batch
                halve_after_kills(ctx.scratch, request.killed, most)
            reset_peak_memory(ctx.device)
            run = kind_named(request.kind).load_function()
            run(turn.spec, turn.inputs, Path(request.out), ctx)
            _require_unchanged(check)
        # A failed stage becomes a report, and the batch continues
        except Exception as error:  # noqa: BLE001
            cause = _damage_behind(error, check)
            return self._failed(request, cause, time.monotonic() - started)
        return Report(
            key=request.key,
            seconds=time.monotonic() - started,
            environment=environment(ctx, predicted_gb),
        )

    def run_together(self, requests: Sequence[Request]) -> Iterator[Report]:
        """Train a pack, or measure a group. Requests that fail together run one by one, so that
        each error belongs to one stage. So do those that a group leaves out.
        """
        started, is_group = time.monotonic(), bool(group_name(requests[0]))
        run, fewest, word = (_grouped, 1, "group") if is_group else (_packed, 2, "pack")
        turns: list[_Turn] = []
        for request in requests:
            try:
                self._import(request)
                started = started if turns else time.monotonic()
                turn = self._turn(request, len(requests))
                turn.check.finish()
                turns.append(turn)
            except Exception as error:  # noqa: BLE001  # as above
                yield self._failed(request, error, time.monotonic() - started)
        waiting = {turn.request.key: turn for turn in turns}
        try:
            for key, seconds, failure, details in run(turns) if len(turns) >= fewest else ():
                turn = waiting.pop(key)
                failure = failure or _change_of(turn.check)
                if failure is not None:
                    yield self._failed(turn.request, failure, seconds, clear=False)
                else:
                    shared: dict[str, object] = {"grouped": len(turns)}
                    if not is_group:
                        pack_s = round(time.monotonic() - started, 3)
                        shared = {"packed": len(turns), "pack_seconds": pack_s}
                    yield Report(key, seconds, environment={**details, **shared})
        # Alone none of them would end otherwise
        except (Leaving, EndpointDown) as reason:
            for turn in waiting.values():
                yield self._failed(turn.request, reason, time.monotonic() - started)
            return
        # Run one by one, the training at fault fails with an error of its own
        except Exception as error:  # noqa: BLE001
            self.free()
            _log.warning(
                "%d %s failed as a %s (%s) and are run one by one",
                len(waiting),
                "generations" if is_group else "trainings",
                word,
                type(error).__name__,
            )
            for turn in waiting.values():
                with contextlib.suppress(OSError):  # on a full disk their own reports will say so
                    _log_error(turn.request, PACK_ERROR, traceback.format_exc())
        for turn in waiting.values():
            yield self.run_one(turn.request)

    def _import(self, request: Request) -> None:
        """Import the code of a request's kind. These seconds are the job's start and no work of the
        stage: a process imports once, and predictions scale the work.
        """
        if self._leaving():
            raise Leaving("the machine is about to go; this stage had not begun")
        kind_named(request.kind).load_function()  # imports torch, if the kind needs it
        if request.gpus:
            import torch  # noqa: F401  # also where the function imports it later

    def _turn(self, request: Request, packed: int = 1) -> _Turn:
        started = time.monotonic()
        self._held_model |= request.gpus > 0
        request = self._prepare(request)
        spec = parsed_spec(request)
        path = Path(request.log) / PROGRESS if self._rank == 0 else None
        trains = isinstance(spec, TrainSpec)
        file = ProgressFile(path, packed, Usage(request.device).read if trains else _unknown)
        # A download counts as progress: the elapsed seconds make each note differ from the last.
        inputs = {
            name: local_path(location, partial(_fetching, file, name, started))
            for name, location in request.inputs.items()
        }
        check = InputCheck(_expected(request, inputs))
        ctx = request.context(
            residents=self.residents,
            rank=self._rank,
            world_size=self._world_size,
            progress=check.before(file.count),
            step_done=check.before(file.step_done),
            resumed=file.resumed,
            leaving=self._leaving,
            saved=lambda: self._saved(request),
        )
        _set_threads(request.threads)
        return _Turn(request, spec, inputs, ctx, check)

    def _failed(
        self, request: Request, error: Exception, seconds: float, clear: bool = True
    ) -> Report:
        if clear:
            # A failure may leave the model half changed: the next request must not measure it
            self.free()
        trace = "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):  # on a full disk the report below says so
            _log_error(request, ERROR, trace)
        name, reason = error_and_reason(error, Path(request.log))
        smaller = error.micro_batch if isinstance(error, OutOfMemory) else None
        return Report(request.key, seconds, reason, name, trace, smaller=smaller)


def _log_error(request: Request, name: str, trace: str) -> None:
    """Write a traceback, which may quote a prompt, to the attempt's log."""
    with open_private(Path(request.log) / name) as file:
        file.write(trace)


def _expected(request: Request, inputs: Mapping[str, Path]) -> dict[str, ExpectedInput]:
    """What each input must be, by its name. Nothing for a request outside any store."""
    expected: dict[str, ExpectedInput] = {}
    for name, path in inputs.items() if request.recorded is not None else ():
        if request.inputs[name].startswith(HUB):
            expected[name] = ExpectedInput.of_hub(path)
        else:
            files = (request.recorded or {}).get(name)
            source: Literal["record", "pin"] = "pin" if files is None else "record"
            expected[name] = ExpectedInput(path, request.contents[name], source, files)
    return expected


def _require_unchanged(check: InputCheck) -> None:
    check.finish()
    check.check_unchanged()


def _change_of(check: InputCheck) -> Damaged | None:
    try:
        check.check_unchanged()
    except Damaged as damage:
        return damage
    return None


def _damage_behind(error: Exception, check: InputCheck | None) -> Exception:
    """The damage of an input behind a stage's error, else the error. A machine that is about to go
    has no time for that.
    """
    if check is not None and isinstance(error, Leaving):
        check.stop()
    if check is None or isinstance(error, Damaged | Leaving | OutOfMemory):
        return error
    try:
        _require_unchanged(check)
    except Damaged as damage:
        return damage
    return error


def _packed(
    turns: Sequence[_Turn],
) -> Iterator[tuple[str, float, EbblineError | None, dict[str, object]]]:
    """(key, seconds, error or None, environment) of each training of a pack, as soon as its files
    are written or it has failed.
    """
    from ebbline.tasks.training.pack_engine import Member

    # Imports peft and transformers, which a worker that only copies tensors does not need
    from ebbline.tasks.training.packed import run
    from ebbline.tasks.training.penalties import contrast_in

    first, specs = turns[0], [turn.spec for turn in turns if isinstance(turn.spec, TrainSpec)]
    if len(specs) < len(turns):
        raise TrainingError(
            "a pack holds trainings only, but this one holds the kinds "
            f"{sorted({turn.request.kind for turn in turns})}"
        )
    ctx, predicted_gb = laid_out(
        specs[0], first.inputs, first.ctx, first.request.memory_gb, specs[1:]
    )
    reset_peak_memory(ctx.device)
    keys: dict[Member, str] = {}
    for turn, spec in zip(turns, specs, strict=True):
        keys[
            Member(spec, Path(turn.request.out), replace(turn.ctx, micro_batch=ctx.micro_batch))
        ] = turn.request.key
    model, data, contrast = first.inputs["model"], first.inputs["data"], contrast_in(first.inputs)
    for member, error in run(list(keys), model, data, contrast):
        yield (
            keys[member],
            member.seconds,
            error,
            environment(ctx, predicted_gb) if error is None else {},
        )


def _grouped(
    turns: Sequence[_Turn],
) -> Iterator[tuple[str, float, EbblineError | None, dict[str, object]]]:
    """(key, seconds, None, environment) of each generation of a group, as soon as its files are
    written. One that the group leaves out is not yielded.
    """
    from ebbline.tasks.measuring.backends import run_group  # imports transformers
    from ebbline.tasks.measuring.grouped.generations import Member

    keys: dict[Member, str] = {}
    for turn in turns:
        if isinstance(turn.spec, GenerateSpec):
            member = Member(turn.spec, turn.inputs, Path(turn.request.out), turn.ctx)
            keys[member] = turn.request.key
    reset_peak_memory(turns[0].ctx.device)
    for member in run_group(list(keys)):
        yield keys[member], member.seconds, None, environment(member.ctx, None)


def error_and_reason(error: BaseException, log: Path) -> tuple[str, str]:
    """(type, one-line reason) of a failure, safe for reports and W&B.

    The message of a foreign exception may quote a prompt or a completion. It stays in the attempt's
    log, and the reason names that file. A full disk has a type of its own, because the stage
    is not at fault.
    """
    if is_full(error):
        return (
            DiskFull.__name__,
            f"no space left for {log.parent}; free some, and the same command continues",
        )
    if isinstance(error, EbblineError | OSError | MemoryError | ImportError):
        return type(error).__name__, f"{type(error).__name__}: {error}" if not isinstance(
            error, EbblineError
        ) else str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return type(
        error
    ).__name__, f"{type(error).__name__} at {place}; its message and traceback are in {log / ERROR}"


def _fetching(file: ProgressFile, name: str, started: float) -> None:
    file.count(0, 1, f"fetching {name}, {time.monotonic() - started:.0f} s")


def _set_threads(threads: int | None) -> None:
    if threads is not None and "torch" in sys.modules:
        import torch  # the driver process never imports torch

        torch.set_num_threads(threads)
