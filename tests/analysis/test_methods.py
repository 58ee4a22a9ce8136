"""The methods text: what it states about a study, what it leaves out, and how it hedges."""

from dataclasses import replace
from pathlib import Path

import pytest

from ebbline.analysis.paper.methods import methods
from ebbline.analysis.report.provenance import Build, Hardware, Pin, Provenance
from ebbline.analysis.results.collect import SuitePrompts
from ebbline.analysis.results.measurements import Baselines
from ebbline.cluster.profile import Profile
from ebbline.cluster.schedule.costs import Cost
from ebbline.sweeps.state.spending import Spent
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.study import Study
from tests.analysis.conftest import result
from tests.brought import adapter_folder
from tests.sweeps.made import study as made_study

FOUND = Provenance(
    study_sha256="0" * 64,
    seeds=(0,),
    seeds_used=1,
    pins=(
        Pin("models.small.aligned.hub", "org/chat", True, "a" * 40, "0" * 64),
        Pin("data.pool.path", "mine.json", False, None, "b" * 64),
    ),
    generated={},
    prompts={"refusal": SuitePrompts("advbench", 520, 200, "c" * 64)},
    build=Build("1.0"),
    python="3.11",
    packages={"peft": "0.21"},
    stage_versions={},
    hardware=(Hardware("train", "cuda", "A100", ("secret-host",), 4, 3, 60.0),),
    driving={},
)


def written(
    study: Study,
    results: list[Result],
    baselines: Baselines,
    found: Provenance = FOUND,
    profile: Profile | None = None,
) -> str:
    spent = Spent(3600.0, Cost({"A100": 7200.0}), frozenset(), None, None)
    return methods(study, results, baselines, found, {}, spent, profile or Profile())


def test_pins_prompts_hardware_and_money_are_as_recorded(
    study: Study, results: list[Result], baselines: Baselines
) -> None:
    priced = Profile.model_validate({"gpus": {"A100": {"usd_per_hour": 2.0}}})
    text = written(study, results, baselines, profile=priced)
    assert (
        f"org/chat at commit {'a' * 40} [@hub-org-chat]" in text
        and f"mine.json, a local copy with the sha256 {'b' * 64}" in text
    )
    assert (
        f"on 200 prompts (advbench, sha256 {'c' * 64})" in text
        and "train: A100, up to 4 at once, 1 machine, 3 stages" in text
    )
    assert (
        "The study's runs spent 2 GPU-hours, $4.00 in 1 hours of run time." in text
        and "secret-host" not in text
    )
    assert "DeepSpeed with ZeRO-3" in text and "ZeRO" not in written(
        study, results, baselines, replace(FOUND, hardware=())
    )


def test_unfinished_and_failed_points_are_reported(
    study: Study, results: list[Result], baselines: Baselines
) -> None:
    text = written(study, results, baselines)
    assert (
        f"was not finished when this was written: 40 of {len(results)} points are done, 1 "
        "still running, 1 failed." in text
    )
    assert "Without a result, and in no figure or table: 1 failed." in text
    assert "not finished" not in written(study, results[:40], baselines)


def test_questions_without_a_record_are_left_to_the_authors(
    study: Study, results: list[Result], baselines: Baselines
) -> None:
    text = written(study, results, baselines, replace(FOUND, pins=(), prompts={}))
    assert "not recorded" in text and "$" not in text
    assert "no evidence about real models" in text.partition("**To be stated by the authors.**")[2]


@pytest.mark.parametrize(
    ("seeds", "expected"), [((), "1 training seed."), ((0.4, 0.6), "2 training seeds.")]
)
def test_seeds_are_those_that_points_rest_on_not_those_of_the_file(
    study: Study, seeds: tuple[float, ...], expected: str
) -> None:
    found = result(0)
    keys = {
        f"{suite}[seed={seed}]": "0" * 64
        for suite in study.suites
        for seed in range(max(1, len(seeds)))
    }
    metrics = {name: replace(metric, seeds=seeds) for name, metric in found.metrics.items()}
    assert f"Each point rests on {expected}" in written(
        study, [replace(found, keys=keys, metrics=metrics)], {}
    )


def test_only_values_of_actual_points_are_listed(study: Study) -> None:
    text = written(study, [result(0, rank=4), result(1, rank=4, threshold=0.3, share=0.1)], {})
    assert (
        "of rank 4 on" in text
        and "at most the threshold: none or 0.3." in text
        and "trained on 100 examples" in text
    )


@pytest.mark.parametrize(
    ("sampler", "text", "is_optuna_s"),
    [
        ("gp", "chosen by ebbline's Gaussian-process search", False),
        ("stage_aware", "chosen by ebbline's stage-aware search", False),
        ("tpe", "the tree-structured Parzen estimator of Optuna", True),
        ("nsga2", "the NSGA-II sampler of Optuna", True),
    ],
)
def test_a_sampler_is_attributed_to_its_implementation(
    study: Study, sampler: str, text: str, is_optuna_s: bool
) -> None:
    """As in ebbline.sweeps.search.searcher: `gp` and `stage_aware` are ebbline's own code."""
    search = study.search.model_copy(update={"sampler": sampler})
    points = written(study.model_copy(update={"search": search}), [result(0)], {})
    assert text in points and ("[@akiba2019optuna]" in points) == is_optuna_s


def defended(tmp_path: Path, **changes: object) -> tuple[Study, str]:
    """A study with every kind of defence, and its methods."""
    safety = {"path": {"path": str(adapter_folder(tmp_path / "safety")), "sha256": "0" * 64}}
    organism = {"organism": {"size": "small"}}
    given = {
        "models": {"7b": {"base": organism, "aligned": organism, "safety": safety}},
        "train": {"steps": 2, "penalty": "asft"},
        "axes": {"train.penalty_weight": [0.0, 0.5], "lox.factor": [0.0, 1.25]},
        "defences": {
            "drop": {"threshold": [0.3], "projector": "exact", "energy": 0.8},
            "safe_merge": {"modules": [2]},
        },
        **changes,
    }
    study = made_study(tmp_path, given)
    points = [
        Point.of("7b", {"train.penalty_weight": weight, "lox.factor": factor, **defence})
        for weight, factor in ((0.0, 0.0), (0.5, 1.25))
        for defence in (
            {"defence": "none"},
            {"defence": "drop", "drop.threshold": 0.3},
            {"defence": "safe_merge", "safe_merge.modules": 2},
        )
    ]
    results = [Result(number, point, "running") for number, point in enumerate(points)]
    pins = (Pin("models.7b.safety.path", "safety", False, None, "d" * 64),)
    return study, written(study, results, {}, replace(FOUND, pins=pins))


def test_defences_in_a_training_and_before_it_are_stated(tmp_path: Path) -> None:
    _, text = defended(tmp_path, train={"steps": 2, "penalty": "asft", "ema_decay": 0.9})
    tuning = text.partition("**Fine-tuning.**")[2].partition("**Defences.**")[0]
    assert "plus a factor times the leading 6 singular directions" in tuning
    assert "with a factor of 0 or 1.25; 0 is the aligned model itself." in tuning
    assert "||(I - C) B A||_F^2" in tuning and "with lambda 0 or 0.5; 0 is none." in tuning
    assert "moving average of A and of B" in tuning and "with a decay of 0.9." in tuning


def test_a_penalty_that_never_acts_is_not_stated(tmp_path: Path) -> None:
    _, text = defended(tmp_path, train={"steps": 2})
    assert "penalty" not in text and "moving average" not in text


def test_the_projector_of_a_gate_and_the_safety_adapter_are_stated(tmp_path: Path) -> None:
    _, text = defended(tmp_path)
    drop = text.partition("drop: B <- 0")[2].partition("safe_merge")[0]
    assert "threshold 0.3; projector exact; energy 0.8." in drop
    assert "modules 2; projector approximate." in text
    assert f"The safety adapter of 7b: safety, a local copy with the sha256 {'d' * 64}." in text


def test_a_defence_that_reads_no_model_changed_adapters_without_a_base(tmp_path: Path) -> None:
    changes = {
        "models": {"7b": {"aligned": {"organism": {"size": "small"}}}},
        "axes": {"train.rank": [2]},
        "train": {"steps": 2},
    }
    scaled = made_study(tmp_path, {**changes, "defences": {"scale": {"factor": [0.5]}}})
    point = Point.of("7b", {"train.rank": 2, "defence": "scale", "scale.factor": 0.5})
    text = written(scaled, [Result(0, point, "running")], {})
    assert "No adapter was changed" not in text and "scale: B <- factor * B" in text
    plain = made_study(tmp_path, changes)
    text = written(plain, [Result(0, Point.of("7b", {"train.rank": 2}), "running")], {})
    assert "No adapter was changed after its training." in text
