"""The curves of trainings for the live page: of one at work the steps so far, else all of them."""

from collections.abc import Sequence
from typing import Any

from ebbline.cluster.store.artifacts import Artifact, Store
from ebbline.sweeps.drive.curves import steps_of, steps_so_far
from ebbline.tasks.errors import StoreError
from ebbline.tasks.progress import TrainedStep

MOST_STEPS = 1000  # most steps shown of a training's curve
SHOWN = ("loss", "learning_rate", "gradient_norm", "tokens_per_s", "peak_memory_gb")


def running_curve(store: Store, attempt: str) -> dict[str, Any]:
    """The steps so far of an attempt, which is a folder below the store."""
    steps = steps_so_far(store, attempt)
    note = f"runs; {len(steps)} of {steps[-1].steps} steps" if steps else "has reported no step yet"
    return _curve(steps, note, ended=False)


def ended_curve(training: Artifact) -> dict[str, Any]:
    """All steps of a training that ended, thinned to MOST_STEPS."""
    try:
        steps = steps_of(training)
    except (OSError, ValueError, KeyError, StoreError) as error:
        why = f"has ended; its curve cannot be read ({type(error).__name__})"
        return _curve([], why, ended=True)
    provenance = training.provenance
    device, seconds = provenance.get("device", "an unknown device"), provenance.get("seconds", 0)
    return _curve(steps, f"{len(steps)} steps on {device}, {float(seconds):.0f} s", ended=True)


def _curve(steps: Sequence[TrainedStep], note: str, ended: bool) -> dict[str, Any]:
    """A value that is not known is null: a step of an earlier attempt has its loss alone."""
    every = max(1, -(-len(steps) // MOST_STEPS))
    shown = [
        step for index, step in enumerate(steps) if index % every == 0 or index == len(steps) - 1
    ]
    return {
        "steps": [step.step for step in shown],
        "values": {name: [getattr(step, name) for step in shown] for name in SHOWN},
        "note": note + (f"; every {every}th is shown" if every > 1 else ""),
        "ended": ended,
    }
