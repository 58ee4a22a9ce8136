"""The commands that look at what a study has come to. Each brings what it needs when it runs, so that `--help` stays fast."""

from typing import Annotated

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
def sync(study: StudyName, home: HomeOption = DEFAULT_HOME) -> None:
    """Bring the W&B mirror up to date, for a study whose run did not wait for it."""
    from ebbline.running import sync_mirror
    from sweeps.home import Home
    from sweeps.study_file import load

    where = Home(home)
    raise typer.Exit(sync_mirror(study, where.continued(load(where.named(study))), where))
