"""What the commands share: their common options, and how an error becomes a message and an exit code."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from tasks.errors import EbblineError, StudyHeld

StudyName = Annotated[str, typer.Argument(help="A study that ships (see `ebbline studies`) or a YAML file.", show_default=False)]
HomeOption = Annotated[Path, typer.Option("--home", envvar="EBBLINE_HOME", help="The folder that holds the store and all studies.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
DEFAULT_HOME = Path("runs")


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an EbblineError into one message and an exit code; anything else is a bug and keeps its traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EbblineError as error:
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(4 if isinstance(error, StudyHeld) else 1) from None

    return wrapped
