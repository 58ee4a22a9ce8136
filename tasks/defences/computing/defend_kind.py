"""The stage kind `defend`."""

from ebbline.tasks.models.brought.work import lora_of
from ebbline.tasks.models.model_work import model_shape
from ebbline.tasks.specs import DefendSpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load, StageKind, same_kind


def _counted_work(spec: DefendSpec, stage: Stage) -> Load:
    """The stage reads an adapter and what was measured of it, and writes an adapter."""
    lora = lora_of(stage.inputs["adapter"])
    if lora is None:
        return Load()
    adapter = sum(model_shape(lora[0]).adapter(lora[1]))
    return Load(moved=16 * adapter, read=8 * adapter, written=4 * adapter)


DEFEND = StageKind(
    DefendSpec,
    function="ebbline.tasks.defences.computing.stages:run_defend",
    counted_work=_counted_work,
    belongs_to="point",
    resident=same_kind,
    alike=("method",),
    writes_adapter=True,
    shows_key=True,
)
