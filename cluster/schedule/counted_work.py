"""The work of a stage (FLOPs, bytes, kernels), counted from its settings and its model's shape, and
the time that it takes on a machine.

Invariant: the same study file gives the same numbers on any machine. Measured times differ from
them by a factor, which ebbline.cluster.schedule.estimates learns from the store. Each stage kind
counts its own work. The formulas are in docs/costs.md.
"""

from dataclasses import dataclass

from ebbline.tasks.kinds import kind_named
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load

STAGE_S = 0.01  # the least time of a stage, because it opens files


@dataclass(frozen=True)
class Machine:
    """The rates of one GPU, or of one core for logical GPUs, that training and generation achieve:
    FLOP/s, bytes/s of memory (`moved`), kernel launches/s, and bytes/s of disk.
    """

    flops: float
    moved: float
    kernels: float
    disk: float = 1e9


# Keys are Ray's accelerator types; None is a CPU core. The GPU rates are 40% of the dense bfloat16
# rate and 70% of the memory bandwidth in the data sheet.
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
    """The machine of a GPU type: `A100-80G` is an A100, and an unknown type the nominal machine."""
    return (
        MACHINES.get(gpu_type)
        or MACHINES.get((gpu_type or "").partition("-")[0])
        or MACHINES[NOMINAL]
    )


def seconds_on(machine: Machine, load: Load, gpus: int = 1) -> float:
    """The seconds of a load on a number of GPUs, by the machine's rates alone (docs/costs.md)."""
    computing = max(load.flops / machine.flops, load.moved / machine.moved) / max(1, gpus)
    return (
        STAGE_S
        + computing
        + load.kernels / machine.kernels
        + (load.read + load.written) / machine.disk
        + load.waits_s
    )


def work_of(stage: Stage) -> float:
    """GPU-seconds of a stage on the nominal machine (seconds for a stage without a GPU). Positive,
    and a function of the stage alone.
    """
    return seconds_on(MACHINES[NOMINAL], load_of(stage))


def load_of(stage: Stage) -> Load:
    """The work of a stage. Data sets that cannot be read count as ROWS rows. The size of a hub
    model is read from its name.
    """
    return kind_named(stage.kind).counted_work(stage.spec, stage)
