"""`ebbline confirm`: measure nominated points again, on prompts and training seeds that chose
nothing, and say which of them hold their floor.

Invariant: the points, the prompts and the seeds are fixed before anything of them is measured.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout

from ebbline.analysis.results.collect import collect
from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.measurements import operating_point, refusal_metric, usefulness_metric
from ebbline.analysis.results.picks.confirmed import STANDS, lines_of_confirmed
from ebbline.analysis.results.picks.floors import Claim, Floor, pick, standing
from ebbline.analysis.results.picks.picked import named
from ebbline.analysis.results.picks.simplest import MARGIN
from ebbline.analysis.results.wording import natural
from ebbline.commands.run import Place, run_study
from ebbline.options import FAILED_POINTS
from ebbline.outputs import attempts_of, write_outputs
from ebbline.sweeps.drive.confirming import begin
from ebbline.sweeps.study.points import Result, brought
from ebbline.sweeps.study.reading.overlaps import require_apart
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError


def confirm_study(
    view: StudyView,
    place: Place,
    numbers: Sequence[int] = (),
    wandb: bool = True,
    resume: str = "",
    as_json: bool = False,
    wide: bool = False,
) -> int:
    """Confirm the points of these numbers, by default each size's nominated ones. Returns the exit
    code of the run that measures them.

    Raises StudyError for a study without `confirm`, for prompts that it shares with the search or
    a training, and where nothing is nominated.
    """
    study = view.study
    view.home.require(study.study)
    results = collect(view)
    points = nominated(study, results, numbers)
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        shared = require_apart(view) if study.confirm is not None else []
        for each in shared:
            if each.overlap is not None and each.overlap.near:
                print(f"note: {each}", file=sys.stderr)
        confirming = begin(view, [result.point for result in points])
        print(
            f"{confirming.study.study}: {len(points)} of {len(finished(results))} points, "
            f"{len(confirming.study.seeds)} training seeds, prompts that chose nothing"
        )
        code = run_study(confirming, place, wandb, resume or confirming.name, wide=wide)
    if code not in (0, FAILED_POINTS):
        return code
    results = collect(view)
    attempts = attempts_of(view)
    write_outputs(view, results, attempts)
    chosen = [result for result in results if result.confirmed is not None]
    if as_json:
        print(json.dumps({"study": study.study, "confirmed": list(_rows(study, chosen))}, indent=1))
    else:
        print("\n".join(["", *_lines(study, chosen)]))
    return code


def nominated(study: Study, results: Sequence[Result], numbers: Sequence[int]) -> list[Result]:
    """The points to confirm: those of the numbers, or each size's pick and its best projected
    point, as far as their values meet the refusal floor.
    """
    done = finished(results)
    if numbers:
        found = {result.number: result for result in done}
        missing = [number for number in numbers if number not in found]
        if missing:
            raise StudyError(f"{study.study} has no finished point {missing[0]}")
        return [found[number] for number in dict.fromkeys(numbers)]
    refusal = refusal_metric(study)
    if refusal is None:
        raise StudyError(
            f"{study.study} measures no refusal_rate, so no point is nominated; name points with "
            "--point"
        )
    floors, useful = [Floor(refusal, study.refusal_floor)], usefulness_metric(study)
    margin = MARGIN if study.defences else None  # as `ebbline pick` does
    chosen: dict[int, Result] = {}
    for model in sorted({result.point.model for result in done}, key=natural):
        own = [result for result in done if result.point.model == model]
        for best in (
            pick(own, floors, useful, margin=margin),
            operating_point(study, own, refusal),
        ):
            if best is not None and best.meets:
                chosen[best.result.number] = best.result
    if not chosen:
        raise StudyError(
            f"none holds: no point of {study.study} meets {floors[0]}, so there is nothing to "
            "confirm. --point N confirms another point"
        )
    return list(chosen.values())


def _floors(study: Study) -> list[Floor]:
    refusal = refusal_metric(study)
    return [] if refusal is None else [Floor(refusal, study.refusal_floor)]


def _lines(study: Study, chosen: Sequence[Result]) -> Iterator[str]:
    """The verdict on each confirmed point, then how many of the settings hold."""
    floors = _floors(study)
    for result in chosen:
        yield f"{result.point.model}, {named(result)}:"
        yield from (f"  {line}" for line in lines_of_confirmed(result, floors))
    held = sum(standing(result, floors, "setting") == "holds" for result in chosen)
    trained = all(brought(result.point) is None for result in chosen)
    what = "setting" if trained else "point"
    total = f"{len(chosen)} confirmed {what}{'s' * (len(chosen) != 1)}"
    yield f"none of {total} holds the floor" if not held else f"{held} of {total} hold the floor"


def _rows(study: Study, chosen: Sequence[Result]) -> Iterator[dict[str, object]]:
    floors = _floors(study)
    for result in chosen:
        claims: tuple[Claim, ...] = ("adapter", "setting")
        of_adapter = brought(result.point) is not None
        words = {c: standing(result, floors, c) for c in claims[: 1 if of_adapter else 2]}
        yield {
            "model": result.point.model,
            "number": result.number,
            "standing": words,
            "in_words": {claim: STANDS[found] for claim, found in words.items()},
            "lines": list(lines_of_confirmed(result, floors)),
        }
