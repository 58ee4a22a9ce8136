"""The stage kind `language`."""

from ebbline.tasks.specs import LanguageSpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load, StageKind


def _counted_work(spec: LanguageSpec, stage: Stage) -> Load:
    return Load(kernels=2e4, written=1.5e6)


LANGUAGE = StageKind(
    LanguageSpec,
    function="ebbline.tasks.data.language:run",
    counted_work=_counted_work,
    belongs_to="study",
)
