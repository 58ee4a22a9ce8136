"""The one entry of every worker: `run_stages` runs a batch of requests in this process and reports
on each.

The same function runs inline, in a Ray task, on each member of a gang, and from `ebbline rerun
request.json`. The requests of a batch share what is loaded, and trainings of one pack a forward
pass; a request that fails does not stop those behind it.
"""

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ebbline.tasks.errors import DiskFull, EbblineError, Leaving, OutOfMemory, TrainingError
from ebbline.tasks.kinds import kind_named, parsed_spec
from ebbline.tasks.models.loading import Residents, resolve
from ebbline.tasks.models.memory import environment, forget_peak, laid_out
from ebbline.tasks.progress import PROGRESS, ProgressFile
from ebbline.tasks.specs import Spec, TrainSpec
from ebbline.tasks.stage import Context, Report, Request
from ebbline.tasks.training.packs import in_packs

_log = logging.getLogger(__name__)
ERROR, PACK_ERROR = "error.txt", "pack_error.txt"


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
    """Run each request in turn; yield its report as soon as its files are written. Never raises for
    a failed stage.

    `prepare` is called when a request's turn comes, and may bring its inputs to this machine;
    `saved` after each checkpoint. Once `leaving` says that the machine is about to go, no further
    request is begun: each is reported as Leaving.
    """
    batch = _Batch(rank, world_size, prepare, saved, leaving)
    try:
        for pack in in_packs(requests):
            yield from batch.together(pack) if len(pack) > 1 else [batch.alone(pack[0])]
    finally:
        batch.free()


@dataclass(frozen=True)
class _Turn:
    """A request whose turn has come, with everything that it reads on this machine."""

    request: Request
    spec: Spec
    inputs: Mapping[str, Path]
    ctx: Context


class _Batch:
    """Runs the requests of one batch, each by itself or in a pack, on what they share: the loaded
    model.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        prepare: Callable[[Request], Request],
        saved: Callable[[Request], None],
        leaving: Callable[[], bool],
    ) -> None:
        self.residents = Residents()
        self._rank, self._world_size = rank, world_size
        self._prepare, self._saved, self._leaving = prepare, saved, leaving
        self._held_model = False

    def free(self) -> None:
        """Let go of models. A batch of stages that take no GPU holds none, and is spared the
        garbage collection.
        """
        if self._held_model or not self.residents.empty:
            self.residents.clear()
        self._held_model = False

    def alone(self, request: Request) -> Report:
        started = time.monotonic()
        try:
            turn = self._turn(request)
            request = turn.request
            ctx, predicted_gb = laid_out(turn.spec, turn.inputs, turn.ctx, request.memory_gb)
            forget_peak(ctx.device)
            run = kind_named(request.kind).load_function()
            run(turn.spec, turn.inputs, Path(request.out), ctx)
        # The boundary: a failed stage becomes a report, and the batch goes on
        except Exception as error:  # noqa: BLE001
            return self._failed(request, error, time.monotonic() - started)
        return Report(
            key=request.key,
            seconds=time.monotonic() - started,
            environment=environment(ctx, predicted_gb),
        )

    def together(self, requests: Sequence[Request]) -> Iterator[Report]:
        """Train a pack. What fails as a pack is trained one by one, so that each failure is its own
        stage's.
        """
        started = time.monotonic()
        turns: list[_Turn] = []
        for request in requests:
            try:
                turns.append(self._turn(request, len(requests)))
            except Exception as error:  # noqa: BLE001  # as above
                yield self._failed(request, error, time.monotonic() - started)
        waiting = {turn.request.key: turn for turn in turns}
        try:
            for key, seconds, fault, where in _packed(turns) if len(turns) > 1 else ():
                turn = waiting.pop(key)
                if fault is not None:
                    yield self._failed(turn.request, fault, seconds, clear=False)
                else:
                    pack_s = time.monotonic() - started
                    yield Report(
                        key,
                        seconds,
                        environment={
                            **where,
                            "packed": len(turns),
                            "pack_seconds": round(pack_s, 3),
                        },
                    )
        except Leaving as error:
            for turn in waiting.values():
                yield self._failed(turn.request, error, time.monotonic() - started)
            return
        # Whose fault it is shows when each runs alone, with an error of its own
        except Exception as error:  # noqa: BLE001
            self.residents.clear()
            _log.warning(
                "%d trainings failed as a pack (%s) and are run one by one",
                len(waiting),
                type(error).__name__,
            )
            for turn in waiting.values():
                with contextlib.suppress(OSError):  # on a full disk their own reports will say so
                    (Path(turn.request.log) / PACK_ERROR).write_text(traceback.format_exc())
        for turn in waiting.values():
            yield self.alone(turn.request)

    def _turn(self, request: Request, packed: int = 1) -> _Turn:
        started = time.monotonic()
        if self._leaving():
            raise Leaving("the machine is about to go; this stage had not begun")
        self._held_model |= request.gpus > 0
        request = self._prepare(request)
        spec = parsed_spec(request)
        file = ProgressFile(Path(request.log) / PROGRESS if self._rank == 0 else None, packed)
        # A download is a sign of life: it grows by the second, so that what it says is never the
        # same twice.
        inputs = {
            name: resolve(location, partial(_fetching, file, name, started))
            for name, location in request.inputs.items()
        }
        ctx = request.context(
            residents=self.residents,
            rank=self._rank,
            world_size=self._world_size,
            progress=file.count,
            step_done=file.step_done,
            leaving=self._leaving,
            saved=lambda: self._saved(request),
        )
        _set_threads(request.threads)
        return _Turn(request, spec, inputs, ctx)

    def _failed(
        self, request: Request, error: Exception, seconds: float, clear: bool = True
    ) -> Report:
        if clear:
            # A model that a failure left half changed must not be measured by the next request
            self.free()
        said = "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):  # on a full disk the report below says so
            (Path(request.log) / ERROR).write_text(said)
        name, reason = described(error, Path(request.log))
        smaller = error.micro_batch if isinstance(error, OutOfMemory) else None
        return Report(request.key, seconds, reason, name, said, smaller=smaller)


def _packed(
    turns: Sequence[_Turn],
) -> Iterator[tuple[str, float, TrainingError | None, dict[str, object]]]:
    """(key, seconds, why it failed, environment) of each training of a pack, when its files are
    written or it has failed.
    """
    from ebbline.tasks.training.pack_engine import Member
    from ebbline.tasks.training.packed import (
        run,  # brings peft and transformers, which a worker that only copies tensors never pays for
    )

    first, specs = turns[0], [turn.spec for turn in turns if isinstance(turn.spec, TrainSpec)]
    if len(specs) < len(turns):
        raise TrainingError(
            "a pack has trainings only, and this one has "
            f"{sorted({turn.request.kind for turn in turns})}"
        )
    ctx, predicted_gb = laid_out(
        specs[0], first.inputs, first.ctx, first.request.memory_gb, specs[1:]
    )
    forget_peak(ctx.device)
    keys: dict[Member, str] = {}
    for turn, spec in zip(turns, specs, strict=True):
        keys[
            Member(spec, Path(turn.request.out), replace(turn.ctx, micro_batch=ctx.micro_batch))
        ] = turn.request.key
    for member, error in run(list(keys), first.inputs["model"], first.inputs["data"]):
        yield (
            keys[member],
            member.seconds,
            error,
            environment(ctx, predicted_gb) if error is None else {},
        )


def described(error: BaseException, log: Path) -> tuple[str, str]:
    """(type, one-line reason) of a failure, fit for reports and W&B.

    The words of a foreign exception may quote a prompt or a completion, so they stay in the
    attempt's log, and the reason says where. A full disk is a type of its own: it is no fault of
    the stage.
    """
    if "No space left on device" in str(error):
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
    if threads is not None:
        import torch  # only a worker has torch; the driver process never imports it

        torch.set_num_threads(threads)
