"""The commands about a home and its studies. Each imports what it needs when it runs, so `--help`
stays fast.
"""

from pathlib import Path
from typing import Annotated

import typer

from ebbline.options import (
    DEFAULT_HOME,
    UPKEEP_PANEL,
    HomeOption,
    JsonOption,
    StudyName,
    WideOption,
    complete_study,
    explained,
)

upkeep_app = typer.Typer()
study_app = typer.Typer(help="Rename, copy or remove a study.", no_args_is_help=True)
HomeStudy = Annotated[
    str,
    typer.Argument(help="A study of the home.", show_default=False, autocompletion=complete_study),
]


@upkeep_app.command(
    rich_help_panel=UPKEEP_PANEL, short_help="List the studies of a home, with their state and size"
)
@explained
def ls(
    home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False, wide: WideOption = False
) -> None:
    """List the studies of a home: state, points, last run, what they cost, size on disk."""
    from ebbline.commands.studies.listing import list_studies
    from ebbline.sweeps.study.home import Home

    list_studies(Home(home), as_json, wide)


@study_app.command()
@explained
def rename(
    study: HomeStudy,
    name: Annotated[str, typer.Argument(help="Its new name.", show_default=False)],
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Rename a study of the home. Nothing runs again; the study file stays as it is."""
    from ebbline.commands.studies.naming import rename_study
    from ebbline.sweeps.study.home import Home

    rename_study(Home(home), study, name, as_json)


@study_app.command()
@explained
def copy(
    study: StudyName,
    name: Annotated[str, typer.Argument(help="The name of the copy.", show_default=False)],
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            help="The file to write; default: NAME.yaml beside the study's file.",
            show_default=False,
        ),
    ] = None,
    frozen: Annotated[
        bool,
        typer.Option("--frozen", help="Copy what the study of the home runs with, not its file."),
    ] = False,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Write a copy of a study file under another name, to change it. Both share the store: a stage
    that both need runs once.
    """
    from ebbline.commands.studies.naming import copy_study
    from ebbline.sweeps.study.home import Home

    copy_study(Home(home), study, name, to, frozen, as_json)


@study_app.command("rm")
@explained
def remove(
    study: HomeStudy,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it without a question.")] = False,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Remove a study from the home: its points, costs, tables and report. Artifacts stay until
    `ebbline store gc`.
    """
    from ebbline.commands.studies.naming import remove_study
    from ebbline.sweeps.study.home import Home

    raise typer.Exit(remove_study(Home(home), study, yes, as_json))


@upkeep_app.command(
    rich_help_panel=UPKEEP_PANEL, short_help="Test what a run needs, with a remedy for each problem"
)
@explained
def doctor(
    home: HomeOption = DEFAULT_HOME,
    address: Annotated[
        str | None,
        typer.Option(help="Ray address; default: the profile's.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Test what a run needs: GPUs, compiler, disks, Ray, logins, store, database. Print a remedy
    for each problem.
    """
    from ebbline.commands.doctor import examine, print_findings
    from ebbline.sweeps.study.home import Home

    raise typer.Exit(print_findings(examine(Home(home), address), as_json))
