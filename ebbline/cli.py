"""The command line. `--help` imports neither torch, ray nor optuna: each command brings what it
needs when it runs.

Its exit codes are EXIT_CODES, in ebbline.options.
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
    # A bug's traceback in full, plain, and without locals: they may hold completions
    pretty_exceptions_enable=False,
)


@app.command()
@explained
def studies(as_json: JsonOption = False) -> None:
    """List the studies that ship."""
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
    """Check a study file: keys, types, ranges, rows on this machine, and whether all it names is
    pinned.
    """
    from ebbline.sweeps.search.searcher import check_written_points
    from ebbline.sweeps.study.pins import require_rows
    from ebbline.sweeps.study.study import require_pins
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
        Path, typer.Option("--to", help="Where to write the pinned study file.", show_default=False)
    ],
    as_json: JsonOption = False,
) -> None:
    """Fill in the commit and sha256 of every model and data set that a study names, in a copy of
    its file.
    """
    from ebbline.sweeps.study.pins import pin_study

    pins = []
    for line in pin_study(study, to):
        pins.append(line)
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)
    if as_json:
        print(json.dumps({"wrote": str(to), "pins": pins}, indent=1))
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
            help="Plan for these hosts: `2x8xA100,1x4` is hosts x GPUs x type.", show_default=False
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Plan for this Ray cluster, as `run` takes it; the profile's if not given.",
            show_default=False,
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="Logical GPUs of a local cluster without real ones.", show_default=False),
    ] = None,
    why: Annotated[int, typer.Option("--why", help="How many misses to explain.")] = 12,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would take: stages, GPU-hours, dollars, wall time, disk; draw it; and what
    made each stage miss.
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
    home: HomeOption = DEFAULT_HOME,
    executor: Annotated[
        Literal[EXECUTOR_NAMES],  # type: ignore[valid-type]  # as the table has them
        typer.Option(help=f"Where stages run: {EXECUTOR_LABELS}."),
    ] = DEFAULT_EXECUTOR.name,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray address: `local` starts one here, `auto` joins the one there is; the "
            "profile's if not given.",
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
            help="The file was changed to ask for more: points, values of an axis, seeds, a size.",
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object at the end; all else goes to standard error."),
    ] = False,
) -> None:
    """Run a study to its report. The same command continues one that was cut off, and runs nothing
    twice.

    Ctrl-C once finishes what runs and starts nothing new; twice stops now. Both say how to go on.
    """
    from ebbline.commands.run import Place, run_study
    from ebbline.sweeps.study.view import StudyView

    view = StudyView.open(home, study, extend)
    place = Place(executor, address or view.home.profile.address, gpus)
    raise typer.Exit(run_study(view, place, wandb, as_typed(context), as_json))


@app.command()
@explained
def doctor(
    home: HomeOption = DEFAULT_HOME,
    address: Annotated[
        str | None,
        typer.Option(help="Ray address; the profile's if not given.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Try everything that a run needs: GPUs, compiler, disks, Ray, logins, store, database. Says
    how to mend what is missing.
    """
    from ebbline.commands.doctor import examine, tell
    from ebbline.sweeps.study.home import Home

    raise typer.Exit(tell(examine(Home(home), address), as_json))


app.add_typer(outcome_app)
app.add_typer(tool_app)
app.add_typer(prompts_app, name="prompts")
app.add_typer(store_app, name="store")


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
