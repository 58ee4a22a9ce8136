"""The stage kind `convert`."""

from ebbline.tasks.models.counted_work import model_shape, width
from ebbline.tasks.specs import ConvertSpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load, StageKind


def _counted_work(spec: ConvertSpec, stage: Stage) -> Load:
    parameters = model_shape(stage.inputs["source"]).parameters
    return Load(moved=16 * parameters, read=parameters, written=width(spec.dtype) * parameters)


CONVERT = StageKind(
    ConvertSpec,
    function="ebbline.tasks.models.convert:run",
    counted_work=_counted_work,
    belongs_to="study",
    colour="0.6",
)
