"""The steps of trainings, as their workers wrote them (ebbline.tasks.progress): of one at work
those so far, of one that ended all of its curve.

The log of an attempt is no part of its result, and nothing waits until it is on the disk. So the
curve says which steps there are, and the log what else is known of them.
"""

import csv

from ebbline.cluster.store.artifacts import Artifact, Store
from ebbline.tasks.progress import STEPS, TrainedStep, read_steps
from ebbline.tasks.specs import TrainSpec


def steps_so_far(store: Store, attempt: str) -> list[TrainedStep]:
    """The steps that an attempt has written. `attempt` is its folder below the store; empty for
    none.
    """
    return list(read_steps(store.log(store.root / attempt, STEPS) or b"")) if attempt else []


def steps_of(training: Artifact) -> list[TrainedStep]:
    """Every step of a training that ended. Raises StoreError when its curve was dropped or differs
    from its record.
    """
    with training.file(TrainSpec.CURVE).open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    log = training.store.log(training.folder, STEPS) or b""
    known = {step.step: step for step in read_steps(log)}
    return [
        known.get(
            int(row["step"]),
            TrainedStep(
                int(row["step"]),
                len(rows),
                float(row["loss"]),
                float(row["learning_rate"]),
                int(row["tokens"]),
            ),
        )
        for row in rows
    ]
