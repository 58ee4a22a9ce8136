"""Every stage kind by its name, in the order in which a point runs them. Tables use this order.

To add a kind, write its record (`ebbline.tasks.stage_kind`) and add one line to the tuple below;
docs/adding-a-stage-kind.md shows how. No torch.
"""

import json
from collections.abc import Mapping
from typing import Any

from ebbline.tasks.data.data_kind import DATA
from ebbline.tasks.data.language_kind import LANGUAGE
from ebbline.tasks.defences.apply_kind import APPLY
from ebbline.tasks.defences.computing.defend_kind import DEFEND
from ebbline.tasks.defences.computing.measure_kind import MEASURE
from ebbline.tasks.defences.lox.lox_kind import LOX
from ebbline.tasks.defences.project_kind import PROJECT
from ebbline.tasks.defences.subspace_kind import SUBSPACE
from ebbline.tasks.errors import StudyError
from ebbline.tasks.measuring.evaluate_kind import EVALUATE
from ebbline.tasks.measuring.generate_kind import GENERATE
from ebbline.tasks.measuring.judge_kind import JUDGE
from ebbline.tasks.measuring.score_kind import SCORE
from ebbline.tasks.models.brought.adapter_kind import ADAPTER
from ebbline.tasks.models.convert_kind import CONVERT
from ebbline.tasks.models.organism_kind import ORGANISM
from ebbline.tasks.specs import Spec
from ebbline.tasks.stage import Request, key_payload
from ebbline.tasks.stage_kind import StageKind, no_gpu
from ebbline.tasks.training.train_kind import TRAIN

STAGE_KINDS: Mapping[str, StageKind[Any]] = {
    kind.name: kind
    for kind in (
        LANGUAGE,
        CONVERT,
        ORGANISM,
        DATA,
        LOX,
        TRAIN,
        ADAPTER,
        SUBSPACE,
        PROJECT,
        APPLY,
        MEASURE,
        DEFEND,
        GENERATE,
        JUDGE,
        SCORE,
        EVALUATE,
    )
}


def kind_named(name: str) -> StageKind[Any]:
    """The kind of that name. Raises StudyError if this version has no such kind."""
    if name not in STAGE_KINDS:
        raise StudyError(f"no stage kind {name!r}; this version knows {sorted(STAGE_KINDS)}")
    return STAGE_KINDS[name]


def import_kinds_without_gpu() -> None:
    """Import the functions of the kinds that run without a GPU for each adapter or point, and torch
    with some of them. A study has fewer stages of the others, and two of these import transformers.
    """
    for kind in STAGE_KINDS.values():
        if kind.gpus is no_gpu and kind.belongs_to in ("adapter", "point"):
            kind.load_function()


def parsed_spec(request: Request) -> Spec:
    """The request's Spec, validated."""
    spec: Spec = kind_named(request.kind).spec.model_validate_json(json.dumps(dict(request.spec)))
    return spec


def request_payload(request: Request) -> dict[str, Any]:
    """The value that the request's key hashes."""
    return key_payload(parsed_spec(request), request.contents)
