"""The default needs of a stage by its kind, and what its batch shares. A study may set more
(ebbline.sweeps.study.stages).
"""

from ebbline.cluster.executors.executor import Needs
from ebbline.tasks.kinds import kind_named
from ebbline.tasks.stage import Stage


def default_needs(stage: Stage) -> Needs:
    """The needs of a stage without settings in the study: its kind's GPUs."""
    return Needs(kind_named(stage.kind).gpus(stage.spec))


def resident(stage: Stage) -> str:
    """The name of what the stages of a batch share: a model in memory, or their kind. Stages with
    equal names can form a batch.
    """
    return kind_named(stage.kind).resident(stage.spec, stage)
