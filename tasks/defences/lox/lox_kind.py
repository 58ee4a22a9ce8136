"""The stage kind `lox`."""

from ebbline.tasks.models.model_work import model_shape
from ebbline.tasks.specs import LoxSpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load, StageKind, one_gpu


def _counted_work(spec: LoxSpec, stage: Stage) -> Load:
    """The Gram matrix of each weight's smaller side, and its eigenvectors."""
    shape = model_shape(stage.inputs["model"])
    embeddings = [(shape.hidden, shape.vocabulary)] * (1 if shape.tied else 2)
    matrices = [*list(shape.linears.values()) * shape.layers, *embeddings]
    squares = sum(2 * min(pair) ** 2 * max(pair) + 9 * min(pair) ** 3 for pair in matrices)
    return Load(
        flops=squares,
        moved=24 * shape.parameters,
        kernels=20 * len(matrices),
        read=4 * shape.parameters,
        written=2 * shape.parameters,
    )


LOX = StageKind(
    LoxSpec,
    function="ebbline.tasks.defences.lox.extrapolate:run",
    counted_work=_counted_work,
    belongs_to="study",
    gpus=one_gpu,
    colour="0.3",
)
