"""The evidence card: every field is there, has its evidence, and is traced to a stage."""

from dataclasses import replace

from ebbline.analysis.paper.evidence import evidence_card
from ebbline.analysis.paper.methods import methods
from ebbline.analysis.results.measurements import Baselines
from ebbline.cluster.profile import Profile
from ebbline.cluster.schedule.costs import Cost
from ebbline.sweeps.state.spending import Spent
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.policies import Confirm
from ebbline.sweeps.study.reading.overlaps import Shared
from ebbline.sweeps.study.references import FreshPrompts
from ebbline.sweeps.study.study import Study
from ebbline.tasks.data.audit import NearPair, Overlap
from tests.analysis.conftest import REFUSAL
from tests.analysis.test_confirmed import CANDIDATE, confirmed
from tests.analysis.test_methods import FOUND

SHARED = Shared(
    "refusal",
    "data.pool",
    200,
    Overlap(900, (("3", "17"), ("4", "18")), (NearPair("9", "44", 0.6),), 3),
)
BEFORE = {"small": {"refusal": "f" * 64}}


def rows(study: Study, results: list[Result], baselines: Baselines) -> list[list[str]]:
    card = evidence_card(study, results, baselines, FOUND, [SHARED], BEFORE)
    lines = [line for line in card.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_line_of_the_card_is_traced_to_a_stage_or_to_the_study(
    study: Study, results: list[Result], baselines: Baselines
) -> None:
    found = rows(study, results, baselines)
    assert all(len(row) == 3 and row[1] and row[2] for row in found), found
    fields = {row[0].partition(":")[0] for row in found}
    assert {
        "question",
        "hypothesis",
        "arm",
        "controls",
        "training seeds",
        "confirmation",
        "contamination",
        "multiplicity",
        "not measured",
    } <= fields
    by_field = {row[0]: row for row in found}
    assert by_field["arm: small, before fine-tuning"][2] == "refusal ffffffffffff"
    assert by_field["confirmation"][1] == "none: every point is a candidate"
    assert "2 of 200 prompts are in both, 1 have a near-copy" in by_field["contamination"][1]
    assert "over-refusal of harmless requests" in by_field["not measured"][1]


def test_a_confirmed_point_has_both_claims_and_the_keys_of_their_measurements(
    study: Study, baselines: Baselines
) -> None:
    point = confirmed()
    assert point.confirmed is not None
    keys = {"refusal[seed=101]": "a" * 64, "train[seed=101]": "b" * 64}
    point = replace(point, confirmed=replace(point.confirmed, keys=keys))
    found = [row for row in rows(study, [point], baselines) if row[0].startswith("confirmation")]
    assert [row[2] for row in found] == ["refusal[seed=101] aaaaaaaaaaaa"] * 2
    assert "this adapter" in found[0][1] and "this setting" in found[1][1]


def written(study: Study, results: list[Result], baselines: Baselines) -> str:
    spent = Spent(3600.0, Cost({}), frozenset(), None, None)
    return methods(study, results, baselines, FOUND, {}, spent, Profile(), [SHARED])


def test_the_methods_state_what_confounds_and_what_was_confirmed(
    study: Study, results: list[Result], baselines: Baselines
) -> None:
    text = written(study, results, baselines)
    assert "Data sizes are compared at equal epochs" in text
    assert "2 of 200 prompts are in both" in text
    assert "No point was confirmed" in text and "without sampling or penalties" in text
    assert "A seed draws the rows of its data and its training." in text
    train = study.train
    assert train is not None
    steps = study.model_copy(update={"train": train.model_copy(update={"steps": 10})})
    assert "Data sizes are compared at equal steps" in written(steps, results, baselines)
    one = study.model_copy(update={"subsets": 1})
    assert "All seeds train on the same rows" in written(one, results, baselines)
    assert "5 fresh training seeds" in written(study, [confirmed(point=CANDIDATE)], baselines)
    assert REFUSAL in CANDIDATE.metrics
    fresh = {"refusal": FreshPrompts(hold_out=0.3)}
    held_out = study.model_copy(update={"confirm": Confirm(suites=fresh)})
    assert "A share of 0.3 of the prompts of refusal" in written(held_out, results, baselines)
    assert "was held out" not in text
