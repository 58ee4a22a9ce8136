"""The stage kind `measure`: what a defence, or a control, needs of the models beside Safe LoRA's
projection.
"""

from ebbline.tasks.models.brought.work import lora_of
from ebbline.tasks.models.model_work import model_shape
from ebbline.tasks.specs import MeasureSpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load, StageKind, same_kind


def _counted_work(spec: MeasureSpec, stage: Stage) -> Load:
    """The stage reads both models once. Each draw projects once more."""
    lora = lora_of(stage.inputs["adapter"])
    if lora is None:
        return Load()
    shape, settings = model_shape(lora[0]), lora[1]
    pairs = [shape.linears[name] for name in settings.target_modules if name in shape.linears]
    weights = shape.layers * sum(inputs * outputs for inputs, outputs in pairs)
    return Load(
        flops=4 * weights * settings.rank * (1 + spec.draws),
        moved=16 * weights,
        kernels=20 * len(pairs) * shape.layers * (1 + spec.draws),
        read=4 * weights,
        written=4 * sum(shape.adapter(settings)) * (1 + spec.draws),
    )


MEASURE = StageKind(
    MeasureSpec,
    function="ebbline.tasks.defences.computing.stages:run_measure",
    counted_work=_counted_work,
    belongs_to="adapter",
    resident=same_kind,
    alike=("method",),
    colour="0.75",
    shows_key=True,
)
