"""The evidence card: one page on what a study's claims rest on, after arXiv 2605.10575.

Invariant: every line names the stages behind it by their keys, or the study by its digest. A field
without evidence says so; it is never left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ebbline.analysis.report.provenance import Provenance
from ebbline.analysis.report.verdict import NO_CONTROL
from ebbline.analysis.results.before_after import Trio, trios
from ebbline.analysis.results.controls.means import control_means, control_notes
from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.measurements import Baselines, usefulness_metric
from ebbline.analysis.results.picks.confirmed import lines_of_confirmed
from ebbline.analysis.results.picks.floors import Floor
from ebbline.analysis.results.picks.picked import named
from ebbline.analysis.results.wording import measured, metric_label, percent
from ebbline.sweeps.state.controls import ControlResult
from ebbline.sweeps.study.points import Result, StageName, defence_of, distinct
from ebbline.sweeps.study.reading.overlaps import Shared
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.suites import scorers_of
from ebbline.tasks.measuring.metrics import Metric

KEY = 12  # characters of a key: enough to find its stage in the store


@dataclass(frozen=True)
class Field:
    """A line of the card, and the keys of the stages that it comes from."""

    what: str
    text: str
    keys: tuple[str, ...]


def evidence_card(
    study: Study,
    results: Sequence[Result],
    baselines: Baselines,
    provenance: Provenance,
    shared: Sequence[Shared],
    measured_before: Mapping[str, Mapping[str, str]],
    controls: Sequence[ControlResult] = (),
    tests: int = 0,
) -> str:
    """The card as Markdown. `measured_before` maps each model and suite to the key of the stage
    that measured the model before fine-tuning. `tests` is the number of tests in the family of all
    comparisons.
    """
    fields = [
        *_question(study, provenance),
        *_arms(study, results, baselines, measured_before, provenance),
        *_controls(study, results, controls, provenance),
        *_seeds(study, results, provenance),
        *_judges(study, results, provenance),
        *_confirmation(study, results, provenance),
        *_contamination(shared, provenance),
        *_multiplicity(results, provenance, tests),
        *_not_measured(study, provenance),
    ]
    lines = [
        f"# What the claims of {study.study} rest on",
        "",
        f"Keys are the first {KEY} characters of the stages' keys in the store; `study` is the "
        "digest of the study's settings and pins.",
        "",
        "| field | evidence | traced to |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(each) for each in fields), ""])


def _row(field: Field) -> str:
    cells = (field.what, field.text, ", ".join(field.keys))
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"


def _of_study(provenance: Provenance) -> tuple[str, ...]:
    return (f"study {provenance.study_sha256[:KEY]}",)


def _keys(result: Result, *parts: str) -> tuple[str, ...]:
    """The keys of a point's stages of these parts, as `KIND KEY`, seed by seed."""
    return tuple(
        f"{name} {key[:KEY]}"
        for name, key in sorted(result.keys.items())
        if StageName.parse(name).part in parts
    )


def _question(study: Study, provenance: Provenance) -> Iterator[Field]:
    yield Field("question", " ".join(study.question.split()), _of_study(provenance))
    written = " ".join(study.hypothesis.split()) or "none was written before the study"
    yield Field("hypothesis", written, _of_study(provenance))


def _arms(
    study: Study,
    results: Sequence[Result],
    baselines: Baselines,
    measured_before: Mapping[str, Mapping[str, str]],
    provenance: Provenance,
) -> Iterator[Field]:
    refusal = study.refusal_metric
    names = [name for name in (refusal, usefulness_metric(study)) if name is not None]
    for trio in trios(study, results):
        before = baselines.get(trio.model, {})
        suites = measured_before.get(trio.model, {})
        keys = tuple(f"{suite} {key[:KEY]}" for suite, key in sorted(suites.items()))
        text = _values(before, names) or "not measured"
        yield Field(f"arm: {trio.model}, before fine-tuning", text, keys or _of_study(provenance))
        yield from _arms_of(trio, names, provenance)


def _values(metrics: Mapping[str, Metric], names: Sequence[str]) -> str:
    return "; ".join(
        f"{metric_label(name)} {measured(metrics[name])}" for name in names if name in metrics
    )


def _arms_of(trio: Trio, names: Sequence[str], provenance: Provenance) -> Iterator[Field]:
    shipped = "defended" if trio.shipped is None else defence_of(trio.shipped.point).words.name
    for what, result in (("fine-tuned", trio.tuned), (shipped, trio.shipped)):
        if result is None:
            yield Field(f"arm: {trio.model}, {what}", "no point", _of_study(provenance))
            continue
        values = _values(result.metrics, names)
        keys = _keys(result, defence_of(result.point).makes.KIND, *_suites(names))
        yield Field(f"arm: {trio.model}, {what}", f"{named(result)}: {values}", keys)


def _controls(
    study: Study,
    results: Sequence[Result],
    controls: Sequence[ControlResult],
    provenance: Provenance,
) -> Iterator[Field]:
    """The mean of each control over its draws, and what was not run."""
    names = [name for name in (study.refusal_metric, usefulness_metric(study)) if name is not None]
    for mean in control_means(controls):
        what = f"control: {mean.control} of {named(mean.partner)}"
        if not mean.draws:
            yield Field(what, "not measured", _of_study(provenance))
            continue
        values = "; ".join(
            f"{metric_label(name)} {percent(value)}"
            + ("" if (sd := mean.spread(name)) is None else f" ({percent(sd)} sd between draws)")
            for name in names
            if (value := mean.value(name)) is not None
        )
        keys = tuple(key for draw in mean.draws for key in _keys(draw, *_suites(names)))
        draws = f"{len(mean.draws)} of {mean.planned} draws: " if mean.planned > 1 else ""
        yield Field(what, f"{draws}{values}", keys or _of_study(provenance))
    notes = list(control_notes(study, results, controls))
    if not controls:
        notes.insert(0, NO_CONTROL)
    if notes:
        yield Field("controls", " ".join(notes), _of_study(provenance))


def _suites(names: Sequence[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def _seeds(study: Study, results: Sequence[Result], provenance: Provenance) -> Iterator[Field]:
    done = finished(results)
    keys = _keys(done[0], "train") if done else ()
    contains = (
        "each draws its rows and its training"
        if study.subsets is None
        else f"trainings share {study.subsets} subsets of the data"
    )
    seeds = ", ".join(map(str, study.seeds))
    yield Field("training seeds", f"{seeds}; {contains}", keys or _of_study(provenance))


def _judges(study: Study, results: Sequence[Result], provenance: Provenance) -> Iterator[Field]:
    done = finished(results)
    for suite, entry in study.suites.items():
        scorers = ", ".join(scorers_of(entry.measure)) or str(
            getattr(entry.measure, "scorer", "lm-eval, by likelihood")
        )
        prompts = provenance.prompts.get(suite)
        text = scorers if prompts is None else f"{scorers}; {prompts}"
        keys = (_keys(done[0], suite)[:1] if done else ()) or _of_study(provenance)
        yield Field(f"scorers of {suite}", text, keys)


def _confirmation(
    study: Study, results: Sequence[Result], provenance: Provenance
) -> Iterator[Field]:
    refusal = study.refusal_metric
    floors = [] if refusal is None else [Floor(refusal, study.refusal_floor)]
    confirmed = [result for result in results if result.confirmed is not None]
    if not confirmed:
        yield Field("confirmation", "none: every point is a candidate", _of_study(provenance))
    for result in confirmed:
        own = result.confirmed
        keys = (
            ()
            if own is None
            else tuple(
                f"{name} {key[:KEY]}"
                for name, key in sorted(own.keys.items())
                if StageName.parse(name).part in study.suites
            )
        )
        for line in lines_of_confirmed(result, floors):
            yield Field(f"confirmation: {result.point.model}, point {result.number}", line, keys)


def _contamination(shared: Sequence[Shared], provenance: Provenance) -> Iterator[Field]:
    if not shared:
        yield Field("contamination", "no training data of the study", _of_study(provenance))
    for each in shared:
        yield Field("contamination", str(each), _of_study(provenance))


def _multiplicity(results: Sequence[Result], provenance: Provenance, tests: int) -> Iterator[Field]:
    done = finished(results)
    among = max((each.confirmed.among for each in done if each.confirmed is not None), default=0)
    yield Field(
        "multiplicity",
        f"{len(done)} finished points, {len(distinct(done))} different adapters; all {tests} "
        "tests of the report are one family (Benjamini and Hochberg), which does not allow for a "
        "pick; "
        f"{among} points were confirmed together (Bonferroni)",
        _of_study(provenance),
    )


def _not_measured(study: Study, provenance: Provenance) -> Iterator[Field]:
    missing = ["jailbreaks", "conversations of several turns", "sampled decoding"]
    kinds = {entry.measure.kind for entry in study.suites.values()}
    if "over_refusal" not in kinds:
        missing.append("over-refusal of harmless requests")
    if "refusal" not in kinds:
        missing.append("refusals")
    if usefulness_metric(study) is None:
        missing.append("usefulness")
    if "multiple_choice" not in kinds:
        missing.append("general capability")
    yield Field("not measured", ", ".join(missing), _of_study(provenance))
