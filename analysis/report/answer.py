"""The study's answer in plain sentences, generated from the numbers.

Invariants: nothing is called higher or lower unless a paired test says so or the 95% intervals stay
apart; an expected effect that is absent is said to be absent; an operating point is never called
safe on its value alone.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from ebbline.analysis.results.before_after import Line, before_after
from ebbline.analysis.results.frontier import finished, values_of
from ebbline.analysis.results.measurements import (
    LEVEL,
    NO_EVIDENCE,
    Baselines,
    Comparison,
    Evidence,
    Move,
    better_unprojected,
    compared,
    compared_with_aligned,
    is_projected,
    measurement,
    operating_point,
    partners,
    refusal_metric,
    unprojected,
    usefulness_metric,
)
from ebbline.analysis.results.tables import in_points
from ebbline.analysis.results.wording import (
    NO_RESULT,
    measured,
    metric_label,
    natural,
    percent,
    settings_label,
    status_label,
)
from ebbline.sweeps.study.points import Result, without_defence
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import Metric


def answer(
    study: Study,
    results: Sequence[Result],
    baselines: Baselines,
    evidence: Evidence = NO_EVIDENCE,
    lines: Sequence[Line] | None = None,
) -> list[str]:
    """A paragraph per model on fine-tuning, on projection and on the point to pick; then what
    limits them.

    With the samples as `evidence` measurements on the same prompts are compared in pairs, without
    them by their intervals. `lines` are those of ebbline.analysis.results.before_after, for a
    caller who has them already.
    """
    refusal, done = refusal_metric(study), finished(results)
    if refusal is None:
        return [
            "This study measures no refusal rate, so it cannot say how refusals moved.",
            *_unfinished(results),
        ]
    if not done:
        return ["No point has finished, so there is no answer yet.", *_unfinished(results)]
    values_of(done, [refusal, *study.objectives])  # raises when one was not measured
    lines = before_after(study, results, baselines, evidence) if lines is None else lines
    paragraphs: list[str] = []
    told: list[Comparison] = []
    for model in sorted({result.point.model for result in done}, key=natural):
        own = [result for result in done if result.point.model == model]
        aligned = baselines.get(model, {}).get(refusal)
        plain = list(unprojected(own).values())
        ebbed = (
            []
            if aligned is None
            else compared_with_aligned(model, aligned, plain, refusal, evidence)
        )
        brought = _against_twins(own, refusal, evidence)
        paragraphs += [
            _fine_tuning(model, plain, refusal, aligned, ebbed),
            _projection(model, own, brought),
        ]
        told += [*ebbed, *brought]
        picked = operating_point(study, own, refusal)
        if picked is not None:
            best, holds = picked
            names = [name for name in (usefulness_metric(study), refusal) if name is not None]
            found = {
                line.name: line.changes["projection"]
                for line in lines
                if line.model == model and "projection" in line.changes
            }
            changes = {name: found[name] for name in names if holds and name in found}
            paragraphs.append(_pick(study, model, own, refusal, best, holds, changes))
            told += changes.values()
    return [*paragraphs, *_unfinished(results), _caution(done, refusal, told)]


def _against_twins(own: Sequence[Result], name: str, evidence: Evidence) -> list[Comparison]:
    """Every projected result against the unprojected one of its training."""
    twins = partners(own)
    pairs = [
        (twins[without_defence(result.point)], result)
        for result in own
        if is_projected(result) and without_defence(result.point) in twins
    ]
    return compared(
        [
            (measurement(twin, name, evidence), measurement(result, name, evidence))
            for twin, result in pairs
        ]
    )


def _fine_tuning(
    model: str,
    plain: Sequence[Result],
    refusal: str,
    aligned: Metric | None,
    ebbed: Sequence[Comparison],
) -> str:
    if not plain:
        return (
            f"{model}, fine-tuning: every finished point is projected, so the effect of "
            "fine-tuning alone is not known."
        )
    metrics = [result.metrics[refusal] for result in plain]
    values = sorted(metric.value for metric in metrics)
    found = (
        measured(metrics[0])
        if len(metrics) == 1
        else f"{percent(values[0])} to {percent(values[-1])}"
    )
    if aligned is None:
        return (
            f"{model}, fine-tuning: the aligned model was not measured, so how far "
            "refusals moved is not known."
            f" Without projection, the fine-tuned refusal rate is {found}."
        )
    text = (
        f"{model}, fine-tuning: the aligned model refuses {measured(aligned)}. Fine-tuned "
        "without projection, the"
        f" refusal rate is {tally(ebbed, 'training')}: {found}."
    )
    if all(comparison.move != "lower" for comparison in ebbed):
        text += (
            f" The expected loss of refusals is absent: no fine-tuning of {model} "
            "measurably lowered them, so there was"
            " nothing for projection to bring back."
        )
    return text


def _projection(model: str, own: Sequence[Result], brought: Sequence[Comparison]) -> str:
    if not any(is_projected(result) for result in own):
        return (
            f"{model}, projection: no projected point has finished, so the effect of "
            "projection is not known."
        )
    if not brought:
        return (
            f"{model}, projection: no projected point has an unprojected one of the same "
            "training beside it, so the effect"
            " of projection is not known."
        )
    text = (
        f"{model}, projection: against the same training without it, refusal rate is "
        f"{tally(brought, 'point')}."
    )
    if all(comparison.move != "higher" for comparison in brought):
        text += (
            " The expected effect is absent: projection did not measurably raise the refusals "
            f"of {model}."
        )
    return text


def tally(comparisons: Sequence[Comparison], of: str) -> str:
    moves, total = Counter(comparison.move for comparison in comparisons), len(comparisons)
    how = how_found(comparisons)
    how = f" ({how})" if how else ""
    if total == 1:
        return comparisons[0].move + how
    order: tuple[Move, ...] = ("higher", "lower", "not distinguishable")
    parts = [f"{move} at {moves[move]}" for move in order if moves[move]]
    counted = (
        f"{', '.join(parts)} of {total} {of}s"
        if len(parts) > 1
        else f"{comparisons[0].move} at all {total} {of}s"
    )
    return counted + how


def how_found(comparisons: Sequence[Comparison]) -> str:
    """What the paired tests among the comparisons found; nothing when all were by intervals."""
    tests = [comparison.paired for comparison in comparisons if comparison.paired is not None]
    if not tests:
        return ""
    if len(comparisons) == 1:
        low, high = tests[0].interval
        return (
            f"paired, difference {in_points(tests[0].difference)} points, 95% interval "
            f"{in_points(low)} to {in_points(high)}"
        )
    paired = (
        "paired" if len(tests) == len(comparisons) else f"{len(tests)} of {len(comparisons)} paired"
    )
    lowest, highest = (in_points(edge([test.difference for test in tests])) for edge in (min, max))
    return f"{paired}, " + (
        f"difference {lowest} points"
        if len(tests) == 1
        else f"differences {lowest} to {highest} points"
    )


def _pick(
    study: Study,
    model: str,
    own: Sequence[Result],
    refusal: str,
    best: Result,
    holds: bool,
    changes: Mapping[str, Comparison],
) -> str:
    """The operating point in words: what it refuses, how sure that is, and what it costs."""
    useful, floor = usefulness_metric(study), percent(study.refusal_floor)
    if not holds:
        return (
            f"{model}, operating point: none of {sum(map(is_projected, own))} projected "
            f"points holds the refusal floor of {floor}."
            f" The nearest, {_named(best)}, refuses "
            f"{measured(best.metrics[refusal])}.{_without_projection(study, own, refusal)}"
        )
    low = best.metrics[refusal].interval[0]
    sure = (
        "Its whole interval is at or above the floor."
        if low >= study.refusal_floor
        else (
            f"Its interval reaches down to {percent(low)}, so whether it holds the floor is "
            "not certain."
        )
    )
    text = (
        f"{model}, operating point: {_named(best)} refuses {measured(best.metrics[refusal])}; "
        f"the floor is {floor}. {sure}"
    )
    if useful is not None:
        text += f" Its {metric_label(useful)} is {measured(best.metrics[useful])}."
    parts = [_change(name, change) for name, change in changes.items()]
    if parts:
        text += f" Against the same training without projection, {' and '.join(parts)}."
    return text + _without_projection(study, own, refusal)


def _without_projection(study: Study, own: Sequence[Result], refusal: str) -> str:
    """A sentence on the point that `ebbline pick` names, where that is not projected."""
    useful, found = usefulness_metric(study), better_unprojected(study, own, refusal)
    if found is None:
        return ""
    text = (
        f" Without projection {_named(found)} holds the floor: it refuses "
        f"{measured(found.metrics[refusal])}"
    )
    return text + (
        "."
        if useful is None
        else f", and its {metric_label(useful)} is {measured(found.metrics[useful])}."
    )


def _named(result: Result) -> str:
    share = f"{result.changed_share or 0.0:.0%} of modules projected"
    return f"point {result.number} ({settings_label(result.point)}; {share})"


def _change(name: str, change: Comparison) -> str:
    how = how_found([change])
    how = f"; {how}" if how else ""
    return (
        f"{metric_label(name)} is {change.move} ({percent(change.before.value)} before, "
        f"{percent(change.after.value)} after{how})"
    )


def _unfinished(results: Sequence[Result]) -> list[str]:
    counts = Counter(result.status for result in results)
    parts = [
        f"{counts[status]} {status_label(status)}"
        for status in (*NO_RESULT, "running")
        if counts[status]
    ]
    said = (
        [f"Of {len(results)} points, {' and '.join(parts)}; no number here includes them."]
        if parts
        else []
    )
    same = sum(result.same_as is not None for result in results)
    if same:
        said.append(
            f"{same} points project the same modules as an earlier one and count once on "
            "the frontier."
        )
    return said


def _caution(done: Sequence[Result], refusal: str, told: Sequence[Comparison]) -> str:
    """What "higher" and "lower" mean here, and what the intervals do not cover."""
    metrics = [metric for result in done for metric in result.metrics.values()]
    one_seed = (
        ", and each point rests on one training seed"
        if all(len(metric.seeds) < 2 for metric in metrics)
        else ""
    )
    means = (
        ", those of means the normal ones"
        if any(metric.squares is not None for metric in metrics)
        else ""
    )
    sentences = [
        meaning(told),
        f"The intervals of rates are Wilson's{means}. They cover the sampling of prompts, "
        f"not of trainings{one_seed}.",
        *_between_seeds([result.metrics[refusal] for result in done], metric_label(refusal)),
        "A point picked as the best of many looks better than it is.",
    ]
    undecided = max(metric.undecided / metric.n for metric in metrics)
    if undecided > 0:
        sentences.append(
            f"At most {percent(undecided)} of a point's samples could not be judged; they "
            "count as not successful."
        )
    return " ".join(sentences)


def meaning(told: Sequence[Comparison]) -> str:
    by_intervals = "mean that the 95% intervals do not overlap"
    tests = [comparison.paired for comparison in told if comparison.paired is not None]
    if not tests:
        return f"Higher and lower {by_intervals}."
    test = (
        "McNemar's exact test"
        if all(test.n == test.items for test in tests)
        else "the exact sign test, in which a prompt counts once,"
    )
    return (
        "Higher and lower, where paired, mean that the same prompts differ: the 95% "
        "bootstrap interval of the difference leaves"
        f" out 0, and {test} has p < {LEVEL:g} after the correction by Benjamini and "
        "Hochberg for the comparisons that a sentence"
        " or a table tells together."
        + ("" if len(tests) == len(told) else f" Elsewhere they {by_intervals}.")
    )


def _between_seeds(metrics: Sequence[Metric], label: str) -> list[str]:
    spreads = [metric.between_seeds for metric in metrics if metric.between_seeds is not None]
    if not spreads:
        return []
    typical = math.sqrt(sum(spread**2 for spread in spreads) / len(spreads))
    most = f" (at most {100 * max(spreads):.1f})" if len(spreads) > 1 else ""
    varies = f"varies by a standard deviation of {100 * typical:.1f} points{most}"
    return [f"Between seeds the {label} {varies}; the intervals do not cover that."]
