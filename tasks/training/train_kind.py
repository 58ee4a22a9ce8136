"""The stage kind `train`."""

from dataclasses import replace

from ebbline.tasks.data.rows import rows_of
from ebbline.tasks.models.memory import Shape, alignment_elements
from ebbline.tasks.models.model_work import (
    KERNELS,
    KERNELS_A_LINEAR,
    model_shape,
    training_passes,
    weights,
)
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load, StageKind, model_in_memory, nothing_shared, one_gpu


def _resident(spec: TrainSpec, stage: Stage) -> str:
    if spec.method == "full":
        return nothing_shared(spec, stage)  # full fine-tuning loads its own copy
    return model_in_memory(stage, spec.quantisation, spec.dtype)


def _counted_work(spec: TrainSpec, stage: Stage) -> Load:
    shape = model_shape(stage.inputs["model"])
    rows, row_tokens = rows_of(stage.inputs["data"])
    steps = spec.length(rows)
    tokens = spec.global_batch * min(row_tokens, spec.max_tokens)
    if spec.method == "full":
        return training_passes(
            shape,
            steps,
            tokens,
            weight_bytes=4 * shape.parameters,
            kernels=KERNELS,
            written=4 * shape.parameters,  # float32, whatever `dtype` is
        )
    adapter = sum(shape.adapter(spec))
    quantised = len(shape.linears) if spec.quantisation != "none" else 0
    # Forward, backward through the frozen weights, and the recomputed forward of gradient
    # checkpointing.
    base = training_passes(
        shape,
        steps,
        tokens,
        weights(shape, spec.quantisation, spec.dtype),
        KERNELS + KERNELS_A_LINEAR * (len(spec.target_modules) + quantised),
        written=4 * adapter,
    )
    trained = replace(base, flops=base.flops + 6 * adapter * steps * tokens)
    return _penalised(trained, spec, shape, steps) if spec.penalised else trained


def _penalised(load: Load, spec: TrainSpec, shape: Shape, steps: float) -> Load:
    """With the work of a penalty: for AsFT's, two products with V and their gradients, each step,
    and one read of both models.
    """
    kernels = 12 * shape.layers * len(spec.target_modules)
    if not spec.reads_alignment:
        return replace(load, kernels=load.kernels + steps * kernels)
    elements = alignment_elements(shape, spec)
    return replace(
        load,
        flops=load.flops + 8 * elements * spec.rank * steps,
        # V is widened to float32 once, and read four times
        moved=load.moved + 22 * elements * steps,
        kernels=load.kernels + 2 * steps * kernels,
        read=load.read + 4 * elements,
    )


TRAIN = StageKind(
    TrainSpec,
    function="ebbline.tasks.training.train:run",
    counted_work=_counted_work,
    belongs_to="training",
    gpus=one_gpu,
    resident=_resident,
    alike=("method", "quantisation", "dtype"),
    nearer=("max_tokens", "global_batch", "target_modules", "penalty"),
    writes_adapter=True,
    colour="C1",
    shows_key=True,
)
