"""The commands that read a study's results. Each imports what it needs when it runs, so `--help`
stays fast.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from ebbline.options import (
    DEFAULT_HOME,
    EXIT_CODES,
    OUTCOME_PANEL,
    OUTPUT_MISSING,
    STUDY_PANEL,
    ForceOption,
    HomeOption,
    JsonOption,
    OptionalStudyName,
    StudyName,
    StudyNames,
    WideOption,
    explained,
    finite,
    require_new,
)

outcome_app = typer.Typer()


@outcome_app.command(
    rich_help_panel=STUDY_PANEL, short_help="Show its progress and the frontier so far"
)
@explained
def status(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            "-w",
            help="Follow the run until its driver ends. Ctrl-C ends the watching, not the run.",
        ),
    ] = False,
    as_json: JsonOption = False,
    wide: WideOption = False,
) -> None:
    """Show a study's progress: its driver, its points, and the frontier so far. With --watch
    --json, print a line for each change.
    """
    from ebbline.commands.status import show_status, watch_status
    from ebbline.sweeps.study.view import StudyView

    (watch_status if watch else show_status)(StudyView.begun(home, study), as_json, wide)


@outcome_app.command(rich_help_panel=STUDY_PANEL, short_help="Show it live in a browser")
@explained
def dashboard(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="Port on this machine's loopback; 0 means any free port."
        ),
    ] = 8765,
    browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in a browser.")
    ] = True,
) -> None:
    """Show a running study in a browser: queue, GPUs, frontier, trainings, failures; and its
    points in optuna-dashboard.
    """
    from ebbline.analysis.dashboard.server import show
    from ebbline.sweeps.study.view import StudyView

    show(StudyView.begun(home, study), port, browser)


@outcome_app.command(
    rich_help_panel=OUTCOME_PANEL,
    short_help="Write the tables, figures and report of what is there",
    epilog=EXIT_CODES,
)
@explained
def report(study: StudyName, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Write the tables, the figures and the report of a study's results so far."""
    from ebbline.analysis.report.second_process import second_process
    from ebbline.analysis.results.collect import collect
    from ebbline.outputs import attempts_of, print_outputs, require_current, write_outputs
    from ebbline.sweeps.study.view import StudyView

    view = StudyView.begun(home, study)
    view.home.require(view.study.study)
    with second_process() as second:
        attempts, results = attempts_of(view), collect(view)
        require_current(view, results)
        outputs = write_outputs(view, results, attempts, second)
    print_outputs(outputs, as_json, attempts)
    if attempts.failed:
        raise typer.Exit(OUTPUT_MISSING)


@outcome_app.command(
    rich_help_panel=OUTCOME_PANEL, short_help="Find the point to ship, and export its adapter"
)
@explained
def pick(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    model: Annotated[
        str | None, typer.Option(help="Only this model size.", show_default=False)
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            help="A limit that a point must hold, such as refusal_rate=0.95; an upper limit "
            "where lower is better. Repeatable.",
            show_default=False,
        ),
    ] = None,
    maximise: Annotated[
        str | None,
        typer.Option(
            help="The metric to maximise; default: the study's usefulness objective.",
            show_default=False,
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            min=0.5,
            max=0.9999,
            callback=finite,
            help="Hold the floors with this confidence, corrected for choosing the best point.",
            show_default=False,
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Of several defences, prefer the simplest whose metric is at most this much "
            "lower. Default: 0.02.",
            show_default=False,
        ),
    ] = None,
    point: Annotated[
        int | None,
        typer.Option(
            min=0, max=10**9, help="Use this point instead of the best one.", show_default=False
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export",
            help="Write the point's adapter and model card into this folder.",
            show_default=False,
        ),
    ] = None,
    with_base: Annotated[
        bool,
        typer.Option(
            "--with-base",
            help="Export the aligned model too, into DIR/aligned: what the adapter was trained on.",
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**32, help="Export this training seed's adapter.", show_default=False
        ),
    ] = None,
    accept_unsure: Annotated[
        bool,
        typer.Option(
            "--accept-unsure",
            help="Take a point whose values meet the floors, though it is not confirmed to hold "
            "them.",
        ),
    ] = False,
    each_category: Annotated[
        bool,
        typer.Option(
            "--each-category",
            help="Take only points of which every category of prompts meets the floors, too.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the point to ship: the most useful one that holds the floor, and how sure that is. Exit
    code 1 when no point is confirmed to hold it.
    """
    from ebbline.analysis.results.picks.simplest import MARGIN
    from ebbline.commands.pick import PickOptions, pick_study
    from ebbline.sweeps.study.view import StudyView

    options = PickOptions(
        tuple(floor or ()),
        maximise,
        model,
        point,
        confidence,
        MARGIN if margin is None else margin,
        seed,
        with_base,
        accept_unsure,
        each_category,
    )
    raise typer.Exit(pick_study(StudyView.open(home, study), options, export, as_json))


@outcome_app.command(
    rich_help_panel=OUTCOME_PANEL, short_help="Label completions by hand, to correct its rates"
)
@explained
def label(
    study: StudyName,
    suite: Annotated[str, typer.Option(help="The suite whose completions are labelled.")] = (
        "refusal"
    ),
    count: Annotated[
        int,
        typer.Option(
            "--count", "-n", min=1, help="How many completions a new sheet has, over all arms."
        ),
    ] = 100,
    seed: Annotated[int, typer.Option(min=0, help="The seed that a new sheet is drawn with.")] = 0,
    results: Annotated[
        bool, typer.Option("--results", help="Only print what the labels so far say.")
    ] = False,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
    wide: WideOption = False,
) -> None:
    """Label completions by hand, without seeing which scorer said what: drawn at random within each
    arm. The same command continues. Then see how far each scorer agrees with you, and the rates
    corrected for its errors. Nothing leaves this machine.
    """
    if as_json and not results:
        raise typer.BadParameter("--json prints results only; give it with --results")
    from ebbline.commands.measured.labelling import label_study
    from ebbline.sweeps.study.view import StudyView

    label_study(StudyView.begun(home, study), suite, count, seed, results, as_json, wide)


@outcome_app.command(rich_help_panel=OUTCOME_PANEL, short_help="Compare studies, prompt by prompt")
@explained
def compare(
    studies: StudyNames,
    home: Annotated[
        list[Path] | None,
        typer.Option(
            help="The home of all studies, or one for each, in order.", show_default=False
        ),
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            help="A limit that operating points must hold, as for `pick`; default: the "
            "strictest refusal floor.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            help="Write a page (.html) or a picture (.png, .pdf, .svg) here.",
            show_default=False,
        ),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare studies: frontiers, operating points at equal floors, equal points; prompt by prompt
    where both used the same prompts. Or compare measurements of `ebbline evaluate`, by folder.
    """
    from ebbline.commands.compare import compare_studies
    from ebbline.commands.measured.pairs import compare_measured, outcome_folders

    require_new(to, force)
    folders = outcome_folders(studies)
    if folders is not None:
        if home or floor or to:
            raise typer.BadParameter("--home, --floor and --to are of studies, not measurements")
        compare_measured(folders, as_json)
        return
    compare_studies(
        studies,
        home or [Path(os.environ.get("EBBLINE_HOME", DEFAULT_HOME))],
        floor or [],
        to,
        as_json,
    )


@outcome_app.command(rich_help_panel=OUTCOME_PANEL, short_help="Compare it with published results")
@explained
def papers(study: StudyName, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Compare a study with published results, and say for each number whether it is comparable."""
    from ebbline.commands.papers import show_papers
    from ebbline.sweeps.study.view import StudyView

    show_papers(StudyView.begun(home, study), as_json)


@outcome_app.command(
    rich_help_panel=OUTCOME_PANEL, short_help="Write it for a paper: figures, LaTeX, data, a bundle"
)
@explained
def export(
    study: OptionalStudyName = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="The folder to write; replaces an earlier export of the study."),
    ] = None,
    style: Annotated[
        Literal["neurips", "acl", "both"],
        typer.Option(help="The column widths of figures and tables."),
    ] = "both",
    check: Annotated[
        Path | None,
        typer.Option(
            "--check", help="Instead of a study: compare this bundle's keys with those of --home."
        ),
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Write a study's results for a paper: figures, LaTeX tables, data, methods, BibTeX, and a
    bundle that reruns the study.
    """
    from ebbline.commands import export as exporting
    from ebbline.sweeps.study.home import Home
    from ebbline.sweeps.study.view import StudyView

    if check is not None and study is None and to is None:
        raise typer.Exit(exporting.check(check, Home(home), as_json))
    if study is None or to is None or check is not None:
        raise typer.BadParameter(
            "give STUDY and --to DIR, or --check BUNDLE alone (both accept --home)"
        )
    exporting.export_study(StudyView.begun(home, study), to, style, as_json)


@outcome_app.command(
    rich_help_panel=OUTCOME_PANEL, short_help="Update the W&B mirror and push offline runs"
)
@explained
def sync(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    at_once: Annotated[
        int,
        typer.Option("--at-once", "-n", min=1, max=64, help="How many runs to push at a time."),
    ] = 8,
    to_folder: Annotated[
        Path | None,
        typer.Option(
            help="Write CSV and JSON files for another tracker here, and leave W&B alone.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Update the W&B mirror and push the offline runs. The same command continues an interrupted
    push.
    """
    from ebbline.commands.wandb import sync_folder, sync_study
    from ebbline.sweeps.study.view import StudyView

    view = StudyView.begun(home, study)
    if to_folder is not None:
        sync_folder(view, to_folder, as_json)
        return
    raise typer.Exit(sync_study(view, at_once, as_json))


@outcome_app.command(
    name="wandb-workspace",
    rich_help_panel=OUTCOME_PANEL,
    short_help="Make its workspace and report on W&B",
)
@explained
def wandb_workspace(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    entity: Annotated[
        str | None,
        typer.Option(
            help="The W&B user or team; default: your W&B default entity.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Create or update the study's workspace and report on W&B: frontier, hypervolume, parallel
    coordinates, importance.
    """
    from ebbline.commands.wandb import make_workspace
    from ebbline.sweeps.study.view import StudyView

    make_workspace(StudyView.begun(home, study), entity, as_json)
