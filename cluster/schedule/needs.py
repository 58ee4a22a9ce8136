"""What a stage needs of the cluster, by its kind: GPUs, and what has to be in memory. A study may
say more (ebbline.sweeps.study.stages).
"""

from ebbline.cluster.executors.executor import Needs
from ebbline.tasks.specs import (
    ApplySpec,
    EvaluateSpec,
    GenerateSpec,
    JudgeSpec,
    OrganismSpec,
    ProjectSpec,
    ScoreSpec,
    SubspaceSpec,
    TrainSpec,
)
from ebbline.tasks.stage import Stage


def default_needs(stage: Stage) -> Needs:
    """One GPU for stages that run a model or factorise its weights, none for those that move rows
    and tensors.
    """
    if isinstance(stage.spec, JudgeSpec):
        return Needs(int(stage.spec.endpoint is None))
    return Needs(
        int(
            isinstance(
                stage.spec, OrganismSpec | TrainSpec | SubspaceSpec | GenerateSpec | EvaluateSpec
            )
        )
    )


def resident(stage: Stage) -> str:
    """What a stage needs in memory: stages with the same answer belong in one batch."""
    spec = stage.spec
    if isinstance(spec, JudgeSpec) and spec.endpoint is not None:
        return spec.endpoint
    if isinstance(spec, TrainSpec) and spec.method == "full":
        return stage.lineage  # it trains a copy of its own
    if isinstance(spec, TrainSpec | GenerateSpec | JudgeSpec | EvaluateSpec):
        return f"{stage.inputs['model'].lineage}/{spec.quantisation}/{spec.dtype}"
    if isinstance(spec, ApplySpec | ProjectSpec | ScoreSpec):
        return spec.KIND
    return stage.lineage
