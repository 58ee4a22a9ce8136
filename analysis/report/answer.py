"""The study's answer in plain sentences, generated from the numbers.

Invariants: a value is called higher or lower only if a paired test or disjoint 95% intervals show
it. An expected effect that is absent is reported as absent. An operating point is never called
safe on its value alone.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from ebbline.analysis.results.before_after import Line
from ebbline.analysis.results.claims.between_seeds import FEWEST_SEEDS, crossed_spreads
from ebbline.analysis.results.claims.family import Family, family
from ebbline.analysis.results.defended.labels import defence_of_study
from ebbline.analysis.results.frontier import finished, objective_values
from ebbline.analysis.results.measurements import (
    LEVEL,
    MOVES,
    NO_EVIDENCE,
    Baselines,
    Comparison,
    Evidence,
    better_undefended,
    is_defended,
    operating_point,
    refusal_metric,
    undefended,
    usefulness_metric,
)
from ebbline.analysis.results.picks.confirmed import confirmed_words
from ebbline.analysis.results.picks.floors import Pick, Standing
from ebbline.analysis.results.picks.picked import FEW_ITEMS, Gain
from ebbline.analysis.results.tables import in_points
from ebbline.analysis.results.wording import (
    NO_RESULT,
    changed_label,
    counted_label,
    measured,
    metric_label,
    natural,
    percent,
    settings_label,
    status_label,
    undecided_label,
)
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import Metric


def answer(
    study: Study,
    results: Sequence[Result],
    baselines: Baselines,
    evidence: Evidence = NO_EVIDENCE,
    of: Family | None = None,
) -> list[str]:
    """Paragraphs on each model's fine-tuning, defence and operating point, then the limits.

    `evidence` holds the samples: measurements on the same prompts are compared in pairs. Without
    samples they are compared by their intervals. Of many points, some are compared; the sentences
    say how many. `of` has the comparisons of the report; they are computed if not given. Raises
    EvaluationError when a finished point lacks the refusal rate or an objective.
    """
    refusal, done = refusal_metric(study), finished(results)
    if refusal is None:
        return [
            "This study measures no refusal rate, so it cannot say how refusals moved.",
            *_unfinished(results),
        ]
    if not done:
        return ["No point has finished, so there is no answer yet.", *_unfinished(results)]
    objective_values(done, [refusal, *study.objectives])  # raises when a value is missing
    of = family(study, results, baselines, evidence) if of is None else of
    paragraphs: list[str] = []
    comparisons: list[Comparison] = []
    models = sorted({result.point.model for result in done}, key=natural)
    by_model = {
        model: [result for result in done if result.point.model == model] for model in models
    }
    what = defence_of_study(study)
    for model, own in by_model.items():
        aligned = baselines.get(model, {}).get(refusal)
        plain = list(undefended(own).values())
        moved = of.moves[model]
        paragraphs += [
            _fine_tuning(model, plain, refusal, aligned, moved.by_tuning, what),
            _defence(model, own, moved.by_defence, moved.defended, what),
        ]
        comparisons += [*moved.by_tuning, *moved.by_defence]
        picked = operating_point(study, own, refusal)
        if picked is not None:
            names = [name for name in (usefulness_metric(study), refusal) if name is not None]
            found = {
                line.name: line.changes["defence"]
                for line in of.lines
                if line.model == model and "defence" in line.changes
            }
            changes = {name: found[name] for name in names if picked.meets and name in found}
            paragraphs.append(_pick(study, model, own, refusal, picked, changes))
            paragraphs[-1] += _no_gain(study, model, of.lines) if picked.meets else ""
            comparisons += changes.values()
    return [
        *paragraphs,
        *_unfinished(results),
        _caution(study, done, refusal, comparisons, of.size),
    ]


def _of_all(compared_count: int, count: int, what: str) -> str:
    """Says that only a part was compared; empty if all were."""
    return "" if compared_count == count else f" ({compared_count} of {count} {what} compared)"


def _fine_tuning(
    model: str,
    plain: Sequence[Result],
    refusal: str,
    aligned: Metric | None,
    from_tuning: Sequence[Comparison],
    what: str,
) -> str:
    if not plain:
        return (
            f"{model}, fine-tuning: every finished point is defended, so the effect of "
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
            f" Without {what}, the fine-tuned refusal rate is {found}."
        )
    text = (
        f"{model}, fine-tuning: the aligned model refuses {measured(aligned)}. Fine-tuned "
        f"without {what}, the"
        f" refusal rate is {tally(from_tuning, 'training')}"
        f"{_of_all(len(from_tuning), len(plain), 'trainings')}: {found}."
    )
    if aligned.value == 0:
        text += " It refused nothing before, so no loss of refusals could show."
    elif all(comparison.move != "lower" for comparison in from_tuning):
        text += (
            " The expected loss of refusals is absent: no "
            f"{'fine-tuning' if len(from_tuning) == len(plain) else 'compared fine-tuning'} of "
            f"{model} measurably lowered them, so there was"
            f" nothing for {what} to bring back."
        )
    return text


def _defence(
    model: str,
    own: Sequence[Result],
    comparisons: Sequence[Comparison],
    defended: int,
    what: str,
) -> str:
    if not any(is_defended(result) for result in own):
        return (
            f"{model}, defence: no defended point has finished, so the effect of {what} is not "
            "known."
        )
    if not comparisons:
        return (
            f"{model}, defence: no defended point has one without {what} of the same training "
            "beside it, so its effect is not known."
        )
    text = (
        f"{model}, defence: against the same training without it, refusal rate is "
        f"{tally(comparisons, 'point')}{_of_all(len(comparisons), defended, 'points')}."
    )
    if all(comparison.move != "higher" for comparison in comparisons):
        text += (
            f" The expected effect is absent: {what} did not measurably raise the refusals of "
            f"{model}."
        )
    return text


def tally(comparisons: Sequence[Comparison], of: str) -> str:
    """Counts the outcomes in words: "higher at all 12 points", where `of` is "point"."""
    moves = [comparison.move for comparison in comparisons]
    how = how_found(comparisons)
    how = f" ({how})" if how else ""
    return (moves[0] if len(moves) == 1 else counted_label(moves, MOVES, of)) + how


def how_found(comparisons: Sequence[Comparison]) -> str:
    """The differences that the paired tests found; empty if all comparisons used intervals."""
    tests = [comparison.paired for comparison in comparisons if comparison.paired is not None]
    if not tests:
        return ""
    if len(comparisons) == 1:
        low, high = comparisons[0].interval
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
    picked: Pick,
    changes: Mapping[str, Comparison],
) -> str:
    """The operating point: its refusal rate, the certainty of that, and the cost in usefulness."""
    useful, floor, best = usefulness_metric(study), percent(study.refusal_floor), picked.result
    if not picked.meets:
        return (
            f"{model}, operating point: none of {sum(map(is_defended, own))} defended "
            f"points holds the refusal floor of {floor}."
            f" The nearest, {_named(best)}, refuses "
            f"{measured(best.metrics[refusal])}{' in the search' if picked.refuted else ''}."
            f"{_confirmation(picked, refusal)}"
            f"{_undefended(study, own, refusal)}"
        )
    text = (
        f"{model}, operating point: {_named(best)} refuses {measured(best.metrics[refusal])}; "
        f"the floor is {floor}.{_confirmation(picked, refusal)}"
    )
    if useful is not None:
        text += f" Its {metric_label(useful)} is {measured(best.metrics[useful])}."
    parts = [_change(name, change) for name, change in changes.items()]
    if parts:
        text += f" Against the same training without it, {' and '.join(parts)}."
    return text + _undefended(study, own, refusal)


def _no_gain(study: Study, model: str, lines: Sequence[Line]) -> str:
    """A sentence on an operating point that is not measurably more useful than the model before
    fine-tuning; empty where it is, and where that is not known.
    """
    useful = usefulness_metric(study)
    for line in lines:
        if line.model == model and line.name == useful and "both" in line.changes:
            gain = Gain(useful, line.changes["both"])
            return "" if gain.is_one else f" It is {gain}."
    return ""


def _confirmation(picked: Pick, refusal: str) -> str:
    """Sentences on what the claim rests on: the search alone, or the confirmed numbers."""
    confirmed = confirmed_words(picked.result, refusal)
    if not confirmed:
        if not picked.meets:
            return ""
        return (
            f" It is a candidate: the best of {picked.among} different adapters by the numbers "
            "that chose it, which look better than they are. `ebbline confirm` measures it on "
            "other prompts and training seeds."
        )
    about = picked.result.confirmed is not None and picked.result.confirmed.setting
    return f" {STANDS[picked.standing].format('setting' if about else 'adapter')} {confirmed}"


STANDS: dict[Standing, str] = {
    "holds": "Confirmed: the {0} holds the floor.",
    "unsure": "Confirmed, and not sure: the {0}'s value meets the floor, its bound does not.",
    "candidate": "Its {0} was not confirmed.",
    "missed": "Confirmed not to hold: the {0}'s value is below the floor.",
}


def _undefended(study: Study, own: Sequence[Result], refusal: str) -> str:
    """A sentence on the point that `ebbline pick` names, if no defence changed that point."""
    useful, found = usefulness_metric(study), better_undefended(study, own, refusal)
    if found is None:
        return ""
    best = found.result
    stands = "holds the floor" if found.holds else "meets the floor as a candidate"
    text = (
        f" Without {defence_of_study(study)} {_named(best)} {stands}: it refuses "
        f"{measured(best.metrics[refusal])}"
    )
    return text + (
        "."
        if useful is None
        else f", and its {metric_label(useful)} is {measured(best.metrics[useful])}."
    )


def _named(result: Result) -> str:
    return f"point {result.number} ({settings_label(result.point)}; {changed_label(result)})"


def _change(name: str, change: Comparison) -> str:
    how = how_found([change])
    how = f"; {how}" if how else ""
    return (
        f"{metric_label(name)} is {change.move} ({_brief(change.before)} before, "
        f"{_brief(change.after)} after{how})"
    )


def _brief(metric: Metric) -> str:
    return percent(metric.value) + undecided_label(metric.undecided, " with ")


def _unfinished(results: Sequence[Result]) -> list[str]:
    counts = Counter(result.status for result in results)
    parts = [
        f"{counts[status]} {status_label(status)}"
        for status in (*NO_RESULT, "running")
        if counts[status]
    ]
    sentences = (
        [f"Of {len(results)} points, {' and '.join(parts)}; no number here includes them."]
        if parts
        else []
    )
    same = sum(result.same_as is not None for result in results)
    if same:
        sentences.append(
            f"{same} points have the answers of an earlier one and count once on the frontier."
        )
    return sentences


def _caution(
    study: Study,
    done: Sequence[Result],
    refusal: str,
    comparisons: Sequence[Comparison],
    size: int,
) -> str:
    """Explains "higher" and "lower", and what the intervals do not cover."""
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
        meaning(comparisons, size),
        f"The intervals of rates are Wilson's{means}. They cover the sampling of prompts, "
        f"not of trainings{one_seed}.",
        *_between_seeds(study, [result.metrics[refusal] for result in done], refusal),
        "A point picked as the best of many looks better than it is.",
        *filter(None, [size_confound(study, done), _few_items(done)]),
    ]
    undecided = max(metric.undecided / metric.n for metric in metrics)
    if undecided > 0:
        sentences.append(
            f"At most {percent(undecided)} of a point's samples could not be judged; they "
            "count against the point, in its rates and in every bound and comparison."
        )
    return " ".join(sentences)


def _few_items(done: Sequence[Result]) -> str:
    """Names the metrics that rest on too few prompts for a claim."""
    fewest: dict[str, float] = {}
    for result in done:
        for name, metric in result.metrics.items():
            fewest[name] = min(metric.items, fewest.get(name, metric.items))
    few = [f"{metric_label(name)} ({n:.0f})" for name, n in fewest.items() if n < FEW_ITEMS]
    if not few:
        return ""
    return f"Too few prompts for a claim, under {FEW_ITEMS}: {', '.join(few)}."


def meaning(comparisons: Sequence[Comparison], size: int | None = None) -> str:
    """Explains how "higher" and "lower" were decided for these comparisons. `size` is the number of
    tests of the family that they belong to, where that is the whole report.
    """
    by_intervals = "mean that the 95% intervals do not overlap"
    tests = [comparison.paired for comparison in comparisons if comparison.paired is not None]
    if not tests:
        return f"Higher and lower {by_intervals}.{about(comparisons)}"
    test = (
        "McNemar's exact test"
        if all(test.n == test.items for test in tests)
        else "the exact sign test, in which a prompt counts once,"
    )
    return (
        "Higher and lower, where paired, mean that the same prompts differ: the 95% "
        "bootstrap interval of the difference leaves"
        f" out 0, and {test} has p < {LEVEL:g}. This p-value is corrected by Benjamini and "
        f"Hochberg for the whole family: {FAMILY.format(size) if size else TABLE}. It does not "
        "allow for the choice of a picked point."
        + ("" if len(tests) == len(comparisons) else f" Elsewhere they {by_intervals}.")
        + about(comparisons)
    )


TABLE = "all models of the same sentences or table"
FAMILY = (
    "all {} tests of this report, which are those of trainings, of defended points, of the table "
    "before and after, and of defences against controls and each other"
)


def about(comparisons: Sequence[Comparison]) -> str:
    """Whether the verdicts are about settings or only about the adapters that were measured."""
    settings = [each.between.seeds for each in comparisons if each.between is not None]
    adapters = len(comparisons) - len(settings)
    over = (
        f" With {_counts(settings)} seeds they are about the setting, and also need the 95% t "
        "interval over the seeds to leave out 0."
        if settings
        else ""
    )
    only = (
        f" {'Elsewhere they' if settings else 'They'} are about the adapters that were measured, "
        f"not about their settings: that needs {FEWEST_SEEDS} training seeds."
        if adapters
        else ""
    )
    return over + only


def _counts(seeds: Sequence[int]) -> str:
    few, most = min(seeds), max(seeds)
    return str(few) if few == most else f"{few} to {most}"


def size_confound(study: Study, results: Sequence[Result]) -> str:
    """What a comparison of data sizes holds equal; the other one moves with the size. Empty where
    the points have one size.
    """
    axes = [dict(result.point.values) for result in results]
    if study.train is None or len({each.get("data.size") for each in axes}) < 2:
        return ""
    steps = {each.get("train.steps", study.train.steps) for each in axes}
    if None in steps and len(steps) > 1:
        fixed = ", ".join(sorted((str(each) for each in steps if each is not None), key=natural))
        return (
            "Data sizes are compared in both ways. At equal epochs (points whose train.steps is "
            f"none) a larger set was trained on for more steps; at equal steps ({fixed}) a smaller "
            "set was seen more often. An effect of the size that only one of them shows may be one "
            "of the steps or of the repetition."
        )
    if None not in steps:
        return (
            "Data sizes are compared at equal steps, so a smaller set was seen more often: an "
            "effect of the size may be one of the repetition."
        )
    return (
        "Data sizes are compared at equal epochs, so a larger set was trained on for more steps: "
        "an effect of the size may be one of the number of steps."
    )


def _between_seeds(study: Study, metrics: Sequence[Metric], name: str) -> list[str]:
    """How far the seeds' values are apart, and what that spread contains."""
    spreads = [metric.between_seeds for metric in metrics if metric.between_seeds is not None]
    if not spreads:
        return []
    typical = _root_mean_square(spreads)
    most = f" (at most {100 * max(spreads):.1f})" if len(spreads) > 1 else ""
    varies = f"varies by a standard deviation of {100 * typical:.1f} points{most}"
    return [
        f"Between seeds the {metric_label(name)} {varies}; the intervals of rates do not cover "
        f"that. {_contents(study, metrics)}"
    ]


def _contents(study: Study, metrics: Sequence[Metric]) -> str:
    if study.train is None:
        return "The adapters were trained elsewhere, so what their spread contains is not known."
    if study.subsets is None:
        return "Each seed draws its own rows and its own training, so the spread contains both."
    if study.subsets == 1:
        return "All seeds train on the same rows, so the spread is that of the training alone."
    found = [
        each
        for metric in metrics
        if (each := crossed_spreads(metric.seeds, study.subsets)) is not None
    ]
    if not found:
        return (
            "Trainings are crossed with subsets of the data, and no point has two of each, so "
            "their spreads are not told apart."
        )
    training, data, rest = (
        100 * _root_mean_square([getattr(each, part) for each in found])
        for part in ("training", "data", "rest")
    )
    return (
        f"Trainings are crossed with {study.subsets} subsets of the data: {training:.1f} points of "
        f"it are between trainings, {data:.1f} between subsets, {rest:.1f} are left. The t tests "
        "take all seeds as independent, which crossed ones are not."
    )


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))
