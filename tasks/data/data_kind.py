"""The stage kind `data`."""

from ebbline.tasks.data.rows import TEXT_BYTES, rows_of
from ebbline.tasks.specs import DataSpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load, StageKind


def _counted_work(spec: DataSpec, stage: Stage) -> Load:
    size = spec.size * TEXT_BYTES * rows_of(stage.inputs["pool"])[1]
    return Load(kernels=spec.size, read=10 * size, written=size)


DATA = StageKind(
    DataSpec,
    function="ebbline.tasks.data.conversations:run",
    counted_work=_counted_work,
    belongs_to="training",
)
