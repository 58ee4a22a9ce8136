"""The stage kind `judge`."""

from ebbline.tasks.data.rows import ROW_TOKENS
from ebbline.tasks.judges.facts import JUDGES
from ebbline.tasks.measuring.generate_kind import completions_of
from ebbline.tasks.models.model_work import generation, model_shape
from ebbline.tasks.specs import JudgeSpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load, StageKind, model_in_memory

ANSWER_S = 0.05  # an endpoint's time for one verdict, with several requests in flight


def _gpus(spec: JudgeSpec) -> int:
    return int(spec.endpoint is None)


def _resident(spec: JudgeSpec, stage: Stage) -> str:
    if spec.endpoint is not None:
        return spec.endpoint
    return model_in_memory(stage, spec.quantisation, spec.dtype)


def _counted_work(spec: JudgeSpec, stage: Stage) -> Load:
    rows, tokens = completions_of(stage.inputs["generation"])
    if spec.endpoint is not None:
        return Load(waits_s=ANSWER_S * rows, written=100 * rows, tokens=rows * tokens)
    new = 1 if spec.template == "classifier" else spec.max_new_tokens
    shape = model_shape(stage.inputs["model"])
    return generation(
        shape,
        spec.quantisation,
        spec.dtype,
        rows * JUDGES[spec.template].asks,
        tokens + ROW_TOKENS,
        new,
        spec.batch_size,
    )


JUDGE = StageKind(
    JudgeSpec,
    function="ebbline.tasks.measuring.judge:run",
    counted_work=_counted_work,
    belongs_to="point",
    gpus=_gpus,
    resident=_resident,
    alike=("template", "endpoint", "quantisation"),
    colour="C5",
)
