"""What a stage needs of the cluster, by its kind: GPUs, and what has to be in memory. A study may
say more (ebbline.sweeps.study.stages).
"""

from ebbline.cluster.executors.executor import Needs
from ebbline.tasks.kinds import kind_named
from ebbline.tasks.stage import Stage


def default_needs(stage: Stage) -> Needs:
    """The GPUs that a stage of this kind needs when nothing says otherwise."""
    return Needs(kind_named(stage.kind).gpus(stage.spec))


def resident(stage: Stage) -> str:
    """What a stage needs in memory: stages with the same answer belong in one batch."""
    return kind_named(stage.kind).resident(stage.spec, stage)
