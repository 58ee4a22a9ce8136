"""The answer in two sentences: how fine-tuning and a defence moved refusals, with intervals.

Invariants: the rules of ebbline.analysis.report.answer hold. A model's numbers come from one
training: before, after and defended. A point that holds the floor is always reported with the
certainty of that.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from ebbline.analysis.results.before_after import Line, Trio, trios
from ebbline.analysis.results.claims.refusal_moves import RefusalMoves, refusal_moves
from ebbline.analysis.results.defended.labels import defence_of_study
from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.measurements import (
    NO_EVIDENCE,
    Baselines,
    Evidence,
    better_undefended,
    refusal_metric,
    usefulness_metric,
)
from ebbline.analysis.results.picks.confirmed import confirmed_rate
from ebbline.analysis.results.wording import metric_label, percent, undecided_label
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import Metric

MOST_SIZES = 3
BRACKETS = (
    "Brackets hold 95% intervals: of rates Wilson's, of means normal ones. The text "
    "below explains what they do not cover; a point picked as the best"
    " of many looks better than it is."
)


def in_short(
    study: Study,
    results: Sequence[Result],
    baselines: Baselines,
    lines: Sequence[Line],
    evidence: Evidence = NO_EVIDENCE,
    moves: Mapping[str, RefusalMoves] | None = None,
) -> list[str]:
    """Two sentences, or one with the reason why there is no answer.

    `lines` and `moves` are those of the report's family (ebbline.analysis.results.claims.family);
    `moves` are computed if not given.
    """
    refusal, done = refusal_metric(study), finished(results)
    if refusal is None:
        return ["This study measures no refusal rate, so it cannot say how refusals moved."]
    if not done:
        return ["No point has finished, so there is no answer yet."]
    refusals = {line.model: line for line in lines if line.name == refusal}
    useful = usefulness_metric(study)
    usefulness = {line.model: line for line in lines if line.name == useful}
    return [
        _fine_tuning(
            study,
            done,
            baselines,
            refusal,
            refusals,
            refusal_moves(done, baselines, refusal, evidence) if moves is None else moves,
        ),
        _defended(study, done, trios(study, results), refusals, usefulness),
    ]


def _fine_tuning(
    study: Study,
    done: Sequence[Result],
    baselines: Baselines,
    refusal: str,
    lines: Mapping[str, Line],
    moves: Mapping[str, RefusalMoves],
) -> str:
    comparisons = [change for each in moves.values() for change in each.by_tuning]
    trainings = sum(each.trainings for each in moves.values())
    if not comparisons:
        measured = any(refusal in metrics for metrics in baselines.values())
        reason = "every finished point is defended" if measured else "no aligned model was measured"
        return f"How far fine-tuning alone moved the refusal rate is not known, as {reason}."
    lowered, raised = (
        sum(change.move == way for change in comparisons) for way in ("lower", "higher")
    )
    text = (
        f"Fine-tuning without {defence_of_study(study)} "
        f"{_counted(lowered, len(comparisons), trainings)}"
        f"{f' and raised it in {raised}' if raised else ''}"
    )
    both = [line for line in lines.values() if "fine-tuning" in line.changes]
    if not both:
        return f"{text}."
    spans = [
        f"from {_rate(line.states['aligned'])} to {_rate(line.states['tuned'])} at {line.model}"
        for line in _few(both)
    ]
    which = (
        ", " if len(comparisons) == len(both) else "; in the trainings of the points below it went "
    )
    return f"{text}{which}{_listed(spans, len(both), ', ')}."


def _counted(lowered: int, total: int, trainings: int) -> str:
    """`total` of all `trainings` are compared."""
    what = (
        f"{total} trainings"
        if total == trainings
        else f"the {total} trainings that were compared, of {trainings}"
    )
    if lowered == 0:
        return "did not measurably lower the refusal rate" + (
            f" in any of {what}" if total > 1 else ""
        )
    how = (
        ""
        if total == 1
        else f" in all {what.removeprefix('the ')}"
        if lowered == total
        else f" in {lowered} of {what}"
    )
    return f"lowered the refusal rate{how}"


def _defended(
    study: Study,
    done: Sequence[Result],
    sizes: Sequence[Trio],
    refusals: Mapping[str, Line],
    usefulness: Mapping[str, Line],
) -> str:
    what = defence_of_study(study)
    defended = [trio for trio in sizes if trio.shipped is not None]
    if not defended:
        return f"No defended point has finished, so the effect of {what} is not known."
    meeting = sum(trio.meets for trio in defended)
    holding = sum(trio.holds for trio in defended)
    refuted = any(trio.refuted for trio in defended)
    parts = [
        _shipped(trio, refusals[trio.model], usefulness.get(trio.model), what)
        for trio in _few(defended)
    ]
    floor = _holding(meeting, holding, refuted, len(defended), percent(study.refusal_floor), what)
    without = _without(study, done, [trio.model for trio in defended])
    return f"{floor}: {_listed(parts, len(defended), '; ')}{without}."


def _without(study: Study, done: Sequence[Result], models: Sequence[str]) -> str:
    """Names the models whose undefended point holds the floor and is named by `ebbline pick`."""
    refusal, useful = refusal_metric(study), usefulness_metric(study)
    own = {model: [result for result in done if result.point.model == model] for model in models}
    found = (
        []
        if refusal is None
        else [
            best
            for each in own.values()
            if (best := better_undefended(study, each, refusal)) is not None
        ]
    )
    if refusal is None or not found:
        return ""
    parts = [
        f"{each.result.point.model} refuses {_rate(each.result.metrics[refusal])}"
        + (
            ""
            if useful is None
            else f" at a {metric_label(useful)} of {_rate(each.result.metrics[useful])}"
        )
        for each in _few(found)
    ]
    which = (
        "a point meets the floor and is"
        if len(models) == 1
        else f"a point of {len(found)} of {len(models)} sizes meets the floor and is"
    )
    return (
        f"; without {defence_of_study(study)} {which} the one that `ebbline pick` names: "
        f"{_listed(parts, len(found), '; ')}"
    )


def _holding(meeting: int, holding: int, refuted: bool, sizes: int, floor: str, what: str) -> str:
    """How many models have a candidate for the floor, and how many a confirmed setting; with
    `refuted` a value of the search meets it that the confirmed one does not.
    """
    if not meeting:
        return (
            f"With {what} no point{'' if sizes == 1 else ' of any size'} "
            f"{'is confirmed to reach' if refuted else 'reaches'} the refusal floor of {floor}"
        )
    which = (
        "a point meets"
        if sizes == 1
        else (
            f"a point of {'every size' if meeting == sizes else f'{meeting} of {sizes} sizes'} "
            "meets"
        )
    )
    if not holding:
        sure = "as a candidate: not confirmed" if meeting == 1 else "as candidates: none confirmed"
    elif holding == meeting:
        sure = "confirmed to hold" if meeting == 1 else "each confirmed to hold"
    else:
        sure = f"{holding} of {meeting} confirmed to hold"
    return f"With {what} {which} the refusal floor of {floor}, {sure}"


def _shipped(trio: Trio, refusal: Line, useful: Line | None, what: str) -> str:
    found = None if trio.shipped is None else confirmed_rate(trio.shipped, refusal.name)
    text = f"{trio.model} {'refuses' if trio.meets else 'comes nearest with'} "
    if trio.refuted and found is not None:
        text = f"{trio.model} refuses {_rate(*found)} confirmed, and in the search "
    text += _rate(refusal.states["shipped"])
    change = refusal.changes.get("defence")
    if change is not None and change.move != "higher":
        text += f" ({change.move} {'than' if change.move == 'lower' else 'from'} without {what})"
    if useful is not None and "shipped" in useful.states:
        text += f" at a {metric_label(useful.name)} of {_rate(useful.states['shipped'])}"
        cost = useful.changes.get("defence")
        if cost is not None:
            move = (
                "not distinguishable from"
                if cost.move == "not distinguishable"
                else f"{cost.move} than"
            )
            text += f", {move} the {_rate(cost.before)} without"
    return text


def _rate(metric: Metric, interval: tuple[float, float] | None = None) -> str:
    low, high = metric.interval if interval is None else interval
    return (
        f"{percent(metric.value)} [{100 * low:.1f}, {100 * high:.1f}]"
        f"{undecided_label(metric.undecided, ' (', ')')}"
    )


T = TypeVar("T")


def _few(sizes: Sequence[T]) -> Sequence[T]:
    """All items, or only the first and the last if there are more than MOST_SIZES.

    Models are sorted by name, so these are usually the smallest and the largest.
    """
    return sizes if len(sizes) <= MOST_SIZES else [sizes[0], sizes[-1]]


def _listed(parts: Sequence[str], of: int, between: str) -> str:
    others = f" (the {of - len(parts)} sizes between are below)" if of > len(parts) else ""
    return between.join(parts) + others
