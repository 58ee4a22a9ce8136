"""The Pareto frontier: the results that no other result dominates.

Invariants: only finished results count. NaN is an error, never the worst value. Two results with
equal values are both on the front or both off it. A hypervolume lies in [0, 1] (see
ebbline.sweeps.dominance).

A report reads metrics, costs and origins of all points. Samples, notes on adapters and cosines are
files of each point: of more than MOST_READ points, those of the shortlist are read.

Arrays: `values_NM` has N results and M objectives.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ebbline.analysis.results.wording import natural
from ebbline.sweeps import dominance
from ebbline.sweeps.study.points import Result, distinct
from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.metrics import Direction, direction

MOST_READ = 200
T = TypeVar("T")


def front(values_NM: NDArray[np.float64], directions: Sequence[Direction]) -> NDArray[np.bool_]:
    """Whether each row is dominated by no other row, as (N,) booleans.

    Raises EvaluationError on NaN or on a wrong number of columns.
    """
    _check(values_NM, directions)
    return dominance.non_dominated(values_NM, _maximise(directions))


def hypervolume(
    values_NM: NDArray[np.float64],
    directions: Sequence[Direction],
    reference: Sequence[float] | None = None,
) -> float:
    """The volume that the rows dominate, up to `reference` (default: the worst corner).

    Raises EvaluationError as `front` does.
    """
    _check(values_NM, directions)
    return dominance.hypervolume(values_NM, _maximise(directions), reference)


def finished(results: Sequence[Result]) -> list[Result]:
    """The results with status done, by number."""
    return sorted(
        (result for result in results if result.status == "done"), key=lambda result: result.number
    )


def frontier(results: Sequence[Result], objectives: Sequence[str]) -> list[Result]:
    """The finished results that no other dominates over the objectives, by number.

    Of points that equal one another only the first counts.
    """
    done = distinct(finished(results))
    on_front = front(objective_values(done, objectives), [direction(name) for name in objectives])
    return [result for result, on in zip(done, on_front, strict=True) if on]


def frontier_by_model(
    results: Sequence[Result], objectives: Sequence[str]
) -> dict[str, list[Result]]:
    """Model -> its own frontier, in natural order, for models with a finished result."""
    models = sorted({result.point.model for result in finished(results)}, key=natural)
    return {
        model: frontier([r for r in results if r.point.model == model], objectives)
        for model in models
    }


def frontier_hypervolume(results: Sequence[Result], objectives: Sequence[str]) -> float:
    return hypervolume(
        objective_values(finished(results), objectives), [direction(name) for name in objectives]
    )


def objective_values(results: Sequence[Result], objectives: Sequence[str]) -> NDArray[np.float64]:
    """The objectives' values, as (N, M). Raises EvaluationError when a result lacks one."""
    for result in results:
        missing = [name for name in objectives if name not in result.metrics]
        if missing:
            raise EvaluationError(
                f"point {result.number} ({result.point}) is done but has no {missing}; it "
                f"has {sorted(result.metrics)}."
                " Name objectives that the study's suites measure"
            )
    rows = [[result.metrics[name].value for name in objectives] for result in results]
    return np.array(rows, dtype=np.float64).reshape(len(results), len(objectives))


def evenly(items: Sequence[T], most: int = MOST_READ) -> list[T]:
    """At most this number of items, evenly over all of them: those that a count of outcomes reads
    of many.
    """
    step = max(1.0, len(items) / most)
    return [items[int(place * step)] for place in range(min(most, len(items)))]


def shortlist(results: Sequence[Result], objectives: Sequence[str]) -> list[Result]:
    """The finished results whose files a report reads for tables and curves, by number: all, or
    MOST_READ of them, those on a frontier first, then others evenly over the study.
    """
    done = finished(results)
    if len(done) <= MOST_READ:
        return done
    fronts = frontier_by_model(done, objectives).values()
    order = dict.fromkeys(each.number for found in fronts for each in found)
    order |= dict.fromkeys(result.number for result in evenly(done))
    chosen = set(list(order)[:MOST_READ])
    return [result for result in done if result.number in chosen]


def shortlist_note(results: Sequence[Result]) -> str:
    """A sentence for the report; empty where every point is read."""
    count = len(finished(results))
    if count <= MOST_READ:
        return ""
    return (
        f"Of the {count} finished points, {MOST_READ} are in categories.csv, in the notes on "
        "adapters and in the curves of what was projected: those on a frontier first, then others "
        "evenly over the study. All other numbers cover every point."
    )


def _check(values_NM: NDArray[np.float64], directions: Sequence[Direction]) -> None:
    if values_NM.ndim != 2 or values_NM.shape[1] != len(directions) or not directions:
        raise EvaluationError(
            f"values of shape {values_NM.shape} do not fit {len(directions)} objectives"
        )
    rows, columns = np.nonzero(np.isnan(values_NM))
    if rows.size:
        raise EvaluationError(
            f"objective {columns[0]} of result {rows[0]} is NaN; a frontier needs a number "
            "from each"
        )


def _maximise(directions: Sequence[Direction]) -> list[bool]:
    return [way == "maximise" for way in directions]
