"""The default needs of a stage by its kind: GPUs, and the model in memory. A study may set more
(ebbline.sweeps.study.stages).
"""

from ebbline.cluster.executors.executor import Needs
from ebbline.tasks.kinds import kind_named
from ebbline.tasks.stage import Stage


def default_needs(stage: Stage) -> Needs:
    """The needs of a stage without settings in the study: its kind's GPUs."""
    return Needs(kind_named(stage.kind).gpus(stage.spec))


def resident(stage: Stage) -> str:
    """The name of what a stage needs in memory. Stages with equal names can form a batch."""
    return kind_named(stage.kind).resident(stage.spec, stage)
