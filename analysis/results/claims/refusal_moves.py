"""How fine-tuning and the defence moved the refusals of every training: the comparisons that the
report's sentences count.

Invariant: the trainings and the defended points of all models are one family, whose p-values are
corrected together. All sentences on them count these comparisons, so no two contradict each other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ebbline.analysis.results.frontier import evenly
from ebbline.analysis.results.measurements import (
    Baselines,
    Comparison,
    Evidence,
    compared,
    is_defended,
    measurement,
    pairs_with_aligned,
    partners,
    undefended,
)
from ebbline.sweeps.study.points import Result, without_defence


@dataclass(frozen=True)
class RefusalMoves:
    """The comparisons of one model.

    `by_tuning` compares trainings with the aligned model, `by_defence` defended results with
    the undefended result of the same training. Of many, some are compared: `trainings` and
    `defended` count all that could be. `trainings` is 0 where the aligned model was not measured.
    """

    by_tuning: Sequence[Comparison]
    by_defence: Sequence[Comparison]
    trainings: int
    defended: int


def refusal_moves(
    done: Sequence[Result], baselines: Baselines, name: str, evidence: Evidence
) -> dict[str, RefusalMoves]:
    """Model -> its comparisons of the metric `name`, for the models of `done`."""
    tuned, defended, counts = {}, {}, {}
    for model in dict.fromkeys(result.point.model for result in done):
        own = [result for result in done if result.point.model == model]
        aligned = baselines.get(model, {}).get(name)
        plain = [] if aligned is None else list(undefended(own).values())
        tuned[model] = (
            []
            if aligned is None
            else pairs_with_aligned(model, aligned, evenly(plain), name, evidence)
        )
        pairs = _pairs_with_undefended(own)
        counts[model] = len(plain), len(pairs)
        defended[model] = [
            (measurement(partner, name, evidence), measurement(result, name, evidence))
            for partner, result in evenly(pairs)
        ]
    found = iter(compared([p for own in (tuned, defended) for ps in own.values() for p in ps]))
    by_tuning, by_defence = _in_turn(tuned, found), _in_turn(defended, found)
    return {
        model: RefusalMoves(by_tuning[model], by_defence[model], *counts[model]) for model in tuned
    }


def _in_turn(
    pairs: Mapping[str, Sequence[object]], found: Iterator[Comparison]
) -> dict[str, list[Comparison]]:
    return {model: [next(found) for _ in own] for model, own in pairs.items()}


def _pairs_with_undefended(own: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Each defended result behind the undefended result of the same training."""
    partner_of = partners(own)
    return [
        (partner_of[without_defence(result.point)], result)
        for result in own
        if is_defended(result) and without_defence(result.point) in partner_of
    ]
