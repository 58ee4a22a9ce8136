"""The stage kind `apply`; its function is `run_apply` in project.py."""

from ebbline.tasks.models.brought.work import lora_of
from ebbline.tasks.models.model_work import model_shape
from ebbline.tasks.specs import ApplySpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load, StageKind, same_kind


def _counted_work(spec: ApplySpec, stage: Stage) -> Load:
    """The stage copies an adapter."""
    lora = lora_of(stage.inputs["adapter"])
    if lora is None:
        return Load()
    adapter = sum(model_shape(lora[0]).adapter(lora[1]))
    return Load(moved=8 * adapter, read=8 * adapter, written=4 * adapter)


APPLY = StageKind(
    ApplySpec,
    function="ebbline.tasks.defences.project:run_apply",
    counted_work=_counted_work,
    belongs_to="point",
    resident=same_kind,
    writes_adapter=True,
    shows_key=True,
)
