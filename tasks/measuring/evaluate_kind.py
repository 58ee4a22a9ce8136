"""The stage kind `evaluate`."""

import math

from ebbline.tasks.data.rows import rows_of
from ebbline.tasks.models.model_work import (
    forward_flops,
    layer_kernels,
    model_shape,
    weights,
)
from ebbline.tasks.models.sizes import TASK_ITEMS, TASK_SUBJECTS
from ebbline.tasks.specs import EvaluateSpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load, StageKind, model_in_memory, one_gpu


def _counted_work(spec: EvaluateSpec, stage: Stage) -> Load:
    """An item is one pass over its shots and question. Tasks whose four choices are sentences need
    four passes over the question.
    """
    shape = model_shape(stage.inputs["model"])
    rows, tokens = rows_of(stage.inputs["prompts"])
    rows = TASK_ITEMS.get(spec.task.partition("_")[0], rows)
    rows = min(rows, spec.limit * TASK_SUBJECTS.get(spec.task, 1) if spec.limit else rows)
    read = rows * tokens * ((1 + spec.shots) if "mmlu" in spec.task else (4 + spec.shots))
    batch = 1 if spec.quantisation == "int8" else spec.batch_size
    passes = math.ceil(4 * rows / batch)
    return Load(
        flops=forward_flops(shape, read, tokens * (1 + spec.shots)),
        moved=passes * weights(shape, spec.quantisation, spec.dtype),
        kernels=passes * shape.layers * layer_kernels(shape, spec.quantisation),
        read=2 * shape.parameters,
        written=300 * rows,
        tokens=read,
    )


EVALUATE = StageKind(
    EvaluateSpec,
    function="ebbline.tasks.measuring.evaluate:run",
    counted_work=_counted_work,
    belongs_to="point",
    gpus=one_gpu,
    resident=lambda spec, stage: model_in_memory(
        stage, spec.quantisation, spec.dtype, spec.backend
    ),
    alike=("task", "shots", "quantisation", "dtype", "backend"),
    nearer=("limit",),
    has_metrics=True,
    colour="C2",
)
