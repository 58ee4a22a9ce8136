"""What all commands share: their common options, and the step from an error to a message and an
exit code.
"""

import inspect
import json
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from ebbline import sweeps
from ebbline.boundary.answers import HELD, LOST, answer_to, debugging
from ebbline.tasks.errors import StudyError
from ebbline.tasks.extras import extras_explained

DEFAULT_HOME = Path("runs")
# The groups of `ebbline --help`
STUDY_PANEL = "A study, in the order of use"
OUTCOME_PANEL = "Its outcome"
TOOL_PANEL = "Single tools, without a study"
UPKEEP_PANEL = "Upkeep"
# Exit codes of EXIT_CODES, beside those of ebbline.boundary
FAILED_POINTS, OVER_BUDGET, OUTPUT_MISSING, STOPPED = 3, 5, 6, 130


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
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
TracebackOption = Annotated[
    bool, typer.Option("--traceback", help="Show where an error happened.", hidden=True)
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
    """Give a command the option `--traceback`, and turn every exception into one message and an
    exit code (see ebbline.boundary).
    """

    @wraps(command)
    def wrapped(*args: Any, show_traceback: bool = False, **kwargs: Any) -> None:
        try:
            with extras_explained("this command"):
                command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # typer prints what these need
        except KeyboardInterrupt:
            typer.secho("stopped by Ctrl-C", err=True)
            raise typer.Exit(STOPPED) from None
        except Exception as error:  # noqa: BLE001  # the boundary: nothing is above it
            code = print_error(error, show_traceback, bool(kwargs.get("as_json")))
            raise typer.Exit(code) from None

    signature = inspect.signature(command)
    option = inspect.Parameter(
        "show_traceback", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=TracebackOption
    )
    named = [*signature.parameters.values(), option]
    wrapped.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return wrapped


def print_error(error: BaseException, show_traceback: bool = False, as_json: bool = False) -> int:
    """Print the message for an exception, and its traceback if that is asked for. Returns the exit
    code.
    """
    if show_traceback or debugging():
        traceback.print_exception(error)
    answer = answer_to(error)
    typer.secho(f"error: {answer.text}", fg=typer.colors.RED, err=True)
    if as_json:
        found = {"error": answer.text, "kind": answer.kind, "exit_code": answer.code}
        print(json.dumps(found, indent=1))
    return answer.code


def finite(value: float | None) -> float | None:
    """A callback for options: refuses NaN, which is neither below a minimum nor above a maximum."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


def require_new(file: Path | None, force: bool) -> None:
    """Raise StudyError for an output file that exists, unless the user asked to replace it."""
    if file is not None and file.exists() and not force:
        raise StudyError(f"{file} exists; name another file, or add --force to replace it")


def as_typed(context: typer.Context) -> str:
    """The command line of this process, quoted for a shell."""
    program = context.find_root().info_name or "ebbline"
    return shlex.join(
        [*("python -m ebbline" if program.endswith(".py") else program).split(), *sys.argv[1:]]
    )
