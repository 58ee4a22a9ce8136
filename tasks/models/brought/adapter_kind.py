"""The stage kind `adapter`."""

from ebbline.tasks.models.brought.work import lora_of
from ebbline.tasks.models.model_work import model_shape
from ebbline.tasks.specs import AdapterSpec
from ebbline.tasks.stage import Part, Stage
from ebbline.tasks.stage_kind import Load, StageKind, same_kind


def _counted_work(spec: AdapterSpec, stage: Stage) -> Load:
    """The stage reads and writes an adapter."""
    lora = lora_of(Part(stage, spec.ADAPTER))
    if lora is None:
        return Load()
    elements = sum(model_shape(lora[0]).adapter(lora[1]))
    return Load(moved=8 * elements, read=4 * elements, written=4 * elements)


ADAPTER = StageKind(
    AdapterSpec,
    function="ebbline.tasks.models.brought.adopt:run",
    counted_work=_counted_work,
    belongs_to="training",
    resident=same_kind,
    writes_adapter=True,
    shows_key=True,
)
