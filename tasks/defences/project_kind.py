"""The stage kind `project`."""

from ebbline.tasks.models.brought.work import lora_of
from ebbline.tasks.models.model_work import model_shape
from ebbline.tasks.specs import ProjectSpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load, StageKind, same_kind


def _counted_work(spec: ProjectSpec, stage: Stage) -> Load:
    """The stage reads both models once, and writes C.B."""
    lora = lora_of(stage.inputs["adapter"])
    if lora is None or len(stage.inputs) == 1:
        return Load()
    shape, settings = model_shape(lora[0]), lora[1]
    pairs = [shape.linears[name] for name in settings.target_modules if name in shape.linears]
    weights = shape.layers * sum(inputs * outputs for inputs, outputs in pairs)
    return Load(
        flops=4 * weights * settings.rank,
        moved=16 * weights,
        kernels=20 * len(pairs) * shape.layers,
        read=4 * weights,
        written=4 * sum(shape.adapter(settings)),
    )


PROJECT = StageKind(
    ProjectSpec,
    function="ebbline.tasks.defences.project:run_project",
    counted_work=_counted_work,
    belongs_to="adapter",
    resident=same_kind,
    alike=("projector",),
    colour="C3",
    shows_key=True,
)
