"""What a stage has a machine do, counted from its settings and its model's shape: FLOPs, bytes,
tokens. And how long that would take.

Deterministic, and without torch: the same study file gives the same numbers on any machine. They
are right up to a factor, which `ebbline.cluster.schedule.costs` learns from what the store has
measured. The record of each stage kind counts its work; docs/costs.md has the formulas.
"""

from dataclasses import dataclass

from ebbline.tasks.kinds import kind_named
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load

STAGE_S = 0.01  # no stage takes less: it opens files


@dataclass(frozen=True)
class Machine:
    """What one GPU (or one core, for logical GPUs) does in a second, as training and generating use
    it; not its data sheet.
    """

    flops: float
    moved: float
    kernels: float
    disk: float = 1e9


# By Ray's names of accelerators: 40% of the dense bfloat16 rate, 70% of the memory bandwidth. None
# is a core.
MACHINES: dict[str | None, Machine] = {
    None: Machine(5e10, 1e10, 5e4),
    "T4": Machine(2.6e13, 2.2e11, 1e5),
    "V100": Machine(5e13, 6.3e11, 1e5),
    "L4": Machine(4.8e13, 2.1e11, 1e5),
    "A10G": Machine(2.8e13, 4.2e11, 1e5),
    "L40S": Machine(1.45e14, 6e11, 1e5),
    "A100": Machine(1.25e14, 1.4e12, 1e5),
    "H100": Machine(4e14, 2.3e12, 1.5e5),
    "H200": Machine(4e14, 3.4e12, 1.5e5),
    "B200": Machine(9e14, 5.6e12, 1.5e5),
}
NOMINAL = "A100"


def machine_of(gpu_type: str | None) -> Machine:
    """The machine of a type; of `A100-80G` that of A100, and the nominal one for a type that is not
    known.
    """
    return (
        MACHINES.get(gpu_type)
        or MACHINES.get((gpu_type or "").partition("-")[0])
        or MACHINES[NOMINAL]
    )


def seconds_on(machine: Machine, load: Load, gpus: int = 1) -> float:
    """How long a load would take on so many of a machine, if nothing were known but its rates."""
    computing = max(load.flops / machine.flops, load.moved / machine.moved) / max(1, gpus)
    return (
        STAGE_S
        + computing
        + load.kernels / machine.kernels
        + (load.read + load.written) / machine.disk
        + load.waits_s
    )


def work_of(stage: Stage) -> float:
    """GPU-seconds of a stage on a nominal machine; of a stage without a GPU, seconds. Above zero,
    and a function of the stage alone.
    """
    return seconds_on(MACHINES[NOMINAL], load_of(stage))


def load_of(stage: Stage) -> Load:
    """The work of a stage. Sets that cannot be looked into have ROWS rows; a model from the hub
    goes by the number in its name.
    """
    return kind_named(stage.kind).counted_work(stage.spec, stage)
