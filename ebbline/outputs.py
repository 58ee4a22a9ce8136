"""A study's outputs beside its store: tables, figures and the report of its results so far.

Invariant: the tables are written first, and no output takes another with it.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ebbline.analysis.figures.drawing import save_pdf, save_png
from ebbline.analysis.figures.projection import projection_figures
from ebbline.analysis.report.attempts import LOG, Attempts
from ebbline.analysis.report.defence_words import control_sentences
from ebbline.analysis.report.findings import figures_of, findings
from ebbline.analysis.report.made import Made, made_of
from ebbline.analysis.report.provenance import provenance
from ebbline.analysis.report.report import write_report
from ebbline.analysis.report.second_process import SecondProcess
from ebbline.analysis.report.verdict import answer_cells, verdict
from ebbline.analysis.results.adapter_notes import adapter_notes
from ebbline.analysis.results.claims.family import family
from ebbline.analysis.results.collect import (
    StoredEvidence,
    baselines,
    costs_before,
    module_effects,
    projections,
)
from ebbline.analysis.results.columns import left_out_line, table_text
from ebbline.analysis.results.controls.means import (
    collect_controls,
    control_notes,
    controls_frame,
    write_controls,
)
from ebbline.analysis.results.costs import cost_rows, prediction_rows
from ebbline.analysis.results.defended.modules import NO_EFFECTS
from ebbline.analysis.results.frontier import shortlist_note
from ebbline.analysis.results.labelled.corrected import labelled_suites
from ebbline.analysis.results.measurements import NO_EVIDENCE, Baselines, Evidence
from ebbline.analysis.results.no_refusals import no_refusals
from ebbline.analysis.results.picks.choices import chosen
from ebbline.analysis.results.tables import (
    categories_frame,
    results_frame,
    write_categories,
    write_tables,
)
from ebbline.commands.plan import GANTT
from ebbline.sweeps.forecast.prediction import read_predictions
from ebbline.sweeps.search.importance import importances
from ebbline.sweeps.state.controls import ControlResult
from ebbline.sweeps.state.spending import read_spent
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import EbblineError, StudyError
from ebbline.tasks.identity import READ


def attempts_of(view: StudyView) -> Attempts:
    """A new record of what could not be made of a study's outputs, with its log."""
    return Attempts(view.folder / LOG)


def require_current(view: StudyView, results: Sequence[Result]) -> None:
    """Raise StudyError when every measured point is outdated: new outputs would replace those of
    the earlier measurements with empty ones.
    """
    counts = Counter(result.status for result in results)
    if counts["outdated"] and not counts["done"]:
        raise StudyError(
            f"all {counts['outdated']} measured points of {view.study.study!r} are outdated: an "
            "upgrade, a change of the study or a removal replaced their keys. "
            f"`ebbline run {view.name}` measures them again; until then the tables and the report "
            f"in {view.folder} stay as they are"
        )


def write_outputs(
    view: StudyView,
    results: Sequence[Result],
    attempts: Attempts | None = None,
    second: SecondProcess | None = None,
) -> dict[str, Path]:
    """Write the tables, then the figures and the report of `results`, unless they are there and
    nothing has changed. Returns name -> path of each output. `second` makes some parts beside the
    others.

    What fails is noted in `attempts`, and the other outputs are written.
    """
    attempts = attempts_of(view) if attempts is None else attempts
    controls = attempts.make("the controls", lambda: collect_controls(view, results))
    made = Made(view.folder, _made_of(view, results, controls or ()))
    unchanged = None if attempts.failed else made.unchanged()
    if unchanged is not None:
        return unchanged
    made.begin()
    with READ.noted() as read:
        paths, written = _written(
            view, results, controls or [], attempts, second or SecondProcess()
        )
    if made.of and not attempts.failed:
        made.end(paths, written, read)
    return paths


def _made_of(view: StudyView, results: Sequence[Result], controls: Sequence[ControlResult]) -> str:
    """A digest of what the outputs show; empty where a part cannot be read, as that part then
    says.
    """
    try:
        return made_of(view, results, controls, [Path(__file__)])
    except (EbblineError, OSError):
        return ""


def _written(
    view: StudyView,
    results: Sequence[Result],
    controls: Sequence[ControlResult],
    attempts: Attempts,
    second: SecondProcess,
) -> tuple[dict[str, Path], list[Path]]:
    """Name -> path of each output to print, and all files."""
    study, home, folder = view.study, view.home, view.folder
    make, paths, written = attempts.make, dict[str, Path](), list[Path]()
    importance = second.start(importances, study, results)  # first: it takes longest
    tables = make(
        "the tables",
        lambda: write_tables(results_frame(results, study.objectives, home.profile), folder),
    )
    if tables is not None:
        _, paths["results"], paths["frontier"] = tables
        written += tables
    before = make("the models before fine-tuning", lambda: baselines(view)) or {}
    evidence = make("the samples", lambda: StoredEvidence(view)) or NO_EVIDENCE
    picked = make("the recorded pick", lambda: chosen(results, folder)) or ()
    printed = dict[str, Callable[[], Path]]()
    projected = make("what was projected", lambda: projections(study, results, home)) or {}
    maps = make("the figures of what was projected", lambda: projection_figures(projected)) or {}
    for name, figure in maps.items():
        saved = make(f"the figure {name}", partial(save_png, figure, folder, name))
        if saved is not None:
            written.append(saved)
            printed[name] = second.start(save_pdf, figure, folder, name)
    categories = make(
        "the table by category",
        lambda: write_categories(categories_frame(study, results, before, evidence), folder),
    )
    if categories is not None:
        paths["categories"] = categories
    if controls:
        listed = make(
            "the table of controls",
            lambda: write_controls(controls_frame(study, controls), folder),
        )
        if listed is not None:
            paths["controls"] = listed
    everything = [*results, *(control.result for control in controls)]
    cost = make("the costs", lambda: _cost(view, everything)) or {}
    origin = make("the provenance", lambda: provenance(view, everything).rows()) or []
    changed = make(
        "what the defences did to each module", lambda: module_effects(study, results, home)
    )
    found = findings(
        study,
        results,
        before,
        evidence,
        picked,
        attempts,
        importance,
        controls,
        effects=changed or NO_EFFECTS,
    )
    drawn = figures_of(found, attempts)
    for name, each in drawn.items():
        saved = make(f"the figure {name}", partial(save_png, each.figure, folder, name))
        if saved is not None:
            written.append(saved)
            printed[name] = second.start(save_pdf, each.figure, folder, name)
            if name == "frontier":
                paths["figure"] = saved
    notes = [
        *(make("the notes on refusals", lambda: no_refusals(study, before)) or ()),
        *(make("the notes on adapters", lambda: adapter_notes(view, results)) or ()),
        *(
            make(
                "the notes on controls",
                lambda: list(control_notes(study, results, controls)),
            )
            or ()
        ),
        *filter(None, [shortlist_note(results)]),
    ]
    labelled = make("what the labels say", lambda: labelled_suites(view, results)) or ()
    report = make(
        "the report",
        lambda: write_report(
            found,
            folder,
            cost,
            origin,
            projected,
            folder / f"{GANTT}.svg",
            drawn,
            notes,
            attempts,
            labelled,
        ),
    )
    if report is not None:
        paths["report"] = report
    for name, draw in printed.items():
        pdf = make(f"the figure {name}", draw)
        written += [] if pdf is None else [pdf]
    return paths, list(dict.fromkeys([*written, *paths.values()]))


def answer_text(
    study: Study,
    results: Sequence[Result],
    before: Baselines,
    evidence: Evidence,
    width: int | None,
    controls: Sequence[ControlResult] = (),
) -> str:
    """The report's first sentences and its table of each model, for a terminal `width` columns
    wide; empty when no model has refusals to compare.
    """
    of = family(study, results, before, evidence, controls)
    lines, against = of.lines, [each for each in of.against if each.is_control]
    compared = control_sentences(study, against)
    sentence = verdict(study, results, lines)
    if not sentence and not compared:
        return ""
    sentence = "\n\n".join([*compared, *filter(None, [sentence])])
    cells = answer_cells(study, results, lines)
    columns = list(map(str, cells.columns))
    rows = [list(map(str, row)) for row in cells.itertuples(index=False)]
    text, left_out = table_text(columns, rows, width, ())
    return "\n".join([sentence, "", text, *left_out_line(left_out)])


def print_outputs(
    outputs: Mapping[str, Path], as_json: bool = False, attempts: Attempts | None = None
) -> None:
    """Print the path of each output, and a line for each part that could not be made."""
    failed = {} if attempts is None else attempts.failed
    if as_json:
        found: dict[str, object] = {name: str(path) for name, path in outputs.items()}
        print(json.dumps(found | ({"failed": failed} if failed else {}), indent=1))
        return
    for name, path in outputs.items():
        print(f"{name:10} {path}")
    if attempts is not None and failed:
        print(f"\n{chr(10).join(attempts.lines())}")
        print(f"the reasons in full: {attempts.log}" if attempts.log is not None else "")


def _cost(view: StudyView, results: Sequence[Result]) -> dict[str, object]:
    folder, profile = view.folder, view.home.profile
    rows = cost_rows(results, costs_before(view), read_spent(folder), profile)
    return rows | prediction_rows(read_predictions(folder), profile)
