"""Safe LoRA as a defence: its knobs, its masks, its inputs."""

import subprocess
import sys

import numpy as np
import pytest

from ebbline.tasks.defences.gate import ModuleRow, chosen, write_rows
from ebbline.tasks.defences.safe_lora import SAFE_LORA
from ebbline.tasks.specs import ApplySpec, ProjectSpec, SubspaceSpec, TrainSpec

FIXED = ApplySpec()
ADAPTERS = (np.array([0.1, 0.2, 0.6]), np.array([0.2, 0.2, 0.4]))


def mask(**values):
    knobs = SAFE_LORA.knobs(FIXED, {f"apply.{name}": value for name, value in values.items()})
    return SAFE_LORA.mask(knobs, ADAPTERS)


def test_a_knob_has_the_points_value_else_the_studys():
    fixed = ApplySpec(modules=3)
    assert SAFE_LORA.knobs(fixed, {"train.rank": 4}) == {
        "apply.threshold": None,
        "apply.modules": 3,
    }
    assert SAFE_LORA.knobs(fixed, {"apply.modules": 1})["apply.modules"] == 1


def test_an_axis_is_a_knob_or_another_setting_by_its_stage():
    assert SAFE_LORA.is_knob("apply.modules") and SAFE_LORA.owns("apply.modules")
    assert not SAFE_LORA.is_knob("project.energy") and SAFE_LORA.owns("project.energy")
    assert not SAFE_LORA.owns("train.rank") and not SAFE_LORA.owns("applyx.rank")


def test_a_threshold_projects_the_cosines_at_or_below_it_and_equal_cosines_together():
    assert mask(threshold=0.2) == mask(threshold=0.3) == (2, 2)
    assert mask(threshold=0.19) == (1, 0)
    assert mask(modules=2) == (2, 2) == mask(threshold=0.2)


def test_impossible_knobs_have_no_outcome():
    assert mask(threshold=0.2, modules=1) is None
    assert mask(modules=4) is None


def test_only_the_absence_of_a_rule_is_off_not_a_rule_that_projects_nothing():
    assert SAFE_LORA.is_off(SAFE_LORA.knobs(FIXED, {})) and mask() == (0, 0)
    assert not SAFE_LORA.is_off(SAFE_LORA.knobs(FIXED, {"apply.threshold": -1.0}))


def test_the_share_is_of_all_measured_modules():
    assert SAFE_LORA.share((2, 1), ADAPTERS) == 0.5
    assert SAFE_LORA.share((), ()) == 0.0


def test_the_outcome_changes_at_each_distinct_cosine():
    assert SAFE_LORA.edges("apply.threshold", ADAPTERS) == [0.1, 0.2, 0.4, 0.6]
    assert SAFE_LORA.edges("apply.modules", ADAPTERS) is None


def test_cosines_and_changed_modules_are_read_from_the_stages_files(tmp_path):
    rows = {
        "b": ModuleRow(0.4, 0.1),
        "a": ModuleRow(0.2, 0.1),
        "c": ModuleRow(None, None, "the update is zero"),
    }
    write_rows(rows, tmp_path / ProjectSpec.COSINES)
    (tmp_path / ApplySpec.CHOSEN).write_text('["a"]')
    assert SAFE_LORA.reading(tmp_path.joinpath).tolist() == [0.2, 0.4]
    assert SAFE_LORA.changed(tmp_path.joinpath, tmp_path.joinpath) == (1, 3)
    assert (
        len(chosen(rows, 0.3, None))
        == SAFE_LORA.mask(
            SAFE_LORA.knobs(FIXED, {"apply.threshold": 0.3}),
            [SAFE_LORA.reading(tmp_path.joinpath)],
        )[0]
    )


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        (ProjectSpec(), None),
        (
            ProjectSpec(projector="exact", energy=0.9),
            SubspaceSpec(energy=0.9, target_modules=("k_proj", "q_proj")),
        ),
    ],
)
def test_only_the_exact_projector_reads_a_shared_subspace(settings, shared):
    assert SAFE_LORA.shared(settings, TrainSpec(target_modules=("q_proj", "k_proj"))) == shared


@pytest.mark.process
def test_the_interface_and_the_gate_import_no_torch():
    code = "import sys, ebbline.tasks.defences.in_use; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
