"""Packed fine-tuning: several adapters are trained at once over one frozen base.

Invariant: each member gets the result of a training of its own, up to rounding. It has its own
clipping, AdamW, schedule, curve and checkpoint. Checkpoint and output have the formats of
`ebbline.tasks.training.train`, so a member may continue alone or in another pack.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ebbline.tasks.data.batches import Row, count_tokens
from ebbline.tasks.errors import Leaving, TrainingError
from ebbline.tasks.models.memory import peak_memory_gb
from ebbline.tasks.progress import TrainedStep
from ebbline.tasks.training.pack_engine import Member, Pack
from ebbline.tasks.training.packs import common, packable
from ebbline.tasks.training.penalties import Contrast
from ebbline.tasks.training.train import (
    batch_indices,
    check_loss,
    known,
    learning_rate,
    read_rows,
    save_adapter,
    steps_of,
    write_curve,
)


def run(
    members: Sequence[Member], model: Path, data: Path, contrast: Contrast | None = None
) -> Iterator[tuple[Member, TrainingError | None]]:
    """Train all members. Yields each member when its files are written, or with its error. A
    penalty asft needs `contrast`.

    The first member's Context gives the device and `micro_batch`, the rows of each member in one
    pass. Raises TrainingError for members that cannot be one pack. Raises Leaving, after all
    members are saved, when the machine is about to go.
    """
    clock = _Clock()
    _check(members)
    pack = Pack(members, model, contrast)
    try:
        rows = read_rows(data, pack.tokenizer, members[0].spec)
        for member in members:
            pack.resume(member)
            steps = member.spec.length(len(rows))
            member.ctx.resumed(steps_of(member.curve, steps))
        clock.tick(members)
        yield from _train(pack, list(members), rows, clock)
    finally:
        pack.close()


def _train(
    pack: Pack, active: list[Member], rows: list[Row], clock: "_Clock"
) -> Iterator[tuple[Member, TrainingError | None]]:
    steps, saved_at = active[0].spec.length(len(rows)), time.monotonic()
    while active:
        for member in [member for member in active if len(member.curve) >= steps]:
            active.remove(member)
            error = _save(pack, member)
            clock.tick([member])
            yield member, error
            clock.pause()
        if not active:
            return
        leaving = pack.ctx.leaving()
        if leaving or time.monotonic() - saved_at >= pack.ctx.checkpoint_every_s:
            for member in active:
                pack.checkpoint(member)
            saved_at = time.monotonic()
            if leaving:
                raise Leaving(
                    "the machine is about to go; step "
                    f"{min(len(member.curve) for member in active)} is saved"
                )
        batches = {member: _batch(member, rows) for member in active}
        losses = pack.backward(batches)
        failed: dict[Member, TrainingError] = {}
        done: dict[Member, TrainedStep] = {}
        for member, loss in losses.items():
            step, rate = len(member.curve), learning_rate(len(member.curve), steps, member.spec)
            try:
                check_loss(loss, step, steps, member.spec)
            except TrainingError as error:  # the other members' rows never use this adapter
                failed[member] = error
                pack.trainees[member.name].forget()
                continue
            norm, tokens = pack.trainees[member.name].update(rate), count_tokens(batches[member])
            member.curve.append((step + 1, loss, rate, tokens))
            done[member] = TrainedStep(
                *(step + 1, steps, loss, rate, tokens),
                gradient_norm=known(norm),
                micro_batch=pack.micro_batch,
                peak_memory_gb=peak_memory_gb(member.ctx.device),
            )
        share_s = clock.tick(active)
        for member, step_done in done.items():
            member.ctx.step_done(replace(step_done, seconds=share_s))
        for member, failure in failed.items():
            active.remove(member)
            yield member, failure
            clock.pause()


def _batch(member: Member, rows: Sequence[Row]) -> list[Row]:
    spec = member.spec
    return [
        rows[index]
        for index in batch_indices(len(member.curve), len(rows), spec.global_batch, spec.seed)
    ]


def _save(pack: Pack, member: Member) -> TrainingError | None:
    pack.trainees[member.name].show_result()
    try:
        save_adapter(pack.model, member.name, member.spec, member.out)
    except TrainingError as error:
        return error
    write_curve(member.curve, member.spec, member.out)
    return None


class _Clock:
    """Divides a pack's time among the members that it is spent on."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def tick(self, members: Sequence[Member]) -> float:
        """Adds the time since the last tick to the members, in equal shares. Returns a share."""
        now = time.monotonic()
        share_s = (now - self._since) / len(members)
        for member in members:
            member.seconds += share_s
        self._since = now
        return share_s

    def pause(self) -> None:
        """Count the time since the last tick for no member: the caller committed one."""
        self._since = time.monotonic()


def _check(members: Sequence[Member]) -> None:
    first = common(members[0].spec)
    for member in members:
        if not packable(member.spec):
            raise TrainingError(
                f"method {member.spec.method!r} with dropout {member.spec.dropout} cannot be "
                "trained in a pack"
            )
        other = common(member.spec)
        different = [
            f"{name} ({first[name]!r} and {other[name]!r})"
            for name in first
            if first[name] != other[name]
        ]
        if different:
            raise TrainingError(
                f"these trainings cannot be one pack: they differ in {', '.join(different)}; "
                "train them separately"
            )
