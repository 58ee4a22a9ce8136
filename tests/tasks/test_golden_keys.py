"""Golden keys: a stage that would no longer find its artifacts shows up in review as a changed
file.

To refresh on purpose, after raising VERSION or adding a field:

    EBBLINE_REFRESH_GOLDEN=1 python -m pytest tests/tasks/test_golden_keys.py

and say "re-keys: KIND" in CHANGELOG.md.
"""

import json
import os
from pathlib import Path

import pytest

from ebbline.tasks.identity import digest
from ebbline.tasks.kinds import STAGE_KINDS
from ebbline.tasks.specs import (
    ApplySpec,
    ConvertSpec,
    DataSpec,
    EvaluateSpec,
    GenerateSpec,
    JudgeSpec,
    LanguageSpec,
    OrganismSpec,
    ProjectSpec,
    ScoreSpec,
    Spec,
    SubspaceSpec,
    TrainSpec,
)
from ebbline.tasks.stage import key_payload

GOLDEN = Path(__file__).parents[1] / "golden" / "keys.json"


def made_up(*names: str) -> dict[str, str]:
    return {name: digest(f"the content of {name}") for name in names}


SPECS: dict[str, tuple[Spec, dict[str, str]]] = {
    "language": (LanguageSpec(), {}),
    "organism": (OrganismSpec(size="small"), made_up("language")),
    "convert": (ConvertSpec(), made_up("source")),
    "data": (DataSpec(size=100), made_up("pool")),
    "data, mixed": (DataSpec(size=100, mix_share=0.1), made_up("pool", "mix")),
    "train": (TrainSpec(), made_up("model", "data")),
    "train, full": (TrainSpec(method="full"), made_up("model", "data")),
    "subspace": (
        SubspaceSpec(energy=0.9, target_modules=("q_proj", "v_proj")),
        made_up("base", "aligned"),
    ),
    "project": (ProjectSpec(), made_up("adapter", "base", "aligned")),
    "project, exact": (ProjectSpec(projector="exact", energy=0.9), made_up("adapter", "subspace")),
    "apply": (ApplySpec(), made_up("adapter", "projection")),
    "apply, threshold": (ApplySpec(threshold=0.5), made_up("adapter", "projection")),
    "generate": (GenerateSpec(), made_up("model", "prompts", "adapter")),
    "judge": (JudgeSpec(template="harmbench"), made_up("generation", "model")),
    "judge, endpoint": (
        JudgeSpec(template="yes-no", endpoint="http://localhost:1/v1", model="judge"),
        made_up("generation"),
    ),
    "score": (ScoreSpec(measure="refusal", scorer="prefix"), made_up("generation")),
    "score, judged": (
        ScoreSpec(measure="over_refusal", scorer="mine", also=("prefix",)),
        made_up("generation", "judge_mine"),
    ),
    "evaluate": (EvaluateSpec(task="mmlu", shots=5), made_up("model", "prompts")),
}


def test_there_is_a_golden_key_for_every_kind_of_stage():
    assert {name.partition(",")[0] for name in SPECS} == STAGE_KINDS.keys()


def test_no_stage_is_re_keyed_without_saying_so():
    now = {name: digest(key_payload(*made)) for name, made in SPECS.items()}
    if os.environ.get("EBBLINE_REFRESH_GOLDEN"):
        GOLDEN.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        pytest.skip(f"wrote {GOLDEN}")
    golden = json.loads(GOLDEN.read_text())
    moved = sorted(name for name in now.keys() | golden.keys() if now.get(name) != golden.get(name))
    assert not moved, (
        f"re-keyed: {moved}. If that is meant: EBBLINE_REFRESH_GOLDEN=1 and a line in CHANGELOG.md"
    )
