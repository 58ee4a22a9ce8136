"""All comparisons of a study's report, as one family.

Invariant: every p-value of the report is corrected once, together with all others: the trainings,
the defended points, the table before and after, and the defences against their controls and each
other. So a verdict is the same wherever it is shown. A confirmation is a claim of its own: its
points are named before its prompts and seeds are measured, and its bounds are corrected for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from ebbline.analysis.results.before_after import Line, before_after
from ebbline.analysis.results.claims.refusal_moves import RefusalMoves, refusal_moves
from ebbline.analysis.results.defended.beside import Against, against_controls, against_defences
from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.measurements import (
    NO_EVIDENCE,
    Baselines,
    Evidence,
    judged,
    refusal_metric,
)
from ebbline.analysis.results.statistics import corrected
from ebbline.sweeps.state.controls import ControlResult
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study


@dataclass(frozen=True)
class Family:
    """The comparisons of a report, with verdicts that are corrected for all `size` tests of it.

    See ebbline.analysis.results.before_after for `lines`, `claims.refusal_moves` for `moves` and
    `defended.beside` for `against`.
    """

    lines: Sequence[Line]
    moves: Mapping[str, RefusalMoves]
    against: Sequence[Against]
    size: int


def family(
    study: Study,
    results: Sequence[Result],
    baselines: Baselines,
    evidence: Evidence = NO_EVIDENCE,
    controls: Sequence[ControlResult] = (),
) -> Family:
    """Every comparison of a study's results."""
    return one_family(
        before_after(study, results, baselines, evidence),
        moves_of(study, results, baselines, evidence),
        [
            *against_controls(study, results, controls, evidence),
            *against_defences(study, results, evidence),
        ],
    )


def moves_of(
    study: Study, results: Sequence[Result], baselines: Baselines, evidence: Evidence
) -> dict[str, RefusalMoves]:
    """How the refusals of every training moved; empty for a study without a refusal rate."""
    refusal = refusal_metric(study)
    measured = [result for result in finished(results) if refusal in result.metrics]
    return {} if refusal is None else refusal_moves(measured, baselines, refusal, evidence)


def one_family(
    lines: Sequence[Line], moves: Mapping[str, RefusalMoves], against: Sequence[Against]
) -> Family:
    """These comparisons, corrected together (`statistics.corrected`) in place of part by part."""
    compared = [
        *(change for line in lines for change in line.changes.values()),
        *(each for own in moves.values() for each in (*own.by_tuning, *own.by_defence)),
        *(each for pair in against for each in pair.at_point.values()),
    ]
    given = [
        *(each.p_value for each in compared),
        *(pair.advantage.p_value for pair in against if pair.advantage is not None),
    ]
    known = [p_value for p_value in given if p_value is not None]
    values = iter(corrected(known))
    p_values = [None if p_value is None else next(values) for p_value in given]
    found = map(judged, compared, p_values)
    of_advantages = iter(p_values[len(compared) :])
    return Family(
        [replace(line, changes={step: next(found) for step in line.changes}) for line in lines],
        {
            model: replace(
                own,
                by_tuning=list(islice(found, len(own.by_tuning))),
                by_defence=list(islice(found, len(own.by_defence))),
            )
            for model, own in moves.items()
        },
        [
            replace(
                pair,
                at_point={name: next(found) for name in pair.at_point},
                advantage=None
                if pair.advantage is None
                else replace(pair.advantage, corrected_p=next(of_advantages)),
            )
            for pair in against
        ],
        len(known),
    )
