"""The stage kind `organism`."""

import math

from ebbline.tasks.data.rows import LANGUAGE_TOKENS
from ebbline.tasks.models.counted_work import KERNELS, training_passes
from ebbline.tasks.models.sizes import PRETRAINING_ROWS, SIZES, organism_shape
from ebbline.tasks.specs import OrganismSpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load, StageKind, one_gpu


def _counted_work(spec: OrganismSpec, stage: Stage) -> Load:
    own, shape = SIZES[spec.size], organism_shape(spec.size)
    return training_passes(
        shape,
        steps=own.epochs * math.ceil(PRETRAINING_ROWS / own.batch),
        tokens=own.batch * LANGUAGE_TOKENS,
        weight_bytes=4 * shape.parameters,
        kernels=KERNELS,
        written=4 * shape.parameters,
    )


ORGANISM = StageKind(
    OrganismSpec,
    function="ebbline.tasks.models.organism:run",
    counted_work=_counted_work,
    belongs_to="study",
    gpus=one_gpu,
    alike=("size",),
    colour="0.45",
)
