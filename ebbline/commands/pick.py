"""`ebbline pick`: the operating point that a defender would ship, the confidence that it holds the
floor, and the export of its adapter.

Invariant: an adapter is exported only when `ebbline confirm` has shown that it holds the study's
refusal floor and every floor on the command line. With `--accept-unsure` its values are enough. No
option lowers the study's floor or reverses a metric's direction.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ebbline.analysis.results.collect import StoredEvidence, baselines, collect
from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.measurements import usefulness_metric
from ebbline.analysis.results.picks.choices import record_choices
from ebbline.analysis.results.picks.floors import (
    METHOD,
    Floor,
    Pick,
    Standing,
    adapter_standing,
    of_seed,
    pick,
    slack,
)
from ebbline.analysis.results.picks.picked import (
    Gain,
    gain_of,
    in_words,
    lines_of,
    missed_by,
    named,
    picked_json,
    preferred,
    too_low,
    values_of_pick,
    weak_categories,
)
from ebbline.analysis.results.picks.simplest import MARGIN
from ebbline.analysis.results.wording import measured, metric_label, natural
from ebbline.shipping import ship
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.state.trials import settings_mark
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.reading.field_faults import unknown
from ebbline.sweeps.study.space import limit
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError

SHOWN_CATEGORIES = 5


@dataclass(frozen=True)
class PickOptions:
    """The options of the command line as the user wrote them: NAME=SHARE texts, metric names,
    sizes.
    """

    floors: tuple[str, ...] = ()
    maximise: str | None = None
    model: str | None = None
    point: int | None = None
    confidence: float | None = None
    margin: float = MARGIN
    seed: int | None = None
    with_base: bool = False
    accept_unsure: bool = False
    each_category: bool = False


def pick_study(view: StudyView, options: PickOptions, to: Path | None, as_json: bool) -> int:
    """Print the pick of each requested size; with `to`, export its adapter. Returns 1 when a size
    has no pick that is confirmed to hold the floors; with `accept_unsure`, none whose values meet
    them. A pick without a gain over not fine-tuning counts as none, unless the user named it or
    accepts it.

    Records the picks that meet the study's own floor, so that the study's figures mark them. Raises
    StudyError for invalid options. Raises it before any write when the export would be below a
    floor.
    """
    if options.with_base and to is None:
        raise StudyError("--with-base belongs to --export DIR; give both")
    study, name = view.study, view.name
    view.home.require(study.study)
    floors, maximised = floors_of(study, options.floors), maximised_of(study, options.maximise)
    models = _models(study, options, to)
    results = collect(view)
    done = finished(results)
    before, evidence = baselines(view), StoredEvidence(view)
    by_model = {
        model: [
            result
            for result in done
            if result.point.model == model
            and not (options.each_category and weak_categories(result, floors, evidence))
        ]
        for model in models
    }
    found_by_model = {
        model: pick(
            own,
            floors,
            maximised,
            options.confidence,
            options.point,
            options.margin if study.defences else None,
        )
        for model, own in by_model.items()
    }
    picks = {model: found for model, found in found_by_model.items() if found is not None}
    if options.point is not None and not picks:
        raise StudyError(
            f"{study.study} has no finished point {options.point}; `ebbline report {name}` "
            "lists them, in results.csv"
        )
    if to is not None and not picks:
        raise StudyError(
            f"no point of {', '.join(models)} has finished, so there is nothing to "
            f"export; `ebbline run {name}` continues"
        )
    gains = {
        model: gain_of(study, found, before.get(model, {}), evidence)
        for model, found in picks.items()
    }
    exported = None
    if to is not None:
        exported = _export(view, picks, gains, by_model, options, len(done), to)
    changed = view.changed()
    recorded = not changed and _record(view, picks.values())
    if as_json:
        progress = {"done": len(done), "asked_for": len(results), "limit": limit(study)}
        summary = {
            "study": study.study,
            "points": progress,
            "method": METHOD,
            "changed_since_it_was_begun": changed,
            "picks": [
                {
                    **picked_json(study, found),
                    "weak_categories": [
                        each.as_json() for each in weak_categories(found.result, floors, evidence)
                    ],
                    "gain": None if (gain := gains[model]) is None else gain.as_json(),
                }
                for model, found in picks.items()
            ],
        }
        print(json.dumps({**summary, "exported": exported}, indent=1))
    else:
        so_far = f"{len(done)}{f' of {limit(study)}' if limit(study) else ''} points done"
        _print_picks(
            study, name, models, picks, gains, options, so_far, floors, to is None and not changed
        )
        _print_weak(picks, floors, evidence)
        if changed:
            print(
                "\nThis file differs from the one that the study began with, so it cannot export:"
            )
            print("\n".join(f"  {line}" for line in changed[:10]))
        if exported is not None:
            base = ", the aligned model in aligned/" if options.with_base else ""
            print(
                f"\nexported to {to}: the adapter of seed {exported['seed']}, with its "
                f"model card README.md{base}. Nothing was uploaded."
            )
        if recorded:
            print(f"\nthe figures of `ebbline report {name}` mark the pick from now on")
    required_models = models if options.point is None else list(picks)
    return 0 if all(_is_enough(model, picks, gains, options) for model in required_models) else 1


def _is_enough(
    model: str,
    picks: Mapping[str, Pick],
    gains: Mapping[str, Gain | None],
    options: PickOptions,
) -> bool:
    """Whether a size has a pick that a script may go on with."""
    if model not in picks:
        return False
    if options.accept_unsure:
        return picks[model].meets
    return picks[model].holds and (options.point is not None or _gains(gains[model]))


def _gains(gain: Gain | None) -> bool:
    """Whether a pick is better than not fine-tuning, as far as that is known."""
    return gain is None or gain.is_one


def _print_weak(
    picks: Mapping[str, Pick], floors: Sequence[Floor], evidence: StoredEvidence
) -> None:
    """The categories of each pick that miss a floor which its mean may meet."""
    for model, found in picks.items():
        weak = weak_categories(found.result, floors, evidence)
        if weak:
            print(f"\n{model}, point {found.result.number}: a floor is about all prompts together")
        for each in weak[:SHOWN_CATEGORIES]:
            print(f"  {each}")
        if len(weak) > SHOWN_CATEGORIES:
            print(f"  and {len(weak) - SHOWN_CATEGORIES} categories more; --json has them")


def _export(
    view: StudyView,
    picks: Mapping[str, Pick],
    gains: Mapping[str, Gain | None],
    by_model: Mapping[str, Sequence[Result]],
    options: PickOptions,
    done: int,
    to: Path,
) -> dict[str, Any]:
    """Export the adapter of the only pick; return where it is and the content of its pick.json."""
    _require_begun_here(view)
    ((model, found),) = picks.items()
    seed, alone = _exportable(view.study, found, by_model[model], options)
    if not (options.accept_unsure or options.point is not None or _gains(gains[model])):
        raise StudyError(
            f"nothing was exported: {named(found.result)} has {gains[model]}. "
            f"--point {found.result.number} exports it all the same"
        )
    requested = options.seed is not None
    shipped = ship(view, found, seed, alone, done, to, requested, options.with_base)
    return {"to": str(to), **shipped}


def _record(view: StudyView, picks: Collection[Pick]) -> bool:
    """Record the picks for the study's figures; returns whether there were any to record."""
    study = view.study
    held = [found.result for found in picks if found.meets and not too_low(study, found)]
    if not held or not view.home.has_run(study.study):
        return False
    return record_choices(view.folder, held)


def _require_begun_here(view: StudyView) -> None:
    """Raise StudyError unless this home and the database hold the study with the same settings.

    The floor is the one that the study began with, even if its file changed since. A home that did
    not run the study does not hold that floor.
    """
    study, home = view.study, view.home
    if not home.has_run(study.study):
        raise StudyError(
            f"{home.root} has not run {study.study!r}, so it does not hold the floor that "
            "the study began with; export from the home that ran it, or run it here once. "
            "Nothing was exported"
        )
    begun, mark = view.begun_as(), settings_mark(view.database)
    if mark is not None and mark != begun:
        raise StudyError(
            f"the points of {study.study!r} in the database have other settings than those in "
            f"{home.root}; export from the home that ran the study."
            " Nothing was exported"
        )


def floors_of(study: Study, texts: Sequence[str]) -> tuple[Floor, ...]:
    """The floors of `NAME=SHARE` texts, and the study's refusal floor unless a text has its metric.

    Raises StudyError for an invalid text, and for a study without a refusal rate when there is no
    text.
    """
    found: dict[str, Floor] = {}
    for text in texts:
        name, equals, share = text.partition("=")
        try:
            floor = Floor(study.metric(name.strip()), float(share))
        except ValueError as error:
            hint = (
                f"write it as NAME=SHARE, such as refusal_rate=0.95 ({share!r} is not a number)"
                if not equals
                else str(error)
            )
            raise StudyError(f"--floor {text}: {hint}") from None
        if floor.metric in found:
            raise StudyError(
                f"--floor {text}: {floor.metric} has a floor already; give one floor for each "
                "metric"
            )
        found[floor.metric] = floor
    refusal = study.refusal_metric
    if refusal is not None and refusal not in found:
        found = {refusal: Floor(refusal, study.refusal_floor), **found}
    if not found:
        raise StudyError(
            f"{study.study} measures no refusal_rate, so it has no default floor; give "
            "one, such as --floor acc=0.5"
        )
    return tuple(found.values())


def maximised_of(study: Study, name: str | None) -> str | None:
    """The full name of the metric to maximise; without `name`, the study's first usefulness
    objective. Raises StudyError for an unknown name.
    """
    if name is None:
        return usefulness_metric(study)
    try:
        return study.metric(name)
    except ValueError as error:
        raise StudyError(f"--maximise {name}: {error}") from None


def _models(study: Study, options: PickOptions, to: Path | None) -> list[str]:
    models = sorted(study.models, key=natural)
    if options.model is not None:
        if options.model not in models:
            raise StudyError(f"--model {options.model}: {unknown(options.model, set(models))}")
        return [options.model]
    if to is not None and len(models) > 1 and options.point is None:
        raise StudyError(
            f"--export writes one adapter; choose its size with --model: {', '.join(models)}"
        )
    return models


def _exportable(
    study: Study, found: Pick, own: Sequence[Result], options: PickOptions
) -> tuple[int, Result]:
    """The seed whose adapter may be exported, and its point with that seed's metrics alone.

    It is the requested seed, or else the study's first seed that holds every floor by itself.
    Raises StudyError when there is none.
    """
    refusal = study.refusal_metric
    if refusal is None:
        raise StudyError(
            f"{study.study} measures no refusal_rate, so its adapters cannot be checked for "
            "export; nothing was exported"
        )
    floors = (*found.floors, Floor(refusal, study.refusal_floor))
    if slack(found.result, floors, found.among, options.confidence) < 0:
        nearest = pick(own, floors, found.maximised, options.confidence)
        raise StudyError(_below_floor(study, found, floors, nearest, options.confidence))
    seeds = list(study.seeds[: seeds_of(found.result)])
    if options.seed is not None and options.seed not in seeds:
        raise StudyError(
            f"--seed {options.seed}: point {found.result.number} was trained with {_listed(seeds)}"
        )
    unconfirmed = refuted = False
    for index, seed in enumerate(seeds):
        alone = replace(
            found.result,
            metrics={name: of_seed(metric, index) for name, metric in found.result.metrics.items()},
        )
        if (
            options.seed not in (None, seed)
            or slack(alone, floors, found.among * len(seeds), options.confidence) < 0
        ):
            continue
        stands = adapter_standing(alone, floors, seed)
        if stands == "holds" or (options.accept_unsure and stands != "missed"):
            return seed, alone
        unconfirmed = unconfirmed or stands != "missed"
        refuted = refuted or stands == "missed"  # its values in the search meet the floors
    if unconfirmed:
        raise StudyError(_unconfirmed(study, found))
    if refuted:
        raise StudyError(
            f"nothing was exported: {named(found.result)} is confirmed not to hold "
            f"{in_words(floors)}: {_confirmed_values(found.result, floors, options.seed)}"
        )
    short = f"seed {options.seed}" if options.seed is not None else "none of its seeds"
    verb = "does not hold" if options.seed is not None else "holds"
    raise StudyError(
        f"point {found.result.number} meets {in_words(floors)} over its {len(seeds)} "
        f"seeds, but {short} {verb} them alone, and --export writes one seed's adapter;"
        " nothing was exported"
    )


def _confirmed_values(result: Result, floors: Sequence[Floor], seed: int | None) -> str:
    """The confirmed values of the adapters of a point, or of that of `seed`."""
    adapters = {} if result.confirmed is None else result.confirmed.adapters
    return "; ".join(
        f"seed {own} has {metric_label(name)} {measured(metrics[name])} on other prompts"
        for own, metrics in adapters.items()
        for name in dict.fromkeys(floor.metric for floor in floors)
        if seed in (None, own) and name in metrics
    )


def _unconfirmed(study: Study, found: Pick) -> str:
    confirmed = found.result.confirmed is not None
    why = (
        "its confirmed bound is below it"
        if confirmed
        else "the numbers that chose it are all there is, and they look better than they are"
    )
    how = (
        ""
        if confirmed
        else f"`ebbline confirm {study.study}` measures it on other prompts"
        + (" (the study needs a section `confirm`)" if study.confirm is None else "")
        + "; "
    )
    return (
        f"nothing was exported: {named(found.result)} is not confirmed to hold "
        f"{in_words(found.floors)}: {why}. {how}--accept-unsure exports it as it is, and its card "
        "says so"
    )


def _below_floor(
    study: Study,
    found: Pick,
    floors: Sequence[Floor],
    nearest: Pick | None,
    confidence: float | None,
) -> str:
    by = "" if confidence is None else f" with {confidence:.0%} confidence"
    missed = [
        floor for floor in floors if slack(found.result, [floor], found.among, confidence) < 0
    ]
    values = ", ".join(
        dict.fromkeys(
            f"{metric_label(floor.metric)} {measured(found.result.metrics[floor.metric])}"
            for floor in missed
        )
    )
    owned = (
        "; the study's own refusal floor cannot be lowered for an export"
        if study.refusal_floor in [each.value for each in missed]
        else ""
    )
    text = (
        f"nothing was exported: {named(found.result)} has {values}, which does not hold "
        f"{in_words(missed)}{by}{owned}."
    )
    if nearest is None:
        return text
    alternative = f"{named(nearest.result)}: {values_of_pick(nearest)}"
    if nearest.meets:
        return f"{text}\nThe nearest that does is {alternative}."
    return (
        f"{text}\nNo point of {found.result.point.model} does. The nearest is {alternative}, "
        f"{missed_by(nearest, confidence)}."
    )


def _listed(seeds: Sequence[int]) -> str:
    return ("seed " if len(seeds) == 1 else "the seeds ") + ", ".join(map(str, seeds))


def _print_picks(
    study: Study,
    name: str,
    models: Sequence[str],
    picks: Mapping[str, Pick],
    gains: Mapping[str, Gain | None],
    options: PickOptions,
    done: str,
    floors: Sequence[Floor],
    hint: bool,
) -> None:
    level = "" if options.confidence is None else f", with {options.confidence:.0%} confidence"
    print(f"{study.study}: {done}; to hold: {in_words(floors)}{level}")
    for model in models:
        if model in picks:
            gain = gains[model]
            print(f"\n{model}: {_verdict(picks[model], options, gain)}")
            if gain is not None and not gain.is_one:
                print(f"  {gain}")
            if (preference := preferred(picks[model])) is not None:
                print(f"  {preference}")
            for line in lines_of(study, picks[model]):
                print(f"  {line}")
            if hint and picks[model].meets and not too_low(study, picks[model]):
                point = "" if options.point is None else f" --point {options.point}"
                if picks[model].standing == "candidate" and study.confirm is not None:
                    number = picks[model].result.number
                    print(f"  confirm it: ebbline confirm {name} --point {number}")
                accept = "" if picks[model].holds else " --accept-unsure"
                print(
                    f"  write its adapter: ebbline pick {name} --model {model}{point}{accept} "
                    "--export DIR"
                )
        elif options.point is None:
            print(f"\n{model}: no point has finished")


_STANDS: Mapping[Standing, str] = {
    "holds": "confirmed",
    "unsure": "confirmed, but not sure to hold",
    "candidate": "a candidate, not confirmed",
}


def _verdict(found: Pick, options: PickOptions, gain: Gain | None) -> str:
    if found.meets:
        rank = (
            f", the one with most {metric_label(found.maximised)}"
            if found.maximised and options.point is None and found.instead_of is None
            else ""
        )
        best = f" of {found.among} different points" if options.point is None else ""
        text = f"{named(found.result)}{rank}{best}; {_STANDS[found.standing]}"
        if options.point is None and not _gains(gain):
            return f"no point that meets the floors gains over not fine-tuning. The best is {text}"
        return text
    if options.point is not None:
        return f"{named(found.result)} does not hold that{_short(found, options)}"
    nearest = f"{named(found.result)}{_short(found, options)}"
    return f"none of {found.among} different points holds that. The nearest is {nearest}"


def _short(found: Pick, options: PickOptions) -> str:
    """By how much the values of the search miss the floors; nothing where the confirmed ones do."""
    if slack(found.result, found.floors, found.among, options.confidence) >= 0:
        return ", by its confirmed values"
    by = missed_by(found, options.confidence)
    return f": it is {by}" if options.point is not None else f", {by}"
