"""The commands that look at what a study has come to. Each brings what it needs when it runs, so that `--help` stays fast."""

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
def sync(study: StudyName, home: HomeOption = DEFAULT_HOME) -> None:
    """Bring the W&B mirror up to date, for a study whose run did not wait for it."""
    from ebbline.running import sync_mirror
    from sweeps.home import Home
    from sweeps.study_file import load

    where = Home(home)
    raise typer.Exit(sync_mirror(study, where.continued(load(study)), where))
