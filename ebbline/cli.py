"""The command line. `--help` imports neither torch, ray nor optuna: each command imports what it
needs when it runs.

EXIT_CODES in ebbline.options lists the exit codes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ebbline.cluster.executors.choice import DEFAULT_EXECUTOR, EXECUTORS
from ebbline.options import (
    DEFAULT_HOME,
    EXIT_CODES,
    HomeOption,
    JsonOption,
    StudyName,
    as_typed,
    explained,
)
from ebbline.outcome_commands import outcome_app
from ebbline.tool_commands import prompts_app, store_app, tool_app

EXECUTOR_NAMES = tuple(kind.name for kind in EXECUTORS)
EXECUTOR_LABELS = ", or ".join(kind.label for kind in EXECUTORS)

app = typer.Typer(
    name="ebbline",
    help="How far do a chat model's refusals ebb when it is fine-tuned, and what brings them back?",
    no_args_is_help=True,
    # Python's plain traceback for a bug: rich's shows locals, which may hold completions
    pretty_exceptions_enable=False,
)


@app.command()
@explained
def studies(as_json: JsonOption = False) -> None:
    """List the studies that ship with ebbline."""
    from ebbline.sweeps.study.study_file import parse, shipped

    rows = {name: parse(path).question for name, path in shipped().items()}
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for name, question in rows.items():
        print(f"{name:12} {question}")


@app.command()
@explained
def validate(study: StudyName, as_json: JsonOption = False) -> None:
    """Check a study file: keys, types, ranges, the rows on this machine, and whether its models and
    data are pinned.
    """
    from ebbline.sweeps.search.searcher import check_written_points
    from ebbline.sweeps.study.pins import require_pins, require_rows
    from ebbline.sweeps.study.study_file import load

    loaded = load(study)
    check_written_points(loaded)
    require_rows(loaded)
    require_pins(loaded)
    if as_json:
        print(loaded.model_dump_json(indent=1))
        return
    axes = dict.fromkeys(axis for model in loaded.models for axis in loaded.axes_of(model))
    print(
        f"{loaded.study} is valid: {len(loaded.models)} models, axes {', '.join(axes)}, "
        f"{len(loaded.suites)} suites, {loaded.sampler}"
    )


@app.command()
@explained
def pin(
    study: StudyName,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Where to write the pinned study file.", show_default=False),
    ] = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="Pin files that changed anew: in the file at --to, or in the study file itself.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a study file and fill in the commit and sha256 of every model and data set it names."""
    from ebbline.sweeps.study.pins import pin_study
    from ebbline.sweeps.study.study_file import shipped, source_of

    if to is None and (not update or study in shipped()):
        raise typer.BadParameter("give --to FILE, or --update for a study file of your own")
    to, pins = source_of(study) if to is None else to, []
    for line in pin_study(study, to, update):
        pins.append(line)
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)
    if as_json:
        print(json.dumps({"wrote": str(to), "pins": pins}, indent=1))
        return
    if update and not pins:
        print(f"every pin of {to} fits its content; nothing was changed")
        return
    print(f"wrote {to}; next: ebbline validate {to}")


@app.command()
@explained
def plan(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Plan for these hosts: `2x8xA100,1x4` is hosts x GPUs x type.",
            show_default=False,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Plan for the Ray cluster at this address; default: the profile's.",
            show_default=False,
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="Logical GPUs of a local cluster without real ones.", show_default=False),
    ] = None,
    why: Annotated[int, typer.Option("--why", help="How many missing stages to explain.")] = 12,
    as_json: JsonOption = False,
) -> None:
    """Predict what a run takes: stages, GPU-hours, dollars, wall time, disk. Draw the schedule.
    Explain why stages must run.
    """
    from ebbline.commands.plan import capacity_of, plan_study
    from ebbline.sweeps.search.searcher import check_written_points
    from ebbline.sweeps.study.view import StudyView

    view = StudyView.open(home, study)
    check_written_points(view.study)
    plan_study(
        view,
        capacity_of(view.study, cluster, address or view.home.profile.address, gpus),
        why,
        as_json,
    )


@app.command(epilog=EXIT_CODES)
@explained
def run(
    context: typer.Context,
    study: StudyName,
    points: Annotated[
        list[int] | None,
        typer.Argument(
            metavar="[POINT]...",
            help="With --retry: the numbers of the points to try again; default: all that failed.",
            show_default=False,
        ),
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    executor: Annotated[
        Literal[EXECUTOR_NAMES],  # type: ignore[valid-type]  # as the table has them
        typer.Option(help=f"Where stages run: {EXECUTOR_LABELS}."),
    ] = DEFAULT_EXECUTOR.name,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray address: `local` starts a cluster here, `auto` joins a running one; "
            "default: the profile's.",
            show_default=False,
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="Logical GPUs of a local cluster without real ones.", show_default=False),
    ] = None,
    wandb: Annotated[
        bool, typer.Option(help="Mirror to Weights & Biases (offline unless you are logged in).")
    ] = True,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="Accept a file with more points, axis values, seeds or a further size.",
        ),
    ] = False,
    change: Annotated[
        bool,
        typer.Option(
            "--change",
            help="Accept also another suite, limit or content of a file; what it concerns runs "
            "again for existing points.",
        ),
    ] = False,
    retry: Annotated[
        bool,
        typer.Option("--retry", help="Try failed points again, after their cause was mended."),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object at the end; the rest to stderr."),
    ] = False,
) -> None:
    """Run a study to its report. The same command continues an interrupted run and reruns no
    finished stage.

    Ctrl-C once: running stages finish, nothing new starts. Ctrl-C twice: stop now. Both print how
    to continue.
    """
    from ebbline.commands.run import Place, run_study
    from ebbline.sweeps.study.view import StudyView

    if points and not retry:
        raise typer.BadParameter("numbers of points need --retry")
    view = StudyView.open(home, study, extend, change)
    place = Place(executor, address or view.home.profile.address, gpus)
    again = (points or None) if retry else ()
    raise typer.Exit(run_study(view, place, wandb, as_typed(context), as_json, again))


@app.command()
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


app.add_typer(outcome_app)
app.add_typer(tool_app)
app.add_typer(prompts_app, name="prompts")
app.add_typer(store_app, name="store")


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
