"""Golden keys: when a stage would no longer find its artifacts, review shows a changed file.

To refresh on purpose, after raising VERSION or adding a field:

    EBBLINE_REFRESH_GOLDEN=1 python -m pytest tests/tasks/test_golden_keys.py

and write "re-keys: KIND" in CHANGELOG.md.
"""

import json
import os
from pathlib import Path

import pytest

from ebbline.tasks.identity import digest
from ebbline.tasks.kinds import STAGE_KINDS
from ebbline.tasks.specs import (
    AdapterSpec,
    ApplySpec,
    ConvertSpec,
    DataSpec,
    DefendSpec,
    EvaluateSpec,
    GenerateSpec,
    JudgeSpec,
    LanguageSpec,
    LoxSpec,
    MeasureSpec,
    OrganismSpec,
    ProjectSpec,
    ScoreSpec,
    Spec,
    SubspaceSpec,
    TrainSpec,
)
from ebbline.tasks.stage import key_payload

GOLDEN = Path(__file__).parents[1] / "golden" / "keys.json"


def invented_contents(*names: str) -> dict[str, str]:
    return {name: digest(f"the content of {name}") for name in names}


SPECS: dict[str, tuple[Spec, dict[str, str]]] = {
    "language": (LanguageSpec(), {}),
    "organism": (OrganismSpec(size="small"), invented_contents("language")),
    "convert": (ConvertSpec(), invented_contents("source")),
    "data": (DataSpec(size=100), invented_contents("pool")),
    "data, mixed": (DataSpec(size=100, mix_share=0.1), invented_contents("pool", "mix")),
    "train": (TrainSpec(), invented_contents("model", "data")),
    "train, full": (TrainSpec(method="full"), invented_contents("model", "data")),
    "train, asft": (
        TrainSpec(penalty="asft", penalty_weight=0.1, ema_decay=0.9),
        invented_contents("model", "data", "base", "aligned"),
    ),
    "train, norm": (TrainSpec(penalty="norm"), invented_contents("model", "data")),
    "lox": (LoxSpec(factor=1.25), invented_contents("model", "base")),
    "adapter": (AdapterSpec(), invented_contents("source", "model")),
    "subspace": (
        SubspaceSpec(energy=0.9, target_modules=("q_proj", "v_proj")),
        invented_contents("base", "aligned"),
    ),
    "project": (ProjectSpec(), invented_contents("adapter", "base", "aligned")),
    "project, exact": (
        ProjectSpec(projector="exact", energy=0.9),
        invented_contents("adapter", "subspace"),
    ),
    "apply": (ApplySpec(), invented_contents("adapter", "projection")),
    "apply, threshold": (ApplySpec(threshold=0.5), invented_contents("adapter", "projection")),
    "measure": (
        MeasureSpec(method="subspace_removal", knobs={"k": 8}),
        invented_contents("adapter", "base", "aligned"),
    ),
    "measure, draws": (
        MeasureSpec(method="safe_lora", knobs={"projector": "exact", "energy": 0.9}, draws=3),
        invented_contents("adapter", "base", "aligned", "subspace"),
    ),
    "defend": (
        DefendSpec(method="scale", knobs={"factor": 0.5, "types": ""}),
        invented_contents("adapter", "measurement"),
    ),
    "defend, control": (
        DefendSpec(
            method="safe_lora",
            knobs={"threshold": 0.5, "modules": None},
            control="random_modules",
            draw=1,
        ),
        invented_contents("adapter", "measurement"),
    ),
    "generate": (GenerateSpec(), invented_contents("model", "prompts", "adapter")),
    "judge": (JudgeSpec(template="harmbench"), invented_contents("generation", "model")),
    "judge, endpoint": (
        JudgeSpec(template="yes-no", endpoint="http://localhost:1/v1", model="judge"),
        invented_contents("generation"),
    ),
    "score": (ScoreSpec(measure="refusal", scorer="prefix"), invented_contents("generation")),
    "score, judged": (
        ScoreSpec(measure="over_refusal", scorer="mine", also=("prefix",)),
        invented_contents("generation", "judge_mine"),
    ),
    "evaluate": (EvaluateSpec(task="mmlu", shots=5), invented_contents("model", "prompts")),
}


def test_every_stage_kind_has_a_golden_key():
    assert {name.partition(",")[0] for name in SPECS} == STAGE_KINDS.keys()


def test_no_stage_is_re_keyed_unless_the_golden_file_changes():
    now = {name: digest(key_payload(spec, contents)) for name, (spec, contents) in SPECS.items()}
    if os.environ.get("EBBLINE_REFRESH_GOLDEN"):
        GOLDEN.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        pytest.skip(f"wrote {GOLDEN}")
    golden = json.loads(GOLDEN.read_text())
    moved = sorted(name for name in now.keys() | golden.keys() if now.get(name) != golden.get(name))
    assert not moved, (
        f"re-keyed: {moved}. If that is meant: EBBLINE_REFRESH_GOLDEN=1 and a line in CHANGELOG.md"
    )
