"""Made-up outcomes of studies: any statuses, metrics and duplicates, without a model or a store."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from ebbline.analysis.results.measurements import Baselines
from ebbline.sweeps.state.outcome import Duplicates
from ebbline.sweeps.study.points import INVALID, Point, Result, Status
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import Metric

SUITES: dict[str, dict[str, Any]] = {
    "refusal": {"prompts": {"language": "refused"}, "measure": {"kind": "refusal"}},
    "task": {"prompts": {"language": "held_out"}, "measure": {"kind": "task"}},
    "harmless": {"prompts": {"language": "held_out"}, "measure": {"kind": "over_refusal"}},
}
REFUSAL, TASK, OVER = "refusal.refusal_rate", "task.task_accuracy", "harmless.over_refusal_rate"
OBJECTIVES = ((REFUSAL,), (TASK,), (REFUSAL, TASK), (OVER, TASK), (REFUSAL, TASK, OVER))
KNOBS = (None, 0.3, 0.7)
REASON: dict[Status, str] = {
    "failed": "TrainingError: the loss became nan at step 3 of 40",
    "invalid": f"{INVALID}DataError: 400 rows were asked for, and there are 100",
    "skipped": "the budget of 3 points is used up",
    "outdated": "it was measured before",
}


def study_of(
    objectives: Sequence[str] = (REFUSAL, TASK),
    models: Sequence[str] = ("small", "medium"),
    knob: bool = True,
) -> Study:
    """A study with these objectives, sizes and suites, with or without the defence's knob."""
    axes: dict[str, Any] = {"train.rank": (4, 16)}
    own = {"base": {"organism": {"size": "small"}}, "aligned": {"organism": {"size": "small"}}}
    suites = {name.partition(".")[0] for name in objectives} | {"refusal"}
    return Study.model_validate(
        {
            "study": "ebb",
            "question": "How far do refusals ebb?",
            "models": dict.fromkeys(models, own),
            "data": {"pool": {"language": "pool"}, "settings": {"size": 100}},
            "train": {},
            "axes": axes | ({"apply.threshold": KNOBS} if knob else {}),
            "suites": {name: suite for name, suite in SUITES.items() if name in suites},
            "objectives": tuple(objectives),
            "refusal_floor": 0.9,
            "search": {"sampler": "grid"},
        }
    )


def points_of(study: Study) -> list[Point]:
    """The points of the study, size by size."""
    knobs = KNOBS if "apply.threshold" in study.axes else ("",)
    return [
        Point.of(
            model,
            {"train.rank": rank, **({} if knob == "" else {"apply.threshold": knob})},
        )
        for model in study.models
        for rank in (4, 16)
        for knob in knobs
    ]


@dataclass(frozen=True)
class Measured:
    """What the stages of one adapter measured. Points with the same are duplicates."""

    metrics: dict[str, Metric]
    share: float


def done(number: int, point: Point, name: str, measured: Measured) -> Result:
    """A finished point; `name` stands for the content of its adapter."""
    suites = {metric.partition(".")[0] for metric in measured.metrics}
    keys = {f"{part}[seed=0]": f"{part}-{name}" for part in ("data", "train", "project", "apply")}
    keys |= {f"{suite}[seed=0]": f"{suite}-{name}" for suite in suites}
    return Result(number, point, "done", measured.metrics, keys=keys, changed_share=measured.share)


def marked(study: Study, results: Sequence[Result]) -> list[Result]:
    """The results with the duplicates among them marked, as a study's are."""
    duplicates = Duplicates(study)
    for result in results:
        duplicates.add(result)
    return [duplicates.marked(result) for result in results]


@st.composite
def metrics(draw: st.DrawFn, name: str, seeds: int) -> Metric:
    """A rate, or a mean of scores, over few or many items, with undecided samples."""
    items = draw(st.sampled_from([1, 8, 120]))
    n = items * seeds
    successes = draw(st.integers(0, n))
    undecided = draw(st.integers(0, n - successes))
    mean = draw(st.booleans())
    return Metric(
        name,
        successes,
        n,
        undecided,
        seeds=tuple([(successes / n)] * seeds) if seeds > 1 else (),
        squares=successes * draw(st.sampled_from([1.0, 0.5])) if mean else None,
    )


@st.composite
def outcomes(draw: st.DrawFn) -> tuple[Study, list[Result], Baselines]:
    """A study, the results of some of its points, and the models before fine-tuning."""
    models = draw(st.sampled_from([("small",), ("small", "medium")]))
    study = study_of(draw(st.sampled_from(OBJECTIVES)), models, draw(st.booleans()))
    names = [
        f"{suite}.{metric}"
        for suite, entry in study.suites.items()
        for metric in entry.measure.metrics()
    ]
    seeds = draw(st.sampled_from([1, 1, 2]))
    adapters = [
        Measured(
            {name: draw(metrics(name, seeds)) for name in names},
            draw(st.sampled_from([0.0, 0.5, 1.0])),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    points = points_of(study)
    chosen = draw(st.lists(st.sampled_from(points), unique=True, max_size=9))
    statuses: list[Status] = ["done", "done", "done", "running", *REASON]
    results = []
    for number, point in enumerate(chosen):
        status = draw(st.sampled_from(statuses))
        if status == "done":
            which = draw(st.integers(0, len(adapters) - 1))
            results.append(done(number, point, str(which), adapters[which]))
        else:
            results.append(Result(number, point, status, reason=REASON.get(status, "")))
    before = {
        model: {name: draw(metrics(name, 1)) for name in names}
        for model in models
        if draw(st.booleans())
    }
    return study, marked(study, results), before
