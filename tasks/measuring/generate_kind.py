"""The stage kind `generate`."""

from ebbline.tasks.data.rows import ROW_TOKENS, ROWS, rows_of
from ebbline.tasks.models.model_work import generation, model_shape
from ebbline.tasks.specs import GenerateSpec
from ebbline.tasks.stage import Input, Stage, stage_of
from ebbline.tasks.stage_kind import Load, StageKind, model_in_memory, one_gpu


def prompts_of(spec: GenerateSpec, prompts: Input) -> tuple[int, int]:
    """(prompts that a generation uses, tokens of one prompt)."""
    rows, tokens = rows_of(prompts)
    if spec.split is not None:
        held_out = int(rows * spec.split.hold_out)
        rows = max(1, held_out if spec.split.side == "confirm" else rows - held_out)
    rows = min(rows, spec.limit or rows)
    if spec.block is not None:
        rows = max(1, min(spec.block.size, rows - spec.block.index * spec.block.size))
    return rows, min(tokens, spec.max_tokens)


def completions_of(item: Input) -> tuple[int, int]:
    """(completions, tokens of one with its prompt) of the generation that a stage reads."""
    stage = stage_of(item)
    if stage is None or not isinstance(stage.spec, GenerateSpec):
        return ROWS, ROW_TOKENS
    rows, tokens = prompts_of(stage.spec, stage.inputs["prompts"])
    return rows, tokens + stage.spec.max_new_tokens


def _counted_work(spec: GenerateSpec, stage: Stage) -> Load:
    rows, tokens = prompts_of(spec, stage.inputs["prompts"])
    shape = model_shape(stage.inputs["model"])
    return generation(
        shape,
        spec.quantisation,
        spec.dtype,
        rows,
        tokens,
        spec.max_new_tokens,
        spec.batch_size,
    )


GENERATE = StageKind(
    GenerateSpec,
    function="ebbline.tasks.measuring.backends:run",
    counted_work=_counted_work,
    belongs_to="point",
    gpus=one_gpu,
    resident=lambda spec, stage: model_in_memory(
        stage, spec.quantisation, spec.dtype, spec.backend
    ),
    alike=("quantisation", "dtype", "backend", "batch_size"),
    nearer=("label", "needs_answer", "max_new_tokens", "limit"),
    colour="C0",
)
