"""What all commands share: their common options, and the step from an error to a message and an
exit code.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from ebbline import sweeps
from ebbline.tasks.errors import ClusterLost, DatabaseLost, EbblineError, StudyHeld
from ebbline.tasks.extras import extras_explained

DEFAULT_HOME = Path("runs")
# The groups of `ebbline --help`
STUDY_PANEL = "A study, in the order of use"
OUTCOME_PANEL = "Its outcome"
TOOL_PANEL = "Single tools, without a study"
UPKEEP_PANEL = "Upkeep"
# Exit codes of EXIT_CODES. LOST is EX_TEMPFAIL of sysexits.h: trying again may succeed.
FAILED_POINTS, HELD, OVER_BUDGET, OUTPUT_MISSING, LOST, STOPPED = 3, 4, 5, 6, 75, 130


def complete_study(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Complete a study's name for a shell, from the shipped studies and those of the home. The
    shell itself completes YAML files.
    """
    given = context.params.get("home")
    if isinstance(given, list | tuple):  # `compare` takes several homes
        given = given[0] if given else None
    home = Path(given or os.environ.get("EBBLINE_HOME") or DEFAULT_HOME).expanduser()
    ship = {path.stem: "ships" for path in (Path(sweeps.__path__[0]) / "studies").glob("*.yaml")}
    own = {path.parent.name: f"in {home}" for path in home.glob("studies/*/file")}
    return sorted(
        (name, origin) for name, origin in {**ship, **own}.items() if name.startswith(incomplete)
    )


_STUDY_HELP = (
    "A shipped study (see `ebbline studies`), a YAML file, or the name of a study in the home."
)
StudyName = Annotated[
    str, typer.Argument(help=_STUDY_HELP, show_default=False, autocompletion=complete_study)
]
OptionalStudyName = Annotated[
    str | None, typer.Argument(help=_STUDY_HELP, show_default=False, autocompletion=complete_study)
]
StudyNames = Annotated[
    list[str],
    typer.Argument(
        help=f"{_STUDY_HELP} The others are compared with the first.",
        autocompletion=complete_study,
    ),
]
HomeOption = Annotated[
    Path,
    typer.Option(
        "--home", envvar="EBBLINE_HOME", help="The folder of the store and of all studies."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, or cuda.")]
BasesOption = Annotated[
    Path | None,
    typer.Option(
        help="A folder that keeps the exact projector's bases for later calls.", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
WideOption = Annotated[
    bool, typer.Option("--wide", help="Show all columns, wider than the terminal.")
]
EXIT_CODES = (
    f"Exit codes: 0 done; 1 an error that the message explains; 2 wrong usage; {FAILED_POINTS} "
    f"done, but points have no result; {HELD} another driver has the study; {OVER_BUDGET} the "
    "study's budget stopped it (raise it and run the same command to continue); "
    f"{OUTPUT_MISSING} done, but an output could not be made (`ebbline report` tries again); "
    f"{LOST} the cluster or the database was lost (run the same command to continue); "
    f"{STOPPED} stopped on request (run the same command to continue)."
)


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an EbblineError, or a missing package of an extra, into one message and an exit code.
    Any other exception is a bug and keeps its traceback.
    """

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with extras_explained("this command"):
                command(*args, **kwargs)
        except EbblineError as error:
            code = (
                HELD
                if isinstance(error, StudyHeld)
                else LOST
                if isinstance(error, ClusterLost | DatabaseLost)
                else 1
            )
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            if kwargs.get("as_json"):
                print(
                    json.dumps(
                        {"error": str(error), "kind": type(error).__name__, "exit_code": code},
                        indent=1,
                    )
                )
            raise typer.Exit(code) from None

    return wrapped


def as_typed(context: typer.Context) -> str:
    """The command line of this process, quoted for a shell."""
    program = context.find_root().info_name or "ebbline"
    return shlex.join(
        [*("python -m ebbline" if program.endswith(".py") else program).split(), *sys.argv[1:]]
    )
