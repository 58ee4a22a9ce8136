"""The commands that look at what a study has come to. Each brings what it needs when it runs, so that `--help` stays fast."""

from typing import Annotated

import typer

from ebbline.options import DEFAULT_HOME, HomeOption, JsonOption, StudyName, explained

outcome_app = typer.Typer()


@outcome_app.command()
@explained
def status(study: StudyName, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Show how far a study is: who drives it, its points, and the frontier so far."""
    from analysis.results import StoredEvidence, baselines, collect, costs_before
    from ebbline.show import print_status
    from sweeps.home import Home
    from sweeps.study_file import load

    where = Home(home)
    loaded = where.continued(load(study))
    evidence = StoredEvidence(loaded, where)
    print_status(loaded, where, collect(loaded, where), baselines(loaded, where), costs_before(loaded, where), evidence, as_json)


@outcome_app.command()
@explained
def report(study: StudyName, home: HomeOption = DEFAULT_HOME) -> None:
    """Write the tables, the figures and the report of what a study has so far."""
    from ebbline.outputs import write_outputs
    from sweeps.home import Home
    from sweeps.study_file import load

    where = Home(home)
    for what, path in write_outputs(where.continued(load(study)), where).items():
        print(f"{what:10} {path}")


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
    make_workspace(where.continued(load(study)), where, entity, as_json)
