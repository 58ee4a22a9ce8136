"""The command line. `--help` imports neither torch, ray nor optuna: each command imports what it
needs when it runs.

EXIT_CODES in ebbline.options lists the exit codes.
"""

import gc
import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ebbline.cluster.executors.choice import DEFAULT_EXECUTOR, EXECUTORS
from ebbline.commands.defended.command import defend_app
from ebbline.options import (
    DEFAULT_HOME,
    EXIT_CODES,
    STOPPED,
    STUDY_PANEL,
    TOOL_PANEL,
    UPKEEP_PANEL,
    HomeOption,
    JsonOption,
    StudyName,
    WideOption,
    as_typed,
    explained,
    print_error,
)
from ebbline.outcome_commands import outcome_app
from ebbline.slurm_command import slurm_app
from ebbline.study_commands import study_app, upkeep_app
from ebbline.tool_commands import prompts_app, store_app, tool_app

EXECUTOR_NAMES = tuple(kind.name for kind in EXECUTORS)
EXECUTOR_LABELS = ", or ".join(kind.label for kind in EXECUTORS)
ExecutorOption = Annotated[
    Literal[EXECUTOR_NAMES],  # type: ignore[valid-type]  # as the table has them
    typer.Option(help=f"Where stages run: {EXECUTOR_LABELS}."),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="Ray address: `local` starts a cluster here, `auto` joins a running one; "
        "default: the profile's.",
        show_default=False,
    ),
]
GpusOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=10_000,
        help="Logical GPUs of a local cluster without real ones.",
        show_default=False,
    ),
]
WandbOption = Annotated[
    bool, typer.Option(help="Mirror to Weights & Biases (offline unless you are logged in).")
]

app = typer.Typer(
    name="ebbline",
    help="How far do a chat model's refusals ebb when it is fine-tuned, and what brings them back?",
    no_args_is_help=True,
    # Python's plain traceback for a bug: rich's shows locals, which may hold completions
    pretty_exceptions_enable=False,
)


@app.command(
    rich_help_panel=STUDY_PANEL, short_help="Write a study about your own model, data and prompts"
)
@explained
def new(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="The chat model: a folder, a GGUF file, or ORG/NAME on the hub. Repeatable: a "
            "size each.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The training data: a file or folder.", show_default=False)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="The prompts that should be refused.", show_default=False),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="The task's items: prompts with answers.", show_default=False),
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(
            help="The model before its alignment, one for each --model; default: by its name.",
            show_default=False,
        ),
    ] = None,
    harmless: Annotated[
        str | None,
        typer.Option(help="Prompts that should be answered.", show_default=False),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="A file with a chat template, for a model without one."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The study's name; default: the model's.", show_default=False)
    ] = None,
    to: Annotated[
        Path, typer.Option("--to", help="The study file to write; it must not exist.")
    ] = Path("study.yaml"),
    as_json: JsonOption = False,
) -> None:
    """Look at your model, data and prompts, and write a commented study about them. Asks for what
    is missing.
    """
    from ebbline.new_study.command import Given, new_study

    given = Given(
        models=tuple(model or ()),
        bases=tuple(base or ()),
        data=data,
        prompts=prompts,
        harmless=harmless,
        task=task,
        chat_template=chat_template,
        name=name,
    )
    new_study(given, to, as_json)


@app.command(rich_help_panel=STUDY_PANEL, short_help="List the studies that ship with ebbline")
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


@app.command(rich_help_panel=STUDY_PANEL, short_help="Check a study file, its rows and its pins")
@explained
def validate(study: StudyName, as_json: JsonOption = False) -> None:
    """Check a study before it runs: keys, types, ranges; and for all files on this machine rows,
    lengths, models and chat templates. Print what was checked.
    """
    from ebbline.checks.validate import validate as validate_study

    raise typer.Exit(validate_study(study, as_json))


@app.command(
    rich_help_panel=STUDY_PANEL, short_help="Fill in the commits and digests of models and data"
)
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


@app.command(
    rich_help_panel=STUDY_PANEL, short_help="Predict GPU-hours, dollars, wall time and disk"
)
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
        typer.Option(
            min=1,
            max=10_000,
            help="Logical GPUs of a local cluster without real ones.",
            show_default=False,
        ),
    ] = None,
    why: Annotated[
        int,
        typer.Option("--why", min=0, max=1_000_000, help="How many missing stages to explain."),
    ] = 12,
    as_json: JsonOption = False,
) -> None:
    """Predict what a run takes: stages, GPU-hours, dollars, wall time, disk. Draw the schedule.
    Explain why stages must run.
    """
    from ebbline.commands.plan import capacity_of, plan_study
    from ebbline.sweeps.forecast.without_pins import plannable
    from ebbline.sweeps.search.searcher import check_written_points
    from ebbline.sweeps.study.view import StudyView

    view, assumed = plannable(StudyView.open(home, study))
    check_written_points(view.study)
    plan_study(
        view,
        capacity_of(view.study, cluster, address or view.home.profile.address, gpus),
        why,
        as_json,
        assumed,
    )


@app.command(
    epilog=EXIT_CODES,
    rich_help_panel=STUDY_PANEL,
    short_help="Run a study to its report, or continue it",
)
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
    executor: ExecutorOption = DEFAULT_EXECUTOR.name,
    address: AddressOption = None,
    gpus: GpusOption = None,
    wandb: WandbOption = True,
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
    wide: WideOption = False,
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
    raise typer.Exit(run_study(view, place, wandb, as_typed(context), as_json, wide, again))


@app.command(
    epilog=EXIT_CODES,
    rich_help_panel=STUDY_PANEL,
    short_help="Measure picked points on fresh prompts and seeds",
)
@explained
def confirm(
    context: typer.Context,
    study: StudyName,
    point: Annotated[
        list[int] | None,
        typer.Option(
            help="Confirm this point; repeatable. Default: each size's nominated points.",
            show_default=False,
        ),
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    executor: ExecutorOption = DEFAULT_EXECUTOR.name,
    address: AddressOption = None,
    gpus: GpusOption = None,
    wandb: WandbOption = True,
    as_json: JsonOption = False,
    wide: WideOption = False,
) -> None:
    """Measure the points that a search nominated, on the prompts and the training seeds of the
    study's section `confirm`, which chose nothing. The report then states what holds.
    """
    from ebbline.commands.confirming.confirm import confirm_study
    from ebbline.commands.run import Place
    from ebbline.sweeps.study.view import StudyView

    view = StudyView.open(home, study)
    place = Place(executor, address or view.home.profile.address, gpus)
    raise typer.Exit(
        confirm_study(view, place, point or (), wandb, as_typed(context), as_json, wide)
    )


app.add_typer(slurm_app)
app.add_typer(outcome_app)
app.add_typer(tool_app)
app.add_typer(defend_app)
app.add_typer(
    prompts_app,
    name="prompts",
    rich_help_panel=TOOL_PANEL,
    short_help="Check a prompt set before a study uses it",
)
app.add_typer(upkeep_app)
app.add_typer(
    study_app,
    name="study",
    rich_help_panel=UPKEEP_PANEL,
    short_help="Rename, copy or remove a study",
)
app.add_typer(
    store_app,
    name="store",
    rich_help_panel=UPKEEP_PANEL,
    short_help="List and verify the store, and remove what nobody needs",
)


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack a letter of a file's name
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    except Exception as error:  # noqa: BLE001  # outside of any command, such as in its options
        sys.exit(print_error(error))
    finally:
        gc.freeze()  # the last collection would search all imported modules: 0.25 s with torch


if __name__ == "__main__":
    main()
