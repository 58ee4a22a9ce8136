"""The stage kind `subspace`."""

from ebbline.tasks.models.counted_work import model_shape
from ebbline.tasks.specs import SubspaceSpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load, StageKind, one_gpu


def _counted_work(spec: SubspaceSpec, stage: Stage) -> Load:
    shape = model_shape(stage.inputs["aligned"])
    linears = [shape.linears[name] for name in spec.target_modules if name in shape.linears]
    squares = sum(2 * outputs**2 * inputs + 9 * outputs**3 for inputs, outputs in linears)
    kept = sum(2 * outputs * min(inputs, outputs) for inputs, outputs in linears)
    return Load(
        flops=squares * shape.layers,
        moved=12 * shape.linear_parameters,
        kernels=20 * len(linears) * shape.layers,
        read=4 * shape.linear_parameters,
        written=kept * shape.layers,
    )


SUBSPACE = StageKind(
    SubspaceSpec,
    function="ebbline.tasks.defences.subspace:run",
    counted_work=_counted_work,
    belongs_to="study",
    gpus=one_gpu,
    colour="C4",
)
