"""What a reader of a study must know of its adapters beside their numbers: that one changes
nothing, or that a tokenizer saved beside one was not used.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from ebbline.analysis.results.frontier import shortlist
from ebbline.analysis.results.measurements import is_defended
from ebbline.sweeps.study.points import Result, keys_of
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.measuring.completions import adapter_changes_nothing, unused_beside_adapter
from ebbline.tasks.specs import EvaluateSpec, GenerateSpec


def adapter_notes(view: StudyView, results: Sequence[Result]) -> list[str]:
    """A sentence for each finding, with the points that it concerns. Of many points, those of the
    shortlist are read. A defence may make an update zero, so defended points are left out.
    """
    points: dict[str, dict[int, None]] = defaultdict(dict)
    for result in shortlist(results, view.study.objectives):
        for record in _records(view, result):
            if adapter_changes_nothing(record) and not is_defended(result):
                points[
                    "every update B A of the adapter is zero, so the rates are those of the "
                    "model without it. Was it trained?"
                ][result.number] = None
            if unused := unused_beside_adapter(record):
                points[
                    "the tokenizer beside the adapter differs from the model's in "
                    f"{', '.join(unused)}, and was not used"
                ][result.number] = None
    return [f"{_points(list(numbers))}: {text}" for text, numbers in points.items()]


def _records(view: StudyView, result: Result) -> Iterator[dict[str, Any]]:
    """What one measurement for each seed of a point recorded of its prompts and adapter."""
    study, store = view.study, view.home.store
    for seed in study.seeds:
        for suite in study.suites:
            kind = study.kind_of(suite)
            part = suite if kind == EvaluateSpec.KIND else f"{GenerateSpec.KIND}:{suite}"
            keys = keys_of(result.keys, part, seed)
            artifact = store.find(study.kind_of(part), keys[0]) if keys else None
            if artifact is not None:
                yield json.loads(artifact.file(GenerateSpec.PROMPTS).read_text("utf-8"))
                break


def _points(numbers: Sequence[int]) -> str:
    names = ", ".join(map(str, numbers[:10]))
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"Point{'s' if len(numbers) > 1 else ''} {names}{more}"
