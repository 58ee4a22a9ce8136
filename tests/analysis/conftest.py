"""Synthetic results of a study: two models, ranks, data sizes and thresholds."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from ebbline.analysis.results.measurements import Baselines, Subject
from ebbline.analysis.results.statistics import Agreement, SamplesBySeed
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import Metric, Sample

REFUSAL, TASK, OVER = "refusal.refusal_rate", "task.task_accuracy", "harmless.over_refusal_rate"
SHA = "0" * 64


def rate(name: str, value: float, n: int = 200, seeds: tuple[float, ...] = ()) -> Metric:
    return Metric(name, round(value * n), n, seeds=seeds)


def result(
    number: int,
    model: str = "small",
    refusal: float = 0.5,
    task: float = 0.5,
    share: float | None = None,
    threshold: float | None = None,
    rank: int = 8,
    size: int = 100,
) -> Result:
    """A finished point; it is projected if `share` is given."""
    return Result(
        number=number,
        point=Point.of(
            model, {"train.rank": rank, "data.size": size, "apply.threshold": threshold}
        ),
        status="done",
        metrics={REFUSAL: rate(REFUSAL, refusal), TASK: rate(TASK, task), OVER: rate(OVER, 0.05)},
        keys={"train[seed=0]": f"{rank:032x}{size:032x}", "refusal[seed=0]": f"{number:064x}"},
        seconds=12.5 + number,
        changed_share=share,
    )


def samples(successes: Sequence[bool], categories: Sequence[str] = ("",)) -> list[Sample]:
    """A sample for each success, with the categories in turn."""
    return [
        Sample(
            f"id{index}",
            categories[index % len(categories)],
            "refused" if success else "complied",
            "prefix:0",
            success,
        )
        for index, success in enumerate(successes)
    ]


def share(successes: int, n: int = 200, categories: Sequence[str] = ("",)) -> list[Sample]:
    """`n` samples, of which the first `successes` are successes."""
    return samples([index < successes for index in range(n)], categories)


@dataclass
class Held:
    """Evidence without a store: by a point's number or an aligned model's name, and a suite."""

    found: dict[tuple[int | str, str], SamplesBySeed] = field(default_factory=dict)
    agreements: dict[tuple[int | str, str], Agreement] = field(default_factory=dict)

    def samples(self, subject: Subject, suite: str) -> SamplesBySeed:
        return self.found.get((subject if isinstance(subject, str) else subject.number, suite), {})

    def agreement(self, subject: Subject, suite: str) -> Agreement | None:
        return self.agreements.get((subject if isinstance(subject, str) else subject.number, suite))


def failed(
    number: int, reason: str = "TrainingError: the loss became nan at step 3 of 40"
) -> Result:
    point = Point.of(
        "small", {"train.rank": 64, "data.size": 900 + number, "apply.threshold": None}
    )
    return Result(number=number, point=point, status="failed", reason=reason)


@pytest.fixture
def study() -> Study:
    return Study.model_validate(
        {
            "study": "ebb",
            "question": "How far do refusals ebb when a chat model is fine-tuned, and what "
            "brings them back?",
            "hypothesis": "Fine-tuning lowers refusals; the projection brings them back at "
            "little cost.",
            "models": {
                name: {
                    "base": {"organism": {"size": name}},
                    "aligned": {"organism": {"size": name}},
                }
                for name in ("small", "medium")
            },
            "data": {"pool": {"language": "pool"}, "settings": {"size": 100}},
            "train": {},
            "axes": {
                "train.rank": (4, 16),
                "data.size": (100, 400),
                "apply.threshold": (None, 0.3, 0.5, 0.7, 0.9),
            },
            "suites": {
                "refusal": {"prompts": {"language": "refused"}, "measure": {"kind": "refusal"}},
                "task": {"prompts": {"language": "held_out"}, "measure": {"kind": "task"}},
            },
            "objectives": (REFUSAL, TASK),
            "refusal_floor": 0.9,
            "search": {"sampler": "grid"},
        }
    )


@pytest.fixture
def baselines() -> Baselines:
    return {
        "small": {REFUSAL: rate(REFUSAL, 0.96), TASK: rate(TASK, 0.22)},
        "medium": {REFUSAL: rate(REFUSAL, 0.985), TASK: rate(TASK, 0.31)},
    }


@pytest.fixture
def results() -> list[Result]:
    """A sweep that shows the expected effect, with one failed point and one running point."""
    rows: list[Result] = []
    for model, lift in (("small", 0.0), ("medium", 0.08)):
        for rank in (4, 16):
            for size in (100, 400):
                ebb = 0.55 - 0.1 * (rank == 16) - 0.25 * (size == 400) + lift
                skill = 0.62 + 0.06 * (rank == 16) + 0.1 * (size == 400) + lift
                for threshold, share in (
                    (None, None),
                    (0.3, 0.0),
                    (0.5, 0.25),
                    (0.7, 0.6),
                    (0.9, 1.0),
                ):
                    back, cost = (share or 0.0) ** 0.6, 0.22 * (share or 0.0) ** 2
                    rows.append(
                        result(
                            len(rows),
                            model=model,
                            refusal=ebb + (0.94 + lift / 4 - ebb) * back,
                            task=skill - cost,
                            share=share,
                            threshold=threshold,
                            rank=rank,
                            size=size,
                        )
                    )
    running = Result(
        len(rows) + 1, Point.of("small", {"train.rank": 32, "data.size": 400}), "running"
    )
    return [*rows, failed(len(rows)), running]
