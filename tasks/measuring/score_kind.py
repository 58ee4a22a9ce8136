"""The stage kind `score`."""

from ebbline.tasks.measuring.generate_kind import completions_of
from ebbline.tasks.specs import ScoreSpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load, StageKind, same_kind


def _counted_work(spec: ScoreSpec, stage: Stage) -> Load:
    rows, _ = completions_of(stage.inputs["generation"])
    return Load(kernels=rows * (1 + len(spec.also)), written=200 * rows)


SCORE = StageKind(
    ScoreSpec,
    function="ebbline.tasks.measuring.score:run",
    counted_work=_counted_work,
    belongs_to="point",
    resident=same_kind,
    has_metrics=True,
    follows_its_input=True,
)
