"""The commands that look at what a study has come to. Each brings what it needs when it runs, so
that `--help` stays fast.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from ebbline.options import DEFAULT_HOME, HomeOption, JsonOption, StudyName, explained

outcome_app = typer.Typer()


@outcome_app.command()
@explained
def status(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            "-w",
            help="Follow it until nobody drives it any more. Ctrl-C ends only that.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how far a study is: who drives it, its points, and the frontier so far. With --watch
    --json, a line for each change.
    """
    from ebbline.commands.status import show_status, watch_status
    from ebbline.sweeps.study.view import StudyView

    (watch_status if watch else show_status)(StudyView.open(home, study), as_json)


@outcome_app.command()
@explained
def dashboard(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="Of this machine's loopback; 0 takes any that is free."
        ),
    ] = 8765,
    browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in a browser.")
    ] = True,
) -> None:
    """Show a study in a browser as it runs: queue, GPUs, frontier, trainings, failures; and its
    points in optuna-dashboard.
    """
    from ebbline.analysis.dashboard.server import show
    from ebbline.sweeps.study.view import StudyView

    show(StudyView.open(home, study), port, browser)


@outcome_app.command()
@explained
def report(study: StudyName, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Write the tables, the figures and the report of what a study has so far."""
    from ebbline.analysis.results.collect import collect
    from ebbline.outputs import tell_outputs, write_outputs
    from ebbline.sweeps.study.view import StudyView

    view = StudyView.open(home, study)
    tell_outputs(write_outputs(view, collect(view)), as_json)


@outcome_app.command()
@explained
def sync(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    at_once: Annotated[
        int,
        typer.Option("--at-once", "-n", min=1, max=64, help="How many runs are pushed at a time."),
    ] = 8,
    as_json: JsonOption = False,
) -> None:
    """Bring the W&B mirror up to date, and push the runs that were kept offline. Cut off, it goes
    on where it was.
    """
    from ebbline.commands.wandb import sync_study
    from ebbline.sweeps.study.view import StudyView

    raise typer.Exit(sync_study(StudyView.open(home, study), at_once, as_json))


@outcome_app.command(name="wandb-workspace")
@explained
def wandb_workspace(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    entity: Annotated[
        str | None,
        typer.Option(
            help="The W&B user or team; your default one if not given.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the study's workspace and report on W&B, or bring them up to date: frontier,
    hypervolume, parallel coordinates, importance.
    """
    from ebbline.commands.wandb import make_workspace
    from ebbline.sweeps.study.view import StudyView

    make_workspace(StudyView.open(home, study), entity, as_json)


@outcome_app.command()
@explained
def export(
    study: Annotated[
        str | None, typer.Argument(help="A study that ships, or a YAML file.", show_default=False)
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", help="The folder to write; an earlier export of the study is replaced."
        ),
    ] = None,
    style: Annotated[
        Literal["neurips", "acl", "both"],
        typer.Option(help="Whose column widths figures and tables have."),
    ] = "both",
    check: Annotated[
        Path | None,
        typer.Option(
            "--check", help="In place of a study: compare this bundle's keys with those of --home."
        ),
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Write a study's outcome for a paper: figures, LaTeX tables, data, methods, BibTeX, and a
    bundle that runs it again.
    """
    from ebbline.commands import export as exporting
    from ebbline.sweeps.study.home import Home
    from ebbline.sweeps.study.view import StudyView

    if check is not None and study is None and to is None:
        raise typer.Exit(exporting.check(check, Home(home), as_json))
    if study is None or to is None or check is not None:
        raise typer.BadParameter(
            "give STUDY and --to DIR, or --check BUNDLE alone (either with --home)"
        )
    exporting.export_study(StudyView.open(home, study), to, style, as_json)


@outcome_app.command()
@explained
def pick(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    model: Annotated[
        str | None, typer.Option(help="Of this size only.", show_default=False)
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            help="What a point must hold, as refusal_rate=0.95; at most, where lower is better. "
            "Repeatable.",
            show_default=False,
        ),
    ] = None,
    maximise: Annotated[
        str | None,
        typer.Option(
            help="Most of this; the study's usefulness objective if not given.", show_default=False
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            min=0.5,
            max=0.9999,
            help="Hold the floors with this confidence, the pick allowed for.",
            show_default=False,
        ),
    ] = None,
    point: Annotated[
        int | None,
        typer.Option(help="Look at this point instead of the best one.", show_default=False),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export",
            help="Write the point's adapter and its model card into this folder.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Export this training seed's adapter.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Name the point to ship: the most useful one that holds the floor, and how sure that is. Exit
    code 1 when none does.
    """
    from ebbline.commands.pick import Asked, pick_study
    from ebbline.sweeps.study.view import StudyView

    asked = Asked(tuple(floor or ()), maximise, model, point, confidence, seed)
    raise typer.Exit(pick_study(StudyView.open(home, study), asked, export, as_json))


@outcome_app.command()
@explained
def compare(
    studies: Annotated[
        list[str],
        typer.Argument(
            help="Studies that ship, or YAML files; the first is what the others are set against."
        ),
    ],
    home: Annotated[
        list[Path] | None,
        typer.Option(
            help="The home of all of them, or one for each in their order.", show_default=False
        ),
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            help="What operating points must hold, as for `pick`; the strictest refusal floor "
            "if not given.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            help="Write a page (.html) or a picture (.png, .pdf, .svg) here.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Set studies side by side: frontiers, operating points at equal floors, equal points; prompt
    by prompt where that is possible.
    """
    from ebbline.commands.compare import compare_studies

    compare_studies(
        studies,
        home or [Path(os.environ.get("EBBLINE_HOME", DEFAULT_HOME))],
        floor or [],
        to,
        as_json,
    )


@outcome_app.command()
@explained
def papers(study: StudyName, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Set a study beside what papers report, and say of each number what is and is not
    comparable.
    """
    from ebbline.commands.papers import show_papers
    from ebbline.sweeps.study.view import StudyView

    show_papers(StudyView.open(home, study), as_json)
