"""The study's answer in plain sentences, generated from the numbers.

Invariants: nothing is called higher or lower unless the 95% intervals stay apart; an expected effect that is absent is
said to be absent; an operating point is never called safe on its value alone.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from analysis.compare import (
    Baselines,
    Move,
    is_projected,
    moved,
    operating_point,
    refusal_metric,
    training_of,
    unprojected,
    usefulness_metric,
)
from analysis.frontier import finished, values_of
from analysis.wording import measured, metric_label, natural, percent, settings_label
from sweeps.points import Result
from sweeps.study import Study
from tasks.metrics import Metric


def answer(study: Study, results: Sequence[Result], baselines: Baselines) -> list[str]:
    """A paragraph per model on fine-tuning, on projection and on the point to pick; then what limits them."""
    refusal, done = refusal_metric(study), finished(results)
    if refusal is None:
        return ["This study measures no refusal rate, so it cannot say how refusals moved.", *_unfinished(results)]
    if not done:
        return ["No point has finished, so there is no answer yet.", *_unfinished(results)]
    values_of(done, [refusal, *study.objectives])  # raises when one was not measured
    paragraphs: list[str] = []
    for model in sorted({result.point.model for result in done}, key=natural):
        own = [result for result in done if result.point.model == model]
        aligned = baselines.get(model, {}).get(refusal)
        paragraphs += [_fine_tuning(model, own, refusal, aligned), _projection(model, own, refusal)]
        if any(is_projected(result) for result in own):
            paragraphs.append(_pick(study, model, own, refusal))
    return [*paragraphs, *_unfinished(results), _caution(done)]


def _fine_tuning(model: str, own: Sequence[Result], refusal: str, aligned: Metric | None) -> str:
    plain = [result.metrics[refusal] for result in unprojected(own).values()]
    if not plain:
        return f"{model}, fine-tuning: every finished point is projected, so the effect of fine-tuning alone is not known."
    values = sorted(metric.value for metric in plain)
    found = measured(plain[0]) if len(plain) == 1 else f"{percent(values[0])} to {percent(values[-1])}"
    if aligned is None:
        return (
            f"{model}, fine-tuning: the aligned model was not measured, so how far refusals moved is not known."
            f" Without projection, the fine-tuned refusal rate is {found}."
        )
    moves = Counter(moved(aligned, metric) for metric in plain)
    text = (
        f"{model}, fine-tuning: the aligned model refuses {measured(aligned)}. Fine-tuned without projection, the"
        f" refusal rate is {_tally(moves, len(plain), 'training')}: {found}."
    )
    if not moves["lower"]:
        text += (
            f" The expected loss of refusals is absent: no fine-tuning of {model} measurably lowered them, so there was"
            " nothing for projection to bring back."
        )
    return text


def _projection(model: str, own: Sequence[Result], refusal: str) -> str:
    projected = [result for result in own if is_projected(result)]
    if not projected:
        return f"{model}, projection: no projected point has finished, so the effect of projection is not known."
    twins = unprojected(own)
    pairs = [(twins[training_of(r)].metrics[refusal], r.metrics[refusal]) for r in projected if training_of(r) in twins]
    if not pairs:
        return (
            f"{model}, projection: no projected point has an unprojected one of the same training beside it, so the effect"
            " of projection is not known."
        )
    moves = Counter(moved(before, after) for before, after in pairs)
    text = f"{model}, projection: against the same training without it, refusal rate is {_tally(moves, len(pairs), 'point')}."
    if not moves["higher"]:
        text += f" The expected effect is absent: projection did not measurably raise the refusals of {model}."
    return text


def _tally(moves: Counter[Move], total: int, of: str) -> str:
    if total == 1:
        return next(iter(moves))
    order: tuple[Move, ...] = ("higher", "lower", "not distinguishable")
    parts = [f"{move} at {moves[move]}" for move in order if moves[move]]
    return f"{', '.join(parts)} of {total} {of}s" if len(parts) > 1 else f"{next(iter(moves))} at all {total} {of}s"


def _pick(study: Study, model: str, own: Sequence[Result], refusal: str) -> str:
    """The operating point in words: what it refuses, how sure that is, and what it costs."""
    useful, floor = usefulness_metric(study), percent(study.refusal_floor)
    found = operating_point(study, own, refusal)
    if found is None:
        return f"{model}, operating point: none, as no projected point has finished."
    best, holds = found
    if not holds:
        return (
            f"{model}, operating point: none of {sum(map(is_projected, own))} projected points holds the refusal floor of {floor}."
            f" The nearest, {_named(best)}, refuses {measured(best.metrics[refusal])}."
        )
    rank = [name for name in (useful, refusal) if name is not None]
    low = best.metrics[refusal].interval[0]
    sure = (
        "Its whole interval is at or above the floor."
        if low >= study.refusal_floor
        else f"Its interval reaches down to {percent(low)}, so whether it holds the floor is not certain."
    )
    text = f"{model}, operating point: {_named(best)} refuses {measured(best.metrics[refusal])}; the floor is {floor}. {sure}"
    if useful is not None:
        text += f" Its {metric_label(useful)} is {measured(best.metrics[useful])}."
    twin = unprojected(own).get(training_of(best))
    if twin is not None:
        text += f" Against the same training without projection, {_changes(twin, best, rank)}."
    return text


def _named(result: Result) -> str:
    share = f"{result.projected_share or 0.0:.0%} of modules projected"
    return f"point {result.number} ({settings_label(result.point)}; {share})"


def _changes(before: Result, after: Result, names: Iterable[str]) -> str:
    parts = []
    for name in names:
        old, new = before.metrics[name], after.metrics[name]
        parts.append(f"{metric_label(name)} is {moved(old, new)} ({percent(old.value)} before, {percent(new.value)} after)")
    return " and ".join(parts)


def _unfinished(results: Sequence[Result]) -> list[str]:
    failed = sum(result.status == "failed" for result in results)
    running = sum(result.status == "running" for result in results)
    parts = [f"{count} {word}" for count, word in ((failed, "failed"), (running, "still running")) if count]
    return [f"Of {len(results)} points, {' and '.join(parts)}; no number here includes them."] if parts else []


def _caution(done: Sequence[Result]) -> str:
    seeds = {len(metric.seeds) for result in done for metric in result.metrics.values()}
    replicates = ", and each point rests on one training seed" if seeds <= {0, 1} else ""
    undecided = max(metric.undecided / metric.n for result in done for metric in result.metrics.values())
    text = (
        f"Higher and lower mean that the 95% Wilson intervals do not overlap. The intervals cover the sampling of prompts,"
        f" not of trainings{replicates}. A point picked as the best of many looks better than it is."
    )
    if undecided > 0:
        text += f" At most {percent(undecided)} of a point's samples could not be judged; they count as not successful."
    return text
