"""The commands that look at what a study has come to. Each brings what it needs when it runs, so that `--help` stays fast."""

from typing import Annotated
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
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow it until nobody drives it any more. Ctrl-C ends only that.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how far a study is: who drives it, its points, and the frontier so far. With --watch --json, a line for each change."""
    from ebbline.status import show_status, watch_status
    from sweeps.home import Home
    from sweeps.study_file import load

    where = Home(home)
    (watch_status if watch else show_status)(where.continued(load(where.named(study))), where, as_json)


@outcome_app.command()
@explained
def report(study: StudyName, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Write the tables, the figures and the report of what a study has so far."""
    from ebbline.outputs import tell_outputs, write_outputs
    from sweeps.home import Home
    from sweeps.study_file import load

    where = Home(home)
    tell_outputs(write_outputs(where.continued(load(where.named(study))), where), as_json)


@outcome_app.command()
@explained
def sync(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    at_once: Annotated[int, typer.Option("--at-once", "-n", min=1, max=64, help="How many runs are pushed at a time.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Bring the W&B mirror up to date, and push the runs that were kept offline. Cut off, it goes on where it was."""
    from ebbline.syncing import sync_study
    from sweeps.home import Home
    from sweeps.study_file import load

    where = Home(home)
    raise typer.Exit(sync_mirror(study, where.continued(load(where.named(study))), where))
    raise typer.Exit(sync_mirror(study, where.continued(load(study)), where))


@outcome_app.command()
@explained
def export(
    study: Annotated[str | None, typer.Argument(help="A study that ships, or a YAML file.", show_default=False)] = None,
    to: Annotated[Path | None, typer.Option("--to", help="The folder to write; an earlier export of the study is replaced.")] = None,
    style: Annotated[Literal["neurips", "acl", "both"], typer.Option(help="Whose column widths figures and tables have.")] = "both",
    check: Annotated[
        Path | None, typer.Option("--check", help="In place of a study: compare this bundle's keys with those of --home.")
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Write a study's outcome for a paper: figures, LaTeX tables, data, methods, BibTeX, and a bundle that runs it again."""
    from ebbline import exporting
    raise typer.Exit(sync_study(study, where.continued(load(study)), where, at_once, as_json))


@outcome_app.command(name="wandb-workspace")
@explained
def wandb_workspace(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    entity: Annotated[str | None, typer.Option(help="The W&B user or team; your default one if not given.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the study's workspace and report on W&B, or bring them up to date: frontier, hypervolume, parallel coordinates, importance."""
    from ebbline.workspace import make_workspace
    from sweeps.home import Home
    from sweeps.study_file import load

    where = Home(home)
    if check is not None and study is None and to is None:
        raise typer.Exit(exporting.check(check, where, as_json))
    if study is None or to is None or check is not None:
        raise typer.BadParameter("give STUDY and --to DIR, or --check BUNDLE alone (either with --home)")
    exporting.export_study(where.continued(load(study)), where, to, style, as_json)
    make_workspace(where.continued(load(study)), where, entity, as_json)
