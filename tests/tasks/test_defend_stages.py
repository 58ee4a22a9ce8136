"""The stages `measure` and `defend`: equal adapters have equal bytes, whatever the defence, and
controls have their partner's norm.
"""

import json
from pathlib import Path

import pytest

from ebbline.tasks.defences.computing.stages import run_defend, run_measure
from ebbline.tasks.defences.controls.registry import CONTROLS
from ebbline.tasks.defences.in_use import DEFENCES, NONE
from ebbline.tasks.defences.project import run_apply, run_project
from ebbline.tasks.identity import content_digest
from ebbline.tasks.specs import ApplySpec, DefendSpec, MeasureSpec, ProjectSpec
from tests.tasks.test_weights import lora
from tests.tiny import Pair, context, fresh


@pytest.fixture(scope="module")
def files(pair: Pair, tmp_path_factory) -> Path:
    """base, aligned, adapter and safety."""
    folder = tmp_path_factory.mktemp("defended")
    for name in ("base", "aligned"):
        (folder / name).symlink_to(getattr(pair, name))
    targets = ["q_proj", "v_proj"]
    lora(folder / "adapter", pair.aligned, r=2, target_modules=targets)
    lora(folder / "safety", pair.aligned, r=3, seed=9, target_modules=targets)
    return folder


@pytest.fixture(scope="module")
def adapter(files: Path) -> Path:
    return files / "adapter"


@pytest.fixture(scope="module")
def measured(files: Path, tmp_path_factory) -> dict[str, Path]:
    """Kind -> the output of a first stage: `project`, `listed` without models, `measure`."""
    root = tmp_path_factory.mktemp("measured")
    inputs = {name: files / name for name in ("adapter", "base", "aligned")}
    found = {name: fresh(root / name) for name in ("project", "listed", "measure", "rotated")}
    run_project(ProjectSpec(), inputs, found["project"], context(root))
    run_project(ProjectSpec(), {"adapter": inputs["adapter"]}, found["listed"], context(root))
    removal = MeasureSpec(method="subspace_removal", knobs={"k": 8})
    run_measure(removal, inputs, found["measure"], context(root))
    knobs = {"projector": "approximate", "energy": None}
    rotated = MeasureSpec(method="safe_lora", knobs=knobs, draws=2)
    run_measure(rotated, inputs, found["rotated"], context(root))
    return found


def defended(folder: Path, adapter: Path, first: Path, spec: DefendSpec, **others: Path) -> Path:
    out = fresh(folder / str(len(list(folder.iterdir()))))
    inputs = {"adapter": adapter, "measurement": first, **others}
    run_defend(spec, inputs, out, context(folder))
    return out


def setting(name: str, **knobs: object) -> DefendSpec:
    """The Spec of a defence in a study with these fixed settings."""
    spec = DEFENCES[name].specs(knobs, {})[1]  # type: ignore[arg-type]
    assert isinstance(spec, DefendSpec)
    return spec


@pytest.mark.parametrize(
    ("name", "first", "knobs"),
    [
        ("scale", "listed", {"factor": 1.0}),
        ("drop", "project", {"threshold": -1.0}),
        ("subspace_removal", "measure", {"k": 0}),
    ],
)
def test_a_setting_that_changes_nothing_writes_the_bytes_of_no_defence(
    name, first, knobs, adapter, measured, tmp_path
):
    plain = fresh(tmp_path / "plain")
    inputs = {"adapter": adapter, "projection": measured["listed"]}
    run_apply(ApplySpec(), inputs, plain, context(tmp_path))
    out = defended(tmp_path, adapter, measured[first], setting(name, **knobs))
    assert content_digest(out / DefendSpec.ADAPTER) == content_digest(plain)


def test_dropping_every_module_writes_the_bytes_of_scaling_by_zero(adapter, measured, tmp_path):
    dropped = defended(tmp_path, adapter, measured["project"], setting("drop", threshold=1.0))
    scaled = defended(tmp_path, adapter, measured["listed"], setting("scale", factor=0.0))
    one, other = (content_digest(each / DefendSpec.ADAPTER) for each in (dropped, scaled))
    assert one == other


def test_safe_lora_as_a_partner_writes_what_apply_writes(adapter, measured, tmp_path):
    applied = fresh(tmp_path / "applied")
    inputs = {"adapter": adapter, "projection": measured["project"]}
    run_apply(ApplySpec(modules=2), inputs, applied, context(tmp_path))
    spec = DefendSpec(method="safe_lora", knobs={"threshold": None, "modules": 2})
    for first in ("project", "rotated"):
        out = defended(tmp_path, adapter, measured[first], spec)
        assert content_digest(out / DefendSpec.ADAPTER) == content_digest(applied)


@pytest.mark.parametrize("control", [each.name for each in CONTROLS])
def test_a_control_changes_as_many_modules_and_has_its_partners_norm(
    control, adapter, measured, tmp_path
):
    spec = DefendSpec(method="safe_lora", knobs={"threshold": None, "modules": 2})
    own = defended(tmp_path, adapter, measured["rotated"], spec)
    draw = None if control == "shrink_matched" else 1
    drawn = spec.model_copy(update={"control": control, "draw": draw})
    other = defended(tmp_path, adapter, measured["rotated"], drawn)
    one, two = (json.loads((each / DefendSpec.EFFECTS).read_text()) for each in (own, other))
    changed = [module for module, row in two.items() if row["changed"]]
    assert len(changed) == 2
    if control != "random_modules":
        for module in changed:
            assert two[module]["effect"]["norm_after"] == pytest.approx(
                one[module]["effect"]["norm_after"], rel=1e-6
            )
    if draw is not None:
        third = drawn.model_copy(update={"draw": 0})
        again = defended(tmp_path, adapter, measured["rotated"], third)
        assert control == "random_modules" or content_digest(again / "adapter") != content_digest(
            other / "adapter"
        )


def test_removal_measures_once_for_all_numbers_of_directions(adapter, measured, tmp_path):
    for k in (1, 8):
        out = defended(tmp_path, adapter, measured["measure"], setting("subspace_removal", k=k))
        effects = json.loads((out / DefendSpec.EFFECTS).read_text())
        assert any(row["changed"] for row in effects.values()) or k == 1


def test_a_safety_merge_reads_the_safety_adapter(files, adapter, measured, tmp_path):
    spec = setting("safe_merge", weight=0.5, modules=1)
    out = defended(tmp_path, adapter, measured["project"], spec, safety=files / "safety")
    config = json.loads((out / DefendSpec.ADAPTER / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {5}
    assert DEFENCES[NONE].changed(measured["listed"].joinpath, out.joinpath) == (0, 4)
    changed = DEFENCES["safe_merge"].changed(measured["project"].joinpath, out.joinpath)
    assert changed == (1, 4)
