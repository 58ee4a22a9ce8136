"""The packages that an installation without extras lacks, and the error that names the command.

`pip install ebbline` has what the commands without a study need. The extra `sweep` has the rest
(pyproject.toml). Invariant: a missing package of an extra is one sentence, never a traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from ebbline.tasks.errors import MissingExtra

SWEEP = "sweep"
# The import names of the packages of `ebbline[sweep]`
SWEEP_MODULES = frozenset(
    (
        "datasets",
        "deepspeed",
        "lm_eval",
        "moocore",
        "optuna",
        "optuna_dashboard",
        "pandas",
        "plotly",
        "pynvml",
        "ray",
        "sklearn",
        "sqlalchemy",
        "wandb",
        "wandb_workspaces",
    )
)


def missing_extra(error: ImportError, needed_by: str) -> MissingExtra | None:
    """The error for a missing package of an extra; None for any other failed import, which is a
    bug. `needed_by` begins the sentence.
    """
    module = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or module not in SWEEP_MODULES:
        return None
    return MissingExtra(
        f"{needed_by} needs packages that are not installed ({module} is missing): "
        f'pip install "ebbline[{SWEEP}]"'
    )


@contextmanager
def extras_explained(needed_by: str) -> Iterator[None]:
    """Raise MissingExtra instead of the ModuleNotFoundError of an extra's package."""
    try:
        yield
    except ModuleNotFoundError as error:
        explained = missing_extra(error, needed_by)
        if explained is None:
            raise
        raise explained from error
